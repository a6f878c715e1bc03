"""A checkpoint's chat template, rendered as transformers renders it. Knows Jinja; knows nothing about tokens' ids.

Templates come with the weights, from strangers, so they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from podquant.errors import CheckpointError, RequestError
from podquant.foreign import cut, shown

_DEVELOPER = "developer"
_LONGEST = 1 << 20
"""Of a template's source; those of models have some thousand characters."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What clients call the reasoning before an answer, in the order in which transformers looks for it."""


class ChatTemplate:
    """One template, or several by name: `tool_use` serves requests with tools, `default` all others.

    Args:
        source: Jinja source, or name → source.
        variables: what every rendering sees, such as `bos_token`.
        where: the file it comes from, for messages.

    Attributes:
        sources, variables, where: what it was made of.

    Raises CheckpointError if a source is not a template, or none would serve as the default.
    """

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, str], where: str) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        if sum(map(len, sources.values())) > _LONGEST:
            raise CheckpointError(
                f"{where}: the chat template has more than {_LONGEST} characters. Fix or remove it; without one the "
                "model serves completions only."
            )
        if "default" not in sources:
            raise CheckpointError(
                f"{where}: expected a chat template named 'default', found {shown(sorted(sources))}. Name one of them "
                "so."
            )
        environment = _environment()
        self.sources, self.variables, self.where = dict(sources), dict(variables), where
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
            self._know_developer = {name for name, text in sources.items() if _names_developer(environment, text)}
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"{where}: the chat template is not valid Jinja, line {error.lineno}: {cut(error.message or '', 200)}. "
                "Fix or remove it; without one the model serves completions only."
            ) from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:  # of Jinja's compiler
            raise CheckpointError(
                f"{where}: the chat template cannot be compiled: {cut(str(error) or type(error).__name__)}. Fix or "
                "remove it; without one the model serves completions only."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        most: int | None = None,
    ) -> str:
        """The prompt for `messages`; its special tokens are in it, so encode it without adding any.

        A `developer` message is one of the `system` for a template that does not name that role. A field that is null
        is left out, as transformers does, unless the template then fails.

        `extra` holds further variables the template may know, such as `enable_thinking`; `most` is how many characters
        the text may have. Raises RequestError with the template's own words if it refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        variables = {**self.variables, "documents": None, **(extra or {}), "tools": tools}
        variables["add_generation_prompt"] = add_generation_prompt
        chat = [_with_known_fields(message, name in self._know_developer) for message in messages]
        without_nulls = [{key: value for key, value in message.items() if value is not None} for message in chat]
        template = self._templates[name]
        try:
            try:
                return _text(template, {**variables, "messages": without_nulls}, most)
            except Exception:
                if without_nulls == chat:
                    raise
                return _text(template, {**variables, "messages": chat}, most)
        # whatever a stranger's template does with a stranger's messages is the request's error, not the server's
        except Exception as error:
            raise RequestError(
                f"The model's chat template ({self.where}) cannot render these messages: {_words(error)}. "
                "Check roles, their order and the type of each content.",
                "messages",
            ) from error


def _words(error: Exception) -> str:
    return str(error)[:1000].rstrip(".") or type(error).__name__


def _text(template: jinja2.Template, variables: Mapping[str, Any], most: int | None) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        size += len(piece)
        if most is not None and size > most:
            raise OverflowError(f"it writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def _names_developer(environment: jinja2.Environment, source: str) -> bool:
    return any(node.value == _DEVELOPER for node in environment.parse(source).find_all(jinja2.nodes.Const))


def _with_known_fields(message: Mapping[str, Any], knows_developer: bool) -> dict[str, Any]:
    """The message with the role and the names of fields that templates know."""
    known = dict(message)
    if known.get("role") == _DEVELOPER and not knows_developer:
        known["role"] = "system"
    reasoning = next((known[name] for name in _REASONING if known.get(name) is not None), None)
    return known if reasoning is None else {"thinking": reasoning, **known, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


@jinja2.pass_context
def _as_it_is(context: jinja2.runtime.Context, value: Any) -> Any:
    return value


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        # These two keep Jinja from computing constants, of whatever size, while it compiles.
        optimized=False,
        finalize=_as_it_is,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
