"""``MaskState``: the masks of a run and what is known of their history: refresh, flips, ages."""

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.equal_codes import Groups, require_equal_codes
from ..distributed.peers import ALONE, Peers
from ..distributed.shards import groups_of, part_like
from ..kernels.tile_codes import unpack_codes
from ..layers.masked_layer import MaskedLayer
from ..layers.one_pass import search_in_one_pass_
from ..layers.sharded.dense_budget import dense_layers_of
from ..layers.sharded.totals import counted_once, sum_over_parts, total
from ..masks.matrices import by_device
from ..masks.tile_codes import KEEP_ALL
from .mask_search import MaskSearch
from .mask_statistics import kept_fractions, layer_statistics, rate_of

MAX_AGE = 255

STATE_KEYS = (
    "pattern", "exists", "kept", "dense", "codes", "shapes", "flips", "virtual_flips", "sums_at_refresh", "ages",
    "criterion", "backward_codes", "transposed",
)  # fmt: skip
"""What :meth:`MaskState.state_dict` returns."""


class MaskState:
    """Masks of a model's sparse layers.

    Args:
        layers: Layer name to layer.
        search: What finds the masks.
        track_age: Keep for every entry the refreshes since it last flipped (one byte a weight, up to 255).
        peers: Processes that hold the same weights, where those are whole.

    Example:
        >>> from sparsetrain import Magnitude, SparseLinear
        >>> from sparsetrain.masks.patterns import TRANSPOSABLE
        >>> masks = MaskState({"fc": SparseLinear(8, 4)}, MaskSearch(TRANSPOSABLE, Magnitude()))
        >>> masks.refresh(0, virtual=False)
        >>> masks.exists, masks.violations()
        (True, 0)
    """

    def __init__(
        self, layers: Mapping[str, MaskedLayer], search: MaskSearch, track_age: bool = False, peers: Peers = ALONE
    ) -> None:
        self.layers, self.peers = dict(layers), peers
        self.search = search
        self.pattern, self.criterion = search.pattern, search.criterion
        self.kept = 2  # of every four entries
        self.dense: frozenset[str] | None = None  # layers that a budget keeps dense, once they are chosen
        self.exists = False
        self.refresh_ms = 0.0
        self.flips: dict[str, Tensor] = {}
        self.virtual_flips: dict[str, Tensor] = {}
        self.sums_at_refresh: dict[str, Tensor] = {}  # of each layer when its mask was searched last
        self.ages = {
            name: torch.zeros(layer.master.shape, dtype=torch.uint8, device=layer.master.device)
            for name, layer in self.layers.items()
            if track_age
        }

    @property
    def maskable(self) -> dict[str, MaskedLayer]:
        """The layers that get masks: all but those that stay dense."""
        return {name: layer for name, layer in self.layers.items() if name not in (self.dense or ())}

    @property
    def is_observed(self) -> bool:
        """Whether the criterion has what it ranks by, of any layer: before, watched masks would be others'."""
        return len(self.criterion.missing(self.layers)) < len(self.layers)

    @property
    def codes(self) -> dict[str, Tensor]:
        """Layer name to int16 tile codes ``[O/4, I/4]``."""
        return {name: layer.mask_codes for name, layer in self.layers.items()}

    @torch.no_grad()
    def refresh(self, clock: int, virtual: bool, names: Collection[str] | None = None) -> None:
        """Search new masks from the masters.

        Args:
            clock: Successful optimizer steps so far.
            virtual: The masks are not in force; their flips are counted apart.
            names: Of the layers whose masks are searched; the others keep theirs. None for all.

        Raises:
            RuntimeError: If data-parallel ranks found different masks.
        """
        start = time.perf_counter()
        wanted = {name: layer for name, layer in self.maskable.items() if names is None or name in names}
        once = self.search.takes_one_pass([*wanted.values()], self.kept, self.exists)
        compared = self.ages if once else self.codes  # one pass counts flips itself
        old = {name: self.codes[name].clone() for name in compared} if self.exists else {}
        if not virtual:
            self.search.warn_of_missing(wanted, clock)
        if once:
            statistics = self._search_in_one_pass(wanted, pack=not virtual)
        else:
            for name, codes in self.search.codes(wanted, self.kept, clock, self.exists).items():
                self.layers[name].set_codes_(codes)
            statistics = layer_statistics(self.maskable, old)
        self._count_ages(old, wanted)
        if self.exists:
            flips = {name: row[5] for name, row in statistics.items()}
            self.flips, self.virtual_flips = (self.flips, flips) if virtual else (flips, self.virtual_flips)
        self.exists = True
        self.sums_at_refresh.update((name, statistics[name][:5]) for name in wanted)
        self.refresh_ms = 1e3 * (time.perf_counter() - start)
        self.refresh_backward()
        require_equal_codes(self.codes, {name: self._holders(layer) for name, layer in self.layers.items()})

    def _holders(self, layer: MaskedLayer) -> Groups:
        """Return the groups of processes that hold the same part of a layer's weight."""
        if layer.shard is None:
            return self.peers.groups
        same, other = (groups_of(layer.shard.weight, cut) for cut in (False, True))
        # all processes are the peers of weights that were whole when the run was made
        given = [group for group in self.peers.groups if group is not None and group not in same + other]
        return *same, *given

    @torch.no_grad()
    def refresh_backward(self) -> None:
        """Search the masks of input gradients again, if they are others than those of the forward."""
        if self.pattern.search_backward is None:
            return
        for layer in self.maskable.values():
            layer.set_backward_codes_(self.pattern.search_backward(layer.matrix, layer.mask_codes))

    def _search_in_one_pass(self, wanted: Mapping[str, MaskedLayer], pack: bool) -> dict[str, Tensor]:
        """Search masks, one launch a layout; layers that are not wanted have no flips."""
        found: dict[str, Tensor] = {}
        for names in by_device({name: layer.master for name, layer in wanted.items()}):
            found.update(zip(names, search_in_one_pass_([wanted[name] for name in names], pack), strict=True))
        return {
            name: found[name] if name in found else torch.zeros(6, dtype=torch.float64, device=layer.master.device)
            for name, layer in self.maskable.items()
        }

    def _count_ages(self, old: Mapping[str, Tensor], wanted: Mapping[str, MaskedLayer]) -> None:
        for name, layer in wanted.items():
            if name in old and name in self.ages:
                age = self.ages[name].to(layer.mask_codes.device)  # the model may have moved, or been sharded
                if layer.shard is not None and age.shape != layer.master.shape:
                    age = part_like(age, layer.shard.weight).contiguous()
                self.ages[name] = age
                flipped = layer.as_weight(unpack_codes(old[name] ^ layer.mask_codes))
                age.add_(age < MAX_AGE).masked_fill_(flipped, 0)

    def keep_dense_(self, names: Collection[str]) -> None:
        """Give these layers no masks any more; their codes keep everything."""
        self.dense = frozenset(names)
        for name in self.dense:
            self.layers[name].mask_codes.fill_(KEEP_ALL)
            for history in (self.flips, self.virtual_flips, self.sums_at_refresh):
                history.pop(name, None)

    def costliest_layers(self, clock: int, budget: float) -> list[str]:
        """Return the layers that masks would cost most by the criterion's scores, within a budget of weights."""
        scores = {name: self.search.scores(name, layer, clock) for name, layer in self.layers.items()}
        return dense_layers_of(self.layers, scores, self.codes, budget)

    def least_costly_layers(self, held: Collection[str], share: float) -> set[str]:
        """Return a share of the maskable layers: those that are held, then those that lose the least magnitude."""
        maskable = self.maskable
        count = max(len(held), round(share * len(maskable)), 1)
        if count == len(maskable):
            return set(maskable)
        fractions = kept_fractions(maskable)
        return set(sorted(fractions, key=lambda name: (name not in held, -fractions[name]))[:count])

    def flip_rate(self, virtual: bool = False) -> float | None:
        """Return the last refresh's flips as a fraction of the entries; None before one."""
        (flips,) = sum_over_parts(self.layers, self.virtual_flips if virtual else self.flips)
        return rate_of(flips, self.layers)

    def flip_rate_ratio(self) -> float | None:
        """Return the last flip rate of a sparse phase over that of a dense one, or None."""
        rate, virtual = self.flip_rate(), self.flip_rate(virtual=True)
        return rate / virtual if rate is not None and virtual else None

    def violations(self) -> int:
        """Count the groups of four, in masks that are in force, that do not keep what they should; must be 0."""
        (counts,) = sum_over_parts(self.layers, self.violation_counts())
        return int(total(counts))

    def violation_counts(self) -> dict[str, Tensor]:
        """Count them in every layer whose mask is in force, in the part that lies here."""
        return {
            name: self.search.count_violations(layer.mask_codes, self.kept)
            for name, layer in self.layers.items()
            if layer.is_masked
        }

    def age_sums(self) -> dict[str, Tensor]:
        """Add up the refreshes since entries last flipped, in the part that lies here, if ages are tracked."""
        return {name: age.sum(dtype=torch.int64) for name, age in self.ages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that the next refresh and the metrics depend on.

        Of sharded layers it has the parts that lie here, and numbers of the whole, so all processes have to call this.
        """
        layers = self.layers.items()
        history = sum_over_parts(self.layers, self.flips, self.virtual_flips, self.sums_at_refresh)
        flips, virtual_flips, sums_at_refresh = history
        return {
            "pattern": self.pattern.name,
            "exists": self.exists,
            "kept": self.kept,
            "dense": None if self.dense is None else sorted(self.dense),
            "codes": {name: codes.detach().cpu().clone() for name, codes in self.codes.items()},
            "shapes": {name: list(layer.weight.shape) for name, layer in layers},
            "transposed": sorted(name for name, layer in layers if layer.transposed),
            "flips": {name: int(count) for name, count in flips.items()},
            "virtual_flips": {name: int(count) for name, count in virtual_flips.items()},
            "sums_at_refresh": {name: sums.tolist() for name, sums in sums_at_refresh.items()},
            "ages": {name: age.cpu().clone() for name, age in self.ages.items()},
            "criterion": self.criterion.state_dict(),
            "backward_codes": {
                name: layer.backward_codes.detach().cpu().clone()
                for name, layer in layers
                if layer.backward_codes is not None
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned and ``check_masks`` let pass."""
        self.exists = bool(state["exists"])
        self.kept = int(state["kept"])
        self.dense = None if state["dense"] is None else frozenset(state["dense"])
        self.flips = self._counted_once(state["flips"], torch.int64)
        self.virtual_flips = self._counted_once(state["virtual_flips"], torch.int64)
        self.sums_at_refresh = self._counted_once(state["sums_at_refresh"], torch.float64)
        for name, age in self.ages.items():
            age.copy_(state["ages"].get(name, torch.zeros(())))
        self.criterion.load_state_dict(state["criterion"])
        for name, layer in self.layers.items():
            layer.set_codes_(state["codes"][name].to(layer.weight.device))
            if name in state["backward_codes"]:
                layer.set_backward_codes_(state["backward_codes"][name])
            else:
                layer.backward_codes = None

    def _counted_once(self, totals: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        numbers = {name: torch.tensor(total, dtype=dtype) for name, total in totals.items()}
        return {name: counted_once(self.layers[name], number) for name, number in numbers.items()}
