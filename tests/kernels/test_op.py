from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kvasir.kernels import measured as measurements
from kvasir.kernels import op as module
from kvasir.kernels.measured import Measured, means, table
from kvasir.kernels.native import Native
from kvasir.kernels.op import Op, every_op, op


def double(x: torch.Tensor) -> torch.Tensor:
    """The definition."""
    return x * 2


@pytest.fixture
def sibling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    faster = ModuleType(f"{__name__}_cpu")
    faster.double = lambda x: x + x  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, faster.__name__, faster)
    return faster


def test_picks_the_sibling_of_the_device(sibling: ModuleType) -> None:
    both = op("cpu")(double)
    assert both.implementation("cpu") is sibling.double
    assert both.implementation("cuda") is both.reference is double
    assert both(torch.ones(2)).tolist() == [2, 2]
    assert both.__doc__ == "The definition."


def test_reference_can_be_forced(sibling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORCED", "reference")
    assert op("cpu")(double).implementation("cpu") is double


def test_missing_sibling_is_an_error_at_once() -> None:
    with pytest.raises(ModuleNotFoundError, match="_cpu"):
        op("cpu")(double)(torch.ones(1))


def test_a_backend_can_be_chosen(sibling: ModuleType) -> None:
    """By the names that users know; what isn't there is refused with what is."""
    both = op("cpu")(double)
    assert both.choices("cpu") == ["torch", "plain"]
    assert both.choices("cuda") == ["plain"]
    assert both.backend("plain", "cpu") is double
    assert both.backend("torch", "cpu") is sibling.double
    assert both.backend("auto", "cpu") is both
    with pytest.raises(ValueError, match="no triton backend on cpu here, only torch, plain"):
        both.backend("triton", "cpu")


def test_why_a_backend_is_taken(sibling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op("cpu")(double).why("cpu") == "the fastest that is written"
    assert op("triton")(double).why("cpu") == "nothing else is written"
    monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(module, "native", lambda: Native(None, "there is no C++ compiler"))
    assert op("native", "cpu")(double).why("cpu") == "no native kernels: there is no C++ compiler"
    monkeypatch.setattr(module, "has_triton", lambda: False)
    assert op("native", "triton")(double).why("cuda") == "no triton kernels: Triton isn't installed"
    monkeypatch.setattr(module, "FORCED", "torch")
    assert op("native", "cpu")(double).why("cpu") == "KVASIR_KERNELS=torch"


@pytest.fixture
def partial(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An operator of torch's that can't do what is negative, beside one of Triton's."""
    triton, torchs = ModuleType(f"{__name__}_triton"), ModuleType(f"{__name__}_torch")
    triton.double = lambda x: x + x  # type: ignore[attr-defined]
    torchs.double = lambda x: x.mul(2)  # type: ignore[attr-defined]
    torchs.unfit = lambda x: "it takes no negative numbers" if (x < 0).any() else ""  # type: ignore[attr-defined]
    torchs.absent = lambda: ""  # type: ignore[attr-defined]
    torchs.LIMITS = "positive numbers"  # type: ignore[attr-defined]
    for sibling in (triton, torchs):
        monkeypatch.setitem(sys.modules, sibling.__name__, sibling)
        monkeypatch.setattr(sibling, "double", Mock(wraps=sibling.double))
    monkeypatch.setattr(module, "has_triton", lambda: True)
    return torchs


def measured(monkeypatch: pytest.MonkeyPatch, **us: Any) -> None:
    found = Measured("2026-12-01", "NVIDIA H200", "2.13.0", "3.6.0", us)
    monkeypatch.setattr(module, "measured", lambda: found)


def runs(given: Op[..., torch.Tensor], *rows: float) -> str:
    """Which backend a GPU would take for them."""
    siblings = {name: sys.modules[f"{__name__}_{name}"].double for name in ("triton", "torch")}
    before = {name: function.call_count for name, function in siblings.items()}
    assert given.implementation("cuda")(torch.tensor(rows)).tolist() == [2 * row for row in rows]
    return ", ".join(name for name, function in siblings.items() if function.call_count > before[name])


def few(x: torch.Tensor) -> bool:
    return len(x) < 3


def test_without_a_measurement_the_default_is_taken(partial: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda: None)
    both = op("triton", "torch", few=few)(double)
    assert runs(both, 1) == runs(both, 1, 2, 3) == both.taken("cuda") == "triton"
    assert both.choices("cuda") == ["triton", "plain", "torch"]
    assert both.why("cuda") == "not measured on this GPU: the default; torch's does positive numbers"
    with monkeypatch.context() as without:
        without.setattr(module, "has_triton", lambda: False)
        alone = op("triton", "torch")(double)
        assert alone.implementation("cuda") is double
        assert alone.choices("cuda") == ["plain", "torch"]
    measured(monkeypatch, another_op={"any": {"torch": 1.0, "triton": 2.0}})
    assert runs(op("triton", "torch", few=few)(double), 1) == "triton"


def test_the_fastest_is_taken_by_kind_of_call(partial: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it can't do falls to the default."""
    measured(
        monkeypatch,
        double={
            "few rows": {"triton": 12.0, "torch": 10.0},
            "many rows": {"triton": 80.0, "torch": 95.0, "plain": 70.0},
        },
    )
    both = op("triton", "torch", few=few)(double)
    assert runs(both, 1, 2) == "torch"
    assert runs(both, 1, -2) == "triton"
    assert runs(both, 1, 2, 3) == "triton"
    assert both.taken("cuda") == "torch for few rows, triton for many rows"
    assert both.why("cuda") == (
        "measured 2026-12-01 on NVIDIA H200 with torch 2.13.0, triton 3.6.0: few rows: torch 10.0 us, against 12.0 us (triton),"
        " many rows: triton 80.0 us, against 70.0 us (plain), 95.0 us (torch); torch's does positive numbers"
    )
    measured(monkeypatch, double={"any": {"triton": 2.0, "torch": 1.0}})
    alike = op("triton", "torch")(double)
    assert runs(alike, 1) == alike.taken("cuda") == "torch"


def test_what_was_fastest_but_is_absent_isn_t_taken(partial: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where KVASIR_KERNELS says something else; what is asked for by name says why there is none."""
    measured(monkeypatch, double={"any": {"triton": 2.0, "torch": 1.0}})
    with monkeypatch.context() as absent:
        absent.setattr(partial, "absent", lambda: "torch is too old")
        both = op("triton", "torch")(double)
        assert runs(both, 1) == both.taken("cuda") == "triton"
        assert both.why("cuda").endswith("torch's can't be had: torch is too old")
        with pytest.raises(ValueError, match="no torch backend on cuda here, only triton, plain: torch is too old"):
            both.backend("torch", "cuda")
    monkeypatch.setattr(module, "FORCED", "reference")
    assert op("triton", "torch")(double).implementation("cuda") is double


def test_what_is_asked_for_by_name_never_falls_back(partial: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda: None)
    both = op("triton", "torch")(double)
    assert both.backend("triton", "cuda") is sys.modules[f"{__name__}_triton"].double
    forced = both.backend("torch", "cuda")
    assert forced(torch.ones(1)).tolist() == [2]
    with pytest.raises(ValueError, match="double by the torch backend: it takes no negative numbers"):
        forced(-torch.ones(1))
    assert both.obstacle("torch", "cuda", -torch.ones(1)) == "it takes no negative numbers"
    assert both.obstacle("triton", "cuda", -torch.ones(1)) == both.obstacle("plain", "cuda", -torch.ones(1)) == ""


def test_the_table_of_measurements_can_be_read() -> None:
    """Whatever GPUs are in it, their ops and backends are ours."""
    ops = every_op()
    for kind, fields in table().items():
        assert kind.startswith(("sm_", "gfx"))
        found = Measured(**fields)  # type: ignore[arg-type]
        for name, by_kind in found.us.items():
            assert set(by_kind) <= {kind for kinds in module.KINDS for kind in kinds}
            backends = set().union(*by_kind.values())
            assert backends <= {*module.BACKENDS["cuda"], "plain"} & {*ops[name]._backends, "plain"}


def test_what_is_measured_is_added_to_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several scripts one after the other, to what is known of another GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(measurements, "kind_of_gpu", lambda: "sm_90")
    monkeypatch.setattr(measurements, "table", lambda: {"sm_80": {"gpu": "NVIDIA A100"}})
    us, file = {"gated": {"any": {"triton": 3.0}}}, tmp_path / "backends.json"
    measurements.save(file, us=us)
    measurements.save(file, sums={"8": 4096})
    measurements.save(file, sums={"2": 1024})
    found = json.loads(file.read_text())
    assert found["sm_80"] == {"gpu": "NVIDIA A100"}
    here = Measured(**found["sm_90"])
    assert (here.gpu, here.torch, here.us, here.sums) == ("NVIDIA H200", torch.__version__, us, {"2": 1024, "8": 4096})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    measurements.save(file, us=us)
    assert json.loads(file.read_text())["sm_90"]["sums"] == {}  # another GPU of the same kind has other links


def test_backends_are_compared_over_the_shapes_that_all_did() -> None:
    figures = [("attention", "few rows", "triton", shape, us) for shape, us in (("a", 4.0), ("b", 9.0), ("c", 1000.0))]
    figures += [("attention", "few rows", "torch", shape, us) for shape, us in (("a", 2.0), ("b", 8.0))]
    figures += [("attention", "many rows", "triton", "d", 5.0), ("route", "any", "triton", "a", 3.0)]
    figures += [("gated", "any", "triton", "a", 3.0), ("gated", "any", "plain", "b", 3.0)]
    assert means(figures) == {
        "attention": {"few rows": {"triton": 6.0, "torch": 4.0}, "many rows": {"triton": 5.0}},
        "route": {"any": {"triton": 3.0}},
    }
