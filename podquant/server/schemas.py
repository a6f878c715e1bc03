"""The bodies that the routes take, as far as their fields are honoured; `fields` says what becomes of the others.

Knows nothing of the engine but `SamplingParams` and their defaults.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import FailFast, Field, WithJsonSchema, field_validator, model_validator

from podquant.engine.defaults import SamplingDefaults
from podquant.engine.request import SamplingParams
from podquant.foreign import shown
from podquant.server.fields import Body, Part, invalid, unsupported
from podquant.server.messages import Message

MAX_CHOICES = 128
"""Prompts times `n` in one HTTP request."""

_MAX_STOPS = 64
_LONGEST_STOP = 1024
"""Characters: far from what anybody stops at, and little enough to look for in every token's text."""

_MAX_MESSAGES = 1 << 14
_MANY_IDS = 1 << 20

Prompt = str | list[int]
Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0)]
Messages = Annotated[list[Message], FailFast(), Field(min_length=1, max_length=_MAX_MESSAGES)]


class StreamOptions(Body):
    """`stream_options`.

    Attributes:
        include_usage: a last event with the usage.
        continuous_usage_stats: the usage so far in every event, if `include_usage` too.
    """

    PART = Part.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @property
    def counts_always(self) -> bool:
        """Whether every event says the usage so far."""
        return self.include_usage and self.continuous_usage_stats


class _Generation(Body):
    """What completions and chats have in common.

    Attributes:
        temperature, top_p, top_k, min_p, repetition_penalty: None for the model's own.
        max_tokens, max_completion_tokens: the same, the second newer; neither: the model's own, or what has room.
    """

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    min_tokens: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[Stop], FailFast(), Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    return_token_ids: bool = False
    cache_salt: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.stream_options != StreamOptions() and not self.stream:
            raise invalid("stream_options", "stream_options is only allowed with stream: true.")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid(
                "max_tokens",
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ; "
                "send one of them.",
            )
        return self

    def _params(
        self, choice: int, room: int, defaults: SamplingDefaults, *, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if asked is None:
            # of a prompt that is too long one token more is asked for, which is refused where lengths are
            room = max(room, 1)
            asked = room if defaults.max_tokens is None else min(defaults.max_tokens, room)
            asked = max(asked, self.min_tokens)
        return SamplingParams(
            max_tokens=asked,
            min_tokens=self.min_tokens,
            temperature=_first(self.temperature, defaults.temperature),
            top_p=_first(self.top_p, defaults.top_p),
            top_k=max(_first(self.top_k, defaults.top_k), 0),
            min_p=_first(self.min_p, defaults.min_p),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            # choices of one request differ, and repeat with its seed; devices take 31 bits
            seed=None if self.seed is None else (self.seed + choice) & 0x7FFF_FFFF,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _first[T](asked: T | None, default: T) -> T:
    return default if asked is None else asked


class CompletionBody(_Generation):
    """`POST /v1/completions`.

    Attributes:
        prompt: one or several, each a text or token ids.
        best_of: as many as `n`, if given.
        add_special_tokens: give a text its BOS or the like.
        logprobs: how many of the most likely tokens to report at each position.
        echo: give the prompt back in front of the output, with its log-probabilities if those are asked for.
    """

    PART = Part.COMPLETION
    MOST_VALUES = _MANY_IDS
    TAKES_IDS = True

    prompt: Annotated[
        list[Prompt],
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "array", "items": {"type": "integer"}},
                    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                ]
            }
        ),
    ]
    best_of: int | None = None
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _begin_anew(cls, data: Any) -> Any:
        """No prompt at all is an empty one, as in OpenAI's schema; one that is left out is forgotten."""
        return data | {"prompt": ""} if isinstance(data, dict) and data.get("prompt", "") is None else data

    @field_validator("prompt", mode="plain")
    @classmethod
    def _parse_prompt(cls, value: Any) -> list[Prompt]:
        return parse_prompts(value)

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if self.best_of not in (None, self.n):
            raise unsupported(
                "best_of",
                f"best_of {self.best_of} is not supported by this server; only n ({self.n}) is. Leave it out.",
            )
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise invalid(
                "n", f"{len(self.prompt)} prompts times n {self.n} exceed {MAX_CHOICES} choices; send several requests."
            )
        return self

    def params(self, choice: int, room: int, defaults: SamplingDefaults) -> SamplingParams:
        """For the `choice`-th output of one prompt, after which there is room for so many tokens."""
        scored = self.logprobs if self.echo else None
        return self._params(choice, room, defaults, logprobs=self.logprobs, prompt_logprobs=scored)


def parse_prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt as a list of prompts. Raises PydanticCustomError for anything else."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid(
            None,
            "prompt: expected a text, a list of texts, a list of token ids or a list of such lists, not empty.",
        )
    if len(value) > MAX_CHOICES:
        raise invalid(None, f"prompt: {len(value)} prompts, more than {MAX_CHOICES}; send several requests.")
    for i, prompt in enumerate(value):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(map(_is_int, prompt)):
            raise invalid(None, f"prompt: expected a text or a list of integer token ids at {i}, got {shown(prompt)}.")
        if not prompt:
            raise invalid(None, f"prompt: the list of token ids at {i} is empty; expected at least one.")
    return value


def _is_int(value: Any) -> bool:
    return type(value) is int  # JSON's true is no token


class ChatBody(_Generation):
    """`POST /v1/chat/completions`.

    Attributes:
        logprobs: report the log-probability of each token.
        top_logprobs: and of so many of the most likely ones.
    """

    PART = Part.CHAT

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs is only allowed with logprobs: true.")
        return self

    def params(self, choice: int, room: int, defaults: SamplingDefaults) -> SamplingParams:
        """For the `choice`-th output, where there is room for so many tokens after the prompt."""
        logprobs = self.top_logprobs if self.logprobs else None
        return self._params(choice, room, defaults, logprobs=logprobs, prompt_logprobs=None)


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or the messages of a chat."""

    PART = Part.TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "Expected either prompt or messages.")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    PART = Part.DETOKENIZE
    MOST_VALUES = _MANY_IDS
    TAKES_IDS = True

    model: str | None = None
    tokens: Annotated[list[TokenId], FailFast()]
    skip_special_tokens: bool = False
