"""Embeddings in open_inference.proto: texts in one tensor, their vectors in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.desk import Desk
from kvasir.cluster.open_inference_wire import (
    VERSION,
    add_output,
    check_version,
    earlier,
    joined,
    read_parameters,
    read_tensors,
    wanted,
)
from kvasir.cluster.pooling_schema import parse_embeddings
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.errors import ClientError
from kvasir.engine.passage import Passage
from kvasir.proto import open_inference_pb2 as pb

EMBEDDING = "embedding"
VECTOR_INPUTS = {"text_input": "BYTES", "return_num_input_tokens": "BOOL"}
"""Name -> datatype; text_input holds as many texts as are to be embedded."""
VECTOR_OUTPUTS = {EMBEDDING: "FP32", "num_input_tokens": "UINT32"}
"""Name -> datatype: embedding[N, D], num_input_tokens[1] of all texts."""
_FIELDS = frozenset({"dimensions", "normalize", "truncate_prompt_tokens", "add_special_tokens", "prompt_name", "priority",
                     "cache_salt"})  # fmt: skip
"""Of /v1/embeddings, those that may be parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorAsk:
    """A request understood."""

    call: PoolingCall
    id: str
    outputs: Sequence[str]
    timeout_s: float | None
    raw: bool


def wants_vectors(request: pb.ModelInferRequest, tasks: Sequence[str]) -> bool:
    """Whether it is for this module: it asks for `embedding`, or its model embeds and can't continue a text."""
    return only_embeds(tasks) or any(output.name == EMBEDDING for output in request.outputs)


def only_embeds(tasks: Sequence[str]) -> bool:
    """Models that continue texts may embed too."""
    return "embed" in tasks and "generate" not in tasks


def parse_vectors(request: pb.ModelInferRequest) -> VectorAsk:
    """Raises ClientError or UnsupportedError naming the tensor, the parameter or the field."""
    check_version(request.model_version)
    tensors = read_tensors(request, VECTOR_INPUTS, many="text_input")
    if "text_input" not in tensors:
        raise ClientError("send the texts as the input text_input", param="text_input")
    texts: Sequence[Any] = tensors.pop("text_input")
    said, timeout_s = read_parameters(request.parameters, _FIELDS, VECTOR_INPUTS)
    given = joined({name: values[0] for name, values in tensors.items()}, said)
    fields = {name: value for name, value in given.items() if name in _FIELDS}
    call = parse_embeddings({**fields, "model": request.model_name, "input": texts[:1]}).call
    (first,) = call.inputs
    assert isinstance(first, Passage), "a text was given"
    passages = [dataclasses.replace(first, text=text) for text in texts]
    return VectorAsk(
        call=dataclasses.replace(call, inputs=passages, param="text_input"),
        id=request.id,
        outputs=wanted(request.outputs, VECTOR_OUTPUTS, EMBEDDING, given),
        timeout_s=timeout_s,
        raw=bool(request.raw_input_contents),
    )


async def embedded(
    desk: Desk, asked: VectorAsk, request_id: str, headers: Mapping[str, str], limit_s: float | None
) -> tuple[pb.ModelInferResponse, Vectors]:
    """The whole answer. limit_s: the call's deadline."""
    call = dataclasses.replace(asked.call, deadline_s=earlier(limit_s, asked.timeout_s))
    vectors, events = await desk.pool(call, request_id, headers)
    reply = pb.ModelInferResponse(model_name=vectors.model.name, model_version=VERSION, id=asked.id)
    for name in asked.outputs:
        if name == EMBEDDING:
            flat = [value for event in events for value in event.values]
            shape = [len(events), len(events[0].values)]
            add_output(reply, name, VECTOR_OUTPUTS[name], shape, flat, asked.raw)
        else:
            add_output(reply, name, VECTOR_OUTPUTS[name], [1], [vectors.prompt_tokens], asked.raw)
    return reply, vectors
