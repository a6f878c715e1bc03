"""The routes that run no request: what is served, how it is doing, and text to tokens and back."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response

from podquant.errors import RequestError, RequestTooLongError
from podquant.server.bodies import BodyRoute
from podquant.server.chat import encode_chat
from podquant.server.errors import RETRY, error_response
from podquant.server.metrics import CONTENT_TYPE
from podquant.server.off_loop import off_loop
from podquant.server.schemas import DetokenizeBody, TokenizeBody
from podquant.server.service import encode, require_tokenizer, service_of

router = APIRouter(route_class=BodyRoute)
metrics_router = APIRouter()

_STARTED = int(time.time())
_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


@router.get("/health")
async def health(http: HttpRequest) -> JSONResponse:
    """200 while the server can serve; 503 with the phase while it loads, or the reason once its engine has failed."""
    service = service_of(http)
    if service.engine is None:
        return error_response(503, f"Loading: the server is {service.phase}.", code="loading", headers=RETRY)
    if service.engine.failure is not None:
        return error_response(503, f"The engine has failed: {service.engine.failure}.", code="engine_failed")
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(http: HttpRequest) -> JSONResponse:
    """200 when requests are taken: weights loaded, shapes compiled."""
    service = service_of(http)
    engine = service.engine
    if engine is not None and engine.is_ready:
        return JSONResponse({"status": "ready"})
    failure = engine.failure if engine else f"the server is {service.phase}"
    reason = failure or "the server is shutting down"
    return error_response(503, f"Not ready: {reason}.", code="not_ready", headers=RETRY)


@metrics_router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Prometheus' text format."""
    return Response(service_of(http).metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/v1/models")
async def models(http: HttpRequest) -> JSONResponse:
    """The one model there is."""
    service = service_of(http)
    engine = service.require()
    model = {
        "id": service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "podquant",
        "root": engine.model_name,
        "max_model_len": engine.limits.longest,
    }
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/get_model_info")
async def model_info(http: HttpRequest) -> JSONResponse:
    """The model and its limits."""
    service = service_of(http)
    engine = service.require()
    return JSONResponse(
        {
            "model_path": engine.model_name,
            "served_model_name": service.model_name,
            "is_generation": True,
            "context_length": engine.limits.context_length,
            "vocab_size": engine.limits.vocab_size,
            "max_logprobs": engine.limits.max_logprobs,
            "has_tokenizer": engine.tokenizer is not None,
            "has_chat_template": engine.tokenizer is not None and engine.tokenizer.has_chat_template,
        }
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, http: HttpRequest) -> JSONResponse:
    """Token ids of a text or a chat."""
    engine = service_of(http).require(body.model)
    if body.messages is not None:
        ids = await encode_chat(require_tokenizer(engine, "messages"), body.messages, engine.limits)
    else:
        tokenizer = require_tokenizer(engine, "prompt")
        ids = await encode(
            tokenizer, body.prompt or "", add_special_tokens=body.add_special_tokens, limits=engine.limits
        )
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.limits.longest})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, http: HttpRequest) -> JSONResponse:
    """The text of token ids."""
    engine = service_of(http).require(body.model)
    tokenizer = require_tokenizer(engine, "tokens")
    if len(body.tokens) > engine.limits.longest:
        raise RequestTooLongError(
            f"{len(body.tokens)} tokens are more than a prompt and its output have room for, {engine.limits.longest}. "
            "Send them in parts.",
            "tokens",
        )
    vocab_size = engine.limits.vocab_size
    wrong = next((token for token in body.tokens if token >= vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens holds {wrong}; this model's ids are 0 to {vocab_size - 1}.", "tokens")

    def work() -> str:
        return tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)

    return JSONResponse({"prompt": await off_loop(len(body.tokens), work)})


@router.get("/status")
async def status(http: HttpRequest) -> JSONResponse:
    """The live load the page shows."""
    service = service_of(http)
    engine = service.require()
    stats: dict[str, Any] = vars(engine.stats())
    return JSONResponse(stats)


@router.get("/")
async def page(http: HttpRequest) -> HTMLResponse:
    """A page to chat on."""
    name = service_of(http).model_name or "loading"
    filled = _PAGE.replace("{{model}}", html.escape(name)).replace("{{model_json}}", _script_string(name))
    return HTMLResponse(filled, headers={"Content-Security-Policy": _PAGE_POLICY})


def _script_string(text: str) -> str:
    return json.dumps(text).replace("<", "\\u003c")  # no name may end the script
