"""OpenAI's endpoints over real sockets, by httpx and OpenAI's own client."""

from __future__ import annotations

import json

import grpc
import httpx
import openai
import pytest

from kvasir.proto.inference_pb2 import GenerateRequest
from kvasir.proto.inference_pb2_grpc import InferenceStub

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "user", "content": "Hi"}]


def post(gateway, path, **body):
    return httpx.post(gateway.url + path, json=body, timeout=60)


def chat(gateway, **fields):
    return post(gateway, "/v1/chat/completions", **({"model": "bytes", "messages": MESSAGES} | fields))


def complete(gateway, **fields):
    return post(gateway, "/v1/completions", **({"model": "bytes", "prompt": "Hi"} | fields))


def frames(reply):
    """The JSON of each SSE frame; [DONE] as None."""
    lines = [line for line in reply.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_chat(gateway):
    reply = chat(gateway)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 15


def test_chat_prompt_and_defaults(gateway):
    """The template is rendered, generation_config.json's temperature applies, and the context bounds the output."""
    chat(gateway)
    request = gateway.group.requests[-1]
    assert list(request.prompt_token_ids) == [257, *b"Hi", 256, 258]
    assert request.sampling.temperature == 0.25
    assert request.sampling.max_tokens is None
    chat(gateway, temperature=0.5, max_completion_tokens=7)
    assert (gateway.group.requests[-1].sampling.temperature, gateway.group.requests[-1].sampling.max_tokens) == (0.5, 7)


def test_chat_stream(gateway):
    reply = chat(gateway, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = frames(reply)
    assert done is None
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == TEXT
    assert chunks[-1]["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None,
    }  # fmt: skip
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-1])
    assert all(c["usage"] is None for c in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_stream_without_usage(gateway):
    assert all("usage" not in chunk for chunk in frames(chat(gateway, stream=True))[:-1])


def test_stream_equals_whole(gateway):
    """n = 2, stop strings, every step: what streams is what comes in one piece."""
    fields = {"n": 2, "stop": ["rld"], "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = chat(gateway, **fields).json()
    chunks = [c for c in frames(chat(gateway, stream=True, **fields)) if c]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"] == "Hello, wö"
        assert [t for c in mine for t in c.get("token_ids", ())] == choice["token_ids"]
        scored = [t for c in mine if c["logprobs"] for t in c["logprobs"]["content"]]
        assert scored == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        assert mine[-1]["stop_reason"] == choice["stop_reason"] == "rld"
    assert {(index, reason) for _, index, reason in gateway.group.aborted[-4:]} == {(0, "stop"), (1, "stop")}
    assert gateway.group.running == 0
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"] == [257, *b"Hi", 256, 258]


def test_chat_logprobs(gateway):
    content = chat(gateway, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H", "logprob": -0.5, "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}, {"token": "A", "logprob": -1.0, "bytes": [65]}],
    }  # fmt: skip
    assert content[8]["token"] == "\ufffd"
    assert content[8]["bytes"] == [0xC3]
    assert chat(gateway, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_openai_client(gateway, client):
    whole = client.chat.completions.create(model="bytes", messages=MESSAGES, n=2, seed=1)
    assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
    stream = client.chat.completions.create(
        model="bytes", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
    text = client.completions.create(model="bytes", prompt="Hi", logprobs=1, extra_body={"top_k": 5})
    assert text.choices[0].text == TEXT
    assert gateway.group.requests[-1].sampling.top_k == 5
    assert [model.id for model in client.models.list()] == ["bytes", "alias/bytes"]
    assert client.models.retrieve("alias/bytes").id == "alias/bytes"
    with pytest.raises(openai.NotFoundError, match="there is: bytes, alias/bytes"):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_completion_prompts(gateway, prompt, ids):
    before = len(gateway.group.requests)
    reply = complete(gateway, prompt=prompt, n=2, max_tokens=5)
    assert [list(request.prompt_token_ids) for request in gateway.group.requests[before:]] == ids
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * len(ids)))
    assert all(choice["text"] == "Hello" and choice["finish_reason"] == "length" for choice in choices)
    assert reply.json()["usage"]["completion_tokens"] == 10 * len(ids)
    assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_completion_stream_of_many(gateway):
    chunks = frames(complete(gateway, prompt=["a", "b", "c"], n=2, stream=True, max_tokens=9))
    assert chunks.pop() is None
    for index in range(6):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == "Hello, w\ufffd"  # the ninth byte is half a character
        assert mine[-1]["finish_reason"] == "length"


def test_completion_echo_and_scores(gateway):
    choice = complete(gateway, prompt="Hi", echo=True, logprobs=1, max_tokens=2).json()["choices"][0]
    assert choice["text"] == "HiHe"
    assert choice["logprobs"]["tokens"] == ["H", "i", "H", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"i": -0.5}]
    streamed = [
        c["choices"][0] for c in frames(complete(gateway, echo=True, logprobs=1, max_tokens=2, stream=True)) if c
    ]
    assert "".join(c["text"] for c in streamed) == "HiHe"
    assert [o for c in streamed if c["logprobs"] for o in c["logprobs"]["text_offset"]] == [0, 1, 2, 3]


def test_completion_scores_of_the_prompt_alone(gateway):
    reply = complete(gateway, prompt="Hi", echo=True, logprobs=0, max_tokens=0).json()
    assert reply["choices"][0]["text"] == "Hi"
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert reply["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_and_token_ids(gateway):
    choice = complete(gateway, prompt_logprobs=2, return_token_ids=True, max_tokens=3).json()["choices"][0]
    assert choice["prompt_token_ids"] == [72, 105]
    assert choice["token_ids"] == [72, 101, 108]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
    assert chat(gateway, prompt_logprobs=0).json()["prompt_logprobs"][0] is None


def test_chat_goes_on_inside_the_last_message(gateway):
    messages = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True}
    body = chat(gateway, **fields).json()
    assert body["choices"][0]["message"]["content"] == "Well," + TEXT
    assert gateway.group.requests[-1].prompt_token_ids[-1] == ord(",")
    first = frames(chat(gateway, stream=True, **fields))[0]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Well,"}


def test_tools_are_shown_with_tool_choice_none(gateway):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert chat(gateway, tools=tools, tool_choice="none").status_code == 200
    assert b'"weather"' in bytes(i for i in gateway.group.requests[-1].prompt_token_ids if i < 256)
    assert gateway.group.requests[-1].sampling.structured_outputs is None


def test_every_sampling_field_reaches_the_group(gateway):
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "seed": 5, "stop": ["x"], "stop_token_ids": [9],
        "include_stop_str_in_output": True, "min_tokens": 1, "max_tokens": 3, "ignore_eos": True, "prompt_logprobs": 1,
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    reply = complete(gateway, **fields, logprobs=2, logit_bias={"5": -1}, priority=-2, cache_salt="mine")
    assert reply.status_code == 200, reply.text
    assert "x-kvasir-warning" not in reply.headers
    request = gateway.group.requests[-1]
    for name, value in fields.items():
        found = getattr(request.sampling, name)
        assert (list(found) if isinstance(value, list) else found) == value
    assert request.sampling.logprobs == 2
    assert request.sampling.logit_bias == {5: -1}
    assert (request.priority, request.cache_salt) == (-2, "mine")


def test_warnings_name_what_was_ignored(gateway):
    reply = chat(gateway, user="me", metadata={"a": "b"}, unheard_of=1, extra_body={"top_k": 3, "odd\r\nX: y": 1})
    assert reply.status_code == 200
    assert reply.headers["x-kvasir-warning"] == r"ignored: user, unheard_of, odd\r\nX: y, metadata"
    assert gateway.group.requests[-1].sampling.top_k == 3
    streamed = chat(gateway, stream=True, safety_identifier="me")
    assert streamed.headers["x-kvasir-warning"] == "ignored: safety_identifier"


def test_request_id(gateway):
    reply = httpx.post(
        gateway.url + "/v1/completions", json={"model": "bytes", "prompt": "a"}, headers={"X-Request-ID": "mine-1"}
    )
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"
    assert gateway.group.requests[-1].request_id.startswith("mine-1-0-")
    assert complete(gateway, request_id="body-1").headers["x-request-id"] == "body-1"
    assert len(complete(gateway).headers["x-request-id"]) == 32
    assert len(httpx.get(gateway.url + "/nowhere").headers["x-request-id"]) == 32
    bad = httpx.get(gateway.url + "/health", headers={"X-Request-ID": "a b"})
    assert bad.status_code == 400
    assert "X-Request-ID" in bad.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"temperature": "hot"}, "temperature", "must be a number at least 0, got 'hot'"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": -0.1}, "top_p", "at least 0"),
        ({"n": True}, "n", "integer from 1 to 128"),
        ({"n": 1.5}, "n", "integer from 1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "integer from 1"),
        ({"max_completion_tokens": "x"}, "max_completion_tokens", "integer from 1"),
        ({"max_tokens": 5000}, "max_tokens", "5 tokens and max_tokens is 5000, 5005 together"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", "5 tokens and max_completion_tokens is 5000"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "list of objects"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "content must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "continuous_usage_stats",
            "isn't supported",
        ),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "0 to 260"),
        ({"logit_bias": [1]}, "logit_bias", "an object"),
        ({"stop": 5}, "stop", "strings"),
        ({"stop": [5]}, "stop", "strings"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "token ids"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"priority": "high"}, "priority", "integer"),
        ({"request_id": "a b"}, "request_id", "letters"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "can't hold chat_template"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_object"),
        ({"guided_json": 5}, "guided_json", "JSON Schema"),
        ({"modalities": ["text", "audio"]}, "modalities", "isn't supported"),
        ({"reasoning_effort": "often"}, "reasoning_effort", "one of none"),
        ({"model": "other"}, "model", "there is: bytes"),
        ({"model": 5}, "model", "a string"),
    ],
)
def test_refused_chats(gateway, fields, param, text):
    reply = chat(gateway, **fields)
    error = reply.json()["error"]
    assert reply.status_code == (404 if fields == {"model": "other"} else 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert text in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"prompt": None}, "prompt", "a text, a list"),
        ({"prompt": []}, "prompt", "a text, a list"),
        ({"prompt": [1, "a"]}, "prompt", "a text, a list"),
        ({"prompt": [[1], []]}, "prompt", "a text, a list"),
        ({"prompt": [True]}, "prompt", "a text, a list"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": [261]}, "prompt", "0 to 260"),
        ({"prompt": [-1]}, "prompt", "0 to 260"),
        ({"prompt": ["x"] * 1025}, "prompt", "at most 1024"),
        ({"prompt": [5] * 4096}, "prompt", "4096 tokens; prompt and output share 4096"),
        ({"best_of": 129}, "best_of", "from 1 to 128"),
        ({"n": 2, "best_of": 1}, "best_of", "from 2 to 128"),
        ({"length_penalty": "x"}, "length_penalty", "a number"),
        ({"early_stopping": "soon"}, "early_stopping", "never"),
        ({"suffix": "x"}, "suffix", "does not support insert"),
        ({"suffix": "x", "echo": True}, "echo", "suffix"),
        ({"suffix": "x", "prompt": [5]}, "suffix", "a text"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"use_beam_search": 1}, "use_beam_search", "true or false"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "from 1 to"),
        ({"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens", "1 to 4096"),
        ({"truncation_side": "middle"}, "truncation_side", "left"),
        ({"prompt": "abcdef", "truncate_prompt_tokens": 4, "num_keep": 4}, "num_keep", "no room"),
        ({"prompt": [5] * 4096, "truncate_prompt_tokens": -1, "num_keep": -1}, "prompt", "share 4096"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [261]}, "allowed_token_ids", "0 to 260"),
        ({"bad_words": "x"}, "bad_words", "a list of texts"),
    ],
)
def test_refused_completions(gateway, fields, param, text):
    reply = complete(gateway, **fields)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == param
    assert text in error["message"]


def test_models_that_fill_gaps(gateway, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.filling._FILLING", (("<|user|>", "<|tool|>", "<|assistant|>"),))
    assert complete(gateway, prompt=["a", "b"], suffix="z").status_code == 200
    asked = [list(request.prompt_token_ids) for request in gateway.group.requests[-2:]]
    assert asked == [[257, *one, 260, *b"z", 258] for one in (b"a", b"b")]
    body = {"model": "bytes", "prompt": "a", "suffix": "z", "stream": False}
    assert httpx.post(gateway.url + "/api/generate", json=body).status_code == 200
    assert list(gateway.group.requests[-1].prompt_token_ids) == asked[0]
    assert "insert" in httpx.post(gateway.url + "/api/show", json={"model": "bytes"}).json()["capabilities"]
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        list(InferenceStub(channel).Generate(GenerateRequest(text="a", suffix="z"), timeout=60))
        assert list(gateway.group.requests[-1].prompt_token_ids) == asked[0]
        with pytest.raises(grpc.RpcError, match="suffix needs text"):
            list(
                InferenceStub(channel).Generate(GenerateRequest(prompt_token_ids={"ids": [5]}, suffix="z"), timeout=60)
            )


LONG = [{"role": "user", "content": "x" * 4096}]


def test_context_length_code(gateway):
    for reply, param in ((complete(gateway, prompt=[5] * 4096), "prompt"), (chat(gateway, messages=LONG), "messages")):
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert error["message"].startswith("the prompt has 4")
    assert chat(gateway, max_tokens=5000).json()["error"]["code"] == "context_length_exceeded"
    assert complete(gateway, prompt=[5] * 4090).status_code == 200  # the default of 16 gives way


def test_best_of_equal_to_n_and_neutral_values(gateway):
    neutral = {
        "best_of": 2,
        "n": 2,
        "suffix": None,
        "response_format": {"type": "text"},
        "logit_bias": None,
        "stop": None,
    }
    reply = complete(gateway, **neutral, service_tier="auto", store=False)
    assert reply.status_code == 200, reply.text
    assert "x-kvasir-warning" not in reply.headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["a", {"qualname": "b", "kwargs": {"k": 1}}], {"a": "{}", "b": '{"k": 1}'}),
        ({"a": {"k": [1]}}, {"a": '{"k": [1]}'}),
        ([], {}),
    ],
)
def test_logits_processors_arrive(gateway, given, kept):
    assert complete(gateway, logits_processors=given).status_code == 200
    assert gateway.group.requests[-1].sampling.logits_processors == kept


@pytest.mark.parametrize("given", [[3], "a", [{"name": "a"}], {"a": 3}, [{"qualname": "a", "args": [1]}]])
def test_logits_processors_that_are_none(gateway, given):
    reply = complete(gateway, logits_processors=given)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logits_processors")


def test_beams_and_what_means_nothing_to_them(gateway):
    search = {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0.5, "early_stopping": True}
    reply = complete(gateway, **search, temperature=0)
    assert reply.status_code == 200
    assert "x-kvasir-warning" not in reply.headers
    sampling = gateway.group.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in search} == search | {"early_stopping": "yes"}
    warned = chat(gateway, **search, temperature=0.5, seed=3).headers["x-kvasir-warning"]
    assert warned == "ignored: temperature (beams aren't drawn), seed (beams aren't drawn)"


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"truncate_prompt_tokens": 4}, "efgh"),
        ({"truncate_prompt_tokens": 4, "num_keep": 3}, "abch"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, "abcd"),
        ({"truncate_prompt_tokens": 8}, "abcdefgh"),
        ({"truncate_prompt_tokens": -1}, "abcdefgh"),
        ({"truncate_prompt_tokens": 4, "num_keep": -1}, "abcdefgh"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_cut_when_asked(gateway, fields, left, stream):
    reply = complete(gateway, prompt="abcdefgh", stream=stream, **fields)
    assert bytes(gateway.group.requests[-1].prompt_token_ids).decode() == left
    expected = f"{8 - len(left)} tokens of the prompt were cut off" if len(left) < 8 else None
    assert reply.headers.get("x-kvasir-warning") == expected


def test_prompts_are_cut_to_what_fits(gateway):
    prompt = [5] * 9 + [6] * 5000
    assert complete(gateway, prompt=prompt, truncate_prompt_tokens=-1, num_keep=9).status_code == 200
    assert list(gateway.group.requests[-1].prompt_token_ids) == [5] * 9 + [6] * (4096 - 16 - 9)
    reply = chat(gateway, messages=[{"role": "user", "content": "x" * 5000}], truncate_prompt_tokens=-1)
    assert reply.json()["usage"]["prompt_tokens"] == 3072  # a quarter is left to an output without a limit


def test_tokenize_and_detokenize(gateway):
    for prefix in ("", "/v1"):
        reply = post(gateway, prefix + "/tokenize", model="bytes", prompt="Hi", return_token_strs=True).json()
        assert reply == {"count": 2, "max_model_len": 4096, "tokens": [72, 105], "token_strs": ["H", "i"]}
        assert post(gateway, prefix + "/detokenize", model="bytes", tokens=[72, 105, 256]).json() == {
            "prompt": "Hi<|end|>"
        }
    chatty = post(gateway, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert chatty["tokens"] == [257, *b"Hi", 256]
    assert post(gateway, "/detokenize", tokens=[999]).json()["error"]["param"] == "tokens"
    assert post(gateway, "/tokenize").json()["error"]["param"] == "prompt"


def test_long_prompt_is_tokenised_in_a_thread(gateway):
    assert post(gateway, "/tokenize", prompt="abc" * 5000).json()["count"] == 15000
    long = [{"role": "user", "content": "a" * 3000}]
    assert chat(gateway, messages=long).json()["usage"]["prompt_tokens"] == 3003


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/chat/completions"])
def test_a_limit_of_thousands_of_digits_is_refused(gateway, path):
    error = httpx.get(f"{gateway.url}{path}?limit={'9' * 5000}").json()["error"]
    assert (error["param"], error["type"]) == ("limit", "invalid_request_error")


def test_a_token_id_of_thousands_of_digits_is_refused(gateway):
    reply = chat(gateway, logit_bias={"9" * 5000: 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logit_bias")


def test_what_means_nothing_in_a_query_is_named(gateway):
    stored = post(gateway, "/v1/responses", model="bytes", input="Hi").json()["id"]
    one = f"/v1/responses/{stored}"
    form = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
    file = httpx.post(f"{gateway.url}/v1/files", **form).json()["id"]
    for path, named in (
        (f"{one}?include[]=x", "include[]"),
        (f"{one}?starting_after=3", "starting_after"),
        (f"{one}/input_items?limit=3&odd=1", "odd"),
        ("/v1/files?purpose=batch&odd=1", "odd"),
        ("/v1/chat/completions?model=x&metadata[a]=b&odd=1", "odd"),
        ("/v1/models?odd=1", "odd"),
        ("/v1/models/bytes?odd=1", "odd"),
        ("/api/tags?odd=1", "odd"),
        ("/api/ps?odd=1", "odd"),
        ("/api/version?odd=1", "odd"),
        (f"/v1/files/{file}/content?odd=1", "odd"),
    ):
        reply = httpx.get(gateway.url + path)
        assert (reply.status_code, reply.headers["x-kvasir-warning"]) == (200, f"ignored: {named}")
    talk = {"model": "bytes", "messages": MESSAGES}
    kept = f"/v1/chat/completions/{post(gateway, '/v1/chat/completions', **talk, store=True).json()['id']}"
    ask = {"model": "bytes", "prompt": "Hi"}
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    for path, fields in (
        ("/v1/completions", ask),
        ("/v1/completions", {**ask, "stream": True}),
        ("/v1/chat/completions", talk),
        (kept, {"metadata": {}}),
        ("/v1/messages", {**talk, "max_tokens": 3}),
        ("/v1/messages/count_tokens", talk),
        ("/v1/responses", {"model": "bytes", "input": "Hi"}),
        ("/v1/responses/input_tokens", {"model": "bytes", "input": "Hi"}),
        ("/v1/conversations", {}),
        ("/v1/batches", batch),
        ("/api/chat", {**talk, "stream": False}),
        ("/api/show", {"model": "bytes"}),
        ("/tokenize", ask),
        ("/detokenize", {"model": "bytes", "tokens": [65]}),
    ):
        reply = post(gateway, f"{path}?odd=1", **fields)
        assert (reply.status_code, reply.headers.get("x-kvasir-warning")) == (200, "ignored: odd"), path
        assert "x-kvasir-warning" not in post(gateway, path, **fields).headers
    both = post(gateway, "/v1/completions?odd=1", **ask, user="me").headers.get_list("x-kvasir-warning")
    assert both == ["ignored: user", "ignored: odd"]
    fine = (f"{one}/input_items?limit=3&order=asc", "/v1/chat/completions?model=x&metadata[a]=b&after=")
    for path in (one, *fine, "/v1/models", "/api/tags", f"/v1/files/{file}/content"):
        assert "x-kvasir-warning" not in httpx.get(gateway.url + path).headers
