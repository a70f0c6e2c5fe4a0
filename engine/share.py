"""Share: what one rank holds of a model, and which part of each of the checkpoint's tensors that is.

Matrices are cut by columns of output (queries, keys, values, gate, up: rows of the stored weight) and then by rows of
input (o, down: columns of the stored weight), so that two sums per layer are all that tensor-parallel ranks exchange
(Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053). Shares may differ by a head or a few columns: any number of ranks up
to the number of heads will do. With more ranks than kv heads, each kv head lives on several.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvasir.engine.errors import ConfigError
from kvasir.engine.mesh import Mesh
from kvasir.engine.spec import Experts, Spec


@dataclass(frozen=True)
class Cut:
    """Indices `part` of dimension `dim`."""

    dim: int
    part: range


@dataclass(frozen=True)
class Share:
    """A rank's part of the model that `full` describes."""

    full: Spec
    mesh: Mesh
    layers: range
    """Those of its stage."""
    expert_parallel: bool = False
    """Experts are dealt out whole, instead of a slice of each."""

    @property
    def first(self) -> bool:
        """It has what comes before the layers."""
        return self.mesh.place.first

    @property
    def last(self) -> bool:
        """It has what comes behind them."""
        return self.mesh.place.last

    @property
    def _tp(self) -> tuple[int, int]:
        return self.mesh.place.tp_rank, self.mesh.place.tp

    @cached_property
    def kv_heads(self) -> range:
        rank, size = self._tp
        count = self.full.kv_heads
        return dealt(count, rank, size) if size <= count else range(rank * count // size, rank * count // size + 1)

    @cached_property
    def heads(self) -> range:
        """Those that read its kv heads, or its part of them where several ranks have the same one."""
        rank, size = self._tp
        queries = self.full.heads // self.full.kv_heads
        if self.full.latent:
            return dealt(self.full.heads, rank, size)
        if size <= self.full.kv_heads:
            return _times(self.kv_heads, queries)
        own = dealt(queries, self._same_kv.index(rank), len(self._same_kv))
        first = self.kv_heads[0] * queries
        return range(first + own.start, first + own.stop)

    @property
    def kv_copies(self) -> int:
        """Ranks that have this rank's kv heads, itself included."""
        return len(self._same_kv)

    @property
    def _same_kv(self) -> list[int]:
        rank, size = self._tp
        count = self.full.kv_heads
        return [rank] if size <= count else [r for r in range(size) if r * count // size == rank * count // size]

    @cached_property
    def experts(self) -> range:
        """Whose weights are here."""
        count = self.full.experts.count if self.full.experts else 0
        return dealt(count, *self._tp) if self.expert_parallel else range(count)

    @cached_property
    def vocab(self) -> range:
        return self._columns(self.full.vocab)

    @property
    def vocab_widths(self) -> list[int]:
        """Of every rank of the stage."""
        size = self._tp[1]
        return [len(dealt(self.full.vocab, rank, size, _unit(self.full.vocab, size))) for rank in range(size)]

    @cached_property
    def spec(self) -> Spec:
        """The rank's own widths. A bias behind a sum over ranks is added by the first of them alone."""
        full, alone = self.full, self._tp[0] == 0
        down_bias = full.mlp_bias if full.down_bias is None else full.down_bias
        return dataclasses.replace(
            full,
            heads=len(self.heads),
            kv_heads=1 if full.latent else len(self.kv_heads),
            ffn=len(self._columns(full.ffn)),
            experts=self._local_experts(full.experts),
            o_bias=full.o_bias and alone,
            down_bias=down_bias and alone,
        )

    def cut(self, name: str) -> Cut | None:
        """The part of the tensor of this canonical name that is here; None: all of it."""
        if self._tp[1] == 1:
            return None
        for pattern, dim, part in self._rules:
            if pattern.search(name):
                return Cut(dim, part)
        return None

    @cached_property
    def _rules(self) -> Sequence[tuple[re.Pattern[str], int, range]]:
        full, facts = self.full, self.full.experts
        q, k, o = _times(self.heads, full.head_dim), _times(self.kv_heads, full.head_dim), full.head_dim
        rules: list[tuple[str, int, range]] = [
            (r"^(embed|head)\.(weight|bias)$", 0, self.vocab),
            (r"\.attn\.sinks$", 0, self.heads),
            (r"\.mlp\.(gate|up)\.(weight|bias)$", 0, self._columns(full.ffn)),
            (r"\.mlp\.down\.weight$", 1, self._columns(full.ffn)),
        ]
        if full.latent:
            latent = full.latent
            q = _times(self.heads, latent.nope_dim + latent.rope_dim)
            o = latent.v_dim
            rules.append((r"\.attn\.kv_b\.weight$", 0, _times(self.heads, latent.nope_dim + latent.v_dim)))
        rules += [
            (r"\.attn\.q(_b)?\.(weight|bias)$", 0, q),
            (r"\.attn\.[kv]\.(weight|bias)$", 0, k),
            (r"\.attn\.o\.weight$", 1, _times(self.heads, o)),
        ]
        if full.qk_norm in ("row", "each_head"):
            rows = full.qk_norm == "row"
            rules.append((r"\.attn\.q_norm\.", 0, q if rows else self.heads))
            rules.append((r"\.attn\.k_norm\.", 0, k if rows else self.kv_heads))
        if facts:
            shared = self._columns(facts.shared_ffn)
            rules += [(r"\.mlp\.shared\.(gate|up)\.", 0, shared), (r"\.mlp\.shared\.down\.weight$", 1, shared)]
        if facts and not self.expert_parallel:
            ffn = self._columns(facts.ffn)
            rules += [(r"\.experts\.\d+\.(gate|up)\.", 0, ffn), (r"\.experts\.\d+\.down\.weight$", 1, ffn)]
        return [(re.compile(pattern), dim, part) for pattern, dim, part in rules]

    def _local_experts(self, facts: Experts | None) -> Experts | None:
        if facts is None:
            return None
        ffn = facts.ffn if self.expert_parallel else len(self._columns(facts.ffn))
        return dataclasses.replace(facts, ffn=ffn, shared_ffn=len(self._columns(facts.shared_ffn)))

    def _columns(self, count: int) -> range:
        rank, size = self._tp
        return dealt(count, rank, size, _unit(count, size))


def share_of(
    spec: Spec, mesh: Mesh | None = None, *, expert_parallel: bool = False, partition: Sequence[int] = ()
) -> Share:
    """The part of this rank; `partition` says how many layers each stage has. ConfigError names the sizes that work."""
    mesh = mesh or Mesh()
    place = mesh.place
    if place.tp > spec.heads:
        raise ConfigError(
            f"--tensor-parallel-size {place.tp}: this model has {spec.heads} heads, so 1 to {spec.heads} work",
            param="tensor_parallel_size",
        )
    if expert_parallel and spec.experts is None:
        raise ConfigError("--enable-expert-parallel: this model has no experts", param="enable_expert_parallel")
    if expert_parallel and place.tp == 1:
        raise ConfigError(
            "--enable-expert-parallel deals out experts over tensor-parallel ranks, and there is one; add"
            " --tensor-parallel-size N (-tp N)",
            param="tensor_parallel_size",
        )
    if expert_parallel and spec.experts and place.tp > spec.experts.count:
        count = spec.experts.count
        raise ConfigError(
            f"--tensor-parallel-size {place.tp} with --enable-expert-parallel: there are {count} experts, so 1 to {count} work",
            param="tensor_parallel_size",
        )
    layers = stages(spec, place.pp, partition)[place.stage]
    return Share(spec, mesh, layers, expert_parallel)


def stages(spec: Spec, count: int, partition: Sequence[int] = ()) -> list[range]:
    """The layers of each stage, in order."""
    depth = len(spec.layers)
    if partition:
        if len(partition) != count or sum(partition) != depth or min(partition) < 1:
            given = ",".join(map(str, partition))
            raise ConfigError(
                f"--pipeline-layer-partition {given} must be {count} positive numbers (--pipeline-parallel-size) that add"
                f" up to the model's {depth} layers",
                param="pipeline_layer_partition",
            )
        ends = [sum(partition[: i + 1]) for i in range(count)]
        return [range(end - size, end) for end, size in zip(ends, partition, strict=True)]
    if count > depth:
        raise ConfigError(
            f"--pipeline-parallel-size {count}: this model has {depth} layers, so 1 to {depth} work",
            param="pipeline_parallel_size",
        )
    return _by_cost([layer_cost(spec, number) for number in range(depth)], head_cost(spec), count)


def layer_cost(spec: Spec, number: int) -> float:
    """Weights that a row meets in this layer: what a step costs, up to a factor, while contexts are short."""
    facts, layer = spec.experts, spec.layers[number]
    attn = spec.hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    if spec.latent:
        latent = spec.latent
        head = spec.heads * (latent.nope_dim + latent.rope_dim)
        inner = latent.kv_rank + latent.rope_dim + (latent.q_rank or head)
        outer = spec.heads * (latent.nope_dim + latent.v_dim) * latent.kv_rank + (latent.q_rank or 0) * head
        attn = spec.hidden * (inner + spec.heads * latent.v_dim) + outer
    wide = 3 if spec.gated else 2
    if layer.experts and facts:
        return attn + wide * spec.hidden * (facts.per_token * facts.ffn + facts.shared_ffn)
    return attn + wide * spec.hidden * spec.ffn


def head_cost(spec: Spec) -> float:
    """The same for the output head, which the last stage has besides."""
    return spec.vocab * spec.hidden if spec.lm_head else 0


def dealt(count: int, rank: int, size: int, unit: int = 1) -> range:
    """`count` things among `size` ranks as evenly as can be, in whole units, the rest to the last one."""
    units = count // unit
    start, stop = units * rank // size * unit, units * (rank + 1) // size * unit
    return range(start, count if rank == size - 1 else stop)


def _unit(count: int, size: int) -> int:
    """The largest power of two up to 64 (products are fastest in whole registers) that deals out evenly, or nearly so."""
    units = [unit for unit in (64, 32, 16, 8, 4, 2) if count % unit == 0]
    even = [unit for unit in units if count % (unit * size) == 0]
    return next(iter(even or [unit for unit in units if count // unit >= 8 * size]), 1)


def _times(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)


def _by_cost(costs: Sequence[float], head: float, count: int) -> list[range]:
    """Consecutive runs, none empty, whose dearest is as cheap as can be; the last one carries the head."""
    depth = len(costs)
    before = [sum(costs[:i]) for i in range(depth + 1)]
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for stage in range(1, count + 1):
        extra = head if stage == count else 0.0
        for end in range(stage, depth - (count - stage) + 1):
            options = (
                (max(best[stage - 1, start][0], before[end] - before[start] + extra), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
            best[stage, end] = min(options)
    found: list[range] = []
    end = depth
    for stage in range(count, 0, -1):
        start = best[stage, end][1]
        found.append(range(start, end))
        end = start
    return found[::-1]
