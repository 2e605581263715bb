"""`/docs`: the API as one page without a script or a font from elsewhere, made from the app's own OpenAPI description."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}
code,pre{font:14px/1.5 ui-monospace,monospace}td{padding:.2rem 1rem .2rem 0;vertical-align:top}
details{margin:.5rem 0}dt{font-family:ui-monospace,monospace}dd{margin:0 0 .4rem 2rem;color:#555}"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Every path, and every body's fields."""
    return HTMLResponse(_page(request.app.openapi(), base_url=str(request.base_url).rstrip("/")))


def _page(api: dict[str, Any], *, base_url: str) -> str:
    rows = "".join(_row(method, path, operation) for path, methods in api["paths"].items() for method, operation in methods.items())
    schemas = "".join(_schema(name, schema) for name, schema in sorted(api.get("components", {}).get("schemas", {}).items()))
    return (
        f"<!doctype html><meta charset=utf-8><title>Finery</title><style>{_STYLE}</style><h1>Finery {escape(api['info']['version'])}</h1>"
        f"<p>{escape(api['info']['description'])} Machine-readable: <a href=/openapi.json>/openapi.json</a>.</p>"
        f"<pre>curl {escape(base_url)}/v1/models -H 'Authorization: Bearer sk-finery-…'</pre>"
        f"<h2>Paths</h2><table>{rows}</table><h2>Objects</h2>{schemas}"
    )


def _row(method: str, path: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
    name = body.rpartition("/")[2]
    link = f" <a href='#{escape(name)}'>{escape(name)}</a>" if name else ""
    return f"<tr><td><code>{method.upper()}</code><td><code>{escape(path)}</code><td>{escape(operation.get('description', ''))}{link}"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    fields = "".join(_field(field, value, is_required=field in required) for field, value in schema.get("properties", {}).items())
    return f"<details id='{escape(name)}' open><summary><code>{escape(name)}</code></summary><dl>{fields}</dl></details>"


def _field(name: str, value: dict[str, Any], *, is_required: bool) -> str:
    facts = ["required" if is_required else f"default {value['default']!r}" if "default" in value else "optional"]
    facts += [
        f"{word} {value[key]}"
        for key, word in (("minimum", "≥"), ("maximum", "≤"), ("exclusiveMinimum", ">"), ("pattern", "pattern"))
        if key in value
    ]
    text = f"{value.get('description', '')} ({_type(value)}; {', '.join(facts)})"
    return f"<dt>{escape(name)}<dd>{escape(text.strip())}"


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    if "anyOf" in value:
        return " or ".join(_type(item) for item in value["anyOf"])
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    return str(value.get("type", value.get("const", "any")))
