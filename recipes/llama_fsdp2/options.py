"""What the recipe can be told, by a YAML file and on the command line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from sparsetrain.hardware.extras import require

from ..cli.recipe_files import with_recipe_paths

COUNTS = ("width", "depth", "heads", "context", "batch_size", "steps", "replicas", "log_every", "checkpoint_every")

NOT_NEGATIVE = ("learning_rate", "warmup_steps", "min_lr_ratio", "weight_decay")


@dataclass(frozen=True)
class Options:
    """A run.

    Args:
        method: Of sparse training: a preset's name, or a mapping of its arguments under "preset"; null trains dense.
        targets: Which layers become sparse.
        gather: What travels between ranks: "masked", "packed", or "auto".
        width: Size of the residual stream.
        depth: Blocks.
        heads: Attention heads of a block.
        hidden: Size of the MLP's hidden layer; null is 8/3 of the width, rounded up.
        context: Longest sequence, in tokens.
        source: Of text: a file, a folder, a saved dataset, or a hub id; null is the interpreter's Python sources.
        split: Which split of a hub dataset.
        text_column: The column that holds the text.
        batch_size: Sequences of a rank and step.
        steps: Optimizer steps of the whole run.
        learning_rate: At its peak.
        warmup_steps: Of the learning rate.
        min_lr_ratio: Final learning rate as a fraction of the peak.
        weight_decay: Of matrices.
        clip: Largest norm of all gradients together; null clips nothing.
        seed: Of the weights.
        device: "cuda" or "cpu".
        replicas: Groups of ranks that each hold a whole copy (HSDP); 1 shards over all ranks.
        precision: Of gathered weights and activations; masters and reductions are in float32.
        reshard: Free a block's gathered weights after its forward and gather them again for its backward.
        compile: Compile every block.
        activation_checkpointing: Keep a block's input alone, and compute the block again in the backward.
        output: Folder of checkpoints and of the final model.
        checkpoint_every: Steps between checkpoints; a run goes on from the last whole one in its folder.
        log_every: Steps between lines.
        wandb: Project at Weights & Biases to log to; null logs nowhere.

    Raises:
        ValueError: If a count is below 1, or another number is out of range.
    """

    method: dict[str, Any] | str | None = "recommended"
    targets: str | list[str] = "mlp"
    gather: Literal["auto", "masked", "packed"] = "auto"
    width: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int | None = None
    context: int = 128
    source: str | None = None
    split: str = "train"
    text_column: str = "text"
    batch_size: int = 8
    steps: int = 100
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    seed: int = 0
    device: Literal["cuda", "cpu"] = "cuda"
    replicas: int = 1
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    reshard: bool = True
    compile: bool = False
    activation_checkpointing: bool = False
    output: str = "runs/llama_fsdp2"
    checkpoint_every: int = 50
    log_every: int = 10
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}: it must be at least 1, or null.")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number of at least 0.")
        if not self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}: it must be at most 1.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}: it must be above 0, or null.")


def read_options(arguments: Sequence[str]) -> Options:
    """Return what a command line says; ``--config`` takes a file, or the name of a recipe of the package."""
    jsonargparse = require("jsonargparse", "recipes", "the command line")
    parser = jsonargparse.ArgumentParser(
        prog="torchrun -m sparsetrain.recipes.llama_fsdp2", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Options, as_group=False)
    values = parser.parse_args(with_recipe_paths(arguments)).as_dict()
    return Options(**{one.name: values[one.name] for one in fields(Options)})
