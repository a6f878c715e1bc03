"""One YAML file, read so that every error about it can say `file:line:`.

A `Node` is a place in the file. The caller asks it for what it expects there (`mapping`, `items`, `text`, …); anything
else is a `ConfigError`. Knows nothing of what any key means.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from podquant.errors import ConfigError
from podquant.foreign import cut

_MAX_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile("0|[1-9][0-9]{0,17}")  # not 010, 1_0, 1:30 or 0x10, which YAML 1.1 reads in ways of its own
_NUMBER = re.compile(rf"({_INTEGER.pattern})(\.[0-9]{{1,17}})?")
_SCALARS = {
    "str": "the text",
    "int": "the number",
    "float": "the number",
    "bool": "the boolean",
    "null": "null",
    "merge": "the merge sign",  # as a key it is refused on loading
}


def load_yaml(path: Path) -> Node:
    """Reads one YAML document.

    Duplicate keys, keys that are not text, `<<` merges and types beyond text, number, boolean and null are refused.

    Raises:
        ConfigError: the file cannot be read, is over 1 MiB, is empty or is not YAML; names file and line.
    """
    text = _read_text(path)
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(path, line, f"not YAML: a character that is not allowed ({error.character!r})") from error
    except yaml.MarkedYAMLError as error:
        raise _error(path, *_marked(error)) from error
    except (ValueError, OverflowError) as error:  # PyYAML leaks these, for instance from "\U00110000"
        raise _error(path, loader.line + 1 if loader else 1, f"not YAML: {error}") from error
    except RecursionError as error:
        raise _error(path, loader.line + 1 if loader else 1, "not a configuration: nested too deeply") from error
    if root is None:
        raise _error(path, 1, "the file is empty: expected a mapping")
    return Node(path, "the file", root.start_mark.line + 1, root)


def nearest(word: str, legal: Sequence[str]) -> str:
    """`; did you mean x?` for the legal word closest to `word`, or nothing when none is close."""
    close = difflib.get_close_matches(word[:100], legal, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Node:
    """A place in a YAML file and its value.

    Attributes:
        path: the file, as it was asked for.
        place: where in the document, for messages: `quantization.dense.rules[0]`.
        line: counted from 1; of the key for a value of a mapping, else of the value.
    """

    path: Path
    place: str
    line: int
    _yaml: yaml.Node

    def fail(self, message: str) -> NoReturn:
        """Raises a ConfigError that begins with `file:line: place: `."""
        raise _error(self.path, self.line, f"{self.place}: {message}")

    def expected(self, what: str, hint: str = "") -> NoReturn:
        """Raises the ConfigError for a value other than `what`."""
        self.fail(f"expected {what}, got {self._got()}{hint}")

    @property
    def is_null(self) -> bool:
        """Whether the value is null, `~` or missing."""
        return self._tag() == "null"

    def mapping(self, legal: Sequence[str]) -> Mapping[str, Node]:
        """The values by key; a key that is not one of `legal` is refused."""
        entries = self.entries(f"a mapping with some of the keys {', '.join(legal)}")
        for key, entry in entries.items():
            if key not in legal:
                message = f"unknown key {_shown(key)} in {self.place}: expected one of {', '.join(legal)}"
                raise _error(self.path, entry.line, message + nearest(key, legal))
        return entries

    def entries(self, what: str) -> Mapping[str, Node]:
        """The values by key of a mapping with keys of any name; `what` says what was expected."""
        if not isinstance(self._yaml, yaml.MappingNode):
            self.expected(what)
        prefix = "" if self.place == "the file" else f"{self.place}."
        return {
            key.value: Node(self.path, prefix + key.value, key.start_mark.line + 1, value)
            for key, value in self._yaml.value
        }

    def items(self, what: str) -> Sequence[Node]:
        """The items of a list; `what` says what was expected."""
        if not isinstance(self._yaml, yaml.SequenceNode):
            self.expected(what)
        return [
            Node(self.path, f"{self.place}[{i}]", item.start_mark.line + 1, item)
            for i, item in enumerate(self._yaml.value)
        ]

    def text(self, what: str, *, may_be_empty: bool = False) -> str:
        """A text, by default one that is not empty."""
        if self._tag() != "str" or not (self._yaml.value or may_be_empty):
            self.expected(what)
        return str(self._yaml.value)

    def choice(self, legal: Sequence[str], what: str, also_called: Mapping[str, str]) -> str:
        """One of the words `legal`; `also_called` maps other names that people write to the word to suggest."""
        word = self.text(what)
        if word not in legal:
            known = also_called.get(word.lower())
            self.expected(what, f"; did you mean {known}?" if known else nearest(word, legal))
        return word

    def boolean(self) -> bool:
        """`true` or `false`, unquoted."""
        if self._tag() != "bool":
            self.expected("true or false")
        return _BOOLEANS[self._yaml.value.lower()]

    def positive_integer(self, what: str) -> int:
        """A decimal integer above zero."""
        return self.natural_number(what) or self.expected(what)

    def natural_number(self, what: str) -> int:
        """A decimal integer from zero."""
        if self._tag() != "int" or not _INTEGER.fullmatch(self._yaml.value):
            self.expected(what)
        return int(self._yaml.value)

    def positive_number(self, what: str) -> float:
        """A decimal number above zero, with or without a fraction."""
        if self._tag() not in ("int", "float") or not _NUMBER.fullmatch(self._yaml.value):
            self.expected(what)
        return float(self._yaml.value) or self.expected(what)

    def _tag(self) -> str:
        return self._yaml.tag.removeprefix(_TAG) if isinstance(self._yaml, yaml.ScalarNode) else ""

    def _got(self) -> str:
        if isinstance(self._yaml, yaml.MappingNode):
            return "a mapping"
        if isinstance(self._yaml, yaml.SequenceNode):
            return "a list"
        if self.is_null:
            return "null"
        shown = _shown(self._yaml.value)
        return f"{_SCALARS[self._tag()]} {shown if self._tag() == 'str' else shown[1:-1]}"


_BOOLEANS = yaml.SafeLoader.bool_values


class _Loader(yaml.SafeLoader):
    """Composes the tree of nodes with their lines, and refuses YAML that no configuration here needs."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            _require_tag(node, "map")
            _require_unique_text_keys(node)
        elif isinstance(node, yaml.SequenceNode):
            _require_tag(node, "seq")
        elif isinstance(node, yaml.ScalarNode):
            _require_tag(node, *_SCALARS)
            if node.tag == _TAG + "bool" and node.value.lower() not in _BOOLEANS:
                raise _refused(node, f"{_shown(node.value)} is not a boolean")
            if any("\ud800" <= letter <= "\udfff" for letter in node.value):
                raise _refused(node, f"{_shown(node.value)} holds half of a surrogate pair")
        return node


def _require_unique_text_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == _TAG + "merge":
            raise _refused(key, "<< merges are not supported: write the keys out")
        if key.tag != _TAG + "str":
            raise _refused(key, "a key must be plain text")
        if key.value in lines:
            raise _refused(key, f"duplicate key {_shown(key.value)}: it is already in line {lines[key.value]}")
        lines[key.value] = key.start_mark.line + 1


def _require_tag(node: yaml.Node, *legal: str) -> None:
    if node.tag.removeprefix(_TAG) not in legal:
        hint = "quote the value if it is meant as text"
        raise _refused(node, f"a value of the type {_shown(node.tag.removeprefix(_TAG))} is not supported; {hint}")


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _marked(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "it cannot be parsed"
    if type(error) is yaml.MarkedYAMLError:  # our own words, from _Loader
        message = problem
    else:
        message = f"not YAML: {problem}" + (f" ({error.context})" if error.context and error.problem else "")
    if "unknown escape character" in problem:
        message += "; write patterns in single quotes, where a backslash is a backslash"
    return (mark.line + 1 if mark else 1), message


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise _error(
            path, 1, f"not a configuration: expected a YAML file of at most {_MAX_BYTES} bytes, this is larger"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(path, line, f"not YAML: expected UTF-8 text, got the byte 0x{data[error.start]:02x}") from error


def _error(path: Path, line: int, message: str) -> ConfigError:
    return ConfigError(f"{path}:{line}: {message}")


def _shown(text: str) -> str:
    return repr(cut(text))
