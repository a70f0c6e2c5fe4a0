"""One decoder for every Spec: embedding, blocks of attention over a paged cache and an MLP, output head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvasir.engine import attention, mlp
from kvasir.engine.attention import Positional
from kvasir.engine.cache import KVCache, Views
from kvasir.engine.layers import Linear, Norm, empty
from kvasir.engine.rope import stretched_turning, turning
from kvasir.engine.rows import DealtRows, Rows, WholeRows, rows_of
from kvasir.engine.share import Share, share_of
from kvasir.engine.spec import Layer, QueryScale, Spec
from kvasir.engine.stacking import stack_of
from kvasir.kernels.embedding import embed
from kvasir.kernels.huge_pages import Room
from kvasir.kernels.linear import Weight, is_packed, linear, packed
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles, Dial, rope_angles
from kvasir.kernels.stack import MOST_ROWS, Stack

BEFORE = ("pre", "sandwich", "parallel", "parallel_two")
"""Placements that normalise what goes into a branch."""
TABLES = ("embed", "positions", "token_types", "head")
"""Plain matrices of the decoder itself; a checkpoint calls them `NAME.weight`."""


class Block(nn.Module):
    """Attention and MLP, each with its norms and the residual around it, in the order that `Spec.placement` says."""

    def __init__(self, share: Share, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        spec = share.spec
        self.placement, self.scale = spec.placement, spec.residual_scale

        def norm(*placements: str) -> Norm | None:
            return Norm(spec, (spec.hidden,), dtype, device) if spec.placement in placements else None

        self.attn_norm = norm(*BEFORE, "after")
        self.post_attn_norm = norm("post", "sandwich")
        self.mlp_norm = norm("pre", "sandwich", "parallel_two", "after")
        self.post_mlp_norm = norm("post", "sandwich")
        self.attn = attention.module(share, layer, dtype, device)
        self.mlp = mlp.module(share, layer, dtype, device)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        positional: Positional,
        ragged: Ragged,
        cache: Views,
        wanted: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor, Tensor | None]:
        """x[T, M] and what is still to be added to it -> the same behind this block, so that sums and norms go together.

        [R, M] when only some rows are `wanted`: the others end with their keys and values. All of that is this rank's part
        where `rows` are dealt out; they are whole where only some are wanted.
        """
        x, h = joined(self.attn_norm if self.placement in BEFORE else None, x, y, self.scale)
        h = rows.spread(h)
        y = self.attn(h, positional, ragged, *cache)
        if wanted is not None:
            x, y, h = (t.index_select(0, wanted) for t in (x, y, h))
        if self.placement.startswith("parallel"):  # one sum over ranks for both
            h = h if self.mlp_norm is None else rows.spread(self.mlp_norm(x))
            return x, rows.summed(y + self.mlp(h))
        y = _normed(self.post_attn_norm, rows.summed(y))
        if self.placement == "after":
            _, x = joined(self.attn_norm, x, y, self.scale)
            return joined(self.mlp_norm, x, rows.summed(self.mlp(rows.spread(x))), self.scale)[1], None
        x, h = joined(self.mlp_norm, x, y, self.scale)
        return x, _normed(self.post_mlp_norm, rows.summed(self.mlp(rows.spread(h))))


class Decoder(nn.Module):
    """tokens[T] of any number of sequences, at any positions, to logits. Parameters are unfilled until loaded.

    With a `share` only that rank's part: its stage's layers, and its slice of their matrices, of the embedding and the
    head, whose rows are dealt out by vocabulary.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device, share: Share | None = None) -> None:
        super().__init__()
        self.spec, self.dtype, self.device = spec, dtype, device
        self.attention_backend = "auto"
        self.share = share = share or share_of(spec)
        self.mesh = share.mesh
        width, vocab = spec.embed_dim or spec.hidden, len(share.vocab)
        first, last = share.first, share.last

        def table(rows: int, columns: int = spec.hidden) -> nn.Parameter | None:
            return empty(rows, columns, dtype=dtype, device=device) if rows else None

        def projection(name: str, inputs: int, outputs: int) -> Linear | None:
            return Linear(inputs, {name: outputs}, False, dtype, device) if spec.embed_dim else None

        def norm(wanted: bool) -> Norm | None:
            return Norm(spec, (spec.hidden,), dtype, device) if wanted else None

        tied = spec.tied and spec.lm_head
        self.embed = table(vocab, width) if first or (last and tied) else None
        self.positions, self.token_types = table(spec.positions * first), table(spec.token_types * first)
        self.embed_norm = norm(spec.embed_norm and first)
        self.project_in = projection("project_in", width, spec.hidden) if first else None
        self.project_out = projection("project_out", spec.hidden, width) if last else None
        layers = [(number, spec.layers[number]) for number in share.layers]
        self.blocks = nn.ModuleDict({str(number): Block(share, layer, dtype, device) for number, layer in layers})
        self.norm = norm(spec.final_norm and last)
        self.head: Weight | None = None
        if last and spec.lm_head:
            self.head = self.embed if tied else table(vocab, width)
        self.vocab_widths = share.vocab_widths
        self.head_bias = empty(vocab, dtype=dtype, device=device) if spec.head_bias and last else None
        ropes = {layer.rope for _, layer in layers if layer.rope is not None}
        self.turnings = {
            rope: (turning(rope).to(device), stretched_turning(rope, spec.max_len).to(device)) for rope in ropes
        }
        self._dials = {
            rope: Dial(turn, dtype, interleaved=rope.interleaved)
            for rope, (turn, _) in self.turnings.items()
            if device.type == "cpu"
        }
        self._stack: tuple[KVCache, Stack | None] | None = None
        """What `_stacked` found for this cache."""
        self.query_scales = {layer.query_scale for _, layer in layers if layer.query_scale is not None}

    def attend_by(self, backend: str) -> None:
        """Attention by these kernels from now on (--attention-backend). ValueError names those there are."""
        attention.attend_by(backend, self.device, self.modules(), deterministic=self.mesh.invariant)
        self.attention_backend, self._stack = backend, None

    @torch.inference_mode()
    def forward(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor) -> Tensor | None:
        """tokens[T] int64, rows[R] int64 -> float32 logits[R, V] of those rows, None on a stage that isn't the last; keys
        and values go into the cache."""
        return self.handed_on(self.part(tokens, ragged, cache, rows, self.received(len(tokens))))

    def received(self, rows: int) -> Tensor | None:
        """What the stage before hands on of a step of so many rows: those of x[T, M] that this rank keeps. The first stage
        gets nothing."""
        if self.share.first:
            return None
        count = rows_of(self.mesh, rows, self.spec.hidden).count()
        return self.mesh.receive(count, self.spec.hidden, self.dtype, self.device)

    @torch.inference_mode()
    def part(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor, x: Tensor | None) -> Tensor:
        """What this stage makes of the x that it `received`: logits of those rows in the last one, else what it hands on.
        Nothing is exchanged with other stages here."""
        x = self.through(tokens, ragged, cache, rows, x)
        return self.logits(x) if self.share.last else x

    def handed_on(self, x: Tensor) -> Tensor | None:
        """What `part` made goes to the next stage; in the last one it is the result."""
        if self.share.last:
            return x
        self.mesh.send(x)
        return None

    @torch.inference_mode()
    def hidden(
        self,
        tokens: Tensor,
        ragged: Ragged,
        cache: KVCache,
        rows: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states [R, M] of those rows, or [T, M] of all; token_types[T] are segments, 0 by default.

        A stage that isn't the last hands its own [T, M] on to the next, and the result means nothing.
        """
        x = self.through(tokens, ragged, cache, rows, self.received(len(tokens)), token_types)
        if not self.share.last:
            self.mesh.send(x)
        return x

    def through(
        self,
        tokens: Tensor,
        ragged: Ragged,
        cache: KVCache,
        rows: Tensor | None,
        x: Tensor | None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """What this stage's layers make of the x that it `received`, or of the tokens in the first one: as `hidden`, and nothing
        is exchanged with other stages."""
        held = rows_of(self.mesh, len(tokens), self.spec.hidden)
        if x is None:
            x = held.own(self._embedded(tokens, ragged, token_types))
        positional = self._positional(ragged, x.dtype)
        layers = self.share.layers
        y, done = None, 0
        if isinstance(held, WholeRows):
            x, y, done = self._stacked(x, positional, ragged, cache, rows)
        for i, block in zip(layers[done:], list(self.blocks.values())[done:], strict=True):
            chosen = rows if self.share.last and i == layers[-1] else None
            if chosen is not None and isinstance(held, DealtRows):
                x, y = held.spread(joined(None, x, y, self.spec.residual_scale)[0]), None
                held = WholeRows(self.mesh, len(tokens))
            x, y = block(x, y, positional, ragged.group(cache.group_of[i]), cache.layer(i), chosen, held)
        x, h = joined(self.norm, x, y, self.spec.residual_scale)
        return held.spread(h) if self.share.last else x

    def _stacked(
        self, x: Tensor, positional: Positional, ragged: Ragged, cache: KVCache, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """Few rows go through layers of the commonest kind in one call: (x, what is to be added, layers done). The last
        layer is left out when not all of its rows are wanted."""
        if not 0 < len(x) <= MOST_ROWS or self.device.type != "cpu":
            return x, None, 0
        if self._stack is None or self._stack[0] is not cache:
            self._stack = cache, stack_of(self, cache)
        stack = self._stack[1]
        all_rows = rows is None or not self.share.last or len(rows) == len(x)
        count = len(self.share.layers) - (not all_rows)
        if stack is None or not count:
            return x, None, 0
        if cache.awaited is not None:
            for layer in self.share.layers:
                cache.awaited(layer)
        angles = [positional[rope] for rope in self.turnings]
        if self.mesh.meeting is not None:
            self.mesh.traffic.note(x, self.mesh.place.tp - 1, 2 * count)
        return *stack(x, count, angles, ragged), count

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """x[R, M] of `hidden` -> float32 [R, V]."""
        assert self.head is not None, "this model has no output head"
        if self.project_out is not None:
            x = self.project_out(x)
        logits = self.mesh.gather(linear(x, self.head, self.head_bias), self.vocab_widths).float()
        if self.spec.logit_scale != 1:
            logits *= self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def _embedded(self, tokens: Tensor, ragged: Ragged, token_types: Tensor | None) -> Tensor:
        x = self._looked_up(tokens)
        if self.spec.embed_scale != 1:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)  # rounded first, as Gemma was trained
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + F.embedding(ragged.positions + self.spec.position_offset, self.positions)
        if self.token_types is not None:
            x = x + F.embedding(torch.zeros_like(tokens) if token_types is None else token_types, self.token_types)
        return _normed(self.embed_norm, x)

    def _looked_up(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None
        own = self.share.vocab
        if len(own) == self.spec.vocab:
            return embed(tokens, self.embed)
        return self.mesh.reduce(embed(tokens, self.embed, own.start, whole=False))

    def _positional(self, ragged: Ragged, dtype: torch.dtype) -> Positional:
        found: Positional = {}
        for rope, (turn, stretched) in self.turnings.items():
            angles = None
            if rope in self._dials and ragged.stretched is None:
                angles = self._dials[rope].angles(ragged.positions, int(ragged.host_lengths.max(initial=0)))
            found[rope] = angles or rope_angles(ragged, turn, stretched, dtype, interleaved=rope.interleaved)
        return found | {scale: _factors(scale, ragged.positions, dtype) for scale in self.query_scales}

    def pack(self, *, invariant: bool = False) -> None:
        """Once filled: give every matrix the order this device reads fastest, or one whose products don't depend on the
        number of rows. A tied head becomes a copy if need be."""
        room = Room()
        for module in self.modules():
            if isinstance(
                module, mlp.Mixture
            ):  # whoever's products a CPU's experts' are, so that one call can have both
                module.router.pack(invariant=invariant or self.device.type == "cpu", room=room)
        for module in self.modules():
            if isinstance(module, (Linear, attention.LatentAttention)):
                module.pack(invariant=invariant, room=room)
        for module in self.modules():
            if isinstance(module, mlp.Mixture):
                module.pack(invariant=invariant)
        if isinstance(self.head, Tensor) and not is_packed(self.head):
            head = packed(self.head, invariant=invariant, room=room)
            del self.head
            self.head = head
        if not self.share.first:  # it was there for the tied head
            self.embed = None

    def stacked(self) -> Iterator[tuple[Linear, list[str]]]:
        """Every matrix with the canonical names of its parts."""
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                parent = path.rpartition(".")[0]
                yield module, [f"{parent}.{name}".lstrip(".") for name, _ in module.places()]

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, view to fill) of every tensor, stacked ones one by one: `blocks.0.attn.q.weight`."""
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                parent = path.rpartition(".")[0]
                yield from ((f"{parent}.{name}".lstrip("."), view) for name, view in module.places())
            elif isinstance(module, Norm):
                yield from ((path + name, tensor) for name, tensor in module.places())
            else:
                own = module.named_parameters(prefix=path, recurse=False)
                yield from ((_checkpoint_name(name), tensor) for name, tensor in own)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x), or x itself where there is none."""
    return x if norm is None else norm(x)


def joined(norm: Norm | None, x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The residual x + scale * y (x alone while nothing is to be added), and what the next branch reads: its norm."""
    if y is not None and norm is not None:
        return norm.added(x, y, scale)
    if y is not None:
        x = x + y if scale == 1 else x + y * scale
    return x, _normed(norm, x)


def _factors(scale: QueryScale, positions: Tensor, dtype: torch.dtype) -> Angles:
    count = positions.double() + scale.first
    if scale.kind == "log":
        factor = (count.log() / torch.tensor(scale.length).double().log()).clamp_(min=1)
    else:
        factor = 1 + scale.factor * (1 + (count / scale.length).floor()).log()
    found = factor.to(dtype)[:, None, None]
    return found, found


def _checkpoint_name(name: str) -> str:
    if name == "head_bias":
        return "head.bias"
    return name + ".weight" * (name in TABLES or name.endswith(".kv_b"))
