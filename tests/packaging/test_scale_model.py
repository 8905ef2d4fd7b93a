"""The model of sharded training, by hand, and the tables of it in ``docs/scaling.md``."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_modules import BENCHMARKS, importable

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture
def load():
    with importable(BENCHMARKS) as load:
        yield load


@pytest.fixture
def printed(load, capsys):
    def run(*flags: str) -> str:
        options = load("command_line").command_line().parse_args(["scale-model", *flags])
        code = load("scale_model").run(options)
        text = capsys.readouterr().out
        return text if code == 0 else f"{code}: {text}"

    return run


def made_up(load, **changes):
    """One billion parameters, half of them sparse, on machines with round numbers."""
    inputs = load("scale_inputs")
    given = {
        "gpus_per_node": 4, "tokens": 1000, "node_bandwidth": 10.0, "dense_tflops": 6.0, "sparse_speed_up": 2.0,
        "pack_bytes": 8.0, "unpack_bytes": 4.0, "memory_bandwidth": 1000.0, "packed_wire": 0.5,
        "masked_products": "sparse", **changes,
    }  # fmt: skip
    return inputs.Model("made up", 1e9, 0.5), inputs.Inputs(**given)


def test_a_step_by_hand(load) -> None:
    cost = load("scale_model").cost
    model, inputs = made_up(load)
    # two gathers of 2 bytes: 4 GB, 15/16 of it from others; 3/4 of 4 GB and of 4 GB of float32 gradients enter a node
    # at 10 GB/s; 6 · 1e9 · 1000 operations at 6e12 a second
    dense = cost(model, 16, "dense", inputs)
    assert (dense.gathered_gb, dense.communication_s, dense.compute_s) == pytest.approx((3.75, 0.6, 1.0))
    assert (dense.step_s, dense.speed_up, dense.bound) == (1.0, 1.0, "compute")
    # half of the products are of sparse layers, two thirds of these take half of the time; 8 bytes of 0.5e9 weights
    masked = cost(model, 16, "masked", inputs)
    assert (masked.gathered_gb, masked.communication_s) == pytest.approx((3.75, 0.6))
    assert masked.compute_s == pytest.approx(1 - 0.5 * 2 / 3 / 2 + 0.004)
    packed = cost(model, 16, "packed", inputs)
    assert (packed.gathered_gb, packed.communication_s) == pytest.approx((0.75 * 3.75, 0.75 * (3 + 4) / 10))
    assert packed.compute_s == pytest.approx(1 - 0.5 * 2 / 3 / 2 + 0.002)
    assert packed.speed_up == pytest.approx(1 / packed.compute_s)


def test_every_input_counts(load) -> None:
    cost = load("scale_model").cost

    def step(wire: str, **changes):
        return cost(*(lambda model, inputs: (model, 16, wire, inputs))(*made_up(load, **changes)))

    assert step("dense", overlap=0.0).step_s == pytest.approx(1.6)
    assert step("dense", overlap=0.5).step_s == pytest.approx(1.3)
    assert step("dense", reduce_dtype="bfloat16").communication_s == pytest.approx(0.45)
    assert step("dense", gathers=1).communication_s == pytest.approx(0.45)
    assert step("dense", gather_bytes=1.0, dense_wire=1.0).gathered_gb == pytest.approx(3.75 / 2)
    assert step("dense", dense_wire=2.0).gathered_gb == pytest.approx(3.75 * 1.5)
    assert step("masked", masked_wire=0.5).gathered_gb == pytest.approx(3.75 * 0.75)
    assert step("masked", masked_products="dense").compute_s == 1.0
    assert step("packed", masked_products="dense").compute_s < 1.0
    assert step("packed", sparse_products=("forward",)).compute_s == pytest.approx(1 - 0.5 / 3 / 2 + 0.002)
    assert step("packed", sparse_speed_up=1.0).speed_up == pytest.approx(1 / 1.002)
    assert step("packed", memory_bandwidth=1e9).compute_s == pytest.approx(5 / 6)
    assert step("dense", gpus_per_node=8).communication_s == pytest.approx(0.4)
    assert step("dense", tokens=500).bound == "network"
    # network-bound: the step is that of the wire
    assert step("packed", tokens=10).speed_up == pytest.approx(0.6 / 0.525)


def test_presets_are_the_published_sizes(load) -> None:
    small, large = load("scale_inputs").PRESETS.values()
    assert (small.parameters, large.parameters) == (6_738_415_616, 68_976_648_192)
    assert small.sparse_share == pytest.approx(32 * (4 * 4096**2 + 3 * 4096 * 11008) / 6_738_415_616)
    assert large.rows == (1024, 8192, 28672)


@pytest.mark.parametrize(
    ("parameters", "share", "dense", "packed"),
    # 4 bytes a parameter and step, 1023 of 1024 parts of it from others; 17/32 of what is sparse
    [(6.7e9, 0.96, 26.8, 14.7), (69e9, 0.99, 276, 148)],
)
def test_what_1024_gpus_gather(load, parameters: float, share: float, dense: float, packed: float) -> None:
    inputs, cost = load("scale_inputs"), load("scale_model").cost
    model = inputs.Model("rounded", parameters, share)
    found = [cost(model, 1024, wire, inputs.Inputs()).gathered_gb for wire in ("dense", "masked", "packed")]
    assert found == pytest.approx([dense, dense, packed], rel=3e-3)


def test_shards_by_hand(load) -> None:
    scale = load("scale_model")
    assert [scale.aligned_up_to(rows) for rows in (4, 1024, 8192, 11008, 14336, 28672)] == [1, 256, 2048, 64, 512, 1024]
    assert scale.chunk(11008, 128) == 86
    lines = scale.alignment_table([11008, 8192], [64, 128, 1024]).splitlines()
    assert lines[2:] == ["| 11008 | 64 | 172 | 86 ❌ | 11 ❌ |", "| 8192 | 2048 | 128 | 64 | 8 |"]


def test_a_model_of_your_own_and_its_layers(printed) -> None:
    flags = ("--layer", "2x24x10", "--layer", "1x16x20", "--parameters", "1000", "--gpus", "16", "--json")
    found = json.loads(printed(*flags))
    assert found["measured"] is False
    assert found["models"] == [{"name": "own", "parameters": 1000.0, "sparse_share": 0.8, "rows": [16, 24]}]
    assert [row["wire"] for row in found["costs"]] == ["dense", "masked", "packed"]
    assert found["inputs"]["node_bandwidth"] == 320.0
    text = printed(*flags[:-1])
    assert "nothing here was measured" in text.splitlines()[0]
    assert "own: shards of layers with 16 rows on 16 GPUs and 24 rows on 16 GPUs cut through 4×4 tiles" in text
    assert json.loads(printed("--model", "7b", "--sparse-share", "1/2", "--json"))["models"][0]["sparse_share"] == 0.5


def test_rows_go_to_a_file(printed, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scale.csv"
    for _ in range(2):
        printed("--gpus", "64", "--model", "70b", "--csv", str(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["gpus"], row["wire"]) for row in rows] == [("64", "dense"), ("64", "masked"), ("64", "packed")]
    assert float(rows[0]["gathered_gb"]) == pytest.approx(4 * 68.976648192 * 63 / 64)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "12"], "--gpus is 12: it must be a multiple of --gpus-per-node = 8"),
        (["--gpus", "8"], "two nodes at least"),
        (["--parameters", "1e9"], "--parameters needs --sparse-share or --layer"),
        (["--parameters", "10", "--layer", "1x4x4"], "--parameters is 10, but the layers alone have 16"),
        (["--model", "7b", "--layer", "1x4x4"], "--model goes with neither --layer nor --parameters"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(printed, flags: list[str], words: str) -> None:
    answer = printed(*flags)
    assert answer.startswith("2: ")
    assert words in answer
    assert answer.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--overlap", "1.5"], "argument --overlap: '1.5' is no share: write a number from 0 to 1."),
        (["--node-bandwidth", "0"], "argument --node-bandwidth: '0' is no positive number"),
        (["--packed-wire", "17/0"], "'17/0' is no positive number"),
        (["--tokens", "1e999"], "'1e999' is no whole number"),
        (["--dense-wire", "1e999"], "'1e999' is no positive number"),
        (["--gathers", "two"], "'two' is no whole number of at least 1."),
        (["--rows", "11008", "10"], "'10' is no height of a sparse layer: write a multiple of 4"),
        (["--layer", "4096x4096"], "'4096x4096' is no kind of layer: write copies, rows"),
    ],
)
def test_a_wrong_value_is_one_sentence(printed, capsys, flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        printed(*flags)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_every_input_has_a_flag_with_its_default(load) -> None:
    inputs = load("scale_inputs")
    options = load("command_line").command_line().parse_args(["scale-model"])
    assert inputs.read_flags(options)[2] == inputs.Inputs()
    command = [sys.executable, "-m", "scripts.benchmarks.main", "scale-model", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    shown = " ".join(shown.split())
    assert shown.count("(default: ") == 5 + len(vars(inputs.Inputs()))
    assert all(unit in shown for unit in ("GB/s", "TFLOP/s", "bytes a"))


def test_the_page_holds_the_tables_and_says_that_they_are_a_model(printed) -> None:
    page = PAGE.read_text()
    blocks = re.findall(
        r"<!-- (\w+) table of scripts/bench scale-model(.*?) -->\n(.*?)\n<!-- end -->", page, flags=re.S
    )
    assert [which for which, *_ in blocks] == ["second", "first", "first", "first"]
    for which, flags, block in blocks:
        note, *costs, shards = printed(*flags.split()).strip().split("\n\n")
        assert "nothing here was measured" in note
        assert block == ("\n\n".join(costs) if which == "first" else shards)
    assert "**No run has confirmed any of it.**" in page.partition("a model that no run has confirmed")[2]
