from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from kvasir.kernels import op as module
from kvasir.kernels.native import Native
from kvasir.kernels.op import op


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
