"""Real GGUF files: a trained model's equals its safetensors, and what llama.cpp calls tensors in published models is known."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import Checkpoint, open_checkpoint
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import read_gguf
from kvasir.engine.gguf_checkpoint import GGUFCheckpoint
from kvasir.engine.gguf_families import FAMILIES
from kvasir.engine.gguf_names import canonical
from kvasir.engine.llm import LLM
from kvasir.engine.request import SamplingParams
from kvasir.engine.spec import Spec

CPU = torch.device("cpu")
Data = Callable[[str], Path]
SCHEMAS = {
    "deepseek-v3.1": "deepseek2",
    "gemma-3-4b-it": "gemma3",
    "gpt-oss-120b": "gpt-oss",
    "meta-llama-3.1-70b-instruct": "llama",
    "qwen3-0.6b": "qwen3",
    "qwen3-14b": "qwen3",
}
"""Those of our families."""


def filled(checkpoint: Checkpoint, spec: Spec) -> dict[str, torch.Tensor]:
    places = dict(Decoder(spec, torch.float32, CPU).places())
    unfilled = set(places)
    for filler in checkpoint.tensors(spec):
        unfilled.remove(filler.name)
        filler.copy_to(places[filler.name])
    assert not unfilled
    return places


def test_a_trained_model_has_the_same_tensors(data: Data) -> None:
    checkpoint = GGUFCheckpoint(data("model-stories260k/stories260k.f32.gguf"))
    spec = load_spec(checkpoint.config())
    folder = data("model-stories260k/hf")
    theirs = load_spec(json.loads((folder / "config.json").read_text()))
    assert spec == dataclasses.replace(theirs, tied=False)  # the file repeats the embedding as head
    expected = filled(open_checkpoint(folder), theirs)
    expected["head.weight"] = expected["embed.weight"]
    places = filled(checkpoint, spec)
    assert places.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in places.items())


def test_a_trained_model_says_what_is_documented(data: Data) -> None:
    wanted = json.loads(data("model-stories260k/greedy_256.json").read_text())
    llm = LLM(str(data("model-stories260k/stories260k.f32.gguf")), dtype="float32", num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=255, ignore_eos=True)
    output = llm.generate([[1]], params, use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == wanted["greedy_ids"][1:]


@pytest.mark.parametrize("name", SCHEMAS)
def test_names_of_published_models(name: str, data: Data) -> None:
    """The schemas list the tensors of a model that are quantised otherwise than most of it."""
    content = data(f"gguf-tensor-schemas/{name}.schema").read_text()
    names = set(re.findall(r"^(\S+\.(?:weight|bias)) \S+$", content, re.M))
    assert names
    unknown = {tensor for tensor in names if canonical(tensor, SCHEMAS[name]) is None}
    assert not unknown
    assert SCHEMAS[name] in FAMILIES


def test_a_damaged_model_is_refused_or_loaded(data: Data, tmp_path: Path) -> None:
    """Bytes of its header flipped: metadata, names, shapes, types, offsets. Nothing but ConfigError, nothing for long."""
    content = data("model-stories260k/stories260k.f32.gguf").read_bytes()
    tensors = read_gguf(data("model-stories260k/stories260k.f32.gguf")).tensors.values()
    header, path, rng = min(tensor.start for tensor in tensors), tmp_path / "damaged.gguf", random.Random(0)
    refused, start = 0, time.thread_time()
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(rng.choice((0, header - 3000)), header)
            damaged[at] = rng.choice((0, 1, 2, 8, 9, 127, 128, 255))
        path.write_bytes(damaged)
        try:
            checkpoint = GGUFCheckpoint(path)
            spec = load_spec(checkpoint.config())
            for filler in checkpoint.tensors(spec):
                filler.copy_to(torch.empty(filler.shape))
        except ConfigError:
            refused += 1
    assert 100 < refused < 300
    assert time.thread_time() - start < 60
