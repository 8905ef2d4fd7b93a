"""The model of expected speed-up, and the table of it in ``docs/gpu.md``."""

from pathlib import Path

import pytest
from script_modules import BENCHMARKS, importable

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


@pytest.fixture
def load():
    with importable(BENCHMARKS) as load:
        yield load


def test_a_step_by_hand(load) -> None:
    model, peaks = load("model"), load("peaks")
    gpu = peaks.Gpu("made up", (), tflops=100.0, gigabytes=1000.0, source="this test")
    training = model.Training("made up", sparse_weights=1e9, flops=6e13, tokens=10_000)
    # dense: 6e13 / (0.6 · 1e14) = 1 s; products: 4 · 1e9 · 1e4 / (0.8 · 1e14) = 0.5 s; passes: 9e9 / 0.9e12 = 0.01 s
    assert model.speed_up(gpu, training, 2.0, 9.0) == pytest.approx(1 / (1 - 0.25 + 0.01))
    assert model.speed_up(gpu, training, 1.0, 9.0) == pytest.approx(1 / 1.01)
    assert model.speed_up(gpu, training, 1.0, 0.0) == 1.0


def test_a_training_counts_its_weights(load) -> None:
    training = load("model").training_of("made up", 128, 3, 256, 1000, 64, 2)
    sparse = 3 * (4 * 128 * 128 + 3 * 128 * 256)
    assert (training.sparse_weights, training.tokens) == (sparse, 128)
    assert training.flops == 6 * 128 * (sparse + 128 * 1000) + 6 * 128 * 64 * 128 * 3


def test_bytes_are_those_of_the_passes(load) -> None:
    model = load("model")
    mask = 2 / 16  # a code of 16 bits for a tile of 16 entries
    operands = 2 * (2 / 2 + 4 / 4 / 8)  # of W and Wᵀ: half of the entries in 16 bits, and four bits for every four
    search = (4 + mask) / 40
    decay, pack = 4 + 4 + mask + 4, 4 + mask + operands
    assert sum(model.SEPARATE.values()) == pytest.approx(decay + pack + search)
    assert sum(model.ONE_PASS.values()) == pytest.approx(mask + operands + search)


def test_the_page_holds_the_table_its_inputs_and_says_that_it_is_a_model(load, capsys) -> None:
    model = load("model")
    page = PAGE.read_text()
    table = page.partition("<!-- scripts/bench model -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == model.table()
    heading = "## Expected speed-up: a model that no run has confirmed"
    after = page.partition(heading)[2]
    assert "**No run has confirmed any of it.**" in after
    for share in (model.UTILISATION, model.GEMM_SHARE, model.COPY_SHARE):
        assert f"{share:.0%}".replace("%", " %") in after
    for gpu in ("A100", "H100", "H200", "B200", "RTX"):
        assert gpu in page.partition("\n\n")[2]
        assert f"| {gpu}" in table
    options = load("command_line").command_line().parse_args(["model"])
    assert load("main")._model(options) == 0
    assert capsys.readouterr().out.strip() == table


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"), ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"), ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200 SXM"), ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_driver_s_name_finds_its_data_sheet_and_no_namesake(load, name: str, expected: str | None) -> None:
    found = load("peaks").find(name)
    assert (found and found.name) == expected


def test_every_ratio_is_of_a_known_gpu(load) -> None:
    model, peaks = load("model"), load("peaks")
    assert set(model.RATIOS) <= {gpu.name for gpu in peaks.GPUS}
    assert all(1 <= low < high for low, high in model.RATIOS.values())
    assert all(gpu.source for gpu in peaks.GPUS)
