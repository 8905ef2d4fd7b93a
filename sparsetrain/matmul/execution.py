"""``Execution``: how a layer's products are computed."""

from dataclasses import dataclass

from ..types import WeightProduct


@dataclass(frozen=True)
class Execution:
    """How a layer's products are computed.

    Args:
        backend: As :func:`sparsetrain.sparsify_` takes it.
        deterministic: With ``"auto"``, one verified algorithm a layer, the same in every run, whatever the clock says.
        keep_transposed: Keep Wᵀ packed between steps; False packs it again in every backward, for 9/16 of a 16-bit
            weight less memory.
        transposable: Whether masks are transposable, so that the input gradient can run sparse.
        weight_product: ``"dense"``, or ``"mvue"``: the weight gradient from an unbiased 2:4 estimate of the output
            gradient, so that it can run sparse too.
        seed: Of the estimate's random numbers.
        note: Why a layer does not have the backend that was asked for.

    Example:
        >>> Execution("masked").keep_transposed
        True
    """

    backend: str = "auto"
    deterministic: bool = False
    keep_transposed: bool = True
    transposable: bool = True
    weight_product: WeightProduct = "dense"
    seed: int = 0
    note: str = ""
