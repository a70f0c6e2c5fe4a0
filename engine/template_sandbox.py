"""Jinja for chat templates, which are code that came with a checkpoint: in a sandbox, and bounded.

No attribute that reaches Python, no change to the arguments, range() up to 100,000; a render is stopped after RENDER_S
seconds or MAX_CHARS characters of output. Memory isn't bounded in between, so a request should bring a template of its
own only where its sender is trusted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvasir.engine.errors import ClientError

RENDER_S = 5.0
MAX_CHARS = 32 * 2**20

_deadline: ContextVar[float] = ContextVar("deadline")


def compile_template(source: str) -> jinja2.Template:
    """`source` with all that transformers offers to a chat template; ClientError when it isn't Jinja."""
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ClientError(f"the chat template is malformed at line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError) as error:
        raise ClientError(f"the chat template can't be compiled: {error}") from error


def render_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The output; ClientError when the template raises, on purpose or not, or exceeds its bounds."""
    token = _deadline.set(time.monotonic() + RENDER_S)
    try:
        return _limited(template.generate(variables))
    except _RaisedError as error:
        text = f"the chat template refuses the conversation: {error.message}"
        raise ClientError(text, param="messages") from error
    except Exception as error:  # the border to foreign code: a template may raise anything
        text = f"the chat template failed: {type(error).__name__}: {error}"
        raise ClientError(text, param="messages") from error
    finally:
        _deadline.reset(token)


class _RaisedError(TemplateError):
    """The template's own raise_exception()."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a deadline, asked at each loop's turn and at each call."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**`, which could fill memory at once, on small values only."""
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**":
            small = numbers and abs(left) <= 2**16 and abs(right) <= 2**6
        elif numbers:
            small = abs(left * right) <= 2**64
        else:
            small = isinstance(right, int) and len(left) * right <= 2**20
        if not small:
            raise SecurityError(f"{operator} makes a value that is too large for a chat template")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call that a template makes."""
        _check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "bounded", [], [], None, None, lineno=loop.lineno)
        return tree


class _Bounded:
    """An iterable that looks at the deadline at each turn, with the length that `loop.length` asks for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items: Sequence[Any] | Iterable[Any] = items if isinstance(items, Sized) else list(items)

    def __len__(self) -> int:
        assert isinstance(self._items, Sized)
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _check_deadline()
            yield item


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace() without names like __call__, with which a value could pose as something else."""

    def __init__(*args: Any, **fields: Any) -> None:
        values = dict(*args[1:], **fields)
        for name in values:
            _checked_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_checked_name(name), value)


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training: here the body alone matters."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """The body, as if the tags weren't there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.filters["bounded"] = _Bounded
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise _RaisedError(str(message))


def _checked_name(name: str) -> str:
    if name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}: names that begin with _ are reserved")
    return name


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"it took longer than {RENDER_S:g} s")


def _limited(chunks: Iterator[str]) -> str:
    parts: list[str] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_CHARS:
            raise SecurityError(f"its output is longer than {MAX_CHARS} characters")
        _check_deadline()
    return "".join(parts)
