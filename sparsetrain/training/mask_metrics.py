"""Metrics of a run's masks: what they keep, how often they flip, of all layers and of each."""

from ..masks.metrics import PruneMetrics, total_metrics
from .mask_state import MaskState
from .mask_statistics import magnitude_sums


def mask_metrics(masks: MaskState, per_layer: bool = False) -> dict[str, float | None]:
    """Measure masks that were searched, on the masters as they are now.

    Args:
        masks: After their first search.
        per_layer: Add ``layer/<name>/flip_rate``, ``layer/<name>/kept_fraction_at_refresh`` and
            ``layer/<name>/<field of PruneMetrics>``.

    Returns:
        What :meth:`sparsetrain.SparseTraining.metrics` says of masks; None for what there is not yet.

    Example:
        >>> from sparsetrain import Magnitude, SparseLinear
        >>> from sparsetrain.masks.patterns import TRANSPOSABLE
        >>> from sparsetrain.training.mask_search import MaskSearch
        >>> masks = MaskState({"fc": SparseLinear(8, 4)}, MaskSearch(TRANSPOSABLE, Magnitude()))
        >>> masks.refresh(0, virtual=False)
        >>> mask_metrics(masks)["pruned_count"]
        16
    """
    sums = magnitude_sums(masks.maskable)
    at_refresh = masks.sums_at_refresh
    values: dict[str, float | None] = {
        **total_metrics(sums.values()).as_dict(),
        "kept_fraction_at_refresh": total_metrics(at_refresh.values()).kept_fraction,
        "flip_rate": masks.flip_rate(),
        "virtual_flip_rate": masks.flip_rate(virtual=True),
        "flip_rate_ratio": masks.flip_rate_ratio(),
        "age_mean": masks.age_mean(),
    }
    for name, entry in sums.items() if per_layer else ():
        values[f"layer/{name}/flip_rate"] = masks.flip_rate(name)
        if name in at_refresh:
            key = f"layer/{name}/kept_fraction_at_refresh"
            values[key] = PruneMetrics.from_sums(at_refresh[name].tolist()).kept_fraction
        fields = PruneMetrics.from_sums(entry.tolist()).as_dict()
        values.update({f"layer/{name}/{key}": value for key, value in fields.items()})
    return values
