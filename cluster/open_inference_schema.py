"""Tensors and parameters of open_inference.proto as an `Ask` of OpenAI's completions, and answers as tensors.

The tensors are those of Triton's vLLM backend. What isn't known is refused by name.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from kvasir.cluster.openai_fields import SAMPLING
from kvasir.cluster.openai_schema import Ask, parse_completion
from kvasir.cluster.structured_fields import FIELDS as STRUCTURED
from kvasir.engine.errors import ClientError, ModelNotFoundError, UnsupportedError
from kvasir.engine.request import SamplingParams
from kvasir.proto import open_inference_pb2 as pb

VERSION = "1"
"""Of every model."""
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
_PARAMETERS = {**INPUTS, "text_input": "a tensor alone", "triton_enable_empty_final_response": "BOOL"}


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
    tensors = dict(_tensors(request))
    if "text_input" not in tensors:
        raise ClientError("send the prompt as the input text_input", param="text_input")
    given, timeout_s = _parameters(request.parameters)
    given = _joined(tensors, given)
    fields = _joined({name: given.pop(name) for name in [*given] if name not in INPUTS}, _sampling(given))
    text, stream = given["text_input"], given.get("stream", False)
    excluded = given.get("exclude_input_in_output", stream)
    if stream and not excluded:
        why = "exclude_input_in_output can't be false when stream is true: deltas don't repeat the prompt"
        raise ClientError(why, param="exclude_input_in_output")
    return TensorAsk(
        ask=parse_completion({**fields, "model": request.model_name, "prompt": text}),
        id=request.id,
        stream=stream,
        opening="" if excluded else text,
        outputs=_wanted(request.outputs, given),
        timeout_s=timeout_s,
        raw=bool(request.raw_input_contents),
    )


def check_version(version: str) -> None:
    """ModelNotFoundError unless it is the one that models have."""
    if version not in ("", VERSION):
        raise ModelNotFoundError(f"models have version {VERSION} alone, got {version!r:.60}", param="model_version")


def response(asked: TensorAsk, model: str, values: Mapping[str, Sequence[Any]]) -> pb.ModelInferResponse:
    """The outputs that were asked for, of `values` by their names."""
    reply = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=asked.id)
    for name in asked.outputs:
        datatype, found = OUTPUTS[name], values[name]
        tensor = reply.outputs.add(name=name, datatype=datatype, shape=[len(found)])
        if asked.raw:
            reply.raw_output_contents.append(_raw(datatype, found))
        elif datatype == "BYTES":
            tensor.contents.bytes_contents.extend(text.encode() for text in found)
        else:
            tensor.contents.uint_contents.extend(found)
    return reply


def _raw(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(text)) + text for text in (value.encode() for value in values))
    return struct.pack(f"<{len(values)}I", *values)


def _tensors(request: pb.ModelInferRequest) -> Iterator[tuple[str, str | bool]]:
    raws: Sequence[bytes] = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        why = f"raw_input_contents must hold a value for each of the {len(request.inputs)} inputs, got {len(raws)}"
        raise ClientError(why, param="raw_input_contents")
    seen = set()
    for number, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in seen:
            raise ClientError(f"{name} is sent twice", param=name)
        seen.add(name)
        _check_shape(tensor)
        yield name, _from_raw(tensor, raws[number]) if raws else _from_contents(tensor)


def _check_shape(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    """One value of the type that is known."""
    name = tensor.name
    if name not in INPUTS:
        raise UnsupportedError(f"there is no input {name!r:.60}; there is: {', '.join(INPUTS)}", param=name)
    if tensor.datatype != INPUTS[name]:
        raise ClientError(f"{name} must have datatype {INPUTS[name]}, got {tensor.datatype!r:.60}", param=name)
    if list(tensor.shape) not in ([1], [1, 1]):
        raise ClientError(f"{name} must have shape [1] or [1, 1], got {list(tensor.shape)!s:.60}", param=name)
    for parameter in tensor.parameters:
        raise UnsupportedError(f"{name} can't have parameters, got {parameter!r:.60}", param=name)


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes) -> str | bool:
    name = tensor.name
    if tensor.HasField("contents"):
        raise ClientError(f"{name} has contents, and raw_input_contents are sent too", param=name)
    if tensor.datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise ClientError(f"{name} must be one byte, 0 or 1, in raw_input_contents", param=name)
        return raw == b"\1"
    if len(raw) < 4 or struct.unpack_from("<I", raw)[0] != len(raw) - 4:
        why = f"{name} must be one text in raw_input_contents: 4 bytes with its length, little-endian, and its bytes"
        raise ClientError(why, param=name)
    return _text(name, raw[4:])


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> str | bool:
    name, kind = tensor.name, "bool_contents" if tensor.datatype == "BOOL" else "bytes_contents"
    filled = {field.name: len(values) for field, values in tensor.contents.ListFields()}
    if filled != {kind: 1}:
        raise ClientError(f"{name} must have one value in contents.{kind} and nothing else", param=name)
    value = getattr(tensor.contents, kind)[0]
    return value if isinstance(value, bool) else _text(name, value)


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ClientError(f"{name} must be UTF-8: {error}", param=name) from error


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> tuple[dict[str, Any], float | None]:
    """(inputs and fields by their names, timeout in seconds)."""
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise ClientError(f"the parameter {name!r:.60} has no value", param=name)
        found[name] = getattr(parameter, kind)
        _check_parameter(name, found[name])
    found.pop("triton_enable_empty_final_response", None)  # there always is a final response
    timeout_us = found.pop("timeout", 0)
    return {name: _number(name, value) for name, value in found.items()}, timeout_us / 1e6 or None


def _check_parameter(name: str, value: Any) -> None:
    if name == "timeout":
        good, what = type(value) is int and value >= 0, "a number of microseconds, 0: no limit"
    elif name in _FIELDS:
        return
    elif _PARAMETERS.get(name) == "BOOL":
        good, what = isinstance(value, bool), "true or false"
    elif _PARAMETERS.get(name) == "BYTES":
        good, what = isinstance(value, str), "a string"
    else:
        raise UnsupportedError(f"there is no parameter {name!r:.60}", param=name)
    if not good:
        raise ClientError(f"{name} must be {what}, got {value!r:.60}", param=name)


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


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both; what is said twice may contradict itself."""
    for name in one.keys() & other.keys():
        raise ClientError(f"{name} is sent twice", param=name)
    return {**one, **other}


def _wanted(
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor], given: Mapping[str, Any]
) -> Sequence[str]:
    """Names of outputs."""
    for output in outputs:
        if output.name not in OUTPUTS:
            why = f"there is no output {output.name!r:.60}; there is: {', '.join(OUTPUTS)}"
            raise UnsupportedError(why, param=output.name)
        for parameter in output.parameters:
            raise UnsupportedError(f"{output.name} can't have parameters, got {parameter!r:.60}", param=output.name)
    asked = ["text_output", *(name for name in OUTPUTS if given.get(f"return_{name}"))]
    return list(dict.fromkeys(output.name for output in outputs)) or asked
