"""A real engine on a tiny checkpoint with a tokenizer, behind a real server on a free port."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from podquant.engine.engine import LocalEngine
from podquant.engine.options import EngineOptions
from podquant.engine.start import start_engine
from podquant.server.app import create_app
from podquant.server.connections import ConnectionLimits
from podquant.server.http_server import HttpServer
from podquant.tokenizer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "llama"
MODEL = "tiny"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE over the golden's 512 ids, and a chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(tokenizers.__file__).read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == 512
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, directory / name)
    write_tokenizer(directory)
    return directory


def make_engine(checkpoint: Path, **more: Any) -> LocalEngine:
    """A started engine of few shapes, as each one takes seconds to compile."""
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_running_requests": 2,
        "max_queued_requests": 32,
        "chunked_prefill_size": 32,
        "page_size": 16,
        "skip_server_warmup": True,
        "max_logprobs": 5,
    }
    engine = start_engine(EngineOptions(model_path=str(checkpoint), **(options | more)))
    engine.start()
    return engine


def tokenizer_of(engine: LocalEngine) -> Tokenizer:
    """That which the engine was started with."""
    assert engine.tokenizer is not None
    return engine.tokenizer


@contextmanager
def serving(engine: LocalEngine | None, *, limits: ConnectionLimits | None = None, **more: Any) -> Iterator[str]:
    """The URL of a server over an engine."""
    server = HttpServer(create_app(engine, **({"served_model_name": MODEL} | more)), "127.0.0.1", 0, limits=limits)
    server.start()
    try:
        yield server.url
    finally:
        server.close()
        server.join(10)


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[LocalEngine]:
    engine = make_engine(checkpoint)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def url(engine: LocalEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
