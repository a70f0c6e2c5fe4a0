"""A gateway's stream to a group: events, refusals, slow readers, deaths."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import socket

import pytest
from waiting import until_async

from kvasir.cluster import group_client, group_service, message_stream, wire
from kvasir.cluster.group_client import GroupClient
from kvasir.engine.errors import ClientError, ContextLengthError, UnavailableError
from kvasir.engine.event import Failed, Finished, Token, TokenLogprob
from kvasir.engine.request import Request, SamplingParams
from kvasir.proto import group_pb2 as pb


def request(name="r", prompt=(1, 2, 3), **sampling):
    return Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))


async def connect(group, **options):
    client = GroupClient(group.endpoint, **options)
    client.start()
    await until_async(lambda: client.alive)
    return client


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_tokens_come_in_order_and_end(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            assert client.info == group.engine.info
            stream = await client.submit(request(n=2, max_tokens=5))
            events = [event async for event in stream]
            for index in (0, 1):
                mine = [event for event in events if event.index == index]
                assert [t for event in mine[:-1] for t in event.token_ids] == [65, 66, 67, 68, 69]
                assert isinstance(mine[-1], Finished)
            assert {event.request_id for event in events} == {"r"}
            await until_async(lambda: client.load == 0)  # as reported, which lags
            await client.close()

    run(main())


def test_many_at_once(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)

            async def one(number):
                stream = await client.submit(request(f"r{number}", max_tokens=number % 17 + 1))
                return sum([len(event.token_ids) async for event in stream if isinstance(event, Token)])

            assert await asyncio.gather(*map(one, range(200))) == [number % 17 + 1 for number in range(200)]
            assert not group.engine.requests
            await client.close()

    run(main())


def test_prompt_of_a_million_ids(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            prompt = [100_000] * 2**20
            stream = await client.submit(request(prompt=prompt, max_tokens=1))
            assert isinstance([event async for event in stream][-1], Finished)
            assert group.engine.submitted[0].prompt_token_ids == prompt
            with pytest.raises(ContextLengthError, match="more than"):
                await client.submit(request(prompt=prompt * 2 + [1], max_tokens=1))
            await until_async(lambda: client.load == 0)
            await client.close()

    run(main())


def test_what_is_too_big_fails_alone(group_of_fakes, monkeypatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 10_000)

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            other = await client.submit(request("other", max_tokens=10**6))
            with pytest.raises(ClientError, match="prompt takes"):
                await client.submit(request("long", prompt=[100_000] * 4000))
            stream = await client.submit(request("scores", max_tokens=10**6))
            name = group.engine.submitted[-1].request_id
            score = TokenLogprob(-1.0, 1, tuple((i, -1.0) for i in range(20)))
            group.engine.deliver([Token(name, 0, (65,), prompt_logprobs=[None] + [score] * 100)])
            failed = await _last(stream)
            assert "prompt_logprobs takes" in failed.message
            await until_async(lambda: len(group.engine.requests) == 1)
            assert isinstance(await anext(other), Token)
            await client.close()

    run(main())


async def _scored(stream):
    """The event with prompt_logprobs, or the failure in its place; then the stream is closed."""
    event = await anext(stream)
    while isinstance(event, Token) and not event.prompt_logprobs:
        event = await anext(stream)
    stream.close()
    return event


@pytest.mark.parametrize("number", [1, 300])
def test_what_just_fits_is_sent_and_one_byte_more_is_refused(group_of_fakes, monkeypatch, number):
    score = TokenLogprob(-1.0, 1, tuple((i, -1.0) for i in range(20)))
    token, whole = Token("r", 0, (65,), prompt_logprobs=[None, *[score] * 100]), pb.GroupMessage()
    wire.add_event(whole.step, number, token)

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            client._numbers = itertools.count(number)
            for limit, kind in ((whole.ByteSize(), Token), (whole.ByteSize() - 1, Failed)):
                monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", limit)
                stream = await client.submit(request(f"of {limit}", max_tokens=10**6))
                name = group.engine.submitted[-1].request_id
                group.engine.deliver([dataclasses.replace(token, request_id=name)])
                assert isinstance(await _scored(stream), kind)
            await client.close()

    run(main())


def test_big_messages_that_find_others_waiting_are_refused_alone(group_of_fakes, monkeypatch):
    """A gateway that gets several at once isn't cut off as if it didn't read."""
    waiting = [0]
    monkeypatch.setattr(message_stream.MessageStream, "queued_bytes", property(lambda self: waiting[0]))

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            other = await client.submit(request("other", max_tokens=10**6))
            for size, kind in (
                (group_service.MAX_QUEUED_BYTES // 2 - 100, Token),
                (group_service.MAX_QUEUED_BYTES // 2, Failed),
            ):
                waiting[0] = size
                stream = await client.submit(request(f"of {size}", max_tokens=10**6))
                name = group.engine.submitted[-1].request_id
                group.engine.deliver([Token(name, 0, (65,), prompt_logprobs=[None, TokenLogprob(-1.0, 1)])])
                found = await _scored(stream)
                assert isinstance(found, kind)
            assert (found.code, found.param) == ("overloaded", "prompt_logprobs")
            assert "128 MiB are on their way" in found.message
            assert isinstance(await anext(other), Token)
            await client.close()

    run(main())


def test_duplicate_ids_are_refused_within_a_gateway_only(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            one, two = await connect(group), await connect(group)
            first = await one.submit(request(max_tokens=10**6))
            with pytest.raises(ClientError, match="already in use"):
                await one.submit(request(max_tokens=1))
            other = await two.submit(request(max_tokens=1))
            assert isinstance([event async for event in other][-1], Finished)
            assert isinstance(await anext(first), Token)
            await one.close()
            await two.close()

    run(main())


def test_abort_of_one_continuation(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            stream = await client.submit(request(n=2, max_tokens=10**6))
            await anext(stream)
            stream.abort(1, "stop")
            ends = [event async for event in _until_finished(stream)]
            assert (ends[-1].index, ends[-1].reason) == (1, "stop")
            stream.abort()
            ends = [event async for event in stream]
            assert (ends[-1].index, ends[-1].reason) == (0, "abort")
            await client.close()

    async def _until_finished(stream):
        async for event in stream:
            yield event
            if isinstance(event, Finished):
                return

    run(main())


def test_a_reader_that_goes_away_frees_the_request(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            stream = await client.submit(request(max_tokens=10**6))
            stream.close()
            stream.close()
            await until_async(lambda: not group.engine.requests)
            assert [event async for event in stream] == []
            await until_async(lambda: client.load == 0)
            await client.close()

    run(main())


def test_a_slow_reader_is_told(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group, max_stream_buffer=50)
            stream = await client.submit(request(max_tokens=10**6))
            await until_async(lambda: group.engine.aborted)
            events = [event async for event in stream]
            assert len(events) == 51
            assert isinstance(events[-1], Failed)
            assert events[-1].code == "overloaded"
            assert not group.engine.requests
            await client.close()

    run(main())


def test_a_gateway_that_dies_frees_its_requests(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            streams = [await client.submit(request(f"r{i}", max_tokens=10**6)) for i in range(5)]
            await client.close()
            await until_async(lambda: not group.engine.requests)
            for stream in streams:
                assert [event async for event in stream][-1].code == "unavailable"

    run(main())


def test_a_group_that_dies_fails_its_requests_at_once(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            stream = await client.submit(request(max_tokens=10**6))
            await anext(stream)
            await group.service.stop()
            assert (await _last(stream)).code == "unavailable"
            assert not client.alive
            with pytest.raises(UnavailableError):
                await client.submit(request())
            await client.close()

    run(main())


async def _last(stream):
    return [event async for event in stream][-1]


def test_silence_is_death(group_of_fakes, monkeypatch):
    monkeypatch.setattr(group_client, "SILENCE_S", 0.6)

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            stream = await client.submit(request(max_tokens=10**6))
            monkeypatch.setattr(group.service, "_post", lambda *_: None)
            assert (await asyncio.wait_for(_last(stream), 60)).code == "unavailable"
            assert "said nothing" in client.last_error or "connect" in client.last_error
            assert "127.0.0.1" not in client.last_error, "clients are told this"
            await client.close()

    run(main())


def test_a_stalled_step_loop_is_not_alive(group_of_fakes, monkeypatch):
    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            group.engine.shutdown()
            group.engine.heartbeat -= wire.STALL_S
            await until_async(lambda: not client.alive)
            await client.close()

    run(main())


def test_wrong_token_is_refused(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = GroupClient(dataclasses.replace(group.endpoint, token="guess"))
            client.start()
            await until_async(lambda: client.last_error)
            assert "kvasir-token" in client.last_error
            assert not client.alive
            await client.close()

    run(main())


def test_another_life_behind_the_same_address_is_not_ours(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            client = GroupClient(dataclasses.replace(group.endpoint, incarnation="life-0"))
            client.start()
            await until_async(lambda: client.last_error)
            assert "replaced" in client.last_error
            assert not client.alive
            await client.close()

    run(main())


@pytest.mark.parametrize(("seconds", "size"), [(0.3, 2**30), (100, 2**18)])
def test_a_gateway_that_does_not_read_is_cut_off(group_of_fakes, monkeypatch, seconds, size):
    monkeypatch.setattr("kvasir.cluster.group_service.UNREAD_S", seconds)
    monkeypatch.setattr("kvasir.cluster.group_service.MAX_QUEUED_BYTES", size)
    monkeypatch.setitem(message_stream._SOCKET, "TCP_NOTSENT_LOWAT", 4096)  # so that little is on its way

    async def main():
        async with group_of_fakes(step_s=0.0001) as group:
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(_address(group))
                _say(sock, pb.GatewayMessage(token=group.endpoint.token))
                message = request(n=128, max_tokens=10**7)
                _say(sock, pb.GatewayMessage(submit=wire.encode_request(message, 1)))
                await until_async(lambda: group.engine.requests)
                await until_async(lambda: not group.engine.requests)
                await asyncio.to_thread(_read_all, sock)  # it has an end

    run(main())


def test_two_that_are_big_together_come_apart(group_of_fakes, monkeypatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 10_000)

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            streams = [await client.submit(request(name, max_tokens=10**6)) for name in "ab"]
            score, step, events = TokenLogprob(-1.0, 1, tuple((i, -1.0) for i in range(20))), pb.Step(), []
            for number, running in enumerate(group.engine.submitted[-2:]):
                token = Token(running.request_id, 0, (65,), prompt_logprobs=[None] + [score] * 40)
                events += [token, Failed(running.request_id, "internal_error", "over")]
                wire.add_event(step, number, token)
            assert step.ByteSize() > 10_000
            group.engine.deliver(events)
            for stream in streams:
                *tokens, last = [event async for event in stream]
                assert 41 in [len(token.prompt_logprobs or ()) for token in tokens]
                assert last.message == "over"
            await client.close()

    run(main())


def test_who_says_what_cannot_be_read_is_asked_again():
    async def main():
        connections = []

        async def speak(reader, writer):
            connections.append(await reader.readexactly(4))
            writer.write((2**31).to_bytes(4, "little"))
            await reader.read()
            writer.close()

        async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = GroupClient(wire.Endpoint(f"127.0.0.1:{port}", "life-0", "token"))
            client.start()
            await until_async(lambda: len(connections) > 1)
            assert client.last_error == "a message of the group can't be read"
            await client.close()

    run(main())


def test_who_says_nothing_is_expelled(group_of_fakes, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.group_service.TOKEN_S", 0.05)

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            reader, writer = await asyncio.open_connection(*_address(group))
            assert await reader.read() == b""
            assert client.alive
            writer.close()
            await client.close()

    run(main())


def test_only_who_reads_nothing_leaves_messages_unread():
    class Transport:
        waiting = 0

        def is_closing(self):
            return False

        def write(self, data):
            self.waiting += len(data)

        def get_write_buffer_size(self):
            return self.waiting

    async def main():
        stream = message_stream.MessageStream(pb.GatewayMessage, print, print, limit=100)
        stream._transport = transport = Transport()
        now = stream._moved
        for turn in range(1, 4):  # something always waits, but what was sent before has gone
            stream.send(pb.GatewayMessage(token="x" * 100))
            transport.waiting = 50
            assert stream.unread_s(now + turn) == 0
        assert stream.unread_s(now + 9) == 6
        transport.waiting = 0
        assert stream.unread_s(now + 20) == 0

    run(main())


@pytest.mark.parametrize("first", [pb.GatewayMessage(token="x" * 2000), pb.GatewayMessage(resync=pb.Resync()), None])
def test_who_says_no_token_gets_nothing(group_of_fakes, first):
    async def main():
        async with group_of_fakes() as group:
            with socket.create_connection(_address(group), timeout=60) as sock:
                if first is None:
                    sock.sendall(b"\4\0\0\0\0\0\0\0")  # no message at all
                else:
                    _say(sock, first)
                    _say(sock, pb.GatewayMessage(submit=wire.encode_request(request(), 1)))
                try:
                    data = await asyncio.to_thread(_read_all, sock)
                except ConnectionResetError:
                    data = b""
                assert group.endpoint.incarnation.encode() not in data
            assert not group.engine.requests

    run(main())


def test_messages_however_they_are_cut(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            reader, writer = await asyncio.open_connection(*_address(group))
            submit = pb.GatewayMessage(submit=wire.encode_request(request(max_tokens=2), 7))
            data = b"".join(map(_framed, (pb.GatewayMessage(token=group.endpoint.token), submit)))
            for place in range(0, len(data), 3):
                writer.write(data[place : place + 3])
                await writer.drain()
            kinds = []
            while "step" not in kinds:
                size = int.from_bytes(await reader.readexactly(4), "little")
                kinds.append(pb.GroupMessage.FromString(await reader.readexactly(size)).WhichOneof("message"))
            assert kinds[0] == "hello"
            assert "answer" in kinds
            writer.close()
            await writer.wait_closed()

    run(main())


def _address(group):
    host, _, port = group.endpoint.address.rpartition(":")
    return host, int(port)


def _framed(message):
    data = message.SerializeToString()
    return len(data).to_bytes(4, "little") + data


def _say(sock, message):
    sock.sendall(_framed(message))


def _read_all(sock):
    data = b""
    while more := sock.recv(65536):
        data += more
    return data
