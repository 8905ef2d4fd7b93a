"""``sparsetrain prune``: prune a checkpoint or a recipe once, retrain it with the mask frozen, report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .arguments import Parser
from .checkpoint_files import read_checkpoint
from .recipe_files import find_recipe

EPILOG = """Further options go to LightningCLI: --trainer.max_steps, --data.source, --model.width, ...

examples:
  sparsetrain prune                                              the shipped recipe: dense, prune half-way, retrain
  sparsetrain prune --checkpoint dense.ckpt --steps 300          prune a trained model, retrain 300 steps
  sparsetrain prune --checkpoint dense.ckpt --pattern row_wise
"""


def prune(arguments: Sequence[str]) -> int:
    """Prune, retrain and report; writes ``pruned.ckpt`` and ``report.md`` into the output folder.

    Args:
        arguments: The command line after ``sparsetrain prune``.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    config = find_recipe(options.config)
    if options.checkpoint is None and options.pattern is not None:
        raise ValueError("--pattern goes with --checkpoint: without one, the recipe's own method decides.")
    weights = None if options.checkpoint is None else read_checkpoint(options.checkpoint, "checkpoint")["state_dict"]
    from sparsetrain.methods import asp_one_shot

    from ..history import History
    from .fit import run_cli

    output = Path(options.output)
    overrides = [f"--trainer.default_root_dir={output}", f"--trainer.max_steps={options.steps}"]
    arguments = ["--config", config, *(overrides if options.steps else overrides[:1]), *rest]
    cli = run_cli(arguments, run=False, words=[word.lstrip("-") for word in parser.words()])
    if (resumed := cli.config.get("ckpt_path")) is not None:
        raise ValueError(f"ckpt_path is {resumed!r}, which goes with fit: pass trained weights as --checkpoint.")
    trainer: Any = cli.trainer  # Lightning adds `callbacks` and others at run time
    model, data = cli.model, cli.datamodule
    callback = _sparse_callback(trainer, config)
    history = History()
    trainer.callbacks.insert(trainer.callbacks.index(callback) + 1, history)
    if weights is not None:
        _load(model, weights, options.checkpoint)
        trainer.validate(model, data, verbose=False)
        callback.method = asp_one_shot(prune_at=0, pattern=options.pattern or callback.method.pattern)
        trainer.num_sanity_val_steps = float("inf")  # validates the pruned model before the first retraining step
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    output.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(output / "pruned.ckpt")
    _report(output, config, options.checkpoint, callback, history)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sparsetrain prune",
        description="Prune once to 2:4, retrain with the mask frozen, report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="gpt_dense_prune_retrain.yaml", help="recipe: a path or a shipped name")
    parser.add_argument(
        "--checkpoint", help="trained checkpoint, of Lightning or weights alone; none trains dense first"
    )
    parser.add_argument("--pattern", choices=("transposable", "row_wise"), help="of the masks, with --checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps; with --checkpoint, of retraining")
    parser.add_argument("--output", default="runs/prune", help="folder for pruned.ckpt and report.md")
    return parser


def _sparse_callback(trainer: Any, config: str) -> Any:
    from sparsetrain.callbacks import SparseTrainingCallback

    callback = next((entry for entry in trainer.callbacks if isinstance(entry, SparseTrainingCallback)), None)
    if callback is None:
        raise ValueError(f"config {config!r} has no SparseTrainingCallback: add one to trainer.callbacks.")
    return callback


def _load(model: Any, weights: Any, path: str) -> None:
    from sparsetrain.checkpoint import require_same_weights

    try:
        require_same_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"checkpoint {path!r} {str(error).removeprefix('checkpoint ')}") from None
    model.load_state_dict(weights)


def _report(output: Path, config: str, checkpoint: str | None, callback: Any, history: Any) -> None:
    rows = []
    for index, validation in enumerate(history.validations):
        last = index == len(history.validations) - 1
        stage = {"dense": "dense", "sparse": "sparse", "frozen": "pruned, mask frozen"}[validation.phase]
        rows.append((str(validation.step), "final model" if last else stage, f"{validation.loss:.4f}"))
    columns = ("step", "model", "validation loss")
    table = Table(*columns, title=f"{callback.method.name}, {callback.method.pattern} 2:4")
    for row in rows:
        table.add_row(*row)
    training = callback.training
    metrics = training.metrics()
    kept, violations = metrics.get("kept_fraction_at_refresh", 1.0), int(metrics["violations"])
    facts = f"{training.report.summary()} || kept fraction: {kept:.3f} || violations: {violations} || {training.ending}"
    console = Console()
    console.print(table)
    console.print(facts, highlight=False)
    lines = [
        f"# Pruned model\n\nRecipe `{Path(config).name}`, from {f'`{checkpoint}`' if checkpoint else 'scratch'}.\n"
    ]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    (output / "report.md").write_text("\n".join([*lines, "", facts, ""]))
    console.print(f"wrote {output / 'pruned.ckpt'} and {output / 'report.md'}", highlight=False)
