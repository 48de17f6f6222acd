"""The page /docs: an OpenAPI document as plain HTML. FastAPI's own page loads scripts from elsewhere, which
the page's security policy forbids and a machine without Internet cannot."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any


def docs_page(openapi: Mapping[str, Any]) -> str:
    """Every route with its statuses, and every schema."""
    routes = "".join(
        _route(method, path, operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    )
    schemas = "".join(
        f'<section id="{escape(name)}"><h3>{escape(name)}</h3>'
        f"<p>{escape(schema.get('description', ''))}</p>"
        f"<pre>{escape(json.dumps(schema.get('properties', {}), indent=2))}</pre></section>"
        for name, schema in openapi.get("components", {}).get("schemas", {}).items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<title>gensr: the service</title><link rel="stylesheet" href="style.css"></head>'
        '<body class="docs"><main><h1>The service</h1>'
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{routes}<h2>Schemas</h2>{schemas}</main></body></html>"
    )


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    body = _schema(operation.get("requestBody", {}))
    answers = "".join(
        f"<li>{escape(status)} {_schema(answer)}</li>"
        for status, answer in operation["responses"].items()
        if status != "422"  # FastAPI's own status for a bad request; here that is 400
    )
    return (
        f"<section><h3>{method.upper()} {escape(path)}</h3><p>{escape(operation.get('description', ''))}</p>"
        f"{f'<p>takes {body}</p>' if body else ''}<ul>{answers}</ul></section>"
    )


def _schema(described: Mapping[str, Any]) -> str:
    """A link to the schema of a body, if it has one with a name."""
    schema = described.get("content", {}).get("application/json", {}).get("schema", {})
    name = escape(schema.get("$ref", "").rpartition("/")[2])
    return f'<a href="#{name}">{name}</a>' if name else ""
