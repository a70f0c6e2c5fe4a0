"""Tensors and parameters of open_inference.proto as an `Ask` of OpenAI's completions, and answers as tensors.

The tensors are those of Triton's vLLM backend. What isn't known is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from kvasir.cluster.open_inference_wire import (
    VERSION,
    add_output,
    check_version,
    joined,
    read_parameters,
    read_tensors,
    wanted,
)
from kvasir.cluster.openai_fields import SAMPLING
from kvasir.cluster.openai_schema import Ask, parse_completion
from kvasir.cluster.structured_fields import FIELDS as STRUCTURED
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import SamplingParams
from kvasir.proto import open_inference_pb2 as pb

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
"""Name -> datatype; each holds one value."""
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""Name -> datatype; num_input_tokens holds one value, the others one per continuation."""
FINAL = "triton_final_response"
_FIELDS = frozenset(
    {*SAMPLING, *STRUCTURED, "guided_decoding_backend", "logit_bias", "max_tokens", "add_special_tokens", "priority", "cache_salt"}
) - {"prompt_logprobs"}  # fmt: skip
"""Of OpenAI's body, those for which these tensors have room."""
_NUMBERS = {field.name for field in dataclasses.fields(SamplingParams) if field.type in
            ("int", "float", "int | None", "float | None")}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorAsk:
    """A request understood."""

    ask: Ask
    id: str
    stream: bool
    opening: str
    """What text_output begins with."""
    outputs: Sequence[str]
    timeout_s: float | None
    raw: bool
    """Values are bytes beside the tensors, in the request and so in the answer."""


def parse_inference(request: pb.ModelInferRequest) -> TensorAsk:
    """Raises ClientError or UnsupportedError naming the tensor, the parameter or the field."""
    check_version(request.model_version)
    tensors = {name: values[0] for name, values in read_tensors(request, INPUTS).items()}
    if "text_input" not in tensors:
        raise ClientError("send the prompt as the input text_input", param="text_input")
    given, timeout_s = read_parameters(request.parameters, _FIELDS, INPUTS)
    given = joined(tensors, given)
    said = {name: _number(name, given.pop(name)) for name in [*given] if name not in INPUTS}
    fields = joined(said, _sampling(given))
    text, stream = given["text_input"], given.get("stream", False)
    excluded = given.get("exclude_input_in_output", stream)
    if stream and not excluded:
        why = "exclude_input_in_output can't be false when stream is true: deltas don't repeat the prompt"
        raise ClientError(why, param="exclude_input_in_output")
    ask = parse_completion({**fields, "model": request.model_name, "prompt": text})
    call = dataclasses.replace(ask.call, known_as={**ask.call.known_as, "prompt": "text_input"})
    return TensorAsk(
        ask=dataclasses.replace(ask, call=call),
        id=request.id,
        stream=stream,
        opening="" if excluded else text,
        outputs=wanted(request.outputs, OUTPUTS, "text_output", given),
        timeout_s=timeout_s,
        raw=bool(request.raw_input_contents),
    )


def write_outputs(
    reply: pb.ModelInferResponse, asked: TensorAsk, model: str, values: Mapping[str, Sequence[Any]]
) -> None:
    """The outputs that were asked for, of `values` by their names."""
    reply.model_name, reply.model_version, reply.id = model, VERSION, asked.id
    for name in asked.outputs:
        found = values[name]
        add_output(reply, name, OUTPUTS[name], [len(found)], found, asked.raw)


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the JSON object in sampling_parameters."""
    name = "sampling_parameters"
    try:
        body = orjson.loads(given.get(name) or "{}")
    except ValueError as error:
        raise ClientError(f"{name} isn't JSON: {error}", param=name) from error
    if not isinstance(body, dict):
        raise ClientError(f"{name} must be a JSON object, got {body!r:.60}", param=name)
    fields = {name: value for name, value in body.items() if value is not None}
    for unknown in fields.keys() - _FIELDS:
        raise UnsupportedError(f"there is no {unknown!r:.60} in {name}", param=unknown)
    return {name: _number(name, value) for name, value in fields.items()}


def _number(name: str, value: Any) -> Any:
    """Triton's examples write numbers as texts."""
    if not isinstance(value, str) or name not in _NUMBERS:
        return value
    try:
        return orjson.loads(value)
    except ValueError as error:
        raise ClientError(f"{name} must be a number, got {value!r:.60}", param=name) from error
