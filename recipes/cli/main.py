"""``sparsetrain``: dispatches to its subcommands, and turns errors into one sentence."""

import argparse
import os
import sys
from collections.abc import Sequence

from .arguments import Parser
from .messages import explain
from .recipe_files import recipe_files

EXAMPLES = """examples:
  sparsetrain doctor
  sparsetrain doctor --shape 4096x11008 --probe
  sparsetrain recipes
  sparsetrain fit --config gpt_from_scratch.yaml
  sparsetrain fit --config gpt_from_scratch.yaml --trainer.max_steps=2000 --data.source=my_text.txt
  sparsetrain prune --checkpoint dense.ckpt --steps 300
  sparsetrain consolidate checkpoints/step-5000 --output model.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0 for success, 1 for an interrupted run, 2 for a wrong input.

    ``doctor`` returns 1 when nothing will run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    own, rest = arguments[: 1 + debug], arguments[1 + debug :]
    try:
        parser = _parser()
        if own[-1:] and own[-1].startswith("-") and own[-1] not in parser.words():
            parser.error(f"unrecognized arguments: {own[-1]}")
        options = parser.parse_args(own)
        if options.command == "recipes":
            return _list_recipes(rest)
        if options.command == "doctor":
            from .doctor import doctor

            return doctor(rest)
        if options.command == "fit":
            from .fit import fit

            return fit(rest)
        if options.command == "consolidate":
            from .consolidate import consolidate

            return consolidate(rest)
        from .prune import prune

        return prune(rest)
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # whoever reads has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"sparsetrain: error: {explain(str(error))}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    from sparsetrain import __version__

    parser = Parser(
        prog="sparsetrain",
        description="Train with transposable 2:4 sparsity.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsetrain {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{doctor,recipes,fit,prune,consolidate}")
    commands.add_parser("doctor", add_help=False, help="say which backend will run here, and why the others will not")
    commands.add_parser("recipes", help="list the recipes that come with the package")
    commands.add_parser(
        "fit", add_help=False, help="train a recipe (LightningCLI: --config, --trainer.*, --print_config)"
    )
    commands.add_parser("prune", add_help=False, help="prune a checkpoint or a recipe once, retrain, report")
    commands.add_parser("consolidate", add_help=False, help="turn a sharded checkpoint into one dense file")
    return parser


def _list_recipes(rest: Sequence[str]) -> int:
    if rest:
        raise ValueError(f"recipes takes no argument, and {rest[0]!r} is given: leave it out.")
    for name, path in recipe_files().items():
        print(f"{name:32} {path.read_text().splitlines()[0].lstrip('# ')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
