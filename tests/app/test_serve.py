"""From a server's options to those of its parts."""

from __future__ import annotations

import socket
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from podquant.app.options import ServeOptions
from podquant.app.serve import (
    check_source,
    engine_options,
    group_options,
    http_options,
    options_of,
    read_api_key,
    require_key_where_others_reach,
    serve_part,
)
from podquant.config.job import ServeJob
from podquant.engine.options import EngineOptions
from podquant.errors import ConfigError

MANY: dict[str, Any] = {"model_path": "m", "nnodes": 2, "dist_init_addr": "10.0.0.1:10011"}
SECRET = "0123456789abcdef"

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "llama"


def test_what_a_server_leaves_out_is_what_an_engine_leaves_out() -> None:
    assert engine_options(ServeOptions(model_path="m", device="cpu")) == EngineOptions("m", device="cpu")
    flags = {field.name: field.default for field in fields(ServeOptions)}
    shared = [field for field in fields(EngineOptions) if field.name not in ("model_path", "device")]
    assert {field.name: field.default for field in shared} == {field.name: flags[field.name] for field in shared}


@pytest.mark.parametrize(("most", "chunk", "got"), [(16384, 256, 256), (200, 256, 128), (128, 256, 128), (2, 256, 2)])
def test_a_chunk_is_no_larger_than_a_prefill_may_be(most: int, chunk: int, got: int) -> None:
    options = ServeOptions(model_path="m", max_prefill_tokens=most, chunked_prefill_size=chunk)
    assert engine_options(options).chunked_prefill_size == got


def test_the_log_of_requests_is_for_debugging() -> None:
    assert http_options(ServeOptions(model_path="m", log_level="debug")).access_log
    assert not http_options(ServeOptions(model_path="m")).access_log


@pytest.mark.parametrize(
    ("change", "secret", "message"),
    [
        ({}, "short", "PODQUANT_GROUP_SECRET: several hosts need a secret of 16 characters or more"),
        ({"dist_init_addr": "0.0.0.0:1"}, SECRET, "--dist-init-addr 0.0.0.0:1: expected host 0's own address"),
        ({"dist_init_addr": "[::]:1"}, SECRET, "expected host 0's own address"),
    ],
)
def test_hosts_that_cannot_meet(change: dict[str, Any], secret: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        group_options(ServeOptions(**MANY | change), secret)
    assert message in str(caught.value)


def test_hosts_that_meet() -> None:
    members = group_options(ServeOptions(**MANY | {"dist_init_addr": "[fd00::1]:7", "step_seconds": 9.0}), SECRET)
    assert (members.num_hosts, members.num_groups, members.address) == (2, 1, ("fd00::1", 7))
    assert members.secret == SECRET.encode()
    assert members.deadlines.step == 9.0
    alone = ServeOptions(model_path="m")
    assert group_options(alone, "").secret != group_options(alone, "").secret


def test_a_job_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^serve\.yaml: serve: --port: expected 0 to 65535, got 70000"):
        options_of(ServeJob("m", flags={"port": 70000}, name="serve.yaml"))


def test_defaults_that_are_not_there_are_told_before_anything_is_converted(tmp_path: Path) -> None:
    options = ServeOptions(model_path="OUT", device="cpu", skip_tokenizer_init=True)
    check_source(options, str(GOLDEN), None)
    with pytest.raises(ConfigError, match=r"expected auto, none, or a directory with a generation_config\.json"):
        check_source(replace(options, generation_config=str(tmp_path)), str(GOLDEN), None)


def test_the_key_is_given_or_in_a_file_or_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**flags: str) -> str | None:
        return read_api_key(ServeOptions(model_path="m", **flags))  # type: ignore[arg-type]

    monkeypatch.delenv("PODQUANT_API_KEY", raising=False)
    (tmp_path / "key").write_text("filed\n")
    assert (key(), key(api_key="given"), key(api_key_file=str(tmp_path / "key"))) == (None, "given", "filed")
    monkeypatch.setenv("PODQUANT_API_KEY", "environment")
    assert (key(), key(api_key="given"), key(api_key_file=str(tmp_path / "key"))) == ("environment", "given", "filed")
    assert "given" not in repr(ServeOptions(model_path="m", api_key="given"))
    monkeypatch.setenv("PODQUANT_API_KEY", "")
    with pytest.raises(ConfigError, match="PODQUANT_API_KEY: is set and empty"):
        key()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read as a key: No such file or directory. Mount the Secret there"),
        (b"\n", "expected one key of printable characters without spaces, got an empty file"),
        (b"two words", "expected one key of printable characters without spaces, got 2 words"),
        (b"one\nper line", "expected one key of printable characters without spaces, got 3 words"),
        ("schlüssel".encode(), "cannot be read as a key: it holds bytes that no header can"),
    ],
)
def test_a_file_that_holds_no_key(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "key").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_api_key(ServeOptions(model_path="m", api_key_file=str(tmp_path / "key")))
    assert f"--api-key-file {tmp_path / 'key'}: {message}" in str(caught.value)


def test_one_key_is_enough() -> None:
    with pytest.raises(ConfigError, match="--api-key-file: expected only one of it and --api-key"):
        ServeOptions(model_path="m", api_key="a", api_key_file="b")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "192.0.2.1", "2001:db8::1", "fe80::1%lo", "::ffff:192.0.2.1"])
def test_nobody_serves_all_machines_without_a_key_unawares(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host}: other machines reach.*--allow-anonymous"):
        require_key_where_others_reach(ServeOptions(model_path="m", host=host))
    require_key_where_others_reach(ServeOptions(model_path="m", host=host, api_key="key"))
    require_key_where_others_reach(ServeOptions(model_path="m", host=host, allow_anonymous=True))


def test_a_name_is_what_it_resolves_to() -> None:
    own = socket.gethostname()
    addresses = {address[0] for *_, address in socket.getaddrinfo(own, None)}
    options = ServeOptions(model_path="m", host=own)
    if all(str(address).startswith("127.") or address == "::1" for address in addresses):
        require_key_where_others_reach(options)
    else:
        with pytest.raises(ConfigError, match="other machines reach"):
            require_key_where_others_reach(options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "no.such.host.invalid"])
def test_this_machine_needs_no_key(host: str) -> None:
    require_key_where_others_reach(ServeOptions(model_path="m", host=host))


def test_it_is_refused_before_anything_is_loaded() -> None:
    options = ServeOptions(model_path="/nowhere", device="cpu", host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match="--allow-anonymous"):
        serve_part(options, None, threading.Event())
