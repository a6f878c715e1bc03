"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from podquant.engine.backend import Backend
from podquant.engine.request import Output, Request, TokenLogprobs
from podquant.errors import RequestError
from podquant.server.bodies import BodyRoute
from podquant.server.collect import collect, usage, usage_of_event
from podquant.server.off_loop import off_loop
from podquant.server.schemas import CompletionBody
from podquant.server.service import encode, require_prompts_fit, require_tokenizer, service_of
from podquant.server.stream import EventStream, Template, event
from podquant.server.token_text import TextOffsets, TokenText

router = APIRouter(route_class=BodyRoute)


@dataclass(frozen=True)
class _Prompt:
    ids: tuple[int, ...]
    text: str


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionBody, http: HttpRequest) -> Response:
    """Continue one or several prompts."""
    service = service_of(http)
    engine = service.require(body.model)
    prompts = await _read_all(engine, body)
    require_prompts_fit(sum(len(prompt.ids) for prompt in prompts) * body.n, engine.limits)
    writer = _Writer(str(service.model_name), service.tokens, engine, body, prompts)
    requests = [
        Request(
            f"{writer.id}-{p * body.n + choice}",
            prompt.ids,
            body.params(choice, engine.limits.room(len(prompt.ids)), engine.defaults),
            body.cache_salt or "",
        )
        for p, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]
    generation = service.generation(engine, requests)
    if body.stream:
        return EventStream(generation, writer)
    outputs = await collect(generation, len(requests))
    size = sum(len(request.prompt_ids) for request in requests)
    return await off_loop(size, lambda: JSONResponse(writer.whole(outputs)))


async def _read_all(engine: Backend, body: CompletionBody) -> list[_Prompt]:
    """Every prompt; a text that is as the one before it is not tokenized again."""
    for prompt in body.prompt:
        if not isinstance(prompt, str):
            engine.limits.check_length(len(prompt), 0, "prompt")
    prompts: list[_Prompt] = []
    for prompt in body.prompt:
        if not isinstance(prompt, str):
            prompts.append(_Prompt(tuple(prompt), ""))
        elif prompts and prompt and prompts[-1].text == prompt:
            prompts.append(prompts[-1])
        else:
            prompts.append(await _read(engine, prompt, add_special_tokens=body.add_special_tokens))
    return prompts


async def _read(engine: Backend, prompt: str, *, add_special_tokens: bool) -> _Prompt:
    tokenizer = require_tokenizer(engine, "prompt")
    ids = await encode(tokenizer, prompt, add_special_tokens=add_special_tokens, limits=engine.limits)
    if not ids:
        raise RequestError(
            "The prompt is empty, and this model's tokenizer begins no text with a token of its own; send a text.",
            "prompt",
        )
    return _Prompt(tuple(ids), prompt)


@dataclass
class _Progress:
    """How far a choice has come."""

    offsets: TextOffsets
    has_begun: bool = False
    num_tokens: int = 0
    num_cached: int = 0


@dataclass
class _Logprobs:
    """OpenAI's parallel lists."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


class _Writer:
    """Writes what the choices of one HTTP request give, whole or in chunks."""

    def __init__(
        self, model: str, tokens: TokenText, engine: Backend, body: CompletionBody, prompts: Sequence[_Prompt]
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tokenizer = engine.tokenizer
        self._shows_ids = body.return_token_ids or engine.tokenizer is None
        self._tokens = tokens
        self._body = body
        self._prompts = prompts
        self._progress = [_Progress(TextOffsets(tokens)) for _ in range(len(prompts) * body.n)]
        self._templates = [
            Template(self._chunk(self._choice(index, Template.HOLE, None, None)))
            for index in range(len(self._progress))
        ]

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        for progress, output in zip(self._progress, outputs, strict=True):
            progress.num_cached = output.num_cached
        choices = [self._render(index, output) for index, output in enumerate(outputs)]
        return self._head | {"choices": choices, "usage": self._usage()}

    def chunk(self, index: int, output: Output) -> bytes:
        """See `Chunks`."""
        body, progress = self._body, self._progress[index]
        progress.num_cached += output.num_cached
        is_plain = (
            (progress.has_begun or not body.echo) and not self._shows_ids and not body.stream_options.counts_always
        )
        if is_plain and output.finish_reason is None and not output.logprobs:
            progress.num_tokens += len(output.token_ids)
            return self._templates[index].fill(output.text) if output.text else b""
        return event(self._chunk(self._render(index, output)))

    def end(self) -> bytes:
        """See `Chunks`."""
        if not self._body.stream_options.include_usage:
            return b""
        return event(self._head | {"choices": [], "usage": self._usage()})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"choices": [choice]} | usage_of_event(self._body.stream_options, self._usage())

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _render(self, index: int, output: Output) -> dict[str, Any]:
        """A choice, or what is new of it."""
        body, progress = self._body, self._progress[index]
        prompt = self._prompts[index // body.n]
        echoes = body.echo and not progress.has_begun
        prompt_text = self._text_of(prompt) if echoes else ""
        logprobs = self._logprobs(progress, prompt if echoes else None, len(prompt_text), output)
        choice = self._choice(index, prompt_text + output.text, logprobs, output.finish_reason)
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if self._shows_ids:
            choice["token_ids"] = list(output.token_ids)
        if body.return_token_ids and not progress.has_begun:
            choice["prompt_token_ids"] = list(prompt.ids)
        progress.has_begun = True
        progress.num_tokens += len(output.token_ids)
        return choice

    def _text_of(self, prompt: _Prompt) -> str:
        return prompt.text or (self._tokenizer.decode(prompt.ids) if self._tokenizer else "")

    def _logprobs(
        self, progress: _Progress, echoed: _Prompt | None, prompt_length: int, output: Output
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        lists = _Logprobs()
        if echoed is not None:
            known = output.prompt_logprobs or (None,) * len(echoed.ids)
            offsets = progress.offsets.of_prompt(echoed.ids, prompt_length)
            for token_id, entry, offset in zip(echoed.ids, known, offsets, strict=True):
                self._add(lists, offset, token_id, entry)
        for entry in output.logprobs:
            self._add(lists, progress.offsets.next(entry.token_id), entry.token_id, entry)
        return vars(lists)

    def _add(self, lists: _Logprobs, offset: int, token_id: int, entry: TokenLogprobs | None) -> None:
        lists.tokens.append(self._tokens.text(token_id))
        lists.token_logprobs.append(entry.logprob if entry else None)
        lists.text_offset.append(offset)
        top: dict[str, float] | None = None
        if entry:
            top = {}
            for other, logprob in (*entry.top, (token_id, entry.logprob)):
                top.setdefault(self._tokens.text(other), logprob)  # of two tokens written alike, the likelier
        lists.top_logprobs.append(top)

    def _usage(self) -> dict[str, Any]:
        first_choices = self._progress[:: self._body.n]  # each prompt counts once
        return usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            sum(one.num_tokens for one in self._progress),
            sum(one.num_cached for one in first_choices),
        )
