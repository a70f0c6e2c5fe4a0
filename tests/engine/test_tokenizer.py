"""Streamed text equals the text decoded at once, for every kind of tokenizer and any ids; so does tokenizers' own."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little girl named Lily. She liked to play outside.",
    "Die Straße führt über die Brücke; naïve café, crème brûlée.",
    "日本語のテキストと中文文本。 🙂🙃 👩‍👩‍👧 ∑∂ €",
    "def main():\n    return {'a': 1}\t# done\n\n",
] * 20
SAMPLES = [*CORPUS[:4], "", " ", "  two  spaces  ", "a", "\n", "👩‍👩‍👧", "日本", "x <|end|> y", "é", "🏳️‍🌈 ok"]
KINDS = ["byte_level", "byte_fallback", "no_strip", "metaspace", "wordpiece", "no_decoder"]


def _byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return backend


def _byte_fallback(strip: bool = True) -> tokenizers.Tokenizer:
    """Llama's kind: characters that the vocabulary lacks are written as tokens <0xNN>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", *"abcdehilmnorst,.日🙂é"]
    merges = [("▁", "▁"), ("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n")]
    pieces += ["▁a", "th", "the", "▁the", "in"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return backend


def _metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=["[UNK]"]))
    return backend


def _no_decoder() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "日": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _wrapped(backend: tokenizers.Tokenizer, **special: str) -> Tokenizer:
    eos = [backend.token_to_id("<|end|>")]
    return Tokenizer(backend, eos=eos, special=special, templates=ChatTemplates({}, {}))


@pytest.fixture(scope="session")
def backends() -> dict[str, tokenizers.Tokenizer]:
    found = {
        "byte_level": _byte_level(),
        "byte_fallback": _byte_fallback(),
        "no_strip": _byte_fallback(strip=False),
        "metaspace": _metaspace(),
        "wordpiece": _wordpiece(),
        "no_decoder": _no_decoder(),
    }
    for backend in found.values():
        backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<｜odd▁one｜>", special=True)])
        backend.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return found


@pytest.fixture(scope="session")
def gpt2(data: Callable[[str], Path]) -> tokenizers.Tokenizer:
    folder = data("tokenizers-gpt2-small/tests/fixtures")
    model = models.BPE.from_file(str(folder / "gpt2_vocab.json"), str(folder / "gpt2_merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


@pytest.fixture(scope="session")
def stories(data: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(data("model-stories260k/hf"))


def _streamed(tokenizer: Tokenizer, ids: list[int], chunk: int, skip: bool, prompt: list[int] | None = None) -> str:
    stream = tokenizer.stream(prompt or [], skip_special_tokens=skip)
    parts = [stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return "".join(parts) + stream.finish()


def _bytes_well_formed(backend: tokenizers.Tokenizer, ids: list[int], skip: bool) -> bool:
    """Whether each run of <0xNN> tokens is UTF-8: only then `tokenizers` keeps the characters of the run."""
    added = backend.get_added_tokens_decoder()
    tokens = [backend.id_to_token(i) for i in ids if not (skip and i in added and added[i].special)]
    runs = bytearray()
    for token in [*filter(None, tokens), "end"]:
        if token.startswith("<0x"):
            runs.append(int(token[3:5], 16))
            continue
        try:
            runs.decode()
        except UnicodeDecodeError:
            return False
        runs.clear()
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text(backends: dict[str, tokenizers.Tokenizer], kind: str) -> None:
    backend = backends[kind]
    tokenizer = _wrapped(backend)
    texts = st.sampled_from(SAMPLES).map(lambda text: list(backend.encode(text, add_special_tokens=False).ids))
    noise = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12)
    ids_lists = st.lists(st.one_of(texts, noise), max_size=4).map(lambda parts: [i for part in parts for i in part])

    @settings(max_examples=300)
    @given(ids=ids_lists, chunk=st.integers(1, 5), skip=st.booleans())
    def check(ids: list[int], chunk: int, skip: bool) -> None:
        text = tokenizer.decode(ids, skip)
        assert _streamed(tokenizer, ids, chunk, skip) == text
        if kind not in ("byte_fallback", "no_strip") or _bytes_well_formed(backend, ids, skip):
            assert text == backend.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_after_a_prompt_is_the_rest_of_the_whole(backends: dict[str, tokenizers.Tokenizer], kind: str) -> None:
    tokenizer = _wrapped(backends[kind])
    draw = random.Random(1)
    for _ in range(200):
        prompt = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(6))]
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(8))]
        whole = tokenizer.stream()
        before = whole.push(prompt)  # the half character at its end belongs to what follows
        assert before + _streamed(tokenizer, ids, 1, True, prompt) == tokenizer.decode(prompt + ids)


def test_gpt2_random_ids(gpt2: tokenizers.Tokenizer) -> None:
    tokenizer = _wrapped(gpt2)
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        assert _streamed(tokenizer, ids, draw.randrange(1, 4), True) == gpt2.decode(ids)
    assert tokenizer.decode(tokenizer.encode(CORPUS[2])) == CORPUS[2]


def test_stories(stories: Tokenizer, data: Callable[[str], Path]) -> None:
    ids = stories.encode("Once upon a time, héllo 🙂")
    assert ids == [1, 403, 407, 261, 378, 432, 270, 485, 306, 414, 410, 243, 162, 156, 133]
    assert stories.encode("a", add_special_tokens=False)[0] != 1
    assert stories.decode(ids) == "Once upon a time, héllo 🙂"
    assert (stories.bos_token_id, stories.eos_token_id, stories.eos_token_ids, stories.vocab_size) == (
        1,
        2,
        (1, 2),
        512,
    )
    backend = tokenizers.Tokenizer.from_file(str(data("model-stories260k/hf/tokenizer.json")))
    greedy = json.loads(data("model-stories260k/greedy_256.json").read_text())["greedy_ids"]
    for skip in (True, False):
        assert _streamed(stories, greedy, 1, skip) == backend.decode(greedy, skip_special_tokens=skip)


def test_a_continuation_keeps_its_space_and_a_beginning_does_not(stories: Tokenizer) -> None:
    ids = stories.encode("Lily", add_special_tokens=False)
    assert _streamed(stories, ids, 1, True, stories.encode("Once")) == " Lily"
    assert _streamed(stories, ids, 1, True, [1]) == "Lily"  # a skipped BOS is no text
    assert _streamed(stories, ids, 1, False, [1]) == " Lily"
    stream = stories.stream([*stories.encode("x"), 243, 162])  # half of an emoji
    assert stream.push([156]) == ""
    assert stream.push([133]) == "🙂"


def test_half_characters_wait_and_broken_ones_are_replaced(stories: Tokenizer, gpt2: tokenizers.Tokenizer) -> None:
    stream = stories.stream([410])
    assert [stream.push([i]) for i in (243, 162, 156, 133)] == ["", "", "", "🙂"]
    assert stream.push([243, 162, 410]).count("\ufffd") == 2  # one for each byte, as SentencePiece writes it
    assert stream.push([243]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    tokenizer = _wrapped(gpt2)
    emoji = tokenizer.encode("🙂")
    assert _streamed(tokenizer, emoji[:-1], 1, True) == "\ufffd"
    assert _streamed(tokenizer, [*emoji[:-1], *tokenizer.encode("a")], 1, True) == "\ufffda"


def test_characters_of_a_byte_run_come_one_by_one_and_survive_a_broken_neighbour(stories: Tokenizer) -> None:
    stream = stories.stream([410])
    runs = ["🙂".encode(), "日".encode(), b"\xff", "é".encode()]
    assert [stream.push([byte + 3 for byte in run]) for run in runs] == ["🙂", "日", "\ufffd", "é"]


def test_token_texts(stories: Tokenizer, gpt2: tokenizers.Tokenizer, backends: dict[str, tokenizers.Tokenizer]) -> None:
    assert stories.token_text(403) == " Once"
    assert stories.token_bytes(243) == b"\xf0"
    assert stories.token_text(243) == "\ufffd"
    assert stories.token_text(1) == "<s>"
    assert stories.token_bytes(99999) == b""
    tokenizer = _wrapped(gpt2)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(" the")] == [b" the"]
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("日本 🙂\n")) == "日本 🙂\n".encode()
    words = _wrapped(backends["wordpiece"])
    assert "".join(words.token_text(i) for i in words.encode("little girl")).strip() == "little girl"
    assert words.token_text(words.encode("##")[0]).startswith((" ", "#"))


def test_special_tokens_are_text_only_on_demand(backends: dict[str, tokenizers.Tokenizer]) -> None:
    tokenizer = _wrapped(backends["byte_level"], bos_token="<｜odd▁one｜>", eos_token="<|end|>")
    ids = tokenizer.encode("a<|end|>b<think>")
    assert tokenizer.decode(ids) == "ab<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|>b<think>"
    assert tokenizer.eos_token_id == tokenizer.eos_token_ids[0]
    assert tokenizer.bos_token_id is not None
    assert tokenizer.token_text(tokenizer.bos_token_id) == "<｜odd▁one｜>"


def test_spaces_between_added_tokens(backends: dict[str, tokenizers.Tokenizer]) -> None:
    def text(kind: str, spaces: bool, written: str = "a<|end|><think><|end|>a<|end|>") -> str:
        tokenizer = _wrapped(backends[kind])
        ids = [tokenizer.token_id(token) or 0 for token in re.findall(r"<.*?>|a", written)]
        stream = tokenizer.stream(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        return "".join(stream.push([i]) for i in ids) + stream.finish()

    assert text("wordpiece", True) == "a <|end|> <think> <|end|> a <|end|>"
    assert text("wordpiece", False) == "a <|end|><think><|end|> a <|end|>"
    assert text("byte_level", False) == text("byte_level", True) == "a<|end|><think><|end|>a<|end|>"
    tokenizer = _wrapped(backends["wordpiece"])
    end = tokenizer.encode("<|end|>")
    after = tokenizer.stream(end, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert after.push(end) == "<|end|>"
    skipped = tokenizer.stream(end, spaces_between_special_tokens=False)
    assert skipped.push([*end, *end]) == ""


def test_bos_comes_from_the_post_processor() -> None:
    backend = _byte_level()
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = _wrapped(backend)
    assert tokenizer.encode("Once upon")[0] == bos
    assert bos not in tokenizer.encode("Once upon", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"  # neither cut nor padded


def test_batch_and_threads(stories: Tokenizer) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(CORPUS * 5)]
    alone = [stories.encode(text) for text in texts]
    assert stories.encode_batch(texts) == alone
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stories.encode, texts)) == alone
        assert list(pool.map(stories.decode, alone)) == texts


@pytest.mark.parametrize("text", [None, 3, ["a"], b"a", "\ud800"])
def test_what_is_no_text_is_refused(stories: Tokenizer, text: object) -> None:
    with pytest.raises(ClientError):
        stories.encode(text)  # type: ignore[arg-type]
    with pytest.raises(ClientError):
        stories.encode_batch([text])  # type: ignore[list-item]


def test_a_broken_or_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json can't be read"):
        Tokenizer.load(tmp_path)
    backend = _no_decoder()
    backend.decoder = decoders.CTC()
    with pytest.raises(ConfigError, match="decoder CTC isn't supported"):
        _wrapped(backend)


def test_special_tokens_as_objects_and_render(tmp_path: Path) -> None:
    _byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"
    other = Tokenizer.load(tmp_path, chat_template="[{{ messages[0].content }}]{{ x }}")
    assert other.render_chat([{"role": "user", "content": "hi"}], x=1) == "[hi]1"


def test_importing_costs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, kvasir.engine.transcript; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
