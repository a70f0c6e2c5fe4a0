"""The half of a layer without memory: one MLP, or a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvasir.engine.layers import Linear, empty
from kvasir.engine.share import Share
from kvasir.engine.spec import Experts, Layer, Spec
from kvasir.kernels.activation import gated, plain
from kvasir.kernels.moe import Routing, experts, route, stacked_experts
from kvasir.kernels.packed_experts import Expert, PackedExperts, packed_experts
from kvasir.kernels.packed_mixture import PackedMixture, Router, Shared

STACKED = ("cuda",)
"""Types of device on which all experts' matrices are multiplied at once, and lie one behind the other for that. On a CPU each
expert has its own, in the order its products read fastest."""


def module(share: Share, layer: Layer, dtype: torch.dtype, device: torch.device) -> MLP | Mixture:
    """What this layer has on this rank: what it gives is this rank's part of a sum."""
    spec = share.spec
    if layer.experts and spec.experts is not None:
        return Mixture(share, spec.experts, dtype, device)
    return MLP(spec, spec.ffn, spec.mlp_bias, dtype, device)


class MLP(nn.Module):
    """down(activation(gate) * up), or down(activation(up))."""

    def __init__(
        self,
        spec: Spec,
        ffn: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        *,
        down_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.limit, self.gated = spec.activation, spec.activation_limit, spec.gated
        parts = {"gate": ffn, "up": ffn} if spec.gated else {"up": ffn}
        self.up = Linear(spec.hidden, parts, bias, dtype, device)
        if down_bias is None:
            down_bias = bias if spec.down_bias is None else spec.down_bias
        self.down = Linear(ffn, {"down": spec.hidden}, down_bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x[T, M] -> [T, M]."""
        x = self.up(x)
        x = gated(x, self.activation, self.limit) if self.gated else plain(x, self.activation)
        out: Tensor = self.down(x)
        return out


class Stack:
    """Experts whose matrices lie one behind the other on the device: what each of `mlps` has and fills is a view."""

    def __init__(self, numbers: range, mlps: nn.ModuleDict, device: torch.device) -> None:
        found = [mlp for mlp in mlps.values() if isinstance(mlp, MLP)]
        self._first, self._facts = numbers.start, found[0]
        self.deterministic = False
        """Whether no row's result may depend on how many there are."""
        (self._up, self._up_bias), (self._down, self._down_bias) = (
            (_stacked(lines, "weight", device), _stacked(lines, "bias", device))
            for lines in ([mlp.up for mlp in found], [mlp.down for mlp in found])
        )

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, *, on_input: bool) -> Tensor:
        """x[T, M] through the experts index[T, k], which weigh weight[T, k] -> [T, M]; others' add nothing."""
        assert self._up is not None
        assert self._down is not None
        return stacked_experts(
            x,
            index,
            weight,
            self._up,
            self._down,
            activation=self._facts.activation,
            limit=self._facts.limit,
            gate=self._facts.gated,
            up_bias=self._up_bias,
            down_bias=self._down_bias,
            on_input=on_input,
            first=self._first,
            deterministic=self.deterministic,
        )


def _stacked(lines: list[Linear], name: str, device: torch.device) -> Tensor | None:
    """[E, ...]: the tensors of this name, from now on views of it; None where there are none."""
    like = getattr(lines[0], name)
    if like is None:
        return None
    whole: Tensor = torch.empty(len(lines), *like.shape, dtype=like.dtype, device=device)
    for line, part in zip(lines, whole, strict=True):
        setattr(line, name, nn.Parameter(part, requires_grad=False))
    return whole


class Mixture(nn.Module):
    """A few of many MLPs for each row (Shazeer et al. 2017, arXiv:1701.06538), and one that all rows share."""

    def __init__(self, share: Share, facts: Experts, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        spec = share.spec
        self.facts, self.spec = facts, spec
        alone = share.mesh.place.tp_rank == 0
        down_bias = facts.bias and (alone or share.expert_parallel)
        # float32: a rounding of the router decides between experts
        self.router = Linear(spec.hidden, {"router": facts.count}, facts.router_bias, torch.float32, device)
        self.routing = Routing(
            facts.per_token,
            facts.scoring,
            facts.renormalise,
            facts.scale,
            facts.groups,
            facts.groups_used,
            facts.group_score,
            facts.jitter,
        )
        self.choice_bias = empty(facts.count, dtype=torch.float32, device=device) if facts.choice_bias else None
        stacked = device.type in STACKED and len(share.experts) > 0
        own = torch.device("meta") if stacked else device
        self.experts = nn.ModuleDict(
            {str(e): MLP(spec, facts.ffn, facts.bias, dtype, own, down_bias=down_bias) for e in share.experts}
        )
        self.numbers = share.experts
        self.stack: Stack | PackedExperts | None = Stack(share.experts, self.experts, device) if stacked else None
        self.shared = None
        if facts.shared_ffn:
            self.shared = MLP(spec, facts.shared_ffn, facts.bias, dtype, device, down_bias=facts.bias and alone)
        self.shared_gate = Linear(spec.hidden, {"shared_gate": 1}, False, dtype, device) if facts.shared_gate else None
        self.whole: PackedMixture | None = None
        """All of this in one call, once `pack` has found that it can be had."""

    def forward(self, x: Tensor) -> Tensor:
        """x[T, M] -> [T, M]."""
        if self.whole is not None:
            return self.whole(x)
        facts = self.facts
        index, weight = route(self.router(x.float()), self.routing, self.choice_bias)
        if self.stack is None:
            out = experts(x, index, weight, self._run, on_input=facts.on_input)
        else:
            out = self.stack(x, index, weight, on_input=facts.on_input)
        if self.shared is None:
            return out
        shared: Tensor = self.shared(x)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())

    def pack(self, *, invariant: bool = False) -> None:
        """Once its matrices are packed: call all of it at once, or all experts, where that can be done."""
        if isinstance(self.stack, Stack):
            self.stack.deterministic = invariant
        if self.stack is not None:
            return
        found = [mlp for mlp in self.experts.values() if isinstance(mlp, MLP)]
        spec = self.spec
        self.stack = packed_experts(
            [Expert(mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias) for mlp in found],
            activation=spec.activation,
            limit=spec.activation_limit,
            gate=spec.gated,
            first=self.numbers.start,
        )
        self.whole = self._whole()

    def _whole(self) -> PackedMixture | None:
        product = self.router.product()
        if not isinstance(self.stack, PackedExperts) or product is None:
            return None
        router, shared = Router(product, self.routing, self.choice_bias), None
        if self.shared is not None:
            up, down = self.shared.up.product(), self.shared.down.product()
            gate = None if self.shared_gate is None else self.shared_gate.product()
            if up is None or down is None or (gate is None and self.shared_gate is not None):
                return None
            shared = Shared(up, down, gate)
        return PackedMixture(router, self.stack, on_input=self.facts.on_input, shared=shared)

    def _run(self, expert: int, rows: Tensor) -> Tensor | None:
        """rows[R, M] through this expert; None where another rank has it."""
        own = str(expert)
        out: Tensor | None = self.experts[own](rows) if own in self.experts else None
        return out
