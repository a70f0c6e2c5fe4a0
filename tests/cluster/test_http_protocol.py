"""What a request may take before it is one: the size of its head, and the time in which it arrives."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
from http.client import HTTPResponse

import pytest
import uvloop
from waiting import until

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.http_protocol import MAX_AHEAD, MAX_HEAD_BYTES

BODY = json.dumps({"model": "bytes", "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FILE = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
STREAM = json.dumps({"model": "bytes", "prompt": "Hi", "stream": True}).encode()
STREAM = HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM
SECOND = HEAD + LENGTH + b"\r\n" + BODY


@pytest.fixture
def hasty(live_gateway):
    with live_gateway(GatewayConfig(receive_timeout_s=0.3)) as live:
        yield live


def connect(gateway):
    return socket.create_connection(("localhost", int(gateway.url.rsplit(":", 1)[1])), timeout=60)


def answer(sock):
    """(status, headers and body) up to the connection's end; (0, "") when it was just closed."""
    data = b""
    while True:
        more = sock.recv(65536)
        if not more:
            break
        data += more
    return (int(data.split()[1]), data.decode()) if data else (0, "")


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


def test_a_head_without_end_is_refused(gateway):
    """Before it is whole: it mustn't be gathered."""
    with connect(gateway) as sock:
        sock.sendall(HEAD + b"X-Endless: " + b"a" * 8 * MAX_HEAD_BYTES)
        assert answer(sock)[0] == 431


MORE = b"a" * 16 * 2**20
"""More than the system holds between two sockets."""


@pytest.fixture(params=["plain", "tls"])
def secured(request, certificate):
    """(flags, what makes a client's socket of a connection)"""
    if request.param == "plain":
        return {}, lambda sock: sock
    key, chain = map(str, certificate)
    context = ssl.create_default_context(cafile=chain)
    flags = {"ssl_keyfile": key, "ssl_certfile": chain}
    return flags, lambda sock: context.wrap_socket(sock, server_hostname="localhost")


@pytest.mark.parametrize("loop", [asyncio, uvloop], ids=lambda module: module.__name__)
def test_who_sends_all_before_it_reads_is_told_why(live_gateway, secured, loop):
    """A connection that is closed with input unread is reset, which takes the answer away."""
    flags, made = secured
    live = live_gateway(GatewayConfig(max_body_bytes=2**20, **flags))
    live.loop.close()
    live.loop = loop.new_event_loop()
    length, old = b"Content-Length: %d\r\n\r\n" % len(MORE), HEAD.replace(b"1.1", b"1.0")
    begins = {
        HEAD + length: 413,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(MORE): 413,
        old.replace(b"/v1", b"/v2") + length: 404,
        HEAD + b"X-Long: ": 431,
        b"\0\0\r\n\r\n": 400,
    }
    with live as gateway:
        for begin, status in begins.items():
            with connect(gateway) as plain, made(plain) as sock:
                sock.sendall(begin + MORE)
                found = HTTPResponse(sock)
                found.begin()
                assert found.status == status
                assert found.headers["connection"] == "close"
                assert json.loads(found.read())["error"]
        until(lambda: not gateway.connections)


@pytest.mark.parametrize("path", [b"/v1/nothing", b"/v1/completions"])
def test_who_sends_for_ever_is_cut_off(gateway, monkeypatch, path):
    monkeypatch.setattr("kvasir.cluster.lingering.LINGER_BYTES", 2**20)
    with connect(gateway) as sock:
        head = HEAD.replace(b"/v1/completions", path) + b"Connection: close\r\n"
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % 2**40)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            sock.sendall(2 * MORE)


@pytest.mark.parametrize("begin", [b"\0\0\r\n\r\n", HEAD + b"Content-Length: %d\r\n\r\n" % 2**40])
def test_who_never_leaves_is_cut_off(hasty, begin):
    with connect(hasty) as sock:
        sock.sendall(begin)
        assert answer(sock)[0] in (400, 413)
        until(lambda: not hasty.connections)


def test_trailers_give_no_key(live_gateway):
    """Nor anything else: an answer was begun before they came."""
    with live_gateway(GatewayConfig(api_key=("secret",))) as live, connect(live) as sock:
        chunk = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + chunk + b"Authorization: Bearer secret\r\n\r\n")
        assert answer(sock)[0] == 401


@pytest.mark.parametrize("endless", [b"0\r\nX-Endless: ", b"1;endless="])
def test_what_is_between_the_pieces_of_a_body_is_bounded(gateway, endless):
    with connect(gateway) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + endless + b"a" * 8 * MAX_HEAD_BYTES)
        assert answer(sock)[0] == 431


def test_a_refusal_ends_at_once(live_gateway, monkeypatch):
    """However long its client is waited for."""
    monkeypatch.setattr("kvasir.cluster.lingering.LINGER_S", 600.0)
    with live_gateway(GatewayConfig(receive_timeout_s=600.0)) as gateway:
        with connect(gateway) as sock:
            sock.sendall(b"\0\0\r\n\r\n")
            assert answer(sock)[0] == 400
            assert gateway.connections
        until(lambda: not gateway.connections)


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


@pytest.fixture
def slow(hasty):
    """Its answers take longer than a request may."""
    hasty.group.step_s = 0.03
    return hasty


def whole_then(text):
    """What follows on a whole stream."""
    first, rest = text.split("\r\n0\r\n\r\n", 1)
    assert "[DONE]" in first
    assert first.count("HTTP/1.1 ") == 1
    return rest


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (HEAD, 408),
        (SECOND[:-9], 408),
        (HEAD + b"X-Long: " + b"a" * 6 * MAX_HEAD_BYTES, 431),
        (HEAD + b"X-Long: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"\0\0\r\n\r\n", 400),
    ],
    ids=["half-head", "half-body", "endless-head", "large-head", "no-http"],
)
@pytest.mark.parametrize("together", [True, False])
def test_what_comes_behind_a_request_leaves_its_answer_alone(slow, second, status, together):
    """It is refused behind the answer, and its time begins there."""
    over = threading.Event()
    slow.group.script = lambda *_: [65] * 4000
    slow.group._reason = lambda *_: "stop" if over.is_set() else None
    with connect(slow) as sock:
        sock.sendall(STREAM + second if together else STREAM)
        begin = sock.recv(65536)
        sock.sendall(b"" if together else second)
        time.sleep(0.4)  # longer than a request may take
        over.set()
        refused = whole_then(begin.decode() + _rest(sock))
    assert refused.startswith(f"HTTP/1.1 {status} ")
    assert refused.count("HTTP/1.1 ") == 1
    assert "connection: close" in refused


def _rest(sock):
    data = b""
    while more := sock.recv(65536):
        data += more
    return data.decode()


@pytest.mark.parametrize("cut", [len(HEAD), len(SECOND) - 9])
def test_a_request_that_is_whole_when_the_answer_before_it_is(live_gateway, cut):
    """More than its time has passed by then; a busy machine has a second and more for the rest."""
    with live_gateway(GatewayConfig(receive_timeout_s=1.5)) as gateway, connect(gateway) as sock:
        gateway.group.step_s = 0.1
        sock.sendall(STREAM + SECOND[:cut])
        data = b""
        while b"[DONE]" not in data:
            data += sock.recv(65536)
        gateway.group.step_s = 0.001
        sock.sendall(SECOND[cut:] + SECOND.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        rest = whole_then(data.decode() + _rest(sock))
    assert rest.count("HTTP/1.1 200 OK") == rest.count('"finish_reason":"stop"') == 2


def test_nothing_but_the_answer_when_a_body_never_comes(hasty):
    """It was refused before it was whole: no second answer follows."""
    with connect(hasty) as sock:
        sock.sendall(HEAD.replace(b"/v1/completions", b"/v1/nothing") + LENGTH + b"\r\n" + BODY[:9])
        status, text = answer(sock)
    assert status == 404
    assert text.count("HTTP/1.1 ") == 1


def test_a_client_that_leaves_behind_a_second_request_ends_the_first(live_gateway):
    with live_gateway() as gateway:
        gateway.group.step_s = 0.05
        gateway.group.script = lambda request, index: [65] * 4000
        with connect(gateway) as sock:
            sock.sendall(STREAM + SECOND)
            assert sock.recv(1)
            assert gateway.group.running == 1
        until(lambda: gateway.group.running == 0)


def test_too_many_ahead(slow):
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(slow) as sock:
        sock.sendall(STREAM + get * (MAX_AHEAD + 5))
        rest = whole_then(_rest(sock))
    assert rest.count("HTTP/1.1 200 OK") == MAX_AHEAD
    assert rest.count("HTTP/1.1 ") == MAX_AHEAD + 1
    assert f"more than {MAX_AHEAD} requests wait" in rest


def test_nothing_but_newlines_between_requests(hasty):
    """They hold no connection open."""
    with connect(hasty) as sock:
        sock.sendall(SECOND)
        data = b""
        while b'"usage"' not in data:
            data += sock.recv(65536)
        sock.sendall(b"\r\n")
        assert "408" in _rest(sock)


def test_a_query_that_is_no_text(gateway):
    with connect(gateway) as sock:
        sock.sendall(b"GET /v1/nothing?a=\x91 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, text = answer(sock)
    assert status == 400
    assert '"type":"invalid_request_error"' in text


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ({}, b""),
        ({"stream": True}, b""),
        ({"stream": True}, b"kvasir-resumable: true\r\n"),
        ({"stream": True, "model": "none"}, b""),
    ],
    ids=["whole", "stream", "resumable", "refused"],
)
def test_an_older_client_gets_no_chunks(gateway, body, head):
    """HTTP/1.0 has none: a stream ends where the connection does."""
    whole = json.dumps({"model": "bytes", "prompt": "Hi", **body}).encode()
    answers = []
    for version in (b"HTTP/1.1\r\nConnection: close", b"HTTP/1.0\r\nConnection: keep-alive"):
        with connect(gateway) as sock:
            first = HEAD.replace(b"HTTP/1.1", version) + head
            sock.sendall(first + b"Content-Length: %d\r\n\r\n" % len(whole) + whole)
            answers.append(_rest(sock).partition("\r\n\r\n"))
    (new, _, chunked), (old, _, bare) = answers
    assert "transfer-encoding" not in old
    assert "connection: close" in old
    assert ("transfer-encoding: chunked" in new) == (body.get("stream", False) and "model" not in body)
    assert ("content-length" in old) == ("content-length" in new)
    if "transfer-encoding" in new:
        chunked = "".join(line for line in chunked.split("\r\n") if not set(line) <= set("0123456789abcdef"))
        assert bare.endswith("data: [DONE]\n\n")
    assert [part.keys() for part in _parts(bare)] == [part.keys() for part in _parts(chunked)]


def _parts(body):
    """The objects of a whole answer, or of a stream."""
    found = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith(("data: {", "{"))]
    return [json.loads(text) for text in found]


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
CHUNKED = (
    HEAD + OFFER + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\nX-Trailer: b\r\n\r\n" % (len(BODY), BODY)
)


@pytest.mark.parametrize("request_", [HEAD + OFFER + LENGTH + b"\r\n" + BODY, CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("size", [1, 7, 65536])
def test_an_offer_to_upgrade_is_ignored(gateway, caplog, request_, size):
    """Java's clients offer h2c with every request: they lost their bodies."""
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + OFFER + b"\r\n"
    whole = request_ + get + request_ + SECOND.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with connect(gateway) as sock:
        for start in range(0, len(whole), size):
            sock.sendall(whole[start : start + size])
        text = _rest(sock)
    assert text.count("HTTP/1.1 200 OK") == text.count("HTTP/1.1 ") == 4
    assert text.count('"finish_reason":"stop"') == 3
    assert caplog.records == []


def test_a_body_behind_an_offer_is_no_request(gateway):
    """Whoever is between took it for a body; it would be somebody else's request."""
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(gateway) as sock:
        sock.sendall(HEAD + OFFER + b"Content-Length: %d\r\n\r\n" % len(hidden) + hidden)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = _rest(sock)
    assert [part[:3] for part in text.split("HTTP/1.1 ")[1:]] == ["400", "200"]


def test_what_is_malformed_is_not_logged(gateway, caplog):
    """Anybody could fill the log: it needs no key."""
    lines = b"\x16\x03\x01 of TLS", b"GET /\xff HTTP/1.1", b"CONNECT a:1 HTTP/1.1"
    for sent in (*(line + b"\r\n\r\n" for line in lines), HEAD + OFFER + b"Transfer-Encoding: \xe9\r\n\r\n"):
        with connect(gateway) as sock:
            sock.sendall(sent)
            assert answer(sock)[0] == 400
    assert caplog.records == []


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_reads_nothing_is_cut_off(hasty, streamed):
    """All that the kernel and we take for it is full, and it acknowledges no more."""
    hasty.group.script = lambda request, index: [65] * 3000
    body = json.dumps(
        {"model": "bytes", "prompt": "Hi", "stream": streamed, "logprobs": 5, "max_tokens": 3000}
    ).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("localhost", int(hasty.url.rsplit(":", 1)[1])))
        (connection,) = until(lambda: hasty.call(lambda: [*hasty.connections]))
        theirs = connection.transport.get_extra_info("socket")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: hasty.group.requests)
        until(lambda: not hasty.connections)
        until(lambda: not hasty.desk.running and not hasty.group.running)
        until(lambda: theirs.fileno() == -1)
