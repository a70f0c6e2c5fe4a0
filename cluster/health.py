"""Liveness from the groups' heartbeats, readiness from a token that was decoded; for HTTP and for grpc.health.v1."""

from __future__ import annotations

import asyncio
import uuid
from weakref import WeakKeyDictionary

from kvasir.cluster.desk import Desk
from kvasir.cluster.group_client import GroupClient
from kvasir.engine.errors import KvasirError, OverloadedError
from kvasir.engine.event import Failed
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams

PROBE_TIMEOUT_S = 5.0


class Health:
    """What is wrong with each model, if anything."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._decoded: WeakKeyDictionary[GroupClient, ModelInfo] = WeakKeyDictionary()
        self._probes: dict[str, asyncio.Task[str | None]] = {}

    def dead(self) -> dict[str, str]:
        """Model -> why no group of it is alive."""
        return self._desk.directory.missing()

    async def unready(self) -> dict[str, str]:
        """Model -> why requests for it can't be served now. A group proves once that it can decode."""
        if self._desk.draining:
            return {model.name: "draining" for model in self._desk.models}
        answers = {model.name: await self._ask(model.name) for model in self._desk.models}
        return {name: why for name, why in answers.items() if why}

    async def _ask(self, model: str) -> str | None:
        """Several who ask at once share one probe."""
        if model not in self._probes:
            task = self._probes[model] = asyncio.ensure_future(self._probe(model))
            task.add_done_callback(lambda _: self._probes.pop(model))
        return await asyncio.shield(self._probes[model])

    async def _probe(self, model: str) -> str | None:
        try:
            client = self._desk.directory.find(model)
            if client.info is not None and self._decoded.get(client) is not client.info:
                await asyncio.wait_for(_decode(client, client.info), PROBE_TIMEOUT_S)
                self._decoded[client] = client.info
        except OverloadedError:  # busy, so it decodes
            return None
        except KvasirError as error:
            return error.message
        except asyncio.TimeoutError:
            return f"no token within {PROBE_TIMEOUT_S:g} s"
        return None


async def _decode(client: GroupClient, info: ModelInfo) -> None:
    """One token, ahead of everybody. Raises when it doesn't come."""
    token = info.bos_token_id or 0
    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    request = Request(
        request_id=f"readiness-{uuid.uuid4().hex}", prompt_token_ids=(token,), sampling=sampling, priority=-(2**31)
    )
    stream = await client.submit(request)
    try:
        async for event in stream:
            if isinstance(event, Failed):
                raise OverloadedError(event.message) if event.code == "overloaded" else KvasirError(event.message)
    finally:
        stream.close()
