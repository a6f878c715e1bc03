"""A model with its own defaults of sampling, a BOS, and a KV cache smaller than its context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from podquant.engine.engine import LocalEngine
from podquant.engine.options import EngineOptions
from podquant.engine.start import load_defaults, open_model
from podquant.errors import ConfigError
from tests.server.conftest import make_engine, serving, tokenizer_of

CACHE = 64
CHAT = {"messages": [{"role": "user", "content": "def"}]}


@pytest.fixture(scope="module")
def recommending(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recommending")
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    settings = {"temperature": 5.0, "top_k": 1, "repetition_penalty": 50.0, "max_new_tokens": 7}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def own(recommending: Path) -> Iterator[LocalEngine]:
    engine = make_engine(recommending, max_total_tokens=CACHE)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def own_client(own: LocalEngine) -> Iterator[httpx.Client]:
    with serving(own) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ids_of(client: httpx.Client, **body: Any) -> list[int]:
    answer = client.post("/v1/completions", json={"return_token_ids": True, "ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def test_what_a_request_does_not_say_the_model_does(own_client: httpx.Client) -> None:
    told = {"temperature": 0, "repetition_penalty": 50.0, "max_tokens": 7}
    assert ids_of(own_client, prompt="def") == ids_of(own_client, prompt="def", **told)
    long: dict[str, Any] = {"prompt": "def", "max_tokens": 50}
    penalized, plain = ids_of(own_client, **long), ids_of(own_client, **long, repetition_penalty=1)
    assert penalized == ids_of(own_client, **(told | long))
    assert plain == ids_of(own_client, **(told | long | {"repetition_penalty": 1}))
    assert penalized != plain
    assert len(ids_of(own_client, prompt="def", min_tokens=9)) == 9
    assert own_client.post("/v1/chat/completions", json=CHAT).json()["usage"]["completion_tokens"] <= 7


def test_an_empty_prompt_is_the_bos(own_client: httpx.Client) -> None:
    body = {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
    for prompt in ("", None, [""]):
        answer = own_client.post("/v1/completions", json=body | {"prompt": prompt}).json()
        assert answer["choices"][0]["prompt_token_ids"] == [1]
        assert answer["usage"]["prompt_tokens"] == 1


def test_left_out_the_length_is_what_the_cache_has_room_for(recommending: Path, own: LocalEngine) -> None:
    bare = make_engine(recommending, max_total_tokens=CACHE, generation_config="none")
    try:
        with serving(bare) as url, httpx.Client(base_url=url, timeout=60) as client:
            longest = client.get("/v1/models").json()["data"][0]["max_model_len"]
            assert longest == bare.limits.longest < bare.limits.context_length
            num_prompt = len(tokenizer_of(own).encode("def"))
            assert len(ids_of(client, prompt="def", temperature=0)) == longest - num_prompt
            answer = client.post("/v1/chat/completions", json=CHAT | {"ignore_eos": True}).json()
            assert answer["usage"]["total_tokens"] == longest
    finally:
        bare.stop()


def test_another_directory_or_none(recommending: Path, checkpoint: Path, tmp_path: Path) -> None:
    def defaults(generation_config: str) -> str:
        options = EngineOptions(str(recommending), device="cpu", generation_config=generation_config)
        with open_model(options) as opened:
            return str(load_defaults(opened))

    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    assert "top_k 1" in defaults("auto")
    assert defaults("none") == ""
    assert defaults(str(tmp_path)) == "top_p 0.5"
    with pytest.raises(ConfigError, match=r"expected auto, none, or a directory with a generation_config\.json"):
        defaults(str(checkpoint))
