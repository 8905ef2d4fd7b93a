"""Train the three runs and report: ``python -m sparsetrain.recipes.demo --help``."""

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.hardware.extras import require
from sparsetrain.methods import Method, asp_one_shot, recommended
from sparsetrain.methods.schedule import Phase, Schedule

from ..data import TextDataModule
from ..gpt import GPTModule
from ..history import History
from .progress import TrainingBar
from .report import Result, print_table, write_plot, write_report

METHODS = {
    "dense": Method(name="dense", schedule=Schedule((Phase("dense"),))),
    "sparse from scratch": recommended(),
    "dense → prune → retrain": asp_one_shot(prune_at=0.5),
}


def main() -> int:
    """Run the demo and return the exit code."""
    options = _options()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    data = TextDataModule(
        context=options.context, batch_size=16, validation_blocks=512, max_bytes=8_000_000, seed=options.seed
    )
    results = []
    for number, (name, method) in enumerate(METHODS.items(), start=1):
        print(f"[{number}/{len(METHODS)}] {name}: {options.steps} steps", file=sys.stderr)
        results.append(_train(name, method, data, options, output))
    print_table(results)
    write_plot(results, output / "curves.png")
    write_report(results, output / "report.md", "scripts/demo " + " ".join(sys.argv[1:]), options.steps)
    print(f"wrote {output}/report.md, curves.png, checkpoints and the logs of every run")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Train one small byte-level GPT three ways on Python source code: dense; sparse from scratch; "
        "dense, pruned once, retrained. Uses a GPU if there is one.",
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="bytes of a block (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--output", default="runs/demo", help="folder for everything written (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}: the schedules need at least 20.")
    return options


def _train(name: str, method: Method, data: TextDataModule, options: argparse.Namespace, output: Path) -> Result:
    seed_everything(options.seed, verbose=False)
    slug = method.name
    model = GPTModule(width=options.width, depth=options.depth, context=options.context)
    callback = SparseTrainingCallback(method, targets="mlp")
    history = History()
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        devices=1,
        logger=_loggers(slug, output),
        callbacks=[callback, history, TrainingBar(refresh_rate=10)],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        val_check_interval=max(1, options.steps // 6),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (final,) = trainer.validate(model, data, verbose=False)
    trainer.save_checkpoint(output / f"{slug}.ckpt")
    for logger in trainer.loggers:
        logger.finalize("success")
    _finish_wandb()
    assert callback.training is not None
    ending = callback.training.ending
    assert ending is not None
    print(f"{name}: {ending}", file=sys.stderr)
    return Result(
        name, float(final["val/loss"]), seconds, history, int(callback.training.metrics()["violations"]), ending.what
    )


def _loggers(slug: str, output: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(output, name="csv", version=slug)]
    try:
        require("wandb", "wandb", "the offline Weights & Biases run")
    except ImportError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return loggers
    from lightning.pytorch.loggers import WandbLogger

    loggers.append(WandbLogger(project="sparsetrain-demo", name=slug, save_dir=output, offline=True))
    return loggers


def _finish_wandb() -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


if __name__ == "__main__":
    sys.exit(main())
