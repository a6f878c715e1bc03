"""A model in this process, for Python: load it, give it prompts, get texts.

Sits on a `Backend`, as the server does: prompts of one call, and of several threads, are computed together. Knows
nothing of HTTP, nor of how a model runs.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, Unpack, overload

from podquant.app.keywords import EngineKeywords, SamplingKeywords
from podquant.engine.backend import Backend
from podquant.engine.options import EngineOptions
from podquant.engine.request import FinishReason, Output, Request, SamplingParams
from podquant.engine.start import start_engine
from podquant.errors import EngineStoppedError, QueueFullError, RequestError
from podquant.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""

_numbers = itertools.count()


def load(
    model: str | os.PathLike[str] | EngineOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[EngineKeywords],
) -> Engine:
    """Load and compile a model in this process.

    >>> import podquant
    >>> with podquant.load(ARTIFACT, device="cpu", max_running_requests=1, skip_server_warmup=True) as engine:
    ...     text = engine.generate("Once upon a time", max_tokens=4)

    Args:
        model: an artifact or a Hugging Face checkpoint (a directory, `gs://…` or a Hugging Face id), or whole options.
        on_progress: told the bytes of the model read so far, and in all.
        options: fields of `EngineOptions`, such as `device`, `tp_size` or `quantization_config_path`.

    Raises:
        PodquantError: the options, the model, its tokenizer or the devices are not what they should be.
    """
    asked = model if isinstance(model, EngineOptions) else EngineOptions(os.fspath(model))
    engine = start_engine(replace(asked, **options), on_progress)
    engine.start()
    return Engine(engine)


class Engine:
    """A model that is loaded. May be used from several threads; a context manager, as it holds devices until closed.

    Every method that generates takes `SamplingParams`, or fields of it as keywords, or both: keywords replace fields.
    Without `SamplingParams`, fields that are not given are what the model's generation_config.json recommends.

    >>> from podquant import SamplingParams
    >>> greedy = SamplingParams(max_tokens=4, temperature=0)
    >>> engine.generate("Once upon a time", greedy) == engine.generate("Once upon a time", max_tokens=4, temperature=0)
    True

    Args:
        backend: ready to take requests; ended by `close`.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend: Backend | None = backend

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it was loaded to take and give token ids only."""
        return self._open().tokenizer

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, **changes: Unpack[SamplingKeywords]
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        params: SamplingParams | None = None,
        **changes: Unpack[SamplingKeywords],
    ) -> list[str]: ...
    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        params: SamplingParams | None = None,
        **changes: Unpack[SamplingKeywords],
    ) -> str | list[str]:
        """Continue a text, or several together.

        >>> texts = engine.generate(["Once upon a time", "The answer is"], max_tokens=4)
        >>> len(texts)
        2

        Returns:
            What follows the prompt, without it; a list for a list.

        Raises:
            RequestError: a prompt is empty or too long, or a parameter is not one that the model has.
            EngineStoppedError: the engine is closed, or has failed.
        """
        if isinstance(prompts, str):
            return self.complete([prompts], params, **changes)[0].text
        return [output.text for output in self.complete(prompts, params, **changes)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: Unpack[SamplingKeywords]
    ) -> Iterator[str]:
        """Continue a text, piece by piece as it is generated; to stop iterating ends the generation.

        >>> pieces = list(engine.stream("Once upon a time", max_tokens=4, temperature=0))
        >>> "".join(pieces) == engine.generate("Once upon a time", max_tokens=4, temperature=0)
        True

        Raises:
            As `generate`; what is wrong with the prompt or a parameter at once, the rest when iterated.
        """
        return self._pieces(self._request(prompt, params, changes))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        **changes: Unpack[SamplingKeywords],
    ) -> str:
        """The next message of a chat, by the model's chat template.

        >>> answer = engine.chat([{"role": "user", "content": "Hello!"}], max_tokens=4)

        Args:
            messages: as OpenAI has them, each with `role` and `content`.

        Raises:
            RequestError: as `generate`, or the model has no chat template, or it refuses the messages.
            EngineStoppedError: as `generate`.
        """
        prompt = self._tokenizer().encode_chat(messages)
        return self.complete([prompt], params, **changes)[0].text

    def complete(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **changes: Unpack[SamplingKeywords]
    ) -> list[Output]:
        """Continue texts or token ids, and tell all there is to know: tokens, why they end, log-probabilities.

        >>> (output,) = engine.complete([[5, 6, 7]], max_tokens=3, temperature=0, ignore_eos=True, logprobs=1)
        >>> len(output.token_ids), output.finish_reason.value, len(output.logprobs)
        (3, 'length', 3)

        Raises:
            As `generate`.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got a text; put it into a list")
        return self._run([self._request(prompt, params, changes) for prompt in prompts])

    def close(self) -> None:
        """End what runs and let go of the devices' memory; more than once does no harm."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.stop()

    def _open(self) -> Backend:
        if self._backend is None:
            raise EngineStoppedError("The engine is closed; load the model again.")
        return self._backend

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError(
                "The model was loaded without a tokenizer (skip_tokenizer_init): give token ids to `complete`.",
                "prompt",
            )
        return tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams | None, changes: SamplingKeywords) -> Request:
        ids = self._tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("prompt: expected at least one token, got an empty one.", "prompt")
        params = params or self._open().defaults.params()
        return Request(f"library-{next(_numbers)}", tuple(ids), replace(params, **changes))

    def _run(self, requests: Sequence[Request]) -> list[Output]:
        """All of the requests, as many at a time as the engine takes."""
        backend = self._open()
        news: SimpleQueue[Output] = SimpleQueue()
        waiting, running = deque(requests), set[str]()
        heard: dict[str, list[Output]] = {request.id: [] for request in requests}
        try:
            while waiting or running:
                _submit(backend, waiting, running, news)
                output = news.get()
                heard[output.request_id].append(output)
                if output.finish_reason is not None:
                    running.discard(output.request_id)
                    _check_ended(output)
        finally:
            for request_id in running:
                backend.abort(request_id)
        return [Output.join(heard[request.id]) for request in requests]

    def _pieces(self, request: Request) -> Iterator[str]:
        backend = self._open()
        news: SimpleQueue[Output] = SimpleQueue()
        backend.submit(request, news.put)
        is_running = True
        try:
            while is_running:
                output = news.get()
                is_running = output.finish_reason is None
                if output.text:
                    yield output.text
            _check_ended(output)
        finally:
            if is_running:
                backend.abort(request.id)


def _submit(backend: Backend, waiting: deque[Request], running: set[str], news: SimpleQueue[Output]) -> None:
    """Hand over what waits, up to what the backend's queue takes; at least one runs afterwards."""
    while waiting:
        try:
            backend.submit(waiting[0], news.put)
        except QueueFullError:
            if not running:
                raise
            return
        running.add(waiting.popleft().id)


def _check_ended(output: Output) -> None:
    if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        raise EngineStoppedError(f"The engine ended a request before its time: {output.error}.")
