"""What a step brings goes to its readers at once, without waking them, and past what is wrapped around the application."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fake_fleet import request, run

from kvasir.cluster import wire
from kvasir.cluster.failover import Failover, LastingStream
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.straight import LINE, CycleLine, Straight
from kvasir.cluster.wire import Endpoint
from kvasir.engine.event import Finished, Token
from kvasir.proto import group_pb2 as pb


def step(*events):
    message = pb.Step()
    for number, event in events:
        wire.add_event(message, number, event)
    return message


class Reader:
    """Reads a stream, and takes what it is offered while it is `free`."""

    def __init__(self, **sampling):
        self.stream = Stream(request(**sampling), 100, lambda index, reason: None)
        self.stream.taker = self._take
        self.free = True
        self.taken, self.read = [], []
        self.task = asyncio.ensure_future(self._read())

    def _take(self, events):
        if self.free:
            self.taken.append(events)
        return self.free

    async def _read(self):
        while events := await self.stream.batch():
            self.read.append(events)


def test_each_request_is_offered_what_a_step_brings_in_one_piece():
    async def main():
        client = GroupClient(Endpoint("127.0.0.1:1", "a", "t"))
        one, two = Reader(n=2), Reader()
        client._streams = {1: one.stream, 2: two.stream}
        await asyncio.sleep(0)
        first = Token("r", 0, (5,)), Token("r", 1, (6,))
        two.free = False
        client._take(step((1, first[0]), (2, first[0]), (1, first[1])))
        client._take(step((1, first[0]), (2, first[0])))
        assert one.taken == [[*first], [first[0]]]
        await asyncio.sleep(0)
        assert two.read == [[first[0], first[0]]]
        one.free = False
        client._take(step(*((1, Finished("r", index, "stop")) for index in (0, 1))))
        await one.task
        assert [type(event) for event in one.read[0]] == [Finished, Finished]
        assert [*client._streams] == [2]
        two.stream.close()
        await two.task

    run(main())


def test_nothing_passes_what_the_reader_has_not_read():
    async def main():
        reader, tokens = Reader(), [Token("r", 0, (number,)) for number in range(3)]
        reader.stream._push(tokens[0])  # before anybody waits
        await asyncio.sleep(0)
        reader.free = False
        reader.stream._push(tokens[1])
        reader.free = True
        reader.stream._push(tokens[2])  # nobody waits: the reader was woken
        await asyncio.sleep(0)
        assert reader.read == [tokens[:1], tokens[1:]]
        assert reader.taken == []
        reader.stream.close()
        await reader.task

    run(main())


def test_what_comes_while_it_is_taken_is_kept():
    """Who takes a token may end its request, which may be told at once."""

    async def main():
        reader = Reader()
        end = Finished("r", 0, "stop")

        def take(events):
            if isinstance(events[-1], Finished):
                return False
            reader.stream._push(end)
            return True

        reader.stream.taker = take
        await asyncio.sleep(0)
        reader.stream._push(Token("r", 0, (1,)))
        await reader.task
        assert reader.read == [[end]]

    run(main())


def test_what_goes_wrong_is_the_readers_alone():
    async def main():
        stream = Stream(request(), 100, lambda index, reason: None)

        async def submit():
            return stream

        placement = SimpleNamespace(submit=submit, client=SimpleNamespace(sheds=lambda streaming: ""))
        lasting = LastingStream(request(), Failover(lambda request, begun: placement))
        await lasting.start()

        def take(events):
            raise ZeroDivisionError

        lasting.pour(take, lambda: True)
        reading = asyncio.ensure_future(lasting.batch())
        await asyncio.sleep(0)
        stream._push(Token("r", 0, (1,)))
        with pytest.raises(ZeroDivisionError):
            await reading
        assert stream.complete

    run(main())


def cycle(**facts):
    """uvicorn's, as far as it is asked."""
    written, sent = [], []
    transport, flow = SimpleNamespace(write=written.append), SimpleNamespace(write_paused=False)
    found = SimpleNamespace(transport=transport, flow=flow, chunked_encoding=True, disconnected=False)
    vars(found).update(facts)
    return found, written, sent


@pytest.mark.parametrize(
    ("facts", "straight", "around"),
    [
        ({}, [b"b\r\nhello world\r\n"], 0),
        ({"disconnected": True}, [], 0),
        ({"flow": SimpleNamespace(write_paused=True)}, [], 1),  # uvicorn waits
        ({"chunked_encoding": None}, [], 1),  # HEAD
    ],
)
def test_chunks_go_straight_while_the_client_reads(facts, straight, around):
    found, written, sent = cycle(**facts)

    async def send(message):
        sent.append(message)

    asyncio.run(Straight({"extensions": {LINE: CycleLine(found)}}, send).chunk(b"hello world"))
    assert written == straight
    assert sent == [{"type": "http.response.body", "body": b"hello world", "more_body": True}] * around
