"""Vectors by the pooler equal those of a few plain lines, however a prompt is cut."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.pooler import load_pooler
from kvasir.engine.pooling import HEAD, Labels, Pooling, check_dimensions, pooling_of, tasks_of
from kvasir.engine.request import PoolingParams, SamplingParams
from kvasir.engine.sentence_transformers import WAYS, Dense
from kvasir.engine.spec import Layer, Spec
from kvasir.engine.step import NewSequence, Slice

CPU = torch.device("cpu")
M = 6
LENGTHS = {3: 5, 0: 1, 7: 8}
"""seat -> tokens of its prompt"""


def plain(way, x):
    """[n, M] -> [M], as sentence-transformers' documentation has it."""
    n = len(x)
    ramp = torch.arange(1, n + 1)[:, None].float()
    return {
        "cls": lambda: x[0],
        "last": lambda: x[-1],
        "max": lambda: x.max(0).values,
        "mean": lambda: x.sum(0) / n,
        "mean_sqrt_len": lambda: x.sum(0) / n**0.5,
        "weighted_mean": lambda: (x * ramp).sum(0) / ramp.sum(),
    }[way]()


def entering(seat, length, pooling=None, types=()):
    return NewSequence(seat, [0] * length, length, SamplingParams(), 0, (), None, pooling or PoolingParams(), types)


def hidden():
    torch.manual_seed(0)
    return {seat: torch.randn(length, M) for seat, length in LENGTHS.items()}


def pooled(pooler, states, chunk, params=None):
    """All prompts side by side, `chunk` rows of each in every step."""
    for seat, x in states.items():
        pooler.enter(entering(seat, len(x), params))
    found = {}
    for start in range(0, max(map(len, states.values())), chunk):
        slices = [
            Slice(s, start, min(chunk, len(x) - start), False, pool=True) for s, x in states.items() if start < len(x)
        ]
        x = torch.cat([states[part.seat][part.start : part.start + part.count] for part in slices])
        rows = pooler.rows(slices)
        found |= pooler.take(slices, x if rows is None else x[rows], lambda x: x)
    return {seat: torch.tensor(values) for seat, values in found.items()}


def made(*ways, **facts):
    pooling = Pooling(ways=ways, width=facts.pop("width", M * len(ways)), **{"normalize": False, **facts})
    return load_pooler(pooling, {}, CPU, hidden=M)


@pytest.mark.parametrize("chunk", [100, 3, 1])
@pytest.mark.parametrize("way", WAYS.values())
def test_ways(way, chunk):
    states = hidden()
    found = pooled(made(way), states, chunk)
    for seat, x in states.items():
        torch.testing.assert_close(found[seat], plain(way, x))


@pytest.mark.parametrize("chunk", [100, 2])
def test_several_ways_lie_behind_each_other(chunk):
    states = hidden()
    found = pooled(made("cls", "max", "last"), states, chunk)
    for seat, x in states.items():
        torch.testing.assert_close(found[seat], torch.cat([plain(way, x) for way in ("cls", "max", "last")]))


def test_a_preempted_prompt_begins_again():
    """What it had brought is forgotten with its seat's next prompt."""
    pooler, x = made("mean"), hidden()[7]
    pooler.enter(entering(7, 8))
    assert pooler.take([Slice(7, 0, 3, False, pool=True)], x[:3], lambda x: x) == {}
    torch.testing.assert_close(pooled(pooler, {7: x}, 4)[7], x.mean(0))


def test_only_rows_that_count_are_wanted():
    slices = [Slice(seat, 0, length, False, pool=True) for seat, length in LENGTHS.items()]
    for way, rows in (("last", [4, 5, 13]), ("cls", [0, 5, 6])):
        pooler = made(way)
        for seat, length in LENGTHS.items():
            pooler.enter(entering(seat, length))
        assert pooler.rows(slices).tolist() == rows
    assert made("mean").rows(slices) is None


def test_length_one_and_matryoshka():
    states = hidden()
    whole, cut = made("mean", normalize=True), PoolingParams(dimensions=2)
    for seat, x in states.items():
        mean = x.mean(0)
        torch.testing.assert_close(pooled(whole, states, 9)[seat], mean / mean.norm())
        torch.testing.assert_close(pooled(whole, states, 9, cut)[seat], mean[:2] / mean[:2].norm())
        raw = PoolingParams(dimensions=2, normalize=False)
        torch.testing.assert_close(pooled(whole, states, 9, raw)[seat], mean[:2])


def test_a_vector_of_nothing_stays_finite():
    assert pooled(made("mean", normalize=True), {0: torch.zeros(2, M)}, 9)[0].tolist() == [0.0] * M


def test_half_precision_is_pooled_in_float32():
    states = {0: torch.full((1000, M), 1.001, dtype=torch.bfloat16)}
    assert pooled(made("mean"), states, 100)[0].tolist() == pytest.approx([1.0] * M, abs=1e-6)


def test_dense(tmp_path):
    torch.manual_seed(1)
    weight, bias = torch.randn(3, M), torch.randn(3)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "model.safetensors")
    dense = Dense(tmp_path, M, 3, True, "Tanh")
    states = hidden()
    found = pooled(made("mean", dense=(dense,), width=3), states, 4)
    for seat, x in states.items():
        torch.testing.assert_close(found[seat], (x.mean(0) @ weight.T + bias).tanh())
    (tmp_path / "model.safetensors").rename(tmp_path / "moved")
    torch.save({"linear.weight": weight, "linear.bias": bias}, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(pooled(made("mean", dense=(dense,), width=3), states, 4), found)


def test_dense_that_does_not_fit(tmp_path):
    dense = Dense(tmp_path, M, 3, False, "Tanh")
    with pytest.raises(ConfigError, match="holds neither"):
        made("mean", dense=(dense,), width=3)
    save_file({"linear.weight": torch.zeros(3, M), "linear.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"holds linear\.bias, linear\.weight; it must hold linear\.weight"):
        made("mean", dense=(dense,), width=3)
    save_file({"linear.weight": torch.zeros(M, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"\[6, 3\], config.json says \[3, 6\]"):
        made("mean", dense=(dense,), width=3)
    save_file({"linear.weight": torch.zeros(3, M)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="it gets 12 numbers"):
        made("mean", "max", dense=(dense,), width=3)


def labelled(activation, count=3, **facts):
    return Pooling(ways=("cls",), width=count, labels=Labels(names=("x",) * count, activation=activation, **facts))


def linear(*shape):
    return {"weight": torch.randn(*shape), "bias": torch.randn(shape[0])}


def named(**layers):
    return {f"{name.replace('__', '.')}.{kind}": t for name, both in layers.items() for kind, t in both.items()}


@pytest.mark.parametrize(
    ("body", "end", "between"),
    [
        ("pooler__dense", "classifier", torch.tanh),
        ("classifier__dense", "classifier__out_proj", torch.tanh),
        ("pre_classifier", "classifier", torch.relu),
        (None, "score", None),
    ],
)
def test_heads(body, end, between):
    torch.manual_seed(2)
    layers = {body: linear(M, M)} if body else {}
    layers[end] = linear(3, M)
    states = hidden()
    found = pooled(load_pooler(labelled("softmax"), named(**layers), CPU, hidden=M), states, 9)
    for seat, x in states.items():
        row = x[0]
        if body:
            row = between(row @ layers[body]["weight"].T + layers[body]["bias"])
        logits = row @ layers[end]["weight"].T + layers[end]["bias"]
        torch.testing.assert_close(found[seat], logits.softmax(0))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("sigmoid", torch.sigmoid), ("identity", lambda x: x), ("softmax", lambda x: x.softmax(0))],
)
def test_label_activations(activation, expected):
    weight = torch.eye(M)[:3] * 60  # far out: sigmoid must not overflow
    states = hidden()
    pooler = load_pooler(labelled(activation), {"score.weight": weight}, CPU, hidden=M)
    for seat, x in states.items():
        torch.testing.assert_close(pooled(pooler, states, 9)[seat], expected(x[0, :3] * 60), rtol=1e-5, atol=1e-30)
        raw = pooled(pooler, states, 9, PoolingParams(task="classify", normalize=False))[seat]
        torch.testing.assert_close(raw, x[0, :3] * 60)


def test_yes_and_no():
    """The decoder's own logits of two tokens: here its identity."""
    states = hidden()
    found = pooled(load_pooler(labelled("sigmoid", 1, token_ids=(4, 1)), {}, CPU, hidden=M), states, 9)
    for seat, x in states.items():
        torch.testing.assert_close(found[seat], (x[0, 4:5] - x[0, 1:2]).sigmoid())


def test_a_missing_head_is_named():
    with pytest.raises(ConfigError, match=r"lacks classifier\.out_proj\.weight or classifier\.weight or score\.weight"):
        load_pooler(labelled("softmax"), {}, CPU, hidden=M)
    with pytest.raises(ConfigError, match="gives 2 numbers, the model's files say 3"):
        load_pooler(labelled("softmax"), {"score.weight": torch.zeros(2, M)}, CPU, hidden=M)


def test_names_of_heads():
    for name in ("bert.pooler.dense.weight", "classifier.bias", "classifier.out_proj.weight", "score.weight"):
        assert name.endswith(HEAD.search(name)[1])
    for name in ("encoder.layer.0.output.dense.weight", "model.layers.0.mlp.gate.weight", "layers.0.score_norm.weight"):
        assert HEAD.search(name) is None


def test_segments():
    pooler = load_pooler(Pooling(ways=("cls",), width=M), {}, CPU, hidden=M, token_types=2)
    slices = [Slice(0, 0, 3, False, pool=True), Slice(1, 0, 2, False, pool=True)]
    pooler.enter(entering(0, 3, types=(0, 1, 1)))
    pooler.enter(entering(1, 2))
    assert pooler.token_types(slices).tolist() == [0, 1, 1, 0, 0]
    assert pooler.token_types(slices[1:]) is None
    blind = made("cls")
    blind.enter(entering(0, 3, types=(0, 1, 1)))
    assert blind.token_types(slices[:1]) is None


def spec(**facts):
    small = {"vocab": 9, "hidden": M, "heads": 1, "kv_heads": 1, "head_dim": M, "ffn": 8, "eps": 1e-6, "max_len": 64}
    return Spec(**{**small, "layers": (Layer(),), **facts})


def test_defaults_by_kind_of_model():
    assert pooling_of({}, spec(), None).ways == ("last",)
    assert pooling_of({}, spec(), None).normalize
    assert pooling_of({}, spec(causal=False), None).ways == ("mean",)
    assert pooling_of({"pooling_type": "cls"}, spec(causal=False), None).ways == ("cls",)
    assert pooling_of({"pooling_type": "lasttoken"}, spec(causal=False), None).ways == ("last",)
    labels = pooling_of({"architectures": ["LlamaForSequenceClassification"]}, spec(), None)
    assert (labels.ways, labels.labels) == (("last",), Labels(names=("LABEL_0", "LABEL_1"), activation="softmax"))


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "identity"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"num_labels": 2, "sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
    ],
)
def test_activation_of_labels(config, activation):
    config["architectures"] = ["BertForSequenceClassification"]
    assert pooling_of(config, spec(causal=False), None).labels.activation == activation


def test_label_names():
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "good", "1": "bad"}}
    assert pooling_of(config, spec(causal=False), None).labels.names == ("good", "bad")
    config["sbert_ce_default_activation_function"] = "mine.Gumbel"
    with pytest.raises(ConfigError, match="Gumbel"):
        pooling_of(config, spec(causal=False), None)


def test_tasks():
    embedder = pooling_of({}, spec(), None)
    assert tasks_of(spec(), embedder) == ("generate", "embed")
    assert tasks_of(spec(lm_head=False), embedder) == ("embed",)
    assert tasks_of(spec(causal=False), embedder) == ("embed",)
    assert tasks_of(spec(), labelled("sigmoid", 1)) == ("classify", "score")
    assert tasks_of(spec(), labelled("softmax", 2)) == ("classify",)


def test_dimensions():
    check_dimensions(Pooling(ways=("mean",), width=8), 8, "m")
    check_dimensions(Pooling(ways=("mean",), width=8, matryoshka=()), 5, "m")
    check_dimensions(Pooling(ways=("mean",), width=8, matryoshka=(2, 4)), 4, "m")
    for pooling, wanted, why in (
        (Pooling(ways=("mean",), width=8), 4, "can't be cut"),
        (Pooling(ways=("mean",), width=8, matryoshka=()), 9, "1 to 8, got 9"),
        (Pooling(ways=("mean",), width=8, matryoshka=(2, 4)), 3, "2, 4, got 3"),
        (labelled("softmax"), 2, "classifier"),
    ):
        with pytest.raises(ClientError, match=why):
            check_dimensions(pooling, wanted, "m")
    with pytest.raises(ClientError, match="dimensions"):
        PoolingParams(dimensions=0)


def test_matryoshka_is_declared_in_either_file(tmp_path):
    assert pooling_of({"matryoshka_dimensions": [2, 4]}, spec(), tmp_path).matryoshka == (2, 4)
    assert pooling_of({"is_matryoshka": True}, spec(), tmp_path).matryoshka == ()
    (tmp_path / "config_sentence_transformers.json").write_text('{"matryoshka_dimensions": [3]}')
    assert pooling_of({}, spec(), tmp_path).matryoshka == (3,)
