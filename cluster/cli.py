"""`kvasir`: serve, run, batch, bench, models, show, plan, doctor. What a command needs is imported when it runs: --help is
quick."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvasir.cluster import flags
from kvasir.cluster.compatibility import SPELLINGS, CompatibilityWarning
from kvasir.cluster.options import from_environment, options, parse_engine, parse_spec, read_yaml
from kvasir.cluster.role_options import counts_of
from kvasir.engine.errors import ConfigError, KvasirError

if TYPE_CHECKING:
    from kvasir.cluster.config import ClusterConfig
    from kvasir.engine.config import EngineConfig

EXAMPLES = {
    "generate": ("/v1/chat/completions", '"messages": [{"role": "user", "content": "Who are you?"}]'),
    "embed": ("/v1/embeddings", '"input": "Who are you?"'),
    "score": ("/v1/rerank", '"query": "Who are you?", "documents": ["I am a reranker.", "It rains."]'),
    "classify": ("/v1/classify", '"input": "Who are you?"'),
}
"""What a model can do, best first -> a path, and the fields of a request."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors for users are one plain block on stderr, exit code 1 (2: wrong flags)."""
    warnings.showwarning = _show_warning
    args, unknown = _parser().parse_known_args(_normal(sys.argv[1:] if arguments is None else arguments))
    if unknown:
        args.parser.unknown(unknown[0])
    try:
        _check_home()
        status = args.command(args) or 0
        print(end="", flush=True)  # unlike sys.stdout.flush() also where standard output was closed before the start
    except KvasirError as error:
        _die(error.message)
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


def _unread() -> bool:
    """Nobody reads standard output any more: `| head` has what it wanted."""
    if sys.stdout is None:  # closed before the start
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))  # of errors it tells unasked


def _check_home() -> None:
    """What is compiled, fetched and stored is kept there, by Ray and the hub's client, too."""
    try:
        Path.home()
    except RuntimeError:
        raise ConfigError(
            "HOME isn't set, and this user has no home folder; set it to a folder that can be written"
        ) from None


def _die(message: str) -> NoReturn:
    print(f"kvasir: {message}", file=sys.stderr)
    sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    if issubclass(category, CompatibilityWarning):
        print(f"kvasir: {message}", file=sys.stderr)


def _version() -> str:
    try:
        return version("kvasir")
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return "(not installed)"


# -- commands


def serve(args: argparse.Namespace) -> int:
    """Start, say where, wait for a signal, drain."""
    # a script's `kvasir serve &` begins with SIGINT ignored: one that came before we wait for it would be lost
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    config = _cluster_config(args)
    from kvasir.cluster.auth import check_exposure

    check_exposure(config.gateway, os.environ)
    names = ", ".join((engine.served_model_name or (engine.model,))[0] for engine in config.models)
    print(f"kvasir {_version()}: loading {names} ...", flush=True)
    from kvasir.cluster.app import run as run_cluster

    running = run_cluster(config, address=args.address)
    running.catch_signals()
    others = {"gRPC": running.grpc_address, "Ollama": running.ollama_address}
    _banner(config, running.http_address, others, time.monotonic() - started)
    running.wait()
    print("kvasir: draining ...", flush=True)
    running.drain_and_stop()
    return 0


def _banner(config: ClusterConfig, url: str, others: Mapping[str, str | None], seconds: float) -> None:
    engine = config.engines[0]
    guarded = bool(config.gateway.api_key or config.gateway.api_key_file)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if guarded else ""
    more = "".join(f", {name} {address}" for name, address in others.items() if address)
    print(f"ready after {seconds:.1f} s: HTTP {url}{more}")
    model = (engine.served_model_name or (engine.model,))[0]
    path, fields = EXAMPLES[next(task for task in EXAMPLES if task in _tasks(engine))]
    print(
        f"curl {url}{path} -H 'Content-Type: application/json'{key} -d '\n  {{\"model\": \"{model}\", {fields}}}'",
        flush=True,
    )


def _tasks(engine: EngineConfig) -> Sequence[str]:
    """What the model can do, as its files say; one that runs by transformers' code generates."""
    from kvasir.engine.arch import load_spec
    from kvasir.engine.model_files import ModelFiles
    from kvasir.engine.pooling import pooling_of, tasks_of

    try:
        files = ModelFiles(engine)
        spec = load_spec(files.config)
    except ConfigError:
        return ("generate",)
    return tasks_of(spec, pooling_of(files.config, spec, files.path))


def chat(args: argparse.Namespace) -> int:
    """Talk to a model in the terminal."""
    from kvasir.cluster.run_chat import run_chat

    return run_chat(_engine_config(args), args)


def batch(args: argparse.Namespace) -> int:
    """Answer a file of requests."""
    from kvasir.cluster.batch_file import run_batch

    tally = run_batch(args.input, args.output, _engine_config(args), progress=not args.quiet)
    again = "; the same command tries them again" if tally.failed else ""
    counts = f"{tally.succeeded} answered, {tally.failed} failed, {tally.skipped} were done before"
    print(counts + again, file=sys.stderr)
    return 1 if tally.failed else 0


def bench_serve(args: argparse.Namespace) -> int:
    """Load a running server."""
    from kvasir.cluster.bench_serve import bench_serve as run_bench

    return run_bench(args)


def bench_engine(args: argparse.Namespace) -> int:
    """Time the engine in this process."""
    from kvasir.cluster.bench_engine import bench_engine as run_bench

    return run_bench(_engine_config(args), args)


def models(args: argparse.Namespace) -> int:
    """List what is supported."""
    from kvasir.cluster.model_commands import models as list_models

    return list_models(as_json=args.json)


def show(args: argparse.Namespace) -> int:
    """Print a model's facts."""
    from kvasir.cluster.model_commands import show as show_model

    return show_model(_engine_config(args), batch=args.batch, template=args.template, as_json=args.json)


def plan(args: argparse.Namespace) -> int:
    """Say how a model would lie on GPUs."""
    from kvasir.cluster.model_commands import plan as plan_model

    return plan_model(
        _engine_config(args), args.gpu, args.gpus, args.gpus_per_node, streams=args.streams, as_json=args.json
    )


def doctor(args: argparse.Namespace) -> int:
    """Look at this machine."""
    from kvasir.cluster.doctor import doctor as run_doctor

    return run_doctor(as_json=args.json, cluster=args.cluster)


# -- flags


def _parser() -> argparse.ArgumentParser:
    parser = flags.Parser(prog="kvasir", description="Serves large language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kvasir {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    flags.serve_flags(_command(commands, "serve", serve, "serve models over HTTP and gRPC", "[MODEL] [flags]"))
    flags.run_flags(_command(commands, "run", chat, "chat with a model in the terminal", "[MODEL] [PROMPT] [flags]"))
    flags.batch_flags(
        _command(
            commands, "batch", batch, "answer a JSONL file of requests; resumes where it stopped", "IN OUT [flags]"
        )
    )
    bench = commands.add_parser("bench", help="measure a running server, or the engine", allow_abbrev=False)
    kinds = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    flags.bench_serve_flags(
        _command(kinds, "serve", bench_serve, "load any OpenAI-compatible server and report latencies")
    )
    flags.bench_engine_flags(
        _command(kinds, "engine", bench_engine, "tokens per second of the engine in this process", "[MODEL] [flags]")
    )
    models_parser = _command(commands, "models", models, "list the architectures and models that run here")
    models_parser.add_argument("--json", action="store_true", help="print the list as JSON")
    text = "print a model's facts and the memory that it takes, without reading its weights"
    flags.show_flags(_command(commands, "show", show, text, "[MODEL] [flags]"))
    text = "how a model would lie on GPUs: memory, context, speed and traffic of every layout, and which to pick"
    flags.plan_flags(_command(commands, "plan", plan, text, "MODEL --gpus N --gpu NAME [flags]"))
    doctor_parser = _command(commands, "doctor", doctor, "what this machine can do, and what is wrong with it")
    text = "also sum tensors between every two nodes of the Ray cluster at this address (default: auto), and name the culprit"
    doctor_parser.add_argument("--cluster", metavar="ADDRESS", nargs="?", const="auto", help=text)
    doctor_parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _command(commands: Any, name: str, run: Any, text: str, usage: str = "[flags]") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", usage=f"%(prog)s {usage}", allow_abbrev=False
    )
    parser.set_defaults(command=run, parser=parser)
    return parser


def _normal(arguments: Sequence[str]) -> list[str]:
    """--max_model_len as --max-model-len."""
    found = []
    for argument in arguments:
        head, equals, value = argument.partition("=")
        found.append((head.replace("_", "-") if head.startswith("--") else head) + equals + value)
    return found


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Options named on the command line."""
    names = {*options(), *SPELLINGS}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.positional_model:
        if given.get("model", args.positional_model) != args.positional_model:
            raise ConfigError(
                f"MODEL {args.positional_model!r} and --model {given['model']!r} differ; give one", param="model"
            )
        given["model"] = args.positional_model
    return given


def _cluster_config(args: argparse.Namespace) -> ClusterConfig:
    """Flags over YAML over environment over defaults."""
    spec = from_environment(os.environ)
    given = _given(args)
    if args.config:
        spec |= read_yaml(args.config)
    if "models" in spec:
        spec.pop("model", None)
    return parse_spec(spec | given | ({"groups": counts_of(args.groups, "--groups")} if args.groups else {}))


def _engine_config(args: argparse.Namespace) -> Any:
    environment = {name: value for name, value in from_environment(os.environ).items() if options()[name].of_engine}
    return parse_engine(environment | _given(args))


if __name__ == "__main__":
    main()
