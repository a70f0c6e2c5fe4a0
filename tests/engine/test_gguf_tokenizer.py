"""Ids equal llama.cpp's from the metadata of a GGUF file alone, for every kind of tokenizer that it writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import read_gguf
from kvasir.engine.gguf_tokenizer import gguf_eos_token_ids, read_gguf_tokenizer
from kvasir.engine.tokenizer import Tokenizer

VOCABULARIES = ["bert-bge", "gpt-2", "phi-3", "qwen2"]
Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def metadata(data: Callable[[str], Path]) -> Callable[[str], Metadata]:
    return lambda name: read_gguf(data(f"tokenizers-gguf-vocab/ggml-vocab-{name}.gguf")).metadata


@pytest.fixture(scope="module")
def stories(data: Callable[[str], Path]) -> Metadata:
    return read_gguf(data("model-stories260k/stories260k.f32.gguf")).metadata


def _fixtures(data: Callable[[str], Path], name: str) -> list[tuple[str, list[int]]]:
    path = data(f"tokenizers-gguf-vocab/ggml-vocab-{name}.gguf")
    given = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = Path(f"{path}.out").read_text().splitlines()
    assert len(given) == len(expected) + 1  # the separator is behind the last one too
    return [(text, [int(i) for i in line.split()]) for text, line in zip(given, expected, strict=False)]


def _texts(count: int, seed: int = 0) -> list[str]:
    """Words, runs of spaces and repetitions, and characters of all planes."""
    draw = random.Random(seed)
    common = "aaaeeetts  \n'.,0123ABhé日語🙂"
    ranges = [(0x20, 0x7F), (0xA0, 0x600), (0x600, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000)]

    def text() -> str:
        if draw.random() < 0.6:
            return "".join(draw.choice(common) for _ in range(draw.randrange(40)))
        return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(20)))

    return [text() for _ in range(count)]


def _joined_by_score(fields: Metadata, text: str) -> list[int]:
    """SentencePiece's rule in its plainest form: join the neighbours whose join scores best, the leftmost first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    usable = {token: i for i, token in enumerate(tokens) if fields["tokenizer.ggml.token_type"][i] in (1, 4, 5)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(scores[usable[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in usable]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    first_byte = tokens.index("<0x00>")
    return [
        i for part in parts for i in ([usable[part]] if part in usable else [first_byte + b for b in part.encode()])
    ]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(
    data: Callable[[str], Path], metadata: Callable[[str], Metadata], name: str
) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(name))
    for text, expected in _fixtures(data, name):
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


def test_a_model_file_and_its_folder_agree(data: Callable[[str], Path], stories: Metadata) -> None:
    ours, theirs = Tokenizer.from_gguf(stories), Tokenizer.load(data("model-stories260k/hf"))
    for text in [*_texts(300), "<s>a</s> b", "Once upon a time, héllo 🙂"]:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, special), text
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("Once upon a time, héllo 🙂")[:3] == [1, 403, 407]
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, 512)


def test_sentencepiece_joins_by_score(metadata: Callable[[str], Metadata], stories: Metadata) -> None:
    for fields in (metadata("phi-3"), stories):
        tokenizer = Tokenizer.from_gguf(fields)
        for text in filter(None, _texts(120, seed=1)):
            assert tokenizer.encode(text, add_special_tokens=False) == _joined_by_score(fields, text), text


def test_what_spells_a_special_token_is_one(metadata: Callable[[str], Metadata]) -> None:
    phi = Tokenizer.from_gguf(metadata("phi-3"))
    ids = phi.encode("<|user|>\nhi<|end|>\n<|assistant|>\n", add_special_tokens=False)
    assert (ids[0], ids[-2:]) == (32010, [32007, 32001])  # they swallow the line break, as Phi-3's tokenizer says
    assert phi.encode("a</s>\n\nb")[-1] == phi.encode("b")[-1]
    assert phi.encode("a")[0] == phi.bos_token_id == 1
    assert phi.eos_token_ids == (32000, 32007)
    assert phi.render_chat([{"role": "user", "content": "hi"}]) == "<s><|user|>\nhi<|end|>\n<|assistant|>\n"
    qwen = Tokenizer.from_gguf(metadata("qwen2"))
    assert qwen.encode("<|im_start|>a<|im_end|>") == [151644, 64, 151645]
    assert qwen.eos_token_ids == (151643, 151645)
    assert qwen.decode([151644, 64, 151645]) == "a"
    assert qwen.decode(qwen.encode("x</s>")) == "x</s>"  # plain text in this vocabulary
    assert qwen.encode("e\u0301") == qwen.encode("é")


def test_bert_has_its_frame_and_its_word_pieces(metadata: Callable[[str], Metadata]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata("bert-bge"))
    assert tokenizer.encode("Hello World") == [101, 7592, 2088, 102]
    assert tokenizer.encode("ünaffable") == [101, 14477, 20961, 3468, 102]
    assert tokenizer.decode(tokenizer.encode("unaffable word")) == "unaffable word"
    assert tokenizer.encode_within("a", "b", limit=None) == ([101, 1037, 102, 1038, 102], [0, 0, 0, 1, 1], 0)
    assert tokenizer.encode("[MASK]", add_special_tokens=False) == [103]


def _unigram(**more: Any) -> Metadata:
    pieces = {
        "<pad>": 0.0,
        "</s>": 0.0,
        "<unk>": 0.0,
        "▁": -2.0,
        "▁a": -1.0,
        "b": -3.0,
        "ab": -2.5,
        "▁ab": -3.0,
        "<x>": 0.0,
    }
    fields = {
        "model": "t5",
        "tokens": list(pieces),
        "scores": np.array(list(pieces.values()), np.float32),
        "token_type": np.array([3, 3, 2, 1, 1, 1, 1, 1, 4], np.int32),
        "remove_extra_whitespaces": True,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def test_unigram() -> None:
    tokenizer = Tokenizer.from_gguf(_unigram())
    assert tokenizer.encode(" a  ab<x>b ") == [4, 7, 8, 3, 5, 1]  # EOS behind it; a space after each added token
    assert tokenizer.encode("b日本b", add_special_tokens=False) == [3, 5, 2, 5]  # unknown characters are one token
    assert tokenizer.decode([4, 7, 8, 5]) == "a ab<x>b"
    framed = Tokenizer.from_gguf(_unigram(add_bos_token=True, bos_token_id=0, add_sep_token=True, seperator_token_id=1))
    assert framed.encode_within("a", "b", limit=None)[0] == [0, 4, 1, 1, 3, 5, 1]
    kept = Tokenizer.from_gguf(_unigram(remove_extra_whitespaces=False))
    assert kept.encode("a  a", add_special_tokens=False) == [4, 3, 4]


def _bpe(**more: Any) -> Metadata:
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<user>"],
        "token_type": [1, 1, 1, 3, 3, 3, 3, 4],
        "merges": ["a b"],
        "eos_token_id": 3,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def test_ends_of_an_answer_and_templates() -> None:
    harmony = read_gguf_tokenizer(_bpe())
    assert harmony.eos_token_ids == (3, 5, 6)  # Harmony's <|end|> ends a part of it only
    assert (gguf_eos_token_ids(_bpe()), gguf_eos_token_ids({})) == ((3, 5, 6), ())
    assert read_gguf_tokenizer(_bpe(eot_token_id=1, eom_token_id=99)).eos_token_ids == (3, 1, 5, 6)
    templates = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    found = Tokenizer.from_gguf({**_bpe(), **templates, "tokenizer.chat_templates": ["tool_use"]})
    assert found.templates.sources == {"default": "plain", "tool_use": "tools"}
    assert Tokenizer.from_gguf({**_bpe(), **templates}, chat_template="{{ 'own' }}").templates.sources == {
        "default": "{{ 'own' }}"
    }
    ids = found.encode("ab<user><|end|>")
    assert (ids, found.decode(ids)) == ([2, 7, 4], "ab<user>")


def test_some_kinds_know_whole_words_and_begin_with_bos() -> None:
    fields = {"tokens": ["a", "b", "c", "ab", "abc", "<s>"], "token_type": [1, 1, 1, 1, 1, 3], "bos_token_id": 5}
    assert Tokenizer.from_gguf(_bpe(pre="llama-bpe", **fields)).encode("abc") == [5, 4]
    assert Tokenizer.from_gguf(_bpe(pre="gpt-2", **fields)).encode("abc") == [3, 2]
    asked = Tokenizer.from_gguf(_bpe(pre="llama-bpe", add_bos_token=False, add_eos_token=True, **fields))
    assert asked.encode("abc") == [4, 3]


def test_words_that_a_file_does_not_say_how_to_cut(caplog: pytest.LogCaptureFixture) -> None:
    assert Tokenizer.from_gguf(_bpe(pre=None)).encode("ab") == [2]
    assert "as files of before May 2024: some tokens may be wrong" in caplog.text
    caplog.clear()
    Tokenizer.from_gguf(_bpe(pre="default"))
    assert not caplog.records


def test_gemma4_writes_bytes_and_runs_of_spaces() -> None:
    tokens = ["<bos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    fields = _bpe(model="gemma4", pre=None, tokens=tokens, token_type=[3] + [6] * 256 + [1] * 3, merges=["▁ a"])
    tokenizer = Tokenizer.from_gguf({**fields, "tokenizer.ggml.bos_token_id": 0})
    assert tokenizer.encode("a aé") == [0, 258, 259, 0xC3 + 1, 0xA9 + 1]
    assert tokenizer.decode([257, 258, 0xC3 + 1, 0xA9 + 1]) == " aé"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "no tokenizer"),
        (_bpe(model="rwkv"), r"'rwkv' \(tokenizer.ggml.model\) isn't supported; supported: bert, gemma4, gpt2"),
        (_bpe(pre="brand-new"), r"'brand-new' \(tokenizer.ggml.pre\) isn't supported; supported: .*qwen2"),
        (_bpe(tokens=None), "tokens is missing"),
        (_bpe(tokens=[1, 2]), "tokens must be an array of str"),
        (_bpe(tokens=["a", "a"], token_type=None), "'a' twice"),
        (_bpe(merges=None), "merges is missing"),
        (_bpe(merges=["ab"]), "doesn't name two tokens"),
        (_bpe(merges=["a c"]), "isn't made of tokens"),
        (_bpe(token_type=[1]), "token_type has 1 entries for 8 tokens"),
        (_bpe(add_bos_token=True), "add_bos_token is true, but the file names no bos_token"),
        (_bpe(add_bos_token=True, bos_token_id=99), "names no bos_token"),
        (_bpe(model="bert"), "unknown_token_id"),
        (_unigram(scores=np.zeros(3, np.float32)), "scores has 3 entries for 9 tokens"),
        (_unigram(precompiled_charsmap=np.array([1, 2], np.uint8)), "precompiled_charsmap. is malformed"),
        (_unigram(tokens="x"), "tokens must be an array"),
        (_unigram(unknown_token_id=99), "needs a token for unknown characters"),
        (_bpe(bos_token_id="x"), "bos_token_id must be an integer, got 'x'"),
        (_bpe(add_bos_token=[1]), r"add_bos_token must be true or false, got \[1\]"),
    ],
)
def test_what_is_refused(fields: Metadata, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Tokenizer.from_gguf(fields)


def test_any_metadata_gives_a_tokenizer_or_a_clear_error() -> None:
    draw = random.Random(0)
    odd: list[Any] = [None, 0, -1, 2**40, "x", "", [], [1, 2], ["a"] * 9, ["a", "b", "", "", "c", "d", "e", "f", "g"]]
    odd += [
        [1.5] * 9,
        True,
        {},
        b"x",
        float("nan"),
        [None],
        [[1]],
        [" a"],
        np.zeros(9, np.int32),
        np.uint32(3),
        [2**70] * 9,
    ]
    keys = ["model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"]
    keys += ["unknown_token_id", "add_sep_token", "precompiled_charsmap", "add_space_prefix", "eot_token_id"]
    worked = 0
    for _ in range(1500):
        fields = draw.choice([_bpe(), _unigram(), {**_unigram(), "tokenizer.ggml.model": "llama"}])
        for _ in range(draw.randrange(1, 3)):
            fields[f"tokenizer.ggml.{draw.choice(keys)}"] = draw.choice(odd)
        try:
            tokenizer = Tokenizer.from_gguf(fields)
            assert isinstance(tokenizer.decode(tokenizer.encode("a b\nab<|im_end|>")), str)
            worked += 1
        except ConfigError:
            pass
    assert 100 < worked < 1400
