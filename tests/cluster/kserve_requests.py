"""Requests of the Open Inference Protocol that its tests share."""

from __future__ import annotations

import json

from kvasir.proto import open_inference_pb2 as pb


def asking(text="Hi", parameters=(), outputs=(), sampling=None, **inputs):
    """A request with values inside its tensors."""
    request = pb.ModelInferRequest(model_name="bytes")
    given = {"text_input": text, **inputs} | ({} if sampling is None else {"sampling_parameters": json.dumps(sampling)})
    for name, value in given.items():
        add_input(request, name, value)
    for name, value in dict(parameters).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    request.outputs.extend(pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)
    return request


def add_input(request, name, value):
    flag = isinstance(value, bool)
    tensor = request.inputs.add(name=name, datatype="BOOL" if flag else "BYTES", shape=[1])
    if flag:
        tensor.contents.bool_contents.append(value)
    else:
        tensor.contents.bytes_contents.append(value.encode())


def changed(change, **options):
    request = asking(**options)
    change(request)
    return request
