"""Whole training steps by Triton kernels, against the same steps by plain torch: everything but the optimizer."""

from collections import Counter
from typing import Any

import pytest
import torch
from by_kernels import use_kernels
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS, Operand
from sparsetrain.kernels.masked_update.operator import add_masked_decays_
from sparsetrain.kernels.pack import reference
from sparsetrain.kernels.pack.operator import unpack_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes Triton's interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEPS = 4


class UnpackingBackend(SimulatedBackend):
    """Has every fourth product, of ever another operand, multiply by what the library's own operator unpacks."""

    def product(
        self, operand: Operand, rows: Tensor, bias: Tensor | None = None, algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:  # fmt: skip
        self.calls["product"] += 1
        values, meta = operand.tensors
        unpack = unpack_rows if self.calls["product"] % 4 == 0 else reference.unpack_rows
        result = nn.functional.linear(rows, unpack(values, meta), bias)
        return result.t().contiguous() if transposed_output else result


def run(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Train through a dense step and two refreshes; return weights, codes, moments and losses after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-4)  # 1e-8 is zero in float16
    method = {"preset": "fst", "warmup": 1, "refresh_every": 2, "dense_tail": 0, "decay": 0.1}
    method["mvue"] = dtype == torch.bfloat16
    training = st.SparseTraining(model, optimizer, method, STEPS, backend="simulated", verbose=False)
    seen = []
    for step in range(STEPS):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()} | {"loss": loss.detach()}
        state |= {f"codes of {name}": layer.mask_codes.clone() for name, layer in training.masks.layers.items()}
        for name, parameter in model.named_parameters():
            state |= {f"{key} of {name}": value.clone() for key, value in optimizer.state[parameter].items()}
        seen.append(state)
    return seen


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "simulated", UnpackingBackend(native=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_by_kernels_equal_those_by_plain_torch_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(dtype)
    calls: Counter[str] = use_kernels(monkeypatch)
    found = run(dtype)
    assert [different(*pair) for pair in zip(found, expected, strict=True)] == [[]] * STEPS
    assert {"add_masked_decays_", "unpack_rows"} <= set(calls)
    assert any(name.startswith("search") for name in calls)
    assert any("pack_" in name for name in calls)
    assert ("mvue" in calls) == (dtype == torch.bfloat16)
    assert all(value.isfinite().all() for state in expected for value in state.values())
    moved = different(expected[1], expected[-1])
    assert {"codes of 0", "codes of 2", "0.weight"} <= set(moved)


def test_a_decay_that_forgets_a_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(torch.float32)
    implementations = add_masked_decays_._backend_fns
    whole = implementations[None]

    def without_the_last(gradients: list[Tensor], *rest: Any) -> None:
        kept = gradients[-1][-1].clone()
        whole(gradients, *rest)
        gradients[-1][-1] = kept

    monkeypatch.setitem(implementations, None, without_the_last)
    found = run(torch.float32)
    assert any(different(*pair) for pair in zip(found, expected, strict=True))
