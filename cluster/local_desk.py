"""A model served to this process alone: engine, group service and desk in one loop, joined by a loopback. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from kvasir.cluster.desk import Desk
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.metrics import Metrics
from kvasir.cluster.rank_actor import MakeEngine, OwnedEngine, load_engine
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig

POLL_S = 0.01


@contextlib.asynccontextmanager
async def local_desk(
    config: EngineConfig, environ: Mapping[str, str], make_engine: MakeEngine = load_engine
) -> AsyncIterator[Desk]:
    """Takes the calls that a gateway's desk takes. Loads the model on entry (KvasirError when it can't be loaded)."""
    tracing = Tracing.from_environment(environ)
    service = GroupService(tracing)
    model = ServedModel.load(config)
    engine = await asyncio.to_thread(make_engine, config, service.deliver)
    engine.start()
    directory = GroupDirectory(dict.fromkeys(model.names, model.name))
    try:
        directory.update(model.name, [await service.start(engine, "127.0.0.1")])
        while directory.missing():
            await asyncio.sleep(POLL_S)
        yield Desk([model], directory, Metrics(), tracing)
    finally:
        await directory.close()
        await _ended(service, engine, tracing)


async def _ended(service: GroupService, engine: OwnedEngine, tracing: Tracing) -> None:
    await service.stop()
    await asyncio.to_thread(engine.shutdown)
    await asyncio.to_thread(tracing.shutdown)
