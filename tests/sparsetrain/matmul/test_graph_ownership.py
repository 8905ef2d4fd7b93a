"""What a captured CUDA graph reads and writes is not freed or shared by what is called later."""

import weakref

import pytest
import torch
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

from sparsetrain.backends import BACKENDS
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.matmul.execution import Execution
from sparsetrain.matmul.operands import Operands


class OnCuda(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    monkeypatch.setitem(BACKENDS, "simulated", SimulatedBackend())
    return state


def test_a_shared_operand_that_a_graph_reads_outlives_a_release(capturing: list[bool]) -> None:
    weight = torch.randn(32, 32).as_subclass(OnCuda)
    codes = search_tiles(weight.as_subclass(Tensor), True)
    operands = Operands(Execution("simulated", keep_transposed=False))
    operands.managed = True
    backend = BACKENDS["simulated"]
    operands.get(weight, codes, backend, "input_gradient", torch.float32)
    capturing[0] = True
    captured = weakref.ref(operands.get(weight, codes, backend, "input_gradient", torch.float32))
    capturing[0] = False
    operands.release()  # a dense phase, between two replays
    assert captured() is not None
    operands.release(captured=True)
    assert captured() is None


def test_nothing_that_is_kept_is_read_by_a_graph(capturing: list[bool]) -> None:
    layer = to_sparse_(nn.Linear(16, 16, bias=False), "sparse", Execution("masked"))
    layer.set_codes_(search_tiles(layer.weight.detach(), True))
    from sparsetrain.matmul.kept_weight import may_keep

    assert may_keep(layer.weight)
    capturing[0] = True
    on_cuda = layer.weight.detach().as_subclass(OnCuda)
    assert not may_keep(on_cuda)
