import copy

import pytest
import torch
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.kernels.mvue import mvue
from sparsetrain.kernels.pack.reference import unpack_rows
from sparsetrain.matmul.estimated_weight_gradient import draw_counter, estimated_weight_gradient


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    simulated = SimulatedBackend()
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    return simulated


def layer(name: str = "masked") -> st.SparseLinear:
    model = nn.Sequential(nn.Linear(32, 48))
    st.sparsify_(model, backend=name, weight_product="mvue", verbose=False)
    return model[0]  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["masked", "simulated"])
@pytest.mark.parametrize("tokens", [16, 21, 64])
def test_the_weight_gradient_is_that_of_the_estimate(backend, name: str, tokens: int) -> None:
    sparse = layer(name)
    x = torch.randn(tokens, 32, requires_grad=True)
    y = sparse(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    rows = -(-tokens // 16) * 16
    padded = torch.zeros(rows, 48)
    padded[:tokens] = dy
    estimate = unpack_rows(*mvue(padded, draw_counter(0), 0, 0)).t()[:tokens]
    torch.testing.assert_close(sparse.weight.grad, estimate.t() @ x.detach(), rtol=1e-5, atol=1e-5)
    assert (estimate != 0).sum() <= tokens / 2 * 48 + 2 * 48
    torch.testing.assert_close(x.grad, dy @ (sparse.weight * sparse.mask), rtol=1e-5, atol=1e-5)


def test_the_estimate_is_unbiased() -> None:
    torch.manual_seed(0)
    dy, x, weight, counter = torch.randn(32, 8), torch.randn(32, 16), torch.zeros(8, 16), draw_counter(5)
    draws = torch.stack([estimated_weight_gradient(dy, x, weight, counter, 1) for _ in range(4000)]).double()
    error = (draws.mean(0) - dy.t().double() @ x.double()) / (draws.std(0) / 4000**0.5)
    assert error.abs().max() < 4.5  # 128 normal numbers: less than one in a thousand by chance
    assert counter.tolist() == [0, (5 << 16) + 4000]


def test_every_backward_draws_anew_and_a_step_can_be_repeated() -> None:
    sparse = layer()
    x, gradients = torch.randn(16, 32), []
    for _ in range(2):
        sparse.draws.copy_(draw_counter(0, clock=3))
        for _ in range(2):
            sparse.weight.grad = None
            sparse(x).square().sum().backward()
            gradients.append(sparse.weight.grad)
    assert not torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_draw_the_same(reentrant: bool) -> None:
    sparse = layer()
    other = copy.deepcopy(sparse)
    x = torch.randn(16, 32, requires_grad=True)
    sparse(x).square().sum().backward()
    checkpoint(other, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(sparse.weight.grad, other.weight.grad)


def run(steps: int, accumulate: int = 2, state: dict | None = None) -> tuple[list[Tensor], dict]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = {"preset": "fst", "refresh_every": 3, "mvue": True}
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        start = state["clock"]
    training = st.SparseTraining(
        model, optimizer, method, 10, verbose=False, state=None if state is None else state["training"]
    )  # fmt: skip
    for step in range(start, steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(10 * step + part))
            (model(x) - x).square().mean().backward()
        optimizer.step()
    saved = {"model": copy.deepcopy(model.state_dict()), "training": training.state_dict(), "clock": training.clock}
    return [parameter.detach() for parameter in model.parameters()], saved


@pytest.mark.parametrize("stop", [1, 4])
def test_resuming_draws_what_the_uninterrupted_run_draws(stop: int) -> None:
    whole, _ = run(8)
    _, saved = run(stop)
    resumed, _ = run(8, state=saved)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_layers_and_steps_draw_apart() -> None:
    dy = torch.randn(64, 8)
    drawn = [mvue(dy, draw_counter(number, clock), 0, 0)[1] for number in (0, 1, 2) for clock in (0, 1)]
    assert len({tuple(meta.flatten().tolist()) for meta in drawn}) == 6


def test_compiles_into_one_graph_that_draws_anew(backend) -> None:
    sparse = layer("simulated")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse, backend=counter, fullgraph=True)
    x, gradients = torch.randn(16, 32), []
    for _ in range(3):
        sparse.weight.grad = None
        compiled(x).square().sum().backward()
        gradients.append(sparse.weight.grad)
    assert counter.frame_count == 1
    assert not torch.equal(gradients[1], gradients[2])
    assert sparse.draws.tolist() == [0, 3]
    torch._dynamo.reset()


def test_the_operator_is_well_formed() -> None:
    arguments = (torch.randn(16, 4), torch.randn(16, 8), torch.zeros(4, 8), draw_counter(0), 0, "masked")
    torch.library.opcheck(estimated_weight_gradient, arguments)


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight_product is 'half': it must be one of \['dense', 'mvue'\]\.$"):
        st.Method(weight_product="half")  # type: ignore[arg-type]
