"""The command line as a user meets it: a real terminal, the bundled model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from kvasir.cluster import app
from kvasir.cluster import doctor as doctor_module
from kvasir.cluster.bench_serve import Stream, summary
from kvasir.cluster.cli import _cluster_config, _normal, _parser, main
from kvasir.cluster.compatibility import CompatibilityWarning

KVASIR = [sys.executable, "-m", "kvasir.cluster.cli"]


@dataclass(frozen=True)
class Ran:
    """A command at its end."""

    status: int
    out: str
    err: str


Kvasir = Callable[..., Ran]


@pytest.fixture
def kvasir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kvasir:
    """`kvasir("run", "skald", stdin="Hello")` in a folder of its own: a process would import torch for seconds each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert isinstance(end.value.code, int)
        return Ran(end.value.code, *capsys.readouterr())

    return run


def parsed(*arguments: str) -> object:
    return _cluster_config(_parser().parse_args(_normal(["serve", *arguments])))


# -- flags


def test_flags_win_over_yaml_over_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("max-num-seqs: 7\nblock_size: 8\n")
    monkeypatch.setenv("KVASIR_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("KVASIR_BLOCK_SIZE", "4")
    monkeypatch.setenv("KVASIR_SEED", "5")
    config = _cluster_config(_parser().parse_args(["serve", "--config", str(path), "--max-num-seqs", "9"]))
    engine = config.engines[0]
    assert (engine.max_num_seqs, engine.block_size, engine.seed) == (9, 8, 5)


@pytest.mark.parametrize(
    "arguments",
    [("skald-draft",), ("--model", "skald-draft"), ("--model=skald-draft",), ("skald-draft", "--model", "skald-draft")],
)
def test_the_model_is_named_either_way(arguments: tuple[str, ...]) -> None:
    assert parsed(*arguments).engines[0].model == "skald-draft"  # type: ignore[attr-defined]


def test_underscores_and_short_flags() -> None:
    config = parsed("--max_model_len=2k", "-tp", "2", "--no-enable-prefix-caching", "--api-key", "a", "--api-key", "b")
    assert config.engines[0].tensor_parallel_size == 2  # type: ignore[attr-defined]
    assert config.engines[0].max_model_len == 2000  # type: ignore[attr-defined]
    assert config.engines[0].enable_prefix_caching is False  # type: ignore[attr-defined]
    assert config.gateway.api_key == ("a", "b")  # type: ignore[attr-defined]


def test_other_names_of_switches_are_switches() -> None:
    with pytest.warns(CompatibilityWarning):
        config = parsed("--expert-parallel", "skald-draft", "--disable-fastapi-docs")
    assert config.engines[0].enable_expert_parallel is True  # type: ignore[attr-defined]
    assert config.engines[0].model == "skald-draft"  # type: ignore[attr-defined]
    assert config.gateway.enable_docs is False  # type: ignore[attr-defined]
    with pytest.warns(CompatibilityWarning):
        assert parsed("--no-expert-parallel").engines[0].enable_expert_parallel is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["serve", "--max-modle-len", "4"], 2, "did you mean --max-model-len"),
        (["serve", "--port", "many"], 1, "--port must be a whole number"),
        (["serve", "--groups", "prefil=1"], 1, "--groups: role must be one of both, prefill, decode"),
        (["serve", "--groups", "prefill=0"], 1, "--groups: count must be a whole number"),
        (["serve", "--groups", "prefill"], 1, "--groups must be prefill=1,decode=3"),
        (["serve", "--quantization", "awq"], 1, "--quantization: quantised weights are not supported yet"),
        (["serve", "-tp", "0"], 1, "--tensor-parallel-size must be at least 1"),
        (["serve", "a", "--model", "b"], 1, "differ"),
        (["serve", "--host", "0.0.0.0"], 1, "--insecure"),
        (["serve", "--config", "nothing.yaml"], 1, "nothing.yaml"),
        (["serve", "--max-model-len", "9999"], 1, "--max-model-len 9999 is above the model's own limit of 2048 tokens"),
        (["swerve"], 2, "there is no command 'swerve'; did you mean serve? See kvasir --help."),
        (["bench", "pull"], 2, "there is no command 'pull'. See kvasir bench --help."),
        ([], 2, "COMMAND. See kvasir --help."),
        (["batch", "a", "b", "c"], 2, "one argument too many: 'c'"),
        (["batch", "a", "b", "--quantization", "awq"], 1, "--quantization: quantised weights"),
        (["run", "-pp", "x"], 1, "--pipeline-parallel-size must be a whole number"),
        (["run", "--port", "1"], 2, "unknown flag --port"),
        (["serve", "--no-enable-chunked-prefill"], 1, "always cut into chunks"),
        (["bench", "engine", "--sequences", "0"], 2, "at least 1"),
        (["bench", "serve", "--concurrency", "0"], 2, "at least 1"),
        (["bench", "serve", "--rate", "nan"], 2, "above 0"),
        (["bench", "serve", "--url", "localhost:8000"], 1, "must begin with http://"),
        (["bench", "serve", "--url", "http://127.0.0.1:9"], 1, "is the server running"),
        (["batch", "missing.jsonl", "out.jsonl"], 1, "missing.jsonl"),
    ],
)
def test_errors_are_one_plain_block(arguments: list[str], status: int, says: str, kvasir: Kvasir) -> None:
    run = kvasir(*arguments)
    assert run.status == status
    assert says in run.err
    assert "Traceback" not in run.err


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    with subprocess.Popen([*KVASIR, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


BROKEN_ELSEWHERE = """
import os
from kvasir.cluster import cli
def broken():
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"x")
cli._check_home = broken
cli.main(["models"])
"""


@pytest.mark.parametrize("redirect", ["", ">/dev/null", ">&-"])
def test_another_pipe_that_breaks_is_told(tmp_path: Path, redirect: str) -> None:
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", BROKEN_ELSEWHERE]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert "BrokenPipeError" in run.stderr


def test_no_standard_output(tmp_path: Path) -> None:
    run = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *KVASIR, "models"], stderr=subprocess.PIPE, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, b"")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, kvasir: Kvasir) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    run = kvasir("models")
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith("kvasir: HOME isn't set")


def test_errors_of_a_process(tmp_path: Path) -> None:
    run = subprocess.run([*KVASIR, "serve", "nowhere/at/all"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert "nowhere/at/all" in run.stderr
    assert "Traceback" not in run.stderr


HELP = """
import sys
from kvasir.cluster.cli import main
for command in sys.argv[1:]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert not end.code, command
    assert not {"torch", "ray", "grpc", "transformers"} & {*sys.modules}, command
"""


def test_help_teaches_and_is_quick_to_load(tmp_path: Path) -> None:
    commands = ["", "serve", "run", "batch", "bench serve", "bench engine", "doctor"]
    run = subprocess.run([sys.executable, "-c", HELP, *commands], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for command in commands:
        assert f"usage: kvasir {command}".rstrip() in run.stdout


def test_help_shows_groups_and_defaults(kvasir: Kvasir) -> None:
    said = kvasir("serve", "--help").out
    assert "memory and batching:" in said
    assert "(default: 256)" in said
    assert "--swap-space" not in said


def test_version(kvasir: Kvasir) -> None:
    assert kvasir("--version").out.startswith("kvasir 0.")


# -- run


LIMIT_S = 300
"""A process starts in two seconds on an idle machine."""


class Terminal:
    """A `kvasir run` in a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.output = ""
        pid, self.fd = pty.fork()
        if pid == 0:  # pragma: no cover
            os.chdir(folder)
            os.environ |= {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm"}
            os.execv(sys.executable, [*KVASIR, "run", "--temperature", "0", *arguments])
        self.pid = pid
        self.expect(">>> ")

    def expect(self, text: str) -> str:
        """Wait for `text`; returns what was printed up to it, and forgets that."""
        limit = time.monotonic() + LIMIT_S
        while text not in self.output:
            assert time.monotonic() < limit, self.output
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self.fd, 4096).decode(errors="replace")
                except OSError as closed:
                    raise AssertionError(self.output) from closed
        before, _, self.output = self.output.partition(text)
        return before

    def say(self, text: str) -> str:
        """Type a line; returns what was printed before the next prompt."""
        os.write(self.fd, text.encode() + b"\n")
        self.expect(text.splitlines()[-1])
        return self.expect(">>> ")

    def end(self) -> int:
        limit = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 4096)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < limit


def test_a_conversation_in_the_terminal(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "skald", "--verbose")
    assert "85" in terminal.say("What is 47 + 38?")
    assert "/clear" in terminal.say("/help")
    assert "unknown command /nope" in terminal.say("/nope")
    assert "temperature must be a number" in terminal.say("/set temperature hot")
    assert "at least 0" in terminal.say("/set temperature -1")
    terminal.say("/set max_tokens 2")
    assert "answer 2 tokens" in terminal.say("Who are you?")
    terminal.say("/verbose")
    os.write(terminal.fd, b"word " * 3000 + b"\n")  # too long: says so, and the conversation goes on
    terminal.expect("exceed the context")
    terminal.expect(">>> ")
    terminal.say("/clear")
    terminal.say("/set max_tokens 30")
    assert "tokens]" not in terminal.say("Hello!")
    os.write(terminal.fd, b"/bye\n")
    assert terminal.end() == 0
    history = tmp_path / "state" / "kvasir" / "history"
    assert "47 + 38" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "skald")
    words = "river stone copper silver garden window bridge candle forest meadow " * 5
    said = ""
    for _ in range(30):  # on a busy machine an answer may be over before this process sees that it began
        os.write(terminal.fd, f"Repeat exactly: {words}bell\n".encode())
        terminal.expect("bell")
        terminal.expect("river stone")  # the answer has begun, and has far to go
        os.kill(terminal.pid, signal.SIGINT)
        said = terminal.expect(">>> ")
        if "[stopped]" in said:
            break
    before, stopped, _ = said.partition("[stopped]")
    assert stopped
    assert "bell" not in before
    os.write(terminal.fd, b"\x04")
    assert terminal.end() == 0


def test_one_prompt_and_a_pipe(kvasir: Kvasir) -> None:
    assert "85" in kvasir("run", "skald", "What is", "47 + 38?", "--temperature", "0").out
    assert "85" in kvasir("run", "--temperature", "0", stdin="What is 47 + 38?").out
    run = kvasir("run", "--temperature", "0")
    assert run.status == 1
    assert "no prompt" in run.err


@pytest.mark.parametrize("prompt", ["Who are you?", "Who are you, and why? " * 20], ids=["short", "no file's name"])
def test_a_prompt_where_the_model_belongs(kvasir: Kvasir, prompt: str) -> None:
    run = kvasir("run", prompt)
    assert run.status == 1
    assert f"MODEL comes before PROMPT: kvasir run skald '{prompt}'" in run.err


@pytest.mark.parametrize("model", ["~/my models", "nobody/nothing:my model.gguf"])
def test_a_model_whose_name_has_a_space(
    kvasir: Kvasir, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kvasir.engine.hub._Source.fetch", lambda *_: tmp_path / "my models")
    run = kvasir("run", model)
    assert run.status == 1
    assert ("it is empty" if model.startswith("~") else "no GGUF file matches 'my model.gguf'") in run.err


# -- batch, bench, doctor


def test_batch_resumes(tmp_path: Path, kvasir: Kvasir) -> None:
    lines = [
        {"prompt": "Hello", "max_tokens": 3, "id": "a"},
        {"messages": [{"role": "user", "content": "Hi"}], "id": "b"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = kvasir("batch", "in.jsonl", "out.jsonl", "--quiet")
    assert first.status == 0, first.err
    assert "2 answered, 0 failed, 0 were done before" in first.err
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"prompt": "x", "temperature": "hot", "id": "c"}\n')
    second = kvasir("batch", "in.jsonl", "out.jsonl", "--quiet")
    assert "0 answered, 1 failed, 2 were done before" in second.err
    assert second.status == 1
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_bench_engine(tmp_path: Path, kvasir: Kvasir) -> None:
    flags = ["--sequences", "1", "3", "--input-len", "8", "--output-len", "4", "--out", "out.json"]
    run = kvasir("bench", "engine", *flags)
    assert run.status == 0, run.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["sequences"] for row in rows] == [1, 3]
    assert all(row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0 for row in rows)


@pytest.fixture
def server() -> Iterator[str]:
    """A server that streams two tokens per request, and refuses every fifth."""
    count = 0

    async def completions(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count % 5 == 0:
            return web.json_response({"error": {"message": "full"}}, status=429)
        reply = web.StreamResponse()
        await reply.prepare(request)
        for text in ("a", "b"):
            await reply.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
        usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
        await reply.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return reply

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/completions", completions), web.get("/v1/models", models)])
    loop, ports = asyncio.new_event_loop(), []
    ready = threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(60)
    yield f"http://127.0.0.1:{ports[0]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.mark.parametrize("flags", [("--concurrency", "2"), ("--rate", "200")])
def test_bench_serve(flags: tuple[str, ...], server: str, tmp_path: Path, kvasir: Kvasir) -> None:
    run = kvasir("bench", "serve", "--url", server, "--num-requests", "10", "--out", "out.json", *flags)
    assert run.status == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["requests"], report["failed"]) == (10, 2)
    assert "429" in report["errors"][0]
    assert "time to first token" in run.out


def test_bench_serve_reads_prompts(server: str, tmp_path: Path, kvasir: Kvasir) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"turns": ["b", "c"]}\nplain\n')
    run = kvasir("bench", "serve", "--url", server, "--num-requests", "4", "--prompts", "p.jsonl")
    assert run.status == 0, run.err
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad").write_text("{nothing\n")
    for name, says in (("empty", "holds no prompt"), ("bad", "no JSON with `prompt`")):
        run = kvasir("bench", "serve", "--url", server, "--prompts", name)
        assert run.status == 1
        assert says in run.err
        assert "Traceback" not in run.err


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A server that can't keep up must not make its own numbers look better by slowing the load down."""
    streams = [Stream(started=0.0, first=3.0, ended=4.0, output_tokens=2)]
    assert summary(streams, 4.0)["latency_ms"]["time to first token"]["p50"] == 3000


def test_doctor(kvasir: Kvasir) -> None:
    run = kvasir("doctor", "--json")
    findings = json.loads(run.out)
    assert {"python", "cpu", "models", "memory", "threads", "allocator"} <= {finding["about"] for finding in findings}
    assert run.status == (1 if any(finding["state"] == "wrong" for finding in findings) else 0)
    lines = [re.fullmatch(r"cpu: (.+): \w+ \(.+\)", f["text"]) for f in findings if f["about"] == "backend"]
    ops = [name for line in lines if line for name in line[1].split(", ")]
    assert {"attention", "turn_and_write", "draw", "route", "linear of bfloat16"} <= set(ops)
    assert len(ops) == len(set(ops))


def test_doctor_says_how_threads_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND"):
        monkeypatch.delenv(name, raising=False)
    threads, malloc = doctor_module._threads()
    assert threads.state == "ok"
    assert "evenly" in threads.text
    assert malloc.text.startswith(("glibc's", "jemalloc", "tcmalloc", "mimalloc", "the system's"))
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    threads, _ = doctor_module._threads()
    assert threads.state == "note"
    assert threads.text.startswith("OMP_PROC_BIND=true leaves ")


def test_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_module, "bundled_models", dict)
    monkeypatch.setattr(doctor_module, "LOOKS", (doctor_module._models,))
    assert doctor_module.doctor(as_json=False) == 1
    assert "skald is missing" in capsys.readouterr().out


def test_an_interrupt_while_it_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a script began it in the background, which ignores SIGINT at first."""

    def starting(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(app, "run", starting)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["serve"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
