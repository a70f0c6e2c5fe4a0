"""Each kind cuts words as its models' own tokenizers do, and loses nothing."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.pre_tokenizers import _KINDS, pre_tokenizer
from kvasir.engine.tokenizer_models import byte_characters

BYTES = {char: byte for byte, char in byte_characters().items()}


def _pieces(kind: str, text: str) -> list[bytes]:
    pre = pre_tokenizer(kind)
    words = [word for word, _ in pre.build().pre_tokenize_str(text)]
    return [word.encode() if pre.raw else bytes(BYTES[char] for char in word) for word in words]


def _words(kind: str, text: str) -> list[str]:
    return [piece.decode() for piece in _pieces(kind, text)]


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_nothing_is_lost(kind: str) -> None:
    for text in (
        "It's 12345 DON'T  héLLo!?\r\n\n wörld 日本語かな한국 ١٢٣ ก็ 🙂\t x  ",
        "",
        " ",
        "\n",
        "a",
        "'S 1234567",
    ):
        assert b"".join(_pieces(kind, text)).decode() == text


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("gpt-2", "I'll  go, 1234!", ["I", "'ll", " ", " go", ",", " 1234", "!"]),
        ("gpt-2", "WE'LL", ["WE", "'", "LL"]),
        ("llama-bpe", "WE'LL 12345\n\nx", ["WE", "'LL", " ", "123", "45", "\n\n", "x"]),
        ("qwen2", "a=12 b\n ", ["a", "=", "1", "2", " b", "\n", " "]),
        ("qwen35", "กิ x", ["กิ", " x"]),
        ("starcoder", "x 12", ["x", " ", "1", "2"]),
        ("falcon", "x 1234?!", ["x", " ", "123", "4", "?!"]),
        ("deepseek-llm", "Hello 123 中文\n", ["Hello", " ", "123", " ", "中文", "\n"]),
        ("deepseek-llm", "გ a", ["გ", " a"]),
        ("deepseek-coder", "f(x) 12", ["f", "(", "x", ")", " ", "1", "2"]),
        ("deepseek-v3", ".Net 12345 かな漢 é", [".Net", " ", "123", "45", " ", "かな漢", " é"]),
        ("gpt-4o", "iPhone's HTTPServer 12345/\n", ["i", "Phone's", " HTTPServer", " ", "123", "45", "/\n"]),
        ("tekken", "iPhone's 12", ["i", "Phone", "'s", " ", "1", "2"]),
        ("kimi-k2", "漢字abc 123", ["漢字", "abc", " ", "123"]),
        ("superbpe", "a b 1234567 c", ["a b ", "1", "234", "567", " c"]),
        ("afmoe", "12345", ["12", "345"]),
        ("bloom", "Hi, you", ["Hi", ",", " you"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
        ("default", "a 1234", ["a", " ", "123", "4"]),
    ],
)
def test_words(kind: str, text: str, words: list[str]) -> None:
    assert _words(kind, text) == words


def test_falcons_numbers_are_found_among_bytes() -> None:
    """As in its tokenizer.json: the second byte of a Cyrillic м is GPT-2's 1/4."""
    punctuation, digits = pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False)
    threes = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    theirs = pre_tokenizers.Sequence([punctuation, pre_tokenizers.ByteLevel(False, use_regex=True), digits, threes])
    for text in ("a 12", "price: 12,345.67 $5", "м and мир 999", "x²y ½6789", "don't `x` +=", " 日本1234  ٣٤٥\n"):
        assert pre_tokenizer("falcon").build().pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'qwen9' .* isn't supported; supported: a.x-4.0, afmoe"):
        pre_tokenizer("qwen9")
