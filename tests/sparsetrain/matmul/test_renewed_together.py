"""Operands of several layers that are packed in one call hold their weights, whatever becomes of a layer in between."""

import weakref
from collections.abc import Callable

import pytest
import torch
from gpu_host import StandIn
from torch import nn

from sparsetrain import SparseTraining
from sparsetrain.backends import BACKENDS
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.pack import eager as pack
from sparsetrain.kernels.tile_codes.reference import unpack_codes
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.layer_group import LayerGroups
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.matmul import operands
from sparsetrain.matmul.execution import Execution
from sparsetrain.matmul.operands import MAX_IDLE
from sparsetrain.matmul.registry import register
from sparsetrain.matmul.renewal import Renewal

Layers = list[MaskedLayer]
Renew = Callable[[Layers], None]


def renewed_alone() -> Renew:
    """Renewals that keep nothing from one to the next."""

    def repack_(layers: Layers) -> None:
        Renewal(layers).repack_()

    return repack_


def renewed_in_groups() -> Renew:
    """Renewals as a run has them, which look again only when something has changed."""
    groups = LayerGroups()

    def repack_(layers: Layers) -> None:
        groups.repack_({str(id(layer)): layer for layer in layers})

    return repack_


RENEWALS = [renewed_alone, renewed_in_groups]


def use(layer: MaskedLayer, dtype: torch.dtype = torch.float32) -> None:
    for product in ("forward", "input_gradient"):
        layer.operands.get(layer.matrix.detach(), layer.mask_codes, BACKENDS["stand_in"], product, dtype)


def new_layer() -> MaskedLayer:
    layer = to_sparse_(nn.Linear(32, 16, bias=False), "sparse", Execution("stand_in"))
    assert isinstance(layer, MaskedLayer)
    layer.set_codes_(search_tiles(layer.weight.detach(), True))
    use(layer)
    return layer


def new_codes(layers: Layers) -> None:
    layers[1].mask_codes = search_tiles(torch.randn(16, 32), True)
    register(layers[1])


def new_weight(layers: Layers) -> None:
    layers[0].weight = nn.Parameter(torch.randn(16, 32))


def new_memory(layers: Layers) -> None:
    layers[1].weight.data = torch.randn(32, 16).t()


def released(layers: Layers) -> None:
    layers[2].operands.release()
    use(layers[2])


def first_released(layers: Layers) -> None:
    layers[0].operands.release()


def another_dtype(layers: Layers) -> None:
    use(layers[1], torch.float16)


def backward_codes(layers: Layers) -> None:
    layers[1].set_backward_codes_(layers[1].mask_codes)


def written_elsewhere(layers: Layers) -> None:
    layers[1].operands.written(layers[1].matrix.detach(), layers[1].mask_codes)


def codes_in_place(layers: Layers) -> None:
    layers[0].set_codes_(search_tiles(torch.randn(16, 32), True))


def not_used_for_long(layers: Layers) -> None:
    layers[2].operands._renewals += MAX_IDLE + 1


def a_layer_more(layers: Layers) -> None:
    layers.append(new_layer())


def a_layer_less(layers: Layers) -> None:
    del layers[0]


def nothing(layers: Layers) -> None:
    pass


@pytest.mark.parametrize(
    "change",
    [
        nothing, new_codes, new_weight, new_memory, released, first_released, another_dtype, backward_codes,
        a_layer_more, a_layer_less, written_elsewhere, codes_in_place, not_used_for_long,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", RENEWALS)
@pytest.mark.parametrize("by", ["torch", "kernels"])
def test_every_operand_holds_its_weight(
    by: str, kind: Callable[[], Renew], change: Callable[[Layers], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "kernels":  # in Triton's interpreter
        monkeypatch.setitem(pack.NOW, "cpu", pack.NOW["cuda"])
    torch.manual_seed(0)
    repack_ = kind()
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    layers = [new_layer() for _ in range(3)]
    for _ in range(2):
        repack_(layers)
    change(layers)
    for _ in range(2):
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(-1.5)
        repack_(layers)
        for layer in layers:
            masked = layer.weight.detach() * unpack_codes(layer.mask_codes)
            for (_, product, dtype), operand in layer.operands._made.items():
                wanted = (masked.t() if product == "input_gradient" else masked).to(dtype)
                assert operand.values is not None
                assert torch.equal(operand.values.flatten(), wanted[wanted != 0])
                assert layer.operands.stamp is not None
    assert sum(len(layer.operands._made) for layer in layers) >= 4


@pytest.mark.parametrize("kind", RENEWALS)
def test_an_operand_nobody_uses_is_forgotten(kind: Callable[[], Renew], monkeypatch: pytest.MonkeyPatch) -> None:
    repack_ = kind()
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    layers = [new_layer() for _ in range(2)]
    for _ in range(12):
        use(layers[0])
        repack_(layers)
    assert [len(layer.operands._made) for layer in layers] == [2, 0]


@pytest.mark.parametrize("kind", RENEWALS)
def test_a_released_operand_is_freed(kind: Callable[[], Renew], monkeypatch: pytest.MonkeyPatch) -> None:
    repack_ = kind()
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    layers = [new_layer() for _ in range(3)]
    repack_(layers)
    repack_(layers)
    kept = [weakref.ref(operand) for layer in layers for operand in layer.operands._made.values()]
    for layer in layers:
        layer.operands.release()
    assert not any(reference() for reference in kept)


@pytest.mark.parametrize("keep_transposed", [True, False])
@pytest.mark.parametrize("method", ["fst", "slope"])
def test_a_run_that_is_finished_holds_no_packed_weights(
    method: str, keep_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    training = SparseTraining(
        model, optimizer, method, 40, backend="stand_in", keep_transposed=keep_transposed, verbose=False
    )
    for _ in range(4):
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [layer for layer in model if isinstance(layer, MaskedLayer)]
    kept = [
        weakref.ref(operand)
        for layer in layers
        for operand in [*layer.operands._made.values(), *layer.operands._shared.values()]
    ]
    del layers[:]
    assert len(kept) > 1
    training.finish()
    assert not any(reference() for reference in kept)
    assert training.finished


@pytest.mark.parametrize("method", ["fst", "slope"])
def test_what_dense_products_keep_is_old_after_every_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer may multiply by both, packed weights and W⊙M, and no version tells of fused updates."""
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    training = SparseTraining(model, optimizer, method, 40, backend="stand_in", verbose=False)
    for _ in range(6):
        model(torch.randn(8, 32)).sum().backward()
        layers = [layer for layer in model if isinstance(layer, MaskedLayer)]
        for layer in layers:
            layer.operands.kept.get(layer.weight, layer.matrix, layer.mask_codes, None, torch.float32)
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers:
            (made,) = layer.operands.kept._made.values()
            assert made.writes != layer.operands.kept.writes
            assert layer.operands.stamp is not None
    training.finish()


def test_memory_that_another_storage_has_now_is_packed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that went away and came back: at their address, but in a storage that stamps do not know."""
    monkeypatch.setitem(BACKENDS, "stand_in", StandIn())
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = {"preset": "fst", "warmup": 0, "dense_tail": 0, "refresh_every": 100}
    training = SparseTraining(model, optimizer, method, 200, backend="stand_in", verbose=False)
    in_products: list[int] = []

    def step() -> None:
        fill_ = operands.fill_
        with monkeypatch.context() as products:
            products.setattr(operands, "fill_", lambda jobs: (in_products.append(len(jobs)), fill_(jobs))[1])
            model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    address = model[0].weight.data_ptr()
    model[0].weight.data = torch.from_numpy(model[0].weight.detach().numpy())
    assert model[0].weight.data_ptr() == address
    step()
    in_products.clear()
    for _ in range(3):
        step()
    assert not in_products
    training.finish()
