"""What makes a step benchmark credible: its baseline, its turns, its figures."""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from script_modules import BENCHMARKS, importable
from torch import nn


@pytest.fixture
def load():
    with importable(BENCHMARKS) as load:
        yield load


def plan(step, **changes):
    given = {
        "model": "tiny", "batch": 2, "steps": 4, "rounds": 2, "backends": ["auto"], "compile": "model", "mvue": False,
        "fp8": True, "optimizer": "fused", "device": "cpu", "csv": None, "seconds": math.inf,
    }  # fmt: skip
    return step.Plan(**{**given, **changes})


@pytest.mark.parametrize(("name", "millions"), [("124M", 124), ("350M", 360), ("1.3B", 1336)])
def test_sizes_suit_sparse_tensor_cores_and_are_what_they_are_called(load, name: str, millions: int) -> None:
    trainee = load("trainee")
    size = trainee.SIZES[name]
    assert size.hidden % 128 == size.width % 128 == 0
    with torch.device("meta"):
        model = trainee.GPT(size.vocabulary, size.width, size.depth, size.heads, size.context, hidden=size.hidden)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == millions
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    assert size.weights == linear
    queries = size.context * (size.context - 1) / 2  # pairs of positions below the diagonal, of one sequence
    attention = 3 * 2 * 2 * queries * size.width * size.depth  # two products, forward and twice backward
    expected = 6 * size.context * linear + attention
    assert size.flops(1) == pytest.approx(expected, rel=1e-3)
    assert size.flops(7) == 7 * size.flops(1)


def test_compiled_sparse_comes_first_and_eager_last(load) -> None:
    step = load("step")
    baseline, others = step.variants(plan(step, backends=["auto", "cusparselt"]))
    assert (baseline.kind, baseline.compiled) == ("dense", "model")
    assert [one.name for one in others] == [
        "sparse auto, compiled model", "sparse cusparselt, compiled model", "fp8 dense, compiled model",
        "sparse auto, eager", "sparse cusparselt, eager", "dense, eager",
    ]  # fmt: skip
    assert load("command_line").command_line().parse_args(["step"]).compile == "model"


@pytest.mark.parametrize("kind", ["dense", "fp8 dense", "sparse"])
def test_both_sides_have_a_fused_optimizer_equal_batches_and_the_loss_in_the_graph(
    load, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    trainee = load("trainee")
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    variant = trainee.Variant(kind, "masked" if kind == "sparse" else "", compiled="model")
    one = trainee.Trainee(trainee.SIZES["tiny"], 2, variant, "cpu", 10, "fused")
    assert type(one.optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in one.optimizer.param_groups)
    assert compiled == [one.loss]
    tokens = next(one.batches)
    assert tokens.shape == (2, 33)
    logits = one.loss.model(tokens[:, :-1])
    assert torch.equal(one.loss(tokens), F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    other = trainee.Trainee(trainee.SIZES["tiny"], 2, trainee.Variant("dense", compiled="none"), "cpu", 10, "fused")
    next(other.batches)
    assert torch.equal(next(one.batches), next(other.batches))
    kinds = {type(layer).__name__ for layer in one.loss.model.blocks.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {{"dense": "Linear", "fp8 dense": "Float8Linear", "sparse": "SparseLinear"}[kind]}


class Turns:
    """Stands for a model: every step takes as long as the test says, and is noted."""

    steps: list[str]
    milliseconds_of: dict[str, float]

    def __init__(self, size, batch, variant, device, steps, optimizer) -> None:
        self.variant, self.milliseconds = variant, []
        self.last_loss = torch.tensor(1.0)
        self.clock = type("Clock", (), {"shares": staticmethod(dict)})

    def step(self) -> None:
        pass

    def round(self, steps: int) -> None:
        Turns.steps.append(self.variant.kind)
        found = [Turns.milliseconds_of[self.variant.kind]] * steps
        self.milliseconds += found
        return found

    def products(self) -> dict[str, int]:
        return {}


def test_variants_take_turns_with_the_baseline_and_are_compared_with_those_turns(
    load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = load("step")
    monkeypatch.setattr(step, "Trainee", Turns)
    monkeypatch.setattr(step, "variants", lambda plan: (
        step.Variant("dense", compiled="none"), [step.Variant("sparse", "auto", compiled="none")]
    ))  # fmt: skip
    Turns.steps, Turns.milliseconds_of = [], {"dense": 12.0, "sparse": 10.0}
    path = tmp_path / "step.csv"
    given = plan(step, csv=path, rounds=3, steps=6, peak_tflops=0.01)
    assert step.run(given) == 0
    assert Turns.steps == ["dense", "dense", "sparse", "dense", "sparse", "dense", "sparse"]
    rows = list(csv.DictReader(path.open()))
    found = {(row["kernel_provider"], row["metric_name"]): float(row["y_value_50"]) for row in rows}
    assert found["sparse auto, eager", "ratio to baseline"] == pytest.approx(1.2)
    assert found["sparse auto, eager", "baseline step time"] == 12.0
    flops = load("trainee").SIZES["tiny"].flops(2)
    assert found["dense, eager", "model FLOP utilisation"] == pytest.approx(flops / 12e-3 / 1e10, rel=1e-4)
    printed = capsys.readouterr().out
    share = flops / 12e-3 / 1e10
    assert f"model FLOP utilisation {share:.1%} of 0.01 TFLOP/s (--peak-tflops)" in printed
    assert ("a weak baseline" in printed) is (share < 0.45)


@pytest.mark.parametrize(("share", "weak"), [(0.44, True), (0.46, False)])
def test_a_weak_baseline_is_called_one(load, share: float, weak: bool) -> None:
    step = load("step")
    given = plan(step, peak_tflops=100.0)
    milliseconds = 1e3 * load("trainee").SIZES["tiny"].flops(2) / (share * 100e12)
    text = step.verdict(given, milliseconds)
    assert f"{share:.1%}" in text
    assert ("weak baseline, below 45%" in text) is weak


def test_a_variant_without_room_beside_the_baseline_runs_alone(load, monkeypatch: pytest.MonkeyPatch) -> None:
    step = load("step")
    comparison = None

    class Large(Turns):
        def __init__(self, size, batch, variant, *others) -> None:
            if variant.kind == "sparse" and comparison.baseline is not None:
                raise torch.OutOfMemoryError("no room")
            super().__init__(size, batch, variant, *others)

    monkeypatch.setattr(step, "Trainee", Large)
    Turns.steps, Turns.milliseconds_of = [], {"dense": 12.0, "sparse": 10.0, "fp8 dense": 8.0}
    comparison = step.Comparison(plan(step, compile="none"))
    comparison.run()
    by_name = {variant.name: result for variant, result in comparison.results.items()}
    alone = by_name["sparse auto, eager"]
    assert alone.note == "not in turn with the baseline"
    assert alone.ratio == pytest.approx(1.2)
    assert by_name["fp8 dense, eager"].ratio == pytest.approx(1.5)
    assert by_name["fp8 dense, eager"].note == "not in turn with the baseline"


def test_an_interrupt_leaves_the_table_and_the_rows(
    load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    step = load("step")

    class Interrupted(Turns):
        def round(self, steps: int):
            if self.variant.kind == "fp8 dense":
                raise KeyboardInterrupt
            return super().round(steps)

    monkeypatch.setattr(step, "Trainee", Interrupted)
    Turns.steps, Turns.milliseconds_of = [], {"dense": 12.0, "sparse": 10.0}
    with pytest.raises(KeyboardInterrupt):
        step.run(plan(step, csv=tmp_path / "step.csv", compile="none"))
    assert "1.200" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "step.csv").open()))
    assert {row["kernel_provider"] for row in rows} == {"dense, eager", "sparse auto, eager"}


def rounded(matrix: torch.Tensor, largest: float, mantissa: int, smallest: int) -> torch.Tensor:
    """A matrix as 8-bit floats with a scale of its own hold it, in float64: by the definition of the format."""
    scale = matrix.abs().max().float().double() / largest
    scaled = matrix.double() / scale
    exponent = scaled.abs().clamp(min=2.0**smallest).log2().floor()
    step = 2.0 ** (exponent - mantissa)
    return (scaled / step).round() * step * scale


@pytest.mark.parametrize("bias", [True, False])
def test_eight_bit_layers_compute_all_three_products_of_rounded_numbers(load, bias: bool) -> None:
    float8 = load("float8")
    if float8.why_not(torch.device("cpu")) is not None:
        pytest.skip(float8.why_not(torch.device("cpu")))
    layer = nn.Linear(48, 32, bias=bias)
    weight = layer.weight.detach().clone()
    assert float8.convert_(nn.Sequential(layer, nn.Linear(12, 32))) == 1
    x = torch.randn(2, 8, 48, requires_grad=True)
    dy = torch.randn(2, 8, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy)
    e4m3, e5m2 = (448.0, 3, -6), (57344.0, 2, -14)
    rows = rounded(x.detach().bfloat16().flatten(0, 1), *e4m3)
    gradient = rounded(dy.flatten(0, 1), *e5m2)
    right = rounded(weight, *e4m3)
    wanted = {
        "output": (rows @ right.t() + (layer.bias.detach().bfloat16().double() if bias else 0), y.flatten(0, 1)),
        "dx": (gradient @ right, x.grad.flatten(0, 1)),
        "dw": (gradient.t() @ rows, layer.weight.grad),
    }
    for name, (expected, found) in wanted.items():
        assert float((found.detach().double() - expected).norm() / expected.norm()) < 4e-3, name  # bfloat16 results
    assert torch.equal(layer.weight, weight)


def test_the_optimizer_of_sparse_layers_is_an_option(load) -> None:
    options = load("command_line").command_line().parse_args(["step", "--optimizer", "sparse"])
    assert options.optimizer == "sparse"
    trainee = load("trainee")
    dense = trainee.Trainee(trainee.SIZES["tiny"], 1, trainee.Variant("dense", compiled="none"), "cpu", 5, "sparse")
    assert type(dense.optimizer) is torch.optim.AdamW
