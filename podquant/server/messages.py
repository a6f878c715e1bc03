"""The messages of a chat: what a client may send, and what a chat template sees of it. Knows nothing of templates."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic_core import from_json

from podquant.foreign import shown
from podquant.server.fields import Body, Part, invalid, strip, unsupported
from podquant.server.json_bounds import JsonBoundsError, ValuesLeft


class Function(Body):
    """Which function was called, and with what."""

    PART = Part.FUNCTION

    name: str
    arguments: str | dict[str, Any] = ""

    @field_validator("arguments", mode="after")
    @classmethod
    def _parse(cls, value: str | dict[str, Any], info: ValidationInfo[ValuesLeft | None]) -> str | dict[str, Any]:
        """The object behind a text, as templates write it as JSON again; what a model has got wrong stays a text."""
        if not isinstance(value, str):
            return value
        try:
            if info.context is not None:
                info.context.spend(value)
            parsed = from_json(value or "{}")
        except JsonBoundsError as error:
            raise invalid(None, f"arguments: hold {error}, together with the rest of the body; send less.") from None
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value


class ToolCall(Body):
    """What an assistant has called."""

    PART = Part.TOOL_CALL

    type: Literal["function"] = "function"
    id: str | None = None
    function: Function


_MOST_CALLS = 1024
"""Tools that one message of an assistant calls."""

_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class Message(Body):
    """One message of a chat."""

    PART = Part.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]})
    ] = ""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FailFast(), Field(max_length=_MOST_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @field_validator("content", mode="plain")
    @classmethod
    def _join(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise invalid(None, f"content: expected a text or a list of parts, got {shown(value)}.")
        return "".join(_text_of(part, index) for index, part in enumerate(value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role != "assistant":
            if "content" not in self.model_fields_set:
                raise invalid("content", f"A message of role {self.role!r} has no content; expected a text.")
            if self.tool_calls:
                raise invalid("tool_calls", f"A message of role {self.role!r} has tool_calls; only an assistant's has.")
        return self

    def as_template_sees_it(self) -> dict[str, Any]:
        """The fields that were sent, and always a content, as templates add to it without looking."""
        return self.model_dump(exclude_none=True)


def _text_of(part: Any, index: int) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid(f"{index}", f"content.{index}: expected an object with a type, got {shown(part)}.")
    kind = part["type"]
    if kind not in ("text", "refusal"):
        raise unsupported(f"{index}", f"content.{index}: a part of type {shown(kind)} is not supported; only text is.")
    kept = strip(part, Part.CONTENT, f"{index}.")
    more = [name for name in kept if name not in ("type", kind)]
    if more:
        raise invalid(f"{index}.{more[0]}", f"content.{index}: a part of type {kind!r} has no {shown(more[0])}.")
    text = kept.get(kind)
    if not isinstance(text, str):
        raise invalid(f"{index}.{kind}", f"content.{index}.{kind}: expected a text, got {shown(text)}.")
    return text
