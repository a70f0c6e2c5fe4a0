"""Many places are filled at once: in order, little ahead, and torch's threads are what they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kvasir.engine import filling
from kvasir.engine.filling import fill_all, fill_each


@dataclass
class Number:
    """Fills its place with a number, and remembers with how many of torch's threads."""

    value: int
    fails: bool = False
    threads: list[int] = field(default_factory=list)
    name: str = "x"
    original: str = "x"
    shape: tuple[int, ...] = (3,)
    nbytes: int = 12
    fetched: bool = False

    def fetch(self, cut: object = None) -> None:
        self.fetched = True

    def copy_to(self, place: Tensor, cut: object = None) -> None:
        if self.fails:
            raise ValueError("broken")
        self.threads.append(torch.get_num_threads())
        place.fill_(self.value)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_place_is_filled_in_order(threads: int) -> None:
    fillers, places = [Number(i) for i in range(20)], [torch.zeros(3) for _ in range(20)]
    assert list(fill_all(zip(fillers, places, [None] * 20, strict=True))) == fillers
    assert [place.tolist() for place in places] == [[i] * 3 for i in range(20)]
    assert {filler.threads[0] for filler in fillers} == {1}
    assert torch.get_num_threads() == threads


def test_no_more_is_asked_for_than_is_worked_on(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "AHEAD", 0)
    asked: list[int] = []

    def placed() -> Iterator[tuple[Number, Tensor, None]]:
        for i in range(20):
            asked.append(i)
            yield Number(i), torch.zeros(3), None

    for done, _ in enumerate(fill_all(placed())):
        assert len(asked) <= done + threads


def test_an_error_ends_it(threads: int) -> None:
    placed = [(Number(i, fails=i == 2), torch.zeros(3), None) for i in range(9)]
    with pytest.raises(ValueError, match="broken"):
        list(fill_all(placed))
    assert torch.get_num_threads() == threads
    assert threading.active_count() < 30


def test_the_system_is_asked_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """For so many bytes of places."""
    monkeypatch.setattr(filling, "AHEAD", 24)
    numbers = [Number(i) for i in range(6)]
    asked = [
        sum(number.fetched for number in numbers)
        for _ in fill_each((number, torch.zeros(3), None) for number in numbers)
    ]
    assert asked == [3, 4, 5, 6, 6, 6]
