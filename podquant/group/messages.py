"""Requests and their outputs as JSON's values, on the way between a server and the process that runs the engine.

Floats survive exactly: JSON writes them with as many digits as they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from podquant.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs


def encode_request(request: Request) -> dict[str, Any]:
    """A request."""
    return {"id": request.id, "prompt_ids": request.prompt_ids, "params": asdict(request.params)}


def decode_request(value: Mapping[str, Any]) -> Request:
    """The request behind `encode_request`."""
    params = dict(value["params"])
    for name in ("stop", "stop_token_ids"):
        params[name] = tuple(params[name])
    return Request(value["id"], tuple(value["prompt_ids"]), SamplingParams(**params))


def encode_output(output: Output) -> dict[str, Any]:
    """News of a request; what is empty is left out."""
    value: dict[str, Any] = {"id": output.request_id, "tokens": output.token_ids, "text": output.text}
    if output.logprobs:
        value["logprobs"] = [_encode(entry) for entry in output.logprobs]
    if output.prompt_logprobs:
        value["prompt_logprobs"] = [None if entry is None else _encode(entry) for entry in output.prompt_logprobs]
    if output.finish_reason is not None:
        value |= {"finish": output.finish_reason.value, "stop": output.stop_reason, "error": output.error}
    return value


def decode_output(value: Mapping[str, Any]) -> Output:
    """The output behind `encode_output`."""
    finish = value.get("finish")
    return Output(
        value["id"],
        token_ids=tuple(value["tokens"]),
        text=value["text"],
        logprobs=tuple(_decode(entry) for entry in value.get("logprobs", ())),
        prompt_logprobs=tuple(None if e is None else _decode(e) for e in value.get("prompt_logprobs", ())),
        finish_reason=None if finish is None else FinishReason(finish),
        stop_reason=value.get("stop"),
        error=value.get("error"),
    )


def _encode(entry: TokenLogprobs) -> list[Any]:
    return [entry.token_id, entry.logprob, entry.top]


def _decode(value: list[Any]) -> TokenLogprobs:
    token_id, logprob, top = value
    return TokenLogprobs(token_id, logprob, tuple((token, each) for token, each in top))
