"""The command line's own options: a wrong one is one sentence, with the nearest right word."""

import argparse
import re
from typing import NoReturn

from sparsetrain.checks.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``ValueError`` instead of printing its usage and leaving.

    Example:
        >>> parser = Parser(prog="sparsetrain")
        >>> _ = parser.add_argument("--checkpoint")
        >>> parser.parse_args(["--chekpoint=x"])
        Traceback (most recent call last):
        ValueError: unrecognized arguments: --chekpoint=x (did you mean '--checkpoint'?).
    """

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as a sentence that begins with the subcommand."""
        subcommand = self.prog.partition(" ")[2]
        near = ""
        if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = did_you_mean(match[1], re.findall(r"[\w-]+", match[2]))
            message, near = message.replace(" (choose", f"{near} (choose"), ""
        elif match := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            near = did_you_mean(match[1], self.words())
        raise ValueError(f"{subcommand}: {message}{near}." if subcommand else f"{message}{near}.")

    def words(self) -> list[str]:
        """Return the options as they are written."""
        return [word for action in self._actions for word in action.option_strings]
