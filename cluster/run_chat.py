"""`kvasir run`: a conversation in the terminal, with the engine in this process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError, ConfigError, KvasirError
from kvasir.engine.request import SamplingParams

if TYPE_CHECKING:
    from kvasir.engine import AsyncLLM

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens")
HELP = '''/system TEXT      set the system message        /set NAME VALUE   change a sampling parameter
/clear            forget the conversation       /verbose          timings on or off
/bye              leave (or Ctrl-D)             """               begin and end a message of several lines
Ctrl-C stops an answer.'''


def run_chat(config: EngineConfig, args: argparse.Namespace) -> int:
    """Answer PROMPT or what a pipe brings, or talk until the user leaves."""
    from kvasir.engine import AsyncLLM

    here = os.path.exists(os.path.expanduser(config.model))  # Path's raises OSError for what is too long to be a name
    if " " in config.model.partition(":")[0] and not args.prompt and not here:
        example = f"kvasir run skald {shlex.quote(config.model)}"
        raise ConfigError(f"{config.model!r} is no model; MODEL comes before PROMPT: {example}", param="model")
    options = dataclasses.asdict(config)
    llm = AsyncLLM(options.pop("model"), **options)
    try:
        llm.engine.info.need("generate")
        conversation = Conversation(llm, args.system, _sampling(llm, args), verbose=args.verbose)
        with contextlib.closing(conversation):
            prompt = " ".join(args.prompt)
            if not sys.stdin.isatty():
                prompt = "\n".join(part for part in (prompt, sys.stdin.read().strip()) if part)
                if not prompt:
                    raise ClientError("no prompt: pass it as PROMPT or through a pipe")
            if prompt:
                return 0 if conversation.ask(prompt) else 130
            return _talk(conversation)
    finally:
        llm.shutdown()


def _sampling(llm: AsyncLLM, args: argparse.Namespace) -> dict[str, Any]:
    """The model's defaults, then the flags; without max_tokens up to the end of the context."""
    given = {name: getattr(args, f"sampling_{name}") for name in SAMPLING}
    chosen = {"max_tokens": None} | llm.default_sampling | {n: v for n, v in given.items() if v is not None}
    SamplingParams(**chosen)
    return chosen


class Conversation:
    """Messages so far, and how to go on."""

    def __init__(self, llm: AsyncLLM, system: str | None, sampling: dict[str, Any], *, verbose: bool) -> None:
        self.llm, self.system, self.sampling, self.verbose = llm, system, sampling, verbose
        self.messages: list[dict[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._count = 0

    def close(self) -> None:
        self._loop.close()

    def ask(self, text: str) -> bool:
        """Print the answer as it comes; Ctrl-C ends it (False). What was said stays in the conversation."""
        said = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        task = self._loop.create_task(self._answer())
        try:
            with self._ctrl_c_cancels(task):
                self._loop.run_until_complete(task)
        except asyncio.CancelledError:
            print(" [stopped]")
            return False
        except KvasirError:
            del self.messages[said:]
            raise
        return True

    @contextlib.contextmanager
    def _ctrl_c_cancels(self, task: asyncio.Task[None]) -> Iterator[None]:
        """A KeyboardInterrupt inside the task would end it unseen, and come out of it once more: cancel instead."""
        try:
            self._loop.add_signal_handler(signal.SIGINT, task.cancel)
        except NotImplementedError:  # Windows
            yield
            return
        try:
            yield
        finally:
            self._loop.remove_signal_handler(signal.SIGINT)

    async def _answer(self) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.llm.render_chat(system + self.messages)
        answer = {"role": "assistant", "content": ""}
        started, first, tokens = time.perf_counter(), 0.0, 0
        self._count += 1
        try:
            async for output in self.llm.generate(prompt, SamplingParams(**self.sampling), f"run-{self._count}"):
                first = first or time.perf_counter()
                (best,) = output.outputs
                print(best.text[len(answer["content"]) :], end="", flush=True)
                answer["content"], tokens = best.text, len(best.token_ids)
        finally:
            self.messages.append(answer)
        print()
        if self.verbose:
            _print_timings(len(prompt), tokens, first - started, time.perf_counter() - first)


def _print_timings(prompt: int, tokens: int, first_s: float, rest_s: float) -> None:
    rate = f", {(tokens - 1) / rest_s:.1f} tok/s" if tokens > 1 else ""
    print(f"[prompt {prompt} tokens, first token after {1000 * first_s:.0f} ms ({prompt / first_s:.0f} tok/s); "
          f"answer {tokens} tokens{rate}]", file=sys.stderr)  # fmt: skip


def _talk(conversation: Conversation) -> int:
    """Read and answer until /bye or the end of input."""
    with _history():
        print("/help for help, /bye to leave")
        while (text := _read()) is not None:
            try:
                if text.startswith("/"):
                    if _command(conversation, text):
                        return 0
                elif text:
                    conversation.ask(text)
            except KvasirError as error:
                print(error.message, file=sys.stderr)
            except KeyboardInterrupt:  # between an answer and the next prompt
                print()
    return 0


def _read() -> str | None:
    """A message; several lines between triple quotes; None at the end of input. Ctrl-C empties the line."""
    try:
        text = input(">>> ")
        if not text.startswith('"""'):
            return text.strip()
        lines = [text[3:]]
        while not lines[-1].rstrip().endswith('"""') or (len(lines) == 1 and not lines[0]):
            lines.append(input("... "))
        return "\n".join(lines).rstrip().removesuffix('"""').strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _command(conversation: Conversation, line: str) -> bool:
    """Carry out a /command; True: leave."""
    name, _, rest = line[1:].partition(" ")
    commands: dict[str, Callable[[], None]] = {
        "help": lambda: print(HELP),
        "clear": conversation.messages.clear,
        "system": lambda: setattr(conversation, "system", rest or None),
        "verbose": lambda: setattr(conversation, "verbose", not conversation.verbose),
        "set": lambda: _set(conversation, rest),
    }
    if name in ("bye", "exit", "quit"):
        return True
    if name not in commands:
        raise ClientError(f"unknown command /{name}; /help lists them")
    commands[name]()
    return False


def _set(conversation: Conversation, text: str) -> None:
    name, _, value = text.partition(" ")
    name = name.replace("-", "_")
    if name not in SAMPLING or not value:
        raise ClientError(f"/set takes NAME VALUE; names are {', '.join(SAMPLING)}")
    try:
        number = int(value) if name in ("top_k", "seed", "max_tokens") else float(value)
    except ValueError:
        raise ClientError(f"{name} must be a number, got {value!r}") from None
    changed = conversation.sampling | {name: number}
    SamplingParams(**changed)
    conversation.sampling = changed


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and what was typed in earlier conversations (KVASIR_NOHISTORY=1: not kept)."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "kvasir" / "history"
    keep = not os.environ.get("KVASIR_NOHISTORY")
    if keep and path.exists():
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
    try:
        yield
    finally:
        if keep:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.set_history_length(1000)
                readline.write_history_file(path)
                path.chmod(0o600)
