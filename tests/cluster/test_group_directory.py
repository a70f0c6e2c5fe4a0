"""A gateway's groups: which there are, what blocks they hold, what they were given."""

from __future__ import annotations

import asyncio

import pytest
from waiting import until_async

from kvasir.cluster import wire
from kvasir.cluster.directory import BlockDirectory
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.prompt_keys import Hasher, PromptKeys
from kvasir.cluster.router import Router
from kvasir.engine.blocks import content_ids, salted, token_bytes
from kvasir.engine.errors import ContextLengthError, ModelNotFoundError, UnavailableError
from kvasir.engine.event import Finished
from kvasir.engine.request import Request, SamplingParams


def request(name="r", prompt=(1, 2, 3), **sampling):
    return Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))


async def connect(group):
    client = GroupClient(group.endpoint)
    client.start()
    await until_async(lambda: client.alive)
    return client


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_directory_finds_the_least_loaded(group_of_fakes):
    async def main():
        async with group_of_fakes() as one, group_of_fakes() as two:
            # by cost who streams already is cheaper than who is about to, so that the fakes' threads would decide
            directory = GroupDirectory({"m": "m", "alias": "m", "other": "other"}, policy="least-load")
            assert directory.names == ["m", "other", "alias"]
            with pytest.raises(ModelNotFoundError, match="alias"):
                directory.find("nope")
            with pytest.raises(UnavailableError, match="starting"):
                directory.find("m")
            directory.update("m", [one.endpoint, two.endpoint])
            await until_async(lambda: all(client.alive for client in directory.clients("m")))
            for number in range(4):
                await directory.place("alias", request(f"r{number}", max_tokens=10**6)).submit()
            assert [len(one.engine.requests), len(two.engine.requests)] == [2, 2]
            assert directory.models() == [one.engine.info]
            assert list(directory.missing()) == ["other"]
            await directory.close()

    run(main())


def test_directory_lets_a_leaving_group_finish(group_of_fakes):
    async def main():
        async with group_of_fakes() as old, group_of_fakes() as new:
            directory = GroupDirectory({"m": "m"})
            directory.update("m", [old.endpoint])
            await until_async(lambda: directory.models())
            stream = await directory.find("m").submit(request(max_tokens=300))
            directory.update("m", [new.endpoint])
            await until_async(lambda: directory.models())
            assert directory.find("m").endpoint.address == new.endpoint.address
            assert isinstance([event async for event in stream][-1], Finished)
            await until_async(lambda: not old.service._links)
            await until_async(lambda: len(directory._models["m"].router.directory._groups) == 1)
            await directory.close()

    run(main())


@pytest.mark.parametrize("begun", [True, False])
def test_a_directory_closes_what_is_leaving_too(group_of_fakes, begun):
    async def main():
        async with group_of_fakes() as group:
            directory = GroupDirectory({"m": "m"})
            directory.update("m", [group.endpoint])
            await until_async(lambda: directory.models())
            await directory.find("m").submit(request(max_tokens=10**6))
            directory.update("m", [])
            if begun:
                await asyncio.sleep(0)
            await directory.close()
            assert [task for task in asyncio.all_tasks() if task.get_name().startswith("group ")] == []
            await until_async(lambda: not group.service._links)

    run(main())


def test_directory_follows(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            found = []

            async def fetch():
                if not found:
                    raise UnavailableError("the model is loading")
                return found

            directory = GroupDirectory({"m": "m"})
            directory.follow("m", fetch)
            await asyncio.sleep(0.05)
            with pytest.raises(UnavailableError, match="loading"):
                directory.find("m")
            found.append(group.endpoint)
            await until_async(lambda: directory.models())
            await group.service.stop()
            await until_async(lambda: directory.missing())
            await directory.close()

    run(main())


def eight_blocks():
    """(their ids, the prompt)"""
    start, tokens = salted("start"), [*range(8)]
    return content_ids(start, token_bytes(tokens), 1), PromptKeys(Hasher(start, 1), tokens, start, 8)


def test_blocks_and_load_reach_the_router(group_of_fakes):
    ids, prompt = eight_blocks()

    def held(client):
        return client.member._directory.found(prompt)[0, client.member.group]

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            group.engine.on_blocks("device", dict.fromkeys(ids[:3], True))
            await until_async(lambda: held(client) == 3)
            late = await connect(group)
            await until_async(lambda: held(late) == 3)
            group.engine.on_blocks("device", {ids[2]: False})
            await until_async(lambda: held(client) == held(late) == 2)
            stream = await client.submit(request(max_tokens=10**6))
            await until_async(lambda: late.stats.running == 1)
            stream.close()
            await client.close()
            await late.close()

    run(main())


def test_a_missed_change_is_made_good(group_of_fakes):
    ids, prompt = eight_blocks()

    async def main():
        async with group_of_fakes() as group:
            client = await connect(group)
            await until_async(lambda: client.member._feed.in_step)
            take, missed = client.member.blocks, []
            client.member.blocks = lambda message: bool(missed.append(message)) if not missed else take(message)
            for number in range(3):
                group.engine.on_blocks("device", {ids[number]: True})
                await asyncio.sleep(2 * wire.PUBLISH_PERIOD_S)
            directory = client.member._directory
            await until_async(lambda: directory.found(prompt)[0, client.member.group] == 3)
            await client.close()

    run(main())


def test_what_changes_while_a_snapshot_is_sent_comes_behind_it(group_of_fakes, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.block_journal.MAX_IDS", 10)
    monkeypatch.setattr(wire, "PUBLISH_PERIOD_S", 0.0)
    ids, prompt = eight_blocks()
    asked = []

    async def main():
        async with group_of_fakes() as group:
            journal, engine, resync = group.service._journal, group.engine, group.service._resync
            engine.on_blocks("device", dict.fromkeys([salted(str(number)) for number in range(500)], True))
            await until_async(lambda: sum(len(blocks.tiers) for blocks in journal.snapshot()) >= 50)
            whole = journal.snapshot

            def parts():
                for number, blocks in enumerate(whole()):
                    yield blocks
                    if number % 4 == 0:
                        engine.on_blocks("device", {ids[number // 4 % 8]: True})

            monkeypatch.setattr(journal, "snapshot", parts)
            monkeypatch.setattr(group.service, "_resync", lambda link: (asked.append(link), resync(link)))
            client = await connect(group)
            member = client.member
            await until_async(lambda: member._directory.found(prompt)[0, member.group] == 8)
            assert member._directory.num_holdings == 508
            await client.close()

    run(main())
    assert len(asked) == 1


def test_what_a_directory_had_no_room_for_is_asked_for_again(group_of_fakes):
    ids, prompt = eight_blocks()

    async def main():
        async with group_of_fakes() as group:
            router, directory = Router(), BlockDirectory(max_holdings=16)
            router.directory = directory
            other, member = router.join("other"), router.join("group")
            directory.change(other.group, "device", range(1, 17), ())
            client = GroupClient(group.endpoint, member=member)
            client.start()
            group.engine.on_blocks("device", dict.fromkeys(ids, True))
            await until_async(lambda: directory.dropped["device"] == 8)
            directory.change(other.group, "device", (), range(1, 17))
            await until_async(lambda: directory.found(prompt)[0, member.group] == 8)
            await client.close()

    run(main())


def test_a_placement_is_a_reservation_until_the_group_counts_it(group_of_fakes):
    async def main():
        async with group_of_fakes() as group:
            directory = GroupDirectory({"m": "m"})
            directory.update("m", [group.endpoint])
            await until_async(lambda: directory.models())
            (client,) = directory.clients("m")
            placement = directory.place("m", request(prompt=[1] * 1000, max_tokens=10**6))
            assert (client.member.prefill_tokens, client.member.requests) == (1000, 1)
            stream = await placement.submit()
            await anext(stream)
            assert client.member.prefill_tokens == 0
            await until_async(lambda: not client.member._open)
            assert client.member.requests == 1
            stream.close()
            await until_async(lambda: client.member.requests == 0)
            group.engine.submit = _refuse
            with pytest.raises(ContextLengthError):
                await directory.place("m", request()).submit()
            assert not client.member._open
            await directory.close()

    def _refuse(_):
        raise ContextLengthError("too long", param="prompt")

    run(main())
