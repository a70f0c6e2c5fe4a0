"""What a streamed token costs the gateway: CPU time of its process, by the kernel's account, over a fixed number of tokens.

    python benchmarks/front_end.py --streams 32 --tokens 400 --rate 200

Three processes: a group whose engine computes nothing and says a text at a fixed rate, the gateway (HTTP and gRPC servers,
tokenizer, router, everything but Ray), and a client that only counts. Neither the client's time nor the group's counts; all of
the gateway's threads do. Steps come slowly enough that nearly each token is a chunk of its own; a gateway that lags would put
several into one and look cheaper, so chunks per token are printed beside. `us` holds everything, `begin` is what of it a
request costs beside its tokens, spread over them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

MODEL = "skald"
TEXT = "Kvasir was the wisest of them all, and he went far and wide over the world to teach men what he knew of it. "
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
GRPC = "kvasir.v1.Inference/Chat"
KSERVE = "inference.GRPCInferenceService/ModelStreamInfer"
MESSAGES = [{"role": "user", "content": "Tell me of Kvasir."}]
COMMON = {"model": MODEL, "stream": True, "ignore_eos": True, "temperature": 0}
RESUMABLE = "kvasir-resumable"
KINDS = {
    "completions": ("/v1/completions", COMMON | {"prompt": "Once upon a time"}),
    "completions, token ids": ("/v1/completions", COMMON | {"prompt": "Once", "return_token_ids": True}),
    "chat": ("/v1/chat/completions", COMMON | {"messages": MESSAGES}),
    "chat with a tool": ("/v1/chat/completions", COMMON | {"messages": MESSAGES, "tools": [TOOL]}),
    "chat with stop strings": ("/v1/chat/completions", COMMON | {"messages": MESSAGES, "stop": ["Ragnarok", "\n\n\n"]}),
    "chat, token ids": ("/v1/chat/completions", COMMON | {"messages": MESSAGES, "return_token_ids": True}),
    "chat, log probabilities": (
        "/v1/chat/completions",
        COMMON | {"messages": MESSAGES, "top_logprobs": 2, "logprobs": True},
    ),
    "chat, resumable": ("/v1/chat/completions", COMMON | {"messages": MESSAGES, RESUMABLE: True}),
    "responses": ("/v1/responses", COMMON | {"input": "Tell me of Kvasir.", "store": False}),
    "Ollama": ("/api/chat", {"model": MODEL, "messages": MESSAGES, "options": {"ignore_eos": True}}),
    "Anthropic": ("/v1/messages", {"model": MODEL, "messages": MESSAGES, "stream": True}),
    "gRPC": (GRPC, {}),
    "KServe's gRPC": (KSERVE, {}),
}


class Reciter:
    """An engine that computes nothing: `rate` steps a second, each with the next token of every request."""

    failure = None

    def __init__(self, deliver: Callable[[Sequence[object]], None], rate: float) -> None:
        from kvasir.engine.config import EngineConfig
        from kvasir.engine.info import ModelInfo
        from kvasir.engine.model_files import ModelFiles

        tokenizer = ModelFiles(EngineConfig(model=MODEL)).tokenizer()
        assert tokenizer is not None
        self._ids = tokenizer.encode(TEXT)
        self.info = ModelInfo(name=MODEL, max_model_len=2**20, vocab_size=tokenizer.vocab_size, max_num_seqs=1024)
        self._deliver, self._period = deliver, 1 / rate
        self._left: dict[str, int] = {}
        self._scored: set[str] = set()
        self._step = 0
        self._lock = threading.Lock()
        self.heartbeat = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request) -> None:  # type: ignore[no-untyped-def]
        with self._lock:
            self._left[request.request_id] = request.sampling.max_tokens or 16
            if request.sampling.logprobs is not None:
                self._scored.add(request.request_id)

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None:
        with self._lock:
            self._left.pop(request_id, None)

    def stats(self):  # type: ignore[no-untyped-def]
        from kvasir.engine.scheduler import Stats

        return Stats(running=len(self._left))

    @property
    def stats_at(self) -> float:
        return time.monotonic()

    def listen(self, on_blocks: object) -> None:
        """It keeps no blocks."""

    def _run(self) -> None:
        from kvasir.engine.event import Finished, Token, TokenLogprob

        due = time.monotonic()
        while True:
            due = max(due + self._period, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            self.heartbeat = time.monotonic()
            events: list[object] = []
            with self._lock:
                self._step += 1
                token = self._ids[self._step % len(self._ids)]
                for name in [*self._left]:
                    top = (
                        [TokenLogprob(-0.5, 1, ((token, -0.5), (self._ids[0], -1.5)))] if name in self._scored else None
                    )
                    events.append(Token(name, 0, (token,), top))
                    self._left[name] -= 1
                    if not self._left[name]:
                        del self._left[name]
                        events.append(Finished(name, 0, "length"))
            if events:
                self._deliver(events)


async def run_group(rate: float) -> None:
    """A group's process: prints its endpoint, serves until its input ends."""
    from kvasir.cluster.group_service import GroupService
    from kvasir.cluster.telemetry import Tracing

    service = GroupService(Tracing())
    endpoint = await service.start(Reciter(service.deliver, rate), "127.0.0.1")  # type: ignore[arg-type]
    print(json.dumps(asdict(endpoint)), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def run_gateway() -> None:
    """A gateway's process, as a replica of it serves: reads the group's endpoint, prints its ports, serves until its input
    ends."""
    import uvicorn

    from kvasir.cluster.config import GatewayConfig
    from kvasir.cluster.desk import Desk
    from kvasir.cluster.gateway import create_app, create_grpc_server
    from kvasir.cluster.group_directory import GroupDirectory
    from kvasir.cluster.http_protocol import server_config
    from kvasir.cluster.metrics import Metrics
    from kvasir.cluster.served_model import ServedModel
    from kvasir.cluster.sockets import bound_socket
    from kvasir.cluster.telemetry import Tracing
    from kvasir.cluster.wire import Endpoint
    from kvasir.engine.config import EngineConfig

    directory = GroupDirectory({MODEL: MODEL})
    directory.update(MODEL, [Endpoint(**json.loads(await asyncio.to_thread(sys.stdin.readline)))])
    while directory.missing():
        await asyncio.sleep(0.01)
    desk = Desk([ServedModel.load(EngineConfig(model=MODEL))], directory, Metrics(), Tracing())
    config = GatewayConfig(state_path=":memory:")
    app = create_app(desk, config)
    sock = bound_socket("127.0.0.1", 0, shared=False)
    server = uvicorn.Server(server_config(app, config, desk.metrics.refused))
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    grpc_server = create_grpc_server(desk, config, app.state.shelf)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    gc.freeze()  # as a replica does
    print(json.dumps({"http": sock.getsockname()[1], "grpc": grpc_port}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await grpc_server.stop(None)
    await serving


async def stream(ports: dict[str, int], path: str, body: dict[str, object]) -> int:
    """One streamed answer: how many chunks came."""
    if path in (GRPC, KSERVE):
        return await stream_grpc(ports["grpc"], path, body)
    reader, writer = await asyncio.open_connection("127.0.0.1", ports["http"])
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    if body.get(RESUMABLE):
        body = {name: value for name, value in body.items() if name != RESUMABLE}
        lines.append(f"{RESUMABLE}: true")
    payload = json.dumps(body).encode()
    writer.write("\r\n".join([*lines, f"Content-Length: {len(payload)}", "", ""]).encode() + payload)
    chunks = 0
    mark = b'"done":false' if path.startswith("/api") else b"data: {"
    while data := await reader.read(2**16):
        chunks += data.count(mark)
    writer.close()
    if not chunks:
        raise SystemExit(f"no chunk came from {path}")
    return chunks


async def stream_grpc(port: int, path: str, body: dict[str, object]) -> int:
    import grpc

    from kvasir.proto import inference_pb2 as pb
    from kvasir.proto import open_inference_pb2 as kserve
    from kvasir.proto.inference_pb2_grpc import InferenceStub
    from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        if path == GRPC:
            sampling = pb.Sampling(max_tokens=body["max_tokens"], temperature=0, ignore_eos=True)  # type: ignore[arg-type]
            request = pb.ChatRequest(model=MODEL, messages=[pb.Message(**MESSAGES[0])], sampling=sampling)
            return sum([1 async for _ in InferenceStub(channel).Chat(request)])
        asked = kserve.ModelInferRequest(model_name=MODEL)
        text = asked.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        text.contents.bytes_contents.append(b"Once upon a time")
        asked.parameters["max_tokens"].int64_param = body["max_tokens"]  # type: ignore[assignment]
        for name in ("stream", "ignore_eos"):
            asked.parameters[name].bool_param = True
        return sum([1 async for _ in GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([asked]))])


def cpu_us(pid: int) -> float:
    """CPU time of a process, its own and the kernel's for it, in microseconds."""
    clock = ~pid << 3 | 2  # as clock_getcpuclockid(3) makes it: /proc/PID/stat has ticks of 10 ms
    return time.clock_gettime_ns(clock) / 1000


async def measure(ports: dict[str, int], pid: int, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Of one kind of request: microseconds of the gateway's CPU per token, chunks and wall time per token of a stream."""
    path, body = KINDS[kind]

    async def run(tokens: int) -> tuple[float, int]:
        """(microseconds of all streams, chunks)."""
        limit = {"max_output_tokens" if path.endswith("responses") else "max_tokens": tokens}
        if path.startswith("/api"):
            limit = {"options": {"num_predict": tokens, "ignore_eos": True}}
        before = cpu_us(pid)
        counts = await asyncio.gather(*(stream(ports, path, body | limit) for _ in range(options.streams)))
        return cpu_us(pid) - before, sum(counts)

    await run(2)
    costs: list[float] = []
    begins: list[float] = []
    chunks, seconds = 0, 0.0
    for _ in range(options.repeat):
        begins.append((await run(2))[0])
        began = time.perf_counter()
        cost, found = await run(options.tokens)
        seconds += time.perf_counter() - began
        costs.append(cost)
        chunks += found
    count = options.streams * options.tokens
    return {
        "us": min(costs) / count,
        "worst_us": max(costs) / count,
        "begin_us": min(begins) / count,
        "chunks": chunks / options.repeat / count,
        "tok_s": options.repeat * count / seconds,
    }


def child(role: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", role, "--rate", str(options.rate)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="streams at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream (default: 400)")
    parser.add_argument("--rate", type=float, default=200.0, help="steps per second (default: 200)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements; the cheapest counts (default: 3)")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS], metavar="KIND")
    parser.add_argument("--role", choices=["group", "gateway"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.role:
        import uvloop  # as Ray's actors do

        uvloop.run(run_group(options.rate) if options.role == "group" else run_gateway())
        return
    with child("group", options) as group, child("gateway", options) as gateway:
        assert group.stdout is not None
        assert gateway.stdin is not None
        assert gateway.stdout is not None
        assert group.stdin is not None
        gateway.stdin.write(group.stdout.readline())
        gateway.stdin.flush()
        ports = json.loads(gateway.stdout.readline())
        print(f"{'gateway, per token':24}{'CPU us':>8}{'worst':>8}{'begin':>8}{'chunks':>8}{'tok/s':>8}")
        for kind in options.kinds:
            found = asyncio.run(measure(ports, gateway.pid, kind, options))
            costs = "".join(f"{found[name]:8.1f}" for name in ("us", "worst_us", "begin_us"))
            print(f"{kind:24}{costs}{found['chunks']:8.2f}{found['tok_s']:8.0f}", flush=True)
        gateway.stdin.close()
        group.stdin.close()


if __name__ == "__main__":
    main()
