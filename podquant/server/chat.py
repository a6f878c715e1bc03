"""`POST /v1/chat/completions`: the checkpoint's chat template around the messages, then as for completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from podquant.engine.limits import Limits
from podquant.engine.request import Output, Request, TokenLogprobs
from podquant.server.bodies import BodyRoute
from podquant.server.collect import collect, usage, usage_of_event
from podquant.server.messages import Message
from podquant.server.off_loop import off_loop
from podquant.server.schemas import ChatBody
from podquant.server.service import require_prompts_fit, require_tokenizer, require_unicode, service_of, within
from podquant.server.stream import EventStream, Template, event
from podquant.server.token_text import TokenText
from podquant.tokenizer.tokenizer import Tokenizer

router = APIRouter(route_class=BodyRoute)

_CHATS = ThreadPoolExecutor(4, "chats")
"""Threads of their own: those that wait for a template that does not end hold up no other work."""


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, http: HttpRequest) -> Response:
    """Answer a chat."""
    service = service_of(http)
    engine = service.require(body.model)
    tokenizer = require_tokenizer(engine, "messages")
    prompt_ids = tuple(await encode_chat(tokenizer, body.messages, engine.limits))
    require_prompts_fit(len(prompt_ids) * body.n, engine.limits)
    writer = _Writer(str(service.model_name), service.tokens, body, prompt_ids)
    room = engine.limits.room(len(prompt_ids))
    requests = [
        Request(f"{writer.id}-{choice}", prompt_ids, body.params(choice, room, engine.defaults), body.cache_salt or "")
        for choice in range(body.n)
    ]
    generation = service.generation(engine, requests)
    if body.stream:
        return EventStream(generation, writer)
    outputs = await collect(generation, len(requests))
    size = sum(len(request.prompt_ids) for request in requests)
    return await off_loop(size, lambda: JSONResponse(writer.whole(outputs)))


async def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], limits: Limits) -> list[int]:
    """The prompt of a chat. Raises RequestError if the template refuses the messages, or they exceed the limits."""

    def work() -> list[int]:
        chat = [message.as_template_sees_it() for message in messages]
        for text in _texts(chat):
            require_unicode(text, "messages")
        ids = within(limits, "messages", lambda most: tokenizer.encode_chat(chat, most=most))
        limits.check_length(len(ids), 1, "messages")
        return ids

    return await asyncio.get_running_loop().run_in_executor(_CHATS, work)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _texts(each)


class _Writer:
    """Writes what the choices of one chat give, whole or in chunks."""

    def __init__(self, model: str, tokens: TokenText, body: ChatBody, prompt_ids: tuple[int, ...]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": model}
        self._tokens = tokens
        self._body = body
        self._prompt_ids = prompt_ids
        self._num_generated = self._num_cached = 0
        self._has_begun = [False] * body.n
        self._templates = [Template(self._chunk(index, {"content": Template.HOLE})) for index in range(body.n)]

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        choices = []
        self._num_cached = outputs[0].num_cached
        for index, output in enumerate(outputs):
            self._num_generated += len(output.token_ids)
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": output.text},
                "logprobs": self._logprobs(output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
            choices.append(choice | self._token_ids(output, is_first=True))
        return self._head | {"choices": choices, "usage": self._usage()}

    def chunk(self, index: int, output: Output) -> bytes:
        """See `Chunks`: the role before the first text, the finish reason after the last."""
        self._num_generated += len(output.token_ids)
        self._num_cached += output.num_cached if index == 0 else 0
        is_first, self._has_begun[index] = not self._has_begun[index], True
        events = b""
        if is_first:
            events = event(self._chunk(index, {"role": "assistant", "content": ""}))
        if output.logprobs or (output.token_ids and self._body.return_token_ids):
            more = self._token_ids(output, is_first=is_first)
            events += event(self._chunk(index, {"content": output.text}, self._logprobs(output), more=more))
        elif output.text and self._body.stream_options.counts_always:
            events += event(self._chunk(index, {"content": output.text}))
        elif output.text:
            events += self._templates[index].fill(output.text)
        if output.finish_reason is not None:
            more = {"stop_reason": output.stop_reason}
            events += event(self._chunk(index, {}, reason=output.finish_reason, more=more))
        return events

    def end(self) -> bytes:
        """See `Chunks`."""
        if not self._body.stream_options.include_usage:
            return b""
        return event(self._head | {"choices": [], "usage": self._usage()})

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        *,
        reason: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason} | (more or {})
        return self._head | {"choices": [choice]} | usage_of_event(self._body.stream_options, self._usage())

    def _usage(self) -> dict[str, Any]:
        return usage(len(self._prompt_ids), self._num_generated, self._num_cached)

    def _token_ids(self, output: Output, *, is_first: bool) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": list(self._prompt_ids)} if is_first else {}
        return {"token_ids": list(output.token_ids)} | prompt

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._entry(entry) for entry in output.logprobs]}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._tokens.text(token_id), "logprob": logprob, "bytes": self._tokens.data(token_id)}
