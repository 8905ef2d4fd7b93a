"""``MaskSearch``: which masks a method's pattern, criterion and budget find for the weights as they are."""

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..criteria import Criterion, Magnitude
from ..kernels.tile_codes import unpack_codes
from ..layers.masked_layer import MaskedLayer
from ..layers.one_pass import fits_one_pass
from ..layers.scores import scores_of_layer
from ..layers.sharded.dense_budget import dense_tiles_of, score_sum
from ..layers.sharded.totals import sum_over_parts
from ..masks.patterns import TRANSPOSABLE, Pattern
from ..masks.tile_codes import KEEP_ALL


class MaskSearch:
    """Finds the tile codes of layers.

    Args:
        pattern: What the masks look like.
        criterion: What ranks the entries.
        hysteresis: Added to the scores of entries that are kept now, as a fraction of the layer's mean score.
        tile_budget: The fraction of the tiles, over all layers that are searched together, that keep everything.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> found = MaskSearch(TRANSPOSABLE, Magnitude()).codes({"fc": SparseLinear(8, 4)}, kept=2, clock=0)
        >>> found["fc"].shape
        torch.Size([1, 2])
    """

    def __init__(
        self, pattern: Pattern, criterion: Criterion, hysteresis: float = 0.0, tile_budget: float = 0.0
    ) -> None:
        self.pattern, self.criterion = pattern, criterion
        self.hysteresis, self.tile_budget = hysteresis, tile_budget
        self._warned: set[str] = set()

    def takes_one_pass(self, layers: Sequence[MaskedLayer], kept: int, again: bool) -> bool:
        """Return whether masks are those of largest magnitude alone, which the packer finds itself.

        Args:
            layers: Whose masks are searched.
            kept: Entries of every four.
            again: Whether they have masks already, which hysteresis favours.
        """
        more = self.tile_budget or kept != 2 or (self.hysteresis and again)
        plain = self.pattern is TRANSPOSABLE and type(self.criterion) is Magnitude and not more
        return plain and fits_one_pass(layers)

    def codes(self, layers: Mapping[str, MaskedLayer], kept: int, clock: int, again: bool = False) -> dict[str, Tensor]:
        """Return the int16 tile codes ``[O/4, I/4]`` of layers by name; the arguments are those of a refresh."""
        bonuses = self._bonuses(layers, clock) if self.hysteresis and again else {}
        if not self.tile_budget:  # one layer's scores at a time
            return {
                name: self.pattern.search(self.scores(name, layer, clock, bonuses.get(name)), kept)
                for name, layer in layers.items()
            }
        scores = {name: self.scores(name, layer, clock, bonuses.get(name)) for name, layer in layers.items()}
        masks = {name: self.pattern.search(matrix, kept) for name, matrix in scores.items()}
        dense = dense_tiles_of(layers, scores, masks, self.tile_budget)
        return {name: codes.masked_fill_(dense[name], KEEP_ALL) for name, codes in masks.items()}

    def scores(self, name: str, layer: MaskedLayer, clock: int, bonus: Tensor | None = None) -> Tensor:
        """Return the criterion's scores of a layer's matrix ``[O, I]``, with a bonus for what its mask keeps."""
        scores = scores_of_layer(self.criterion, layer, name=name, clock=clock)
        if bonus is None:
            return scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # a small bonus is lost in 16 bits
        return scores + bonus.to(scores.dtype) * unpack_codes(layer.mask_codes)

    def _bonuses(self, layers: Mapping[str, MaskedLayer], clock: int) -> dict[str, Tensor]:
        """Return the bonus of every layer; scores are found for it one layer at a time, and again afterwards."""
        sums = {name: score_sum(self.scores(name, layer, clock)) for name, layer in layers.items()}
        (totals,) = sum_over_parts(layers, sums)
        return {name: self.hysteresis * totals[name] / layer.weight.numel() for name, layer in layers.items()}

    def warn_of_missing(self, layers: Collection[str], clock: int) -> None:
        """Warn once of layers that the criterion has no statistics of when masks come into force."""
        missing = self.criterion.missing(layers)
        if set(missing) <= self._warned:
            return
        self._warned.update(missing)
        names = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
        warnings.warn(
            f"criterion {self.criterion.name!r} has no statistics of {len(missing)} of {len(layers)} layers ({names}) "
            f"at step {clock}, so magnitudes rank their weights: no backward ran through them since the start; "
            "lengthen the dense head, exclude them, or use criterion='magnitude'.",
            stacklevel=2,
        )

    def count_violations(self, codes: Tensor, kept: int) -> Tensor:
        """Count the groups of four that do not keep what they should, but for tiles that a budget keeps dense."""
        if self.tile_budget:
            codes = codes[codes != KEEP_ALL][None]  # the other tiles, in a row
        return self.pattern.count_violations(codes, kept)
