"""Metrics of a run's masks: what they keep, how often they flip, of all layers and of each."""

from ..layers.sharded.totals import sum_over_parts, total
from ..masks.metrics import PruneMetrics, total_metrics
from .mask_state import MaskState
from .mask_statistics import magnitude_sums, rate_of


def mask_metrics(masks: MaskState, per_layer: bool = False) -> dict[str, float | None]:
    """Measure masks that were searched, on the masters as they are now; one small message where they are sharded.

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
    layers = masks.layers
    columns = magnitude_sums(masks.maskable), masks.sums_at_refresh, masks.flips, masks.virtual_flips
    own = *columns, masks.age_sums(), masks.violation_counts()
    sums, at_refresh, flips, virtual_flips, ages, violations = sum_over_parts(layers, *own)
    rate, virtual = rate_of(flips, layers), rate_of(virtual_flips, layers)
    values: dict[str, float | None] = {
        "violations": total(violations),
        **total_metrics(sums.values()).as_dict(),
        "kept_fraction_at_refresh": total_metrics(at_refresh.values()).kept_fraction,
        "flip_rate": rate,
        "virtual_flip_rate": virtual,
        "flip_rate_ratio": rate / virtual if rate is not None and virtual else None,
        "age_mean": total(ages) / sum(layer.weight.numel() for layer in layers.values()) if ages else None,
    }
    for name, entry in sums.items() if per_layer else ():
        values[f"layer/{name}/flip_rate"] = rate_of(flips, layers, name)
        if name in at_refresh:
            key = f"layer/{name}/kept_fraction_at_refresh"
            values[key] = PruneMetrics.from_sums(at_refresh[name].tolist()).kept_fraction
        fields = PruneMetrics.from_sums(entry.tolist()).as_dict()
        values.update({f"layer/{name}/{key}": value for key, value in fields.items()})
    return values
