"""Raw metadata buffers that are brought home: enough to learn an order without the device they come from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from script_modules import BENCHMARKS, GPU, importable
from torch import Tensor

from sparsetrain.backends import CuSparseLtBackend
from sparsetrain.backends.cusparselt import metadata_layout
from sparsetrain.kernels.layouts import learn_layout

CPU = torch.device("cpu")
ROWS, COLUMNS = 32, 48


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metadata_layout, "_decisions", {})
    with importable(GPU, BENCHMARKS) as load:
        yield load("metadata")


class Vendor:
    """Values, then words of four nibbles in an order of the test's own; ``twice`` says one of them twice."""

    def __init__(self, twice: bool = False) -> None:
        self.order = np.random.default_rng(3).permutation(ROWS * COLUMNS // 16)
        if twice:
            self.order[0] = self.order[1]

    def __call__(self, dense: Tensor) -> Tensor:
        quads = dense.view(torch.int16).numpy().reshape(-1, 4)
        places = np.sort(np.argsort(quads == 0, axis=1, kind="stable")[:, :2], axis=1)  # zeros are a 2:4 matrix too
        nibbles = (places[:, 0] | places[:, 1] << 2).reshape(-1, 4)
        words = (nibbles << np.array([0, 4, 8, 12])).sum(1).astype(np.uint16).view(np.int16)
        return torch.from_numpy(
            np.concatenate([np.take_along_axis(quads, places, 1).flatten(), words[self.order]])
        ).view(dense.dtype)


class VendorBackend(CuSparseLtBackend):
    def __init__(self, vendor: Vendor) -> None:
        self.vendor = vendor
        super().__init__([self])  # type: ignore[list-item]

    def why_not(self, *problem: object) -> None:
        return None

    def version(self) -> str:
        return "of a test"

    def compress(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        result = self.vendor(matrix)
        return result if out is None else out.copy_(result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_recording_stands_for_the_compressor(metadata, tmp_path: Path, dtype: torch.dtype) -> None:
    vendor = Vendor()
    found = metadata.decide(VendorBackend(vendor), (ROWS, COLUMNS), dtype, CPU, tmp_path, "vendor")
    assert (found["layout"], found["learned"]) == ("learned", "units of 16 bits, 0 of padding")
    played = metadata.Recording.load(tmp_path / found["recording"])
    layout = learn_layout(played, ROWS, COLUMNS, dtype, CPU)
    assert layout.source.tolist() == vendor.order.tolist()


def test_buffers_of_an_order_that_is_not_learned_are_kept_with_the_reason(metadata, tmp_path: Path) -> None:
    vendor = Vendor(twice=True)
    metadata.ALWAYS_KEPT = 0  # only because it failed
    found = metadata.decide(VendorBackend(vendor), (ROWS, COLUMNS), torch.float16, CPU, tmp_path, "vendor")
    assert found["layout"] == "vendor"
    assert found["learned"].startswith("not learned: compress shows 380 of 384 natural nibbles")
    played = metadata.Recording.load(tmp_path / found["recording"])
    with np.load(tmp_path / found["recording"]) as file:
        assert file["matrices"].shape[1:] == (ROWS, COLUMNS)
        bits = torch.from_numpy(file["matrices"][0])
    matrix = bits.view(torch.float16)
    assert torch.equal(played(matrix), vendor(matrix))
    with pytest.raises(LookupError, match="no such matrix"):
        played(matrix + 1)
    json.dumps(found)


def test_a_library_that_fails_is_a_line_and_no_end(metadata, tmp_path: Path) -> None:
    def refuse(dense: Tensor) -> Tensor:
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nsecond line")

    backend = VendorBackend(refuse)  # type: ignore[arg-type]
    found = metadata.decide(backend, (ROWS, COLUMNS), torch.float16, CPU, tmp_path, "vendor")
    assert found["fails"] == "RuntimeError: CUSPARSE_STATUS_NOT_SUPPORTED"
    assert "recording" not in found


def test_a_recording_has_an_end(metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MOST_BYTES", 3 * ROWS * COLUMNS * 2)
    recording = metadata.Recording(Vendor())
    learn_layout(recording, ROWS, COLUMNS, torch.float16, CPU)
    assert len(recording.pairs) == 2
