"""The masks of a run and what is known of their history: refresh, flips, ages, violations."""

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks.rules import DICT, EMPTY, FLAG, NOT_NEGATIVE, TEXT, either, optional, sequence, shown, whole
from ..checks.states import by_layer, names_of, refuse, require_keys, require_state, tensor
from ..criteria import Criterion, Magnitude
from ..criteria.criterion import scores_of
from ..distributed.equal_codes import require_equal_codes
from ..kernels.statistics.operator import tile_statistics
from ..kernels.tile_codes import unpack_codes
from ..layers.masked_layer import MaskedLayer
from ..layers.one_pass import fits_one_pass, search_in_one_pass_
from ..masks.dense_budget import dense_layers, dense_tiles
from ..masks.patterns import TRANSPOSABLE, Pattern
from ..masks.tile_codes import KEEP_ALL

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
        pattern: What the masks look like.
        criterion: What ranks the entries.
        track_age: Keep for every entry the refreshes since it last flipped (one byte a weight, up to 255).
        hysteresis: Added to the scores of entries that are kept now, as a fraction of the layer's mean score.
        tile_budget: The fraction of the tiles, over all layers that are searched together, that keep everything.
    """

    def __init__(
        self, layers: Mapping[str, MaskedLayer], pattern: Pattern, criterion: Criterion, track_age: bool = False,
        hysteresis: float = 0.0, tile_budget: float = 0.0,
    ) -> None:  # fmt: skip
        self.layers = dict(layers)
        self.pattern = pattern
        self.criterion = criterion
        self.hysteresis = hysteresis
        self.tile_budget = tile_budget
        self.kept = 2  # of every four entries
        self.dense: frozenset[str] | None = None  # layers that a budget keeps dense, once they are chosen
        self.exists = False
        self._warned: set[str] = set()
        self.refresh_ms = 0.0
        self.flips: dict[str, Tensor] = {}
        self.virtual_flips: dict[str, Tensor] = {}
        self.sums_at_refresh: dict[str, Tensor] = {}  # of each layer when its mask was searched last
        self.ages = {
            name: torch.zeros(layer.weight.shape, dtype=torch.uint8, device=layer.weight.device)
            for name, layer in self.layers.items()
            if track_age
        }

    @property
    def maskable(self) -> dict[str, MaskedLayer]:
        """The layers that get masks: all but those that stay dense."""
        return {name: layer for name, layer in self.layers.items() if name not in (self.dense or ())}

    def keep_dense_(self, names: Collection[str]) -> None:
        """Give these layers no masks any more; their codes keep everything."""
        self.dense = frozenset(names)
        for name in self.dense:
            self.layers[name].mask_codes.fill_(KEEP_ALL)
            self.flips.pop(name, None)
            self.virtual_flips.pop(name, None)
            self.sums_at_refresh.pop(name, None)

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
        wanted = set(self.maskable).intersection(self.layers if names is None else names)
        once = self._in_one_pass(wanted)
        compared = self.ages if once else self.codes  # one pass counts flips itself
        old = {name: self.codes[name].clone() for name in compared} if self.exists else {}
        if not virtual:
            self._warn_of_missing(clock, wanted)
        if once:
            statistics = self._search_in_one_pass(wanted, pack=not virtual)
        else:
            for name, codes in self._search(clock, wanted).items():
                self.layers[name].set_codes_(codes)
            statistics = self._statistics(old)
        for name in wanted.intersection(old, self.ages):
            codes = self.layers[name].mask_codes
            age = self.ages[name] = self.ages[name].to(codes.device)  # the model may have moved
            age.add_(age < MAX_AGE).masked_fill_(self.layers[name].as_weight(unpack_codes(old[name] ^ codes)), 0)
        if self.exists:
            flips = {name: row[5] for name, row in statistics.items()}
            self.flips, self.virtual_flips = (self.flips, flips) if virtual else (flips, self.virtual_flips)
        self.exists = True
        self.sums_at_refresh.update((name, statistics[name][:5]) for name in self.maskable if name in wanted)
        self.refresh_ms = 1e3 * (time.perf_counter() - start)
        self.refresh_backward()
        require_equal_codes(self.codes)

    @torch.no_grad()
    def refresh_backward(self) -> None:
        """Search the masks of input gradients again, if they are others than those of the forward."""
        if self.pattern.search_backward is None:
            return
        for layer in self.maskable.values():
            layer.set_backward_codes_(self.pattern.search_backward(layer.matrix, layer.mask_codes))

    def _warn_of_missing(self, clock: int, wanted: set[str]) -> None:
        missing = self.criterion.missing(name for name in self.layers if name in wanted)
        if set(missing) <= self._warned:
            return
        self._warned.update(missing)
        names = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        warnings.warn(
            f"criterion {self.criterion.name!r} has no statistics of {len(missing)} of {len(wanted)} layers ({names}) "
            f"at step {clock}, so magnitudes rank their weights: no backward ran through them since the start; "
            "lengthen the dense head, exclude them, or use criterion='magnitude'.",
            stacklevel=2,
        )

    def _in_one_pass(self, wanted: set[str]) -> bool:
        """Whether masks are those of largest magnitude alone, which the packer finds itself."""
        more = self.tile_budget or self.kept != 2 or (self.hysteresis and self.exists)
        plain = self.pattern is TRANSPOSABLE and type(self.criterion) is Magnitude and not more
        return plain and fits_one_pass([self.layers[name] for name in wanted])

    def _search_in_one_pass(self, wanted: set[str], pack: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for every in self._by_device():  # all of a device in one call, so that equal layouts share a launch
            names = [name for name in every if name in wanted]
            if names:
                found.update(zip(names, search_in_one_pass_([self.layers[name] for name in names], pack), strict=True))
        return {
            name: found[name] if name in found else torch.zeros(6, dtype=torch.float64, device=layer.weight.device)
            for name, layer in self.maskable.items()
        }

    def _search(self, clock: int, wanted: set[str]) -> dict[str, Tensor]:
        bonus = self.hysteresis if self.exists else 0.0
        if not self.tile_budget:
            return {
                name: self.pattern.search(self._scores(name, layer, clock, bonus), self.kept)
                for name, layer in self.layers.items()
                if name in wanted
            }
        scores = {name: self._scores(name, self.layers[name], clock, bonus) for name in self.layers if name in wanted}
        masks = {name: self.pattern.search(matrix, self.kept) for name, matrix in scores.items()}
        dense = dense_tiles(scores, masks, self.tile_budget)
        return {name: codes.masked_fill_(dense[name], KEEP_ALL) for name, codes in masks.items()}

    def costliest_layers(self, clock: int, budget: float) -> list[str]:
        """Return the layers that masks would cost most by the criterion's scores, within a budget of weights."""
        scores = {name: self._scores(name, layer, clock, 0.0) for name, layer in self.layers.items()}
        return dense_layers(scores, self.codes, budget)

    def least_costly_layers(self, held: Collection[str], share: float) -> set[str]:
        """Return a share of the maskable layers: those that are held, then those that lose the least magnitude."""
        count = max(len(held), round(share * len(self.maskable)), 1)
        if count == len(self.maskable):
            return set(self.maskable)
        fractions = self.kept_fractions()
        return set(sorted(fractions, key=lambda name: (name not in held, -fractions[name]))[:count])

    def _scores(self, name: str, layer: MaskedLayer, clock: int, bonus: float) -> Tensor:
        scores = scores_of(self.criterion, layer.matrix, layer=name, clock=clock)
        if not bonus:
            return scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # a small bonus is lost in 16 bits
        mean = torch.where(scores.isfinite(), scores, 0).abs().mean()
        return scores + bonus * mean * unpack_codes(layer.mask_codes)

    def kept_fractions(self) -> dict[str, float]:
        """Return ``Σ|W⊙M| / Σ|W|`` of every layer, from one transfer."""
        rows = self.magnitude_sums()
        values = torch.stack([row.cpu() for row in rows.values()]).tolist()
        return {name: kept / (kept + pruned or 1.0) for name, (kept, pruned, *_) in zip(rows, values, strict=True)}

    def _statistics(self, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the six numbers of ``tile_statistics`` for every layer, on its device."""
        found: dict[str, Tensor] = {}
        for names in self._by_device():
            layers = [self.layers[name] for name in names]
            rows = tile_statistics(
                [layer.matrix.detach() for layer in layers],
                [layer.mask_codes for layer in layers],
                [previous[name] for name in names] if previous else [],
            )
            found.update(zip(names, rows, strict=True))
        return {name: found[name] for name in self.maskable}

    def _by_device(self) -> list[list[str]]:
        devices: dict[torch.device, list[str]] = {}
        for name, layer in self.maskable.items():
            devices.setdefault(layer.weight.device, []).append(name)
        return list(devices.values())

    def flip_rate(self, layer: str | None = None, virtual: bool = False) -> float | None:
        """Return the last refresh's flips as a fraction of the entries, of one layer or of all; None before one."""
        flips = self.virtual_flips if virtual else self.flips
        names = list(flips) if layer is None else [layer]
        if not flips:
            return None
        entries = sum(self.layers[name].weight.numel() for name in names)
        return float(torch.stack([flips[name].cpu() for name in names]).sum()) / entries

    def flip_rate_ratio(self) -> float | None:
        """Return the last flip rate of a sparse phase over that of a dense one, or None."""
        rate, virtual = self.flip_rate(), self.flip_rate(virtual=True)
        return rate / virtual if rate is not None and virtual else None

    def violations(self) -> int:
        """Count the groups of four, in masks that are in force, that do not keep what they should; must be 0."""
        codes = [layer.mask_codes for layer in self.layers.values() if layer.is_masked]
        return self._count_violations(codes, self.kept)

    def _count_violations(self, codes: Sequence[Tensor], kept: int) -> int:
        if self.tile_budget:
            codes = [layer[layer != KEEP_ALL][None] for layer in codes]  # the other tiles, in a row
        counts = [self.pattern.count_violations(layer, kept) for layer in codes]
        return int(torch.stack(counts).sum()) if counts else 0

    def magnitude_sums(self) -> dict[str, Tensor]:
        """Return the five sums of :func:`sparsetrain.masks.metrics.magnitude_sums` for every layer."""
        return {name: row[:5] for name, row in self._statistics({}).items()}

    def age_mean(self) -> float | None:
        """Return the mean number of refreshes since an entry last flipped, or None if ages are not tracked."""
        if not self.ages:
            return None
        total = sum(float(age.sum(dtype=torch.int64)) for age in self.ages.values())
        return total / sum(age.numel() for age in self.ages.values())

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that the next refresh and the metrics depend on."""

        def plain(flips: dict[str, Tensor]) -> dict[str, int]:
            return {name: int(count) for name, count in flips.items()}

        return {
            "pattern": self.pattern.name,
            "exists": self.exists,
            "kept": self.kept,
            "dense": None if self.dense is None else sorted(self.dense),
            "codes": {name: codes.detach().cpu().clone() for name, codes in self.codes.items()},
            "shapes": {name: list(layer.weight.shape) for name, layer in self.layers.items()},
            "transposed": sorted(name for name, layer in self.layers.items() if layer.transposed),
            "flips": plain(self.flips),
            "virtual_flips": plain(self.virtual_flips),
            "sums_at_refresh": {name: sums.tolist() for name, sums in self.sums_at_refresh.items()},
            "ages": {name: age.cpu().clone() for name, age in self.ages.items()},
            "criterion": self.criterion.state_dict(),
            "backward_codes": {
                name: layer.backward_codes.detach().cpu().clone()
                for name, layer in self.layers.items()
                if layer.backward_codes is not None
            },
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a state is damaged or of another model; changes nothing."""
        require_keys(state, STATE_KEYS)
        for key, rule in (("pattern", TEXT), ("codes", DICT), ("exists", FLAG), ("kept", whole(2, 3))):
            require_state(key, state[key], rule)
        require_state("transposed", state["transposed"], sequence(TEXT))
        self._check_origin(state)
        layers, exists = self.layers, state["exists"]
        require_state("dense", state["dense"], optional(names_of(layers)))
        maskable = [name for name in layers if name not in (state["dense"] or ())]
        if not maskable:
            refuse("state['dense'] holds every layer")
        codes = {name: tensor(torch.int16, layer.mask_codes.shape) for name, layer in layers.items()}
        again = codes if exists and self.pattern.search_backward is not None else {}
        flips = {name: whole(0, layers[name].weight.numel()) for name in maskable}
        ages = {name: tensor(torch.uint8, layer.weight.shape) for name, layer in layers.items()}
        sums = sequence(NOT_NEGATIVE, length=5)
        for key, rule in {
            "codes": by_layer(codes, needed=None),
            "backward_codes": by_layer(again, needed=[name for name in again if name in maskable]),
            "flips": either(EMPTY, by_layer(flips, needed=None)),
            "virtual_flips": either(EMPTY, by_layer(flips, needed=None)),
            "sums_at_refresh": either(EMPTY, by_layer(dict.fromkeys(maskable, sums), needed=None)),
            "ages": either(EMPTY, by_layer(ages, needed=None)),
        }.items():
            require_state(key, state[key], rule)
        for name in layers:
            self._check_codes(name, state, masked=exists and name in maskable)
        sizes = {
            name: (4 * layer.mask_codes.shape[0], 4 * layer.mask_codes.shape[1], layer.input_features)
            for name, layer in layers.items()
        }
        self.criterion.check_state_dict(state["criterion"], sizes)

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        if state["pattern"] != self.pattern.name:
            raise ValueError(
                f"state has pattern {state['pattern']!r} but the method has {self.pattern.name!r}: "
                "resume with the same method."
            )
        saved, here = set(state["codes"]), set(self.layers)
        if saved != here:
            missing, extra = (sorted(map(shown, names)) for names in (here - saved, saved - here))
            raise ValueError(
                "state is of another model or selection: "
                + "; ".join(
                    text
                    for text in (
                        f"it has no layer {', '.join(missing[:3])}" if missing else "",
                        f"the model has no sparse layer {', '.join(extra[:3])}" if extra else "",
                    )
                    if text
                )
                + "; resume with the same model and targets."
            )
        require_state("shapes", state["shapes"], by_layer(dict.fromkeys(self.layers, sequence(whole())), needed=None))
        for name, layer in self.layers.items():
            if (saved_shape := list(state["shapes"][name])) != (here_shape := list(layer.weight.shape)):
                raise ValueError(
                    f"state's layer {name!r} has a weight {saved_shape} but the model's is {here_shape}: resume with "
                    "the same model."
                )
            if (name in state["transposed"]) != self.layers[name].transposed:
                order = "[in, out]" if name in state["transposed"] else "[out, in]"
                raise ValueError(
                    f"state's layer {name!r} has a weight stored {order} but the model's is not: resume with the same "
                    "model."
                )

    def _check_codes(self, name: str, state: Mapping[str, Any], masked: bool) -> None:
        codes = state["codes"][name]
        if masked and self._count_violations([codes], state["kept"]):
            raise ValueError(
                f"state's codes of layer {name!r} are no {self.pattern.name} masks: the checkpoint is damaged, or "
                "its method allows others; resume with the same method."
            )
        if not masked and bool((codes != KEEP_ALL).any()):
            refuse(f"state's codes of layer {name!r} prune, but it has no mask yet or stays dense")
        again = state["backward_codes"].get(name)
        if again is not None and int(self.pattern.count_backward_violations(again)):
            raise ValueError(
                f"state's backward codes of layer {name!r} do not keep two of four along out_features: the "
                "checkpoint is damaged or of another version."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.check_state_dict(state)
        self.exists = bool(state["exists"])
        self.kept = int(state["kept"])
        self.dense = None if state["dense"] is None else frozenset(state["dense"])
        for name, layer in self.layers.items():
            layer.set_codes_(state["codes"][name].to(layer.weight.device))
        self.flips = {name: torch.tensor(count) for name, count in state["flips"].items()}
        self.virtual_flips = {name: torch.tensor(count) for name, count in state["virtual_flips"].items()}
        self.sums_at_refresh = {
            name: torch.tensor(sums, dtype=torch.float64) for name, sums in state["sums_at_refresh"].items()
        }
        for name, age in self.ages.items():
            age.copy_(state["ages"].get(name, torch.zeros(())))
        self.criterion.load_state_dict(state["criterion"])
        for name, layer in self.layers.items():
            if name in state["backward_codes"]:
                layer.set_backward_codes_(state["backward_codes"][name])
            else:
                layer.backward_codes = None
