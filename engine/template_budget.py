"""What one render of a chat template may cost: time, characters made on the way, size and depth of values.

Python's operations on strings and lists can't be stopped half-way, so those whose result may be far larger than what
they are given (replace, join, padding, str() of a list that holds itself many times) are measured before they run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError

RENDER_S = 5.0
MAX_CHARS = 32 * 2**20
"""Of the output, and of any string on the way; an entry of a container counts as 8."""
MAX_MADE = 2**29
"""Of all strings and containers together that a render makes."""
MAX_SHOWN = 2**27
"""Of all pieces of output, also that of macros and blocks, which Jinja gathers before it joins them."""
MAX_NODES = 2**18
MAX_DEPTH = 200
MAX_WIDTH = 10_000

_WIDE_FORMAT = re.compile(r"%[^A-Za-z%]*(?:\d{5}|\*)|\{[^{}]*:[^{}]*(?:\d{5}|\{)")
"""A width of five digits or one that comes from the arguments, in either of Python's format languages."""


class Budget:
    """What is left to one render."""

    __slots__ = ("deadline", "left", "left_to_show", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.left = MAX_MADE
        self.left_to_show = MAX_SHOWN


budget: ContextVar[Budget | None] = ContextVar("budget", default=None)
"""None while a template is compiled: Jinja computes constants then."""


def check_time() -> None:
    """SecurityError when the render has taken too long."""
    current = budget.get()
    if current is not None and time.monotonic() > current.deadline:
        raise SecurityError(f"it took longer than {current.seconds:g} s")


def spend(chars: int) -> None:
    """Count a value of so many characters that is about to be made; SecurityError when that is too much."""
    current = budget.get()
    if current is not None:
        current.left -= chars
    if chars > (MAX_NODES if current is None else MAX_CHARS) or (current is not None and current.left < 0):
        raise SecurityError("a value is too large for a chat template")


def size(value: Any) -> int:
    """About how many characters str() makes of `value`; SecurityError when they or the nesting are too many."""
    if isinstance(value, str):
        return len(value)
    chars, nodes, _ = _measure(value)
    return chars + 8 * nodes


def _measure(value: Any) -> tuple[int, int, int]:
    """(characters in strings, values, depth) of all that `value` holds, counted as often as it is there."""
    chars = nodes = deepest = 0
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        nodes += 1
        chars += len(item) if isinstance(item, str) else 0
        deepest = max(deepest, depth)
        stack += [(entry, depth + 1) for entry in _inside(item)]
        if nodes + len(stack) > MAX_NODES or chars > MAX_CHARS or depth > MAX_DEPTH:
            raise SecurityError("a value is too large or too nested for a chat template")
    return chars, nodes, deepest


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    return item if isinstance(item, (list, tuple, set, frozenset)) else ()


def comparable(value: Any) -> Any:
    """`value`, after it was measured: to compare or hash it is to walk through all that it holds."""
    if isinstance(value, (list, tuple, dict)):
        size(value)
    return value


def counted(value: Any) -> Any:
    """`value`, which was just made."""
    if isinstance(value, (str, bytes)):
        spend(len(value))
    elif isinstance(value, (list, tuple, dict)):
        spend(8 * len(value))
    return value


def shown(value: Any) -> Any:
    """`value`, which becomes a part of the output."""
    check_time()
    chars, current = size(value), budget.get()
    if current is not None:
        current.left_to_show -= chars
        if current.left_to_show < 0:
            raise SecurityError("it makes too much output")
    return value


def joined(items: list[Any]) -> str:
    """Jinja's `a ~ b`: the texts of all `items`."""
    spend(sum(map(size, items)))
    return "".join(map(str, items))


def sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """value[start:stop:step]"""
    return counted(value[start:stop:step])


def check_method(function: Any, arguments: tuple[Any, ...]) -> None:
    """Measure what a string's method is about to make."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    if name == "replace":
        _check_replace(text, *arguments[:2])
    elif name == "join":
        _check_join(text, *arguments[:1])
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_width(*arguments[:1])


def check_format(text: Any, *arguments: Any) -> None:
    """Measure what a format string makes; SecurityError when it asks for more than a plain width."""
    if not isinstance(text, str):
        return
    if _WIDE_FORMAT.search(text):
        raise SecurityError("a format's width is too large for a chat template, or comes from its arguments")
    spend(len(text) + (text.count("%") + text.count("{")) * sum(map(size, arguments)))


def bounded_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Jinja's filters, each measuring what it is given and counting what it makes; without some that serve HTML."""
    return {name: _bounded(name, function) for name, function in filters.items() if name not in _HTML}


def bounded_tests(tests: Mapping[str, Any]) -> dict[str, Any]:
    """Jinja's tests, which compare."""

    def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps Jinja's marks
        def run(*args: Any) -> Any:
            return function(*map(comparable, args))

        return run

    return {name: bounded(function) for name, function in tests.items()}


_HTML = frozenset({"pprint", "urlize", "wordwrap", "xmlattr"})
_SHALLOW = frozenset(
    {"attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reverse"}
    | {"reject", "rejectattr", "select", "selectattr"}
)
"""Filters that don't look into the entries of what they are given, or do so one by one."""
_ITERATING = frozenset({"batch", "groupby", "join", "max", "min", "slice", "sort", "sum", "unique"})
"""Filters that take a generator's entries all at once."""


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja puts its context or environment before the value

    @wraps(function)  # keeps Jinja's marks
    def run(*args: Any, **named: Any) -> Any:
        check_time()
        value = args[at]
        if name not in _SHALLOW:
            value = list(value) if name in _ITERATING and isinstance(value, Iterator) else value
            size(value)
        options = [*args[at + 1 :], *named.values()]
        for option in options:
            size(option)
        _check_filter(name, value, options)
        return counted(function(*args[:at], value, *args[at + 1 :], **named))

    return run


def _check_filter(name: str, value: Any, options: list[Any]) -> None:
    if name in ("batch", "center", "round", "slice"):
        _check_width(*options)
    elif name == "tojson":
        _check_json(value, options)
    elif name == "indent":
        widths = [len(option) if isinstance(option, str) else int(option) for option in options]
        spend(size(value) + str(value).count("\n") * max([4, *widths]))
    elif name == "replace":
        _check_replace(str(value), *options[:2])
    elif name == "join":
        _check_join(options[0] if options else "", value)
    elif name == "format":
        check_format(value, *options)
    elif name == "sum" and any(isinstance(option, (list, tuple)) for option in options):
        raise SecurityError("sum is for numbers")


def _check_json(value: Any, options: list[Any]) -> None:
    """The indentation, or what stands between the entries, comes at every entry, as often as that is deep."""
    wide = sum(option if isinstance(option, int) else size(option) for option in options if option is not None)
    chars, nodes, depth = _measure(value)
    spend(chars + nodes * depth * wide)


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        spend(len(text) + text.count(old) * len(new))


def _check_join(separator: Any, items: Any = ()) -> None:
    if isinstance(items, (list, tuple)):
        spend(size(items) + len(items) * size(separator))


def _check_width(*values: Any) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"a width of {value} is too large for a chat template")
