"""Jinja for chat templates, which are code that came with a checkpoint: in a sandbox, and bounded.

No attribute that reaches Python, no change to the arguments, range() up to 100,000; sources up to MAX_SOURCE characters
and MAX_TOKENS tokens (compiling those takes a second); renders within template_budget's limits of time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.lexer
import jinja2.parser
import jinja2.utils
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from kvasir.engine import template_budget as limits
from kvasir.engine.errors import ClientError
from kvasir.engine.template_budget import Budget, budget

MAX_SOURCE = 2**19
MAX_TOKENS = 40_000


def compile_template(source: str) -> jinja2.Template:
    """`source` with all that transformers offers to a chat template; ClientError when it isn't Jinja."""
    if len(source) > MAX_SOURCE:
        text = f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are supported"
        raise ClientError(text, param="chat_template")
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        text = f"the chat template is malformed at line {error.lineno}: {error.message}"
        raise ClientError(text, param="chat_template") from error
    except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        # the latter four are Python's own, about what Jinja makes of the template
        text = f"the chat template can't be compiled: {type(error).__name__}: {error}"
        raise ClientError(text, param="chat_template") from error


def render_template(template: jinja2.Template, variables: Mapping[str, Any], seconds: float | None = None) -> str:
    """The output; ClientError when the template raises, on purpose or not, or exceeds its bounds (RENDER_S unless
    `seconds` are given)."""
    token = budget.set(Budget(limits.RENDER_S if seconds is None else seconds))
    try:
        return _limited(template.generate(variables))
    except _RaisedError as error:
        text = f"the chat template refuses the conversation: {error.message}"
        raise ClientError(text, param="messages") from error
    except Exception as error:  # the border to foreign code: a template may raise anything
        text = f"the chat template failed: {type(error).__name__}: {error}"
        raise ClientError(text, param="messages") from error
    finally:
        budget.reset(token)


class _RaisedError(TemplateError):
    """The template's own raise_exception()."""


class _Generator(CodeGenerator):
    """Compiles every piece of output as an expression, also plain text: it is counted when it is written."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> NoReturn:
        raise nodes.Impossible


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits, asked at each loop's turn, each call, filter, concatenation and piece of output."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators that make values larger than what they are given."""
        _check_operands(operator, left, right)
        return limits.counted(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call that a template makes."""
        limits.check_time()
        if isinstance(__obj, LoopContext):  # loop(...) of a recursive loop
            args = (_Bounded(args[0]), *args[1:]) if args else args
        elif not isinstance(__obj, Macro):
            limits.check_method(__obj, args)
            for value in (*args, *kwargs.values()):
                limits.comparable(value)
        return limits.counted(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """obj[argument]"""
        return super().getitem(obj, limits.comparable(argument))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in the sandbox, and neither bytes nor methods of strings that multiply."""
        return attr not in _UNSAFE and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandbox's str.format, measured."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> Any:
            limits.check_format(value.__self__, *args, *kwargs.values())
            return inner(*args, **kwargs)

        return measured

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree


_UNSAFE = frozenset({"encode", "expandtabs", "from_bytes", "maketrans", "to_bytes", "translate"})


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Measure `left operator right` before it is computed."""
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "%":
        limits.check_format(left, right)
    elif operator == "**":
        _check_small(numbers and abs(left) <= 2**16 and abs(right) <= 2**6, operator)
    elif operator == "*" and numbers:
        _check_small(abs(left * right) <= 2**64, operator)
    elif operator == "*":
        items, count = (left, right) if isinstance(right, int) else (right, left)
        _check_small(isinstance(count, int) and len(items) * count <= 2**20, operator)
    elif not numbers and isinstance(left, Sized) and isinstance(right, Sized):
        limits.spend(len(left) + len(right))


def _check_small(small: bool, operator: str) -> None:
    if not small:
        raise SecurityError(f"{operator} makes a value that is too large for a chat template")


class _Counting(NodeTransformer):
    """Puts filters, by names that no template can spell, where Jinja calls nothing that could be replaced."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """A loop looks at the clock at each turn."""
        self.generic_visit(node)
        node.iter = _filter(node.iter, " bounded")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """a ~ b"""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), " joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """a == b, a in b"""
        self.generic_visit(node)
        node.expr = _comparable(node.expr)
        for operand in node.ops:
            operand.expr = _comparable(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        """An entry of {key: value}: the key is hashed."""
        self.generic_visit(node)
        node.key = _comparable(node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """a[1:2] makes a copy; other subscripts go through the environment."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(node.node, " sliced", *(bound or nodes.Const(None, lineno=node.lineno) for bound in bounds))


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _comparable(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, " comparable")


class _Bounded:
    """An iterable that looks at the deadline at each turn, with the length that `loop.length` asks for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items: Sequence[Any] | Iterable[Any] = items if isinstance(items, Sized) else list(items)

    def __len__(self) -> int:
        assert isinstance(self._items, Sized)
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            limits.check_time()
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

    def __repr__(self) -> str:
        return "<Namespace>"  # without its values, which nobody has measured


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training: here the body alone matters."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """The body, as if the tags weren't there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def filter_stream(self, stream: jinja2.lexer.TokenStream) -> Iterator[jinja2.lexer.Token]:
        """The tokens of a template, up to a limit: the time to compile it depends on their number."""
        for number, token in enumerate(stream):
            if number > MAX_TOKENS:
                raise TemplateSyntaxError(f"it has more than {MAX_TOKENS} tokens", token.lineno)
            yield token


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        cache_size=0,
        finalize=limits.shown,
    )
    environment.filters = limits.bounded_filters({**environment.filters, "tojson": _tojson})
    environment.filters |= {" bounded": _Bounded, " comparable": limits.comparable}
    environment.filters |= {" joined": limits.joined, " sliced": limits.sliced}
    environment.tests = limits.bounded_tests(environment.tests)
    del environment.globals["lipsum"]
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
    limits.check_format(form)
    return datetime.now().strftime(form)


def _limited(chunks: Iterator[str]) -> str:
    parts: list[str] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > limits.MAX_CHARS:
            raise SecurityError(f"its output is longer than {limits.MAX_CHARS} characters")
        limits.check_time()
    return "".join(parts)
