"""The files that sentence-transformers writes beside a model, and what is refused of them."""

from __future__ import annotations

import json

import pytest

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.sentence_transformers import FLAGS, WAYS, TextRules, read_modules, read_text_rules

ST = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path):
    """`folder(modules=[(type, path, config)], **other files)`."""

    def write(*modules, **files):
        entries = []
        for i, (kind, path, config) in enumerate(modules):
            entries.append({"idx": i, "name": str(i), "path": path, "type": kind})
            if config is not None:
                (tmp_path / path).mkdir(exist_ok=True)
                (tmp_path / path / "config.json").write_text(json.dumps(config))
        if modules:
            (tmp_path / "modules.json").write_text(json.dumps(entries))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


def pooling(**config):
    return (ST + "Pooling", "1_Pooling", {"word_embedding_dimension": 8, **config})


TRANSFORMER = (ST + "Transformer", "", None)


def test_no_modules(folder):
    assert read_modules(folder()) is None


@pytest.mark.parametrize("mode", WAYS)
def test_ways_by_flag_and_by_name(folder, mode):
    assert read_modules(folder(TRANSFORMER, pooling(**{FLAGS[mode]: True}))).ways == (WAYS[mode],)
    assert read_modules(folder(TRANSFORMER, pooling(pooling_mode=mode))).ways == (WAYS[mode],)


def test_flags_as_the_library_spells_them():
    assert set(FLAGS.values()) == {
        "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens", "pooling_mode_lasttoken",
        "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
    }  # fmt: skip


def test_several_ways_and_modules(folder):
    dense = {
        "in_features": 16,
        "out_features": 4,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    found = read_modules(
        folder(
            ("custom_st.Transformer", "", None),
            pooling(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True),
            (ST + "Dense", "2_Dense", dense),
            (ST + "Normalize", "3_Normalize", None),
        )
    )
    assert found.ways == ("max", "mean")
    assert [(d.inputs, d.outputs, d.bias, d.activation, d.folder.name) for d in found.dense] == [
        (16, 4, False, "Identity", "2_Dense")
    ]
    assert found.normalize


def test_yes_no_reranker(folder):
    config = {"true_token_id": 9, "false_token_id": 2}
    found = read_modules(folder(TRANSFORMER, ("sentence_transformers.cross_encoder.modules.LogitScore", "1_S", config)))
    assert found.score_tokens == (9, 2)


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ([(ST + "WordEmbeddings", "", None)], "WordEmbeddings"),
        ([pooling(pooling_mode="median")], "median"),
        ([pooling(include_prompt=False)], "include_prompt"),
        ([(ST + "Dense", "2_Dense", {"in_features": 2})], "out_features"),
        ([(ST + "Dense", "2_Dense", {"in_features": 2, "out_features": 2, "activation_function": "a.Mish"})], "Mish"),
        ([(ST + "Dense", "2_Dense", {"in_features": 2, "out_features": 2, "use_residual": True})], "residual"),
        ([(ST + "Normalize", "1_N", None), (ST + "Dense", "2_Dense", {})], "behind Normalize"),
    ],
)
def test_what_is_refused(folder, modules, why):
    with pytest.raises(ConfigError, match=why):
        read_modules(folder(TRANSFORMER, *modules))


def test_broken_modules(tmp_path):
    for text in ("{", "{}", "[1]"):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(ConfigError, match=r"modules\.json"):
            read_modules(tmp_path)


def test_text_rules(folder):
    own = {"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    lengths = {"max_seq_length": 77, "do_lower_case": True}
    rules = read_text_rules(folder(config_sentence_transformers=own, sentence_bert_config=lengths))
    assert (rules.max_len, rules.similarity) == (77, "dot")
    assert rules.apply("Hi") == "q: hi"
    assert rules.apply("Hi", "document") == "hi"
    with pytest.raises(ClientError, match="no prompt 'passage'; its prompts: document, query"):
        rules.apply("Hi", "passage")


def test_neutral_rules(folder):
    rules = read_text_rules(folder())
    assert rules == TextRules()
    assert rules.apply("Hi") == "Hi"
    with pytest.raises(ClientError, match="its prompts: none"):
        rules.apply("Hi", "query")


def test_default_prompt_must_exist(folder):
    with pytest.raises(ConfigError, match="default_prompt_name 'query'"):
        read_text_rules(folder(config_sentence_transformers={"default_prompt_name": "query"}))
