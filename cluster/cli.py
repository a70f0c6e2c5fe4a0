"""`kvasir`: serve, run, batch, bench, models, show, plan, doctor. What a command needs is imported when it runs: --help is
quick."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvasir.cluster.compatibility import SHORT, SPELLINGS, SWITCHES, CompatibilityWarning
from kvasir.cluster.options import GROUPS, Option, from_environment, options, parse_engine, parse_spec, read_yaml
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
        sys.exit(args.command(args) or 0)
    except KvasirError as error:
        _die(error.message)
    except KeyboardInterrupt:
        sys.exit(130)


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
    started = time.monotonic()
    config = _cluster_config(args)
    from kvasir.cluster.auth import check_exposure

    check_exposure(config.gateway, os.environ)
    names = ", ".join((engine.served_model_name or (engine.model,))[0] for engine in config.models)
    print(f"kvasir {_version()}: loading {names} ...", flush=True)
    from kvasir.cluster.app import run as run_cluster

    running = run_cluster(config, address=args.address)
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

    return plan_model(_engine_config(args), args.gpu, args.gpus, streams=args.streams, as_json=args.json)


def doctor(args: argparse.Namespace) -> int:
    """Look at this machine."""
    from kvasir.cluster.doctor import doctor as run_doctor

    return run_doctor(as_json=args.json, cluster=args.cluster)


# -- flags


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag instead of only refusing an unknown one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvasir: {message}\n")

    def unknown(self, argument: str) -> NoReturn:
        """Refuse what no flag or place was found for."""
        wrong = argument.split("=")[0]
        if not wrong.startswith("-"):
            self.error(f"one argument too many: {wrong!r}. See {self.prog} --help.")
        near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        self.error(f"unknown flag {wrong}{hint} See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvasir", description="Serves large language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kvasir {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _serve_parser(_command(commands, "serve", serve, "serve models over HTTP and gRPC", "[MODEL] [flags]"))
    _run_parser(_command(commands, "run", chat, "chat with a model in the terminal", "[MODEL] [PROMPT] [flags]"))
    _batch_parser(
        _command(
            commands, "batch", batch, "answer a JSONL file of requests; resumes where it stopped", "IN OUT [flags]"
        )
    )
    bench = commands.add_parser("bench", help="measure a running server, or the engine", allow_abbrev=False)
    kinds = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    _bench_serve_parser(_command(kinds, "serve", bench_serve, "load any OpenAI-compatible server and report latencies"))
    _bench_engine_parser(
        _command(kinds, "engine", bench_engine, "tokens per second of the engine in this process", "[MODEL] [flags]")
    )
    models_parser = _command(commands, "models", models, "list the architectures and models that run here")
    models_parser.add_argument("--json", action="store_true", help="print the list as JSON")
    text = "print a model's facts and the memory that it takes, without reading its weights"
    _show_parser(_command(commands, "show", show, text, "[MODEL] [flags]"))
    text = "how a model would lie on GPUs: memory, context, speed and traffic of every layout, and which to pick"
    _plan_parser(_command(commands, "plan", plan, text, "MODEL --gpus N --gpu NAME [flags]"))
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


def _serve_parser(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--config", type=Path, help="YAML file of these options (dashes or underscores); flags win over it"
    )
    parser.add_argument("--address", help="Ray cluster to run in (default: RAY_ADDRESS, else a Ray of our own)")
    parser.add_argument(
        "--groups",
        metavar="ROLE=COUNT",
        help="copies of the model by what they are for (prefill=1,decode=3); each role is prefill, decode or both",
    )
    _add_options(parser, list(options().values()))


def _plan_parser(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--gpus", type=_count, metavar="N", default=1, help="how many (default: 1)")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="H100-80GB",
        help="which; cpu: the cores of this machine, measured now (default: H100-80GB)",
    )
    parser.add_argument("--streams", type=_count, metavar="N", default=64, help="streams at once (default: 64)")
    parser.add_argument("--json", action="store_true", help="print the layouts as JSON")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def _run_parser(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="answer this and end (default: chat; or read a pipe)"
    )
    parser.add_argument("--system", help="system message")
    parser.add_argument("--verbose", action="store_true", help="print timings after each answer")
    sampling = parser.add_argument_group("sampling (default: the model's own)")
    for flag, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float),
                       ("repetition-penalty", float), ("seed", int), ("max-tokens", int)):  # fmt: skip
        sampling.add_argument(f"--{flag}", type=kind, dest=f"sampling_{flag.replace('-', '_')}", metavar="N")
    _add_options(parser, [o for o in options().values() if o.of_engine and o.name != "seed"])


def _batch_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="IN", help="one JSON object per line: a prompt, messages, or OpenAI's batch lines"
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="one answer per line; lines answered there are skipped, those that failed are tried again",
    )
    parser.add_argument(
        "--model",
        dest="positional_model",
        metavar="MODEL",
        help="folder, GGUF file, hub id or bundled name (default: skald)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def _bench_serve_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    parser.add_argument("--model", help="model to ask for (default: the first one served)")
    parser.add_argument(
        "--api-key", default=os.environ.get("KVASIR_API_KEY"), help="key to send (default: KVASIR_API_KEY)"
    )
    parser.add_argument("--num-requests", type=_count, metavar="N", default=100, help="default: 100")
    parser.add_argument(
        "--rate",
        type=_rate,
        metavar="PER_SECOND",
        help="requests per second, at random moments (Poisson); default: as --concurrency allows",
    )
    parser.add_argument(
        "--concurrency", type=_count, metavar="N", help="most requests at once (default: 32; with --rate no limit)"
    )
    parser.add_argument(
        "--input-len", type=_count, metavar="N", default=64, help="words of a random prompt (default: 64)"
    )
    parser.add_argument("--output-len", type=_count, metavar="N", default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--prompts", type=Path, help="file of prompts instead: one per line, or JSONL with `prompt`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")


def _bench_engine_parser(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--sequences", type=_count, metavar="N", nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument("--input-len", type=_count, metavar="N", default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=_count, metavar="N", default=32, help="output tokens (default: 32)")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def _show_parser(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--batch", type=_count, metavar="N", default=1, help="sequences of --max-model-len tokens at once (default: 1)"
    )
    parser.add_argument("--template", action="store_true", help="print the chat template, and nothing else")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def _count(text: str) -> int:
    """For argparse: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    """For argparse: a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional_model",
        nargs="?",
        metavar="MODEL",
        help="folder, GGUF file, hub id or bundled name (default: skald)",
    )


def _add_options(parser: argparse.ArgumentParser, chosen: list[Option]) -> None:
    """Flags in the groups of --help. Only what was given ends up in the namespace, so that YAML can stand behind it."""
    left = {option.name: option for option in chosen}
    for heading, names in [*GROUPS.items(), ("other", tuple(left))]:
        members = [left.pop(name) for name in names if name in left]
        group = parser.add_argument_group(heading) if members else None
        for option in members:
            if option.name == "model" and any(action.dest == "positional_model" for action in parser._actions):
                if not parser._option_string_actions.get("--model"):
                    parser.add_argument("--model", dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
                continue
            assert group is not None
            flags = (*_short(option.flag), option.flag)
            group.add_argument(*flags, dest=option.name, default=argparse.SUPPRESS, **_shape(option))
    for name in SPELLINGS:
        switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if name in SWITCHES else {}
        flags = (*_short(_flag(name)), _flag(name))
        parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **switch)


def _short(flag: str) -> list[str]:
    return [letters for letters, long in SHORT.items() if long == flag]


def _shape(option: Option) -> dict[str, Any]:
    """How argparse is to read an option; values are checked by the option itself, with YAML's."""
    text = option.help.replace("%", "%%")
    default = option.default
    if default not in (None, ()) and "default" not in text and option.kind is not bool:
        text += f" (default: {default})"
    if option.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text + f" (default: {'on' if default else 'off'})"}
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.name.rsplit("_", 1)[-1].upper()
    return {"help": text, "metavar": metavar} | ({"action": "append"} if option.is_list else {})


def _normal(arguments: Sequence[str]) -> list[str]:
    """--max_model_len as --max-model-len."""
    found = []
    for argument in arguments:
        head, equals, value = argument.partition("=")
        found.append((head.replace("_", "-") if head.startswith("--") else head) + equals + value)
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
