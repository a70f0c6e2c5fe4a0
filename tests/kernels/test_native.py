"""The compiled CPU kernels: equal to their definitions, bit for bit the same in any batch, clean under sanitizers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.kernels import activation_native, attention_native, cache_native, compiled, native, norm_native
from kvasir.kernels.activation import gated
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import turn_and_write
from kvasir.kernels.linear import Packed, is_packed, linear, linear_heads, packed, packed_heads
from kvasir.kernels.norm import add_rms_norm, rms_norm
from kvasir.kernels.ragged import Ragged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_compiler = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def parts_of(rng: random.Random, longest: int) -> list[tuple[int, int]]:
    """(length, rows at its end) of some sequences; now and then one has no rows."""
    found = []
    for _ in range(rng.choice([1, 2, 5, 9])):
        length = rng.choice([1, 2, 15, 16, 17, 64, 65, rng.randint(1, 200), rng.randint(1, longest)])
        found.append(
            (length, rng.choice([0, 1, 1, 1, min(length, 5), min(length, 130), rng.randint(1, min(length, 200))]))
        )
    return found if any(rows for _, rows in found) else [(40, 2)]


def facts_of(rng: random.Random, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """What may shape attention, in any mixture."""
    facts: dict[str, Any] = {"scale": 0.2, "causal": rng.random() < 0.7}
    facts["window"] = rng.choice([None, None, 1, 7, 64, 1500])
    facts["softcap"] = rng.choice([None, None, 3.0, 50.0])
    facts["chunk"] = rng.choice([None, None, None, 5, 32])
    if rng.random() < 0.3:
        facts["sinks"] = torch.randn(heads, dtype=dtype)
    if rng.random() < 0.3:
        facts["slopes"] = torch.rand(heads) * 0.3
    return facts


@needs_compiler
@pytest.mark.parametrize("seed", range(50))
def test_attention_equals_its_definition(seed: int, paged: Callable[..., Any]) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim = rng.choice(DTYPES), rng.choice([8, 64, 64, 72, 80, 96, 128, 192, 256])
    kv_heads, group = rng.choice([(1, 4), (2, 1), (2, 3), (3, 3), (8, 4), (1, 71)])
    batch = paged(
        parts_of(rng, 1500), rng.choice([1, 3, 16, 32, 64, 128]), kv_heads * group, kv_heads, dim, dtype, seed
    )
    q = batch.q
    if rng.random() < 0.5:  # rows and heads that lie apart
        q = torch.full((len(q), q.shape[1] + 2, 2 * dim), torch.nan, dtype=dtype)[:, 1:-1, :dim].copy_(q)
    facts = facts_of(rng, kv_heads * group, dtype)
    got = attention_native.attention(q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    want = attention.reference(q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    torch.testing.assert_close(got.float(), want.float(), atol=attention_native.TOLERANCE[dtype], rtol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [72, 96])
def test_values_inside_the_keys(dim: int, dtype: torch.dtype, paged: Callable[..., Any]) -> None:
    batch = paged([(70, 1), (33, 20), (5, 5), (1200, 1)], 16, 8, 1, dim, dtype)
    facts = {"scale": 0.1, "value_dim": 64}
    got = attention_native.attention(batch.q, batch.k_cache, None, batch.ragged, **facts)
    want = attention.reference(batch.q, batch.k_cache, None, batch.ragged, **facts)
    assert got.shape == (27, 8, 64)
    torch.testing.assert_close(got.float(), want.float(), atol=attention_native.TOLERANCE[dtype], rtol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context(dtype: torch.dtype, paged: Callable[..., Any]) -> None:
    """100,000 tokens behind one row, and a chunk of rows beside it."""
    batch = paged([(100_000, 1), (64, 64)], 128, 4, 2, 64, dtype)
    got = attention_native.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.125)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.125)
    torch.testing.assert_close(got.float(), want.float(), atol=attention_native.TOLERANCE[dtype], rtol=0)


def one_by_one(ragged: Ragged) -> Iterator[tuple[slice, Ragged]]:
    """Every row as a batch of its own."""
    for s, length in enumerate(ragged.host_lengths.tolist()):
        start, stop = ragged.host_starts[s : s + 2].tolist()
        for row in range(start, stop):
            starts = torch.tensor([0, 1], dtype=torch.int32)
            lengths = torch.tensor([length - (stop - row) + 1], dtype=torch.int32)
            at = slice(row, row + 1)
            alone = (ragged.positions[at], ragged.slots[at], starts, lengths, ragged.table[s : s + 1])
            yield at, Ragged(*alone, starts.numpy(), lengths.numpy())


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_a_row_is_the_same_in_any_batch(seed: int, threads: int, paged: Callable[..., Any]) -> None:
    """Bit for bit: alone, among others, in the middle of a chunk; by one thread or by several."""
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    parts = [(rng.randint(1, 3000), 1), (rng.randint(20, 400), 17), (3, 3), (rng.randint(1000, 2100), 40)]
    batch = paged(rng.sample(parts, rng.randint(2, 4)), 16, 12, rng.choice([1, 2, 3, 12]), 64, dtype, seed)
    facts = facts_of(rng, 12, dtype) | {"causal": True}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = attention_native.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    torch.set_num_threads(before)
    for row, alone in one_by_one(batch.ragged):
        found = attention_native.attention(batch.q[row], batch.k_cache, batch.v_cache, alone, **facts)
        assert torch.equal(found, together[row])


@needs_compiler
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_nan_is_not_lost(sinks: bool, rows: int, paged: Callable[..., Any]) -> None:
    """Nor where it is all that a tile or a part of the keys holds."""
    batch = paged([(1500, rows)], 16, 4, 2, 64, torch.bfloat16)
    facts = {"scale": 0.2, "sinks": torch.zeros(4) if sinks else None}
    for begin, stop in ((0, 64), (0, 1024), (1100, 1101)):
        k = batch.k_cache.clone()
        k[batch.ragged.table[0, begin // 16 : -(-stop // 16)].long(), begin % 16 :, 1] = torch.nan
        got = attention_native.attention(batch.q, k, batch.v_cache, batch.ragged, **facts)
        assert got[:, 2:].isnan().all()
        assert got[:, :2].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("lengths", [[100] * 40 + [5000], [2100] * 20])
def test_long_sequences_among_many_are_cut(lengths: list[int], paged: Callable[..., Any]) -> None:
    """Not a bit depends on whether they are."""
    batch = paged([(length, 1) for length in lengths], 16, 4, 2, 64, torch.bfloat16)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(attention_native.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.2))
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 2), (192, 70), (97, 64), (576, 576), (128, 2050)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_equal_torch_s_and_are_the_same_in_any_batch(
    dtype: torch.dtype, outputs: int, inputs: int, biased: bool
) -> None:
    """oneDNN's of one row differ from the same row's among others in 576 x 1536 float32."""
    torch.manual_seed(outputs)
    weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)
    order = packed(weight, invariant=True)
    assert is_packed(order)
    assert isinstance(order, Packed)
    x = torch.randn(401, inputs + 2).to(dtype)[:, :inputs]
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    together = linear(x, order, bias if biased else None)
    close = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(together.double(), want, atol=1e-3 if dtype != torch.float32 else 1e-5, rtol=close)
    for rows in (0, 1, 2, 5, 6, 7, 8, 13, 64, 385):
        assert torch.equal(linear(x[7 : 7 + rows], order, bias if biased else None), together[7 : 7 + rows])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "outputs", "inputs"), [(3, 64, 16), (5, 40, 70), (2, 16, 8)])
def test_products_of_heads_are_those_of_matrices(dtype: torch.dtype, heads: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs)
    weight = (torch.randn(heads, outputs, inputs) / inputs**0.5).to(dtype)
    order = packed_heads(weight, invariant=True)
    assert order is not None
    each = [packed(matrix, invariant=True) for matrix in weight]
    wide = torch.randn(400, heads, inputs + 4).to(dtype)
    for x in (wide[..., 2:-2], wide[:1, :, :inputs], wide[:7, :, 1 : inputs + 1], wide[:0, :, :inputs]):
        found = linear_heads(x, order)
        want = torch.stack([linear(x[:, head].contiguous(), matrix) for head, matrix in enumerate(each)], 1)
        assert torch.equal(found, want)
    torch.testing.assert_close(
        linear_heads(wide[..., :inputs].float(), weight.float()),
        linear_heads(wide[..., :inputs], order).float(),
        atol=2e-2,
        rtol=2e-2,
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 16, 72, 576, 5000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_equal_their_definitions(dtype: torch.dtype, width: int, offset: float) -> None:
    close = {"atol": norm_native.TOLERANCE[dtype], "rtol": 0}
    x, y = torch.randn(2, 19, width).to(dtype)
    weight = torch.rand(width).to(dtype)
    for scale in (1.0, 0.22):
        got = norm_native.add_rms_norm(x, y, weight, 1e-5, offset, scale)
        want = add_rms_norm.reference(x, y, weight, 1e-5, offset, scale)
        torch.testing.assert_close(got, want, **close)
    heads = torch.randn(19, 7, width + 3).to(dtype)[:, 1:5, :width]
    for rows in (x, heads, x[:0]):
        for weights in (weight, None):
            got = norm_native.rms_norm(rows, weights, 1e-5, offset)
            torch.testing.assert_close(got, rms_norm.reference(rows, weights, 1e-5, offset), **close)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "clamped"])
def test_gates_equal_their_definition(dtype: torch.dtype, activation: str) -> None:
    for rows, width in ((0, 8), (1, 5), (3, 16), (40, 1536)):
        x = torch.randn(rows, 2 * width).to(dtype) * 3
        got, want = activation_native.gated(x, activation, 4.0), gated.reference(x, activation, 4.0)
        close = activation_native.TOLERANCE[dtype]
        torch.testing.assert_close(got, want, atol=close, rtol=close)
    extreme = torch.tensor([[-1e4, 1e4, 0.0, -90.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    torch.testing.assert_close(activation_native.gated(extreme, activation), gated.reference(extreme, activation))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (80, 32), (8, 6), (128, 128), (256, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turned_and_written(
    dtype: torch.dtype, dim: int, turned: int, interleaved: bool, paged: Callable[..., Any]
) -> None:
    batch = paged([(37, 3), (5, 1), (300, 200)], 16, 6, 2, dim, dtype)
    x = torch.randn(204, 10, dim).to(dtype)
    angle = torch.rand(204, 1, turned) * 6
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    caches = [(batch.k_cache.clone(), batch.v_cache.clone()) for _ in range(2)]
    found: list[Tensor] = []
    for run, (k, v) in zip((cache_native.turn_and_write, turn_and_write.reference), caches, strict=True):
        parts = x.clone().split_with_sizes([6, 2, 2], 1)
        found.append(run(*parts, angles, k, v, batch.ragged, interleaved=interleaved))
    close: dict[str, Any] = {"atol": cache_native.TOLERANCE[dtype], "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(*found, **close)
    torch.testing.assert_close(caches[0][0], caches[1][0], **close)
    assert torch.equal(caches[0][1].nan_to_num(), caches[1][1].nan_to_num())


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    found = native.native.__wrapped__()
    assert found.library is None
    assert "no C++ compiler" in found.text
    assert "slower" in caplog.text


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", ("--no-such-flag",))
    found = native.native.__wrapped__()
    assert found.library is None
    assert "no-such-flag" in found.text
    assert [path.name for path in (tmp_path / "kvasir" / "compiled").iterdir()] == ["kernels.lock"]


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_folders_of_a_run_of_tests_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server that a test starts would compile it again."""
    monkeypatch.setattr(compiled, "build", lambda *_: pytest.fail("compiled again"))
    assert "compiled before" in native.native.__wrapped__().text


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_the_library_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Path(native.library()._name)  # type: ignore[union-attr]
    monkeypatch.setenv("XDG_CACHE_HOME", str(found.parents[2]))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    monkeypatch.setattr(compiled, "key_of", lambda program, sources: found.stem.removeprefix("kernels-"))
    assert "compiled before" in native.native.__wrapped__().text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder where a compiler takes no time; the user's cache and temporary files are below it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compiled, "compiler", lambda: "c++")
    monkeypatch.setattr(compiled, "key_of", lambda program, sources: "0")
    monkeypatch.setattr(compiled, "build", lambda program, sources, made: made.write_text("own"))
    return tmp_path


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_what_others_could_have_written_is_not_run(quick: Path, mode: int) -> None:
    folder = quick / "cache" / "kvasir" / "compiled"
    folder.mkdir(parents=True)
    (folder / "a-0.so").write_text("planted")
    folder.chmod(mode)
    target, _ = compiled.compiled("a", [])
    assert (target.parent, target.read_text()) == (quick / f"kvasir-{os.geteuid()}", "own")
    target.parent.chmod(mode)
    with pytest.raises(
        compiled.NativeError, match=rf"others may write to {folder} .*; others may write to {target.parent} "
    ):
        compiled.compiled("a", [])


def test_what_another_user_made_is_not_run(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    for folder in (quick / "cache" / "kvasir" / "compiled", quick / f"kvasir-{own}"):
        folder.mkdir(mode=0o700, parents=True)
        (folder / "a-0.so").write_text("planted")
        if own == 0:  # whose code everybody may run
            os.chown(folder, 4711, -1)
    if own:
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(compiled.NativeError, match=r"belongs to another user; .* belongs to another user"):
        compiled.compiled("a", [])


@pytest.mark.parametrize("whose", ["link", "file"])
def test_a_link_or_a_file_of_another_user_is_not_run(quick: Path, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link may lead elsewhere by the time it is followed; a file may be left from when its folder was open."""
    (quick / "cache").write_text("a file")
    (quick / "own").mkdir(mode=0o700)
    link = quick / f"kvasir-{os.geteuid()}"
    link.symlink_to(quick / "own")
    target, _ = compiled.compiled("a", [])
    assert target.read_text() == "own"
    another, lstat = {"link": link, "file": target}[whose], Path.lstat

    def looked_at(path: Path) -> os.stat_result:
        mode, number, device, links, owner, *rest = lstat(path)
        return os.stat_result((mode, number, device, links, 4711 if path == another else owner, *rest))

    monkeypatch.setattr(Path, "lstat", looked_at)
    with pytest.raises(compiled.NativeError, match=f"{another} belongs to another user"):
        compiled.compiled("a", [])


def test_without_a_cache_folder_temporary_files_hold_the_library(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (quick / "cache").write_text("a file")
    assert compiled.compiled("a", [])[1].startswith(f"{quick}/kvasir-{os.geteuid()}/a-0.so, compiled in")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert compiled.compiled("a", [])[1] == f"{quick}/kvasir-{os.geteuid()}/a-0.so, compiled before"


def test_a_kept_library_is_found_where_nothing_can_be_written(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = compiled.compiled("a", [])
    monkeypatch.setattr(compiled, "_alone", lambda lock: pytest.fail("written to"))
    assert compiled.compiled("a", []) == (target, f"{target}, compiled before")


@needs_compiler
def test_of_processes_that_start_at_once_one_compiles(tmp_path: Path) -> None:
    """The second waits for the first; the compiler is a script that takes its time and notes each call that links."""
    calls, fake = tmp_path / "calls", tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo 1\n"
        f'case "$*" in *-shared*) echo x >> {calls}; sleep 0.5;; esac\n'
        'while [ "$1" != -o ]; do shift; done\ntouch $2\n'
    )
    fake.chmod(0o700)
    sources = f"[Path({str(native.HERE / 'threads_cpu.cpp')!r})]"  # of any; this one without torch
    code = f"from pathlib import Path; from kvasir.kernels.compiled import compiled; print(compiled('a', {sources})[1])"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [run.communicate()[0] for run in runs]
    assert calls.read_text() == "x\n"
    assert sum("compiled in" in text for text in said) == 1


def test_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_KERNELS", "torch")
    assert native.native.__wrapped__().text == "not used: KVASIR_KERNELS=torch"


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0")
"""Unoptimised: to compile them optimised, with what watches them, takes a minute more than all else together."""
SHAPES = """
import random
import sys
from pathlib import Path
from kvasir.kernels import native
native._compiled = lambda: (Path(sys.argv[1]), "sanitized")
assert native.library() is not None, native.native().text
import pytest

class Some:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        shapes, rng = {}, random.Random(0)
        for item in items:
            if not item.nodeid.endswith(("-reference]", "-cpu]")):
                shapes.setdefault(item.originalname, []).append(item)
        items[:] = [item for each in shapes.values() for item in rng.sample(each, -(-len(each) // 4))]

options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", *sys.argv[2:]]
sys.exit(pytest.main(options, plugins=[Some()]))
"""
CHOSEN = "(equal or same or keys or turned) and not sanitizers"
"""Tests that run the kernels; the long context would take minutes."""


@pytest.fixture(scope="module")
def sanitized(compiled_once: Callable[..., Path]) -> tuple[Path, str]:
    """(library under AddressSanitizer and UBSan, what must be loaded before it)."""
    compiler = compiled.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def make(target: Path) -> None:
        compiled.build(compiler, native.sources(), target, *SANITIZERS)

    try:
        target = compiled_once("sanitized", native.sources(), SANITIZERS, make)
    except compiled.NativeError as error:
        pytest.skip(f"it has no sanitizers: {error}")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in found[:2]):
        pytest.skip(f"{compiler} keeps its sanitizers where they can't be preloaded")
    return target, " ".join(path for path in found if os.path.isabs(path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_sanitizers(sanitized: tuple[Path, str]) -> None:
    """A quarter of each test's shapes again: no read or write beside what was given, nothing undefined."""
    library, preload = sanitized
    env = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    others = ("quantise", "sample", "moe", "packed_experts", "packed_mixture")
    files = [__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in others)]
    files.append(str(Path(__file__).parents[1] / "engine" / "test_stacking.py"))
    call = [sys.executable, "-c", SHAPES, str(library), *files, "-k", CHOSEN]
    run = subprocess.run(call, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
