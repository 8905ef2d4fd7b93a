"""Decisions about metadata layouts, with simulated vendors whose order the tests made up."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsetrain.backends.cusparselt import metadata_layout
from sparsetrain.backends.cusparselt.metadata_layout import LayoutKey, MetadataLayout, known_layouts, prove_layout

CPU = torch.device("cpu")
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
SWAPPED_CODE = [last | first << 2 for first, last in PAIRS]


@pytest.fixture(autouse=True)
def _nothing_is_decided(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    forget(monkeypatch)
    caplog.set_level(logging.INFO, logger="sparsetrain")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(metadata_layout, "_decisions", {})


class Vendor:
    """A compressor whose word number ``order[p]`` lies at place p; counts its calls."""

    def __init__(self, order: np.ndarray, code: list[int] | None = None, padding: int = 0) -> None:
        self.order, self.padding, self.calls = order, padding, 0
        self.code = np.array(code or [first | last << 2 for first, last in PAIRS], dtype=np.uint16)

    def __call__(self, dense: Tensor) -> Tensor:
        self.calls += 1
        fours = dense.view(torch.int16).numpy().reshape(-1, 4)
        kept = fours != 0
        assert (kept.sum(1) == 2).all(), "the vendor was given a matrix that is not exactly 2:4"
        number = np.zeros(16, dtype=np.int64)
        number[[1 << first | 1 << last for first, last in PAIRS]] = range(6)
        nibbles = self.code[number[kept @ np.array([1, 2, 4, 8])]].reshape(-1, 4)
        words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
        padding = np.full(self.padding, 77, dtype=np.int16)
        return torch.from_numpy(np.concatenate([fours[kept], words[self.order].view(np.int16), padding])).view(
            dense.dtype
        )


def shuffled(rows: int, columns: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows * columns // 16)


def block() -> Iterator[tuple[int, int]]:
    for row in range(8):
        for lower in (0, 16):
            for word in (0, 1):
                yield row + lower, word
                yield row + lower + 8, word


def order_of_sm80(rows: int, columns: int) -> np.ndarray:
    """A walk through tiles of 128 × 64 and their blocks of 32 × 32, in the order of memory."""
    return np.array([
        (top + down + row) * (columns // 16) + left + right + word
        for left in range(0, columns // 16, 4)
        for top in range(0, rows, 128)
        for right in (0, 2)
        for down in (0, 32, 64, 96)
        for row, word in block()
    ])  # fmt: skip


def prove(
    vendor: Callable[[Tensor], Tensor], rows: int = 128, columns: int = 128, dtype: torch.dtype = torch.float16,
    environment: str = "sm_90 vendor 1.0", folder: Path | None = None,
) -> MetadataLayout:  # fmt: skip
    return prove_layout(vendor, LayoutKey(environment, rows, columns, dtype), CPU, folder)


def check_arrangement(layout: MetadataLayout, vendor: Vendor) -> None:
    """Natural metadata of a random matrix becomes what the vendor writes."""
    rng = np.random.default_rng(3)
    choice = rng.integers(0, 6, layout.rows * layout.columns // 4)
    kept = np.array([[place in pair for place in range(4)] for pair in PAIRS])[choice]
    dense = torch.from_numpy(np.where(kept, rng.uniform(1, 2, kept.shape), 0.0))
    natural = Vendor(np.arange(choice.size // 4))(dense.view(layout.rows, layout.columns).to(layout.dtype))
    meta = natural[2 * choice.size :].view(torch.int16).view(layout.rows, -1)
    buffer = vendor(dense.view(layout.rows, layout.columns).to(layout.dtype))
    expected = buffer[2 * choice.size :].view(torch.int16).clone()
    buffer[2 * choice.size :] = 1.5
    layout.arrange_(meta, buffer[2 * choice.size :])
    assert torch.equal(buffer[2 * choice.size :].view(torch.int16), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384)])
def test_the_layout_of_8x_is_used_where_every_byte_is_equal(rows: int, columns: int, dtype: torch.dtype) -> None:
    vendor = Vendor(order_of_sm80(rows, columns))
    layout = prove(vendor, rows, columns, dtype)
    assert (layout.name, layout.rows, layout.columns, layout.dtype) == ("cusparselt_sm80", rows, columns, dtype)
    assert vendor.calls == 2
    check_arrangement(layout, vendor)


def test_two_exchanged_words_are_noticed() -> None:
    order = order_of_sm80(128, 128)
    order[[100, 101]] = order[[101, 100]]
    vendor = Vendor(order)
    layout = prove(vendor)
    assert layout.name == "learned"
    check_arrangement(layout, vendor)


@pytest.mark.parametrize(("rows", "columns", "padding"), [(128, 128, 0), (256, 384, 0), (64, 96, 0), (128, 128, 24)])
def test_another_order_is_learned(rows: int, columns: int, padding: int) -> None:
    vendor = Vendor(shuffled(rows, columns), padding=padding)
    layout = prove(vendor, rows, columns)
    assert layout.name == "learned"
    check_arrangement(layout, vendor)


def test_the_layout_of_8x_with_padding_is_learned() -> None:
    vendor = Vendor(order_of_sm80(128, 128), padding=8)
    layout = prove(vendor)
    assert layout.name == "learned"
    check_arrangement(layout, vendor)


@pytest.mark.parametrize("shape", [(128, 128), (64, 96)])
def test_what_cannot_be_learned_is_left_to_the_vendor(shape: tuple[int, int]) -> None:
    layout = prove(Vendor(shuffled(*shape), SWAPPED_CODE), *shape)
    assert layout.name == "vendor"
    assert "natural nibbles" in layout.reason
    with pytest.raises(ValueError, match=r"layout is 'vendor' for \d+ × \d+: .* compress with the vendor's call"):
        layout.arrange_(torch.zeros(shape[0], shape[1] // 16, dtype=torch.int16), torch.zeros(1).half())


def test_a_shape_without_natural_metadata_is_left_to_the_vendor() -> None:
    vendor = Vendor(shuffled(16, 16))
    layout = prove(vendor, 16, 24)
    assert (layout.name, vendor.calls) == ("vendor", 0)
    assert "columns of 16" in layout.reason


def test_only_16_bit_values_are_proven() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float32: .* torch.float16 and torch.bfloat16"):
        prove(Vendor(shuffled(16, 16)), 16, 16, torch.float32)


def test_every_environment_shape_and_dtype_is_decided_once(caplog: pytest.LogCaptureFixture) -> None:
    vendor = Vendor(shuffled(64, 64))
    cases = [("a", 64, 64, torch.float16), ("a", 64, 64, torch.bfloat16), ("b", 64, 64, torch.float16)]
    for environment, rows, columns, dtype in [*cases, ("a", 32, 128, torch.float16)]:
        before = vendor.calls
        first = prove(vendor, rows, columns, dtype, environment)
        after = vendor.calls
        assert after > before
        assert prove(vendor, rows, columns, dtype, environment) is first
        assert vendor.calls == after
    known = [(layout.environment, layout.rows, layout.columns, layout.dtype) for layout in known_layouts()]
    assert known == [*cases, ("a", 32, 128, torch.float16)]
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4


@pytest.mark.parametrize(
    ("order", "code", "name"),
    [(order_of_sm80(128, 128), None, "cusparselt_sm80"), (shuffled(128, 128), None, "learned"),
     (shuffled(128, 128), SWAPPED_CODE, "vendor")],
)  # fmt: skip
def test_the_decision_is_logged_with_one_sentence(
    order: np.ndarray, code: list[int] | None, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    layout = prove(Vendor(order, code))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sparsetrain", logging.INFO)
    assert record.getMessage() == f"metadata of 128 × 128 torch.float16 on sm_90 vendor 1.0: {name}: {layout.reason}"
    assert re.fullmatch(r"[A-Z][^\n]*\.", layout.reason)
    assert not re.search(r"\. [A-Z]", layout.reason)


def test_a_copy_for_another_device_needs_no_new_proof() -> None:
    vendor = Vendor(shuffled(64, 64))
    first = prove(vendor, 64, 64)
    calls = vendor.calls
    other = prove_layout(vendor, LayoutKey("sm_90 vendor 1.0", 64, 64, torch.float16), torch.device("meta"))
    assert vendor.calls == calls
    assert other.table is not None
    assert (other.name, other.reason, other.table.source.device.type) == ("learned", first.reason, "meta")
    assert known_layouts() == [first]


def test_the_random_numbers_of_the_training_are_left_alone() -> None:
    before = torch.get_rng_state()
    prove(Vendor(shuffled(128, 128)))
    assert torch.equal(torch.get_rng_state(), before)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_learned_order_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = Vendor(shuffled(128, 128), padding=8)
    first = prove(vendor, folder=tmp_path)
    (path,) = files_in(tmp_path)
    assert path.parent == tmp_path / "layouts"
    assert path.suffix == ".safetensors"
    assert load_file(path)["source"].tolist() == [*vendor.order.tolist(), *[-1] * 8]
    forget(monkeypatch)
    content, vendor.calls = path.read_bytes(), 0
    again = prove(vendor, folder=tmp_path)
    assert vendor.calls <= 3
    assert again.name == first.name == "learned"
    assert str(path) in again.reason
    check_arrangement(again, vendor)
    assert path.read_bytes() == content


@pytest.mark.parametrize("order_and_code", [(order_of_sm80(128, 128), None), (shuffled(128, 128), SWAPPED_CODE)])
def test_only_learned_orders_are_kept_on_disk(order_and_code: tuple[np.ndarray, list[int]], tmp_path: Path) -> None:
    assert prove(Vendor(*order_and_code), folder=tmp_path).name != "learned"
    assert files_in(tmp_path) == []


def test_every_environment_shape_and_dtype_has_its_file(tmp_path: Path) -> None:
    for environment, rows, columns, dtype in [
        ("sm_90 a/b", 64, 64, torch.float16),
        ("sm_90 a b", 64, 64, torch.float16),
        ("sm_90 a b", 64, 64, torch.bfloat16),
        ("sm_90 a b", 32, 128, torch.bfloat16),
    ]:
        prove(Vendor(shuffled(rows, columns)), rows, columns, dtype, environment, tmp_path)
    assert len(files_in(tmp_path)) == 4


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_program(path: Path) -> None:
    save_file({"source": torch.zeros(3)}, path)


def rewritten(path: Path, source: Tensor, **header: str) -> None:
    known = {"format": "sparsetrain metadata layout 1", "environment": "sm_90 vendor 1.0", "rows": "128"}
    known |= {"columns": "128", "dtype": "float16", "unit_bits": "16"}
    save_file({"source": source, "padding": torch.empty(0, dtype=torch.int16)}, path, metadata=known | header)


def an_older_vendor(path: Path) -> None:
    rewritten(path, torch.from_numpy(shuffled(128, 128, seed=6)).int())


def another_environment(path: Path) -> None:
    rewritten(path, torch.from_numpy(shuffled(128, 128)).int(), environment="sm_80 vendor 1.0")


def addresses_beyond_the_end(path: Path) -> None:
    rewritten(path, torch.full((1024,), 1024, dtype=torch.int32))


def no_number(path: Path) -> None:
    rewritten(path, torch.from_numpy(shuffled(128, 128)).int(), unit_bits="sixteen")


@pytest.mark.parametrize(
    "damage",
    [cut_off, empty, another_program, an_older_vendor, another_environment, addresses_beyond_the_end, no_number],
    ids=lambda damage: damage.__name__,
)
def test_a_file_that_does_not_hold_is_ignored_and_replaced(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vendor = Vendor(shuffled(128, 128))
    prove(vendor, folder=tmp_path)
    (path,) = files_in(tmp_path)
    damage(path)
    forget(monkeypatch)
    caplog.clear()
    layout = prove(vendor, folder=tmp_path)
    assert layout.name == "learned"
    assert str(path) not in layout.reason
    check_arrangement(layout, vendor)
    warning, _ = caplog.records
    assert (warning.levelno, str(path) in warning.getMessage()) == (logging.WARNING, True)
    assert files_in(tmp_path) == [path]
    forget(monkeypatch)
    assert str(path) in prove(vendor, folder=tmp_path).reason


def test_a_file_of_the_same_order_as_the_test_writes_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the test above are refused for what is wrong with them, and not for how they are written."""
    vendor = Vendor(shuffled(128, 128))
    prove(vendor, folder=tmp_path)
    (path,) = files_in(tmp_path)
    rewritten(path, torch.from_numpy(shuffled(128, 128)).int())
    forget(monkeypatch)
    assert str(path) in prove(vendor, folder=tmp_path).reason


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert prove(Vendor(shuffled(64, 64)), 64, 64, folder=tmp_path / "file").name == "learned"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(metadata_layout.os, "replace", fail)
    assert prove(Vendor(shuffled(64, 64)), 64, 64, folder=tmp_path).name == "learned"
    assert files_in(tmp_path) == []
    assert "the disk is full" in caplog.records[0].getMessage()
