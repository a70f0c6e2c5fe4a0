"""tokenizer.json with special tokens that only the small files beside it name, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.tokenizer import Tokenizer

TOKENS = ("<s>", "</s>", "<unk>", *"abdpx!<>[]", "ab", "<plain>", "1", "2", "12")
TEXT = "ab<s>!a</s><plain>[pad]b<x>"


def _folder(folder: Path, **files: Any) -> Path:
    model = tokenizers.models.BPE({t: i for i, t in enumerate(TOKENS)}, [("a", "b"), ("1", "2")], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    wrong = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([wrong, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


BOS = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}},
    "a word of the vocabulary": {"tokenizer_config": {"additional_special_tokens": ["<plain>"]}},
    "new ones": {"tokenizer_config": {"extra_special_tokens": ["<x>", "<plain>"], "pad_token": "[pad]"}},
    "named": {"tokenizer_config": {"extra_special_tokens": {"plain_token": "<plain>"}, "image_token": "<x>"}},
    "the map": {"special_tokens_map": {"additional_special_tokens": ["<x>"], "pad_token": "[pad]", "bos_token": BOS}},
    "both": {
        "tokenizer_config": {"mask_token": "<plain>", "bos_token": "</s>"},
        "special_tokens_map": {"bos_token": BOS},
    },
    "by id": {"tokenizer_config": {"added_tokens_decoder": {"14": {"content": "<plain>"}}, "pad_token": "[pad]"}},
}


@pytest.mark.parametrize("case", CASES)
def test_special_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer.load(_folder(tmp_path, **CASES[case]))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs.encode(TEXT)
    assert ours.encode(TEXT) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.special_tokens.get("bos_token"), ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)


def test_no_token_comes_behind_the_models_last(tmp_path: Path) -> None:
    """It has no numbers for one that its files name without need, such as a [PAD] that was never trained."""
    named = {"additional_special_tokens": ["<x>", "<plain>"], "pad_token": "[pad]"}
    ours = Tokenizer.load(_folder(tmp_path, tokenizer_config=named, config={"vocab_size": len(TOKENS) + 1}))
    assert (ours.token_id("[pad]"), ours.token_id("<x>"), ours.vocab_size) == (len(TOKENS), None, len(TOKENS) + 1)
    inner = {"text_config": {"vocab_size": len(TOKENS)}}
    ours = Tokenizer.load(_folder(tmp_path, tokenizer_config=named, config=inner))
    assert (ours.token_id("[pad]"), ours.encode("<plain>"), ours.decode([14])) == (None, [14], "")


def test_a_plain_word_for_padding_stays_text(tmp_path: Path) -> None:
    ours = Tokenizer.load(_folder(tmp_path, tokenizer_config={"pad_token": "!"}))
    assert ours.decode(ours.encode("a!")) == "a!"


TEKKEN = r"\p{N}|[^\p{N}]+"


def test_a_tekken_beside_it_knows_the_words_better(tmp_path: Path) -> None:
    one, two, twelve = (TOKENS.index(token) for token in ("1", "2", "12"))
    assert Tokenizer.load(_folder(tmp_path)).encode("12") == [twelve]
    assert Tokenizer.load(_folder(tmp_path, tekken={"config": {"pattern": TEKKEN}})).encode("12") == [one, two]
    (tmp_path / "tekken.json").unlink()
    asked = _folder(tmp_path, tokenizer_config={"fix_mistral_regex": True})
    assert Tokenizer.load(asked).encode("12") == [one, two]
    with pytest.raises(ConfigError, match="isn't a regular expression"):
        Tokenizer.load(_folder(tmp_path, tekken={"config": {"pattern": "("}}))
