"""The HTTP side of an engine, as an ASGI app: routes, guard and errors together. Knows nothing of sockets or flags."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from podquant.engine.backend import Backend
from podquant.server import chat, completions, errors, info
from podquant.server.guard import BODY_SECONDS, Guard
from podquant.server.service import Service

MAX_BODY_BYTES = 16 << 20


def create_app(
    engine: Backend | None,
    *,
    api_key: str | None = None,
    served_model_name: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_seconds: float = BODY_SECONDS,
    with_metrics: bool = True,
) -> FastAPI:
    """An app that serves an engine.

    Args:
        engine: started, or None while it loads: until `attach_engine`, what needs it is answered with 503.
        api_key: what callers must send as a bearer token; None asks for nothing.
        served_model_name: what callers call the model; None for the engine's own name.
        max_body_bytes: a longer body is refused.
        body_seconds: one that takes longer, and is slow, is refused.
        with_metrics: whether there is /metrics.
    """
    service = Service(engine, served_model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.open()
        yield
        service.close()

    app = FastAPI(title="podquant", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(completions.router)
    app.include_router(chat.router)
    app.include_router(info.router)
    if with_metrics:
        app.include_router(info.metrics_router)
    errors.install(app)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes, body_seconds=body_seconds)
    return app


def tell_phase(app: FastAPI, phase: str) -> None:
    """What /health and /ready of an app without an engine say it is doing; may be called from any thread."""
    service: Service = app.state.service
    service.phase = phase


def attach_engine(app: FastAPI, engine: Backend) -> None:
    """Give an app made without an engine its engine; may be called from any thread."""
    if engine.tokenizer is not None:
        engine.tokenizer.isolate_template(start=True)
    service: Service = app.state.service
    service.attach(engine)
