"""Every spelling of "the output must look like this" as one `StructuredOutput`. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvasir.cluster.described import described
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import StructuredOutput

Kind = tuple[str, Callable[[str, Any], Any]]
"""(field of StructuredOutput, what makes its value)"""


def structured_output(fields: Mapping[str, Any]) -> StructuredOutput | None:
    """Of a body's fields; None: free text. ClientError when two ask for different things."""
    found: dict[str, StructuredOutput] = {}
    for name, read in FIELDS.items():
        if fields.get(name) is not None and (wanted := read(name, fields[name])) is not None:
            found[name] = wanted
    if len(set(found.values())) > 1:
        names = " and ".join(found)
        raise ClientError(f"{names} ask for different structured outputs; send one of them", param=list(found)[-1])
    return next(iter(found.values()), None)


def known_as(fields: Mapping[str, Any]) -> dict[str, str]:
    """For `Call`: what the client calls its structured output."""
    asked = [name for name in FIELDS if fields.get(name) not in (None, {"type": "text"})]
    return {"structured_outputs": asked[0]} if asked else {}


_BACKENDS = ("auto", "guidance", "llguidance", "xgrammar", "outlines", "lm-format-enforcer")


@described(type="string", pattern=f"^({'|'.join(_BACKENDS)})(:|$)")
def check_backend(name: str, value: Any) -> None:
    """Which library enforces it is no promise of ours, but a name must be one that exists."""
    if not isinstance(value, str) or value.split(":")[0] not in _BACKENDS:
        raise ClientError(f"{name} must be one of {', '.join(_BACKENDS)}, got {value!r:.60}", param=name)


def _made(name: str, kind: str, value: Any) -> StructuredOutput:
    try:
        return StructuredOutput(**{kind: value})
    except ClientError as error:
        raise ClientError(f"{name}: {error.message}", param=name) from error


def _schema(name: str, value: Any) -> str:
    """An object, or JSON text."""
    if not isinstance(value, (dict, bool, str)):
        raise ClientError(f"{name} must be a JSON Schema, got {value!r:.60}", param=name)
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise ClientError(f"{name} isn't a JSON Schema: {error}", param=name) from error
    if not isinstance(schema, dict) and schema is not True:
        raise ClientError(f"{name} must be a JSON Schema that something satisfies, got {text:.60}", param=name)
    return text


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ClientError(f"{name} must be a string, got {value!r:.60}", param=name)
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or any(not isinstance(one, str) for one in value):
        raise ClientError(f"{name} must be a list of strings that isn't empty, got {value!r:.60}", param=name)
    return tuple(value)


def _true(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ClientError(f"{name} must be true or false, got {value!r:.60}", param=name)
    return value


def _tag(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return _string(name, value)


KINDS: dict[str, Callable[[str, Any], Any]] = {
    "json": _schema,
    "json_object": _true,
    "regex": _string,
    "choice": _strings,
    "grammar": _string,
    "structural_tag": _tag,
}


_FORM_FIELDS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema", "schema")}
"""What a response_format has beside its type."""


def _field(kind: str) -> Callable[[str, Any], StructuredOutput | None]:
    def read(name: str, value: Any) -> StructuredOutput | None:
        made = KINDS[kind](name, value)
        return None if made is False else _made(name, kind, made)

    return read


def _response_format(name: str, value: Any) -> StructuredOutput | None:
    """OpenAI's, and vLLM's structural tags in it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _FORM_FIELDS:
        _known("response_format", value, ("type", *_FORM_FIELDS[kind]), name)
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp and Together put one here
        return _made(name, "json_object", True) if schema is None else _made(name, "json", _schema(name, schema))
    if kind == "json_schema":
        inner = value.get("json_schema")
        if inner is None and value.get("schema") is not None:  # llama.cpp takes it without a name, too
            inner = {"schema": value["schema"]}
        elif value.get("schema") is not None:
            raise ClientError("response_format: send schema in json_schema, once", param=name)
        if not isinstance(inner, dict):
            raise ClientError("response_format: json_schema must be an object with a schema", param=name)
        _known("response_format.json_schema", inner, ("name", "description", "schema", "json_schema", "strict"), name)
        if not isinstance(inner.get("strict"), (bool, type(None))):
            text = f"response_format.json_schema.strict must be true or false, got {inner['strict']!r:.60}"
            raise ClientError(text, param=name)
        schema = inner.get("schema", inner.get("json_schema"))
        if schema is None:
            raise ClientError("response_format: json_schema has no schema", param=name)
        return _made(name, "json", _schema(name, schema))
    if kind == "structural_tag":
        return _made(name, "structural_tag", json.dumps(value))
    known = "text, json_object, json_schema or structural_tag"
    raise ClientError(f"response_format: type must be {known}, got {kind!r:.60}", param=name)


def _known(at: str, value: Mapping[str, Any], names: Collection[str], param: str) -> None:
    """Of a constraint nothing is overlooked."""
    if other := [name for name, given in value.items() if name not in names and given is not None]:
        raise UnsupportedError(f"{at}.{other[0]:.60} isn't supported; known: {', '.join(names)}", param=param)


def _structured_outputs(name: str, value: Any) -> StructuredOutput | None:
    """vLLM's: one constraint by its name, with options of its backends."""
    if not isinstance(value, dict):
        raise ClientError(f"{name} must be an object, got {value!r:.60}", param=name)
    known = KINDS | {"disable_any_whitespace": _true}
    off = {key for key, item in value.items() if item is False and known.get(key) in (None, _true)}
    given = {key: item for key, item in value.items() if item is not None and key not in off}
    for key in list(given):
        if key not in known:
            raise UnsupportedError(f"{name}.{key:.60} isn't supported; known: {', '.join(known)}", param=name)
    if not given:
        return None
    return _constraint(name, {key: known[key](f"{name}.{key}", item) for key, item in given.items()})


def _constraint(name: str, given: Mapping[str, Any]) -> StructuredOutput:
    try:
        return StructuredOutput(**given)
    except ClientError as error:
        raise ClientError(f"{name}: {error.message}", param=name) from error


FIELDS: dict[str, Callable[[str, Any], StructuredOutput | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _field("json"),
    "guided_json_object": _field("json_object"),
    "guided_regex": _field("regex"),
    "guided_choice": _field("choice"),
    "guided_grammar": _field("grammar"),
    "structural_tag": _field("structural_tag"),
}
"""Each spelling, and how it is read."""
