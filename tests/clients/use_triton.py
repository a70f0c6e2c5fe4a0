"""`python use_triton.py ADDRESS KEY`: Triton's client against a server with skald. A process has room for one definition of
the protocol's messages, and the tests' has ours."""

from __future__ import annotations

import faulthandler
import json
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def refused(client: triton.InferenceServerClient, *asked: object, **more: object) -> str:
    """The status with which it is."""
    try:
        client.infer(*asked, **more)
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    raise AssertionError("it was answered")


def main(address: str, key: str) -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    headers = {"authorization": f"Bearer {key}"}
    given = {"text_input": "Once upon a time", "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 9})}
    with triton.InferenceServerClient(address) as client:
        inputs = [triton.InferInput(name, [1], "BYTES") for name in given]
        for tensor, value in zip(inputs, given.values(), strict=True):
            tensor.set_data_from_numpy(np.array([value.encode()], dtype=object))
        whole = client.infer("skald", inputs, headers=headers).as_numpy("text_output")[0].decode()
        assert whole.startswith("Once upon a time"), whole
        assert len(whole) > len("Once upon a time"), whole
        told = refused(client, "no", inputs, headers=headers)
        assert told.startswith("StatusCode.NOT_FOUND"), told
        assert "there is: skald" in told
        told = refused(client, "skald", inputs)
        assert told.startswith("StatusCode.UNAUTHENTICATED"), told


if __name__ == "__main__":
    main(*sys.argv[1:])
