"""Every field of a request, one row each: honoured, taken as a note, taken only where it asks for nothing, or refused.

The rows are those of OpenAI's schemas and of vLLM's; a field that has no row is unknown and refused by its name. `null`
is as good as leaving a field out. The documentation is rendered from these rows; the bodies that hold what is honoured
derive from `Body`, in `schemas` and `messages`. Knows nothing of the engine.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported_parameter"
"""pydantic's error type, and the code in the answer, of a field that is known and not supported."""

UNKNOWN = "unknown_parameter"
"""The same of a field that has no row."""

INVALID = "invalid_parameter"
"""The same of a field whose value contradicts another one."""


class Part(enum.Flag):
    """The JSON object of a request that a field belongs to."""

    COMPLETION = enum.auto()
    CHAT = enum.auto()
    STREAM_OPTIONS = enum.auto()
    MESSAGE = enum.auto()
    CONTENT = enum.auto()
    TOOL_CALL = enum.auto()
    FUNCTION = enum.auto()
    TOKENIZE = enum.auto()
    DETOKENIZE = enum.auto()


class Treatment(enum.Enum):
    """What becomes of a field; the values are for people."""

    HONOURED = "honoured"
    NOTE = "accepted; asks for nothing"
    NEUTRAL = "accepted where it asks for nothing, else refused"
    REFUSED = "refused"


@dataclass(frozen=True)
class Field:
    """One field of one or several objects.

    Attributes:
        name: its key.
        parts: the objects that have it.
        treatment: what becomes of it.
        meaning: for people, in a line.
        neutral: the values that ask for nothing, beside null.
    """

    name: str
    parts: Part
    treatment: Treatment
    meaning: str
    neutral: tuple[Any, ...] = ()


_TEXT, _CHAT = Part.COMPLETION, Part.CHAT
_BOTH = _TEXT | _CHAT
_TOKENS, _IDS = Part.TOKENIZE, Part.DETOKENIZE


def _honoured(name: str, parts: Part, meaning: str, *neutral: Any) -> Field:
    return Field(name, parts, Treatment.HONOURED, meaning, neutral)


def _note(name: str, parts: Part, meaning: str) -> Field:
    return Field(name, parts, Treatment.NOTE, meaning)


def _neutral(name: str, parts: Part, meaning: str, *neutral: Any) -> Field:
    return Field(name, parts, Treatment.NEUTRAL, meaning, neutral)


def _refused(name: str, parts: Part, meaning: str) -> Field:
    return Field(name, parts, Treatment.REFUSED, meaning)


FIELDS: tuple[Field, ...] = (
    # What to answer.
    _honoured("model", _BOTH | _TOKENS | _IDS, "the served model's name; may be left out"),
    _honoured("prompt", _TEXT, "a text, token ids, or a list of either; empty or null: the tokenizer's BOS"),
    _honoured("messages", _CHAT, "the chat, at least one message"),
    # How long.
    _honoured(
        "max_tokens",
        _BOTH,
        "the most tokens to generate; left out: as generation_config.json says, or all that there is room for",
    ),
    _honoured("max_completion_tokens", _BOTH, "the newer name of `max_tokens`; the two may not differ"),
    _honoured(
        "min_tokens",
        _BOTH,
        "so many tokens at the least: none of them is one that ends the output",
    ),
    _honoured("stop", _BOTH, "a string or up to 64 of them that end the output and are left out"),
    _honoured("stop_token_ids", _BOTH, "up to 64 token ids that end the output"),
    _honoured("ignore_eos", _BOTH, "the model's end tokens do not end the output"),
    # Which token; these five are as generation_config.json says where they are left out.
    _honoured("temperature", _BOTH, "0 to 100; below 1e-5 greedy"),
    _honoured("top_p", _BOTH, "above 0, up to 1; below 1e-6 greedy"),
    _honoured("top_k", _BOTH, "only so many of the likeliest tokens; 0 or -1: all"),
    _honoured("min_p", _BOTH, "0 to 1: only tokens at least so likely, relative to the likeliest"),
    _honoured("repetition_penalty", _BOTH, "0.01 to 100, above 1 against tokens of prompt and output"),
    _honoured("seed", _BOTH, "the same seed repeats the output"),
    _honoured("frequency_penalty", _BOTH, "-2 to 2, taken from a token's logit for each time it was generated"),
    _honoured("presence_penalty", _BOTH, "-2 to 2, taken from the logits of tokens that were generated"),
    _neutral("logit_bias", _BOTH, "token ids to favour or avoid", {}),
    _neutral("bad_words", _BOTH, "words never to generate", []),
    _refused("allowed_token_ids", _BOTH, "the only token ids to generate"),
    _neutral("use_beam_search", _BOTH, "beam search", False),
    _neutral("length_penalty", _BOTH, "of beam search", 1),
    _neutral("repetition_detection", _BOTH, "end the output at a repeated pattern", {}),
    _neutral("watermarking", _BOTH, "mark the output", False),
    _refused("logits_processors", _BOTH, "code to run on the logits"),
    # How many, and in which form.
    _honoured("n", _BOTH, "outputs for each prompt; prompts times n up to 128"),
    _honoured("best_of", _TEXT, "only as many as `n`: nothing is generated to be thrown away"),
    _honoured("stream", _BOTH, "server-sent events"),
    _honoured("stream_options", _BOTH, "only with `stream`"),
    _honoured("include_usage", Part.STREAM_OPTIONS, "a last event with the usage"),
    _honoured("continuous_usage_stats", Part.STREAM_OPTIONS, "with `include_usage`: the usage so far in every event"),
    _neutral("include_obfuscation", Part.STREAM_OPTIONS, "random padding that hides the lengths of events", False),
    _neutral("stream_interval", _BOTH, "tokens of an event", 1),
    _honoured("echo", _TEXT, "the prompt in front of the output"),
    _neutral("echo", _CHAT, "the last message in front of the output", False),
    _neutral("suffix", _TEXT, "what comes after the output", ""),
    _honoured("logprobs", _TEXT, "log-probabilities of so many of the likeliest tokens", False),
    _honoured("logprobs", _CHAT, "whether to give log-probabilities"),
    _honoured("top_logprobs", _CHAT, "with `logprobs`: of so many of the likeliest tokens"),
    _refused("prompt_logprobs", _BOTH, "log-probabilities of the prompt; `echo` with `logprobs` gives them"),
    _refused("logprob_token_ids", _BOTH, "tokens to give the log-probabilities of"),
    _honoured("return_token_ids", _BOTH, "token ids of prompt and output"),
    _neutral("return_tokens_as_token_ids", _BOTH, "log-probabilities name tokens by id", False),
    _neutral("return_token_offsets", _BOTH, "where the prompt's tokens stand in its text", False),
    _neutral("return_prompt_text", _CHAT, "the text of the rendered prompt", False),
    _neutral("include_stop_str_in_output", _BOTH, "keep the stop string", False),
    _neutral("skip_special_tokens", _BOTH, "false: special tokens show in the text", True),
    _neutral("spaces_between_special_tokens", _BOTH, "spaces around special tokens", True),
    # The prompt.
    _honoured("add_special_tokens", _TEXT, "false: a text gets no BOS or the like"),
    _neutral("add_special_tokens", _CHAT, "true: a BOS beside the template's", False),
    _neutral("add_generation_prompt", _CHAT, "false: the prompt ends with the last message", True),
    _neutral("continue_final_message", _CHAT, "continue the last message", False),
    _neutral("truncate_prompt_tokens", _BOTH, "cut the prompt to so many tokens", -1),
    _note("truncation_side", _BOTH, "of `truncate_prompt_tokens`"),
    _refused("prompt_embeds", _TEXT, "embeddings for a prompt"),
    _refused("chat_template", _CHAT, "another chat template"),
    _neutral("chat_template_kwargs", _CHAT, "variables for the chat template", {}),
    _neutral("documents", _CHAT, "documents for the chat template", []),
    _neutral("media_io_kwargs", _CHAT, "of images and sound", {}),
    _neutral("mm_processor_kwargs", _CHAT, "of images and sound", {}),
    _note("return_mm_kwargs", _BOTH, "of images and sound"),
    # Structure.
    _neutral("response_format", _BOTH, "JSON, or JSON of a schema", {"type": "text"}),
    _refused("structured_outputs", _BOTH, "output of a grammar"),
    _refused("guided_json", _BOTH, "output of a grammar"),
    _refused("guided_regex", _BOTH, "output of a grammar"),
    _refused("guided_choice", _BOTH, "output of a grammar"),
    _refused("guided_grammar", _BOTH, "output of a grammar"),
    _note("guided_decoding_backend", _BOTH, "of the fields `guided_`"),
    _note("guided_whitespace_pattern", _BOTH, "of the fields `guided_`"),
    # Tools.
    _neutral("tools", _CHAT, "tools to call", []),
    _neutral("tool_choice", _CHAT, "which tool to call", "none", "auto"),
    _note("parallel_tool_calls", _CHAT, "of `tools`"),
    _neutral("functions", _CHAT, "the older name of `tools`", []),
    _neutral("function_call", _CHAT, "the older name of `tool_choice`", "none", "auto"),
    _refused("web_search_options", _CHAT, "a search of the web"),
    # Reasoning and style.
    _neutral("reasoning_effort", _CHAT, "how much to reason", "medium"),
    _neutral("include_reasoning", _CHAT, "false: leave the reasoning out", True),
    _neutral("thinking_token_budget", _BOTH, "tokens of reasoning at the most", -1),
    _neutral("verbosity", _CHAT, "how long an answer", "medium"),
    # Other kinds of input and output.
    _neutral("modalities", _CHAT, "kinds of output", ["text"]),
    _refused("audio", _CHAT, "the voice of spoken output"),
    _refused("prediction", _CHAT, "a guess of the output"),
    _refused("moderation", _CHAT, "judge input and output"),
    # Of a provider's accounts, caches and queues.
    _note("user", _BOTH, "who asks"),
    _note("safety_identifier", _CHAT, "who asks"),
    _note("metadata", _CHAT, "notes for a provider that stores answers"),
    _neutral("store", _CHAT, "keep the answer", False),
    _neutral("service_tier", _CHAT, "another queue at another price", "auto", "default"),
    _note("prompt_cache_key", _CHAT, "prefixes are kept for all requests alike; `cache_salt` parts them"),
    _note("prompt_cache_options", _CHAT, "prefixes are kept for all requests alike; `cache_salt` parts them"),
    _note("prompt_cache_retention", _CHAT, "prefixes are kept for all requests alike; `cache_salt` parts them"),
    _honoured("cache_salt", _BOTH, "what is kept of a prompt is used for requests with the same salt alone"),
    _note("session_id", _BOTH, "which requests belong together"),
    _refused("request_id", _BOTH, "the id of the answer, which this server chooses"),
    _neutral("priority", _BOTH, "a request's place in the queue", 0),
    _neutral("kv_transfer_params", _BOTH, "keys and values from another server", {}),
    _neutral("ec_transfer_params", _BOTH, "encodings from another server", {}),
    _neutral("vllm_xargs", _BOTH, "for extensions of vLLM", {}),
    _neutral("routed_experts_prompt_start", _BOTH, "which experts ran", 0),
    # A message.
    _honoured("role", Part.MESSAGE, "system, developer, user, assistant or tool"),
    _honoured("content", Part.MESSAGE, "a text, or parts that are joined; null only of an assistant"),
    _honoured("name", Part.MESSAGE, "for the chat template"),
    _honoured("tool_calls", Part.MESSAGE, "of an assistant, for the chat template", []),
    _honoured("tool_call_id", Part.MESSAGE, "of a tool's answer, for the chat template"),
    _honoured("reasoning_content", Part.MESSAGE, "for the chat template"),
    _honoured("reasoning", Part.MESSAGE, "for the chat template"),
    _neutral("refusal", Part.MESSAGE, "that an assistant has refused", ""),
    _refused("function_call", Part.MESSAGE, "the older form of `tool_calls`"),
    _refused("audio", Part.MESSAGE, "what an assistant has said aloud"),
    _neutral("annotations", Part.MESSAGE, "what an assistant has cited", []),
    # A part of its content.
    _honoured("type", Part.CONTENT, "text, or refusal of an assistant"),
    _honoured("text", Part.CONTENT, "the text of the part"),
    _honoured("refusal", Part.CONTENT, "the text of the part"),
    _note("prompt_cache_breakpoint", Part.CONTENT, "prefixes are kept for all requests alike; `cache_salt` parts them"),
    _note("cache_control", Part.CONTENT, "prefixes are kept for all requests alike; `cache_salt` parts them"),
    # A tool that an assistant has called.
    _honoured("id", Part.TOOL_CALL, "for the chat template"),
    _honoured("type", Part.TOOL_CALL, "function"),
    _honoured("function", Part.TOOL_CALL, "which one, and with what"),
    _note("index", Part.TOOL_CALL, "a tool call's place in a stream"),
    _honoured("name", Part.FUNCTION, "for the chat template"),
    _honoured("arguments", Part.FUNCTION, "JSON; an object as the chat template sees it"),
    # /tokenize and /detokenize.
    _honoured("prompt", _TOKENS, "a text"),
    _honoured("messages", _TOKENS, "a chat, in place of a text"),
    _honoured("add_special_tokens", _TOKENS, "false: a text gets no BOS or the like"),
    _neutral("add_generation_prompt", _TOKENS, "false: the prompt ends with the last message", True),
    _neutral("continue_final_message", _TOKENS, "continue the last message", False),
    _neutral("return_token_strs", _TOKENS, "the tokens' texts", False),
    _refused("chat_template", _TOKENS, "another chat template"),
    _neutral("chat_template_kwargs", _TOKENS, "variables for the chat template", {}),
    _neutral("mm_processor_kwargs", _TOKENS, "of images and sound", {}),
    _neutral("tools", _TOKENS, "tools to call", []),
    _honoured("tokens", _IDS, "token ids"),
    _honoured("skip_special_tokens", _IDS, "true: special tokens do not show in the text"),
)


def fields_of(part: Part) -> dict[str, Field]:
    """The fields that one object may have, by name."""
    return {field.name: field for field in FIELDS if part in field.parts}


_OF_PART = {part: fields_of(part) for part in Part}


def strip(data: Mapping[str, Any], part: Part, place: str = "") -> dict[str, Any]:
    """What is left of an object when all that asks for nothing is left out; unknown fields stay.

    Raises PydanticCustomError, with the name behind `place`, for what is known and asks for what is not supported.
    """
    known = _OF_PART[part]
    kept = {}
    for name, value in data.items():
        field = known.get(name)
        if value is None or (field and (field.treatment is Treatment.NOTE or _is_among(value, field.neutral))):
            continue
        if field and field.treatment is not Treatment.HONOURED:
            raise unsupported(place + name, _advice(field))
        kept[name] = value
    return kept


class Body(BaseModel):
    """A JSON object whose honoured fields its attributes are, and whose others have rows in `FIELDS`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    PART: ClassVar[Part]
    MOST_VALUES: ClassVar[int] = 1 << 17
    """JSON values that a body of this kind may hold: far more than the fields and messages of any."""
    TAKES_IDS: ClassVar[bool] = False
    """Whether these values may be a model's token ids, of which its context allows more."""

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = strip(data, cls.PART)
        for name in kept:
            if name not in cls.model_fields:  # told here, at the first: pydantic would make an error for each
                raise PydanticCustomError(UNKNOWN, "unknown", {"name": name})
        return kept


def unsupported(name: str | None, message: str) -> PydanticCustomError:
    """The error for a field that this server has not; `name` None in a field's own validator."""
    return PydanticCustomError(UNSUPPORTED, "{message}", {"name": name, "message": message})


def invalid(name: str | None, message: str) -> PydanticCustomError:
    """The error for a value that contradicts another; `name` None in a field's own validator."""
    return PydanticCustomError(INVALID, "{message}", {"name": name, "message": message})


def _advice(field: Field) -> str:
    values = " or ".join(json.dumps(value) for value in field.neutral)
    only = f"; only {values} is taken" if values else ""
    return f"{field.name} ({field.meaning}) is not supported by this server{only}. Leave it out."


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(_is_same(value, other) for other in values)


def _is_same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1, but 1.0 is."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)
