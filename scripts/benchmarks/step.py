"""Whole training steps of a GPT in a Lightning ``Trainer``: dense, and with ``SparseTrainingCallback``."""

import gc
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from grid import first_line
from lightning.pytorch import Callback, Trainer
from measure import append_csv, quantile_cells, quantiles
from recorder import Recorder
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.dispatch import describe_environment
from sparsetrain.recipes.gpt import GPTModule

REFRESH_EVERY = 40
BATCHES = 8  # different ones, in turn


@dataclass(frozen=True)
class Size:
    """A GPT, and the sequences of a step."""

    width: int
    depth: int
    heads: int
    vocabulary: int = 50304
    context: int = 1024
    batch: int = 16


SIZES = {
    "124M": Size(768, 12, 12),
    "1.3B": Size(2048, 24, 16, batch=8),
    "tiny": Size(64, 2, 2, vocabulary=256, context=32, batch=4),
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and how; nothing is begun after ``seconds``."""

    model: str
    batch: int
    steps: int
    backends: Sequence[str]
    compile: str
    mvue: bool
    device: str
    csv: Path | None
    seconds: float

    @property
    def warmup(self) -> int:
        """Steps before the clock starts."""
        return max(1, self.steps // 5)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * SIZES[self.model].context


@dataclass(frozen=True)
class Variant:
    """Dense without a backend; else sparse, its products by that backend."""

    backend: str = ""
    mvue: bool = False
    compiled: str = "none"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is sparse."""
        return not self.backend

    @property
    def name(self) -> str:
        """As in the table and the CSV."""
        kind = "dense" if self.is_dense else f"sparse {self.backend}"
        words = [kind, "mvue" if self.mvue else "", "" if self.compiled == "none" else f"compiled {self.compiled}"]
        return ", ".join(word for word in words if word)


@dataclass
class Result:
    """Milliseconds of every timed step, and what else was seen."""

    milliseconds: list[float]
    memory: float | None  # peak after the warm-up, MiB
    loss: float
    shares: dict[str, float]  # of the time, by what it was spent in
    products: dict[str, int]  # layers, by who computed their products

    @property
    def mean(self) -> float:
        """Milliseconds a step with refreshes in it, which the median leaves out."""
        return sum(self.milliseconds) / len(self.milliseconds)


class RandomTokens(IterableDataset[Tensor]):
    """Batches of random tokens ``[batch, context + 1]`` that are already where they are needed, in turn for ever."""

    def __init__(self, size: Size, batch: int, device: str) -> None:
        shape = (BATCHES, batch, size.context + 1)
        self.batches = torch.randint(size.vocabulary, shape, device=device)

    def __iter__(self) -> Iterator[Tensor]:
        """Begin with the first."""
        while True:
            yield from self.batches


def run(plan: Plan) -> int:
    """Train every variant for some steps, print and store the table; returns 1 unless one dense and one sparse did."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        if plan.model != "tiny":
            print(f"step --model {plan.model} needs a CUDA device and there is none here: --model tiny runs on a CPU.")
            return 2
        plan = replace(plan, device="cpu")
    if plan.steps < 3:
        print(f"--steps is {plan.steps}: it must be at least 3, because the first fifth is not timed.")
        return 2
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of Lightning, about workers and loggers that are not wanted here
    print(describe_environment(torch.device(plan.device)), flush=True)
    start, results = time.monotonic(), {}
    for variant in variants(plan):
        if time.monotonic() - start > plan.seconds:
            print(f"{variant.name}: not measured, the {plan.seconds:.0f} s are over", flush=True)
            continue
        try:
            results[variant] = train(plan, variant)
        except Exception as error:  # compilers and backends raise what they like; the others still count
            print(f"{variant.name}: fails with {type(error).__name__}: {first_line(error)}", flush=True)
            continue
        finally:
            _clean_up(plan.device)
        print(f"{variant.name}: {quantiles(results[variant].milliseconds)[1]:.2f} ms a step", flush=True)
        if plan.csv is not None:
            append_csv(plan.csv, rows(plan, variant, results[variant]), plan.device)
    if results:
        show(plan, results)
    return int({variant.is_dense for variant in results} != {True, False})


def variants(plan: Plan) -> list[Variant]:
    """Return what is trained: everything as it is first, then compiled."""
    kinds = [Variant()] + [Variant(backend) for backend in plan.backends]
    if plan.mvue:
        kinds += [Variant(backend, mvue=True) for backend in plan.backends]
    compiled = [Variant(kind.backend, kind.mvue, plan.compile) for kind in kinds] if plan.compile != "none" else []
    return kinds + compiled


def train(plan: Plan, variant: Variant) -> Result:
    """Train one variant and return what was seen.

    Raises:
        RuntimeError: If the loss is not finite, or it ends before the last step.
    """
    size = SIZES[plan.model]
    torch.manual_seed(0)
    module = GPTModule(size.vocabulary, size.width, size.depth, size.heads, size.context)
    # Lightning's log refuses a compiled LightningModule, so its inner model is compiled, or the blocks of that
    parts = {"none": [], "model": [module.model], "blocks": list(module.model.blocks)}[variant.compiled]
    for part in parts:
        part.compile()
    callbacks: list[Callback] = []
    if not variant.is_dense:
        # without the preset's dense tail: every timed step is sparse
        method = {"preset": "fst", "refresh_every": REFRESH_EVERY, "dense_tail": 0, "mvue": variant.mvue}
        callbacks.append(SparseTrainingCallback(method, backend=variant.backend))
    recorder = Recorder(plan.warmup, plan.device)
    trainer = Trainer(
        accelerator="gpu" if plan.device == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_steps=plan.steps,
        max_epochs=-1, callbacks=[*callbacks, recorder], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(RandomTokens(size, plan.batch, plan.device), batch_size=None))
    loss = float(trainer.callback_metrics["train/loss"])
    if trainer.global_step != plan.steps or not loss < float("inf"):
        raise RuntimeError(f"training ended at step {trainer.global_step} of {plan.steps} with loss {loss}")
    return Result(recorder.milliseconds(), recorder.peak_megabytes(), loss, recorder.shares(), recorder.products)


def show(plan: Plan, results: dict[Variant, Result]) -> None:
    """Print the table."""
    size = SIZES[plan.model]
    medians = {variant: quantiles(result.milliseconds)[1] for variant, result in results.items()}
    best = min((ms for variant, ms in medians.items() if variant.is_dense), default=None)
    table = Table(
        "variant", "ms a step (20 %)", "median", "(80 %)", "mean", "tokens/s", "peak MiB", "refresh", "repack", "loss",
        "ratio to best dense",
        title=f"GPT {plan.model}: {plan.batch} sequences of {size.context} tokens, bf16-mixed, masks searched every "
        f"{REFRESH_EVERY} steps, {plan.steps - plan.warmup} steps after {plan.warmup}; ratio: dense time / time",
    )  # fmt: skip
    for variant, result in results.items():
        low, median, high = quantiles(result.milliseconds)
        shares = [f"{result.shares[name]:.1%}" if name in result.shares else "-" for name in ("refresh", "repack")]
        times = [f"{ms:.2f}" for ms in (low, median, high, result.mean)]
        memory = "-" if result.memory is None else f"{result.memory:,.0f}"
        ratio = "-" if best is None else f"{best / median:.3f}"
        speed = f"{1e3 * plan.tokens / median:,.0f}"
        table.add_row(variant.name, *times, speed, memory, *shares, f"{result.loss:.3f}", ratio)
    Console(width=150).print(table)
    for variant, result in results.items():
        for products, layers in result.products.items():
            print(f"{variant.name}: {layers} layers: {products}")


def rows(plan: Plan, variant: Variant, result: Result) -> list[dict[str, object]]:
    """Return the CSV rows of a variant."""
    size = SIZES[plan.model]
    common = {"kernel_name": f"training step of GPT {plan.model}", "kernel_provider": variant.name,
              "x_name": "batch x sequence", "x_value": f"{plan.batch}x{size.context}"}  # fmt: skip
    speeds = [1e3 * plan.tokens / ms for ms in result.milliseconds]
    metrics = [("step time", "ms", result.milliseconds), ("mean step time", "ms", [result.mean]),
               ("speed", "tokens/s", speeds)]  # fmt: skip
    if result.memory is not None:
        metrics.append(("peak memory", "MiB", [result.memory]))
    metrics += [(f"share of {name}", "", [share]) for name, share in result.shares.items()]
    return [
        {**common, "metric_name": metric, "metric_unit": unit, **quantile_cells(values)}
        for metric, unit, values in metrics
    ]


def _clean_up(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
