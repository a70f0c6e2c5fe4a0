"""`kvasir models`: what runs here. `kvasir show`: a model's facts, before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from kvasir.engine.arch import Family, families
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import bundled_models

if TYPE_CHECKING:  # these load torch, which takes seconds
    from kvasir.engine.model_facts import ModelFacts
    from kvasir.engine.parallel_plan import Plan

LENGTH = 4096
"""Tokens of a sequence, when nothing is said and the model allows more."""
LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend")
FALLBACK = (
    "Other architectures run by transformers' own code over Kvasir's cache, if their attention can be replaced there:"
    " slower, and a line in the log says so."
)


def models(*, as_json: bool) -> int:
    """Print what is supported."""
    found, bundled = families(), sorted(bundled_models())
    if as_json:
        print(json.dumps({"families": [asdict(family) for family in found], "bundled": bundled}, indent=1))
        return 0
    print(f"Bundled: {', '.join(bundled) or 'none'}\n")
    print(_table(("model_type", "architectures", "about"), map(_row, found)))
    print(f"\n{FALLBACK}")
    return 0


def show(engine: EngineConfig, *, batch: int, template: bool, as_json: bool) -> int:
    """Print a model's facts, or its chat template alone."""
    from kvasir.engine.model_facts import model_facts

    _refuse_layout(
        engine, ("enable_expert_parallel", *LAYOUT), "kvasir show is of a whole model; kvasir plan shows layouts"
    )
    facts = model_facts(engine, batch)
    if template:
        print(facts.template or f"{facts.model} has no chat template")
        return 0 if facts.template else 1
    if as_json:
        print(json.dumps(asdict(facts) | {"memory": asdict(facts.memory) | {"total": facts.memory.total}}, indent=1))
        return 0
    print(_table(None, _lines(facts)))
    return 0


def plan(engine: EngineConfig, gpu: str, gpus: int, per_node: int, *, streams: int, as_json: bool) -> int:
    """Print every layout of so many GPUs, the best first."""
    import torch

    from kvasir.engine.arch import load_spec
    from kvasir.engine.cpu_device import cpu_device
    from kvasir.engine.memory import DTYPES
    from kvasir.engine.model_files import ModelFiles
    from kvasir.engine.parallel_plan import find_device, plans

    _refuse_layout(engine, LAYOUT, "kvasir plan shows every layout of --gpus, and which to pick")
    spec = load_spec(ModelFiles(replace(engine, load_format="dummy")).config)
    length = engine.max_model_len or min(spec.max_len, LENGTH)
    dtype = DTYPES.get(engine.dtype, torch.bfloat16)
    here = gpu.lower() == "cpu"
    device = (
        cpu_device(gpus, spec, streams, dtype, engine.num_threads) if here else replace(find_device(gpu), node=per_node)
    )
    found = plans(engine, spec, dtype, device, gpus, streams=streams, length=length)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return 0
    kept = "" if engine.kv_cache_dtype == "auto" else f", KV cache in {engine.kv_cache_dtype},"
    dealt = any(one.whole_experts for one in found)
    heads = (
        "",
        "tensor",
        "stages",
        "copies",
        *(["experts"] if dealt else []),
        "weights",
        "KV/token",
        "context",
        "sequences",
        "step",
        "first token",
        "tok/s",
        "sent/token",
    )
    print(
        f"{engine.model} in {str(dtype).removeprefix('torch.')}{kept} on {gpus} x {gpu}; {streams} streams of {length} tokens:\n"
    )
    print(_table(heads, (_layout(one, best=one is found[0] and one.fits, dealt=dealt) for one in found)))
    if here:
        print(f"\nPer rank, by what {gpus} of them were just measured to do at once on this machine.")
    else:
        print("\nPer rank, at the devices' published limits: bounds, not measurements.")
    if not found[0].fits:
        print("No layout has room for one sequence: use more or larger GPUs, or lower --max-model-len.")
        return 1
    best = found[0]
    if best.tp * best.pp > device.node:
        print(f"Its ranks are on several nodes of {device.node} GPUs (--gpus-per-node): start it with --address.")
    print(" ".join(("kvasir serve", engine.model, f"-tp {best.tp} -pp {best.pp} -dp {best.dp}", *_given(engine, best))))
    return 0


def _refuse_layout(engine: EngineConfig, names: Iterable[str], why: str) -> None:
    """ConfigError for the first of these options that is set."""
    default = EngineConfig()
    for name in names:
        if getattr(engine, name) != getattr(default, name):
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave it out", param=name)


def _given(engine: EngineConfig, best: Plan) -> Iterable[str]:
    """What was said of the model, as flags."""
    default = EngineConfig()
    for name in ("dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization"):
        if (value := getattr(engine, name)) != getattr(default, name):
            yield f"--{name.replace('_', '-')} {value}"
    if best.whole_experts:
        yield "--enable-expert-parallel"
    if engine.pipeline_layer_partition:
        yield "--pipeline-layer-partition " + ",".join(map(str, engine.pipeline_layer_partition))


def _layout(one: Plan, *, best: bool, dealt: bool) -> tuple[str, ...]:
    ranks = str(one.tp), str(one.pp), str(one.dp), *((["whole" if one.whole_experts else "sliced"]) if dealt else [])
    sizes = f"{one.weights / 1e9:.1f} GB", f"{one.kv_per_token / 1e3:.1f} kB"
    if not one.fits:
        return "", *ranks, *sizes, str(one.context), "don't fit", "", "", "", ""
    times = f"{one.step_s * 1e3:.1f} ms", f"{one.prompt_s * 1e3:.0f} ms"
    speed = *times, f"{one.tokens_s:.0f}", f"{one.traffic / 1e3:.0f} kB"
    mark = "*" if best else ""
    return mark, *ranks, *sizes, str(one.context), str(one.sequences), *speed


def _row(family: Family) -> tuple[str, str, str]:
    return family.model_type, ", ".join(family.architectures[:2]), family.about


def _lines(facts: ModelFacts) -> Iterable[tuple[str, ...]]:
    memory = facts.memory
    active = "" if facts.active_parameters == facts.parameters else f", {_count(facts.active_parameters)} per token"
    types = ", ".join(f"{count} {name}" for name, count in facts.tensor_types.items())
    yield "model", facts.model
    yield "path", facts.path
    yield "family", facts.family
    yield "architecture", ", ".join(facts.architectures) or facts.model_type
    yield "can", ", ".join(facts.tasks)
    yield "parameters", f"{_count(facts.parameters)}{active}"
    yield "layers", facts.layers
    yield "attention", facts.attention
    yield "width", str(facts.hidden)
    yield "context", f"{facts.context} tokens"
    yield "positions", facts.rope
    yield "vocabulary", str(facts.vocabulary)
    yield "tokenizer", facts.tokenizer
    yield "chat template", "yes (--template prints it)" if facts.chat_template else "no"
    yield "weight files", _bytes(facts.disk) if facts.disk else "not here; they are fetched when the model is served"
    if types:
        yield "tensor types", types
    yield "runs as", facts.dtype
    if facts.generation:
        yield "defaults", ", ".join(f"{name} {value}" for name, value in facts.generation.items())
    yield "memory", f"{_bytes(memory.total)} for {memory.batch} x {memory.max_model_len} tokens"
    yield "", f"{_bytes(memory.weights)} weights"
    yield (
        "",
        f"{_bytes(memory.kv_cache)} KV cache in {facts.kv_cache_dtype} ({_bytes(memory.kv_cache_per_sequence)} a sequence)",
    )
    yield "", f"{_bytes(memory.activations)} activations (estimate)"


def _table(heading: tuple[str, ...] | None, rows: Iterable[tuple[str, ...]]) -> str:
    lines = [*([heading] if heading else []), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    padded = ([f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0], strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _count(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _bytes(size: int) -> str:
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size} B"
