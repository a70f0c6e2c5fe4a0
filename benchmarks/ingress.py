"""What each way into the cluster costs: our own sockets, Serve's HTTP proxy, direct ingress, HAProxy.

    python benchmarks/ingress.py --model skald

The group makes tokens at a fixed rate and computes nothing. Per way: median time to the first chunk of one stream at
a time; chunks and tokens per second over 32 streams (offered: 32 x rate; a gateway that lags puts several tokens into a
chunk). Client and servers share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.engine.blocks import Changes, Tier
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Event, Finished, FinishReason, Token
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

OPTIMISED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}
ENVIRONMENTS = {
    "own": {},
    "proxy": {},
    "direct": OPTIMISED,
    "haproxy": OPTIMISED | {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
PORTS = {"proxy": 18000, "direct": 30000, "haproxy": 18000}


class Synthetic:
    """An engine that computes nothing: `rate` steps a second, each with the next token of every request."""

    info = ModelInfo(name="synthetic", max_model_len=2**20, vocab_size=2**17, max_num_seqs=1024)
    failure = None

    def __init__(self, deliver: Callable[[Sequence[Event]], None], rate: float) -> None:
        self._deliver, self._period = deliver, 1 / rate
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self.heartbeat = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def shutdown(self) -> None:
        self._left.clear()

    def submit(self, request: Request) -> None:
        """The first token comes at once."""
        with self._lock:
            self._left[request.request_id] = (request.sampling.max_tokens or 16) - 1
        self._deliver([Token(request.request_id, 0, (65,))])

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None:
        with self._lock:
            self._left.pop(request_id, None)

    def stats(self) -> Stats:
        return Stats(running=len(self._left))

    @property
    def stats_at(self) -> float:
        return time.monotonic()

    def serve_blocks(self, host: str) -> tuple[str, str]:
        return "", ""

    def listen(self, on_blocks: Callable[[Tier, Changes], None]) -> None:
        """It keeps no blocks."""

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._period, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            self.heartbeat = time.monotonic()
            with self._lock:
                events = [event for name in [*self._left] for event in self._next(name)]
            if events:
                self._deliver(events)

    def _next(self, name: str) -> list[Event]:
        self._left[name] -= 1
        if self._left[name] >= 0:
            return [Token(name, 0, (65,))]
        del self._left[name]
        return [Finished(name, 0, "length")]


@dataclass
class MakeSynthetic:
    """For the rank's process."""

    rate: float

    def __call__(self, config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> Synthetic:
        return Synthetic(deliver, self.rate)


def serve_own(config: ClusterConfig, rate: float) -> str:
    """host:port of gateways as `kvasir serve` starts them."""
    from kvasir.cluster import app

    return app.run(config, make_engine=MakeSynthetic(rate)).http_address.removeprefix("http://")


def serve_mounted(config: ClusterConfig, rate: float, port: int) -> str:
    """host:port where Serve's own ingress carries the same HTTP application."""
    os.chdir(tempfile.mkdtemp())
    import ray
    from ray import serve

    from kvasir.cluster.application import COMMON, group_deployment
    from kvasir.cluster.gateway import create_app
    from kvasir.cluster.gateway_replica import Gateway
    from kvasir.cluster.rank_actor import RankSetup

    class Mounted(Gateway):
        """A Gateway without sockets."""

        async def _start_http(self) -> str:
            return ""

        async def check_health(self) -> None:
            pass

        def __serve_build_asgi_app__(self) -> object:
            return create_app(self._desk, self._config)

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    setup = RankSetup(MakeSynthetic(rate), host="127.0.0.1")
    group = group_deployment("synthetic", config.engines[0], 0, "info").bind(config.engines[0], "synthetic", 0, setup)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    mounted = serve.deployment(serve.ingress()(Mounted)).options(
        name="Gateway", max_ongoing_requests=4096, logging_config=quiet, ray_actor_options={"num_cpus": 0.1}, **COMMON
    )
    serve.run(mounted.bind(config, {}, group), name="kvasir", route_prefix="/")
    return f"127.0.0.1:{port}"


class Client:
    """One HTTP/1.1 connection that streams completions; as thin as possible, because it shares the cores."""

    def __init__(self, address: str, model: str) -> None:
        self._host, port = address.rsplit(":", 1)
        self._port = int(port)
        self._model = model

    async def stream(self, max_tokens: int) -> tuple[float, int]:
        """(seconds to the first chunk, chunks) of one completion."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        body = json.dumps({"model": self._model, "prompt": "hello", "max_tokens": max_tokens, "stream": True})
        lines = ["POST /v1/completions HTTP/1.1", f"Host: {self._host}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", body]
        began = time.perf_counter()
        writer.write("\r\n".join(lines).encode())
        first, chunks, rest = 0.0, 0, b""
        while data := await reader.read(2**16):
            rest += data
            chunks += rest.count(b"data: {")
            first = first or (chunks and time.perf_counter() - began)
            rest = rest[-6:]
        writer.close()
        if not chunks:
            raise KvasirError(f"no chunks came: {rest!r}")
        return first, chunks


async def measure(address: str, streams: int, tokens: int) -> dict[str, float]:
    """The two figures of one way in."""
    client = Client(address, "synthetic")
    await _until_up(client)
    firsts = [(await client.stream(2))[0] for _ in range(200)]
    began = time.perf_counter()
    counts = [chunks for _, chunks in await asyncio.gather(*(client.stream(tokens) for _ in range(streams)))]
    seconds = time.perf_counter() - began
    rates = {"chunks_s": sum(counts) / seconds, "tokens_s": streams * tokens / seconds}
    return {"ttft_ms": 1e3 * statistics.median(firsts), **rates}


async def _until_up(client: Client) -> None:
    deadline = time.monotonic() + 30
    while not await _is_up(client):
        if time.monotonic() > deadline:
            raise SystemExit("the server didn't come up")
        await asyncio.sleep(0.1)


async def _is_up(client: Client) -> bool:
    try:
        await client.stream(1)
    except (OSError, KvasirError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="skald", help="whose tokenizer is used; its weights aren't (default: skald)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500, help="per stream")
    parser.add_argument("--rate", type=float, default=1000, help="tokens a second that the group offers each stream")
    parser.add_argument("--ways", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    parser.add_argument("--child", choices=ENVIRONMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options)
        return
    print(f"{'way':10}{'ttft ms':>10}{'chunks/s':>12}{'tokens/s':>12}")
    for way in options.ways:
        command = [sys.executable, __file__, "--child", way, "--model", options.model]
        command += [f"--streams={options.streams}", f"--tokens={options.tokens}", f"--rate={options.rate}"]
        done = subprocess.run(command, env=os.environ | ENVIRONMENTS[way], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{way:10}failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:10}{found['ttft_ms']:10.2f}{found['chunks_s']:12.0f}{found['tokens_s']:12.0f}", flush=True)


def _child(options: argparse.Namespace) -> None:
    """Serve one way in, measure it."""
    engine = EngineConfig(model=options.model, served_model_name=("synthetic",))
    config = ClusterConfig(engines=(engine,), gateway=GatewayConfig(port=0, grpc_port=-1))
    if options.child == "own":
        address = serve_own(config, options.rate)
    else:
        address = serve_mounted(config, options.rate, PORTS[options.child])
    print(json.dumps(asyncio.run(measure(address, options.streams, options.tokens))))


if __name__ == "__main__":
    main()
