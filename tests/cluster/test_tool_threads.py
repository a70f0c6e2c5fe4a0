"""A pathological schema among a request's tools costs its sender, and the others next to nothing."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from kvasir.cluster import tool_threads
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_threads import MAX_SLOW, ToolThreads
from kvasir.cluster.tool_use import HeldCalls, tool_use
from kvasir.engine import argument_schema, loose_schema
from kvasir.engine.argument_schema import SlowSchemaError
from kvasir.engine.errors import OverloadedError
from kvasir.engine.request import StructuredOutput
from kvasir.engine.structural_tag import tag_grammar

FORM = TOOL_FORMATS["hermes"]
HELD = HeldCalls(FORM, StructuredOutput(regex="a"))


class Light:
    """A request's tools, in the place of ToolUse."""

    def held(self, taught, instead, limit_s):
        return HELD


class Heavy(Light):
    """They take as long as they may, or until `enough`."""

    def __init__(self):
        self.enough, self.given = threading.Event(), []

    def held(self, taught, instead, limit_s):
        self.given.append(threading.current_thread().name)
        if self.enough.wait(limit_s):
            return HELD
        raise SlowSchemaError("too slow", param="tools")


def test_light_ones_pass_by_heavy_ones():
    async def run():
        threads, heavy = ToolThreads(), Heavy()
        waiting = [asyncio.ensure_future(threads.held(heavy, FORM, None)) for _ in range(MAX_SLOW)]
        while "tools-slow_0" not in heavy.given or len(heavy.given) <= MAX_SLOW:
            await asyncio.sleep(0.01)
        assert await threads.held(Light(), FORM, None) is HELD  # while one is at work, and the others wait for it
        assert not any(task.done() for task in waiting)
        with pytest.raises(OverloadedError, match=f"the tools of {MAX_SLOW} requests wait.* ask again later") as caught:
            await threads.held(heavy, FORM, None)
        assert caught.value.retry_after_s
        heavy.enough.set()
        assert await asyncio.gather(*waiting) == [HELD] * MAX_SLOW
        assert await threads.held(heavy, FORM, None) is HELD

    asyncio.run(asyncio.wait_for(run(), 120))


def test_who_leaves_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(tool_threads, "QUICK_S", 0.0)

    async def run():
        threads, heavy, last = ToolThreads(), Heavy(), Heavy()
        tasks = [asyncio.ensure_future(threads.held(heavy, FORM, None)) for _ in range(2)]
        while "tools-slow_0" not in heavy.given:
            await asyncio.sleep(0.01)
        left = asyncio.ensure_future(threads.held(last, FORM, None))
        while not last.given:
            await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        heavy.enough.set()
        await asyncio.gather(*tasks)
        assert await threads.held(Light(), FORM, None) is HELD
        assert last.given == ["tools_0"]

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.fixture
def slow_library(monkeypatch):
    """Each look of the grammar library at a schema takes a second of this clock."""
    now, looked = [1000.0], []
    find = loose_schema._found

    def found(text):
        now[0] += 1.0
        looked.append(text)
        return find(text)

    found.__wrapped__ = found
    monkeypatch.setattr(loose_schema, "_found", found)
    monkeypatch.setattr(argument_schema.time, "monotonic", lambda: now[0])
    return looked


PATTERNS = {"properties": {f"a{n}": {"type": "string", "pattern": f"(?=a)b{n}"} for n in range(100)}}


def tools(schema):
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "pythonic"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_time_holds_inside_of_one_schema(slow_library, name, choice):
    with pytest.raises(SlowSchemaError, match="take more than 10 s"):
        tool_use(tools(PATTERNS), choice).held(TOOL_FORMATS[name], None, 10.0)
    assert len(slow_library) <= 12


def test_the_time_holds_where_the_grammar_is_compiled(slow_library):
    content = {"type": "json_schema", "json_schema": PATTERNS, "lenient": True}
    with pytest.raises(SlowSchemaError, match="take more than 10 s"):
        tag_grammar({"format": content}, {})
    assert len(slow_library) <= 12


def test_its_sender_is_told_over_http(thinker, monkeypatch):
    ask = {"messages": [{"role": "user", "content": "?"}], "tools": tools({"properties": {}})}
    monkeypatch.setattr(tool_threads, "QUICK_S", -1.0)
    assert httpx.post(thinker.url + "/v1/chat/completions", json=ask).status_code == 200
    monkeypatch.setattr(tool_threads, "LIMIT_S", -1.0)
    reply = httpx.post(thinker.url + "/v1/chat/completions", json=ask)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
    assert "make them smaller, or send fewer tools" in reply.json()["error"]["message"]
