"""What the routes accept, to the last field. A field that is not here is refused by name; null means not given.

Knows OpenAI's names and the usual extensions (vLLM's, SGLang's); knows nothing of the engine but `SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from podquant.engine.request import SamplingParams
from podquant.errors import RequestError

MAX_CHOICES = 128
"""Prompts times `n` in one HTTP request."""

_HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Notes to OpenAI that ask for nothing."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Parameters that other servers have and this one has not, each with the values that ask for nothing."""

_MAX_STOPS = 64

Prompt = str | list[int]
TokenId = Annotated[int, Field(ge=0)]


def _unsupported(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{message}", {"param": param, "message": message})


def _invalid(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_parameter", "{message}", {"param": param, "message": message})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL and name not in cls.model_fields:
                raise _unsupported(name, f"{name} is not supported by this server; leave it out.")
            kept[name] = value
        return kept


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool = False


class _Generation(_Body):
    """What completions and chats have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    min_tokens: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[str], Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    return_token_ids: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise _invalid("stream_options", "stream_options is only allowed with stream: true.")
        return self

    def _params(
        self, max_tokens: int, choice: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        # choices of one request differ, and repeat with its seed; devices take 31 bits
        seed = None if self.seed is None else (self.seed + choice) & 0x7FFF_FFFF
        if self.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {max_tokens}; lower it or ask for more.",
                "min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionBody(_Generation):
    """`POST /v1/completions`.

    Attributes:
        prompt: one or several, each a text or token ids.
        logprobs: how many of the most likely tokens to report at each position.
        echo: give the prompt back in front of the output, with its log-probabilities if those are asked for.
    """

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
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @field_validator("prompt", mode="plain")
    @classmethod
    def _parse_prompt(cls, value: Any) -> list[Prompt]:
        return parse_prompts(value)

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise _invalid(
                "n", f"{len(self.prompt)} prompts times n {self.n} exceed {MAX_CHOICES} choices; send several requests."
            )
        return self

    def params(self, choice: int) -> SamplingParams:
        """For the `choice`-th output of one prompt."""
        return self._params(self.max_tokens, choice, self.logprobs, self.logprobs if self.echo else None)


def parse_prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt as a list of prompts. Raises PydanticCustomError for anything else."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _invalid(
            "prompt",
            "prompt: expected a text, a list of texts, a list of token ids or a list of such lists, not empty.",
        )
    for i, prompt in enumerate(value):
        if isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_int, prompt))):
            if prompt:
                continue
            raise _invalid("prompt", f"prompt: the prompt at {i} is empty; expected at least one token.")
        raise _invalid("prompt", f"prompt: expected a text or a list of integer token ids at {i}, got {prompt!r:.60}.")
    return value


def _is_int(value: Any) -> bool:
    return type(value) is int  # JSON's true is no token


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a chat; the chat template sees exactly the fields that were sent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _join(cls, value: str | list[TextPart]) -> str:
        return value if isinstance(value, str) else "".join(part.text for part in value)


class ChatBody(_Generation):
    """`POST /v1/chat/completions`.

    Attributes:
        max_tokens, max_completion_tokens: the same, the second newer; neither: all the context has room for.
        logprobs: report the log-probability of each token.
        top_logprobs: and of so many of the most likely ones.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "top_logprobs" in self.model_fields_set and not self.logprobs:
            raise _invalid("top_logprobs", "top_logprobs is only allowed with logprobs: true.")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _invalid("max_tokens", "max_tokens and max_completion_tokens differ; send one of them.")
        return self

    def params(self, choice: int, room: int) -> SamplingParams:
        """For the `choice`-th output, where the context has room for so many tokens after the prompt."""
        max_tokens = self.max_completion_tokens or self.max_tokens or max(room, 1)
        return self._params(max_tokens, choice, self.top_logprobs if self.logprobs else None, None)


class TokenizeBody(_Body):
    """`POST /tokenize`: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _invalid("prompt", "Expected either prompt or messages.")
        return self


class DetokenizeBody(_Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool = False
