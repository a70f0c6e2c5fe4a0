"""A whole mixture in one compiled call (mixture_cpu.cpp): router, choice, experts, and the MLP that all rows share."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.kernels.linear import Product, ProductC, product_of
from kvasir.kernels.moe import Routing
from kvasir.kernels.moe_native import RoutingC, routing_of
from kvasir.kernels.native import library
from kvasir.kernels.packed_experts import PackedExperts

P = ctypes.c_void_p


class MixtureC(ctypes.Structure):
    _fields_ = (
        ("routing", RoutingC),
        ("router", ProductC),
        *((name, P) for name in ("facts", "experts")),
        *((name, ProductC) for name in ("up", "down", "gate")),
    )


@dataclass(frozen=True, eq=False)
class Shared:
    """An MLP up[2 F, M], down[M, F] that all rows go through, of the experts' kind; its result is multiplied by
    sigmoid(gate[1, M]) where there is one."""

    up: Product
    down: Product
    gate: Product | None


@dataclass(frozen=True, eq=False)
class Router:
    """What gives logits, in float32, and how they choose. What it reads must stay where it is."""

    product: Product
    routing: Routing
    choice_bias: Tensor | None


class PackedMixture:
    """What `route`, `PackedExperts` and the shared MLP give one after the other, to the bit but for the gate's sigmoid, which is
    ours; a row is the same to the bit in any batch."""

    def __init__(self, router: Router, experts: PackedExperts, *, on_input: bool, shared: Shared | None) -> None:
        self._kept = router, experts, shared  # what the structure points to
        weight = router.product.weight
        if weight.blocks.dtype != torch.float32 or weight.inputs != experts.hidden:
            raise ValueError(
                f"a router in {weight.blocks.dtype} with {weight.inputs} inputs for experts with {experts.hidden}"
            )
        parts = (None, None, None) if shared is None else _checked(shared, experts)
        self._c = MixtureC(
            routing_of(router.routing, weight.outputs, router.choice_bias),
            product_of(router.product),
            *experts.addresses(on_input=on_input),
            *map(product_of, parts),
        )
        self.address = ctypes.addressof(self._c)

    def __call__(self, x: Tensor) -> Tensor:
        """x[T, M] -> [T, M]."""
        compiled = library()
        assert compiled is not None
        self._kept[1].check(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        room = torch.empty(compiled.mixture_bytes(self.address, len(x)), dtype=torch.uint8)
        compiled.run_mixture(
            self.address, x.data_ptr(), out.data_ptr(), room.data_ptr(), len(x), torch.get_num_threads()
        )
        return out


def _checked(shared: Shared, experts: PackedExperts) -> tuple[Product, Product, Product | None]:
    """ValueError unless they fit to each other: the kernel reads what it is told is there."""
    up, down, gate = shared.up, shared.down, shared.gate
    hidden, dtype = experts.hidden, experts.dtype
    wanted = [(up, 2 * down.weight.inputs, hidden), (down, hidden, down.weight.inputs)]
    wanted += [] if gate is None else [(gate, 1, hidden)]
    for product, outputs, inputs in wanted:
        weight = product.weight
        if (weight.outputs, weight.inputs, weight.blocks.dtype) != (outputs, inputs, dtype):
            what = f"[{weight.outputs}, {weight.inputs}] in {weight.blocks.dtype}"
            raise ValueError(f"a shared MLP with {what} where [{outputs}, {inputs}] in {dtype} must be")
    return up, down, gate
