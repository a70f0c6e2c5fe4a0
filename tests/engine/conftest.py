"""Fixtures of the engine's tests: small random checkpoints as transformers saves them, and ragged batches."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch

from kvasir.engine import LLM, SamplingParams, StructuredOutput, processes
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.engine import Engine
from kvasir.engine.mesh import Mesh, Place, join
from kvasir.engine.scheduler import Stats
from kvasir.kernels.native import library
from kvasir.kernels.ragged import Ragged


@pytest.fixture(scope="session", autouse=True)
def quick_ranks() -> Iterator[None]:
    """Ranks needn't import torch, each for itself."""
    parent = forked_ranks.Parent()
    stand_in = SimpleNamespace(**vars(subprocess) | {"Popen": partial(forked_ranks.Rank, parent)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", stand_in)
        yield
    parent.close()


Part = tuple[Sequence[int], int, int]
"""(block table, start, count): `count` rows of a sequence from position `start`."""


@pytest.fixture(scope="session")
def ragged() -> Callable[[Sequence[Part], int], Ragged]:
    """`ragged(parts, block_size)`: a step over these rows."""

    def build(parts: Sequence[Part], block_size: int) -> Ragged:
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in parts])
        table = np.zeros((len(parts), max(len(blocks) for blocks, _, _ in parts)), np.int32)
        for line, (blocks, _, _) in zip(table, parts, strict=True):
            line[: len(blocks)] = blocks
        owner = np.repeat(np.arange(len(parts)), [count for _, _, count in parts])
        slots = torch.from_numpy(table).long()[owner, positions // block_size] * block_size + positions % block_size
        starts = np.cumsum([0, *(count for _, _, count in parts)]).astype(np.int32)
        lengths = np.array([start + count for _, start, count in parts], np.int32)
        tensors = (torch.from_numpy(a) for a in (starts, lengths, table))
        return Ragged(positions, slots, *tensors, starts, lengths)

    return build


@pytest.fixture(scope="session")
def in_chunks(ragged: Any) -> Callable[..., list[torch.Tensor]]:
    """`in_chunks(decoder, prompts, block_size, seed)`: logits of every row of every prompt, computed in steps of random
    chunks of random sequences, in blocks in random order."""

    def run(decoder: Decoder, prompts: list[list[int]], block_size: int, seed: int) -> list[torch.Tensor]:
        rng = random.Random(seed)
        per = [-(-len(p) // block_size) for p in prompts]
        blocks = rng.sample(range(sum(per) + 3), sum(per))
        tables = [[blocks.pop() for _ in range(n)] for n in per]
        share, cpu = decoder.share, torch.device("cpu")
        cache = KVCache(share.spec, sum(per) + 3, block_size, decoder.dtype, cpu, layers=share.layers)
        cache.arena.fill_(255)  # NaN in every type: what was never written must have no effect
        done = [0] * len(prompts)
        logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
            behind = [s for s, p in enumerate(prompts) if done[s] < len(p)]
            chosen = rng.sample(behind, rng.randint(1, len(behind)))
            counts = [min(rng.choice([1, 1, 2, 7, 30]), len(prompts[s]) - done[s]) for s in chosen]
            step = ragged([(tables[s], done[s], n) for s, n in zip(chosen, counts, strict=True)], block_size)
            tokens = [t for s, n in zip(chosen, counts, strict=True) for t in prompts[s][done[s] : done[s] + n]]
            rows = decoder(torch.tensor(tokens), step, cache, torch.arange(len(tokens)))
            if rows is None:  # a stage that isn't the last
                rows = torch.empty(len(tokens), 0)
            for s, n, out in zip(chosen, counts, rows.split(counts), strict=True):
                logits[s].append(out)
                done[s] += n
        return [torch.cat(parts) for parts in logits]

    return run


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(tp, pp, work)`: what `work(mesh)` gives on every rank, each in a thread of its own, joined by gloo."""

    def run(tp: int, pp: int, work: Callable[[Mesh], Any]) -> list[Any]:
        library()  # compiled now if ever: no rank waits for another one's compiler
        store, cpu = torch.distributed.HashStore(), torch.device("cpu")

        meshes = []  # none may be gone before all are done

        def rank(number: int) -> Any:
            torch.set_num_threads(1)
            mesh = join(Place(tp, pp, number), store, cpu, "127.0.0.1", 60.0)
            meshes.append(mesh)
            return work(mesh)

        try:
            with ThreadPoolExecutor(tp * pp) as pool:
                return list(pool.map(rank, range(tp * pp)))
        finally:
            for mesh in meshes:
                mesh.close()

    return run


@pytest.fixture(scope="session")
def stories(data: Callable[[str], Path]) -> dict[str, Any]:
    """Options of LLM for a small trained model, of which groups of ranks start quickly."""
    options = {"dtype": "float32", "num_threads": 1, "block_size": 8, "kv_cache_memory_bytes": 1 << 21}
    return {"model": str(data("model-stories260k/hf")), **options}


@pytest.fixture(scope="session")
def fresh() -> Callable[[Engine], Stats]:
    """`fresh(engine)`: its statistics as of now; what it tells at any time is a little old."""

    def found(engine: Engine) -> Stats:
        asked, limit = time.monotonic(), time.monotonic() + 60
        while engine.stats_at <= asked:
            assert time.monotonic() < limit, "they are told no more"
            time.sleep(0.01)
        return engine.stats()

    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """`checkpoint("Llama", **config)`: (folder saved by transformers, its float32 model), of random weights."""
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }

    def build(
        family: str,
        *,
        max_shard_size: str = "1GB",
        attention: str = "eager",
        norm: float = 1.0,
        auto: str = "AutoModelForCausalLM",
        **changes: Any,
    ) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**small, **changes})
        model = getattr(transformers, auto).from_config(config, attn_implementation=attention)
        model = model.float().eval()
        for name, p in model.named_parameters():
            p.data = torch.randn_like(p) * 0.2 + (
                norm if p.dim() == 1 and "norm" in name.lower() and "bias" not in name else 0.0
            )
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return build


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model, for what asks for no other."""
    with LLM("skald", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def write(llm: LLM) -> Callable[..., Any]:
    """`write(StructuredOutput | None, ...)`: outputs of one request at temperature 1."""

    def run(wanted: StructuredOutput | None, **given: Any) -> Any:
        sampling = SamplingParams(**{"max_tokens": 150, "seed": 1, **given}, structured_outputs=wanted)
        return llm.generate(["Hello"], sampling, use_tqdm=False)[0].outputs

    return run
