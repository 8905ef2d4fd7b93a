"""``sparsify_`` makes a model's layers sparse in place; ``export_dense_`` gives the plain layers back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..backends.interface import SPARSE_DTYPES
from ..checks.rules import FLAG, one_of, require
from ..criteria import Criterion, resolve_criterion
from ..distributed.wrappers import require_whole_weights
from ..masks.gradient_rules import GradientRule, resolve_gradient_rule
from ..masks.patterns import resolve_pattern
from ..matmul.execution import Execution
from ..types import PhaseKind, WeightProduct
from .conversion import to_dense_, to_sparse_
from .convolution import is_pointwise
from .fused_encoders import settle_fused_encoders_
from .masked_layer import MaskedLayer
from .options import MODULE, LayerOptions
from .scores import scores_of_layer
from .selection.select_layers import SelectionReport, select_layers, sparse_layers
from .sharded.gathering import release_wires_
from .transposed_linear import TransposedLinear


def sparsify_(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    *,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    gradient: str | GradientRule = "ste",
    backend: str = "auto",
    deterministic: bool = False,
    keep_transposed: bool = True,
    weight_product: WeightProduct = "dense",
    phase: PhaseKind = "sparse",
    verbose: bool = True,
) -> SelectionReport:
    """Make layers sparse in place: parameters, names, hooks, ties and ``state_dict`` keys stay as they were.

    Weights are not changed; the layers' products see them through the mask. If anything fails, the model is left as
    it was. For a schedule, use :class:`sparsetrain.SparseTraining`, which calls this function.

    Args:
        model: Any module; its linear layers and convolutions are candidates.
        targets: As in :func:`sparsetrain.select_layers`.
        exclude: As in :func:`sparsetrain.select_layers`.
        pattern: As in :class:`sparsetrain.Method`.
        criterion: What ranks the entries: ``"magnitude"``, ``"random"`` or a :class:`sparsetrain.Criterion`, whose
            statistics, if it needs any, must be there.
        gradient: Rule of the weight gradient: ``"ste"``, ``"masked"`` or ``scaled(kept, pruned)``.
        backend: Matmul backend: a name, or ``"auto"`` (the default): the fastest verified one, benchmarked here;
            without a GPU that is ``"masked"``.
        deterministic: With ``"auto"``, choose one verified algorithm a layer by name instead of by time.
        keep_transposed: Keep Wᵀ packed between steps; False packs it in every backward and saves 9/16 of a 16-bit
            weight.
        weight_product: ``"dense"``, or ``"mvue"``: the weight gradient from an unbiased 2:4 estimate of the output
            gradient, so that it can run sparse too.
        phase: ``"dense"`` installs the layers without searching masks.
        verbose: Print the one-line summary.

    Returns:
        Every linear and convolutional layer, with the reason where it stays dense.

    Raises:
        ValueError: If a name is unknown, a target matches nothing, no layer is left, the criterion lacks
            statistics, or the backend can run none of the layers; those it cannot run among others are computed by
            ``"masked"``, and the report says why.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> report = sparsify_(model, targets=["0"])
        sparse layers: 1 of 2 || sparse weights: 128 of 256 (50.0 %) || pattern: transposable 2:4
        >>> model[0].mask.float().mean().item()
        0.5

        And back, with zeros in the weight:

        >>> export_dense_(model), (model[0].weight == 0).float().mean().item()
        (['0'], 0.5)
    """
    options = LayerOptions(targets, exclude, backend, deterministic, keep_transposed)
    require("verbose", verbose, FLAG)
    require("model", model, MODULE)
    require("phase", phase, one_of(get_args(PhaseKind)))
    require("weight_product", weight_product, one_of(get_args(WeightProduct)))
    require_whole_weights(model)
    rule, criterion, search = resolve_gradient_rule(gradient), resolve_criterion(criterion), resolve_pattern(pattern)
    execution = Execution(options.backend, deterministic, keep_transposed, search.along_columns, weight_product)
    # not get_submodule, from which a property of a layer's name would hide it
    report, modules = select_layers(model, targets, exclude, pattern), dict(model.named_modules())
    chosen = {choice.name: modules[choice.name] for choice in report.sparse}
    executions = _executions(chosen, execution)
    if phase != "dense":
        _require_statistics(criterion, chosen)
    with _undone_on_error(model) as done:
        for name, layer in chosen.items():
            done.append(to_sparse_(layer, phase, executions[name]))
            done[-1].gradient = rule
            if phase != "dense":
                scores = scores_of_layer(criterion, done[-1], name=name, clock=0)
                done[-1].set_codes_(search.search(scores, 2))
        settle_fused_encoders_(model)
    if verbose:
        print(report.summary())
    return report


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[list[MaskedLayer]]:
    """Give a list for layers that are made sparse, which are dense again if anything fails."""
    done: list[MaskedLayer] = []
    try:
        yield done
    except BaseException:
        give_back_(model, done, zeros=False)
        raise


def _require_statistics(criterion: Criterion, layers: Mapping[str, nn.Module]) -> None:
    if missing := criterion.missing(layers):
        raise ValueError(
            f"criterion is {criterion.name!r} but it has no statistics of layer {missing[0]!r}, and sparsify_ gathers "
            "none: use 'magnitude', or SparseTraining, whose dense head gathers them."
        )


def _executions(layers: Mapping[str, nn.Module], wanted: Execution) -> dict[str, Execution]:
    """Return every layer's execution: the one wanted, or ``masked`` with the reason; an error if none can have it."""
    reasons = {name: _why_masked(layer, wanted.backend) for name, layer in layers.items()}
    if wanted.backend not in ("auto", "masked") and all(reasons.values()):
        raise ValueError(f"backend is {wanted.backend!r} but {next(iter(reasons.values()))}")
    masked = replace(wanted, backend="masked", weight_product="dense")
    return {name: replace(masked, note=reason) if reason else wanted for name, reason in reasons.items()}


def _why_masked(layer: nn.Module, backend: str) -> str | None:
    """Return why a layer's products cannot be a backend's; None if they can."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dim() > 2 and not is_pointwise(layer):
        kernel = "×".join(map(str, weight.shape[2:]))
        return f"a convolution with kernel {kernel} or padding has no sparse product: leave it to 'masked'."
    if backend in ("auto", "masked"):
        return None
    device = weight.device
    if device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")  # models are often moved afterwards
    half = weight.dtype if weight.dtype in SPARSE_DTYPES else torch.bfloat16  # under autocast
    rows, columns = weight.shape[:2][:: -1 if isinstance(layer, TransposedLinear) else 1]
    return BACKENDS[backend].why_not(device, half, (rows, columns))


def export_dense_(model: nn.Module, *, zeros: bool = True) -> list[str]:
    """Turn every sparse layer back into its dense class in place.

    Args:
        model: Any module.
        zeros: Write zeros into the pruned entries of layers whose mask is in force, so that the plain model computes
            what the sparse one did. False keeps the dense masters.

    Returns:
        The names of the layers that were sparse.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = sparsify_(model, verbose=False)
        >>> export_dense_(model), type(model[0]).__name__, (model[0].weight == 0).sum().item()
        (['0'], 'Linear', 32)
    """
    layers = list(sparse_layers(model))
    give_back_(model, [layer for _, layer in layers], zeros)
    return [name for name, _ in layers]


def give_back_(model: nn.Module, layers: Iterable[MaskedLayer], zeros: bool) -> None:
    """Turn masked layers of a model back into their dense classes, and let it take the paths that masks forbid."""
    layers = [*layers]
    release_wires_(model, layers)
    for layer in layers:
        to_dense_(layer, zeros)
    settle_fused_encoders_(model)
