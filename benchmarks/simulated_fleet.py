"""A real gateway before simulated groups, in one process, until Ctrl-C: HTTP, router, directory and the binary streams are those
of `kvasir serve`; groups take as long for a step as `--step` says, and always say the same letter.

    .venv/bin/python benchmarks/simulated_fleet.py --groups 16 --port 8000
    .venv/bin/python benchmarks/simulated_fleet.py --model skald --step 0.003 4e-5 2e-4 1e-8   # as replay.py --fit says
    .venv/bin/python benchmarks/simulated_fleet.py --prefill 4 --model skald   # roles, and peers
    .venv/bin/python benchmarks/replay.py TRACE --url http://127.0.0.1:8000 --limit 200

Without --model, prompts are token ids, and a stream says nothing before its end, for its tokens have no text: times to the
first token and between tokens want a --model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator

import uvicorn

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.desk import Desk
from kvasir.cluster.gateway import close_app, create_app
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.http_protocol import server_config
from kvasir.cluster.metrics import Metrics
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.simulated_engine import SimulatedEngine
from kvasir.cluster.simulated_group import Shape, StepTime
from kvasir.cluster.sockets import bound_socket
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig, Role

POLL_S, WATCH_S = 0.01, 0.5


@contextlib.asynccontextmanager
async def fleet(
    model: ServedModel, groups: int, shape: Shape, prefill: int
) -> AsyncIterator[tuple[Desk, list[SimulatedEngine]]]:
    """Groups that a gateway's desk has reached; `prefill` of them compute prompts for the others."""
    engines, services = list[SimulatedEngine](), list[GroupService]()
    directory, tracing = GroupDirectory(dict.fromkeys(model.names, model.name)), Tracing()
    try:
        endpoints = []
        for number in range(groups):
            role: Role = "both" if not prefill else "prefill" if number < prefill else "decode"
            services.append(GroupService(tracing))
            engines.append(SimulatedEngine(shape, services[-1].deliver, role))
            engines[-1].start()
            endpoints.append(await services[-1].start(engines[-1], "127.0.0.1"))
            services[-1].set_role(role)
        directory.update(model.name, endpoints)
        while not all(client.alive for client in directory.clients(model.name)):
            await asyncio.sleep(POLL_S)
        yield Desk([model], directory, Metrics(), tracing), engines
    finally:
        await directory.close()
        for service in services:
            await service.stop()
        for engine in engines:
            engine.shutdown()


async def serve(model: ServedModel, groups: int, shape: Shape, prefill: int, port: int) -> None:
    """Until it is interrupted. Raises what a group's loop raised."""
    config = GatewayConfig(state_path=":memory:")
    async with fleet(model, groups, shape, prefill) as (desk, engines):
        app = create_app(desk, config)
        server = uvicorn.Server(server_config(app, config, desk.metrics.refused))
        sock = bound_socket("127.0.0.1", port, shared=False)
        running = asyncio.create_task(server.serve([sock]))
        while not (server.started or running.done()):
            await asyncio.sleep(POLL_S)
        print(f"{groups} simulated groups: http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
        try:
            while not (await asyncio.wait([running], timeout=WATCH_S))[0]:
                if (failure := next((one.failure for one in engines if one.failure), None)) is not None:
                    server.should_exit = True
                    await running
                    raise failure
        finally:
            await close_app(app)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--model", help="whose tokenizer and chat template the gateway has")
    parser.add_argument("--block-size", type=int, default=Shape().block_size)
    parser.add_argument(
        "--kv-tokens", type=int, default=Shape().num_blocks * Shape().block_size, help="a group's cache"
    )
    parser.add_argument("--budget", type=int, default=Shape().budget, help="tokens of a step")
    parser.add_argument("--fetch", action="store_true", help="groups fetch blocks from each other")
    parser.add_argument("--link", type=float, default=Shape().fetch_bytes_per_s / 1e9, help="of each group, GB/s")
    parser.add_argument("--token-bytes", type=float, default=0.33e6, help="keys and values of a token")
    parser.add_argument("--prefill", type=int, default=0, help="so many groups compute prompts for the others")
    parser.add_argument("--prefill-budget", type=int, default=Shape().prefill_budget, help="tokens of their steps")
    parser.add_argument("--step", type=float, nargs=4, metavar="S", help="base, prefill, stream, context; see StepTime")
    args = parser.parse_args()
    if not 0 <= args.prefill < args.groups:
        parser.error(f"--prefill is {args.prefill}: of --groups {args.groups} one at least has to decode")
    names = ("base_s", "prefill_s", "stream_s", "context_s")
    shape = Shape(
        step_time=StepTime(**dict(zip(names, args.step, strict=True))) if args.step else StepTime(),
        block_size=args.block_size,
        num_blocks=args.kv_tokens // args.block_size,
        budget=args.budget,
        prefill_budget=args.prefill_budget,
        token_bytes=args.token_bytes if args.fetch or args.prefill else 0.0,
        fetch_bytes_per_s=args.link * 1e9,
    )
    model = (
        ServedModel.load(EngineConfig(model=args.model))
        if args.model
        else ServedModel(names=("simulated",), tokenizer=None)
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(model, args.groups, shape, args.prefill, args.port))


if __name__ == "__main__":
    main()
