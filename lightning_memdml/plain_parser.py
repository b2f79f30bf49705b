"""The parser of commands whose options are few and plain, without a training library."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

# What argparse writes of each mistake, and what is printed in its place.
SENTENCES = (
    (r"the following arguments are required: (.+)", r"Expected \1 but got nothing."),
    (r"argument (\S+): invalid int value: (.+)", r"Expected \1 to be a whole number but got \2."),
    (r"argument (\S+): invalid float value: (.+)", r"Expected \1 to be a number but got \2."),
    (r"argument (\S+): expected .*argument.*", r"Expected a value after \1 but got nothing."),
    (r"unrecognized arguments: (.+)", r"Expected no further options but got \1."),
)


class PlainParser(argparse.ArgumentParser):
    """Answers a mistake in one sentence, where argparse prints the usage of all options.

    Args:
        command: The command, such as `memdml study`.
        description: The text of its help.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            command,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        for pattern, sentence in SENTENCES:
            if found := re.fullmatch(pattern, message):
                message = found.expand(sentence)
                break
        self.exit(2, f"error: {message} `{self.prog} --help` describes the options.\n")
