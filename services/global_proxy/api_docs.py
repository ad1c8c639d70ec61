"""/docs: the OpenAPI description for readers.

It has no scripts and nothing of other servers, so that it works on closed networks, too.
"""

from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#eee;padding:0 .2rem}h2{border-top:1px solid #ccc;padding-top:1rem}dd{margin-bottom:.4rem}"
)
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def page(schema: dict[str, Any]) -> str:
    """HTML of all operations, their parameters, the fields of their bodies, and their answers."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(schema["info"]["title"])}</title>',
        f"<style>{_STYLE}</style><h1>{_text(schema['info']['title'])}</h1><p>{_text(schema['info']['description'])}",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation['summary'])}")
            parts += _section(operation.get("description"), _fields(schema, operation))
            parts += _section("Answers", _answers(schema, operation))
    return "\n".join(parts)


def _fields(schema: dict[str, Any], operation: dict[str, Any]) -> dict[str, str]:
    fields = {p["name"]: f"{p['in']}: {p.get('description', '')}" for p in operation.get("parameters", [])}
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    body = _resolved(schema, body)
    for name, field in body.get("properties", {}).items():
        fields[name] = f"body: {field.get('description', '')}"
    if "minProperties" in body:
        fields["…"] = body["description"]
    return fields


def _answers(schema: dict[str, Any], operation: dict[str, Any]) -> dict[str, str]:
    answers = {}
    for status, response in operation["responses"].items():
        response = _resolved(schema, response)
        answers["errors" if status == "default" else status] = response["description"]
        for name, header in response.get("headers", {}).items():
            answers[name] = header["description"]
    return answers


def _resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a reference refers to."""
    for name in part.get("$ref", "#").split("/")[1:]:
        schema = schema[name]
    return schema if "$ref" in part else part


def _section(title: str | None, entries: dict[str, str]) -> list[str]:
    lines = [f"<p>{_text(title)}"] if title else []
    if entries:
        lines.append("<dl>")
        lines += [f"<dt><code>{_text(name)}</code><dd>{_text(text)}" for name, text in entries.items()]
        lines.append("</dl>")
    return lines


def _text(text: str) -> str:
    return escape(text)
