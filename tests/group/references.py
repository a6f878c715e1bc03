"""What one process answers, and artifacts of the goldens: what groups are held to."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.engine.options import EngineOptions
from podquant.engine.request import Request, SamplingParams
from podquant.engine.start import start_engine
from tests.group.hosts import PATIENCE

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], list(range(20, 60))]


def expected_tokens(model: Path, rules: str | None = None) -> list[list[int]]:
    """What one process answers."""
    options = EngineOptions(
        str(model),
        rules,
        device="cpu",
        dtype="float32",
        max_running_requests=2,
        chunked_prefill_size=32,
        max_total_tokens=2048,
        skip_tokenizer_init=True,
        skip_server_warmup=True,
    )
    engine = start_engine(options)
    engine.start()
    answers = []
    try:
        for number, prompt in enumerate(PROMPTS):
            tokens: list[int] = []
            is_done = threading.Event()

            def hear(output: Any, tokens: list[int] = tokens, is_done: threading.Event = is_done) -> None:
                tokens.extend(output.token_ids)
                if output.finish_reason is not None:
                    is_done.set()

            params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
            engine.submit(Request(str(number), tuple(prompt), params), hear)
            assert is_done.wait(PATIENCE)
            answers.append(tokens)
    finally:
        engine.stop()
    return answers


def make_artifact(model: Path, place: Path, rules: str, tp_size: int) -> Path:
    with closing(Checkpoint.open(str(model))) as checkpoint:
        plan = plan_conversion(checkpoint, load_quantization_config(rules), source_name="model", tp_size=tp_size)
        convert(checkpoint, plan, str(place), threads=2)
    return place
