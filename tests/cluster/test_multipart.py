"""multipart/form-data as clients write it, however it is cut, and as nobody should."""

from __future__ import annotations

import contextlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.cluster.multipart import Data, Field, Multipart
from kvasir.engine.errors import ClientError


def read(content_type: str, body: bytes, cuts: list[int]) -> tuple[list[tuple[str, str | None, bytes]], bool]:
    """(name, filename, content) of each field, and whether the body is complete."""
    form, found, before = Multipart(content_type), [], 0
    for cut in [*sorted(cut % (len(body) + 1) for cut in cuts), len(body)]:
        for event in form.feed(body[before:cut]):
            if isinstance(event, Field):
                found.append([event.name, event.filename, b""])
            else:
                assert isinstance(event, Data)
                found[-1][2] += event.data
        before = cut
    return [(name, filename, data) for name, filename, data in found], form.complete


@given(
    st.dictionaries(st.text("abc[]", min_size=1, max_size=5), st.text(max_size=20), max_size=3),
    st.binary(max_size=300)
    | st.lists(st.sampled_from([b"\r\n", b"--", b"bound", b"x", b"\r"]), max_size=30).map(b"".join),
    st.lists(st.integers(0, 5000), max_size=20),
)
def test_what_is_sent_is_read(fields: dict[str, str], data: bytes, cuts: list[int]) -> None:
    kind = {"content-type": "multipart/form-data; boundary=bound"}
    request = httpx.Request("POST", "http://x", data=fields, files={"file": ("a b.jsonl", data)}, headers=kind)
    body = request.read()
    if b"\r\n--bound" in data:
        return  # which a client must not send
    wanted = [*((name, None, text.encode()) for name, text in fields.items()), ("file", "a b.jsonl", data)]
    assert read(kind["content-type"], body, cuts) == (wanted, True)
    assert not read(kind["content-type"], body[:-4], cuts)[1]


@given(st.binary(max_size=200) | st.lists(
    st.sampled_from([b"--b", b"\r\n", b"--", b'Content-Disposition: form-data; name="a"', b":", b"x"])).map(b"".join),
    st.lists(st.integers(0, 200), max_size=5))  # fmt: skip
def test_anything_else_is_refused_or_read(body: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(ClientError):
        read("multipart/form-data; boundary=b", body, cuts)


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x", f"multipart/form-data; boundary={'x' * 300}"],
)  # fmt: skip
def test_content_types(content_type: str) -> None:
    with pytest.raises(ClientError):
        Multipart(content_type)


def test_quoted() -> None:
    head = (
        rb"--a b"
        + b"\r\n"
        + rb'content-disposition: form-data; name="f"; filename="q\"uo.txt"'
        + b"\r\n\r\nx\r\n--a b--"
    )
    assert read('multipart/form-data; boundary="a b"', head, []) == ([("f", 'q"uo.txt', b"x")], True)
