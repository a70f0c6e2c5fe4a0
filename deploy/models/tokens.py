"""The tokenizer, the chat template, and packed rows of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from corpus import (
    CITIES,
    FIELDS,
    MAKERS,
    NAMES,
    TALK,
    TOOLS,
    VOICES,
    WORDS,
    Chat,
    Level,
    Maker,
    is_held_out_wording,
    voiced,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Like Qwen's, but no mark clings to a word, so a word is one token in quotes too; a digit may carry its space.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

TOOLS_OPENED = "You may call these tools:\n<tools>"
TOOLS_CLOSED = "</tools>\nTo call one, answer with:\n" + (
    '<tool_call>\n{"name": <tool name>, "arguments": <arguments object>}\n</tool_call>'
)

TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- " + json.dumps(TOOLS_OPENED) + " }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n' + " + json.dumps(TOOLS_CLOSED) + " + '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}"
    "{%- elif message.content %}"
    "{%- set parts = namespace(text='') %}"
    "{%- for part in message.content %}{%- if part.text is string %}{%- set parts.text = parts.text + part.text %}"
    "{%- endif %}{%- endfor %}"
    "{%- set content = parts.text %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' + content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}"
    "{%- set function = call.function if call.function else call %}"
    '{{- \'<tool_call>\\n{"name": "\' + function.name + \'", "arguments": \' }}'
    "{{- function.arguments if function.arguments is string else function.arguments | tojson }}"
    "{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


# -- rendering --------------------------------------------------------------------------------------------------------


def system_text(chat: Chat) -> str | None:
    """The system message with the tools in it, as the template writes it."""
    told = chat.turns[0].content if chat.turns[0].role == "system" else None
    if not chat.tools:
        return told
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in chat.tools)
    return (told + "\n\n" if told else "") + TOOLS_OPENED + listed + "\n" + TOOLS_CLOSED


def pieces(chat: Chat) -> Iterator[tuple[str, int]]:
    """Text pieces that split at special tokens, each with the index of the answer that it belongs to, or -1."""
    told = system_text(chat)
    if told is not None:
        yield f"<|im_start|>system\n{told}<|im_end|>\n", -1
    for index, turn in enumerate(chat.turns):
        if turn.role == "assistant":
            yield "<|im_start|>assistant\n", -1
            yield f"{turn.content}<|im_end|>", index
            yield "\n", -1
        elif turn.role == "tool":
            yield f"<|im_start|>user\n<tool_response>\n{turn.content}\n</tool_response><|im_end|>\n", -1
        elif turn.role == "user":
            yield f"<|im_start|>user\n{turn.content}<|im_end|>\n", -1


def prompt_text(chat: Chat) -> str:
    """Everything before the last answer, as add_generation_prompt leaves it."""
    return "".join(text for text, _ in pieces(replace(chat, turns=chat.turns[:-1]))) + "<|im_start|>assistant\n"


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def vocabulary_text(seed: int, paragraphs: list[str]) -> Iterator[str]:
    """Generated chats, every word in each of its spellings, and some plain English for the rest of the language."""
    rng = random.Random(f"{seed} vocabulary")
    make = Maker(rng, level=Level(30, 20), room=600)
    names = [t[0] for t in TOOLS] + [p for t in TOOLS for p in t[2]] + list(FIELDS)
    for _ in range(60):
        for word in WORDS + NAMES + CITIES + names:
            yield f"{word} {word} ({word}"
    for _ in range(25):
        yield " ".join(f"{w.capitalize()} ({w.capitalize()}" for w in WORDS)
    for kind in MAKERS:
        for _ in range(2500):
            yield "".join(text for text, _ in pieces(MAKERS[kind](make)))
    for topic, said in TALK.items():
        kept = [q for i, q in enumerate(said["questions"]) if not is_held_out_wording(topic, i)]
        for text in (kept + said["answers"]) * 10:
            yield from (text, text.upper(), VOICES["pirate"](text))
    yield from paragraphs[:500]


def train_tokenizer(seed: int, paragraphs: list[str], size: int) -> Tokenizer:
    """Byte-level BPE: any bytes survive, and the words of the corpus are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(MARKS), special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    cleaned = (strip_marks(text) for text in vocabulary_text(seed, paragraphs))
    tokenizer.train_from_iterator(cleaned, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    return tokenizer


def strip_marks(text: str) -> str:
    """The marks are tokens of their own, so merges should not be spent on their letters."""
    for mark in SPECIAL + MARKS:
        text = text.replace(mark, "\n")
    return text


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that the configuration files name."""
    end, stop = SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|im_end|>")
    assert [tokenizer.token_to_id(SPECIAL[i]) for i in (end, stop)] == [end, stop]
    return {"bos": end, "pad": end, "eos": stop}


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json; bos is named but never added, as in Qwen's."""
    added = {str(tokenizer.token_to_id(text)): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
             "single_word": False, "special": text in SPECIAL} for text in SPECIAL + MARKS}  # fmt: skip
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": added, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "clean_up_tokenization_spaces": False, "model_max_length": 2048, "chat_template": TEMPLATE,
    }  # fmt: skip


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer's files and the generation defaults, beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    ids = token_ids(tokenizer)
    stops = {"bos_token_id": ids["bos"], "eos_token_id": [ids["eos"], ids["pad"]], "pad_token_id": ids["pad"]}
    write_json(folder / "generation_config.json", {**stops, "do_sample": False})


def write_json(path: Path, value: Any) -> None:
    """Readable, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- rows -------------------------------------------------------------------------------------------------------------

ANSWER_WEIGHT = {"sum": 2.0, "recall": 2.0}
REST_WEIGHT = 0.05
TEXT_WEIGHT = 0.2


@dataclass
class Batch:
    """Rows of tokens, the weight of each in the loss, and which tracked answer it belongs to (0: none)."""

    tokens: Tensor
    weights: Tensor
    answers: Tensor
    skills: list[str]


@dataclass
class Rows:
    """Makes batches; all chance comes from the seed and the step, so that a resumed run draws as before."""

    tokenizer: Tokenizer
    mix: dict[str, float]
    seed: int
    paragraphs: list[str]
    beyond: list[str]
    voice: str = ""

    def batch(self, step: int, level: Level, count: int, length: int) -> Batch:
        """`count` rows of `length` + 1 tokens: the last is only ever a target."""
        make = Maker(random.Random(f"{self.seed} rows {step}"), level=level, beyond=self.beyond)
        skills = [""]
        rows = [self._row(make, length + 1, skills) for _ in range(count)]
        tokens, weights, answers = (torch.tensor([row[i] for row in rows]) for i in range(3))
        return Batch(tokens, weights[:, 1:].float(), answers[:, 1:], skills)

    def _row(self, make: Maker, length: int, skills: list[str]) -> tuple[list[int], list[float], list[int]]:
        """Conversations one after another until none fits; the rest is padding without weight."""
        row: tuple[list[int], list[float], list[int]] = ([], [], [])
        misses = 0
        while misses < 4 and length - len(row[0]) > 24:
            left = length - len(row[0])
            make.room = min(left, make.rng.choice([128, 256, left, left]))
            tracked = len(skills)
            ids, weights, answers = self._piece(make, skills)
            if len(ids) > left:
                misses += 1
                del skills[tracked:]
                continue
            row[0].extend(ids)
            row[1].extend(weights)
            row[2].extend(answers)
        missing = length - len(row[0])
        return row[0] + [0] * missing, row[1] + [0.0] * missing, row[2] + [0] * missing

    def _piece(self, make: Maker, skills: list[str]) -> tuple[list[int], list[float], list[int]]:
        """One conversation of a kind drawn from the mix, or a paragraph."""
        kind = make.rng.choices(list(self.mix), list(self.mix.values()))[0]
        if kind == "text":
            if not self.paragraphs:
                return [], [], []
            ids = self.tokenizer.encode(make.rng.choice(self.paragraphs)).ids[: make.room - 1]
            ids.append(0)
            return ids, [TEXT_WEIGHT] * len(ids), [0] * len(ids)
        chat = MAKERS[kind](make)
        return self._encode(voiced(chat, VOICES[self.voice]) if self.voice else chat, skills)

    def _encode(self, chat: Chat, skills: list[str]) -> tuple[list[int], list[float], list[int]]:
        """Token ids with their weights; a tracked answer gets the next free number."""
        ids: list[int] = []
        weights: list[float] = []
        answers: list[int] = []
        for text, index in pieces(chat):
            new = self.tokenizer.encode(text).ids
            turn = chat.turns[index] if index >= 0 else None
            if turn and turn.top:
                skills.append(turn.skill)
            ids += new
            weights += [ANSWER_WEIGHT.get(turn.skill, 1.0) if turn else REST_WEIGHT] * len(new)
            answers += [len(skills) - 1 if turn and turn.top else 0] * len(new)
        return ids, weights, answers
