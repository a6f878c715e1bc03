"""SmolLM2-135M-Instruct against what transformers makes of it, and what int8.yaml makes of its weights."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.app.demo.model import write_smollm2_checkpoint
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.engine.engine import LocalEngine
from podquant.engine.options import EngineOptions
from podquant.engine.request import Output, Request, SamplingParams
from podquant.engine.start import start_engine

pytestmark = pytest.mark.slow

CASES = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())["cases"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    write_smollm2_checkpoint(target)
    return target


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[LocalEngine]:
    engine = start_engine(
        EngineOptions(
            model_path=str(checkpoint),
            device="cpu",
            dtype="float32",
            max_running_requests=len(CASES),
            context_length=256,
            chunked_prefill_size=64,
            page_size=16,
            skip_server_warmup=True,
        )
    )
    engine.start()
    yield engine
    engine.stop()


def test_greedy_tokens_are_those_of_transformers(engine: LocalEngine) -> None:
    """All prompts at once: each must come out as it does alone, token for token."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    for case in CASES:
        params = SamplingParams(max_tokens=len(case["greedy_ids"]), temperature=0.0, ignore_eos=True)
        engine.submit(Request(case["name"], tuple(case["prompt_ids"]), params), outputs.put)
    tokens: dict[str, list[int]] = {case["name"]: [] for case in CASES}
    texts = dict.fromkeys(tokens, "")
    running = len(CASES)
    while running:
        output = outputs.get(timeout=120)
        tokens[output.request_id] += output.token_ids
        texts[output.request_id] += output.text
        running -= output.finish_reason is not None
    assert tokens == {case["name"]: case["greedy_ids"] for case in CASES}
    assert texts == {case["name"]: case["text"] for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_prompts_become_the_tokens_of_transformers(engine: LocalEngine, case: dict[str, Any]) -> None:
    assert engine.tokenizer is not None
    if "messages" in case:
        prompt = engine.tokenizer.apply_chat_template(case["messages"])
        assert engine.tokenizer.encode(prompt, add_special_tokens=False) == case["prompt_ids"]
    else:
        assert engine.tokenizer.encode(case["prompt"]) == case["prompt_ids"]


def test_int8_keeps_forty_decibels(checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(str(checkpoint))
    plan = plan_conversion(source, load_quantization_config("int8.yaml"), source_name="SmolLM2-135M-Instruct")
    convert(source, plan, str(tmp_path / "artifact"), threads=2)
    source.close()
    quality = json.loads((tmp_path / "artifact" / "quality.json").read_text())["tensors"]
    sqnr = np.asarray([figures["sqnr_db"] for figures in quality.values()])
    assert len(sqnr) == 211
    assert sqnr.mean() >= 41.0
    assert sqnr.min() >= 38.0
