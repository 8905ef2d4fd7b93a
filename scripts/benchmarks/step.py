"""Whole training steps of a GPT: sparse ones in turn with a dense baseline that is compiled as a whole."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sparsetrain.dispatch import DeviceFaultError, describe_environment

from . import float8
from .grid import FAULTED, first_line
from .measure import append_csv, quantile_cells, quantiles
from .peaks import find
from .trainee import REFRESH_EVERY, SIZES, Trainee, Variant

ALONE = "not in turn with the baseline"
WEAK = 0.45  # of the peak: a dense baseline below it is no strong opponent


@dataclass(frozen=True)
class Plan:
    """What is trained, and how; nothing is begun after ``seconds``."""

    model: str
    batch: int
    steps: int
    rounds: int
    backends: Sequence[str]
    compile: str
    mvue: bool
    fp8: bool
    optimizer: str
    device: str
    csv: Path | None
    seconds: float
    peak_tflops: float | None = None

    @property
    def warmup(self) -> int:
        """Steps before the clock starts: they compile, tune and learn layouts."""
        return max(3, self.steps // 10)

    @property
    def steps_of_a_round(self) -> int:
        """Timed steps of one turn; one more before them is not."""
        return max(1, self.steps // self.rounds)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * SIZES[self.model].context


@dataclass
class Result:
    """What was seen of a variant; ``against`` are the baseline's steps of the same rounds."""

    milliseconds: list[float]
    against: list[float]
    memory: float | None = None  # peak of its own, MiB
    loss: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)  # of the time, by what it was spent in
    products: dict[str, int] = field(default_factory=dict)  # layers, by the backend of their products
    note: str = ""

    @property
    def mean(self) -> float:
        """Milliseconds a step with refreshes in it, which the median leaves out."""
        return sum(self.milliseconds) / len(self.milliseconds)

    @property
    def ratio(self) -> float:
        """How many times as fast as the baseline, by medians."""
        return quantiles(self.against)[1] / quantiles(self.milliseconds)[1]


def run(plan: Plan) -> int:
    """Train every variant for some steps, print and store the table; returns 1 unless one dense and one sparse did."""
    if plan.rounds > plan.steps:
        print(f"--rounds is {plan.rounds}: it must be at most --steps, {plan.steps}, for every turn times a step.")
        return 2
    print(describe_environment(torch.device(plan.device)), flush=True)
    comparison = Comparison(plan)
    try:
        comparison.run()
    except DeviceFaultError as error:
        print(error, flush=True)
        return FAULTED
    finally:  # an interrupt too leaves the table of what was measured
        comparison.store_baseline()
        if comparison.results:
            show(plan, comparison.results)
    return int({variant.is_dense for variant in comparison.results} != {True, False})


def variants(plan: Plan) -> tuple[Variant, list[Variant]]:
    """Return the baseline, and what is compared with it: compiled sparse ones first, eager ones last."""
    sparse = [Variant("sparse", backend, compiled=plan.compile) for backend in plan.backends]
    if plan.mvue:
        sparse += [replace(variant, mvue=True) for variant in sparse]
    fp8 = [Variant("fp8 dense", compiled=plan.compile)] if plan.fp8 else []
    eager = [] if plan.compile == "none" else [replace(variant, compiled="none") for variant in sparse]
    eager_dense = [] if plan.compile == "none" else [Variant("dense", compiled="none")]
    return Variant("dense", compiled=plan.compile), [*sparse, *fp8, *eager, *eager_dense]


class Comparison:
    """A baseline that stays on the device, and variants that take turns with it, one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.results: dict[Variant, Result] = {}
        self.baseline: Trainee | None = None
        self._start = time.monotonic()

    def run(self) -> None:
        """Train the baseline and everything that there is time for."""
        first, others = variants(self.plan)
        self._attempt(first, self._train_baseline)
        for variant in others:
            if time.monotonic() - self._start > self.plan.seconds:
                print(f"{variant.name}: not measured, the {self.plan.seconds:.0f} s are over", flush=True)
                continue
            reason = float8.why_not(torch.device(self.plan.device)) if variant.kind == "fp8 dense" else None
            if reason is not None:
                print(f"{variant.name}: not measured, {reason}", flush=True)
                continue
            self._attempt(variant, self._train)

    def store_baseline(self) -> None:
        """Append the baseline's rows, with the steps of all turns."""
        first, _ = variants(self.plan)
        if self.plan.csv is not None and first in self.results:
            append_csv(self.plan.csv, rows(self.plan, first, self.results[first]), self.plan.device)

    def _attempt(self, variant: Variant, train: Callable[[Variant], Result]) -> None:
        try:
            result = train(variant)
        except DeviceFaultError:
            raise
        except Exception as error:  # compilers and backends raise what they like; the others still count
            print(f"{variant.name}: fails with {type(error).__name__}: {first_line(error)}", flush=True)
            return
        finally:
            _clean_up(self.plan.device)
        self.results[variant] = result
        print(f"{variant.name}: {quantiles(result.milliseconds)[1]:.2f} ms a step", flush=True)
        if self.plan.csv is not None and variant != variants(self.plan)[0]:  # the baseline goes on
            append_csv(self.plan.csv, rows(self.plan, variant, result), self.plan.device)

    def _train_baseline(self, variant: Variant) -> Result:
        self.baseline, memory = self._prepared(variant)
        times = self.baseline.round(self.plan.steps_of_a_round)
        return self._result(self.baseline, memory, times)

    def _train(self, variant: Variant) -> Result:
        try:
            return self._take_turns(variant)
        except torch.OutOfMemoryError:
            if self.baseline is None:
                raise
            print(f"{variant.name}: no room beside the baseline, so they do not take turns", flush=True)
        against, self.baseline = self.baseline.milliseconds, None
        _clean_up(self.plan.device)
        trainee, memory = self._prepared(variant)
        for _ in range(self.plan.rounds):
            trainee.round(self.plan.steps_of_a_round)
        return replace(self._result(trainee, memory, against), note=ALONE)

    def _take_turns(self, variant: Variant) -> Result:
        trainee, memory = self._prepared(variant)
        against: list[float] = []
        for _ in range(self.plan.rounds):
            if self.baseline is not None:
                against += self.baseline.round(self.plan.steps_of_a_round)
            trainee.round(self.plan.steps_of_a_round)
        if self.baseline is None:
            known = [result for one, result in self.results.items() if one == variants(self.plan)[0]]
            against = known[0].milliseconds if known else trainee.milliseconds
            return replace(self._result(trainee, memory, against), note=ALONE)
        return self._result(trainee, memory, against)

    def _prepared(self, variant: Variant) -> tuple[Trainee, float | None]:
        """Return a model after its warm-up, and the most memory (MiB) that this took."""
        plan, on_gpu = self.plan, self.plan.device == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        steps = plan.warmup + plan.rounds * (plan.steps_of_a_round + 1)
        trainee = Trainee(SIZES[plan.model], plan.batch, variant, plan.device, steps, plan.optimizer)
        for number in range(plan.warmup):
            if on_gpu and number == plan.warmup - 1:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()  # compiling and tuning take memory of their own
            trainee.step()
        if not on_gpu:
            return trainee, None
        torch.cuda.synchronize()
        return trainee, (torch.cuda.max_memory_allocated() - before) / 2**20

    def _result(self, trainee: Trainee, memory: float | None, against: list[float]) -> Result:
        loss = float(trainee.last_loss)
        if not loss < float("inf"):
            raise RuntimeError(f"the loss is {loss}: it must be finite.")
        return Result(trainee.milliseconds, against, memory, loss, trainee.clock.shares(), trainee.products())


def peak(plan: Plan) -> tuple[float, str] | None:
    """Return the TFLOP/s that utilisation is of, and where they come from; None if they are not known."""
    if plan.peak_tflops:
        return plan.peak_tflops, "--peak-tflops"
    gpu = find(torch.cuda.get_device_name()) if plan.device == "cuda" else None
    return (gpu.tflops, f"{gpu.name}, {gpu.source}") if gpu else None


def utilisation(plan: Plan, milliseconds: float) -> float | None:
    """Return the share of the peak at which a dense step of so many milliseconds computes; None if it is unknown."""
    known = peak(plan)
    return SIZES[plan.model].flops(plan.batch) / (milliseconds / 1e3) / (known[0] * 1e12) if known else None


def show(plan: Plan, results: dict[Variant, Result]) -> None:
    """Print the table, and how good the baseline is."""
    size = SIZES[plan.model]
    first, _ = variants(plan)
    table = Table(
        "variant",
        "ms a step (20 %)",
        "median",
        "(80 %)",
        "mean",
        "tokens/s",
        "peak MiB",
        "refresh",
        "repack",
        "loss",
        "ratio",
        title=f"GPT {plan.model}: {plan.batch} sequences of {size.context} tokens, bfloat16 autocast, fused AdamW, "
        f"masks searched every {REFRESH_EVERY} steps, {plan.rounds} turns of {plan.steps_of_a_round} steps; ratio: "
        "time of the baseline in the same turns / time",
    )
    for variant, result in results.items():
        low, median, high = quantiles(result.milliseconds)
        shares = [f"{result.shares[name]:.1%}" if name in result.shares else "-" for name in ("refresh", "repack")]
        times = [f"{ms:.2f}" for ms in (low, median, high, result.mean)]
        memory = "-" if result.memory is None else f"{result.memory:,.0f}"
        ratio = "baseline" if variant == first else f"{result.ratio:.3f}"
        speed = f"{1e3 * plan.tokens / median:,.0f}"
        table.add_row(variant.name, *times, speed, memory, *shares, f"{result.loss:.3f}", ratio)
    Console(width=160).print(table)
    for variant, result in results.items():
        for products, layers in result.products.items():
            print(f"{variant.name}: {layers} layers: {products}")
        if result.note:
            print(f"{variant.name}: {result.note}")
    if first in results:
        print(verdict(plan, quantiles(results[first].milliseconds)[1]))


def verdict(plan: Plan, milliseconds: float) -> str:
    """Say in one sentence what share of the device the dense baseline uses."""
    known, share = peak(plan), utilisation(plan, milliseconds)
    if known is None or share is None:
        return "dense baseline: the peak of this device is not known, so give --peak-tflops for its utilisation."
    weak = f": a weak baseline, below {WEAK:.0%}" if share < WEAK else ""
    return f"dense baseline: model FLOP utilisation {share:.1%} of {known[0]:g} TFLOP/s ({known[1]}){weak}"


def rows(plan: Plan, variant: Variant, result: Result) -> list[dict[str, object]]:
    """Return the CSV rows of a variant."""
    size = SIZES[plan.model]
    common = {
        "kernel_name": f"training step of GPT {plan.model}",
        "kernel_provider": variant.name,
        "x_name": "batch x sequence",
        "x_value": f"{plan.batch}x{size.context}",
    }
    speeds = [1e3 * plan.tokens / ms for ms in result.milliseconds]
    metrics = [
        ("step time", "ms", result.milliseconds),
        ("mean step time", "ms", [result.mean]),
        ("speed", "tokens/s", speeds),
    ]
    if result.memory is not None:
        metrics.append(("peak memory", "MiB", [result.memory]))
    metrics += [(f"share of {name}", "", [share]) for name, share in result.shares.items()]
    if variant == variants(plan)[0]:
        share = utilisation(plan, quantiles(result.milliseconds)[1])
        metrics += [("model FLOP utilisation", "", [share])] if share is not None else []
    else:
        metrics += [("baseline step time", "ms", result.against), ("ratio to baseline", "", [result.ratio])]
    return [
        {**common, "metric_name": metric, "metric_unit": unit, **quantile_cells(values)}
        for metric, unit, values in metrics
    ]


def _clean_up(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
