"""``Method``: pattern, criterion, schedule, decay and gradient rules of a sparse training run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from ..checks.rules import DICT, FLAG, NOT_NEGATIVE, TEXT, Rule, either, number, one_of, require, whole
from ..criteria import Criterion, resolve_criterion
from ..masks.gradient_rules import GradientRule, resolve_gradient_rule
from ..masks.patterns import resolve_pattern
from ..types import DecayTarget, WeightProduct
from .schedule import Schedule, from_scratch, require_length

RULES = {
    "name": TEXT,
    "refresh_every": whole(1, of="optimizer steps"),
    "decay": either(NOT_NEGATIVE, Rule("'auto'", lambda value: isinstance(value, str) and value == "auto")),
    "decay_on": one_of(get_args(DecayTarget)),
    "decay_in_head": FLAG,
    "lr_factor": number("a finite number above 0", lambda value: value > 0),
    "hysteresis": NOT_NEGATIVE,
    "refit": FLAG,
    "forward": one_of(["hard", "soft"], allowed="'hard' or 'soft'"),
    "dense_budget": number("at least 0 and below 1", lambda value: 0 <= value < 1),
    "dense_unit": one_of(["layers", "tiles"], allowed="'layers' or 'tiles'"),
    "frozen_in_place": FLAG,
    "weight_product": one_of(get_args(WeightProduct)),
    "adapter_rank": whole(),
    "adapter_merge": FLAG,
    "clear_moments": FLAG,
    "restart_lr": FLAG,
    "distillation": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "distillation_temperature": number("a finite number above 0", lambda value: value > 0),
    "freeze_second_moments": FLAG,
}
"""What the fields of a method may be, beside those that are resolved by name."""

CHANGEABLE = ("criterion", "refresh_every", "decay", "decay_ramp", "decay_in_head", "lr_factor", "hysteresis", "refit")
"""Fields that ``if_pretrained`` may change: none of them says how layers are made."""


@dataclass(frozen=True)
class Method:
    """A complete description of sparse training; the engine knows nothing else.

    Args:
        name: Shown in logs.
        pattern: ``"transposable"``, ``"row_wise"`` or ``"double_pruned"``, which is row-wise and pruned again along
            ``out_features`` for the input gradient.
        criterion: What ranks the entries of a weight: a name or a :class:`sparsetrain.Criterion`.
        schedule: The phases.
        refresh_every: Optimizer steps between two mask searches in a sparse phase.
        decay: λ of the masked decay in sparse phases; 0 turns it off. ``"auto"`` adjusts λ at every refresh, so that
            masks flip 0.60 to 0.95 times as often as they would in the run's dense phase; it needs one. What it adds to
            16-bit gradients or weights is rounded at random, so that its mean is right however small it is.
        decay_on: ``"gradient"``: ``g += λ·(1-M)⊙W``; ``"weight"``: ``W -= lr·λ·(1-M)⊙W``; ``"by_optimizer"``: on
            weights with SGD, on gradients otherwise; ``"share"``: ``W -= λ·(1-M)⊙W``, with λ at most 1, the same pull
            for every optimizer, learning rate and scale of the loss.
        decay_ramp: In which λ grows from 0 to its value in a sparse phase, in steps (int) or as a fraction of the run
            (float).
        decay_in_head: The decay begins with the run, in a dense head too: products are dense there, but what masks
            would prune is near zero when they come into force. The ramp is counted from the first step then.
        lr_factor: By which the learning rate of layers with masks is multiplied while the masks are in force: what an
            optimizer's step changes in their weights, its weight decay and a decay on gradients too, but not what a
            decay on weights does before it. Not for LBFGS, nor for optimizers that hold weights in their state.
        hysteresis: Bonus of entries that are kept now, as a fraction of the layer's mean score: masks flip less.
        refit: When masks come into force after a dense phase, move the entries they keep to where the layers' outputs
            are closest to those of the dense weights, by least squares over the inputs of the last 32 steps.
        forward: ``"hard"``: products see ``W⊙M``; ``"soft"``: kept entries shrink by what is pruned beside them, times
            a factor that is fixed at the first sparse step.
        dense_budget: What may stay dense of the layers that are selected, as a fraction: where masking costs most by
            the criterion's scores, compared over all layers.
        dense_unit: ``"layers"``: whole layers, a fraction of the weights, chosen when masks first come into force or
            pull; ``"tiles"``: 4×4 tiles, chosen at every search; layers with both kinds of tiles have dense products.
        frozen_in_place: Write zeros into what frozen masks prune; False keeps the dense master.
        gradient: Rule of the weight gradient in sparse phases.
        frozen_gradient: Rule of the weight gradient in frozen phases.
        weight_product: ``"dense"``, or ``"mvue"``: the weight gradient from an unbiased 2:4 estimate of the output
            gradient, so that it can run sparse too.
        adapter_rank: Rank of the low-rank adapters that are trained beside masked weights; 0 for none.
        adapter_start: When they begin, in steps (int) or as a fraction of the run (float).
        adapter_merge: Add them to the weights at the end, which are dense then; False leaves them to
            :meth:`sparsetrain.SparseTraining.adapters`.
        clear_moments: Clear the optimizer's moments of pruned entries when a mask freezes.
        restart_lr: Restart the learning-rate schedule when a mask freezes.
        distillation: Share of the divergence from a dense teacher in the loss of sparse and frozen phases, as
            :meth:`sparsetrain.SparseTraining.distilled` computes it; 0 for none.
        distillation_temperature: T, which divides the logits of both.
        freeze_second_moments: From the first masked phase on, keep Adam's second moments of all parameters as they are.
        if_pretrained: Fields that have other values if the model has been trained before the run: ``criterion``,
            ``refresh_every``, ``decay``, ``decay_ramp``, ``decay_in_head``, ``lr_factor``, ``hysteresis`` or ``refit``.

    Raises:
        ValueError: If a value is not allowed; the message names the field.

    Example:
        >>> Method(pattern="row_wise", refresh_every=10).decay
        0.0

        With a schedule:

        >>> from sparsetrain import dense_prune_retrain
        >>> Method(schedule=dense_prune_retrain(0.25)).schedule.resolve(100).starts
        (0, 25)

        A preset with a field changed:

        >>> from dataclasses import replace
        >>> from sparsetrain.methods import fst
        >>> replace(fst(), dense_budget=0.1).name
        'fst'
    """

    name: str = "custom"
    pattern: str = "transposable"
    criterion: str | Criterion = "magnitude"
    schedule: Schedule = field(default_factory=from_scratch)
    refresh_every: int = 40
    decay: float | Literal["auto"] = 0.0
    decay_on: DecayTarget = "gradient"
    decay_ramp: int | float = 0
    decay_in_head: bool = False
    lr_factor: float = 1.0
    hysteresis: float = 0.0
    refit: bool = False
    forward: Literal["hard", "soft"] = "hard"
    dense_budget: float = 0.0
    dense_unit: Literal["layers", "tiles"] = "layers"
    frozen_in_place: bool = True
    gradient: str | GradientRule = "ste"
    frozen_gradient: str | GradientRule = "masked"
    weight_product: WeightProduct = "dense"
    adapter_rank: int = 0
    adapter_start: int | float = 0.99
    adapter_merge: bool = True
    clear_moments: bool = False
    restart_lr: bool = False
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    freeze_second_moments: bool = False
    if_pretrained: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        resolve_pattern(self.pattern)
        resolve_criterion(self.criterion)
        resolve_gradient_rule(self.gradient)
        resolve_gradient_rule(self.frozen_gradient, "frozen_gradient")
        require_length("decay_ramp", self.decay_ramp)
        require_length("adapter_start", self.adapter_start)
        for name, rule in RULES.items():
            require(name, getattr(self, name), rule)
        if self.decay == "auto" and (self.decay_in_head or self.decay_on == "share"):
            raise ValueError(
                "decay is 'auto', which compares flips with those of a dense head and changes a λ on gradients or "
                "weights: with decay_in_head or decay_on='share', give a number."
            )
        if self.decay_on == "share" and self.decay > 1:  # type: ignore[operator]
            raise ValueError(
                f"decay is {self.decay} with decay_on='share': it must be at most 1 (the share of a pruned weight that "
                "goes in a step), so lower it."
            )
        if self.refit and self.forward == "soft":
            raise ValueError("refit is True but forward is 'soft', whose products see no W⊙M: use forward='hard'.")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule is {self.schedule!r}: it must be a Schedule.")
        if resolve_pattern(self.pattern).search_backward is not None and (
            self.mixes_tiles or any(phase.kept != 2 for phase in self.schedule.phases)
        ):
            raise ValueError(
                f"pattern is {self.pattern!r} but masks are to keep more than 2:4: its second mask is for 2:4 alone, "
                "so use 'row_wise' or 'transposable'."
            )
        self._check_changes()

    def _check_changes(self) -> None:
        """Raise ``ValueError`` if what is to change for a pretrained model may not, or not in this way."""
        require("if_pretrained", self.if_pretrained, DICT)
        for name, value in self.if_pretrained.items():
            require("a key of if_pretrained", name, one_of(CHANGEABLE))
            if name == "criterion":
                require("if_pretrained['criterion']", value, TEXT)  # so that a checkpoint can hold it
        self.chosen(pretrained=True)

    def chosen(self, pretrained: bool) -> "Method":
        """Return the method for a model that has been trained before the run, or for one that has not.

        Args:
            pretrained: Whether it has.

        Example:
            >>> Method(if_pretrained={"criterion": "wanda"}).chosen(pretrained=True).criterion
            'wanda'
        """
        changes = self.if_pretrained if pretrained else {}
        return replace(self, if_pretrained={}, **changes) if self.if_pretrained else self

    def chosen_like(self, saved: Any) -> "Method | None":
        """Return which of the two methods that it may be a run had begun with; None if that does not tell.

        Args:
            saved: That run's method as it was described; other arguments than ``if_pretrained`` may differ.

        Example:
            >>> method = Method(name="own", if_pretrained={"criterion": "wanda"})
            >>> method.chosen_like(Method(name="own", criterion="wanda", decay=0.1).describe()).criterion
            'wanda'
        """
        if not self.if_pretrained or not isinstance(saved, Mapping) or saved.get("name") != self.name:
            return None
        choices = [self.chosen(pretrained) for pretrained in (False, True)]
        described = [choice.describe() for choice in choices]
        alike = [sum(saved.get(field) == one[field] for field in self.if_pretrained) for one in described]
        return None if alike[0] == alike[1] else choices[alike[1] > alike[0]]

    def choice_in_words(self, chosen: "Method") -> str:
        """Say which of the two methods that it may be was chosen; empty if there is but one.

        Args:
            chosen: What :meth:`chosen` returned.

        Example:
            >>> method = Method(if_pretrained={"criterion": "wanda"})
            >>> method.choice_in_words(method.chosen(pretrained=True))
            "pretrained, so criterion='wanda'"
        """
        if not self.if_pretrained:
            return ""
        changes = ", ".join(f"{name}={value!r}" for name, value in self.if_pretrained.items())
        return f"pretrained, so {changes}" if chosen == self.chosen(pretrained=True) else "from scratch"

    @property
    def needs_total(self) -> bool:
        """Whether the length of the run must be known, because something is a fraction of it."""
        return self.schedule.needs_total or bool(self.fractions)

    @property
    def fractions(self) -> list[str]:
        """The fields beside the schedule that are fractions of the run and in use."""
        used = {"adapter_start": self.adapter_rank, "decay_ramp": self.decay_ramp}
        return [name for name in used if used[name] and isinstance(getattr(self, name), float)]

    @property
    def mixes_tiles(self) -> bool:
        """Whether some tiles of a masked layer may stay dense."""
        return self.dense_budget > 0 and self.dense_unit == "tiles"

    def describe(self) -> dict[str, Any]:
        """Return the method as plain numbers, strings, lists and dicts, for logs and checkpoints."""
        plain = asdict(self)
        plain["criterion"] = repr(resolve_criterion(self.criterion))
        for key in ("gradient", "frozen_gradient"):
            rule = resolve_gradient_rule(getattr(self, key))
            plain[key] = {"kept": rule.kept, "pruned": rule.pruned}
        plain["schedule"] = [asdict(phase) for phase in self.schedule.phases]
        return plain
