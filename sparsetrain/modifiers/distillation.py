"""``Distillation``: mixes what a dense teacher says about a batch into the loss of the sparse student."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks.rules import DICT, FLAG, Rule, mapping, optional
from ..checks.states import like, require_part
from ..types import PhaseKind
from .base import Entry, Modifier, Resumed, Run, Setup, Step
from .teacher import copy_of, follow_, host_copies, require_apart, require_copyable, student_in

Forward = tuple[tuple[Any, ...], dict[str, Any], Tensor | None, str, tuple[str, torch.dtype, bool]]


class Distillation(Modifier):
    """``(1 - share)·L + share·T²·KL(teacher ‖ student)`` of softened logits, in float32, averaged over positions.

    The teacher is outside of the model: it has no part in its parameters, ``state_dict``, optimizer or data-parallel
    wrapper. It gets the arguments of the student's last training forward, in evaluation mode and without gradients,
    under the autocast of that forward. Forwards in evaluation mode or without gradients do not count.

    Args:
        share: Of the divergence in the loss; with 0 this does nothing.
        temperature: T, which divides logits.
        model: The model that is trained.
        teacher: A teacher that is at hand; None copies the student when :meth:`take` is called.
        logits_from: Name of the student in the model; "" is the model itself.

    Raises:
        ValueError: If there is no such submodule, or the teacher can be none.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> distillation = Distillation(0.5, 2.0, model)
        >>> distillation.attach()
        >>> distillation.take()
        >>> distillation.active = True
        >>> loss = model(torch.ones(2, 8)).square().mean()
        >>> torch.allclose(distillation.mixed(loss), 0.5 * loss)  # teacher and student are still equal
        True
        >>> distillation.detach()

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """

    name = "distillation"

    def __init__(
        self,
        share: float,
        temperature: float,
        model: nn.Module,
        teacher: nn.Module | None = None,
        logits_from: str = "",
    ) -> None:
        self.share = share
        self.temperature = temperature
        self.logits_from = logits_from
        self.teacher = teacher
        self.given = teacher is not None
        self.active = False
        self._student = student_in(model, logits_from)
        self._forward: Forward | None = None
        self._mixed: Tensor | None = None
        self._called = False
        self._term: Tensor | None = None
        self._handle: RemovableHandle | None = None
        if teacher is not None and not share:
            raise ValueError("teacher is given but the method's distillation is 0: give it a share, or no teacher.")
        if teacher is not None:
            require_apart(teacher, model)
        elif share:
            require_copyable(self._student)

    @property
    def term(self) -> float | None:
        """T²·KL at the last call of :meth:`loss` that mixed; None before."""
        return None if self._term is None else float(self._term)

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` if there is no such submodule, or the teacher can be none."""
        cls._made(setup)

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with a share of ``distillation``."""
        return cls._made(setup) if run.method.distillation else None

    @classmethod
    def _made(cls, setup: Setup) -> Self:
        method = setup.method
        share, temperature = method.distillation, method.distillation_temperature
        return cls(share, temperature, setup.model, setup.teacher, setup.logits_from)

    def attach(self) -> None:
        """Hang on the student; before it is compiled."""
        if self.share and self._handle is None:
            self._handle = self._student.register_forward_hook(_ForwardHook(self), with_kwargs=True)
            if self.teacher is not None:
                self.teacher.eval()

    def detach(self) -> None:
        """Take the hook off the student and let the teacher go."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self.teacher = self._forward = self._mixed = None

    def take(self) -> None:
        """Make the student as it is now the teacher, if there is to be one and there is none yet."""
        if self.share and self.teacher is None:
            self.teacher = copy_of(self._student)

    def mixed(self, loss: Tensor) -> Tensor:
        """Return the loss with the divergence mixed in; the loss itself in dense phases and without gradients.

        Raises:
            RuntimeError: If no forward of the student was seen, or there are no logits to compare.
        """
        teacher = self.teacher
        if not self.active or teacher is None or not torch.is_grad_enabled():
            return loss
        forward, self._forward = self._forward, None
        if forward is None:
            raise RuntimeError(
                f"no forward of {self._who} in training mode with gradients came before distilled(): call that module "
                "in the training step, or name the one that gives the logits in logits_from."
            )
        args, kwargs, logits, kind, (device, dtype, enabled) = forward
        if logits is None:
            raise RuntimeError(
                f"the output of {self._who} is of type {kind}: it must be a tensor of logits or have 'logits', so name "
                "the module that gives them in logits_from."
            )
        follow_(teacher, self._student)
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            target = _find_logits(teacher(*args, **kwargs))
        if target is None or target.shape != logits.shape:
            found = "no logits" if target is None else f"logits {tuple(target.shape)}"
            raise RuntimeError(
                f"the teacher gives {found} where the student gives {tuple(logits.shape)}: they must be alike, so pass "
                "a teacher with the same outputs."
            )
        term = softened_divergence(logits, target, self.temperature)
        self._term, self._called = term.detach(), True
        self._mixed = (1 - self.share) * _widened(loss) + self.share * term.to(loss.device)
        return self._mixed

    def before_step(self, run: Run, step: Step) -> None:
        """Raise ``RuntimeError`` if an optimizer is about to step on a loss that was not mixed."""
        if step.gradients and self.active and self.teacher is not None and not self._called:
            raise RuntimeError(
                f"the method's distillation is {self.share} but distilled() was not called since the last step: run "
                "backward on training.distilled(loss) instead of loss, or set distillation=0."
            )

    def after_step(self, run: Run) -> None:
        """Forget what belongs to the step that succeeded."""
        self._forget()

    def leave_phase(self, run: Run, upcoming: PhaseKind, regroups: bool) -> None:
        """Take the student as teacher while it is dense."""
        if upcoming != "dense":
            self.take()

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Mix losses while masks are in force."""
        self.active = run.phase != "dense"

    def metrics(self, run: Run) -> dict[str, float | None]:
        """Return the divergence on the last batch, nats."""
        return {"distillation": self.term}

    def _forget(self) -> None:
        self._called = False
        self._forward = self._mixed = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return copies of the teacher's tensors, unless the user has them; None without distillation."""
        if not self.share:
            return None
        own = None if self.given or self.teacher is None else host_copies(self.teacher.state_dict())
        return {"given": self.given, "teacher": own, "term": self.term}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged, of another student or without a teacher; changes nothing."""
        term = Rule("a number, or None", lambda value: value is None or isinstance(value, float))
        rule = mapping({"given": FLAG, "teacher": optional(DICT), "term": term})
        require_part(self.name, state, optional(rule))
        if self.given:
            return
        if state is not None and state["given"]:
            raise ValueError("state is of a run with a teacher of your own: pass the same one as teacher.")
        saved = None if state is None else state["teacher"]
        if saved is None:
            if resumed.active:
                raise ValueError(
                    f"state has no teacher but the method's distillation is {self.share}: pass one as teacher, or set "
                    "distillation=0."
                )
            return
        here = self._student.state_dict()
        for name in [*here, *saved]:
            if name not in here or name not in saved or like(here[name]).complaint(name, saved[name]):
                raise ValueError(
                    f"state has a teacher whose {name!r} differs from that of {self._who}: resume with the same model "
                    "and logits_from."
                )

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take back what :meth:`state_dict` returned and :meth:`check_state` let pass."""
        if state is None:
            return
        self._forget()
        self._term = None if state["term"] is None else torch.tensor(state["term"])
        if self.given:
            return
        if state["teacher"] is None:
            self.teacher = None
            return
        self.take()
        assert self.teacher is not None
        self.teacher.load_state_dict(state["teacher"])

    @property
    def _who(self) -> str:
        return f"{self.logits_from!r}" if self.logits_from else "the model"

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._mixed is not None and _holds(output, self._mixed):
            return  # a module around the training step, whose loss is mixed already
        logits = _find_logits(output)
        device = "cpu" if logits is None else logits.device.type
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._forward = (args, kwargs, logits, type(output).__name__, autocast)


def softened_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return ``T²·KL(softmax(target / T) ‖ softmax(logits / T))`` in nats, at least in float32.

    Args:
        logits: Of the student, ``[..., classes]``.
        target: Of the teacher, likewise.
        temperature: T.

    Returns:
        A scalar: the mean over positions.

    Example:
        >>> softened_divergence(torch.zeros(3, 4), torch.zeros(3, 4), 2.0).item()
        0.0
    """
    ours = F.log_softmax(_widened(logits) / temperature, dim=-1)
    theirs = F.log_softmax(_widened(target) / temperature, dim=-1)
    positions = max(1, logits.numel() // logits.shape[-1])
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * (temperature**2 / positions)


class _ForwardHook:
    """Notes training forwards of the student; copied or pickled with it, it does nothing."""

    def __init__(self, distillation: Distillation | None = None) -> None:
        self.distillation = distillation

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        distillation = self.distillation
        if distillation is not None and distillation.active and module.training and torch.is_grad_enabled():
            distillation._note(args, kwargs, output)


def _find_logits(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.dim() else None


def _holds(output: Any, loss: Tensor) -> bool:
    return output is loss or (isinstance(output, Mapping) and output.get("loss") is loss)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
