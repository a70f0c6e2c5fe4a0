"""Logits processors of an installed package: enabled by name, asked for by requests, and alone with their failures."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.errors import ClientError, ConfigError, UnsupportedError
from kvasir.engine.request import Request

BLOCK_BYTES = 2 * 5 * 16 * 4 * 8 * 4
QUIET = {"use_tqdm": False}
PROMPT = "Once upon a time"
CODE = """
def every_other(arguments, prompt_token_ids):
    least = arguments.get("least", 0)
    if not isinstance(least, int):
        raise ValueError("least must be a token id")
    def process(output, logits):
        chosen = logits.clone()
        chosen[(len(output) + len(prompt_token_ids)) % 2 :: 2] = float("-inf")
        chosen[:least] = float("-inf")
        return chosen
    return process

def add(arguments, prompt_token_ids):
    def process(output, logits):
        logits[arguments["token"]] += arguments.get("by", 100.0)
        return logits
    return process

def breaks(arguments, prompt_token_ids):
    def process(output, logits):
        return logits[:3] if arguments.get("short") and len(output) > 2 else 1 / 0 if len(output) > 4 else logits
    return process
"""
NAMES = ("every_other", "add", "breaks")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A distribution with three processors, and one whose module is missing."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "our_processors.py").write_text(CODE)
    info = folder / "our_processors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-processors\nVersion: 1.0\n")
    lines = [f"{name} = our_processors:{name}" for name in NAMES]
    (info / "entry_points.txt").write_text("\n".join(["[kvasir.logits_processors]", *lines, "gone = nowhere:x"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=":")  # for ranks in processes of their own
        yield folder
    sys.modules.pop("our_processors", None)


@pytest.fixture(scope="module")
def folder(data: Callable[[str], Path]) -> str:
    return str(data("model-stories260k/hf"))


@pytest.fixture(scope="module")
def llm(folder: str, installed: Path) -> Iterator[LLM]:
    with LLM(folder, num_threads=1, logits_processors=NAMES) as made:
        yield made


def asking(processors: Any, **more: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "max_tokens": 40, "ignore_eos": True, "logits_processors": processors, **more})


def ids_of(llm: LLM, sampling: Any, prompt: Any = PROMPT) -> list[list[int]]:
    return next([o.token_ids for o in output.outputs] for output in llm.generate(prompt, sampling, **QUIET))


def test_logits_are_processed(llm: LLM) -> None:
    (plain,) = ids_of(llm, asking({}))
    (ids,) = ids_of(llm, asking({"every_other": {"least": 100}}))
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    start = len(tokenizer.encode(PROMPT))
    assert all(token % 2 != (start + i) % 2 and token >= 100 for i, token in enumerate(ids))
    assert plain != ids
    assert ids_of(llm, asking({"add": {"token": 300}})) == [[300] * 40]
    both = ids_of(llm, asking({"add": {"token": 300}, "every_other": '{"least": 4}'}, temperature=0))[0]
    assert [token == 300 for token in both] == [(start + i) % 2 == 1 for i in range(40)]


def test_barred_tokens_stay_barred(llm: LLM) -> None:
    assert ids_of(llm, asking({"add": {"token": 300}}, allowed_token_ids=[300, 301], temperature=0)) == [[300] * 40]
    (ids,) = ids_of(llm, asking({"add": {"token": 300}}, allowed_token_ids=[301, 302]))
    assert set(ids) <= {301, 302}


@pytest.mark.parametrize("more", [{}, {"mirostat": 2, "mirostat_tau": 3.0}, {"n": 3}], ids=["plain", "mirostat", "n"])
def test_the_same_after_preemption_and_elsewhere(
    folder: str, llm: LLM, more: dict[str, Any], fresh: Callable[..., Any]
) -> None:
    sampling = asking({"every_other": {"least": 3}}, **more)
    wanted = ids_of(llm, sampling)
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 8 * BLOCK_BYTES, "logits_processors": NAMES}
    with LLM(folder, num_threads=1, enable_prefix_caching=False, **options) as small:  # type: ignore[arg-type]
        found = small.generate([PROMPT] * 5, sampling, **QUIET)
        assert [[o.token_ids for o in output.outputs] for output in found] == [wanted] * 5
        assert fresh(small.engine).preemptions > 0
    if "n" not in more:
        request = Request(
            request_id=f"again {more}",
            prompt_token_ids=llm.generate(PROMPT, SamplingParams(max_tokens=1), **QUIET)[0].prompt_token_ids,
            sampling=sampling,
            resume_token_ids=wanted[0][:17],
        )
        assert llm._run([(request, None)], False)[0].outputs[0].token_ids == wanted[0][17:]


def test_beams_are_processed(llm: LLM) -> None:
    found = ids_of(llm, asking({"every_other": {}}, use_beam_search=True, n=3, max_tokens=9))
    assert len({tuple(ids) for ids in found}) == 3
    assert all(a % 2 != b % 2 for ids in found for a, b in itertools.pairwise(ids))


def test_on_several_ranks(folder: str, llm: LLM) -> None:
    sampling = asking({"every_other": {"least": 9}})
    with LLM(folder, num_threads=1, pipeline_parallel_size=2, dtype="float32", logits_processors=NAMES) as group:
        assert ids_of(group, sampling) == ids_of(llm, sampling)


@pytest.mark.parametrize(
    ("arguments", "why"), [({}, "ZeroDivisionError"), ({"short": True}, r"shape \(512,\), got \(3,\)")]
)
@pytest.mark.parametrize("beams", [False, True])
def test_a_failure_costs_its_own_request(llm: LLM, arguments: dict[str, Any], why: str, beams: bool) -> None:
    good = asking({}, max_tokens=12)
    (wanted,) = ids_of(llm, good)
    other = Request(request_id=f"other {why} {beams}", prompt_token_ids=[1, 403, 407], sampling=good)
    llm.engine.submit(other)
    with pytest.raises(ClientError, match=why):
        ids_of(llm, asking({"breaks": arguments}, use_beam_search=beams, n=1 + beams))
    assert llm.engine.failure is None
    assert ids_of(llm, good) == [wanted]


@pytest.mark.parametrize(
    ("processors", "error", "why"),
    [
        ({"unknown": {}}, UnsupportedError, "isn't enabled here .*every_other, add, breaks"),
        ({"every_other": {"least": "x"}}, ClientError, "least must be a token id"),
        ({"add": []}, None, ""),
        ({"add": [3]}, ClientError, "must be an object"),
        ({"add": "{"}, ClientError, "must be JSON"),
        ({"add": {1, 2}}, ClientError, "must be JSON"),
        (["add"], ClientError, "map names"),
    ],
)
def test_what_is_asked_wrongly(llm: LLM, processors: Any, error: Any, why: str) -> None:
    if error is None:
        assert asking(processors).logits_processors == {"add": "{}"}
        return
    with pytest.raises(error, match=why) as refused:
        ids_of(llm, asking(processors))
    assert refused.value.param == "logits_processors"


@pytest.mark.parametrize(
    ("name", "why"), [("absent", "installed: add, breaks, every_other, gone"), ("gone", "nowhere")]
)
def test_what_cannot_be_enabled(folder: str, installed: Path, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        LLM(folder, logits_processors=(name,))
