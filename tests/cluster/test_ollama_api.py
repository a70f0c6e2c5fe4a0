"""Ollama's endpoints over real sockets, by httpx and Ollama's own client."""

from __future__ import annotations

import dataclasses
import json
import threading

import httpx
import ollama
import pytest
import tokenizers
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.cluster.ollama_vocabulary import vocabulary, written_vocabulary
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.tokenizer import Tokenizer

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "user", "content": "Hi"}]
PROMPT = [257, *b"Hi", 256, 258]


def post(gateway, path, **body):
    return httpx.post(gateway.url + path, json=body, timeout=60)


def generate(gateway, **fields):
    return post(gateway, "/api/generate", **({"model": "bytes", "prompt": "Hi"} | fields))


def chat(gateway, **fields):
    return post(gateway, "/api/chat", **({"model": "bytes", "messages": MESSAGES} | fields))


def lines(reply):
    return [json.loads(line) for line in reply.text.splitlines()]


@pytest.fixture
def client(gateway):
    with ollama.Client(gateway.url) as client:
        yield client


def test_generate_stream(gateway):
    reply = generate(gateway)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    *parts, end = lines(reply)
    assert "".join(part["response"] for part in parts) == TEXT
    assert not any(part["done"] for part in parts)
    assert (end["response"], end["done"], end["done_reason"]) == ("", True, "stop")
    assert end["context"] == [*PROMPT, *TEXT.encode(), 256]
    assert (end["prompt_eval_count"], end["eval_count"]) == (5, 15)
    durations = [end[name] for name in ("prompt_eval_duration", "eval_duration", "total_duration")]
    assert all(isinstance(one, int) and one >= 0 for one in durations)
    assert durations[0] == pytest.approx(1e6, rel=0.01)
    assert durations[2] > 0
    assert {part["model"] for part in parts} == {"bytes"}


def test_generate_whole_equals_stream(gateway):
    whole = generate(gateway, stream=False, model="bytes:latest").json()
    end = lines(generate(gateway))[-1]
    assert whole["response"] == TEXT
    assert whole["model"] == "bytes:latest"
    assert whole.keys() == end.keys()


def test_generate_defaults_options_and_system(gateway):
    """Ollama's defaults lie under the model's own (temperature 0.25), options above both."""
    generate(gateway, system="Be brief")
    request = gateway.group.requests[-1]
    assert list(request.prompt_token_ids) == [259, *b"Be brief", 256, *PROMPT]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.25, 0.9, 40)
    assert request.sampling.max_tokens is None
    options = {
        "temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 7, "num_predict": 4, "repeat_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["x"],
    }  # fmt: skip
    reply = generate(gateway, options=options, stream=False).json()
    sampling = gateway.group.requests[-1].sampling
    found = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed, sampling.max_tokens)
    assert found == (0, 3, 0.5, 0.1, 7, 4)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert (*penalties, sampling.stop) == (1.2, 0.5, -0.5, ("x",))
    assert (reply["response"], reply["done_reason"]) == ("Hell", "length")


def test_random_seed_and_unlimited_output(gateway):
    for _ in range(2):
        generate(gateway, options={"seed": -1, "num_predict": -2})
    one, other = (request.sampling.seed for request in gateway.group.requests[-2:])
    assert one != other
    assert min(one, other) >= 0
    assert gateway.group.requests[-1].sampling.max_tokens is None


def test_whole_numbers_may_have_a_point(gateway):
    options = {"top_k": 40.0, "num_predict": 3.0, "num_ctx": 64.0, "seed": 7.0, "temperature": 1.0}
    reply = httpx.post(gateway.url + "/api/generate", json={"model": "bytes", "prompt": "Hi", "options": options})
    assert reply.status_code == 200, reply.text
    sampling = gateway.group.requests[-1].sampling
    assert (sampling.top_k, sampling.max_tokens, sampling.seed) == (40, 3, 7)
    reply = httpx.post(
        gateway.url + "/api/generate", json={"model": "bytes", "prompt": "Hi", "options": {"top_k": 1.5}}
    )
    assert (reply.status_code, "top_k" in reply.text) == (400, True)


def test_options_of_the_sampler_arrive(gateway):
    options = {
        "mirostat": 2, "mirostat_tau": 4.5, "mirostat_eta": 0.2, "tfs_z": 0.9, "typical_p": 0.8, "repeat_last_n": 7,
        "penalize_newline": False, "bad_words": ["no"], "allowed_token_ids": [72], "logit_bias": {"72": 1.5},
        "min_tokens": 1, "stop_token_ids": [9], "ignore_eos": True,
    }  # fmt: skip
    generate(gateway, options=options)
    sampling = gateway.group.requests[-1].sampling
    expected = options | {
        "bad_words": ("no",),
        "allowed_token_ids": (72,),
        "logit_bias": {72: 1.5},
        "stop_token_ids": (9,),
    }
    assert {name: getattr(sampling, name) for name in options} == expected
    assert (sampling.top_k, sampling.top_p) == (0, 1.0)  # Mirostat stands in for Ollama's own defaults
    generate(gateway)
    assert gateway.group.requests[-1].sampling.repeat_last_n == 64
    for name, value in (
        ("repeat_penalty", 0),
        ("num_predict", 5000),
        ("typical_p", 0),
        ("mirostat", 3),
        ("repeat_last_n", -2),
        ("logit_bias", {"a": 1}),
    ):
        reply = generate(gateway, options={name: value})
        assert (reply.status_code, name in reply.json()["error"]) == (400, True)


def test_ignored_is_reported(gateway):
    reply = generate(gateway, keep_alive="5m", options={"num_batch": 2048, "num_gpu": 1, "use_mmap": True}, odd=1)
    assert reply.status_code == 200
    warned = reply.headers["x-kvasir-warning"]
    assert all(name in warned for name in ("keep_alive", "options.num_batch", "options.num_gpu", "use_mmap", "odd"))


def test_prompts_are_cut_when_asked(gateway):
    long = "x" * 9000
    assert generate(gateway, prompt=long, raw=True).status_code == 400
    assert generate(gateway, prompt=long, raw=True, truncate=False).status_code == 400
    reply = generate(gateway, prompt="ab" + long, raw=True, truncate=True, options={"num_keep": 2, "num_predict": 96})
    assert bytes(gateway.group.requests[-1].prompt_token_ids) == b"ab" + b"x" * 3998
    assert "5002 tokens of the prompt were cut off" in reply.headers["x-kvasir-warning"]
    assert chat(gateway, messages=[{"role": "user", "content": long}], truncate=True).status_code == 200


def test_num_ctx_limits_this_request(gateway):
    def last():
        request = gateway.group.requests[-1]
        return len(request.prompt_token_ids), request.sampling.max_tokens

    reply = generate(gateway, prompt="x" * 10, raw=True, stream=False, options={"num_ctx": 15})
    assert (reply.json()["done_reason"], reply.json()["eval_count"]) == ("length", 5)
    assert last() == (10, 5)
    for options in ({"num_ctx": 10}, {"num_ctx": 15, "num_predict": 6}):
        reply = generate(gateway, prompt="x" * 10, raw=True, options=options)
        assert reply.status_code == 400
        assert f"{options['num_ctx']}" in reply.json()["error"]
        assert "(options.num_ctx)" in reply.json()["error"]
    reply = generate(gateway, prompt="x" * 30, raw=True, truncate=True, options={"num_ctx": 20, "num_predict": 8})
    assert last() == (12, 8)
    assert reply.headers["x-kvasir-warning"] == "18 tokens of the prompt were cut off"
    reply = chat(gateway, options={"num_ctx": 20, "num_predict": -2, "repeat_last_n": -1})
    assert sum(last()) == 20
    assert "x-kvasir-warning" not in reply.headers
    reply = chat(gateway, options={"num_ctx": 32768})  # what many clients send whatever the model
    assert last()[1] is None  # as many as the model has
    assert reply.headers["x-kvasir-warning"] == (
        "ignored: options.num_ctx 32768 (the model has 4096 tokens, see --max-model-len)"
    )
    for wrong in (0, -1, 0.5, "big", True):
        reply = generate(gateway, options={"num_ctx": wrong})
        assert (reply.status_code, "num_ctx must be" in reply.json()["error"]) == (400, True)


def test_context_continues_a_conversation(gateway):
    context = lines(generate(gateway))[-1]["context"]
    generate(gateway, prompt="And", context=context)
    assert list(gateway.group.requests[-1].prompt_token_ids) == [*context, 257, *b"And", 256, 258]
    assert generate(gateway, context=[10**6]).status_code == 400
    assert generate(gateway, context=["a"]).status_code == 400


def test_raw_and_template(gateway):
    reply = generate(gateway, raw=True, stream=False).json()
    assert list(gateway.group.requests[-1].prompt_token_ids) == [*b"Hi"]
    assert "context" not in reply
    generate(gateway, template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert list(gateway.group.requests[-1].prompt_token_ids) == [*b"[Hi]"]
    refused = generate(gateway, template="{{ .System }} {{ .Prompt }}")
    assert refused.status_code == 400
    assert "Jinja" in refused.json()["error"]
    assert "raw" in generate(gateway, raw=True, system="x").json()["error"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"suffix": "x"}, "does not support insert"),
        ({"images": ["aGk="]}, "images"),
        ({"think": True}, "no thoughts"),
        ({"think": "maybe"}, "think"),
        ({"format": "yaml"}, "format"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"options": []}, "options"),
        ({"options": {"temperature": "hot"}}, "temperature"),
        ({"options": {"num_predict": -3}}, "num_predict"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"guided_json": {}}, "guided_json"),
        ({"temperature": 0}, "temperature"),
        ({"options": {"guided_regex": "a"}}, "guided_regex"),
        ({"best_of": 3}, "best_of"),
        ({"options": {"best_of": 0}}, "best_of"),
        ({"n": 2}, "n isn't supported"),
    ],
)
def test_refusals(gateway, fields, word):
    reply = generate(gateway, **fields)
    assert reply.status_code == 400
    assert word in reply.json()["error"]


def test_format_becomes_structured_output(gateway):
    generate(gateway, format="json")
    assert gateway.group.requests[-1].sampling.structured_outputs.json_object
    chat(gateway, format={"type": "object"})
    assert json.loads(gateway.group.requests[-1].sampling.structured_outputs.json) == {"type": "object"}


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_load_and_unload(gateway, path):
    count = len(gateway.group.requests)
    assert post(gateway, path, model="bytes").json()["done_reason"] == "load"
    reply = post(gateway, path, model="bytes", keep_alive=0)
    assert reply.json()["done_reason"] == "unload"
    assert "stays loaded" in reply.headers["x-kvasir-warning"]
    assert post(gateway, path, model="bytes", keep_alive="0s").json()["done_reason"] == "unload"
    assert post(gateway, path, model="bytes", keep_alive="10m").json()["done_reason"] == "load"
    assert len(gateway.group.requests) == count


def test_errors(gateway):
    reply = generate(gateway, model="other")
    assert (reply.status_code, [*reply.json()]) == (404, ["error"])
    assert httpx.get(gateway.url + "/api/nothing").json() == {"error": "there is no /api/nothing"}
    gateway.group.dies_after = 3
    try:
        *_, last = lines(generate(gateway))
    finally:
        gateway.group.dies_after = None
    assert last == {"error": "the group died"}


def test_curl_needs_no_content_type_but_browsers_do(gateway):
    body = json.dumps({"model": "bytes", "prompt": "Hi", "stream": False})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert httpx.post(gateway.url + "/api/generate", content=body, headers=form).json()["response"] == TEXT
    reply = httpx.post(gateway.url + "/api/generate", content=body, headers=form | {"Origin": "http://elsewhere"})
    assert reply.status_code == 403
    reply = httpx.post(gateway.url + "/api/generate", content=body, headers=form | {"Origin": gateway.url})
    assert reply.status_code == 415


def test_pages(gateway):
    for path in ("/", ""):
        assert httpx.get(gateway.url + path).text == "Ollama is running"
    assert httpx.head(gateway.url).status_code == 200
    assert httpx.get(gateway.url + "/api/version").json() == {"version": "0.40.0"}


@pytest.mark.parametrize("name", ["create", "pull", "push", "copy", "delete"])
def test_models_are_not_managed(gateway, name):
    method = "DELETE" if name == "delete" else "POST"
    reply = httpx.request(method, f"{gateway.url}/api/{name}", json={"model": "x"})
    assert reply.status_code == 400
    assert "isn't supported" in reply.json()["error"]


def test_blobs(gateway):
    assert httpx.head(gateway.url + "/api/blobs/sha256:0").status_code == 404
    assert httpx.post(gateway.url + "/api/blobs/sha256:0", content=b"x").status_code == 400


# ---- Ollama's own client --------------------------------------------------------------------------------------------


def test_client_generate_and_chat(client):
    assert client.generate("bytes", "Hi").response == TEXT
    assert "".join(part.response for part in client.generate("bytes", "Hi", stream=True)) == TEXT
    reply = client.chat("bytes", MESSAGES, options=ollama.Options(temperature=0.0, num_ctx=512))
    assert (reply.message.role, reply.message.content, reply.done_reason) == ("assistant", TEXT, "stop")
    assert "".join(part.message.content for part in client.chat("bytes", MESSAGES, stream=True)) == TEXT


def test_client_logprobs(client):
    reply = client.chat("bytes", MESSAGES, logprobs=True, top_logprobs=2)
    assert "".join(one.token for one in reply.logprobs[:5]) == "Hello"
    assert [len(one.top_logprobs) for one in reply.logprobs] == [2] * 15
    parts = [*client.generate("bytes", "Hi", logprobs=True, stream=True)]
    assert sum(len(part.logprobs or ()) for part in parts) == 15


def test_client_history_with_tools(gateway, client):
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "tool_name": "f", "content": "11"},
    ]
    client.chat("bytes", messages)
    assert bytes(token for token in gateway.group.requests[-1].prompt_token_ids if token < 256) == b"Hi11"


def test_client_models(client):
    model = client.list().models[0]
    assert model.model == "bytes:latest"
    assert model.details.family == "llama"
    (running,) = client.ps().models
    assert (running.model, running.context_length) == ("bytes:latest", 4096)
    shown = client.show(model.model)
    assert shown.capabilities == ["completion", "tools"]
    assert "messages" in shown.template
    assert shown.modelinfo["general.architecture"] == "llama"
    assert "temperature" in shown.parameters


def test_show_verbose(gateway):
    brief = post(gateway, "/api/show", model="bytes").json()["model_info"]
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    assert [brief[name] for name in names] == [None, None, None]
    told = post(gateway, "/api/show", model="bytes", verbose=True).json()["model_info"]
    tokens, types, merges = (told[name] for name in names)
    assert (tokens[72], tokens[256], len(tokens), len(types), merges) == ("H", "<|end|>", 261, 261, [])
    assert (types[72], types[256], told["tokenizer.ggml.model"]) == (1, 3, "gpt2")


def test_a_vocabulary_is_written_once(gateway, monkeypatch):
    first = post(gateway, "/api/show", model="bytes", verbose=True).json()
    monkeypatch.setattr(Tokenizer, "definition", lambda self: 1 / 0)
    assert post(gateway, "/api/show", model="bytes", verbose=True).json() == first


def test_who_asks_while_it_is_written_waits_for_it(monkeypatch):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer = Tokenizer(backend, eos=(), special={}, templates=ChatTemplates({}, {}))
    made, found = [], []
    other = threading.Thread(target=lambda: found.append(written_vocabulary(tokenizer)))

    def slow(_):
        made.append(1)
        if len(made) == 1:
            other.start()
            other.join(0.1)  # if it didn't wait, it would be here by then
        return {}

    monkeypatch.setattr("kvasir.cluster.ollama_vocabulary.vocabulary", slow)
    found.append(written_vocabulary(tokenizer))
    other.join()
    assert len(made) == 1
    assert found[0] is found[1]


def test_vocabularies():
    def told(model, *added):
        backend = tokenizers.Tokenizer(model)
        backend.add_tokens([*added])
        return vocabulary(Tokenizer(backend, eos=(), special={}, templates=ChatTemplates({}, {})))

    unigram = told(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.5)], 0), "user")
    assert unigram["tokenizer.ggml.tokens"] == ["<unk>", "a", "user"]
    assert unigram["tokenizer.ggml.token_type"] == [1, 1, 4]
    assert unigram["tokenizer.ggml.scores"] == [0.0, -1.5, 0.0]
    vocab = {"a": 0, "b": 1, "ab": 3, "<0x0A>": 4}
    pairs = told(tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")], byte_fallback=True))
    assert pairs["tokenizer.ggml.tokens"] == ["a", "b", "[PAD2]", "ab", "<0x0A>"]
    assert pairs["tokenizer.ggml.token_type"] == [1, 1, 5, 1, 6]
    assert (pairs["tokenizer.ggml.merges"], pairs["tokenizer.ggml.model"]) == (["a b"], "llama")


def test_show_tells_of_the_license(byte_model, live_gateway):
    with live_gateway() as gateway:
        assert "license" not in post(gateway, "/api/show", model="bytes").json()
    (byte_model / "LICENSE").mkdir()
    (byte_model / "LICENSE.txt").write_text("Do as you like.")
    try:
        with live_gateway() as gateway:
            shown = post(gateway, "/api/show", model="bytes").json()
    finally:
        (byte_model / "LICENSE.txt").unlink()
        (byte_model / "LICENSE").rmdir()
    assert shown["license"] == "Do as you like."
    assert 'LICENSE """Do as you like."""' in shown["modelfile"]
    assert f'TEMPLATE """{shown["template"]}"""' in shown["modelfile"]


def test_client_errors(client):
    with pytest.raises(ollama.ResponseError, match="isn't served here") as caught:
        client.generate("other", "Hi")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="pulling models"):
        client.pull("other")


def test_client_embed(gateway, client):
    gateway.group.info = _with(gateway.group.info, tasks=("embed",))
    try:
        found = client.embed("bytes", ["Hi", "there"])
        assert [list(one) for one in found.embeddings] == [[2.0, 0.5], [5.0, 0.5]]
        assert found.prompt_eval_count == 7
        assert gateway.group.requests[-1].pooling.normalize is True
        assert list(client.embeddings("bytes", "Hi").embedding) == [2.0, 0.5]
        assert post(gateway, "/api/embed", model="bytes").json()["embeddings"] == []
        long = post(gateway, "/api/embed", model="bytes", input="x" * 5000)
        assert long.json()["prompt_eval_count"] == 4096
        assert "904 tokens" in long.headers["x-kvasir-warning"]
        assert post(gateway, "/api/embed", model="bytes", input="x" * 5000, truncate=False).status_code == 400
    finally:
        gateway.group.info = _with(gateway.group.info, tasks=("generate",))


def _with(info, **changes):
    return dataclasses.replace(info, **changes)


# ---- Anything at all ------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "suffix",
        "system",
        "template",
        "context",
        "raw",
        "images",
        "stream",
        "format",
        "think",
        "logprobs",
        "top_logprobs",
        "options",
        "messages",
        "tools",
        "tool_choice",
        "keep_alive",
        "input",
        "truncate",
        "dimensions",
        "name",
        "verbose",
    ]
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | _VALUES},
    optional=dict.fromkeys(
        ("content", "images", "thinking", "tool_calls", "tool_name", "tool_call_id", "name"), _VALUES
    ),
)


@settings(max_examples=examples(50))
@given(
    path=st.sampled_from(["generate", "chat", "embed", "embeddings", "show"]),
    body=st.dictionaries(_NAMES, _VALUES, max_size=5),
    messages=st.lists(_MESSAGE, max_size=3) | st.none(),
)
def test_fuzz(gateway, path, body, messages):
    body = {"model": "bytes", **body} | ({"messages": messages} if messages is not None else {})
    reply = post(gateway, f"/api/{path}", **body)
    assert reply.status_code < 500, (body, reply.text)
    assert reply.status_code == 200 or isinstance(reply.json()["error"], str)
