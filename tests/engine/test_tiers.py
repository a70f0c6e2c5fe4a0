"""A cache with host memory and a disk below it: the same tokens, from what earlier prompts and earlier processes left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_models import FAMILIES
from waiting import until

from kvasir.engine.disk_folder import claim
from kvasir.engine.llm import LLM
from kvasir.engine.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [random.Random(2).randrange(3, 90) for _ in range(150)]
Answer = tuple[list[int], int]
"""(tokens, how many of the prompt's were cached)"""


def ask(llm: LLM, prompt: Sequence[int] = PROMPT) -> Answer:
    (output,) = llm.generate([list(prompt)], GREEDY, use_tqdm=False)
    assert llm.engine.pool.check() == []
    assert llm.engine.pool.num_used == 0
    return list(output.outputs[0].token_ids), output.num_cached_tokens or 0


def stats(llm: LLM) -> dict[str, int]:
    assert llm.engine._tiers is not None
    return llm.engine._tiers.counts()


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    base = {"dtype": "float32", "num_threads": 1, "block_size": 8, "skip_tokenizer_init": True, "max_num_seqs": 8}
    return {**base, "kv_disk_path": str(folder), "kv_cache_memory_bytes": 1 << 21, **changes}


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., tuple[Path, Any]]) -> Path:
    return checkpoint("Llama")[0]


@pytest.fixture(scope="module")
def filled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A disk with the blocks of PROMPT, and what follows it."""
    folder = tmp_path_factory.mktemp("kv")
    with LLM(str(llama), **options(folder)) as llm:
        tokens, cached = ask(llm)
        assert cached == 0
        deadline = time.monotonic() + 60
        while stats(llm)["disk_stored"] < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(blocks(folder)) == 20  # 150 + 11 tokens
    return folder, tokens


@pytest.fixture
def disk(filled: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(filled[0], tmp_path / "kv"))


def test_a_second_process_starts_from_the_disk(llama: Path, filled: tuple[Path, list[int]], disk: Path) -> None:
    with LLM(str(llama), **options(disk)) as llm:
        assert ask(llm) == (filled[1], 144)
        assert stats(llm)["disk_loaded"] == 18
        turn = [*PROMPT, *filled[1], 5, 6, 7]
        second = ask(llm, turn)
        assert second[1] >= 160
    assert LLM(str(llama), **options(disk, kv_disk_path=None)).engine._tiers is None
    with LLM(str(llama), **options(disk, kv_disk_path=None)) as llm:
        assert ask(llm, turn) == (second[0], 0)


def test_what_the_tiers_hold_is_told(llama: Path, tmp_path: Path) -> None:
    """To who routes: what an earlier process left, and what is stored and evicted from then on."""
    found: dict[str, set[bytes]] = {"device": set(), "host": set(), "disk": set()}

    def tell(tier: str, changes: Mapping[bytes, bool]) -> None:
        for content, held in changes.items():
            (found[tier].add if held else found[tier].discard)(content)

    for left in (0, 20):
        with LLM(str(llama), **options(tmp_path, kv_offloading_size=0.001)) as llm:
            for contents in found.values():
                contents.clear()
            llm.engine.listen(tell)
            until(lambda left=left: len(found["disk"]) == left)  # type: ignore[misc]
            ask(llm, [*PROMPT, left])
            tiers = llm.engine._tiers
            assert tiers is not None
            disk, host = tiers._disk.shelf, tiers._host.shelf  # type: ignore[union-attr]
            until(lambda disk=disk: found["device"] <= found["disk"] == {*disk})  # type: ignore[misc]
            until(lambda host=host: found["host"] == {*host})  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer(family: str, checkpoint: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    """Windows, groups of layers, latent attention; a sliding layer's blocks that no row sees aren't read."""
    folder, _ = checkpoint(family, **FAMILIES[family])
    with LLM(str(folder), **options(tmp_path, kv_disk_path=None)) as llm:
        cold = [ask(llm, PROMPT[:length])[0] for length in (150, 100)]
    with LLM(str(folder), **options(tmp_path)) as llm:
        assert ask(llm)[0] == cold[0]
    for length, wanted in zip((150, 100), cold, strict=True):
        with LLM(str(folder), **options(tmp_path, max_num_batched_tokens=40)) as llm:
            tokens, cached = ask(llm, PROMPT[:length])
            assert tokens == wanted
            assert cached == length // 8 * 8
            groups = llm.engine._groups
            assert stats(llm)["disk_loaded"] < cached // 8 * groups or groups == 1


@pytest.mark.parametrize("where", ["host", "disk", "both"])
def test_blocks_that_had_to_leave_the_cache_come_back(llama: Path, tmp_path: Path, where: str) -> None:
    small = {"kv_cache_memory_bytes": 300_000, "max_model_len": 200}
    tiers = {"kv_disk_path": None if where == "host" else str(tmp_path), "kv_offloading_size": 0.01 * (where != "disk")}
    prompts = [[10 + i, *PROMPT[i : i + 140]] for i in range(6)]
    with LLM(str(llama), **options(tmp_path, kv_disk_path=None, **small)) as llm:
        cold = [ask(llm, prompt)[0] for prompt in prompts]
        assert [ask(llm, prompt)[1] for prompt in prompts] == [0] * 6
    with LLM(str(llama), **options(tmp_path, **{**small, **tiers})) as llm:
        assert [ask(llm, prompt)[0] for prompt in prompts] == cold
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == cold
        assert [output.num_cached_tokens for output in outputs] == [136] * 6
        said = stats(llm)
        assert llm.engine.stats().prefix_hits >= 6 * 136
        if where != "disk":
            assert said["host_loaded"] > 50
        if where != "host":
            assert said["disk_stored"] > 100


# -- whatever happens to the disk: speed, not answers


def spoil_bytes(folder: Path) -> None:
    for path in blocks(folder)[::3]:
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 255
        path.write_bytes(whole)


def spoil_sizes(folder: Path) -> None:
    for path in blocks(folder)[::2]:
        os.truncate(path, 100)


def spoil_places(folder: Path) -> None:
    names = blocks(folder)
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)


def spoil_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("this is no folder")


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_sizes, spoil_places, spoil_folder])
def test_a_bad_block_is_computed(
    llama: Path, filled: tuple[Path, list[int]], disk: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(disk)
    with LLM(str(llama), **options(disk)) as llm:
        tokens, cached = ask(llm)
        assert tokens == filled[1]
        assert cached < 144
        assert ask(llm)[0] == filled[1]
    with LLM(str(llama), **options(disk)) as llm:
        assert ask(llm) == (filled[1], 0 if spoil is spoil_folder else 144)  # what was bad has been written again


def test_what_is_forgotten_is_unknown_at_once(llama: Path, filled: tuple[Path, list[int]], disk: Path) -> None:
    """Blocks that are computed meanwhile would not be saved, and then be dropped."""
    with LLM(str(llama), **options(disk)) as llm:
        tiers, written = llm.engine._tiers, threading.Event()
        assert tiers is not None
        (content, *_) = tiers._disk.shelf  # type: ignore[union-attr]
        (lane,) = tiers._lanes
        lane.put(lambda: written.wait(60))
        tiers.forget([content])
        assert not tiers.knows(content)
        written.set()
        until(lambda: content not in tiers._disk.shelf)  # type: ignore[union-attr]
        assert ask(llm)[0] == filled[1]
        until(lambda: tiers.knows(content) and not lane._forgotten)


def test_an_unplugged_disk(llama: Path, filled: tuple[Path, list[int]], disk: Path) -> None:
    with LLM(str(llama), **options(disk)) as llm:
        shutil.rmtree(disk)
        assert ask(llm) == (filled[1], 0)
        llm.engine.pool.reset()
        assert ask(llm) == (filled[1], 0)


def test_a_disk_that_hangs(
    llama: Path, filled: tuple[Path, list[int]], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It delays one request, not for long, and is asked again when it has come round."""
    monkeypatch.setattr("kvasir.engine.loads.FETCH_S", 0.3)
    with LLM(str(llama), **options(disk)) as llm:
        tiers, go = llm.engine._tiers, threading.Event()
        assert tiers is not None
        assert tiers._disk is not None
        read = tiers._disk.read
        monkeypatch.setattr(tiers._disk, "read", lambda *said: go.wait() and read(*said))
        began = time.monotonic()
        assert ask(llm) == (filled[1], 0)
        assert time.monotonic() - began > 0.3
        llm.engine.pool.reset()
        assert ask(llm) == (filled[1], 0)
        llm.engine.pool.reset()
        go.set()
        until(lambda: not llm.engine._scheduler._loads._overdue)
        assert ask(llm) == (filled[1], 144)


def test_host_memory_answers_while_the_disk_is_overdue(
    llama: Path, filled: tuple[Path, list[int]], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.engine.loads.FETCH_S", 0.3)
    with LLM(str(llama), **options(disk, kv_offloading_size=0.01)) as llm:
        tiers, go = llm.engine._tiers, threading.Event()
        assert tiers is not None
        assert tiers._disk is not None
        monkeypatch.setattr(tiers._disk, "read", lambda *said: go.wait(60) and False)
        assert ask(llm) == (filled[1], 0)
        assert llm.engine._scheduler._loads._overdue
        until(lambda: stats(llm)["host_stored"] >= 18)
        llm.engine.pool.reset()
        monkeypatch.setattr("kvasir.engine.loads.FETCH_S", 60.0)
        assert ask(llm) == (filled[1], 144)
        go.set()


def test_a_full_disk(llama: Path, filled: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Room for five blocks: a prompt of 18 is answered, and later ones from what is there."""
    size = blocks(filled[0])[0].stat().st_size
    for _ in range(2):
        with LLM(str(llama), **options(tmp_path, kv_disk_size=5 * size + 10)) as llm:
            assert ask(llm)[0] == filled[1]
            assert ask(llm, PROMPT[:20])[0]
        assert 0 < len(blocks(tmp_path)) <= 5


@pytest.mark.parametrize("change", ["weights", "config", "dtype", "block_size", "hf_overrides"])
def test_blocks_of_another_model_are_not_taken(
    llama: Path, filled: tuple[Path, list[int]], disk: Path, tmp_path: Path, change: str
) -> None:
    model, given = Path(shutil.copytree(llama, tmp_path / llama.name)), options(disk)
    if change == "weights":
        weights = model / "model.safetensors"
        whole = bytearray(weights.read_bytes())
        whole[-1000:] = random.Random(0).randbytes(500) + whole[-500:]
        weights.write_bytes(whole)
    elif change == "config":
        path = model / "config.json"
        before = path.read_text()
        path.write_text(before.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
        assert path.read_text() != before
    elif change == "dtype":
        given["dtype"] = "bfloat16"
    elif change == "block_size":
        given["block_size"] = 16
    else:
        given["hf_overrides"] = {"rms_norm_eps": 0.2}
    with LLM(str(model), **given) as llm:
        assert ask(llm)[1] == 0


def test_a_copy_of_the_model_has_its_blocks(
    llama: Path, filled: tuple[Path, list[int]], disk: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / llama.name))  # with the times of the files
    with LLM(str(model), **options(disk)) as llm:
        assert ask(llm) == (filled[1], 144)


def test_tenants_do_not_see_each_others_blocks(llama: Path, disk: Path) -> None:
    with LLM(str(llama), **options(disk)) as llm:
        for number, (salt, wanted) in enumerate((("tenant", 0), ("", 144))):
            request = Request(request_id=f"r{number}", prompt_token_ids=PROMPT, sampling=GREEDY, cache_salt=salt)
            (output,) = llm._run([(request, None)], use_tqdm=False)
            assert output.num_cached_tokens == wanted


# -- processes that are killed

GENERATE = """
import json, sys
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.request import Request, SamplingParams
model, options, prompt = json.loads(sys.argv[1])
llm = LLM(model, **options)
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
llm.generate([prompt], greedy, use_tqdm=False)
print("served", flush=True)
for i in range(10**6):
    llm.generate([[i % 90, i // 90, *prompt]], greedy, use_tqdm=False)
"""


def killed(model: Path, given: dict[str, Any], folder: Path) -> None:
    """A process that has answered PROMPT and is busy with others, whose blocks are written too."""
    import json

    command = [sys.executable, "-c", GENERATE, json.dumps([str(model), given, PROMPT])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"served\n"
        try:
            until(lambda: len(blocks(folder)) > 40)
        finally:
            process.send_signal(signal.SIGKILL)


def test_after_a_kill_a_prompt_starts_from_the_disk(
    llama: Path, filled: tuple[Path, list[int]], tmp_path: Path
) -> None:
    given = options(tmp_path, tensor_parallel_size=2)
    killed(llama, given, tmp_path)
    with LLM(str(llama), **given) as llm:
        assert ask(llm) == (filled[1], 144)


# -- several ranks


@pytest.mark.parametrize("kept", ["auto", "fp8"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_the_types_of_caches(llama: Path, tmp_path: Path, tp: int, pp: int, kept: str) -> None:
    """In 16 and in 8 bits, too, a prompt says from the disk what it said when it was computed."""
    ranks = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    given = options(tmp_path, dtype="bfloat16", kv_cache_dtype=kept, **ranks)
    with LLM(str(llama), **given) as llm:
        cold, cached = ask(llm)
        assert cached == 0
        until(lambda: len(blocks(tmp_path)) == 20 * tp * pp)
        llm.engine.pool.reset()
        assert ask(llm) == (cold, 144)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_every_rank_keeps_its_share(
    llama: Path, filled: tuple[Path, list[int]], tmp_path: Path, tp: int, pp: int
) -> None:
    given = options(tmp_path, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    with LLM(str(llama), **given) as llm:
        assert ask(llm) == (filled[1], 0)
        assert ask(llm) == (filled[1], 144)
        until(lambda: len(blocks(tmp_path)) == 40)
    with LLM(str(llama), **given) as llm:
        assert ask(llm) == (filled[1], 144)
    (second,) = tmp_path.glob("*/0/1")
    for path in blocks(second)[::2]:
        path.write_bytes(b"")
    with LLM(str(llama), **given, kv_offloading_size=0.01) as llm:  # it is a matter of all ranks
        tokens, cached = ask(llm)
        assert tokens == filled[1]
        assert cached < 144
        llm.engine.pool.reset()
        until(lambda: len(blocks(second)) >= 18)
        assert ask(llm) == (filled[1], 144)


def test_a_rank_without_a_disk_leaves_none_to_the_others(
    llama: Path, filled: tuple[Path, list[int]], tmp_path: Path
) -> None:
    given = options(tmp_path, tensor_parallel_size=2)
    LLM(str(llama), **given).shutdown()
    (folder,) = tmp_path.iterdir()
    lock = claim(tmp_path, folder.name, 1, 0)
    assert lock is not None
    with LLM(str(llama), **given) as llm:
        assert llm.engine._tiers is None
        assert ask(llm)[0] == filled[1]
    lock.close()


@pytest.mark.parametrize("path", ["auto", "{tmp}/file/kv", "/proc/nowhere/kv"])
def test_a_disk_that_cannot_be_had_is_said_and_done_without(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", _no_home)
    with LLM(str(llama), **options(tmp_path, kv_disk_path=path.format(tmp=tmp_path))) as llm:
        assert llm.engine._tiers is None
        assert "no KV blocks are kept on disk" in caplog.text
        assert ask(llm)[0]


def _no_home(path: Path) -> Path:
    if str(path).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return path
