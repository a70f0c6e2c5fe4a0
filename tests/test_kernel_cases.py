"""benchmarks/kernels.py measures every op of kernels/, and its cases run."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvasir.kernels.op import every_op

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def kernel_cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("kernel_cases")


def test_every_op_has_a_case(kernel_cases: ModuleType) -> None:
    torch.manual_seed(0)
    place, seen = kernel_cases.Place(torch.device("cpu")), set()
    for model in ("tiny", "tiny latent"):
        for family in kernel_cases.FAMILIES:
            for case in kernel_cases.cases(family, model, place):
                seen.add(case.op)
                assert case.bytes_ > 0, case
                assert len(case.ways) > 0, case
                for run in case.ways.values():
                    run()
    assert set(every_op()) | {"linear", "linear_heads"} == seen


def test_attention_is_measured_over_other_blocks_too(kernel_cases: ModuleType) -> None:
    """By its definition, for the same rows: what it gives goes by the keys alone."""
    place, sizes = kernel_cases.Place(torch.device("cpu")), kernel_cases.SIZES["tiny"]
    found = list(kernel_cases.block_size_cases(kernel_cases.MODELS["tiny"], sizes, place))
    assert [case.shape for case in found] == [f"2 x 70, 1 rows, blocks of {block}" for block in (32, 128, 256)]
    for case, block in zip(found, kernel_cases.OTHER_BLOCKS, strict=True):
        _, k, _, step = case.ways["plain"].args
        assert k.shape[1] == block
        assert step.table.shape[1] == -(-70 // block)
        torch.testing.assert_close(case.ways["native"](), case.ways["plain"](), atol=3e-2, rtol=0)


def test_what_doesnt_fit_is_left_out(
    kernel_cases: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_cases, "available_ram", lambda: 2_000_000_000)
    place = kernel_cases.Place(torch.device("cpu"))
    assert not list(kernel_cases.cases("experts", "Mixtral/TP2", place))
    assert capsys.readouterr().out == (
        "left out: experts, 2 of 8 takes 3.1 GB, and 1.0 GB of the memory may be taken\n"
    )
