"""The page of the HTTP server, from the app itself: routes, fields of bodies, errors as it gives them, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from podquant.engine.backend import EngineStats
from podquant.errors import EngineStoppedError, QueueFullError, RequestError, RequestTooLongError
from podquant.server.app import MAX_BODY_BYTES, create_app
from podquant.server.connections import REFUSALS
from podquant.server.errors import response_for
from podquant.server.fields import Body, Part, fields_of
from podquant.server.metrics import Metrics
from tests.docs.markdown import first_sentence, page, prose, summary, table

_KEY = "a key"
_JSON = {"Content-Type": "application/json"}
_PROVOKED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("no API key, or a wrong one", "GET", "/v1/models", {"headers": {}}),
    ("no such route", "GET", "/v2/models", {}),
    ("another method than the route has", "GET", "/v1/completions", {}),
    (
        "a body that is not JSON",
        "POST",
        "/v1/completions",
        {"content": "{", "headers": {"Content-Type": "application/json"}},
    ),
    (f"a body over {MAX_BODY_BYTES >> 20} MiB", "POST", "/v1/completions", {"content": bytes(MAX_BODY_BYTES + 1)}),
    ("a field that is missing", "POST", "/v1/completions", {"json": {}}),
    ("a field that is unknown", "POST", "/v1/completions", {"json": {"prompt": "a", "promt": "a"}}),
    ("a field that this server does not support", "POST", "/v1/completions", {"json": {"prompt": "a", "best_of": 2}}),
    ("a value that does not fit its field", "POST", "/v1/completions", {"json": {"prompt": "a", "top_p": 2}}),
    ("a request before the model is loaded", "POST", "/v1/completions", {"json": {"prompt": "a"}}),
    ("`/ready` before the model is loaded", "GET", "/ready", {}),
)
"""Requests that an app without an engine refuses, and what is wrong with each."""


def http_page() -> str:
    """docs/reference/http.md."""
    app = create_app(None, api_key=_KEY)
    schema = app.openapi()
    return page(
        "HTTP",
        prose("""
            What `podquant serve` answers; [serve a model](../howto/serve.md) has examples. `GET /openapi.json` gives
            the same as a schema. Null means that a field was not given. A field that is not listed is refused by name.
        """),
        "## Routes\n",
        table(["route", "answers"], _routes(schema)),
        *(part for name in _bodies(schema) for part in (f"## {name}\n", _fields(schema, name))),
        "## Errors\n",
        prose("""
            Each has the body that OpenAI's clients expect:
            `{"error": {"message": …, "type": …, "param": …, "code": …}}`. `param` names the field at
            fault, if it is one.
        """),
        table(["what", "status", "code"], [*asyncio.run(_provoke(app)), *_of_connections(), *_of_the_engine()]),
        "## Metrics\n",
        prose("""
            `GET /metrics`, in Prometheus' text format. The [counters of a conversion](../howto/pod.md) are in Ray's
            dashboard.
        """),
        table(["metric", "type", "meaning"], _metrics()),
    )


def _routes(schema: dict[str, Any]) -> Iterator[list[str]]:
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            body = _body_name(route)
            fields = f"; [fields](#{body.lower()})" if body else ""
            yield [f"`{method.upper()} {path}`", first_sentence(route["description"]) + fields]


def _bodies(schema: dict[str, Any]) -> Iterator[str]:
    """Schemas of bodies, and of what they hold, in the order of the routes."""
    routes = [route for methods in schema["paths"].values() for route in methods.values()]
    waiting = [name for route in routes if (name := _body_name(route))]
    seen = []
    for name in waiting:
        if name not in seen:
            seen.append(name)
            waiting += _references(schema["components"]["schemas"][name])
    return iter(seen)


def _body_name(route: dict[str, Any]) -> str:
    body = route.get("requestBody")
    return body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2] if body else ""


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        found = [node["$ref"].rpartition("/")[2]] if "$ref" in node else []
        return found + [name for value in node.values() for name in _references(value)]
    return [name for value in node for name in _references(value)] if isinstance(node, list) else []


def _fields(schema: dict[str, Any], name: str) -> str:
    """The fields of one object: what the server honours, and what becomes of every other field that it knows."""
    described = schema["components"]["schemas"][name]
    known = fields_of(_part_of(name))
    honoured = []
    for field, node in described["properties"].items():
        default = "**required**" if field in described.get("required", ()) else ""
        if "default" in node:
            default = f"`{json.dumps(node['default'])}`"
        honoured.append([f"`{field}`", _type(node), default, _bounds(node), known[field].meaning])
    others = [
        [
            f"`{row.name}`",
            row.treatment.value,
            " or ".join(f"`{json.dumps(value)}`" for value in row.neutral),
            row.meaning,
        ]
        for row in known.values()
        if row.name not in described["properties"]
    ]
    text = table(["field", "type", "default", "bounds", "meaning"], honoured)
    if others:
        text += "\n" + table(["other field", "is", "asks for nothing", "meaning"], others)
    return text


def _part_of(name: str) -> Part:
    """The part of a request that a schema describes."""
    kinds = [Body]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next(kind.PART for kind in kinds if kind.__name__ == name)


def _type(node: dict[str, Any]) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in node:
        return " or ".join(_type(each) for each in node["anyOf"] if each.get("type") != "null")
    if "enum" in node or "const" in node:
        return " or ".join(f"`{json.dumps(value)}`" for value in node.get("enum", [node.get("const")]))
    return f"array of {_type(node['items'])}" if node["type"] == "array" else str(node["type"])


def _bounds(node: dict[str, Any]) -> str:
    nodes = [node, *node.get("anyOf", ()), node.get("items", {})]
    words = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
        "minItems": "{} or more items",
        "maxItems": "at most {} items",
    }
    return ", ".join(text.format(_number(each[key])) for each in nodes for key, text in words.items() if key in each)


def _number(value: float) -> str:
    power = abs(int(value)).bit_length() - 1
    if power > 30 and abs(value) == 2.0**power:
        return f"{'-' if value < 0 else ''}2^{power}"
    return f"{value:g}"


async def _provoke(app: Any) -> list[list[str]]:
    """What the app says to what is wrong."""
    rows = []
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://podquant") as client:
        for what, method, path, request in _PROVOKED:
            headers = {"Authorization": f"Bearer {_KEY}"} | request.get("headers", {})
            if request.get("headers") == {}:
                headers = {}
            response = await client.request(method, path, **(request | {"headers": headers}))
            rows.append(_row(what, response.status_code, response.json()))
    return rows


def _of_connections() -> list[list[str]]:
    """What a connection is answered that never becomes a request."""
    return [[message.rstrip("."), str(status), f"`{code}`"] for code, (status, message) in REFUSALS.items()]


def _of_the_engine() -> list[list[str]]:
    """What the engine refuses, by its errors."""
    kinds = (RequestError, RequestTooLongError, QueueFullError, EngineStoppedError)
    responses = [(kind, response_for(kind("refused"))) for kind in kinds]
    return [_row(summary(kind), response.status_code, json.loads(bytes(response.body))) for kind, response in responses]


def _row(what: str, status: int, body: dict[str, Any]) -> list[str]:
    code = body["error"]["code"]
    return [first_sentence(what), str(status), f"`{code}`" if code else ""]


def _metrics() -> Iterator[list[str]]:
    text = Metrics(lambda: EngineStats(*[0] * 11)).exposition().decode()
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if not family.name.endswith("_created"):
            yield [f"`{name}`", family.type, family.documentation]
