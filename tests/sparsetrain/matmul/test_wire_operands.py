"""Operands of a weight that came over the wire."""

import pytest
import torch
from simulated_backend import SimulatedBackend

import sparsetrain.matmul.wire_operands as room
from sparsetrain.backends import Operand
from sparsetrain.backends.wires import WireJob
from sparsetrain.dispatch import Product
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.wire import to_wire
from sparsetrain.matmul.wire_operands import WireOperands

BOTH: tuple[Product, ...] = ("forward", "input_gradient")


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Which sides each filling had."""
    found: list[tuple[bool, bool]] = []
    fill = room.fill_from_wires_

    def noted(jobs: list[WireJob]) -> None:
        found.extend((job.operand is not None, job.transpose is not None) for job in jobs)
        fill(jobs)

    monkeypatch.setattr(room, "fill_from_wires_", noted)
    return found


def ask(operands: WireOperands, *products: Product) -> None:
    weight = torch.randn(16, 32)
    values, numbers = to_wire(weight, search_tiles(weight, True), torch.float32)
    for product in products:
        operands.get(values, numbers, BACKEND, product, torch.float32)


BACKEND = SimulatedBackend()


def test_weights_that_are_gathered_twice_are_packed_on_the_side_that_is_used(fills: list[tuple[bool, bool]]) -> None:
    operands = WireOperands([])
    for product in BOTH * 2:  # a gathering for each
        operands.outdate()
        ask(operands, product, product)
    assert fills == [(True, False), (False, True)] * 2


def test_weights_that_stay_gathered_are_packed_on_both_sides_at_once(fills: list[tuple[bool, bool]]) -> None:
    operands = WireOperands([])
    for _ in range(3):
        operands.outdate()
        ask(operands, *BOTH)
    assert fills == [(True, False), (False, True), (True, True), (True, True)]


def test_memory_is_given_away_and_comes_back() -> None:
    memory: list[torch.Tensor] = []
    operands = WireOperands(memory)
    operands.outdate()
    ask(operands, *BOTH)
    sizes = [entry.numel() for entry in memory]
    assert sum(sizes) == sum(operand.bytes for operand in operands._made["simulated", torch.float32].values()) > 0
    for entry in memory:
        entry.untyped_storage().resize_(0)
    assert all(operand.values.untyped_storage().size() == 0 for operand in _operands(operands))
    for entry, size in zip(memory, sizes, strict=True):
        entry.untyped_storage().resize_(size)
    operands.outdate()
    ask(operands, "forward")
    assert len(memory) == len(sizes)


def _operands(operands: WireOperands) -> list[Operand]:
    return [*operands._made["simulated", torch.float32].values()]
