"""Tensors and parameters of open_inference.proto as values and back, whatever the model does."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from kvasir.engine.errors import ClientError, ModelNotFoundError, UnsupportedError
from kvasir.proto import open_inference_pb2 as pb

VERSION = "1"
"""Of every model."""
_CONTENTS = {"UINT32": ("uint_contents", "I"), "FP32": ("fp32_contents", "f")}
"""Datatype of an output -> (where its values are, their format in struct)."""


def check_version(version: str) -> None:
    """ModelNotFoundError unless it is the one that models have."""
    if version not in ("", VERSION):
        raise ModelNotFoundError(f"models have version {VERSION} alone, got {version!r:.60}", param="model_version")


def read_tensors(
    request: pb.ModelInferRequest, known: Mapping[str, str], many: str = ""
) -> dict[str, list[str] | list[bool]]:
    """Values of each input by its name. known: name -> datatype; many: the one that may have several values. Raises
    ClientError or UnsupportedError naming the tensor."""
    raws: Sequence[bytes] = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        why = f"raw_input_contents must hold a value for each of the {len(request.inputs)} inputs, got {len(raws)}"
        raise ClientError(why, param="raw_input_contents")
    found: dict[str, list[str] | list[bool]] = {}
    for number, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in found:
            raise ClientError(f"{name} is sent twice", param=name)
        count = _count(tensor, known, many)
        found[name] = _from_raw(tensor, raws[number], count) if raws else _from_contents(tensor, count)
    return found


def read_parameters(
    parameters: Mapping[str, pb.InferParameter], fields: Collection[str], inputs: Mapping[str, str]
) -> tuple[dict[str, Any], float | None]:
    """(fields and inputs by their names, timeout in seconds). Inputs but the text may be said here, as `inputs` has them;
    what a field may be is for others to check."""
    found: dict[str, Any] = {}
    known = {**inputs, "text_input": "a tensor alone", "triton_enable_empty_final_response": "BOOL"}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise ClientError(f"the parameter {name!r:.60} has no value", param=name)
        found[name] = getattr(parameter, kind)
        if name not in fields:
            _check_parameter(name, found[name], known)
    found.pop("triton_enable_empty_final_response", None)  # there always is a final response
    timeout_us = found.pop("timeout", 0)
    return found, timeout_us / 1e6 or None


def wanted(
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor],
    known: Mapping[str, str],
    first: str,
    given: Mapping[str, Any],
) -> Sequence[str]:
    """Names of outputs: those asked for, else `first` and those whose return_... is among what was `given`."""
    for output in outputs:
        if output.name not in known:
            why = f"there is no output {output.name!r:.60}; there is: {', '.join(known)}"
            raise UnsupportedError(why, param=output.name)
        for parameter in output.parameters:
            raise UnsupportedError(f"{output.name} can't have parameters, got {parameter!r:.60}", param=output.name)
    asked = [first, *(name for name in known if given.get(f"return_{name}"))]
    return list(dict.fromkeys(output.name for output in outputs)) or asked


def add_output(
    reply: pb.ModelInferResponse,
    name: str,
    datatype: str,
    shape: Sequence[int],
    values: Sequence[Any],
    raw: bool,
) -> None:
    """A further tensor, of flat values. raw: its bytes stand beside it, as those of the request's did."""
    tensor = reply.outputs.add(name=name, datatype=datatype, shape=shape)
    if datatype == "BYTES":
        texts = [text.encode() for text in values]
        if raw:
            reply.raw_output_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
        else:
            tensor.contents.bytes_contents.extend(texts)
        return
    place, format_ = _CONTENTS[datatype]
    if raw:
        reply.raw_output_contents.append(struct.pack(f"<{len(values)}{format_}", *values))
    else:
        getattr(tensor.contents, place).extend(values)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both; what is said twice may contradict itself."""
    for name in one.keys() & other.keys():
        raise ClientError(f"{name} is sent twice", param=name)
    return {**one, **other}


def _count(tensor: pb.ModelInferRequest.InferInputTensor, known: Mapping[str, str], many: str) -> int:
    """How many values it says it has, of the type that is known."""
    name, shape = tensor.name, list(tensor.shape)
    if name not in known:
        raise UnsupportedError(f"there is no input {name!r:.60}; there is: {', '.join(known)}", param=name)
    if tensor.datatype != known[name]:
        raise ClientError(f"{name} must have datatype {known[name]}, got {tensor.datatype!r:.60}", param=name)
    if shape[1:] not in ([], [1]) or not shape or shape[0] < 1 or (shape[0] > 1 and name != many):
        shapes = "[N] or [N, 1] with N of at least 1" if name == many else "[1] or [1, 1]"
        raise ClientError(f"{name} must have shape {shapes}, got {shape!s:.60}", param=name)
    for parameter in tensor.parameters:
        raise UnsupportedError(f"{name} can't have parameters, got {parameter!r:.60}", param=name)
    return shape[0]


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes, count: int) -> list[str] | list[bool]:
    name = tensor.name
    if tensor.HasField("contents"):
        raise ClientError(f"{name} has contents, and raw_input_contents are sent too", param=name)
    if tensor.datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise ClientError(f"{name} must be one byte, 0 or 1, in raw_input_contents", param=name)
        return [raw == b"\1"]
    texts = list(_cut(raw))
    if None in texts or len(texts) != count:
        what = "each text" if count > 1 else "one text"
        why = f"{name} must be {what} in raw_input_contents: 4 bytes with its length, little-endian, and its bytes"
        raise ClientError(why, param=name)
    return [_text(name, text) for text in texts if text is not None]


def _cut(raw: bytes) -> Iterator[bytes | None]:
    """Texts that stand behind their lengths; None: no whole one."""
    place = 0
    while place < len(raw):
        begin = place + 4
        place = begin + struct.unpack_from("<I", raw, place)[0] if begin <= len(raw) else len(raw) + 1
        yield raw[begin:place] if place <= len(raw) else None


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, count: int) -> list[str] | list[bool]:
    name, kind = tensor.name, "bool_contents" if tensor.datatype == "BOOL" else "bytes_contents"
    filled = {field.name: len(values) for field, values in tensor.contents.ListFields()}
    if filled != {kind: count}:
        number = f"{count} values" if count > 1 else "one value"
        raise ClientError(f"{name} must have {number} in contents.{kind} and nothing else", param=name)
    if kind == "bool_contents":
        return list(tensor.contents.bool_contents)
    return [_text(name, value) for value in tensor.contents.bytes_contents]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ClientError(f"{name} must be UTF-8: {error}", param=name) from error


def _check_parameter(name: str, value: Any, known: Mapping[str, str]) -> None:
    if name == "timeout":
        good, what = type(value) is int and value >= 0, "a number of microseconds, 0: no limit"
    elif known.get(name) == "BOOL":
        good, what = isinstance(value, bool), "true or false"
    elif known.get(name) == "BYTES":
        good, what = isinstance(value, str), "a string"
    else:
        raise UnsupportedError(f"there is no parameter {name!r:.60}", param=name)
    if not good:
        raise ClientError(f"{name} must be {what}, got {value!r:.60}", param=name)


def earlier(*limits_s: float | None) -> float | None:
    """The one that holds: the call's deadline, the request's timeout; None: there is none."""
    return min((limit for limit in limits_s if limit is not None), default=None)
