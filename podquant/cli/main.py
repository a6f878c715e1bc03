"""`podquant COMMAND …`: finds the command and runs it.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit status`; only the one asked for is
imported, so that `--help` is fast. Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import podquant
from podquant.app.status import exit_status
from podquant.foreign import cut_words

COMMANDS = {
    "convert": "quantize a checkpoint into an artifact",
    "serve": "serve an artifact or a checkpoint over HTTP",
    "plan": "show what converting and serving a model take, without doing it",
    "compile": "compile a server's steps for a TPU slice, without one",
    "inspect": "show what an artifact holds and how good it is",
    "verify": "check an artifact to the last byte",
    "merge": "put the tensor-parallel slices of an artifact together",
    "export": "write an artifact in another form for other software",
    "demo": "plan, convert, verify, serve and ask a real small model",
}
"""Command → its line in the help; `podquant.cli.<command>` is its module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` if None). Returns the exit status: 0, or 1 after an error was printed.

    Wrong usage exits with status 2, as argparse does.
    """
    return exit_status(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: Sequence[str]) -> int | None:
    """Import the command, which takes seconds if it computes, and run it."""
    arguments = _parser(argv[0] if argv else "").parse_args(argv)
    status: int | None = arguments.run(arguments)
    return status


class _Parser(argparse.ArgumentParser):
    """One that echoes no word of absurd length."""

    def error(self, message: str) -> NoReturn:
        super().error(cut_words(message))


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser, with the arguments of one command filled in."""
    parser = _Parser(
        prog="podquant",
        description="Quantize a Hugging Face checkpoint on the TPU pod that will serve it, then serve it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"podquant {podquant.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        if name == command:
            module = import_module(f"podquant.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
