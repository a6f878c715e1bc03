"""Reading a model from the Hugging Face hub: what is asked, who is told the token, and what is made of failures."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.numpy import save

from podquant.errors import StorageError, TransientStorageError
from podquant.storage.hub.client import HubClient
from podquant.storage.hub.ids import FILES
from podquant.storage.hub.store import HubStore
from podquant.storage.retry import Patience
from tests.storage.hub.emulator import COMMIT, HubEmulator

DATA = np.random.default_rng(0).integers(0, 256, 20_000_003, np.uint8).tobytes()
FILE = "model.safetensors"
URI = f"hf://org/name@{COMMIT}"
AS_ID = "org/name: no such directory, and as a Hugging Face id "
OLD = "f" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEmulator]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubEmulator() as hub:
        hub.models["org/name"] = {
            FILE: DATA,
            "config.json": b"{}",
            "empty.txt": b"",
            "original/params 1.json": b"[]",
            "pytorch_model.bin": b"no",
        }
        yield hub


@pytest.fixture
def client(hub: HubEmulator) -> Iterator[HubClient]:
    patience = Patience(connect=1.0, silence=1.5, deadline=5.0, first_wait=0.01, longest_wait=0.1)
    client = HubClient(hub.url, patience)
    yield client
    client.close()


@pytest.fixture
def store(client: HubClient) -> HubStore:
    return HubStore("hf://org/name", client)


def read(store: HubStore, offset: int = 0, count: int = len(DATA)) -> bytes:
    out = bytearray(count)
    store.read_into(FILE, offset, out)
    return bytes(out)


def test_one_request_tells_all_and_pins_the_commit(hub: HubEmulator, store: HubStore, client: HubClient) -> None:
    hub.revisions["main"] = OLD
    sizes = {"config.json": 2, "empty.txt": 0, FILE: len(DATA), "original/params 1.json": 2}
    assert list(store.list().items()) == list(sizes.items())
    assert list(sizes) == sorted(filter_repo_objects(hub.models["org/name"], allow_patterns=list(FILES)))
    assert store.uri == URI
    assert store.version(FILE) == f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    assert store.version("config.json") == "git:9e26dfeeb6e641a33dae4961196235bdb965b21b"  # of git hash-object
    assert (store.size(FILE), store.known_crc32c(FILE)) == (len(DATA), None)
    assert read(HubStore(URI, client), 5, 5) == DATA[5:10]
    assert len(hub.requests("api/models")) == 1
    assert HubStore("hf://org/name@main", client).uri == f"hf://org/name@{OLD}"


def test_bytes_read_are_those_asked_for_and_the_token_stays_at_the_hub(hub: HubEmulator, store: HubStore) -> None:
    assert read(store) == DATA
    assert sum(record.nbytes for record in hub.log) == len(DATA)
    asked = len(hub.requests("resolve"))
    assert read(store, 12_345, 10) == DATA[12_345:12_355]
    assert len(hub.requests("resolve")) == asked  # the link is known
    assert hub.log[-1].nbytes == 10
    assert {record.token for record in hub.requests("^hub")} == {"Bearer hf_secret"}
    assert {record.token for record in hub.requests("^cdn")} == {None}


def test_small_files_come_whole_and_checked(hub: HubEmulator, store: HubStore) -> None:
    assert [store.read(name, 1 << 20) for name in ("config.json", "empty.txt", "original/params 1.json")] == [
        b"{}",
        b"",
        b"[]",
    ]
    hub.fail("corrupt", "cache/.*config.json")
    with pytest.raises(TransientStorageError, match=rf"^{URI}/config.json: expected content with git 9e26\w+, got "):
        store.read("config.json", 99)
    hub.fail("corrupt", "^cdn")
    with pytest.raises(TransientStorageError, match="expected content with sha256"):
        store.read(FILE, 1 << 25)


def test_many_threads_read_one_store(hub: HubEmulator, store: HubStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: read(store, at, min(250_000, len(DATA) - at)), range(0, len(DATA), 250_000)))
    assert b"".join(parts) == DATA


@pytest.mark.parametrize("host", ["hub .*resolve", "cdn"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_burst_of_refusals_is_sat_out(hub: HubEmulator, store: HubStore, host: str, status: int) -> None:
    hub.fail("status", host, status=status, times=4)
    assert read(store, 0, 1000) == DATA[:1000]
    assert len(hub.requests(host)) == 5


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=1'}])
def test_a_named_time_is_waited_for(hub: HubEmulator, store: HubStore, headers: dict[str, str]) -> None:
    hub.fail("status", "resolve", status=429, headers=headers)
    started = time.monotonic()
    assert read(store, 0, 10) == DATA[:10]
    assert time.monotonic() - started >= 1.0


def test_a_dropped_connection_is_taken_up_where_it_dropped(hub: HubEmulator, store: HubStore) -> None:
    hub.fail("reset", "cdn", after=3 << 20, times=4)
    hub.fail("reset", "cdn", times=2)
    assert read(store) == DATA
    assert sum(record.nbytes for record in hub.log) <= len(DATA) * 1.02


def test_an_expired_link_is_asked_for_again(hub: HubEmulator, store: HubStore) -> None:
    assert read(store, 0, 10) == DATA[:10]
    hub.signature += 1
    assert read(store, 10, 10) == DATA[10:20]
    assert len(hub.requests("resolve")) == 2


def test_a_cdn_may_send_on_to_another_place(hub: HubEmulator, store: HubStore) -> None:
    assert read(store, 0, 10) == DATA[:10]
    hub.fail("elsewhere", "cdn", headers={"Location": f"/cdn/0/org/name/{FILE}"}, times=2)
    assert read(store, 10, 10) == DATA[10:20]
    assert {record.token for record in hub.requests("^cdn")} == {None}


@pytest.mark.slow
def test_a_size_that_is_not_the_listed_one_is_not_taken(hub: HubEmulator, store: HubStore) -> None:
    hub.fail("size", "cdn", times=1)
    assert read(store, 0, 10) == DATA[:10]
    hub.fail("size", "cdn", times=1000)
    with pytest.raises(TransientStorageError, match=r"expected a file of 20,000,003 bytes, got .* 20000004\. Check"):
        read(store, 0, 10)


@pytest.mark.parametrize(
    ("kind", "request_", "options", "message"),
    [
        ("whole", "cdn", {}, rf"{URI}/{FILE}: cannot read at offset 7: the whole file was sent in response to a range"),
        ("status", "cdn", {"status": 403}, "Forbidden (HTTP 403). Check HF_TOKEN and its rights, "),
        ("status", "resolve", {"status": 404}, "Not Found (HTTP 404). Check HF_TOKEN and its rights, "),
        ("elsewhere", "resolve", {"headers": {"Location": "/org/name/resolve"}}, "more than 5 redirects"),
        ("elsewhere", "resolve", {"headers": {"Location": "ftp://x/y"}}, "no address"),
        (
            "status",
            "resolve",
            {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}},
            AS_ID + "it needs access: accept its terms on huggingface.co and set HF_TOKEN.",
        ),
    ],
)
def test_a_final_refusal_is_told_at_once(
    hub: HubEmulator, store: HubStore, kind: str, request_: str, options: dict[str, object], message: str
) -> None:
    hub.fail(kind, request_, times=1000, **options)
    with pytest.raises(StorageError, match=re.escape(message)):
        read(store, 7, 1)
    assert len(hub.requests("cdn|resolve")) <= 5


@pytest.mark.slow
def test_a_lasting_outage_tells_the_last_answer(hub: HubEmulator, store: HubStore) -> None:
    hub.fail("status", "cdn", times=1000)
    expected = (
        rf"^{URI}/{FILE}: cannot read at offset 5: gave up after \d+ tries in .*: Service Unavailable \(HTTP 503\)"
    )
    with pytest.raises(TransientStorageError, match=expected):
        read(store, 5, 10)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "hf://none",
            "none: no such directory, and not a Hugging Face id (org/name) either. Check the path or the id.",
        ),
        ("hf://a/b/c@main", "a/b/c: no such directory, and not a Hugging Face id (org/name) either."),
        ("hf://org/none", "org/none: no such directory, and as a Hugging Face id it is not found: check the name, or"),
        ("hf://org/name@refs/pr/1", AS_ID + "it has no revision 'refs/pr/1': check --revision."),
    ],
)
def test_a_model_that_cannot_be_had(client: HubClient, uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=re.escape(message)):
        HubStore(uri, client)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, AS_ID + "it needs access: accept its terms"),
        (401, {}, AS_ID + "it is not found: check the name, or set HF_TOKEN if it is private."),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            AS_ID + "it could not be downloaded: Invalid credentials in Authorization header (HTTP 401)",
        ),
        pytest.param(503, {}, AS_ID + "it cannot be reached: gave up after ", marks=pytest.mark.slow),
    ],
)
def test_a_listing_refused(
    hub: HubEmulator, client: HubClient, status: int, headers: dict[str, str], message: str
) -> None:
    hub.fail("status", "api", status=status, headers=headers, times=1000)
    with pytest.raises(StorageError, match=re.escape(message)):
        HubStore("hf://org/name", client)


@pytest.mark.slow
def test_an_endpoint_that_is_no_hub_or_not_there(hub: HubEmulator, client: HubClient) -> None:
    hub.revisions["main"] = "main"
    with pytest.raises(StorageError, match=r"blobs=true: expected a listing .* got something else .*Check HF_ENDPOINT"):
        HubStore("hf://org/name", client)
    client.endpoint = "http://127.0.0.1:9"
    with pytest.raises(
        TransientStorageError, match=r"it cannot be reached: gave up .*Check the connection and HF_ENDP"
    ):
        HubStore("hf://org/name", client)


def test_names_and_reads_beyond_the_end_are_refused(store: HubStore) -> None:
    with pytest.raises(StorageError, match="early: wanted 1,000 bytes at offset 20,000,000, got 3"):
        read(store, len(DATA) - 3, 1000)
    with pytest.raises(StorageError, match=rf"^{URI}/pytorch_model.bin: cannot read: there is no such file"):
        store.size("pytorch_model.bin")
    with pytest.raises(StorageError, match="is not a name inside"):
        store.read("../config.json", 99)
    store.close()
    with pytest.raises(StorageError, match=f"{URI}: read after its store was closed"):
        read(store)


def podquant(hub: HubEmulator, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that reads `HF_ENDPOINT` when it starts."""
    variables = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-m", "podquant.cli.main", *arguments, "--quantization-config-path", "int8.yaml"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


@pytest.mark.slow
def test_converted_from_the_hub_a_model_is_the_same_and_is_read_once(hub: HubEmulator, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head")
    weights = {f"{name}.weight": random.standard_normal((1024, 1024), np.float32).astype(np.float16) for name in names}
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 1}).encode()
    hub.models["org/name"] = {FILE: save(weights), "config.json": config, "tokenizer.json": b"{}"}
    local = tmp_path / "model"
    local.mkdir()
    for name, data in hub.models["org/name"].items():
        (local / name).write_bytes(data)
    hub.revisions["v1"] = COMMIT

    done = podquant(
        hub, tmp_path, "convert", "org/name", str(tmp_path / "a"), "--weights-only", "--revision", "v1", HF_TOKEN="hf_x"
    )
    assert done.returncode == 0, done.stderr
    total = sum(map(len, hub.models["org/name"].values()))
    assert total <= sum(record.nbytes for record in hub.log) <= 1.02 * total
    assert {record.token for record in hub.requests("^cdn")} == {None}
    assert len(hub.requests("api/models")) == 1
    assert not (tmp_path / "hub").exists()  # nothing was downloaded

    assert podquant(hub, tmp_path, "convert", str(local), str(tmp_path / "b"), "--weights-only").returncode == 0
    here, there = files(tmp_path / "a"), files(tmp_path / "b")
    manifest = here.pop("podquant.json")
    assert f'"org/name@{COMMIT}"'.encode() in manifest
    there.pop("podquant.json")
    assert here == there

    asked = len(hub.log)
    done = podquant(hub, tmp_path, "convert", "org/name", str(tmp_path / "c"), HF_HUB_OFFLINE="1")
    assert (done.returncode, len(hub.log)) == (1, asked)
    assert "it is not in the cache and cannot be downloaded: check the connection and HF_HUB_OFFLINE." in done.stderr
    done = podquant(hub, tmp_path, "convert", "org/none", str(tmp_path / "c"))
    assert done.stderr.splitlines()[-1].startswith("error: org/none: no such directory, and as a Hugging Face id it is")


@pytest.mark.slow
def test_a_process_ends_without_a_warning(hub: HubEmulator) -> None:
    script = f"from podquant.storage.store import open_store; print(open_store('{URI}').read('config.json', 99))"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, env={"HF_ENDPOINT": hub.url}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("b'{}'\n", "", 0)
    script = "from podquant.storage.store import open_store; open_store('hf://org/name')"
    command = [sys.executable, "-c", script]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "it is not in the cache and cannot be downloaded" in done.stderr
