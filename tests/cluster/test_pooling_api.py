"""/v1/embeddings, /classify, /rerank and /score over real sockets, by httpx and OpenAI's own client."""

from __future__ import annotations

import base64
import dataclasses
import struct

import grpc
import httpx
import openai
import pytest
from waiting import until

from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import ClientError, OverloadedError
from kvasir.engine.sentence_transformers import TextRules
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub


def post(gateway, path, **body):
    return httpx.post(gateway.url + path, json={"model": "bytes", **body}, timeout=60)


def embed(gateway, given, **fields):
    return post(gateway, "/v1/embeddings", input=given, **fields)


def wrong(reply, status=400):
    """Its message, once the shape is right."""
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


@pytest.fixture(autouse=True)
def _embedder(gateway):
    """What a test changes about the group ends with it."""
    group = gateway.group
    before = dict(group.__dict__)
    group.info = dataclasses.replace(group.info, tasks=("embed",))
    group.requests = []
    yield
    group.__dict__.update(before)


@pytest.fixture
def reader(gateway):
    """The group is a cross-encoder of one label."""
    gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("classify", "score"), labels=("LABEL_0",))
    return gateway


def test_embedding(gateway):
    reply = embed(gateway, "Hi there")
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": [8.0, 0.5]}]
    assert (body["object"], body["model"]) == ("list", "bytes")
    assert body["usage"] == {
        "prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip
    assert body["id"] == f"embd-{reply.headers['x-request-id']}"
    request = gateway.group.requests[0]
    assert bytes(request.prompt_token_ids) == b"Hi there"
    assert (request.pooling.task, request.pooling.dimensions, request.pooling.normalize) == ("embed", None, None)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (["a", "bc"], [[97], [98, 99]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_shapes_of_input(gateway, given, prompts):
    body = embed(gateway, given).json()
    assert [list(request.prompt_token_ids) for request in gateway.group.requests] == prompts
    assert [item["embedding"][0] for item in body["data"]] == [len(ids) for ids in prompts]
    assert [item["index"] for item in body["data"]] == list(range(len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_base64(gateway):
    gateway.group.vector = lambda request: [0.1, -2.5, 3e-7]
    data = embed(gateway, ["a", "b"], encoding_format="base64").json()["data"]
    for item in data:
        found = struct.unpack("<3f", base64.b64decode(item["embedding"]))
        assert found == struct.unpack("<3f", struct.pack("<3f", 0.1, -2.5, 3e-7))


def test_numbers_have_the_length_of_float32(gateway):
    gateway.group.vector = lambda request: [struct.unpack("<f", struct.pack("<f", 0.1))[0]]
    assert '"embedding":[0.1]' in embed(gateway, "a").text


def test_openai_client(gateway):
    """It asks for base64 by itself, and decodes it."""
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        found = client.embeddings.create(model="bytes", input=["a", "bcd"], dimensions=2)
    assert [item.embedding for item in found.data] == [[1.0, 0.5], [3.0, 0.5]]
    assert found.usage.total_tokens == 4
    assert gateway.group.requests[0].pooling.dimensions == 2


def test_options_reach_the_request(gateway):
    embed(gateway, "a", normalize=False, priority=3, cache_salt="s", user="u", request_id="mine", dimensions=1)
    request = gateway.group.requests[0]
    assert request.request_id.startswith("mine-0-")
    assert (request.priority, request.cache_salt, request.pooling.normalize) == (3, "s", False)
    embed(gateway, "a", use_activation=True)
    assert gateway.group.requests[1].pooling.normalize is True


def test_unknown_fields_are_named(gateway):
    assert embed(gateway, "a", flavour="x", user="u").headers["x-kvasir-warning"] == "ignored: flavour, user"


@pytest.mark.parametrize(
    ("given", "fields", "param"),
    [
        (None, {}, "input"),
        ([], {}, "input"),
        ("", {}, "input"),
        ([[]], {}, "input"),
        (["a", 5], {}, "input"),
        ([[1], "a"], {}, "input"),
        ({"text": "a"}, {}, "input"),
        ([True], {}, "input"),
        ([5, 999], {}, "input"),
        ([[5], [-1]], {}, "input[1]"),
        (["a", ""], {}, "input[1]"),
        (["a"] * 2049, {}, "input"),
        ("a", {"encoding_format": "hex"}, "encoding_format"),
        ("a", {"dimensions": 0}, "dimensions"),
        ("a", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ("a", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("a", {"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens"),
        ("a", {"prompt_name": "query"}, "prompt_name"),
        ("a", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("a", {"embed_dtype": "float16"}, "embed_dtype"),
        ("a", {"truncation_side": "left"}, "truncation_side"),
    ],
)
def test_what_is_refused(gateway, given, fields, param):
    assert wrong(embed(gateway, given, **fields))["param"] == param
    assert not gateway.group.requests


def test_neutral_values_are_fine(gateway):
    assert embed(gateway, "a", messages=None, embed_dtype="float32", endianness="little").status_code == 200


def test_too_long_is_refused_with_counts_and_cut_when_asked(gateway):
    long = "x" * 5000
    error = wrong(embed(gateway, ["a", long]))
    assert error["code"] == "context_length_exceeded"
    assert "input[1] has 5000 tokens and the model takes 4096" in error["message"]
    reply = embed(gateway, ["a", long], truncate_prompt_tokens=-1)
    assert reply.headers["x-kvasir-warning"] == "904 tokens of the prompt were cut off"
    body = reply.json()
    assert [item["embedding"][0] for item in body["data"]] == [1, 4096]
    assert body["usage"]["prompt_tokens"] == 4097
    reply = embed(gateway, [1, 2, 3], truncate_prompt_tokens=2)
    assert reply.json()["data"][0]["embedding"][0] == 2
    assert reply.headers["x-kvasir-warning"].startswith("1 tokens")
    assert list(gateway.group.requests[-1].prompt_token_ids) == [1, 2]
    assert "x-kvasir-warning" not in embed(gateway, [1, 2, 3], truncate_prompt_tokens=3).headers


def test_prompts_of_the_model(gateway, monkeypatch):
    rules = TextRules(prompts={"query": "Q:", "document": "D:"}, default="document")
    model = dataclasses.replace(gateway.model, rules=rules)
    monkeypatch.setattr(gateway.desk, "_by_name", {"bytes": model})
    embed(gateway, "a")
    embed(gateway, "a", prompt_name="query")
    embed(gateway, [97])
    assert [bytes(request.prompt_token_ids) for request in gateway.group.requests] == [b"D:a", b"Q:a", b"a"]


def test_refusal_of_the_group(gateway):
    gateway.group.refusal = ClientError("model 'bytes' can't embed; what it can do: generate", param="model")
    assert wrong(embed(gateway, "a"))["param"] == "model"
    assert gateway.desk.running == 0


def test_unknown_model(gateway):
    assert wrong(post(gateway, "/v1/embeddings", model="gpt-5", input="a"), 404)["code"] == "model_not_found"


def test_a_full_queue_is_429_only_when_nothing_of_the_call_runs(gateway, monkeypatch):
    """A queue that is shorter than the call: what runs makes room for the rest."""
    submit, room = gateway.group.submit, 3
    running = lambda: len([one for one in gateway.group.streams.values() if not one.complete])  # noqa: E731

    async def narrow(request, placement):
        if running() >= room:
            raise OverloadedError("3 requests are waiting", retry_after_s=7)
        return await submit(request, placement)

    gateway.group.step_s = 0.001
    monkeypatch.setattr(gateway.group, "submit", narrow)
    body = embed(gateway, ["x" * (i + 1) for i in range(40)]).json()
    assert [item["embedding"][0] for item in body["data"]] == list(range(1, 41))
    room = 0
    reply = embed(gateway, ["a", "b"])
    assert wrong(reply, 429)["code"] == "overloaded"
    assert reply.headers["retry-after"] == "7"


def test_a_client_that_goes_away_ends_its_requests(gateway):
    gateway.group.step_s = 30
    leaves = httpx.Timeout(60, read=0.5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(gateway.url + "/v1/embeddings", json={"model": "bytes", "input": ["a", "b"]}, timeout=leaves)
    until(lambda: not gateway.call(lambda: gateway.desk.running))
    assert {name for name, _, _ in gateway.group.aborted} >= {one.request_id for one in gateway.group.requests}


def test_abandoned_calls_are_told(live_gateway):
    with live_gateway(GatewayConfig()) as gateway:
        gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("embed",))
        gateway.group.step_s = 30
        gateway.loop.call_soon_threadsafe(gateway.loop.call_later, 0.5, gateway.desk.abandon)
        assert wrong(embed(gateway, ["a", "b"]), 503)["code"] == "unavailable"


def test_draining(gateway, monkeypatch):
    monkeypatch.setattr(gateway.desk, "draining", True)
    assert wrong(embed(gateway, "a"), 503)["code"] == "unavailable"


def test_metrics(gateway):
    def count(name):
        lines = httpx.get(gateway.url + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = ("vllm:request_success_total", "vllm:e2e_request_latency_seconds_count", "vllm:request_prompt_tokens_count")
    before = [count(name) for name in names]
    embed(gateway, ["a", "b", "c"])
    assert [count(name) - b for name, b in zip(names, before, strict=True)] == [3, 3, 3]
    assert count('gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="embeddings"') > 0


def test_classify(gateway):
    gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("classify",), labels=("good", "bad"))
    gateway.group.vector = lambda request: [0.25, 0.75] if len(request.prompt_token_ids) == 1 else [0.5, 0.5]
    for path in ("/classify", "/v1/classify"):
        body = post(gateway, path, input=["a", "bc"]).json()
        assert body["data"] == [
            {"index": 0, "label": "bad", "probs": [0.25, 0.75], "num_classes": 2},
            {"index": 1, "label": "good", "probs": [0.5, 0.5], "num_classes": 2},
        ]
        assert body["usage"]["prompt_tokens"] == 3
    assert gateway.group.requests[0].pooling.task == "classify"
    assert wrong(post(gateway, "/classify", input="a", dimensions=3, messages=[1]))["param"] == "messages"


DOCUMENTS = ["abc", "a", "ab"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_by_a_cross_encoder(reader, path):
    reader.group.vector = lambda request: [len(request.prompt_token_ids) / 10]
    body = post(reader, path, query="q", documents=DOCUMENTS).json()
    assert body["results"] == [
        {"index": 0, "relevance_score": 0.4, "document": {"text": "abc"}},
        {"index": 2, "relevance_score": 0.3, "document": {"text": "ab"}},
        {"index": 1, "relevance_score": 0.2, "document": {"text": "a"}},
    ]
    assert (body["model"], body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == ("bytes", 9, 9)
    assert [bytes(one.prompt_token_ids) for one in reader.group.requests] == [b"qabc", b"qa", b"qab"]
    assert {one.pooling.task for one in reader.group.requests} == {"score"}


def test_rerank_options(reader):
    reader.group.vector = lambda request: [len(request.prompt_token_ids) / 10]
    objects = [{"text": text} for text in DOCUMENTS]
    body = post(reader, "/rerank", query="q", documents=objects, top_n=1, return_documents=False).json()
    assert body["results"] == [{"index": 0, "relevance_score": 0.4}]
    post(reader, "/rerank", query="q", documents=["a"], use_activation=False, truncate_prompt_tokens=2)
    assert reader.group.requests[-1].pooling.normalize is False


def test_pairs_are_cut_at_the_document(reader):
    reply = post(reader, "/rerank", query="qqq", documents=["abcdef", "ab"], truncate_prompt_tokens=5)
    assert reply.headers["x-kvasir-warning"].startswith("4 tokens")
    reply = post(reader, "/rerank", query="qqq", documents=["abcdef"], truncate_prompt_tokens=5)
    assert bytes(reader.group.requests[-1].prompt_token_ids) == b"qqqab"
    error = wrong(post(reader, "/rerank", query="q", documents=["a", "b" * 5000]))
    assert error["param"] == "documents[1]"
    assert "5001 tokens" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": [5]}, "documents"),
        ({"query": "q", "documents": [{"image": "x"}]}, "documents"),
        ({"query": "q", "documents": [{"text": "a", "title": "x"}]}, "documents"),
        ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "q", "documents": ["a"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ({"query": "q", "documents": ["a"], "rank_fields": ["title"]}, "rank_fields"),
        ({"query": ["q"], "documents": ["a"]}, "query"),
        ({"query": "q", "documents": ["a"] * 2049}, "documents"),
    ],
)
def test_rerank_refusals(reader, fields, param):
    assert wrong(post(reader, "/rerank", **fields))["param"] == param


def test_rerank_by_vectors(gateway):
    """Each distinct text is embedded once; the score is the cosine of its angle to the query."""
    vectors = {b"q": [3.0, 0.0], b"up": [0.0, 2.0], b"same": [1.0, 0.0], b"half": [1.0, 1.0]}
    gateway.group.vector = lambda request: vectors[bytes(request.prompt_token_ids)]
    body = post(gateway, "/rerank", query="q", documents=["up", "same", "half", "same"]).json()
    assert [item["index"] for item in body["results"]] == [1, 3, 2, 0]
    assert [item["relevance_score"] for item in body["results"]] == pytest.approx([1, 1, 0.5**0.5, 0])
    assert len(gateway.group.requests) == 4
    assert {one.pooling.task for one in gateway.group.requests} == {"embed"}
    error = wrong(post(gateway, "/rerank", query="q", documents=["up"], use_activation=False))
    assert error["param"] == "use_activation"


def test_dot_products_where_the_model_says_so(gateway, monkeypatch):
    rules = TextRules(prompts={"query": "Q", "passage": "P"}, similarity="dot")
    monkeypatch.setattr(gateway.desk, "_by_name", {"bytes": dataclasses.replace(gateway.model, rules=rules)})
    vectors = {b"Qa": [3.0, 1.0], b"Pa": [2.0, 5.0]}
    gateway.group.vector = lambda request: vectors[bytes(request.prompt_token_ids)]
    assert post(gateway, "/score", text_1="a", text_2="a").json()["data"][0]["score"] == 11


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_score(reader, names):
    reader.group.vector = lambda request: [len(request.prompt_token_ids) / 10]
    for path in ("/score", "/v1/score"):
        body = post(reader, path, **{names[0]: "q", names[1]: ["a", "bc"]}).json()
        assert body["data"] == [
            {"object": "score", "index": 0, "score": 0.2},
            {"object": "score", "index": 1, "score": 0.3},
        ]
        assert (body["object"], body["usage"]["prompt_tokens"]) == ("list", 5)
    both = post(reader, "/score", **{names[0]: ["q", "qqq"], names[1]: ["a", "bc"]}).json()
    assert [item["score"] for item in both["data"]] == [0.2, 0.5]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text_1": "a"},
        {"text_1": "a", "text_2": "b", "queries": "c"},
        {"text_1": "a", "documents": "b"},
        {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]},
        {"text_1": 5, "text_2": "b"},
        {"text_1": [5], "text_2": "b"},
        {"text_1": [], "text_2": "b"},
    ],
)
def test_score_refusals(reader, fields):
    assert wrong(post(reader, "/score", **fields))["param"] == "text_1"


def test_tasks_that_the_model_cannot_do_are_refused(gateway):
    """Before anything is tokenised, rendered or sent."""
    gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("classify",), labels=("a", "b"))
    bodies = {
        "/score": {"text_1": "a", "text_2": "b"},
        "/rerank": {"query": "a", "documents": ["b"]},
        "/v1/embeddings": {"input": "a"},
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    for path, body in bodies.items():
        error = wrong(post(gateway, path, **body))
        assert error["param"] == "model"
        assert "what it can do: classify" in error["message"]
    assert not gateway.group.requests


def test_over_grpc_as_over_http(reader):
    """Labels, scores and ranks, with where the time went."""
    reader.group.vector = lambda request: [len(request.prompt_token_ids) / 10]
    with grpc.insecure_channel(reader.grpc_address) as channel:
        stub = InferenceStub(channel)
        scores = stub.Score(pb.ScoreRequest(queries=["q"], documents=["a", "bc"]), timeout=60)
        assert list(scores.scores) == pytest.approx([0.2, 0.3])
        assert scores.usage.prompt_tokens == 5
        ranked = stub.Rerank(pb.RerankRequest(query="q", documents=["a", "bcd", "bc"], top_n=2), timeout=60)
        assert [one.index for one in ranked.results] == [1, 2]
        found, call = stub.Classify.with_call(pb.ClassifyRequest(inputs=[pb.EmbedInput(text="abc")]), timeout=60)
        assert (list(found.labels), found.classifications[0].label) == (["LABEL_0"], "LABEL_0")
        assert dict(call.trailing_metadata())["server-timing"].startswith("queue;dur=")
        with pytest.raises(grpc.RpcError, match="documents"):
            stub.Rerank(pb.RerankRequest(query="q"), timeout=60)
    assert "total;dur=" in post(reader, "/score", queries="a", documents=["b"]).headers["server-timing"]
