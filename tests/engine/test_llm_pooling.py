"""LLM.embed, classify and score against transformers on tiny random models, with every kind of head and pooling."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import threading

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from kvasir.engine import LLM, EngineConfig, PoolingParams, Request, SamplingParams
from kvasir.engine.engine import Engine
from kvasir.engine.errors import ClientError, ConfigError, ContextLengthError
from kvasir.engine.event import Finished, Pooled, Token

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(60)), ":", "query"]
CLS, SEP = 1, 2
TEXTS = ["a b c", "w1 w2 w3 w4 w5 " * 9, "z", "b"]
QUIET = {"use_tqdm": False}


def write_tokenizer(folder, *, pairs=True):
    """Whole words; [CLS] a [SEP] b [SEP] as BERT joins them, or nothing around the text."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if pairs:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    backend.save(str(folder / "tokenizer.json"))


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def start(folder, **options):
    return LLM(str(folder), num_threads=1, max_num_seqs=8, **options)


@pytest.fixture
def made(checkpoint):
    """`made(family, head, **config)`: (folder with a tokenizer, transformers' model)."""

    def build(family, head=None, *, pairs=True, **changes):
        auto = {"auto": f"AutoModel{head}"} if head is not None else {}
        folder, model = checkpoint(family, vocab_size=97, **auto, **changes)
        write_tokenizer(folder, pairs=pairs)
        return folder, model

    return build


def modules(folder, *entries):
    """modules.json, and a config.json in each module's folder."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for i, (kind, config) in enumerate(entries, 1):
        path = f"{i}_{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(listed))


@torch.no_grad()
def last_hidden(model, prompt):
    return model(torch.tensor([prompt])).last_hidden_state[0]


def unit(x):
    return x / x.norm()


def close(found, expected):
    torch.testing.assert_close(torch.tensor(list(found)), expected, rtol=0, atol=1e-5)


FAMILIES = ["Bert", "Roberta", "XLMRoberta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_encoder(made, family):
    """One label: a score, by sigmoid; segments tell BERT the query from the document."""
    segmented = family == "Bert"
    folder, model = made(
        family, "ForSequenceClassification", num_labels=1, pad_token_id=0, type_vocab_size=1 + segmented
    )
    query, documents = "a b", ["c d e", "w7", "w1 w2 w3 " * 9]
    with start(folder) as llm, torch.no_grad():
        scores = llm.score(query, documents, **QUIET)
        raw = llm.score(query, documents, PoolingParams(task="score", normalize=False), **QUIET)
        for document, score, logit in zip(documents, scores, raw, strict=True):
            prompt = [CLS, *ids(query), SEP, *ids(document), SEP]
            segments = [0] * (len(ids(query)) + 2) + [1] * (len(ids(document)) + 1)
            more = {"token_type_ids": torch.tensor([segments])} if segmented else {}
            expected = model(torch.tensor([prompt]), **more).logits[0]
            assert score.prompt_token_ids == prompt
            close([logit.outputs.score], expected)
            close([score.outputs.score], expected.sigmoid())
        (alone,) = llm.classify("a b", **QUIET)
        close(alone.outputs.probs, model(torch.tensor([[CLS, *ids("a b"), SEP]])).logits[0].sigmoid())
        for call in (lambda: llm.embed("a"), lambda: llm.generate("a")):
            with pytest.raises(ClientError, match=r"what it can do: classify, score"):
                call()


@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "Llama", "Qwen2"])
def test_labels(made, family):
    decoder = family in ("Llama", "Qwen2")
    folder, model = made(family, "ForSequenceClassification", pairs=not decoder, num_labels=3, pad_token_id=0)
    with start(folder, max_num_batched_tokens=16 if decoder else 64) as llm, torch.no_grad():
        for text, output in zip(TEXTS, llm.classify(TEXTS, **QUIET), strict=True):
            prompt = ids(text) if decoder else [CLS, *ids(text), SEP]
            close(output.outputs.probs, model(torch.tensor([prompt])).logits[0].softmax(0))
            assert output.outputs.num_classes == 3
        with pytest.raises(ClientError, match=r"can't score; what it can do: classify"):
            llm.score("a", "b", **QUIET)


@pytest.mark.parametrize("budget", [1024, 16])
@pytest.mark.parametrize("way", ["mean", "lasttoken", "max", "weightedmean", "cls"])
def test_decoder_as_embedder(made, way, budget):
    """Prompts come in chunks, twice: what is in the prefix cache must count as well."""
    folder, model = made("Llama", "", pairs=False)
    modules(folder, ("Pooling", {"pooling_mode": way}), ("Normalize", {}))
    with start(folder, max_num_batched_tokens=budget) as llm:
        for _ in range(2):
            outputs = llm.embed(TEXTS, **QUIET)
            for text, output in zip(TEXTS, outputs, strict=True):
                x = last_hidden(model, ids(text))
                ramp = torch.arange(1, len(x) + 1)[:, None]
                expected = {
                    "mean": x.mean(0),
                    "lasttoken": x[-1],
                    "max": x.max(0).values,
                    "weightedmean": (x * ramp).sum(0) / ramp.sum(),
                    "cls": x[0],
                }[way]
                close(output.outputs.embedding, unit(expected))
        cached = outputs[1].num_cached_tokens
        assert cached == (32 if way == "lasttoken" else 0)  # 45 tokens hold two whole blocks of 16


def test_generating_model_embeds_too(made):
    """Last token and length 1, while it generates."""
    folder, model = made("Qwen3", pairs=False)
    with start(folder) as llm:
        embedded = llm.embed(TEXTS, **QUIET)
        generated = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=3), **QUIET)
    for text, output in zip(TEXTS, embedded, strict=True):
        close(output.outputs.embedding, unit(last_hidden(model.model, ids(text))[-1]))
    assert all(len(output.outputs[0].token_ids) == 3 for output in generated)


def test_sentence_transformers_folder(made):
    """Prompts, Dense, Matryoshka, lower case and the length it was trained for, all at once."""
    folder, model = made("Bert", "")
    dense = {
        "in_features": 64,
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    modules(folder, ("Pooling", {"pooling_mode_mean_tokens": True}), ("Dense", dense), ("Normalize", {}))
    weight, bias = torch.randn(24, 64) / 8, torch.randn(24)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    own = {"prompts": {"query": "query : "}, "default_prompt_name": None, "matryoshka_dimensions": [8, 24]}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(own))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))

    def expected(text, dimensions=24):
        x = last_hidden(model, [CLS, *ids(text), SEP]).mean(0)
        return unit((x @ weight.T + bias).tanh()[:dimensions])

    with start(folder) as llm:
        close(llm.embed("A B", **QUIET)[0].outputs.embedding, expected("a b"))
        (asked,) = llm.embed("a b", PoolingParams(dimensions=8), prompt_name="query", **QUIET)
        close(asked.outputs.embedding, expected("query : a b", 8))
        with pytest.raises(ClientError, match="8, 24, got 9"):
            llm.embed("a", PoolingParams(dimensions=9), **QUIET)
        with pytest.raises(ContextLengthError, match="47 tokens and the model takes 20"):
            llm.embed(TEXTS, **QUIET)
        (cut,) = llm.embed(TEXTS[1], truncate_prompt_tokens=-1, **QUIET)
        assert cut.prompt_token_ids == [CLS, *ids(TEXTS[1])[:18], SEP]
        query, document = expected("query : a"), expected("c d")
        close([llm.score("a", "c d", **QUIET)[0].outputs.score], query @ document[:, None])


@pytest.mark.parametrize("told", ["modules", "config"])
def test_reranker_that_says_yes_or_no(made, told):
    """By sentence-transformers' module, or as vLLM's users write it into --hf-overrides."""
    folder, model = made("Qwen3", pairs=False)
    if told == "modules":
        modules(folder, ("LogitScore", {"true_token_id": 9, "false_token_id": 5}))
    else:
        config = json.loads((folder / "config.json").read_text())
        more = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": [WORDS[5], WORDS[9]]}
        (folder / "config.json").write_text(json.dumps(config | more))
    with start(folder) as llm, torch.no_grad():
        (output,) = llm.score("a b", "c d", **QUIET)
        logits = model(torch.tensor([ids("a b c d")])).logits[0, -1]
        close([output.outputs.score], (logits[9:10] - logits[5]).sigmoid())


def test_a_missing_head_is_named(made):
    folder, _ = made("Bert", "")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ConfigError, match=r"lacks classifier\.out_proj\.weight or classifier\.weight"):
        start(folder)


def test_dummy_weights(made):
    """For benchmarks: a classifier of random weights and a head that prefers nothing."""
    folder, _ = made("Bert", "ForSequenceClassification", num_labels=4)
    (folder / "model.safetensors").unlink()
    with start(folder, load_format="dummy") as llm:
        close(llm.classify("a b", **QUIET)[0].outputs.probs, torch.full((4,), 0.25))


def test_answers_that_are_no_token(made):
    folder, _ = made("Qwen3", pairs=False)
    config = json.loads((folder / "config.json").read_text())
    for words, why in ((["a", "nay"], "'nay' isn't one token"), (["a"], "must be two words")):
        (folder / "config.json").write_text(json.dumps(config | {"classifier_from_token": words}))
        with pytest.raises(ConfigError, match=why):
            start(folder)


def test_bad_calls(made):
    folder, _ = made("Bert", "")
    with start(folder) as llm:
        for call, why in (
            (lambda: llm.embed("a", PoolingParams(task="classify"), **QUIET), "task='classify'"),
            (lambda: llm.score(["a", "b"], ["c", "d", "e"], **QUIET), "2 queries don't pair with 3 documents"),
            (lambda: llm.embed([[5, 97]], **QUIET), "token 97 at position 1"),
            (lambda: llm.embed([[]], **QUIET), "at least one token"),
            (lambda: llm.embed("a", truncate_prompt_tokens=0, **QUIET), "truncate_prompt_tokens must be"),
        ):
            with pytest.raises(ClientError, match=why):
                call()


def test_more_prompts_than_the_queue_holds(made):
    folder, model = made("Bert", "")
    with start(folder, max_queue=3, max_num_batched_tokens=64) as llm:
        outputs = llm.embed([f"w{i % 60}" for i in range(200)], **QUIET)
    assert [output.prompt_token_ids[1] for output in outputs] == [ids(f"w{i % 60}")[0] for i in range(200)]
    close(outputs[7].outputs.embedding, unit(last_hidden(model, outputs[7].prompt_token_ids).mean(0)))


def test_vectors_and_tokens_share_a_crowded_engine(made):
    """Generations and means of long prompts in a cache that holds few of them, some aborted: every request ends once, and
    what isn't aborted gets what it gets alone."""
    rng = random.Random(5)
    folder, _ = made("Llama", pairs=False)
    modules(folder, ("Pooling", {"pooling_mode": "mean"}), ("Normalize", {}))
    prompts = [[rng.randrange(4, 97) for _ in range(rng.choice([1, 9, 40, 90]))] for _ in range(60)]
    greedy = SamplingParams(temperature=0, max_tokens=40)
    with start(folder) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, **QUIET)]
        vectors = [output.outputs.embedding for output in llm.embed(prompts, **QUIET)]
    block = 2 * 3 * 16 * 2 * 16 * 4
    ended, done = collections.defaultdict(list), threading.Event()

    def deliver(events):
        for event in events:
            if not isinstance(event, Token):
                ended[event.request_id].append(event)
        if len(ended) == len(prompts):
            done.set()

    config = EngineConfig(model=str(folder), num_threads=1, max_num_seqs=8, kv_cache_memory_bytes=10 * block)
    engine = Engine(dataclasses.replace(config, max_num_batched_tokens=32, max_model_len=140), deliver)
    engine.start()
    for number, prompt in enumerate(prompts):
        pooling = PoolingParams() if number % 2 else None
        engine.submit(Request(request_id=str(number), prompt_token_ids=prompt, sampling=greedy, pooling=pooling))
        if rng.random() < 0.2:
            engine.abort(str(rng.randrange(number + 1)))
    assert done.wait(60)
    engine.shutdown()
    assert engine.stats().preemptions > 0
    assert engine.pool.check() == []
    assert engine.pool.num_used == 0
    for number, vector in enumerate(vectors):
        (event,) = ended[str(number)]
        if isinstance(event, Pooled):
            close(event.values, torch.tensor(vector))
        else:
            assert event.reason == "abort" or event.output_tokens == len(tokens[number])
    kinds = [type(events[0]) for events in ended.values()]
    assert min(kinds.count(Pooled), kinds.count(Finished)) > 20
