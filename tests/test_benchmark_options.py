"""Scripts in benchmarks/ refuse what they wouldn't read beside other options."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def begin(script: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python benchmarks/SCRIPT.py GIVEN` does."""
    for folder in (FOLDER / "peers", FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", [script, *given.split()])
    importlib.import_module(script).main()


@pytest.mark.parametrize(
    ("script", "given", "name"),
    [
        ("block_events", "--batch 9 --held 8", "--batch"),
        ("engine", "--startup --batch 1", "--batch"),
        ("engine", "--startup --random 1B", "--random"),
        ("engine", "--kv-waste --threads 1000", "--threads"),
        ("engine", "--answers 7", "--answers"),
        ("engine", "--contexts 7", "--contexts"),
        ("engine", "--sweep 1B --prompt 7", "--prompt"),
        ("engine", "--prefix-cache-cost --model skald", "--model"),
        ("kernels", "--cpu-time --threads 1000", "--threads"),
        ("kernels", "--device cuda --cpu-time", "--cpu-time"),
        ("peer_fetch", "skald --ways shm --link 9", "--link"),
        ("compare", "--compiled", "--compiled"),
        ("compare", "--device cuda --threads 1000", "--threads"),
        ("random_outputs", "--set jsonschemabench --marks", "--marks"),
        ("random_outputs", "--set jsonschemabench --format gemma4", "--format"),
        ("replay", "trace --threads 1", "--threads"),
        ("replay", "trace --link 9", "--link"),
        ("replay", "trace --fetch --prefill-budget 9", "--prefill-budget"),
        ("replay", "trace --goals --speed 2", "--speed"),
        ("replay", "trace --url http://127.0.0.1:1 --groups 2", "--groups"),
        ("replay", "trace --fit skald", "a trace"),
        ("replay", "--route --groups 2", "--groups"),
        ("steps", "--cpu-time --threads 1000", "--threads"),
    ],
)
def test_what_would_be_ignored_is_refused(
    script: str, given: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        begin(script, given, monkeypatch)
    assert f"error: {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "given", "said"),
    [
        ("engine", "--kv-waste", "github.com/lm-sys/FastChat"),
        ("random_outputs", "--limit 1", "ShishirPatil/gorilla"),
        ("random_outputs", "--set jsonschemabench", "guidance-ai/jsonschemabench"),
        ("grammar", "--data /absent", "guidance-ai/jsonschemabench"),
        ("grammar", "--data /absent --set suite", "JSON-Schema-Test-Suite"),
        ("replay", "/absent/trace.jsonl --speed 1", "kvcache-ai/Mooncake"),
        ("tiers", "/absent", "model '/absent' was not found"),
        ("peer_fetch", "/absent", "model '/absent' was not found"),
        ("compare", "--model 10M --llama-cpp /absent", "there is no /absent/build/bin/llama-batched-bench"),
        ("compare", "--model 10M --vllm /absent", "the Python of an environment with vLLM"),
    ],
)
def test_what_is_missing_is_named(
    script: str, given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    recorded = importlib.import_module("recorded")
    monkeypatch.setattr(recorded.recorded, "__defaults__", (Path("/absent"),))
    with pytest.raises(SystemExit) as ended:
        begin(script, given, monkeypatch)
    assert said in str(ended.value.code) + capsys.readouterr().err


@pytest.mark.parametrize("chosen", [[], ["suite"], ["jsonschemabench"]])
def test_a_set_s_keywords_alone(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    grammar = importlib.import_module("grammar")
    group = {"schema": {"enum": [1]}, "tests": [{"data": 1, "valid": True}]}
    monkeypatch.setitem(grammar.GROUPS, "suite", lambda data: [("draft7", "enum", group)])
    monkeypatch.setitem(grammar.GROUPS, "jsonschemabench", lambda data: [("jsonschemabench", "some", group)])
    given = ["--set", *chosen] if chosen else []
    monkeypatch.setattr(sys, "argv", ["grammar", "--keywords", *given])
    grammar.main()
    said = capsys.readouterr().out
    assert ("## draft7" in said) == (chosen != ["jsonschemabench"])
    assert ("## jsonschemabench" in said) == (chosen != ["suite"])


OTHERS = """
import sys
sys.path.insert(0, sys.argv[1])
from parallel import others

if __name__ == "__main__":
    with others({"model": "skald", "num_threads": 1}, 1) as begin:
        begin((1, 16, 2))
"""


@pytest.mark.slow
def test_processes_of_parallel_leave_nothing_behind(tmp_path: Path) -> None:
    """No semaphore that Python would warn of."""
    script = tmp_path / "script.py"
    script.write_text(OTHERS)
    done = subprocess.run([sys.executable, script, FOLDER], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
