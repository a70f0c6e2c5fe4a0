"""What a request may take before it is one: the size of its head, and the time in which it arrives."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.http_protocol import MAX_HEAD_BYTES

BODY = json.dumps({"model": "bytes", "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FILE = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.fixture
def hasty(live_gateway):
    with live_gateway(GatewayConfig(receive_timeout_s=0.3)) as live:
        yield live


def connect(gateway):
    return socket.create_connection(("localhost", int(gateway.url.rsplit(":", 1)[1])), timeout=20)


def answer(sock):
    """(status, headers and body) up to the connection's end; (0, "") when it was just closed."""
    data = b""
    while True:
        try:
            more = sock.recv(65536)
        except ConnectionResetError:  # it was closed while we still sent
            more = b""
        if not more:
            break
        data += more
    return (int(data.split()[1]), data.decode()) if data else (0, "")


def until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_head_that_is_too_large(gateway):
    long = b"X-Long: " + b"a" * MAX_HEAD_BYTES + b"\r\n"
    many = b"".join(b"X-%d: b\r\n" % number for number in range(MAX_HEAD_BYTES // 8))
    for more in (long, many):
        with connect(gateway) as sock:
            sock.sendall(HEAD + more + LENGTH + b"\r\n" + BODY)
            status, text = answer(sock)
        assert status == 431
        assert f"more than {MAX_HEAD_BYTES} bytes" in text
        assert '"code":"request_too_large"' in text
        assert "connection: close" in text
    with connect(gateway) as sock:
        sock.sendall(b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(sock)[0] == 431


def test_a_head_without_end_is_cut_off(gateway):
    """Before it is whole: it mustn't be gathered."""
    with connect(gateway) as sock:
        sock.sendall(HEAD + b"X-Endless: ")
        sent = 0
        try:
            while sent < 8 * MAX_HEAD_BYTES:
                sent += sock.send(b"a" * 4096)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert answer(sock)[0] in (431, 0)  # what was unread when it closed may take the answer with it


def test_large_heads_within_the_limit(gateway):
    with connect(gateway) as sock:
        fill = b"X-Long: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n"
        sock.sendall(HEAD + fill + LENGTH + b"Connection: close\r\n\r\n" + BODY)
        assert answer(sock)[0] == 200


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + LENGTH + b"\r\n", HEAD + LENGTH + b"\r\n" + BODY[:9]])
def test_what_never_comes(hasty, sent):
    with connect(hasty) as sock:
        sock.sendall(sent)
        status, text = answer(sock)
    assert status == (408 if sent else 0)
    if sent:
        assert "didn't arrive within 0.3 s (--receive-timeout)" in text
        assert '"code":"request_timeout"' in text


def test_the_dialect_of_the_path(hasty):
    with connect(hasty) as sock:
        sock.sendall(HEAD.replace(b"/v1/completions", b"/api/chat") + LENGTH + b"\r\n")
        assert answer(sock)[1].endswith('{"error":"the request didn\'t arrive within 0.3 s (--receive-timeout)"}')


def test_an_answer_takes_as_long_as_it_takes(hasty):
    hasty.group.step_s = 0.05
    body = json.dumps({"model": "bytes", "prompt": "Hi", "stream": True}).encode()
    with connect(hasty) as sock:
        sock.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        status, text = answer(sock)
    assert status == 200
    assert "[DONE]" in text


def test_a_client_that_leaves_within_its_body_is_no_error(gateway, caplog):
    with caplog.at_level(logging.DEBUG):
        for head in (HEAD, HEAD.replace(b"/v1/completions", b"/v1/responses"), FILE):
            with connect(gateway) as sock:
                sock.sendall(head + b"Content-Length: 5000\r\n\r\n" + BODY)
                until(lambda: any(one.cycle for one in gateway.call(lambda: [*gateway.connections])))
            until(lambda: not gateway.connections)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
