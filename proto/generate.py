"""Writes the stubs beside this file from the sources in the folders below: python proto/generate.py [FOLDER].

The sources are found under the virtual path kvasir/proto: generated imports read `from kvasir.proto import ...`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "kvasir" / "v1", HERE / "inference")


def generate(folder: Path) -> list[Path]:
    """Stubs of all sources, written into `folder`; returns their paths."""
    with tempfile.TemporaryDirectory() as scratch:
        _compile(Path(scratch))
        made = sorted(Path(scratch, "kvasir", "proto").iterdir())
        return [Path(shutil.copy(path, folder / path.name)) for path in made]


def _compile(scratch: Path) -> None:
    """Run protoc; with the type stubs of the gRPC modules, which it doesn't write itself."""
    names = [f"kvasir/proto/{path.name}" for folder in SOURCES for path in sorted(folder.glob("*.proto"))]
    outputs = [f"--{kind}={scratch}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    descriptors = scratch / "all.desc"
    include = [*(f"-Ikvasir/proto={folder}" for folder in SOURCES), f"-I{files('grpc_tools') / '_proto'}"]
    command = ["protoc", *include, *outputs, f"--descriptor_set_out={descriptors}", *names]
    if protoc.main(command) != 0:
        raise SystemExit(f"protoc refused {', '.join(names)}: see above")
    for file in FileDescriptorSet.FromString(descriptors.read_bytes()).file:
        if file.service:
            path = scratch / file.name.replace(".proto", "_pb2_grpc.pyi")
            path.write_text("\n".join(_typed(file)) + "\n")
        else:
            (scratch / file.name.replace(".proto", "_pb2_grpc.py")).unlink()


def _typed(file: FileDescriptorProto) -> Iterator[str]:
    """Lines of the type stub of a gRPC module."""
    yield "from typing import Any\n"
    for service in file.service:
        yield f"class {service.name}Stub:"
        yield "    def __init__(self, channel: Any) -> None: ..."
        yield from (f"    {method.name}: Any" for method in service.method)
        yield f"\nclass {service.name}Servicer:"
        for method in service.method:
            yield f"    def {method.name}(self, {_requests(method)}: Any, context: Any) -> Any: ..."
        yield f"\ndef add_{service.name}Servicer_to_server(servicer: Any, server: Any) -> None: ..."


def _requests(method: MethodDescriptorProto) -> str:
    """The name protoc gives the argument."""
    return "request_iterator" if method.client_streaming else "request"


if __name__ == "__main__":
    for written in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(written)
