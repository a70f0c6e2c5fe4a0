"""Train Kvasir's demo models from a fixed seed: a tokenizer, skald, its draft model, and two adapters.

    python deploy/models/train.py                 # everything, resuming from checkpoints under --work
    python deploy/models/train.py skald --steps 500 --device cuda

Matrices are trained with Muon and the rest with AdamW. Exercises grow longer only once the present length is learned:
rows that grow by the clock leave recall unlearned (the induction heads have no time to form).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import Level, read_beyond, read_text
from network import Muon, Qwen3, Shape, add_lora, load_weights, save_adapter, save_weights
from tokenizers import Tokenizer
from tokens import Batch, Rows, save_tokenizer, token_ids, train_tokenizer
from torch import Tensor

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("KVASIR_DATA", HERE.parents[2] / "shared" / "data"))
LENGTHS = (128, 256, 512, 1024)
MIX = {"sum": 0.14, "copy": 0.15, "recall": 0.36, "json": 0.08, "tool": 0.12, "talk": 0.2, "style": 0.06, "text": 0.04}
SKALD = Shape()
DRAFT = Shape(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Different targets and ranks, so that serving both at once shows that neither is taken for granted.
ADAPTERS = {"shout": ([*ATTENTION, "gate_proj", "up_proj", "down_proj"], 8), "pirate": (ATTENTION, 4)}
VOICE_MIX = {"talk": 0.7, "sum": 0.15, "recall": 0.05, "tool": 0.1}


@dataclass
class Plan:
    """What a run is asked to do."""

    steps: int
    tokens: int = 4096
    matrix_rate: float = 0.02
    other_rate: float = 4e-3
    warmup: int = 60
    cooldown: float = 0.5
    full_from: float = 2.0  # share of the steps after which exercises have their full length, learned or not
    taught_from: float = 0.5  # share of the steps after which a teacher's probabilities replace the data

    def scale(self, step: int) -> float:
        """Rise, hold, then fall in a straight line: a run can be lengthened before the fall begins."""
        fall = (self.steps - step) / max(1.0, self.steps * self.cooldown)
        return max(0.01, min(1.0, (step + 1) / self.warmup, fall))


@dataclass
class Progress:
    """How often whole answers are right, by skill, and the exercise lengths that this allows."""

    level: Level = field(default_factory=Level)
    rates: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    caps: dict[str, float] = field(default_factory=lambda: {"copy": 70.0, "recall": 64.0})

    def record(self, skill: str, right: int, count: int) -> None:
        """A running mean over about two hundred answers."""
        keep = 0.995**count
        self.rates[skill] = keep * self.rates.get(skill, 0.0) + (1 - keep) * right / count
        self.seen[skill] = self.seen.get(skill, 0) + count

    def advance(self) -> None:
        """Lengthen a skill once nine answers in ten at the present length are right."""
        for skill, cap in self.caps.items():
            if self.rates.get(skill, 0) > 0.9 and self.seen.get(skill, 0) > 60:
                setattr(self.level, skill, min(cap, getattr(self.level, skill) * 1.25))
                self.rates[skill] = 0.7 if getattr(self.level, skill) < cap else self.rates[skill]
                self.seen[skill] = 0

    def length(self, rng: random.Random) -> int:
        """A row length: any up to the first that holds the longest exercise, that one as often as all others."""
        need = max(256.0, self.level.recall * 12 + 150, self.level.copy * 2.8 + 60)
        allowed = [length for length in LENGTHS if length < need]
        longest = next((length for length in LENGTHS if length >= need), LENGTHS[-1])
        return longest if rng.random() < 0.5 or not allowed else rng.choice(allowed)


class Trainer:
    """One model, its two optimisers, and the checkpoint that a stopped run resumes from."""

    def __init__(self, name: str, model: Qwen3, rows: Rows, plan: Plan, args: argparse.Namespace) -> None:
        self.name, self.model, self.rows, self.plan, self.args = name, model.to(args.device), rows, plan, args
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
        if plan.matrix_rate == 0:
            matrices, rest = [], [p for _, p in named]
        self.muon = Muon(matrices, plan.matrix_rate)
        self.adam = torch.optim.AdamW(rest, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.progress, self.step, self.tokens = Progress(), 0, 0
        self.path = Path(args.work) / f"{name}.pt"
        self.loss: Callable[..., Any] = torch.compile(self._loss) if args.compile else self._loss
        self.teacher: Qwen3 | None = None
        self.taught = False

    def resume(self) -> None:
        """Continue where the checkpoint stands."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]
        self.step, self.tokens, known = state["step"], state["tokens"], state["progress"]
        self.progress = Progress(**known | {"level": Level(**known["level"])})
        print(f"{self.name}: resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write beside, then rename: a run killed while writing keeps the older checkpoint."""
        state = {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.buffers,
                 "progress": asdict(self.progress), "step": self.step, "tokens": self.tokens}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").rename(self.path)

    def _loss(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss, and where the likeliest token was right. A teacher's probabilities replace the data's."""
        logits = self.model(tokens[:, :-1]).float()
        targets = tokens[:, 1:].flatten()
        if self.teacher is not None and self.taught:
            with torch.no_grad():
                targets = self.teacher(tokens[:, :-1]).float().softmax(-1).flatten(0, 1)
        losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        right = logits.detach().argmax(-1) == tokens[:, 1:]
        return (losses * weights.flatten()).sum() / weights.sum(), right

    def train_step(self) -> float:
        """One batch: loss, both updates, and the tally of whole answers."""
        rng = random.Random(f"{self.args.seed} length {self.step}")
        if self.step >= self.plan.full_from * self.plan.steps:
            self.progress.level = Level(**self.progress.caps)
        self.taught = self.step >= self.plan.taught_from * self.plan.steps
        length = self.progress.length(rng)
        batch = self.rows.batch(self.step, self.progress.level, self.plan.tokens // length, length)
        device = self.args.device
        with torch.autocast(device, torch.bfloat16) if self.args.bf16 else nullcontext():
            loss, right = self.loss(batch.tokens.to(device), batch.weights.to(device))
        loss.backward()
        self._update()
        self._tally(batch, right.cpu())
        self.step += 1
        self.tokens += batch.tokens.numel()
        return float(loss.detach())

    def _update(self) -> None:
        """Both optimisers at the planned rate, after the usual clipping."""
        scale = self.plan.scale(self.step)
        for group in self.adam.param_groups:
            group["lr"] = self.plan.other_rate * scale
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(scale)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)

    def _tally(self, batch: Batch, right: Tensor) -> None:
        """An answer counts when each of its tokens is the likeliest: just then greedy decoding would give it."""
        wrong = torch.zeros(len(batch.skills), dtype=torch.long)
        wrong.scatter_add_(0, batch.answers.flatten(), (~right).long().flatten())
        tally: dict[str, list[int]] = {}
        for skill, misses in zip(batch.skills[1:], wrong.tolist()[1:], strict=True):
            tally.setdefault(skill, []).append(int(misses == 0))
        for skill, rights in tally.items():
            self.progress.record(skill, sum(rights), len(rights))
        self.progress.advance()

    def run(self, export: Callable[[Qwen3], None]) -> None:
        """Train to the planned step, with a line every 20 steps and a checkpoint every 200."""
        self.resume()
        began, tokens, mean = time.time(), self.tokens, math.nan
        while self.step < self.plan.steps:
            loss = self.train_step()
            mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
            if self.step % 20 == 0:
                rates = " ".join(f"{k} {v:.2f}" for k, v in sorted(self.progress.rates.items()))
                level, speed = self.progress.level, (self.tokens - tokens) / (time.time() - began)
                print(f"{self.name} step {self.step} loss {mean:.3f} {speed:,.0f} tok/s {self.tokens / 1e6:.2f} M | "
                      f"lengths copy {level.copy:.0f} recall {level.recall:.0f} | {rates}", flush=True)  # fmt: skip
                began, tokens = time.time(), self.tokens
            if self.step % 200 == 0 or self.step == self.plan.steps:
                self.save()
                export(self.model)


def tokenizer_for(args: argparse.Namespace, paragraphs: list[str]) -> Tokenizer:
    """The one in the folder, if there is one: weights are worth nothing with another."""
    path = Path(args.out) / "skald" / "tokenizer.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(args.seed, paragraphs, SKALD.vocab_size), path.parent)
    return Tokenizer.from_file(str(path))


def train_skald(args: argparse.Namespace, rows: Rows) -> None:
    """The chat model."""
    torch.manual_seed(args.seed)
    plan = Plan(args.steps, args.batch, cooldown=args.cooldown)
    folder, ids = Path(args.out) / "skald", token_ids(rows.tokenizer)
    Trainer("skald", Qwen3(SKALD), rows, plan, args).run(lambda model: save_weights(model, folder, ids))


def train_draft(args: argparse.Namespace, rows: Rows) -> None:
    """The draft model: first the data, then skald's probabilities, since it is paid for guessing skald."""
    torch.manual_seed(args.seed + 1)
    plan = Plan(args.draft_steps, args.batch, cooldown=args.cooldown, full_from=0.75)
    folder, ids = Path(args.out) / "skald-draft", token_ids(rows.tokenizer)
    trainer = Trainer("draft", Qwen3(DRAFT), rows, plan, args)
    trainer.teacher = load_weights(Path(args.out) / "skald").to(args.device).requires_grad_(False)
    save_tokenizer(rows.tokenizer, folder)
    trainer.run(lambda model: save_weights(model, folder, ids))


def train_adapters(args: argparse.Namespace, rows: Rows) -> None:
    """One adapter for each voice."""
    for voice in ADAPTERS:
        train_adapter(args, rows, voice)


def train_adapter(args: argparse.Namespace, rows: Rows, voice: str) -> None:
    """An adapter that speaks in a voice; the base knows it on request, so few steps teach it to do so always."""
    torch.manual_seed(args.seed + 2)
    targets, rank = ADAPTERS[voice]
    model = load_weights(Path(args.out) / "skald").train()
    add_lora(model, targets, rank, 2 * rank)
    plan = Plan(args.adapter_steps, args.batch, matrix_rate=0.0, other_rate=5e-3, warmup=20, cooldown=0.7)
    trainer = Trainer(voice, model, replace(rows, mix=VOICE_MIX, voice=voice), plan, args)
    folder = Path(args.out) / f"skald-{voice}"
    trainer.run(lambda trained: save_adapter(trained, folder, targets, rank, 2 * rank))


STAGES = {"skald": train_skald, "draft": train_draft, "adapters": train_adapters}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps of skald")
    parser.add_argument("--draft-steps", type=int, default=4200, help="optimiser steps of the draft")
    parser.add_argument("--adapter-steps", type=int, default=200, help="optimiser steps of each adapter")
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the steps in which the rate falls")
    parser.add_argument("--seed", type=int, default=1, help="of all chance")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--work", default=str(HERE.parents[1] / "build" / "models"), help="folder of checkpoints")
    parser.add_argument("--out", default=str(HERE), help="folder that the models are written to")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="run without bfloat16 autocast")
    args = parser.parse_args()
    unknown = set(args.stage) - set(STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    """Run the stages asked for."""
    args = parse()
    torch.set_num_threads(args.threads)
    paragraphs, beyond = read_text(DATA), read_beyond(DATA)
    tokenizer = tokenizer_for(args, paragraphs)
    rows = Rows(tokenizer, MIX, args.seed, paragraphs, beyond)
    for stage in args.stage:
        STAGES[stage](args, rows)


if __name__ == "__main__":
    main()
