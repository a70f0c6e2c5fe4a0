"""multipart/form-data (RFC 7578), read piece by piece: what is uploaded never lies in memory as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from kvasir.engine.errors import ClientError

MAX_HEAD = 8192
MAX_BOUNDARY = 200
_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;,]+))', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Field:
    """A field begins; `filename` is None where it is no file."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class Data:
    """Some bytes of the field that began last."""

    data: bytes


class Multipart:
    """Feed it the body. ClientError when that isn't what its Content-Type says."""

    def __init__(self, content_type: str) -> None:
        found = _BOUNDARY.search(content_type)
        if not content_type.lower().startswith("multipart/form-data") or found is None:
            raise ClientError(f"send the file as multipart/form-data, got {content_type!r:.60}")
        boundary = found[1] or found[2]
        if len(boundary) > MAX_BOUNDARY:
            raise ClientError(f"the boundary of the body is longer than {MAX_BOUNDARY} characters")
        self._mark = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._buffer = b"\r\n"
        self._step = self._preamble
        self.complete = False
        """The last field has ended."""

    def feed(self, data: bytes) -> list[Union[Field, Data]]:
        """What the next piece of the body brings."""
        self._buffer += data
        out: list[Union[Field, Data]] = []
        while not self.complete and self._step(out):
            pass
        if self.complete:
            self._buffer = b""  # whatever follows isn't ours
        return out

    def _preamble(self, out: list[Union[Field, Data]]) -> bool:
        return self._until_mark([])

    def _body(self, out: list[Union[Field, Data]]) -> bool:
        return self._until_mark(out)

    def _until_mark(self, out: list[Union[Field, Data]]) -> bool:
        """Everything before the next mark, but what may be its beginning. Whether the mark was found."""
        at = self._buffer.find(self._mark)
        end = at if at >= 0 else max(0, len(self._buffer) - len(self._mark) + 1)
        if end:
            out.append(Data(self._buffer[:end]))
        self._buffer = self._buffer[end if at < 0 else at + len(self._mark) :]
        if at >= 0:
            self._step = self._behind_mark
        return at >= 0

    def _behind_mark(self, out: list[Union[Field, Data]]) -> bool:
        """The end, or another field."""
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self.complete = True
        elif not self._buffer.startswith(b"\r\n"):
            raise ClientError(
                "the body isn't valid multipart/form-data: a boundary is followed by neither -- nor a line"
            )
        self._step = self._head
        return True

    def _head(self, out: list[Union[Field, Data]]) -> bool:
        """The headers of a field; the line's end of its mark still lies before them."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise ClientError(f"the headers of a field are longer than {MAX_HEAD} bytes")
            return False
        out.append(_field(self._buffer[2:end] if end else b""))
        self._buffer = self._buffer[end + 4 :]
        self._step = self._body
        return True


def _field(head: bytes) -> Field:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            found = {key.lower(): re.sub(r"\\(.)", r"\1", text) for key, text in _PARAMETER.findall(value)}
            if "name" in found:
                return Field(found["name"], found.get("filename"))
    raise ClientError("a field of the body has no Content-Disposition with a name")
