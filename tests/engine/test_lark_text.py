"""Lark grammars inside of a JSON string: what they let through, unescaped, is what the grammar itself lets through."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from kvasir.engine.argument_schema import SlowSchemaError, Steps
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.lark_text import quoted_lark

BYTES = LLTokenizer("byte")
GRAMMARS = [
    r'start: "a\"b" | /[^a]/',
    r"start: /.*/",
    r"start: /.*/s",
    r"start: /(?s:.)b./",
    r"start: /(?i:a)(?-s).(?s)./",
    'start: A? "\\n"i "b\\n"i\nA: "A"i | "a\\t"',
    r"start: /[[:punct:]\s]{2,3}/",
    r'start: /\W\/"\\/',
    r'start: "\t".."$"',
    r'start: /[]"\]\-]/ /[^\]"]/',
    r'start: /\x22\u{0A}\p{N}?/ "b" ~ 2',
    r'start: /(?i)a\n"/',
    r'start: /[a-z&&[^b]"\x00-\x1f]{2}/',
    r"start: /a?b{1,2}|^c$/",
    r"start: /(?:a|\n{2})*?(b[^b])+/",
    r'start: /a\n?/ ~ 2..3 [/b"{2,}/]',
    r'start: "A" B? /"/  // B: "\n"' + '\nB: "\\n"',
    r'start: /["\n]/ | "a" -> x',
    'start: A | B\nA: B ["b" | /[ab]/] ~ 1..2\nB: "a" ("\\n" | /["b]/){2}',
    '%llguidance {}\n?start: x | _y\nx: /[^\\n]*/ LF\n_y: "\\n" x?\n%import common.LF',
    "%import common.ESCAPED_STRING\nstart: ESCAPED_STRING",
    "%import common (WS, INT)\n%import common.LF -> END\nstart: INT WS? INT END",
    "%import common.C_COMMENT\n%import common.WORD\nstart: C_COMMENT WORD",
    'start: /[^a]*/ "a"',
    r"""start: /[".]/ /[^".]/ /[\n.]{2}/""",
    r"""start: A
A: "\n" "a" "\n" | "\n" "b" | B B
B: "\"" "1"?""",
]
IGNORING = [
    'start: "a" "b"\n%ignore /\\s+/',
    'start: e\ne: e "+" e | /[0-9]+/ | "(" e ")" # " x\n%ignore /[ \\t\\n]+/',
    'start: (S | "x")+\nS: /"[^"\\n]*"/\n%ignore " "\n%ignore /\\n/',
]
"""In a JSON string what is ignored may stand at the end, too."""
HARMLESS = 'start: A\nA: /[a-z]+/ & /[c-x]*/ | "c"i\n%ignore / +/\n'


def matcher(grammar):
    found = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def accepts(found, text):
    ids, found = list(text.encode()), found.deep_copy()
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


def walk(found, draw):
    """What a model of random weights might write, fond of what is escaped; None: it doesn't come to an end."""
    mask, out, found = allocate_token_bitmask(1, BYTES.vocab_size), [], found.deep_copy()
    while len(out) < 40 and not found.is_stopped() and not (found.is_accepting() and draw.random() < 0.3):
        fill_next_token_bitmask(found, mask)
        open_ = [
            token for token in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")) if token < 256
        ]
        fond = [token for token in open_ if chr(token) in '"\\ab\n\t nt*/u0']
        out.append(int(draw.choice(fond if fond and draw.random() < 0.6 else open_)))
        found.consume_tokens(out[-1:])
    text = bytes(out).decode(errors="ignore")
    return (
        text if found.is_accepting() and text.encode() == bytes(out) else None
    )  # negations take what isn't UTF-8, too


def escaped(text):
    return json.dumps(text, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize("grammar", [*GRAMMARS, *IGNORING])
def test_both_let_the_same_through(grammar):
    plain, quoted, draw = matcher(grammar), matcher(quoted_lark(grammar, Steps())), random.Random(0)
    written = [text for _ in range(40) if (text := walk(quoted, draw)) is not None]
    assert written
    for text in written:
        said = json.loads(f'"{text}"')
        assert accepts(plain, said.rstrip() if grammar in IGNORING else said), text
    for text in filter(None, (walk(plain, draw) for _ in range(40))):
        assert accepts(quoted, escaped(text)), text
    for _ in range(300):
        text = "".join(draw.choices('ab"\\\n\t\x00\x1fxé]-^/+1( )$ANB', k=draw.randrange(5)))
        if grammar in GRAMMARS or text == text.rstrip():
            assert accepts(plain, text) == accepts(quoted, escaped(text)), text


def test_what_holds_no_escapes_stays():
    assert quoted_lark(HARMLESS, Steps()) == HARMLESS


def nested(count, body):
    """So many terminals, each of which is made of the one before."""
    terminals = "".join(f"A{number}: {body.replace('A', f'A{number - 1}')}\n" for number in range(1, count))
    return f'start: A{count - 1}\nA0: "\\n"\n{terminals}'


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        ('start: "a', "line 1, column 10: lexer error"), ("start: x", "line 1, column 8.*unknown name"),
        ('start: A\nA.3: "a"', "line 2, column 6: priority"), ("start: /a(?=b)/", "line 1, column 8.*look-around"),
        ("start: /a(/", "line 1, column 8"), ("start: <tool>", "line 1: <tool>"), ("start: %json {}", "line 1: %json"),
        ('start: "a" x\nx: %regex {"substring_chars": "abc"}', "line 2: %regex"), ("start: @x", "@?x"),
        ('start: x\nx[temperature=0.5]: "a"', r"line 2: x\[temperature"), ('start: x\nx[stop="a"]: /b+/', r"line 2: x\[stop"),
        ("start: x\nx[max_tokens=3]: /b+/", r"line 2: x\[max_tokens"), ("start: /(?x) a/", r"line 1: \(\?x\)"),
        ("start: A\nA: /a/x", "line 2: the flag x"), ("", "[Ee]mpty"),
        ('start: %lark {\nstart: "a"\n}', "line 1: %lark"), ('start: A\nA: ~"b"', "line 2: ~"),
        ('start: A\nA: /[^b]/ & /a/', "line 2: &"), ("start: x\nx[lazy]: /b+/", "line 2: x\\[lazy\\]"),
        ("start: /.{65}/", "line 1: more than 64"), ("start: /[^a]{0,65}/", "line 1: more than 64"),
        (nested(12, "A A"), "line 1: so much"), (nested(3000, "A"), "nested too deeply"),
        ("start: /(" + "|".join(f"a{n}\\n" for n in range(300)) + ")*/", "line 1: so much"),
    ],
)  # fmt: skip
def test_what_cant_be_enforced_is_told_with_its_line(grammar, word):
    with pytest.raises(UnsupportedError, match=word):
        quoted_lark(grammar, Steps())


def test_what_takes_too_long_or_is_too_long():
    with pytest.raises(SlowSchemaError):
        quoted_lark('start: "\\n" "never asked for before"', Steps(-1))
    long = 'start: "a"  // '.ljust(65536, "x")
    assert quoted_lark(long, Steps()) == long
    with pytest.raises(ClientError, match="65536 characters at most, got 65537"):
        quoted_lark(long + "x", Steps())
