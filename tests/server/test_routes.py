"""Everything but completions: the other routes, the errors, and what happens to a client that goes away."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from podquant.engine.engine import LocalEngine
from tests.server.conftest import MODEL, make_engine, serving, tokenizer_of

ASK = {"model": MODEL, "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 4}


def test_models_health_and_readiness(client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_tokenize_and_detokenize_are_inverse(engine: LocalEngine, client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "def encode"}).json()["tokens"]
    assert tokens == tokenizer_of(engine).encode("def encode")
    assert "def encode" in str(client.post("/detokenize", json={"tokens": tokens}).json())


def test_metrics_count_requests_and_tokens(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    name = next(
        line.split()[2]
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("# TYPE") and "generated" in line and "counter" in line
    ).removesuffix("_total")
    before = value(f"{name}_total")
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert value(f"{name}_total") == before + 4


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "another"}, 404, "model"),
        ({"prompt": [1, 2, 512]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": list(range(500)), "max_tokens": 100}, 400, "max_tokens"),
        ({"logprobs": 6}, 400, "logprobs"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": "4"}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty"),
        ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"best_of": 3}, 400, "best_of"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"tempratuer": 1}, 400, "tempratuer"),
    ],
)
def test_bad_input_is_refused_by_name(client: httpx.Client, change: dict[str, Any], status: int, param: str) -> None:
    answer = client.post("/v1/completions", json=ASK | change)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text


def test_neutral_values_are_taken(client: httpx.Client) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1}
    assert client.post("/v1/completions", json=ASK | neutral).status_code == 200


def test_a_body_that_is_no_json(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert client.get("/nowhere").status_code == 404


def test_a_key_guards_all_but_the_probes(engine: LocalEngine) -> None:
    with serving(engine, api_key="secret") as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/completions", json=ASK).status_code == 401
        wrong = {"authorization": "Bearer wrong"}
        assert client.get("/v1/models", headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.post("/v1/completions", json=ASK, headers=right).status_code == 200
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


def test_before_a_model_is_loaded() -> None:
    with serving(None) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path, code in (("/health", "loading"), ("/ready", "not_ready")):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
            assert "opening the model" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json=ASK).status_code == 503


def wait_until_idle(engine: LocalEngine) -> None:
    deadline = time.monotonic() + 20
    while engine.stats().num_running or engine.stats().num_pages_used:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(engine: LocalEngine, client: httpx.Client, stream: bool) -> None:
    before = engine.stats().num_generated_tokens
    ask = ASK | {"max_tokens": 480, "n": 8, "stream": stream, "ignore_eos": True}
    if stream:
        with client.stream("POST", "/v1/completions", json=ask) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=ask, timeout=0.05)
    wait_until_idle(engine)
    assert engine.stats().num_generated_tokens - before < 8 * 480


def test_a_full_queue_says_when_to_come_back(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, max_running_requests=1, max_queued_requests=1)
    try:
        with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
            long = ASK | {"max_tokens": 400, "ignore_eos": True, "n": 4}
            refused = client.post("/v1/completions", json=long)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            wait_until_idle(engine)  # the choices that were taken have been given up
    finally:
        engine.stop()


def test_an_engine_that_fails_is_told(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    try:
        with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
            ask = ASK | {"max_tokens": 480, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=ask) as stream:
                lines = stream.iter_lines()
                next(lines)
                engine._executor._weights = ()  # the next step cannot run
                events = [line for line in lines if line]
            assert events[-1] == "data: [DONE]"
            error = json.loads(events[-2].removeprefix("data: "))["error"]
            assert (error["type"], error["code"]) == ("server_error", "unavailable")
            answer = client.post("/v1/completions", json=ASK)
            assert answer.status_code == 503
            health = client.get("/health")
            assert health.status_code == 503
            assert engine.failure
            assert engine.failure.partition(":")[0] in health.text
            assert client.post("/v1/completions", json=ASK).status_code == 503
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": "the river " * 300_000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the river " * 300_000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the river " * 600}]}, "messages"),
    ],
)
def test_a_prompt_beyond_the_context_is_refused_as_clients_expect(
    client: httpx.Client, route: str, body: dict[str, object], param: str
) -> None:
    answer = client.post(route, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "maximum context length is 512 tokens" in error["message"]
