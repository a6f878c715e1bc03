"""The page of all commands and flags, from their argument parsers."""

from __future__ import annotations

import argparse
from importlib import import_module

from podquant.cli.main import COMMANDS
from tests.docs.markdown import page, prose, table


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command, as `podquant` makes it."""
    parser = argparse.ArgumentParser(prog=f"podquant {command}", allow_abbrev=False)
    import_module(f"podquant.cli.{command}").add_arguments(parser)
    return parser


def commands_page() -> str:
    """docs/reference/cli.md."""
    return page(
        "Commands",
        prose("""
            `podquant --version` prints the version; `podquant COMMAND --help` prints what is here. An unknown flag is
            an error, and flags cannot be abbreviated. Exit status: [what is lost when something
            dies](../failures.md#exit-status).
        """),
        table(["command", "does"], [[f"[`{name}`](#podquant-{name})", text] for name, text in COMMANDS.items()]),
        *(part for name, text in COMMANDS.items() for part in _command(name, text)),
    )


def _command(name: str, text: str) -> list[str]:
    parser = parser_of(name)
    actions = [action for action in parser._actions if action.dest != "help"]
    usage = " ".join(["podquant", name, *(_positional(action) for action in actions if not action.option_strings)])
    return [
        f"## podquant {name}\n",
        f"{text[0].upper()}{text[1:]}.\n",
        f"```text\n{usage}\n```\n",
        table(["argument", "meaning"], [[_argument(action), _meaning(action, parser)] for action in actions]),
    ]


def _positional(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"[{name}]" if action.nargs == "?" else name


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{_positional(action)}`"
    value = str(action.metavar or action.dest.upper())
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    takes_value = action.nargs != 0
    return ", ".join(f"`{option} {value}`" if takes_value else f"`{option}`" for option in action.option_strings)


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {"default": action.default, "prog": parser.prog}
    return f"{text} **required**" if action.required and action.option_strings else text
