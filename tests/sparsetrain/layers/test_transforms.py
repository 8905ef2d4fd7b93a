"""Function transforms, tracers and wrappers of torch around masked layers: supported, or refused with one sentence."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import masked_by_hand
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparsetrain import SparseTraining, export_dense_, select_layers, sparsify_
from sparsetrain.layers.masked_layer import MaskedLayer

PHASES = [{"kind": "dense", "length": 1}, {"kind": "sparse", "length": 1}, {"kind": "frozen"}]
PRESETS = {
    "recommended": {"preset": "recommended", "schedule": PHASES},
    "s_ste": {"preset": "s_ste", "schedule": PHASES},
    "slope": {"preset": "slope", "schedule": PHASES, "adapter_rank": 2, "adapter_start": 1},
}


def linears() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), torch.randn(3, 8)


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)), torch.randn(3, 8, 4, 4)


def prepared(kind: Callable[[], tuple[nn.Module, Tensor]], preset: str, phase: str) -> tuple[nn.Module, Tensor]:
    """A model in a phase of a preset, and an input."""
    model, x = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SparseTraining(model, optimizer, PRESETS[preset], 4, ["all-linear" if kind is linears else "all-conv"],
                              verbose=False)  # fmt: skip
    while training.phase != phase:
        model(x).square().mean().backward()
        optimizer.step()
    for _, up in training.adapters().values():
        nn.init.normal_(up)
    return model, x


def by_hand(model: nn.Module) -> nn.Module:
    plain = nn.Sequential(
        *(copy.deepcopy(layer) if not isinstance(layer, MaskedLayer) else remade(layer) for layer in model)
    )
    return plain


def remade(layer: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features)
    else:
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    plain.load_state_dict(layer.state_dict())
    if layer.phase != "dense":
        plain.weight.data.copy_(masked_by_hand(layer))
    return plain


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "forward_ad": forward_mode,
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
}
WITH_EXACT_INPUT_GRADIENTS = {"jvp", "forward_ad", "jacfwd"}


def assert_close(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("phase", ["sparse", "frozen"])
@pytest.mark.parametrize("kind", [linears, convolutions])
def test_transforms_see_masked_weights(kind: Callable[[], tuple[nn.Module, Tensor]], phase: str, preset: str) -> None:
    model, x = prepared(kind, preset, phase)
    plain = by_hand(model)
    for name, transform in TRANSFORMS.items():
        if preset == "slope" and name in WITH_EXACT_INPUT_GRADIENTS:
            continue  # whose input gradients see fewer weights, see below
        assert_close(transform(model, x), transform(plain, x))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("phase", ["sparse", "frozen"])
@pytest.mark.parametrize("kind", [linears, convolutions])
def test_transformed_gradients_are_those_of_a_backward(
    kind: Callable[[], tuple[nn.Module, Tensor]], phase: str, preset: str
) -> None:
    model, x = prepared(kind, preset, phase)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    wanted_x, *wanted = torch.autograd.grad(loss(dict(model.named_parameters()), x.requires_grad_()),
                                            [x, *model.parameters()])  # fmt: skip
    x = x.detach()
    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    assert_close((of_x, *of_parameters.values()), (wanted_x, *wanted))
    samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    assert_close(tuple(sample.sum(0) for sample in samples.values()), tuple(wanted))
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    assert_close(tangent, wanted_x.sum())
    _, tangent = torch.func.jvp(lambda weight: loss({**parameters, "0.weight": weight}, x),
                                (parameters["0.weight"],), (torch.ones_like(parameters["0.weight"]),))  # fmt: skip
    assert_close(tangent, wanted[0].sum())


@pytest.mark.parametrize("kind", [linears, convolutions])
def test_an_exported_program_sees_masked_weights(kind: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, x = prepared(kind, "slope", "frozen")
    assert_close(torch.export.export(model, (x,)).module()(x), by_hand(model)(x))


def test_a_hessian_is_that_of_the_masked_model() -> None:
    model, x = prepared(linears, "recommended", "sparse")
    of = [torch.func.hessian(lambda x, each=each: each(x).square().sum())(x[0]) for each in (model, by_hand(model))]
    assert_close(*of)


def test_a_graph_of_fx_follows_phases_and_masks() -> None:
    model, x = linears()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SparseTraining(model, optimizer, PRESETS["recommended"], 4, verbose=False)
    graph = torch.fx.symbolic_trace(model)  # in the dense phase
    for _phase in ("dense", "sparse", "frozen"):
        assert_close(graph(x), by_hand(model)(x))
        graph(x).square().mean().backward()
        optimizer.step()
    assert training.phase == "frozen"


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("kind", [linears, convolutions])
def test_scripting_is_refused_and_changes_nothing(kind: Callable[[], tuple[nn.Module, Tensor]], phase: str) -> None:
    model, x = kind()
    sparsify_(model, "all-linear" if kind is linears else "all-conv", phase=phase, verbose=False)
    before, layers = model(x), list(model.children())
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile a masked layer: .*export_dense_"):
        torch.jit.script(model)
    assert [id(layer) for layer in model] == [id(layer) for layer in layers]
    assert torch.equal(model(x), before)
    plain = copy.deepcopy(model)
    export_dense_(plain)
    assert_close(torch.jit.script(plain)(x), before)  # as the message says


def prune(layer: nn.Module) -> None:
    from torch.nn.utils import prune as pruning

    pruning.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        prune,
        lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ],
)
def test_a_weight_that_others_compute_is_refused(wrap: Callable[[nn.Module], Any]) -> None:
    model, x = linears()
    sparsify_(model, verbose=False)
    before = model(x)
    with pytest.raises(RuntimeError, match=r"masked layer, as weight_norm.*call finish\(\) or export_dense_\(\) first"):
        wrap(model[0])
    assert torch.equal(model(x), before)
    export_dense_(model)
    wrap(model[0])
    assert torch.isfinite(model(x)).all()


def test_data_parallel_is_refused() -> None:
    model, _ = linears()
    sparsify_(model, verbose=False)
    with pytest.raises(RuntimeError, match=r"^nn.DataParallel copies layers .* use DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()  # what replicate() calls, which needs GPUs


def test_fsdp1_is_refused_by_name() -> None:
    layers, _ = linears()
    for layer in layers:
        layer._is_fsdp_managed_module = True  # as FullyShardedDataParallel leaves it: a view of its flat parameter
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            del layer.weight
            layer.weight = weight
    with pytest.raises(ValueError, match=r"FSDP1 \(FullyShardedDataParallel\) cuts weights.*DistributedDataParallel"):
        select_layers(layers)
    with pytest.raises(ValueError, match=r"FSDP1 \(FullyShardedDataParallel\) cuts weights"):
        SparseTraining(layers, torch.optim.SGD(layers.parameters(), lr=0.1), "recommended", 4)
