"""The parts of ``scripts/benchmarks`` that a machine without a GPU would not run otherwise."""

import csv
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_modules import BENCHMARKS, importable
from simulated_backend import SimulatedBackend
from torch import nn


@pytest.fixture
def load():
    with importable(BENCHMARKS) as load:
        yield load


class FakeEvents:
    """Stands for CUDA events: remembers the lead it was asked for, and takes one millisecond a call."""

    def __init__(self) -> None:
        self.cycles: list[int] = []

    def __call__(self, call, cycles: int):
        self.cycles.append(cycles)
        call()
        return self, self

    def elapsed_time(self, other: "FakeEvents") -> float:
        return 1.0


def point_and_grid(grid: ModuleType, tokens: int = 64, repeats: int = 2):
    shape = (64, 128)
    return grid.Point(tokens, shape, torch.bfloat16), grid.Grid([tokens], [shape], [torch.bfloat16], repeats, "cpu")


def test_wrong_algorithms_are_reported_and_not_timed(load, capsys: pytest.CaptureFixture[str]) -> None:
    gemm, grid = load("gemm"), load("grid")
    closed = SimulatedBackend()
    closed.refusal = "there is no such library."
    ways = {
        "one": SimulatedBackend(algorithms=("0", "wrong", "flaky", "broken", "1")),
        "two": SimulatedBackend(algorithms=("wrong", "7")),
        "three": SimulatedBackend(),
        "closed": closed,
    }
    (comparison,) = gemm.measure(*point_and_grid(grid), ways)
    timed = {provider.name: provider.algorithm for provider in comparison.providers}
    best = timed.pop("one best")
    assert best in ("0", "1")
    # the default of "two" is wrong, and "three" has one algorithm
    assert timed == {"dense": "", "masked": "", "one": "0", "two best": "7", "three": "0"}
    assert all(len(provider.device_ms) == 2 for provider in comparison.providers)
    printed = capsys.readouterr().out
    assert "one, 64x128 bfloat16, 64 tokens: flaky not timed: a repetition gives other bits" in printed
    assert "one, 64x128 bfloat16, 64 tokens: broken not timed: operation not supported" in printed
    assert "closed does not run here: there is no such library." in printed
    assert printed.count("wrong not timed: ") == 2
    rows = load("comparison").rows("gemm", [comparison], 64, "64x128 bfloat16", "cpu")
    ids = {row["kernel_provider"]: row["y_value_50"] for row in rows if row["metric_name"] == "algorithm"}
    assert ids == {"one": 0, "one best": int(best), "two best": 7, "three": 0}


def test_every_provider_of_a_product_gives_the_same_numbers(load) -> None:
    gemm, grid = load("gemm"), load("grid")
    (comparison,) = gemm.measure(*point_and_grid(grid), {"one": SimulatedBackend()})
    dense, masked, sparse = (provider.calls[0]() for provider in comparison.providers)
    assert torch.equal(masked, sparse)
    assert not torch.equal(dense, masked)


@pytest.mark.parametrize(("what", "factor"), [("output", 1.1), ("gradient of the rows", -1)])
def test_a_layer_with_wrong_numbers_is_found(load, what: str, factor: float) -> None:
    linear = load("linear")
    sparse = linear._sparse(nn.Linear(128, 64, bias=False), "masked")
    layer = linear.Layer(sparse, torch.randn(64, 128).bfloat16(), torch.randn(64, 64).bfloat16())
    assert linear.find_mismatch(layer) is None
    if what == "output":
        sparse.register_forward_hook(lambda module, inputs, output: output * factor)
    else:
        layer._output = None
        layer.rows.register_hook(lambda gradient: gradient * factor)
    assert f"its {what} is wrong by" in linear.find_mismatch(layer)


def test_a_step_writes_the_weight_and_accumulates_micro_batches(load) -> None:
    linear = load("linear")
    dense = nn.Linear(128, 64, bias=False)
    rows, gradient = torch.randn(64, 128).bfloat16(), torch.randn(64, 64).bfloat16()
    layer = linear.Layer(dense, rows, gradient)
    before, version = dense.weight.detach().clone(), dense.weight._version
    layer.step(3)
    layer.step(3)
    assert dense.weight._version == version + 2
    assert torch.equal(dense.weight, before)
    expected = 3 * gradient.float().t() @ rows.float()
    assert float((dense.weight.grad - expected).norm() / expected.norm()) < 1e-2


def test_turns_are_taken_one_by_one(load) -> None:
    comparison, calls = load("comparison"), []
    providers = [comparison.Provider(name, [lambda name=name: calls.append(name)]) for name in "ab"]
    comparison.take_turns(comparison.Comparison("forward", 1.0, providers), 3, "cpu")
    assert calls == ["a", "b"] * 4  # the first two warm up
    assert all(len(provider.device_ms) == 3 and not provider.host_ms for provider in providers)


def test_on_a_gpu_the_host_runs_ahead_and_no_turn_finds_its_inputs_in_the_cache(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, events, calls = load("comparison"), FakeEvents(), []
    monkeypatch.setattr(comparison, "events_around", events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    slow = [lambda number=number: (calls.append(number), time.sleep(2e-3)) for number in range(3)]
    fast = [lambda number=number: calls.append(number) for number in range(3)]
    providers = [comparison.Provider("slow", slow), comparison.Provider("fast", fast)]
    comparison.take_turns(comparison.Comparison("forward", 1.0, providers), 5, "cuda")
    assert min(events.cycles[::2]) >= 2 * 2 * 2_000_000  # twice the host's 2 ms, at 2 GHz
    assert set(events.cycles[1::2]) == {200_000}
    waits = [place for place, call in enumerate(calls) if call == "wait"]
    timed = calls[waits[1] + 1 : waits[2]]
    assert len(timed) == 10
    assert all(after == (before + 1) % 3 for before, after in pairwise(timed))
    assert [len(provider.device_ms) for provider in providers] == [5, 5]
    assert min(providers[0].host_ms) >= 2.0
    assert all(20 <= len(provider.host_ms) <= 200 for provider in providers)


def test_inputs_are_several_times_the_cache(load, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load("comparison")
    cache = type("Properties", (), {"L2_cache_size": 60 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cache)
    for size in (4 << 20, 50 << 20, 1 << 30):
        assert comparison.set_count(size, "cuda") >= 2
        assert comparison.set_count(size, "cuda") * size >= 3 * cache.L2_cache_size
    assert comparison.set_count(1, "cuda") == 64
    assert comparison.set_count(1, "cpu") == 1


def synthetic_rows(fields: tuple[str, ...], device: str = "some GPU"):
    facts = {"device": device, "driver": "1.2", "torch_version": "9.9", "triton_version": "8.8",
             "sparsetrain_version": "7.7", "commit": "abcdef0"}  # fmt: skip
    for run, factor in (("2000-01-01T00:00:00", 10.0), ("2000-01-02T00:00:00", 1.0)):
        for shape in ("64x64", "64x128", "128x64", "256x64"):
            for tokens in (64, 128, 256):
                for provider, share in (("dense", 1.0), ("one", 0.5), ("two", 1.25)):
                    ms = factor * tokens * share
                    yield dict.fromkeys(fields, "") | facts | {
                        "kernel_name": f"gemm forward {shape} bfloat16", "kernel_provider": provider,
                        "metric_name": "device time", "x_value": tokens, "timestamp": run,
                        "y_value_20": 0.8 * ms, "y_value_50": ms, "y_value_80": 2 * ms,
                    }  # fmt: skip


def write(path: Path, fields: tuple[str, ...], *devices: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for device in devices:
            writer.writerows(synthetic_rows(fields, device))
    return path


def test_the_figure_shows_ratios_of_the_last_run(load, tmp_path: Path) -> None:
    figure, fields = load("figure"), load("measure").FIELDS
    path = write(tmp_path / "made_up.csv", fields, "some GPU")
    out = tmp_path / "folder" / "figure.png"
    assert figure.run(path, out, "gemm forward", "bfloat16") == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(path.open()))
    panels = figure.panels_of(rows)
    assert list(panels) == ["64x64", "64x128", "128x64", "256x64"]
    ratio = panels["64x128"]["one"][128]
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.0, 2.0, 2.5))
    assert panels["64x128"]["two"][128].median == pytest.approx(0.8)
    text = figure.caption(rows)
    assert text == ("some GPU, driver 1.2, torch 9.9, triton 8.8, sparsetrain 7.7 (abcdef0), 2000-01-01 / 2000-01-02")
    drawn = figure.draw(panels, "gemm forward", "bfloat16", text)
    assert [ax.get_title() for ax in drawn.axes] == [f"weight {shape.replace('x', ' × ')}" for shape in panels]
    lines = {line.get_label(): line.get_ydata() for line in drawn.axes[0].lines}
    assert set(lines) == {"dense", "one", "two"}
    assert list(lines["dense"]) == [1, 1]
    assert list(lines["one"]) == pytest.approx([2.0] * 3)


@pytest.mark.parametrize(
    ("devices", "dtype", "sentence"),
    [
        (("some GPU", "another"), "bfloat16", "has rows of several devices (another, some GPU)"),
        (("some GPU",), "float16", "has no times of 'gemm forward' in float16"),
    ],
)
def test_a_figure_that_would_mislead_is_refused(load, tmp_path: Path, capsys, devices, dtype, sentence) -> None:
    figure, fields = load("figure"), load("measure").FIELDS
    path = write(tmp_path / "made_up.csv", fields, *devices)
    assert figure.run(path, tmp_path / "figure.png", "gemm forward", dtype) == 2
    assert sentence in capsys.readouterr().out
    assert not (tmp_path / "figure.png").exists()


def test_the_host_benchmark_compares_layers_steps_and_masked_products(load, monkeypatch, tmp_path: Path) -> None:
    host = load("host")
    monkeypatch.setattr(host, "LAYERS", 5)
    monkeypatch.setattr(host, "MASKED", (16, 16, 4))
    state = lambda: (  # noqa: E731
        dict(host.BACKENDS), dict(host.NOW), dict(host.PACK_NOW), dict(host.pack_tiles_._backend_fns),
        [kind.run for kind in host.KERNELS],
    )  # fmt: skip
    before = state()
    assert host.run(2, tmp_path / "host.csv") == 0
    assert state() == before
    with (tmp_path / "host.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["x_value"].split(",")[0] for row in rows[::4]] == [
        "layer forward", "layer forward and backward", *["step of 5 layers"] * 3, *["masked 16x16"] * 2,
    ]  # fmt: skip
    assert [row["kernel_provider"] for row in rows[:4]] == ["sparse", "dense", "sparse over dense", "sparse to dense"]
    for mine, theirs, over, ratio in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True):
        assert float(mine["y_value_50"]) > 0
        assert float(theirs["y_value_50"]) > 0
        assert (over["metric_unit"], ratio["metric_unit"]) == ("us", "x")


def test_pairs_are_taken_in_turn(load) -> None:
    host = load("host")
    order: list[str] = []
    pair = host.taken_in_turn("x", lambda: order.append("sparse"), lambda: order.append("dense"), 2, "", calls=2)
    assert order == ["sparse", "dense"] * 3 + ["dense"] * 2 + ["sparse"] * 4 + ["dense"] * 2
    assert (len(pair.sparse), len(pair.over), len(pair.ratio)) == (2, 2, 2)
