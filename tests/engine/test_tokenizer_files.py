"""Every format in which a folder can carry its tokenizer gives the ids that llama.cpp's fixtures expect."""

from __future__ import annotations

import base64
import json
import random
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import read_gguf
from kvasir.engine.sentencepiece_model import read_sentencepiece
from kvasir.engine.tiktoken_file import read_ranks, read_tekken
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.tokenizer_files import own_eos_token_ids
from kvasir.engine.tokenizer_models import Spaces

Fixtures = list[tuple[str, list[int]]]


@pytest.fixture(scope="module")
def fixtures(data: Callable[[str], Path]) -> Callable[[str], Fixtures]:
    def read(name: str) -> Fixtures:
        path = data(f"tokenizers-gguf-vocab/ggml-vocab-{name}.gguf")
        given = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        expected = Path(f"{path}.out").read_text().splitlines()
        return [(text, [int(i) for i in line.split()]) for text, line in zip(given, expected, strict=False)]

    return read


@pytest.fixture(scope="module")
def metadata(data: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    return lambda name: read_gguf(data(f"tokenizers-gguf-vocab/ggml-vocab-{name}.gguf")).metadata


def _varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], kind: int = 2, **spaces: int
) -> bytes:
    """A tokenizer.model: pieces, the trainer's settings, the normaliser's."""
    pieces = (
        _field(1, token.encode()) + _field(2, float(score)) + (_field(3, int(t)) if t != 1 else b"")
        for token, score, t in zip(tokens, scores, types, strict=True)
    )
    trainer = _field(3, kind) + _field(40, 0) + _field(41, 1) + _field(42, 2) + _field(43, -1)
    names = {"prefix": 3, "collapse": 4}
    normalizer = _field(1, b"identity") + b"".join(_field(names[name], value) for name, value in spaces.items())
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, trainer) + _field(3, normalizer)


def _write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def _check(tokenizer: Tokenizer, fixtures: Fixtures) -> None:
    for text, expected in fixtures:
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


def _saved(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The same after a round trip through tokenizer.json."""
    folder.mkdir()
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_gpt2s_pair_of_files(data: Callable[[str], Path], fixtures: Callable[[str], Fixtures], tmp_path: Path) -> None:
    source = data("tokenizers-gpt2-small/tests/fixtures")
    shutil.copy(source / "gpt2_vocab.json", tmp_path / "vocab.json")
    shutil.copy(source / "gpt2_merges.txt", tmp_path / "merges.txt")
    tokenizer = Tokenizer.load(tmp_path)
    _check(tokenizer, fixtures("gpt-2"))
    _check(_saved(tokenizer, tmp_path / "saved"), fixtures("gpt-2"))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((50256,), 50256)
    assert tokenizer.encode("<|endoftext|>a") == [50256, 64]
    _write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True, "bos_token": "!"})
    assert Tokenizer.load(tmp_path).encode("a") == [0, 64]
    _write(tmp_path, tokenizer_config={"tokenizer_class": "CLIPTokenizer"})
    with pytest.raises(ConfigError, match=r"class CLIPTokenizer isn't supported .known: GPT2Tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").unlink()
    _write(tmp_path, tokenizer_config={})
    with pytest.raises(ConfigError, match=r"needs vocab.json beside it"):
        Tokenizer.load(tmp_path)


def test_added_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_tokens(["<call>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    think = {"content": "<think>", "special": False, "normalized": False}
    _write(tmp_path, added_tokens={"<call>": 3, "<more>": 6})
    _write(
        tmp_path, tokenizer_config={"added_tokens_decoder": {"4": {"content": "<end>", "special": True}, "5": think}}
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<think>b<call><end><more>") == [0, 5, 1, 3, 4, 6]
    assert {i for i, text in tokenizer.added_tokens.items() if not tokenizer.decode([i])} == {4}


def test_special_tokens_that_have_no_id_anywhere(tmp_path: Path) -> None:
    """They come behind the vocabulary, as in transformers, if the model has numbers for them."""
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    named = {"additional_special_tokens": ["<x>", "b", "<y>"], "pad_token": "a"}
    vocab = {"a": 0, "b": 1, "<|endoftext|>": 2}
    _write(tmp_path, vocab=vocab, special_tokens_map=named, config={"vocab_size": 4})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<x>b<|endoftext|>") == [0, 3, 1, 2]
    assert (tokenizer.decode([3, 1, 2]), tokenizer.vocab_size) == ("", 4)
    _write(tmp_path, tokenizer_config={"additional_special_tokens": "<x>"})
    with pytest.raises(ConfigError, match="additional_special_tokens must be a list or an object, got '<x>'"):
        Tokenizer.load(tmp_path)


def test_roberta_reads_pairs(tmp_path: Path) -> None:
    _write(
        tmp_path,
        vocab={"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "<mask>": 5},
        tokenizer_config={"tokenizer_class": "RobertaTokenizer", "mask_token": {"content": "<mask>", "lstrip": True}},
        added_tokens={"<extra>": 7},
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ConfigError, match=r"'a' [+] 'b' isn't made of tokens"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_within("a", "b")[0] == [0, 3, 1, 1, 4, 1]
    assert tokenizer.encode("a<extra>b") == [0, 3, 7, 4, 1]
    assert tokenizer.decode([3, 7, 4, 5]) == "a<extra>b"


def test_qwens_ranks(data: Callable[[str], Path], fixtures: Callable[[str], Fixtures], tmp_path: Path) -> None:
    shutil.copy(data("tokenizers-qwen/qwen_agent/utils/qwen.tiktoken"), tmp_path)
    started = time.thread_time()
    tokenizer = Tokenizer.load(tmp_path)
    assert time.thread_time() - started < 10
    _check(tokenizer, fixtures("qwen2"))
    assert tokenizer.encode("<|im_start|>a<|extra_204|>") == [151644, 64, 151850]
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (151851, (151643,))


def test_tekken(data: Callable[[str], Path], fixtures: Callable[[str], Fixtures], tmp_path: Path) -> None:
    ranks = read_ranks(data("tokenizers-qwen/qwen_agent/utils/qwen.tiktoken").read_bytes())
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(t).decode()} for t, rank in ranks.items()]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    config = {"pattern": pattern, "default_vocab_size": 5000, "default_num_special_tokens": 1000}
    _write(tmp_path, tekken={"config": config, "vocab": vocab})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("[INST]a[/INST]") == [1, 3, 64 + 1000, 4]
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (5000, (2,), 1)
    assert tokenizer.token_text(999) == "<SPECIAL_999>"
    assert own_eos_token_ids(tmp_path) == (2,)
    texts = [text for text, expected in fixtures("qwen2") if expected and max(expected) < 4000 and "'" not in text]
    assert len(texts) > 10
    for text, expected in fixtures("qwen2"):
        if text in texts:
            assert tokenizer.encode(text, add_special_tokens=False) == [i + 1000 for i in expected]
    listed = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "[THINK]"}]
    _write(tmp_path, tekken={"config": config, "vocab": vocab, "special_tokens": listed})
    assert Tokenizer.load(tmp_path).encode("[THINK]a") == [1, 1064]
    for broken in (b"", b"{}", b'{"config": {}}', json.dumps({"config": config, "vocab": [{"rank": 0}]}).encode()):
        with pytest.raises(ConfigError, match=r"tekken.json is malformed"):
            read_tekken(broken)


def test_sentencepiece_model(
    metadata: Callable[[str], dict[str, Any]], fixtures: Callable[[str], Fixtures], tmp_path: Path
) -> None:
    fields = metadata("phi-3")
    parts = [fields[f"tokenizer.ggml.{name}"][:32000] for name in ("tokens", "scores", "token_type")]
    parts[2] = [2, 3, 3, *parts[2][3:]]
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(*parts, collapse=0))
    tokenizer = Tokenizer.load(tmp_path)
    _check(tokenizer, fixtures("phi-3"))
    _check(_saved(tokenizer, tmp_path / "saved"), fixtures("phi-3"))
    assert tokenizer.encode("a b<s>") == [1, 263, 289, 1]
    assert (tokenizer.eos_token_ids, tokenizer.special_tokens["bos_token"]) == ((2,), "<s>")
    assert tokenizer.decode(tokenizer.encode("a  b é🙂")) == "a  b é🙂"
    added = {"32000": {"content": "<|end|>", "special": True, "rstrip": True}, "32002": {"content": "<think>"}}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_eos_token": True,
        "added_tokens_decoder": added,
        "legacy": False,
    }
    _write(tmp_path, tokenizer_config=config)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<|end|>\n <think>b", add_special_tokens=False) == [263, 32000, 32002, 29890]
    assert tokenizer.encode("a") == [1, 263, 2]
    _write(tmp_path, tokenizer_config={"tokenizer_class": "DebertaV2Tokenizer"})
    with pytest.raises(ConfigError, match="class DebertaV2Tokenizer isn't supported"):
        Tokenizer.load(tmp_path)


def test_xlm_roberta_counts_its_own_way(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁a", "b", "▁"]
    scores, types = [0.0, 0.0, 0.0, -1.0, -2.0, -3.0], [2, 3, 3, 1, 1, 1]
    (tmp_path / "sentencepiece.bpe.model").write_bytes(_sentencepiece(tokens, scores, types, kind=1))
    _write(tmp_path, tokenizer_config={"tokenizer_class": "XLMRobertaTokenizer"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode(" a  b<mask>") == [0, 4, 6, 5, 7, 2]
    assert tokenizer.encode("日", add_special_tokens=False) == [6, 3]
    assert tokenizer.encode_within("a", "a")[0] == [0, 4, 2, 2, 4, 2]
    _write(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    assert Tokenizer.load(tmp_path).encode("a") == [3, 2]


def test_bert_word_pieces(
    metadata: Callable[[str], dict[str, Any]], fixtures: Callable[[str], Fixtures], tmp_path: Path
) -> None:
    tokens = metadata("bert-bge")["tokenizer.ggml.tokens"]
    own = [t if t.startswith("[") and t.endswith("]") else t[1:] if t[0] == "▁" else f"##{t}" for t in tokens]
    (tmp_path / "vocab.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    _check(tokenizer, fixtures("bert-bge"))
    _check(_saved(tokenizer, tmp_path / "saved"), fixtures("bert-bge"))
    assert tokenizer.encode("Ünaffable [MASK]") == [101, 14477, 20961, 3468, 103, 102]
    assert tokenizer.encode_within("a", "b")[1] == [0, 0, 0, 1, 1]
    _write(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    assert Tokenizer.load(tmp_path).encode("Hello", add_special_tokens=False) == [100]
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"has no line \[UNK\] \(unk_token\)"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_names_what_was_looked_for(tmp_path: Path) -> None:
    assert own_eos_token_ids(tmp_path) == ()
    with pytest.raises(ConfigError, match=r"looked for tokenizer.json, tekken.json, .* pass --tokenizer FOLDER"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"a", b"YQ== 0\nzz", b"YQ== x", b"YQ== 0 1", b"\xff\xfe 1", b"", b"YQ== 999999999999"]
)
def test_broken_rank_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiktoken file|have ids up to"):
        Tokenizer.load(tmp_path)


def test_a_rank_file_of_an_unknown_class(tmp_path: Path) -> None:
    (tmp_path / "other.tiktoken").write_bytes(b"YQ== 0\n")
    with pytest.raises(ConfigError, match=r"no tokenizer_class .* isn't supported .known: QWenTokenizer"):
        Tokenizer.load(tmp_path)
    added = {"1": {"content": "<|user|>", "special": True}}
    _write(tmp_path, tokenizer_config={"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added})
    assert Tokenizer.load(tmp_path).encode("<|user|>a") == [1, 0]


def test_broken_sentencepiece_models_end_in_a_clear_error() -> None:
    good = _sentencepiece(["<unk>", "<s>", "</s>", "a"], [0, 0, 0, -1], [2, 3, 3, 1])
    assert read_sentencepiece(good).vocabulary.tokens[3] == "a"
    refused = 0
    for at in range(len(good)):
        for broken in (good[:at], good[:at] + b"\xff" + good[at + 1 :], good[:at] + b"\xff" * 12 + good[at:]):
            try:
                read_sentencepiece(broken)
            except ConfigError:
                refused += 1
    assert refused > len(good)
    for kind, match in ((3, "type word"), (9, "type 9")):
        with pytest.raises(ConfigError, match=match):
            read_sentencepiece(_sentencepiece(["a"], [0], [1], kind=kind))
    with pytest.raises(ConfigError, match="holds no tokens"):
        read_sentencepiece(b"")


def _charsmap() -> bytes:
    """A table that replaces "a" by "bc", as SentencePiece compiles it: one block of units, the root first."""
    units = [0] * 512
    units[0] = 256 << 10  # children of the root begin at 256
    units[256 ^ ord("a")] = ord("a") | 0x100 | (ord("a") << 10)  # is a leaf too, whose unit lies at 256
    units[256] = 1 << 31 | 0
    table = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(table).to_bytes(4, "little") + table + b"bc\0"


def test_tables_of_replacements_can_not_be_walked_out_of() -> None:
    good = _charsmap()
    assert Spaces(prefix=False, charsmap=good).normalizer().normalize_str("xay") == "xbcy"
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(good)
        for _ in range(draw.choice([1, 9])):
            at = draw.choice([draw.randrange(8), draw.randrange(1028, len(good)), draw.randrange(len(good))])
            broken[at] = draw.randrange(256)
        try:
            Spaces(charsmap=bytes(broken)).normalizer().normalize_str("xayabcdefgh")
        except ConfigError:
            refused += 1
    assert refused > 100
    for broken in (b"\0", good[:40], good[:-1], good[:4] + good[8:], b"\0\0\0\0\0"):
        with pytest.raises(ConfigError, match="precompiled_charsmap"):
            Spaces(charsmap=broken).normalizer()
