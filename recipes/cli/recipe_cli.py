"""``RecipeCLI``: LightningCLI whose errors are one sentence each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import resolve_method

from .checkpoint_files import require_resumable
from .messages import explain

NOT_OPTIONS = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
"""Arguments of ``Trainer.fit`` that the command line makes itself."""

SEARCHED = ("best", "last", "hpc", "registry")
"""What ``ckpt_path`` may begin with that is no path."""

SHARDED = "meta.pt"
"""A file in folders that are checkpoints."""


class RecipeParser(LightningArgumentParser):
    """A parser that prints no configuration that would be refused."""

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Return a configuration as text.

        Raises:
            ValueError: If a method in it is unknown or has a wrong argument.
        """
        for method in _methods(cfg):
            resolve_method(method)
        return str(super().dump(cfg, *args, **kwargs))


class RecipeCLI(LightningCLI):
    """LightningCLI for ``fit``, or with ``run=False`` for a command that trains on its own.

    Both take the same configurations: what one prints and saves, the other accepts.

    Args:
        words: Further options of the command, to suggest where a word is not known.
        **options: As for LightningCLI.
    """

    def __init__(self, *, words: Sequence[str] = (), **options: Any) -> None:
        self._words = words
        super().__init__(parser_class=RecipeParser, **options)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Add the options of ``fit`` to a parser without subcommands too."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:
            self.parser.add_method_arguments(Trainer, "fit", skip=NOT_OPTIONS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an error says what was meant."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            raise ValueError(explain(str(error), self._options())) from error

    def fit(self, **arguments: Any) -> None:
        """Train; a checkpoint of another model is named."""
        path = arguments.get("ckpt_path")
        try:
            self.trainer.fit(**arguments)
        except (RuntimeError, ValueError) as error:
            if path is None or not _is_of_another_model(error):
                raise
            raise ValueError(f"ckpt_path {str(path)!r} {_first_difference(error)}") from error

    def _parse_ckpt_path(self) -> None:
        settings: Any = self.config.get(self.config.get("subcommand") or "", {})
        path = str(settings.get("ckpt_path") or "")
        if path and not path.startswith(SEARCHED) and "://" not in path and not Path(path, SHARDED).is_file():
            require_resumable(path)
            try:
                super()._parse_ckpt_path()
            except Exception as error:
                why = explain(str(error), self._options())
                raise ValueError(f"ckpt_path {path!r} is of another model than the config: {why}") from error

    def _options(self) -> list[str]:
        parsers = getattr(self, "_subcommand_parsers", {})
        parser = parsers.get("fit", self.parser)
        return [*parser.get_defaults(skip_validation=True).keys(), "config", "print_config", "help", *self._words]


def _methods(config: Any) -> Iterator[Any]:
    """Yield what a configuration gives for ``method`` of a SparseTrainingCallback."""
    found: Any = config.get("trainer.callbacks") if hasattr(config, "get") else None
    entries: list[Any] = found if isinstance(found, list) else [found]
    for callback in entries:
        path = callback.get("class_path", "") if hasattr(callback, "get") else ""
        if str(path).rpartition(".")[2] == SparseTrainingCallback.__name__:
            method = (callback.get("init_args") or {}).get("method")
            if method is not None and not _makes_objects(method):
                yield method


def _makes_objects(method: Any) -> bool:
    return isinstance(method, dict) and any("class_path" in value for value in method.values() if hasattr(value, "get"))


def _is_of_another_model(error: Exception) -> bool:
    return str(error).startswith(("Error(s) in loading state_dict", "checkpoint is of another model"))


def _first_difference(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0].removeprefix("checkpoint ")
    difference = lines[1].partition(", ")[0].rstrip(". ")  # torch lists them all
    return f"is of another model: {difference}; build the model with the checkpoint's hyper-parameters."
