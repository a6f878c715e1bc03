"""Every way a YAML file can be wrong says file and line, and what stands there is found again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podquant.config.yamlfile import Node, load_yaml, nearest
from podquant.errors import ConfigError


def load(tmp_path: Path, text: str | bytes) -> Node:
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_yaml(path)


def test_values_keep_their_line_and_place(tmp_path: Path) -> None:
    root = load(tmp_path, "# first\na:\n  b: word\n  c: [true, 12, ~]\n  d:\n    - x\n")
    a = root.mapping(["a"])["a"]
    inner = a.mapping(["b", "c", "d"])
    flag, number, nothing = inner["c"].items("a list")
    assert (a.line, inner["b"].line, inner["d"].items("a list")[0].line) == (2, 3, 6)
    assert (inner["b"].place, number.place) == ("a.b", "a.c[1]")
    assert inner["b"].text("a word") == "word"
    assert flag.boolean() is True
    assert number.positive_integer("a number") == 12
    assert nothing.is_null
    assert not flag.is_null


def test_an_alias_is_the_value_it_names(tmp_path: Path) -> None:
    root = load(tmp_path, "a: &x word\nb: *x\n").mapping(["a", "b"])
    assert root["b"].text("a word") == "word"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "the file is empty"),
        ("# only a comment\n", 1, "the file is empty"),
        ("a: 1\n\nb: 2\na: 3\n", 4, "duplicate key 'a': it is already in line 1"),
        ("x: {a: 1,\n a: 2}\n", 2, "duplicate key 'a'"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not YAML"),
        ("a:\n\t- 1\n", 2, "not YAML"),
        ('a: "\\d+"\n', 1, "write patterns in single quotes"),
        ("a: *nothing\n", 1, "not YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML"),
        ("base: &b {x: 1}\na:\n  <<: *b\n", 3, "<< merges are not supported"),
        ("a: 1\n12: 2\n", 2, "a key must be plain text"),
        ("a: 1\n? [1, 2]\n: 2\n", 2, "a key must be plain text"),
        ("a: 2026-01-02\n", 1, "a value of the type 'timestamp' is not supported; quote the value"),
        ("a:\n  - !!binary aGk=\n", 2, "'binary' is not supported"),
        ("a: !mine word\n", 1, "'!mine' is not supported"),
        ("a: !!set {b}\n", 1, "'set' is not supported"),
        ("a: !!omap [b: 1]\n", 1, "'omap' is not supported"),
        ("a: !!bool perhaps\n", 1, "'perhaps' is not a boolean"),
        ('a: 1\nb: "\\ud800"\n', 2, "half of a surrogate pair"),
        ('a: 1\nb: "\\U00110000"\n', 2, "not YAML"),
        ("a: 1\nb: \x01\n", 2, "a character that is not allowed"),
        (b"a: 1\nb: \xff\n", 2, "expected UTF-8 text, got the byte 0xff"),
        ("[" * 5000, 1, "nested too deeply"),
        ("a: 1\n" + " " * (1 << 20), 1, "at most 1048576 bytes"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/job.yaml:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read this configuration file: (No such file|Is a directory)"):
        load_yaml(tmp_path / name)


def test_values_of_another_kind_are_refused_with_what_was_found(tmp_path: Path) -> None:
    text = "words: 'yes'\nflag: yes\nnumber: 0x10\nlist: [1]\nmap: {a: 1}\nnothing:\nempty: ''\nmerge: <<\n"
    keys = ["words", "flag", "number", "list", "map", "nothing", "empty", "merge"]
    at = load(tmp_path, text).mapping(keys)
    refusals: dict[str, Callable[[], object]] = {
        "1: words: expected true or false, got the text 'yes'": at["words"].boolean,
        "2: flag: expected a word, got the boolean yes": lambda: at["flag"].text("a word"),
        "3: number: expected a number, got the number 0x10": lambda: at["number"].positive_integer("a number"),
        "4: list: expected a word, got a list": lambda: at["list"].text("a word"),
        "5: map: expected a list, got a mapping": lambda: at["map"].items("a list"),
        "6: nothing: expected a mapping with some of the keys a, b, got null": lambda: at["nothing"].mapping(
            ["a", "b"]
        ),
        "8: merge: expected a word, got the merge sign <<": lambda: at["merge"].text("a word"),
        "7: empty: expected a word, got the text ''": lambda: at["empty"].text("a word"),
    }
    for message, ask in refusals.items():
        with pytest.raises(ConfigError, match=re.escape(f"job.yaml:{message}")):
            ask()


@pytest.mark.parametrize("number", ["0", "-1", "1.0", "1e3", "010", "1_0", "1:30", "9" * 5000, "true", "'8'"])
def test_only_plain_positive_integers_are_integers(tmp_path: Path, number: str) -> None:
    node = load(tmp_path, f"n: {number}\n").mapping(["n"])["n"]
    with pytest.raises(ConfigError, match=r"job\.yaml:1: n: expected a count, got"):
        node.positive_integer("a count")


@pytest.mark.parametrize("number", ["-1", "1.0", "00", "010", "1_0", "9" * 19, "true", "'8'", "", "[1]", "{a: 1}"])
def test_only_plain_integers_from_zero_are_natural_numbers(tmp_path: Path, number: str) -> None:
    node = load(tmp_path, f"n: {number}\n").mapping(["n"])["n"]
    with pytest.raises(ConfigError, match=r"job\.yaml:1: n: expected a count, got"):
        node.natural_number("a count")


@pytest.mark.parametrize("number", ["0", "0.0", "-1.5", "1e3", "1.0e+3", ".inf", ".nan", "1:30", "01.5", "'8'", "[1]"])
def test_only_plain_numbers_above_zero_are_positive(tmp_path: Path, number: str) -> None:
    node = load(tmp_path, f"n: {number}\n").mapping(["n"])["n"]
    with pytest.raises(ConfigError, match=r"job\.yaml:1: n: expected some seconds, got"):
        node.positive_number("some seconds")


def test_numbers_that_are_plain_are_read(tmp_path: Path) -> None:
    at = load(tmp_path, "none: 0\nmany: 1000\nhalf: 0.5\n").mapping(["none", "many", "half"])
    assert (at["none"].natural_number("a count"), at["many"].natural_number("a count")) == (0, 1000)
    assert (at["half"].positive_number("seconds"), at["many"].positive_number("seconds")) == (0.5, 1000.0)


def test_a_mapping_with_keys_of_any_name(tmp_path: Path) -> None:
    at = load(tmp_path, "env:\n  A: ''\n  b c: word\n").mapping(["env"])["env"].entries("variables")
    assert {key: node.text("a word", may_be_empty=True) for key, node in at.items()} == {"A": "", "b c": "word"}
    assert (at["A"].place, at["A"].line, at["b c"].line) == ("env.A", 2, 3)
    with pytest.raises(ConfigError, match=r"job\.yaml:2: env\.A: expected variables, got the text ''"):
        at["A"].entries("variables")


def test_an_unknown_key_is_refused_at_its_line_with_the_nearest(tmp_path: Path) -> None:
    root = load(tmp_path, "colour: 1\nsiez: 2\n")
    with pytest.raises(ConfigError, match=r"job\.yaml:2: unknown key 'siez' in the file: .* did you mean size\?"):
        root.mapping(["colour", "size"])


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("int88", ["int8", "float8_e4m3fn"]) == "; did you mean int8?"
    assert nearest("bananas", ["int8", "float8_e4m3fn"]) == ""


@given(st.one_of(st.binary(max_size=60), st.text("ab:-[]{}&*!|>'\"%@\\?#,<~ \n\t01xU.", max_size=60)))
def test_any_bytes_are_a_tree_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    directory = tmp_path_factory.getbasetemp()
    outcome = ""
    try:
        outcome = f"{directory}/job.yaml:{load(directory, text).line}: "
    except ConfigError as error:
        outcome = str(error)
    assert re.match(re.escape(f"{directory}/job.yaml") + r":[1-9]\d*: ", outcome)
