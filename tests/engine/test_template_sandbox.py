"""A template can neither reach the interpreter nor take much time or memory, to compile or to render."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from kvasir.engine import chat_template, template_budget
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError, ConfigError

TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]


def _render(source: str) -> str:
    return ChatTemplates({"default": source}, {"bos_token": "<s>"}).render(TALK)


def _outcome(source: str) -> str | None:
    try:
        return _render(source)
    except ClientError:
        return None


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('only users') }}", "refuses the conversation: only users"),
        ("{{ undefined.x }}", "failed: UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for %}", "malformed at line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|UndefinedError"),
        ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ self._TemplateReference__context.environment }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", "reserved"),
        ("{{ namespace(__call__=1) }}", "reserved"),
        ("{% include 'x' %}", "failed"),
        ("{{ range(10000000) | length }}", "Range too big"),
        ("{{ 'x' * 100000000 }}", "too large"),
        ("{{ 9 ** 99999999 }}", "too large"),
        ("{{ [0] * 100000000 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_templates_at_fault(source: str, match: str) -> None:
    with pytest.raises(ClientError, match=match):
        _render(source)


NESTS = "{% set ns = namespace(t=(1,)) %}{% for i in range(99) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
DEEP = "{% set ns = namespace(t=(1,)) %}{% for i in range(9999) %}{% set ns.t = (ns.t,) %}{% endfor %}"
LONG = "('a' * 1000000)"
WIDE = "{:>9999999999}"


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(t='x') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t='x') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set x = f(n-1) %}{{ x }}{{ x }}{% else %}yyyy{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{% for i in range(99999) %}" + "y" * 9999 + "{% endfor %}{% endmacro %}{{ f() | length }}",
        "{% set x %}{% for i in range(99999) %}" + "y" * 9999 + "{% endfor %}{% endset %}{{ x | length }}",
        "{% filter upper %}{% for i in range(99999) %}" + "y" * 9999 + "{% endfor %}{% endfilter %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ["
        + LONG
        + "[1:]] %}{% endfor %}",
        *(
            NESTS + "{{ " + use + " }}"
            for use in ("ns.t", "ns.t | tojson", "ns.t ~ ''", "'%s' % ns.t", "'{}'.format(ns.t)")
        ),
        *(
            NESTS + "{{ " + use + " }}"
            for use in ("[ns.t] | select | join", "ns.t in [ns.t]", "{ns.t: 1}", "ns.t | sort")
        ),
        *(
            NESTS + "{{ " + use + " }}"
            for use in ("ns.t is eq ns.t", "[ns.t] | map('string') | list", "raise_exception(ns.t)")
        ),
        *(
            DEEP + "{{ " + use + " }}"
            for use in ("{ns.t: 1}", "messages[0][ns.t]", "messages[0].get(ns.t)", "[ns.t] | unique | list")
        ),
        f"{{{{ {LONG} | replace('a', {LONG}) }}}}",
        f"{{{{ {LONG}.replace('', {LONG}) }}}}",
        f"{{{{ {LONG}.join(range(99999) | map('string') | list) }}}}",
        f"{{{{ range(99999) | join({LONG}) }}}}",
        f"{{{{ range(9999) | list | tojson(indent={LONG}) }}}}",
        "{{ range(99999) | list | tojson(indent=99999999) }}",
        "{{ ('\n' * 1000000) | indent(9999) }}",
        "{{ ('%(a)s' * 100000) % {'a': " + LONG + "} }}",
        "{{ ('%(a)s' * 100000) | format(a=" + LONG + ") }}",
        "{{ ('{0}' * 100000).format(" + LONG + ") }}",
        *(
            "{{ " + use + " }}"
            for use in (f"'{WIDE}'.format(1)", f"('{WIDE}' | attr('format'))(1)", "'{:{}}'.format(1, 999)")
        ),
        *("{{ " + use + " }}" for use in ("'%9999999999d' % 1", "'%*d' % (999999, 1)", "'%.9999999999f' % 1.5")),
        *(
            "{{ " + use + " }}"
            for use in ("'a'.ljust(9999999999)", "'a' | center(9999999999)", "1.5 | round(9999999999)")
        ),
        *("{{ " + use + " }}" for use in ("[1] | batch(9999999999, 1) | list", "[1] | slice(9999999999) | list")),
        *(
            "{{ " + use + " }}"
            for use in ("('\t' * 9999).expandtabs(9999)", "'a'.translate({97: 'b'})", "'a'.encode()")
        ),
        *(
            "{{ " + use + " }}"
            for use in ("([[1]] * 99999) | sum(start=[])", "lipsum(n=9999999)", "strftime_now('%99999999d')")
        ),
        "{{" + "(" * 999 + "1" + ")" * 999 + "}}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 5000 + " }}",
        "{{ a }}" * 30000,
        "x" * 10_000_000,
        "{{ a }}" * 1_500_000,
    ],
    ids=lambda source: source[-60:],
)
def test_no_template_takes_much_time_or_memory(source: str) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ClientError):
        _render(source)
    assert time.process_time() - started < 5  # a second on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024


def test_a_template_of_ten_megabytes_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "big.jinja").write_text("{{ a }}" * 1_500_000)
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"--chat-template: .* has 10500000 characters, at most 524288"):
        ChatTemplates.load(tmp_path, {}, override=str(tmp_path / "big.jinja"))
    with pytest.raises(ClientError, match=r"more than 40000 tokens"):
        _render("{{ a }}" * 30_000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "'' | attr('__class__')",
        "[''] | map(attribute='__class__') | first",
        "[''] | groupby('__class__') | first | first",
        "raise_exception.__globals__",
        "namespace.__init__",
        "self.__init__",
        "(messages | map('upper')).gi_frame",
        "undefined_name.__init__",
        "'{a.__class__}'.format_map({'a': 1})",
    ],
)
def test_what_would_reach_the_interpreter_is_undefined_or_refused(expression: str) -> None:
    found = _outcome("[{{ " + expression + " }}]")
    assert found in (None, "[]", "[Undefined]")


def test_renders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "RENDER_S", 0.05)
    monkeypatch.setattr(chat_template, "_PROBE_S", 0.05)
    for source in (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
        "{% for a in [1] recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set x = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    ):
        with pytest.raises(ClientError, match="longer than"):
            _render(source)
    monkeypatch.setattr(template_budget, "MAX_CHARS", 1000)
    monkeypatch.setattr(template_budget, "RENDER_S", 5.0)
    with pytest.raises(ClientError, match="longer than 1000 characters"):
        _render("{% for a in range(9999) %}{{ a }}{% endfor %}")
