"""Kernels of the engine's steps: how many are launched, what they pack, and that they give what the reference gives."""

from collections import Counter

import pytest
import torch
from kernels_on_cpu import kernels_on_cpu
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS, Operand
from sparsetrain.kernels.metadata_order import Order, metadata_places, metadata_words

WIDTHS = [16, 32, 48, 32, 16]  # and back to 16: five shapes
METHOD = {"preset": "fst", "dense_tail": 0, "refresh_every": 2, "decay": 1e-2}


class OrderedBackend(SimulatedBackend):
    """Metadata in CUTLASS's order for sm_90 and, in transposes of tall matrices, by a table."""

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        self.calls["allocate"] += 1
        order = Order.TABLE if shape[0] > shape[1] else Order.CUTLASS_SM90_2
        values = torch.full((shape[0], shape[1] // 2), float("nan"), dtype=dtype)
        words = shape[0] * shape[1] // 16
        table = torch.randperm(words, generator=torch.Generator().manual_seed(words)).int()
        size = words if order == Order.TABLE else metadata_words(*shape, order)
        meta = torch.full((size,), -1, dtype=torch.int16)
        return Operand(shape, (values, meta), values, meta, order, table if order == Order.TABLE else None)

    def product(
        self, operand: Operand, rows: Tensor, bias: Tensor | None = None, algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:  # fmt: skip
        values, meta = operand.tensors
        natural = meta[metadata_places(*operand.shape, operand.order, meta.device, operand.places)]
        return super().product(
            Operand(operand.shape, (values, natural)), rows, bias, algorithm, transposed_output
        )  # fmt: skip


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> OrderedBackend:
    ordered = OrderedBackend(native=True)
    monkeypatch.setitem(BACKENDS, "simulated", ordered)
    return ordered


def network(repeats: int) -> nn.Sequential:
    torch.manual_seed(0)
    every = [*WIDTHS, 16]
    pairs = [(every[i], every[i + 1]) for i in range(5)] * repeats
    return nn.Sequential(*(nn.Linear(inner, outer, bias=False) for inner, outer in pairs))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    x = torch.randn(4, 16, requires_grad=True)
    y: Tensor = model(x)
    y.square().mean().backward()
    optimizer.step()
    return y.detach()


def test_a_step_over_120_layers_of_5_shapes_launches_at_most_12_kernels(backend: OrderedBackend) -> None:
    model = network(24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with kernels_on_cpu(run=False) as launches:
        training = st.SparseTraining(model, optimizer, METHOD, 20, backend="simulated", verbose=False)
        step(model, optimizer)
        finished = backend.calls["finish_"]
        for _ in range(2):
            launches.clear()
            step(model, optimizer)
            assert len(launches.names) <= 12
            assert Counter(launches.names) == {"masked_update_kernel": 5, "pack_kernel": 5}
            assert all(given["SEARCH"] == training.refreshed for given in launches.arguments if "SEARCH" in given)
            assert all(given["FORWARD"] and given["TRANSPOSED"] for given in launches.arguments if "SEARCH" in given)
    assert backend.calls["allocate"] == 240
    assert finished == backend.calls["finish_"] == 0  # nothing is re-ordered


def test_watching_a_dense_phase_packs_nothing(backend: OrderedBackend) -> None:
    model = network(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = METHOD | {"warmup": 6, "decay": "auto"}
    with kernels_on_cpu(run=False) as launches:
        training = st.SparseTraining(model, optimizer, method, 20, backend="simulated", verbose=False)
        for _ in range(4):
            step(model, optimizer)
    assert training.phase == "dense"
    assert launches.names == ["pack_kernel"] * len(launches.names)
    assert len(launches.names) in (10, 15)  # a search at two or three steps
    for given in launches.arguments:
        assert (given["SEARCH"], given["STATISTICS"]) == (True, True)
        assert (given["FORWARD"], given["TRANSPOSED"]) == (False, False)
    assert backend.calls["allocate"] == 0


def run(
    kernels: bool, fused: bool = False, backend: str = "simulated"
) -> tuple[list[Tensor], list[Tensor], st.SparseTraining]:
    model = network(1)[:3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    outputs = []
    with kernels_on_cpu() if kernels else torch.enable_grad():
        training = st.SparseTraining(model, optimizer, METHOD, 20, backend=backend, verbose=False)
        for _ in range(3):
            torch.manual_seed(training.clock)
            outputs.append(step(model, optimizer))
    state = [layer.weight.detach() for layer in model] + [layer.mask_codes for layer in model]
    return outputs, state, training


@pytest.mark.sweep
def test_steps_of_kernels_equal_those_of_the_reference(backend: OrderedBackend) -> None:
    outputs, state, training = run(kernels=True)
    wanted_outputs, wanted_state, wanted = run(kernels=False)
    assert all(map(torch.equal, outputs, wanted_outputs))
    assert all(map(torch.equal, state, wanted_state))
    assert training.masks.flip_rate() == wanted.masks.flip_rate()
    for name, sums in wanted.masks.sums_at_refresh.items():
        torch.testing.assert_close(training.masks.sums_at_refresh[name], sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_refresh_packed_is_packed_again_after_the_next_step(backend: OrderedBackend, fused: bool) -> None:
    """A fused optimizer leaves no trace of its writes, and what a refresh packed is up to date for one step alone."""
    outputs, state, _ = run(kernels=False, fused=fused)
    wanted_outputs, wanted_state, _ = run(kernels=False, fused=fused, backend="masked")
    for one, other in zip([*outputs, *state], [*wanted_outputs, *wanted_state], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_is_packed_twice_in_a_refresh(backend: OrderedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.backends import packing

    packed = []
    monkeypatch.setattr(packing, "pack_tiles_now_", lambda weights, *rest: packed.append(len(weights)))
    model = network(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = st.SparseTraining(model, optimizer, METHOD, 20, backend="simulated", verbose=False)
    step(model, optimizer)
    for _ in range(3):
        packed.clear()
        step(model, optimizer)
        assert packed == ([] if training.refreshed else [5])
