"""``sparsetrain fit``: LightningCLI over recipes."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningCLI

from sparsetrain.hardware.extras import require

from .recipe_cli import RecipeCLI
from .recipe_files import with_recipe_paths


def fit(arguments: Sequence[str]) -> int:
    """Train what the command line and its recipe describe.

    Args:
        arguments: As for LightningCLI's ``fit``; ``--config`` may name a recipe of the package.
    """
    run_cli(["fit", *arguments])
    return 0


def run_cli(arguments: Sequence[str], **options: Any) -> LightningCLI:
    """Run LightningCLI on a command line in which ``--config`` may name a recipe of the package."""
    require("jsonargparse", "recipes", "the command line")
    sys.argv = ["sparsetrain", *with_recipe_paths(arguments)]
    # a parser that raises instead of exiting lets the command line print one sentence
    settings = {"exit_on_error": False, "allow_abbrev": False}
    parser = {**settings, "fit": dict(settings)} if arguments[:1] == ["fit"] else settings
    return RecipeCLI(save_config_kwargs={"overwrite": True}, parser_kwargs=parser, **options)
