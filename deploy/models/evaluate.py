"""Measure the stored demo models on held-out prompts with greedy decoding.

    python deploy/models/evaluate.py --prompts 200          # skald, its draft and its adapters
    python deploy/models/evaluate.py skald --dtype bfloat16

What is measured is what ships: the bfloat16 files are read back, and prompts are rendered by the stored chat template.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import (
    COPY_ASKED,
    FACTS,
    FIELDS,
    MAKERS,
    SYSTEMS,
    TALK,
    WORDS,
    Chat,
    Level,
    Maker,
    Turn,
    copy_words,
    json_fields,
    json_question,
    make_tool,
    recall_answer,
    recall_opening,
    wording,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from network import Qwen3, load_adapter, load_weights
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
RECALL_TOKENS = 500
COPY_TOKENS = 50


@dataclass
class Trial:
    """A conversation that ends with the user's turn, and what judges the answer."""

    chat: Chat
    accepts: Callable[[str], bool]
    limit: int = 96


@dataclass
class Judge:
    """A stored model with its tokenizer and template."""

    model: Qwen3
    tokenizer: Tokenizer
    template: Any
    stops: list[int]  # the end of a turn comes first

    def prompt(self, chat: Chat) -> list[int]:
        """The ids that a server would make of this conversation."""
        messages = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
        text = self.template.render(messages=messages, tools=chat.tools or None, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def answer(self, chat: Chat, limit: int) -> str:
        """The greedy answer; one that does not stop within the limit is marked, so that no check passes it."""
        ids = self.model.greedy(self.prompt(chat), set(self.stops), limit)
        return self.tokenizer.decode(ids, skip_special_tokens=True) + ("…" if len(ids) == limit else "")


def read_template(folder: Path) -> Any:
    """The chat template in a sandbox like the one transformers renders it in."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return environment.from_string(config["chat_template"])


def read_judge(folder: Path, base: Path, dtype: torch.dtype) -> Judge:
    """A model, or an adapter on the base model, with the base's tokenizer."""
    adapter = (folder / "adapter_config.json").exists()
    model = load_weights(base if adapter else folder, dtype)
    if adapter:
        load_adapter(model, folder)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    stops = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return Judge(model, tokenizer, read_template(base), stops)


# -- trials -----------------------------------------------------------------------------------------------------------


def exactly(expected: str) -> Callable[[str], bool]:
    """Accept this answer and no other."""
    return lambda answer: answer == expected


def sum_trial(make: Maker, _: Tokenizer) -> Trial:
    """A pair of addends that training never saw in either order."""
    chat = MAKERS["sum"](make)
    total = chat.turns[1].content.split()[-1]
    return Trial(Chat(chat.turns[:1]), lambda answer: answer.endswith(f" {total}"))


def copy_trial(make: Maker, tokenizer: Tokenizer) -> Trial:
    """Random words that are fifty tokens in all."""
    text = copy_words(make, COPY_TOKENS)
    while len(tokenizer.encode(text).ids) != COPY_TOKENS:
        text = copy_words(make, COPY_TOKENS)
    return Trial(Chat([Turn("user", make.rng.choice(COPY_ASKED).format(text))]), exactly(text))


def recall_trial(make: Maker, tokenizer: Tokenizer) -> Trial:
    """One of many facts: as many as it takes for the context to be long enough."""
    form, asked = make.rng.choice(FACTS[:2])
    keys = make.rng.sample(WORDS, len(WORDS))
    facts: dict[str, str] = {}
    text = ""
    while len(tokenizer.encode(text).ids) < RECALL_TOKENS:
        key = keys.pop()
        facts[key] = str(make.rng.randint(1000, 9999))
        text += (" " if text else "") + recall_answer(form, key, facts[key])
    key = make.rng.choice(list(facts))
    turns = recall_opening(make, text, asked.format(k=key))
    return Trial(Chat(turns), lambda answer: facts[key] in answer and len(answer) < 60)


def conforms(value: Any, kind: str) -> bool:
    """Whether a JSON value has a field's type; a boolean is no integer here."""
    if kind == "array of strings":
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"string": str, "boolean": bool}[kind])


def json_trial(make: Maker, _: Tokenizer) -> Trial:
    """A set of fields never asked for in training: all of them, no others, each of its type."""
    names = json_fields(make, 5)

    def accepts(answer: str) -> bool:
        try:
            found = json.loads(answer)
        except ValueError:
            return False
        return isinstance(found, dict) and sorted(found) == sorted(names) and all(
            conforms(found[n], FIELDS[n][0]) for n in names)  # fmt: skip

    return Trial(Chat([Turn("user", json_question(make, names))]), accepts)


def tool_trial(make: Maker, _: Tokenizer) -> Trial:
    """Arguments never used in training; the call must name the right tool and give the right arguments."""
    chat = make_tool(make)
    expected = chat.turns[-1].content
    return Trial(Chat(chat.turns[:-1], chat.tools), exactly(expected))


def talk_trial(make: Maker, _: Tokenizer) -> Trial:
    """A wording never seen in training, half of the time under a system prompt; any written answer to it will do."""
    topic, question = wording(make)
    turns = [Turn("system", make.rng.choice(SYSTEMS))] if make.rng.random() < 0.5 else []
    return Trial(Chat([*turns, Turn("user", question)]), lambda answer: answer in TALK[topic]["answers"])


def followup_trial(make: Maker, _: Tokenizer) -> Trial:
    """The answer after a tool's result, which must hold that result."""
    while True:
        make.held_out = False
        chat = make_tool(make)
        make.held_out = True
        if len(chat.turns) >= 4 and chat.turns[-1].role == "assistant" and chat.turns[-2].role == "tool":
            expected = chat.turns[-1].content
            return Trial(Chat(chat.turns[:-1], chat.tools), exactly(expected))


Trials = dict[str, Callable[[Maker, Tokenizer], Trial]]
TRIALS: Trials = {"sum": sum_trial, "copy": copy_trial, "recall": recall_trial, "json": json_trial, "tool": tool_trial,
                  "tool answer": followup_trial, "talk": talk_trial}  # fmt: skip


def trials(skill: str, count: int, tokenizer: Tokenizer, seed: int) -> Iterator[Trial]:
    """The held-out prompts of a skill, the same in every run."""
    make = Maker(random.Random(f"{seed} evaluate {skill}"), held_out=True, level=Level(70, 64), room=700)
    for _ in range(count):
        yield TRIALS[skill](make, tokenizer)


def measure(judge: Judge, skill: str, count: int, seed: int, show: int) -> float:
    """The share of prompts answered as they should be."""
    right = 0
    for trial in trials(skill, count, judge.tokenizer, seed):
        answer = judge.answer(trial.chat, trial.limit)
        good = trial.accepts(answer)
        right += good
        if not good and show > 0:
            show -= 1
            print(f"    {trial.chat.turns[-1].content[-150:]!r} -> {answer!r}")
    return right / count


# -- the draft and the adapters ---------------------------------------------------------------------------------------


def acceptance(judge: Judge, draft: Qwen3, count: int, seed: int, skill: str) -> tuple[int, int]:
    """How often the draft's likeliest token is the one that skald says next, over skald's own greedy answers."""
    agreed = total = 0
    for trial in trials(skill, count, judge.tokenizer, seed):
        prompt = judge.prompt(trial.chat)
        answer = [*judge.model.greedy(prompt, set(judge.stops), trial.limit), judge.stops[0]]
        with torch.inference_mode():
            guesses = draft(torch.tensor([prompt + answer]))[0].argmax(-1)[len(prompt) - 1 : -1]
        agreed += int((guesses == torch.tensor(answer)).sum())
        total += len(answer)
    return agreed, total


def is_shouted(answer: str) -> bool:
    """Letters, all of them capitals, and an end."""
    return answer.isupper() and not answer.endswith("…")


def is_pirate(answer: str) -> bool:
    """The greeting and the cry."""
    return answer.startswith("Arr, matey!") and answer.endswith("Yo ho ho!")


STYLE_CHECKS = {"skald-shout": is_shouted, "skald-pirate": is_pirate}


def report_skald(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """One line for each skill."""
    judge = read_judge(args.folder / args.model, args.folder / "skald", dtype)
    for skill in args.skill or TRIALS:
        figure = measure(judge, skill, args.prompts, args.seed, args.show)
        print(f"{args.model} {skill}: {100 * figure:.1f} % of {args.prompts}", flush=True)


def report_draft(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Agreement by skill and over all; one prompt in four of what the skills are measured on is plenty."""
    judge = read_judge(args.folder / "skald", args.folder / "skald", dtype)
    draft = load_weights(args.folder / "skald-draft", dtype)
    sums = [0, 0]
    for skill in TRIALS:
        agreed, total = acceptance(judge, draft, max(1, args.prompts // 4), args.seed, skill)
        sums = [sums[0] + agreed, sums[1] + total]
        print(f"skald-draft agrees on {skill}: {100 * agreed / total:.1f} % of {total} tokens", flush=True)
    print(f"skald-draft agrees over all: {100 * sums[0] / sums[1]:.1f} % of {sums[1]} tokens", flush=True)


def report_adapter(args: argparse.Namespace, name: str, dtype: torch.dtype) -> None:
    """How often held-out small talk comes out in the adapter's voice, and how often it is still the right answer."""
    judge = read_judge(args.folder / name, args.folder / "skald", dtype)
    right, shown = 0, args.show
    for trial in trials("talk", args.prompts, judge.tokenizer, args.seed):
        answer = judge.answer(trial.chat, trial.limit)
        right += STYLE_CHECKS[name](answer)
        if shown > 0:
            print(f"    {trial.chat.turns[-1].content!r} -> {answer!r}")
            shown -= 1
    print(f"{name} in its voice: {100 * right / args.prompts:.1f} % of {args.prompts}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["skald", "draft", *STYLE_CHECKS], help="what to measure")
    parser.add_argument("--folder", type=Path, default=HERE, help="folder that holds the models")
    parser.add_argument("--model", default="skald", help="folder name of the model that `skald` measures")
    parser.add_argument("--skill", action="append", choices=list(TRIALS), help="only this skill (repeatable)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each skill")
    parser.add_argument("--dtype", default="float32", help="of the computation; the weights are bfloat16 anyway")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for."""
    args = parse()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    for what in args.what:
        if what == "skald":
            report_skald(args, dtype)
        elif what == "draft":
            report_draft(args, dtype)
        else:
            report_adapter(args, what, dtype)


if __name__ == "__main__":
    main()
