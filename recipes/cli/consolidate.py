"""``sparsetrain consolidate``: a sharded checkpoint as one dense file, with zeros where masks are in force."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .arguments import Parser

EPILOG = """example:
  sparsetrain consolidate checkpoints/step-5000 --output model.safetensors
"""


def consolidate(arguments: Sequence[str]) -> int:
    """Write the dense weights of a checkpoint folder to a safetensors file, check them, and say what they are.

    Args:
        arguments: The command line after ``sparsetrain consolidate``.
    """
    options = _parser().parse_args(list(arguments))
    from sparsetrain.checkpoint.consolidation import consolidate as write

    found = write(options.folder, options.output, options.model)
    console = Console()
    table = Table("weight", "shape", "pruned by its mask", "zeros there", title="masks in force")
    for weight in found:
        shape = "×".join(map(str, weight.shape))
        table.add_row(weight.name, shape, f"{weight.pruned:,}", f"{weight.zeros:,}")
    if found:
        console.print(table)
    else:
        console.print("no masks are in force: the weights are dense")
    console.print(f"wrote {options.output}", highlight=False)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sparsetrain consolidate",
        description="Turn a checkpoint folder of torch.distributed.checkpoint into one dense safetensors file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="what dcp.save wrote: a model beside training.sharded_state_dict()")
    parser.add_argument("--output", default="model.safetensors", help="file to write")
    parser.add_argument("--model", default="model", help="key under which the model's state was saved")
    return parser
