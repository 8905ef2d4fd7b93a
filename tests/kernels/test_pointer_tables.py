"""Tables of numbers on a device: what they hold, when they are written, and who owns them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.kernels import pointer_tables

NUMBERS = (0, 3, -(1 << 40), (1 << 62) + 1, 7)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device that calls itself CUDA and lies on the CPU, with a stream and a capture that can be set."""
    state: dict[str, Any] = {"capturing": False, "stream": 1}

    class Device:
        type = "cuda"

        def __hash__(self) -> int:
            return 0

    class Stream:
        @property
        def cuda_stream(self) -> int:
            return int(state["stream"])

    real, real_empty, real_copy = torch.zeros, torch.empty, Tensor.copy_
    pinned: set[int] = set()

    def zeros(*sizes: Any, device: Any = None, **keywords: Any) -> Tensor:
        return real(*sizes, **keywords)

    def empty(*sizes: Any, device: Any = None, pin_memory: bool = False, **keywords: Any) -> Tensor:
        made = real_empty(*sizes, **keywords)
        pinned.update([made.data_ptr()] if pin_memory else [])
        return made

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert non_blocking, "a copy waits for the device"
        assert source.data_ptr() in pinned, "a copy from pageable memory waits for the device"
        return real_copy(self, source)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    state["device"] = Device()
    return state


def test_a_table_holds_its_numbers() -> None:
    assert pointer_tables.table(NUMBERS, torch.device("cpu")).tolist() == list(NUMBERS)
    assert pointer_tables.table((), torch.device("cpu")).tolist() == []


def test_a_table_copies_nothing_from_the_host(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a copy from pageable memory waits for the device")

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (Tensor, "to")):
        monkeypatch.setattr(owner, name, forbidden)
    assert pointer_tables.table((5, 1, 2), cuda["device"]).tolist() == [5, 1, 2]


def test_a_table_is_written_once_for_each_stream(cuda: dict[str, Any]) -> None:
    first = pointer_tables.table((1, 2, 4), cuda["device"])
    assert pointer_tables.table((1, 2, 4), cuda["device"]) is first
    cuda["stream"] = 2  # which does not wait for what the other stream writes
    assert pointer_tables.table((1, 2, 4), cuda["device"]) is not first


def test_a_captured_graph_owns_its_tables(cuda: dict[str, Any]) -> None:
    before = pointer_tables.table((1, 2, 8), cuda["device"])
    cuda["capturing"] = True
    captured = pointer_tables.table((1, 2, 8), cuda["device"])
    again = pointer_tables.table((1, 2, 8), cuda["device"])
    cuda["capturing"] = False
    after = pointer_tables.table((1, 2, 8), cuda["device"])
    assert len({id(table) for table in (before, captured, again)}) == 3  # in the graph's memory, not in what is evicted
    assert after is before  # and what the graph owns serves nobody else
    assert captured.tolist() == [1, 2, 8]
