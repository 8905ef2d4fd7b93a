"""Low-rank adapters beside frozen sparse weights, trained in the last steps: ``Y = X·(W⊙M)ᵀ + X·Dᵀ·Uᵀ``."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks.rules import each, mapping
from ..checks.states import by_layer, require_part, tensor
from ..distributed.layouts import Layout, layout_of
from ..distributed.peers import ALONE, Peers
from ..distributed.shards import gradient_here, is_spread, local, replicated_like
from ..kernels.torch_internals import after_backward
from ..layers.masked_layer import MaskedLayer
from .base import Entry, Modifier, Resumed, Run, Setup, Step
from .late_parameters import LateParameters, require_late_start
from .sums import summed


class Adapters(Modifier):
    """Adapters of all layers, which optimizers own from their gradients' arrival until these are cleared.

    Outside of the model's parameters: ``state_dict`` keys stay those of the dense model, values and moments are in the
    run's own state, and gradients are averaged over data-parallel ranks here.

    Args:
        layers: Layer name to layer.
        optimizers: Those that own the layers' weights; adapters join the groups of their weights.
        rank: Of the adapters, at most the layer's smaller size.
        peers: Processes over which gradients are averaged, as each backward ends.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> adapters = Adapters({"fc": layer}, [optimizer], rank=2)
        >>> [tuple(part.shape) for part in adapters.parts["fc"]], len(optimizer.param_groups[0]["params"])
        ([(2, 8), (4, 2)], 2)

    Source: Mozaffari et al., "SLoPe", ICLR 2025, arXiv 2405.16325.
    """

    name = "adapters"

    def __init__(
        self, layers: Mapping[str, MaskedLayer], optimizers: Sequence[Optimizer], rank: int, peers: Peers = ALONE
    ) -> None:
        self._peers, self._new, self._is_on = peers, set[int](), False
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers = dict(layers)
        for name, layer in self._layers.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # the same on every rank
            rows, columns = layer.matrix_shape
            size = min(rank, rows, columns)
            down = torch.randn(size, columns, generator=generator) / columns**0.5
            up = torch.zeros(rows, size)
            made = tuple(nn.Parameter(replicated_like(part.to(layer.master), layer.weight)) for part in (down, up))
            self.parts[name] = (made[0], made[1])
        self._late = LateParameters(optimizers, self._layers, self.parts)
        every = [part for pair in self.parts.values() for part in pair]
        averages = peers.size > 1 or any(map(is_spread, every))
        self._handles = [part.register_post_accumulate_grad_hook(self._arrived) for part in every if averages]  # type: ignore[no-untyped-call]

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` unless the optimizers can take up parameters in mid-run."""
        if setup.method.adapter_rank:
            require_late_start(setup.optimizers)

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return them for methods with an ``adapter_rank``."""
        rank = run.method.adapter_rank
        return cls(run.layers, run.optimizers, rank, run.peers) if rank else None

    def before_step(self, run: Run, step: Step) -> None:
        """Give adapters that begin now a state."""
        if self._is_on:
            self._late.start_state(step.optimizer)

    def after_step(self, run: Run) -> None:
        """Begin when it is time."""
        self.clear_gradients()
        self._late.leave()
        self._switch_in(run)

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Have adapters beside masks alone."""
        self._switch_in(run)

    def _switch_in(self, run: Run) -> None:
        self.switch(run.clock >= run.steps(run.method.adapter_start) and run.phase != "dense")

    def switch(self, on: bool) -> None:
        """Put adapters into the layers' forward, or take them out."""
        self._is_on = on
        for name, layer in self._layers.items():
            layer.adapter = self.parts[name] if on else None

    def _arrived(self, part: Tensor) -> None:
        """Note an adapter's gradient; when the backward is over, those that came are averaged in one message."""
        if not self._new:
            after_backward(self._average)
        self._new.add(id(part))

    @torch.no_grad()
    def _average(self) -> None:
        """Average new gradients over data-parallel ranks, which wrap the model's own parameters alone.

        So they are final before they are clipped. What micro-batches before have left is equal on all ranks already.
        """
        every = [part for pair in self.parts.values() for part in pair if id(part) in self._new]
        self._new.clear()
        gradients = [gradient for part in every if (gradient := gradient_here(part)) is not None]
        if self._peers.size > 1:
            shares = [gradient / self._peers.size for gradient in gradients]
            for gradient, averaged in zip(gradients, summed(shares, self._peers), strict=True):
                gradient.copy_(averaged)

    def clear_gradients(self) -> None:
        """Do what ``zero_grad()`` of the model does for its own parameters: trainers may call no other."""
        for pair in self.parts.values():
            for part in pair:
                part.grad = None

    def adapters(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return down ``[r, I]`` and up ``[O, r]`` of every layer."""
        return self.parts

    def finish(self, run: Run) -> bool:
        """Add adapters in use to the weights, if the method merges them; return whether it does."""
        merges = run.method.adapter_merge and any(layer.adapter for layer in self._layers.values())
        if merges:
            self.merge_()
        return merges

    @torch.no_grad()
    def merge_(self) -> None:
        """Write what products see, masked weights with their adapters, into the weights, which are dense then."""
        for layer in self._layers.values():
            if layer.is_masked:
                layer.master.copy_(layer.effective_weight(layer.master, with_adapter=True))

    def detach(self) -> None:
        """Take the adapters out of layers and optimizers."""
        self.switch(False)
        self._late.remove()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the values and of what optimizers know of them."""
        values = {name: [local(part).detach().cpu().clone() for part in pair] for name, pair in self.parts.items()}
        return {"values": values, "optimizer": self._late.state_dict()}

    def layouts(self) -> Mapping[tuple[str | int, ...], Layout]:
        """Return that every process has them."""
        pairs = ((name, index, part) for name, pair in self.parts.items() for index, part in enumerate(pair))
        return {("values", name, index): layout_of(local(part)) for name, index, part in pairs}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged or of other adapters; changes nothing."""
        if state is None:
            raise ValueError(
                "state has no adapters but the method's adapter_rank is not 0: resume with the same method."
            )
        rules = {
            name: each([tensor(None, part.shape, finite=True) for part in pair]) for name, pair in self.parts.items()
        }
        both = {"values": by_layer(rules, needed=None), "optimizer": self._late.rule}
        require_part(self.name, state, mapping(both))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name, pair in self.parts.items():
            for part, saved in zip(pair, state["values"][name], strict=True):
                local(part).copy_(saved)
        self._late.load_state_dict(state["optimizer"])
