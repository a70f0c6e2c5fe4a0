"""The flags of every command: argparse's parser, and what each command adds to it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from kvasir.cluster.compatibility import FALSE, SHORT, SPELLINGS, TRUE, Always, Renamed
from kvasir.cluster.options import GROUPS, Option, options


class Parser(argparse.ArgumentParser):
    """Names the nearest flag instead of only refusing an unknown one."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(2, f"kvasir: {message}{end} See {self.prog} --help.\n")

    def unknown(self, argument: str) -> NoReturn:
        """Refuse what no flag or place was found for."""
        wrong = argument.split("=")[0]
        if not wrong.startswith("-"):
            self.error(f"one argument too many: {wrong!r}")
        self.error(f"unknown flag {wrong}{_near(wrong, self._option_string_actions)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"there is no command {value!r}{_near(value, action.choices)}")
        super()._check_value(action, value)


def _near(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def serve_flags(parser: argparse.ArgumentParser) -> None:
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


def plan_flags(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--gpus", type=_count, metavar="N", default=1, help="how many (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=_count,
        metavar="N",
        default=8,
        help="those that a fast link joins; others exchange at 400 Gbit/s (default: 8)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="H100-80GB",
        help="which; cpu: the cores of this machine, measured now (default: H100-80GB)",
    )
    parser.add_argument("--streams", type=_count, metavar="N", default=64, help="streams at once (default: 64)")
    parser.add_argument("--json", action="store_true", help="print the layouts as JSON")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def run_flags(parser: argparse.ArgumentParser) -> None:
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


def batch_flags(parser: argparse.ArgumentParser) -> None:
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


def bench_serve_flags(parser: argparse.ArgumentParser) -> None:
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


def bench_engine_flags(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--sequences", type=_count, metavar="N", nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument("--input-len", type=_count, metavar="N", default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=_count, metavar="N", default=32, help="output tokens (default: 32)")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    _add_options(parser, [option for option in options().values() if option.of_engine])


def show_flags(parser: argparse.ArgumentParser) -> None:
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
        switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if _is_switch(name) else {}
        flags = (*_short(_flag(name)), _flag(name))
        parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **switch)


def _is_switch(spelling: str) -> bool:
    """Whether it takes no value, since it is another name of an option that takes none, or is on or off for good."""
    meaning = SPELLINGS[spelling]
    if isinstance(meaning, Renamed):
        return options()[meaning.to].kind is bool
    return isinstance(meaning, Always) and meaning.values in (TRUE, FALSE)


def _short(flag: str) -> list[str]:
    return [letters for letters, long in SHORT.items() if long == flag]


def _shape(option: Option) -> dict[str, Any]:
    """How argparse is to read an option; values are checked by the option itself, with YAML's."""
    text = option.help.replace(f" Flag: {option.flag}.", "").replace("%", "%%")
    default = option.default
    if default not in (None, ()) and "default" not in text and option.kind is not bool:
        text += f" (default: {default})"
    if option.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text + f" (default: {'on' if default else 'off'})"}
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.name.rsplit("_", 1)[-1].upper()
    return {"help": text, "metavar": metavar} | ({"action": "append"} if option.is_list else {})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
