"""Large memory in huge pages: tensors like any others, and the system is asked for them."""

from __future__ import annotations

import itertools
import mmap
import re
from pathlib import Path

import pytest
import torch

from kvasir.kernels import huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1 << 20), (1025, 2049), (0, 7)])
def test_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = huge_pages.empty(*shape, dtype=dtype)
    assert (found.shape, found.dtype, found.is_contiguous()) == (shape, dtype, True)
    wanted = torch.arange(found.numel()).view(shape).to(dtype)
    assert torch.equal(found.copy_(wanted), wanted)


def test_tensors_share_pages_and_nothing_else() -> None:
    room, shapes = huge_pages.Room(), [(3, 5), (7, 1 << 20), (0, 7), (1 << 13, 1 << 10), (1025, 2049), (1 << 25, 1)]
    made = [
        room.empty(*shape, dtype=dtype).fill_(number)
        for number, (shape, dtype) in enumerate(itertools.product(shapes, (torch.float32, torch.bfloat16)))
    ]
    del room
    for number, found in enumerate(made):
        assert found.is_contiguous()
        assert found.data_ptr() % huge_pages.ALIGNED == 0
        assert bool((found == number).all())
    assert [tuple(found.shape) for found in made] == [shape for shape in shapes for _ in range(2)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_the_system_is_asked_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without huge pages")
    small = huge_pages.Room().empty(100, dtype=torch.uint8)  # the first there
    for found in (huge_pages.empty(9 << 20, dtype=torch.uint8), small):
        assert found.data_ptr() % huge_pages.HUGE == 0
        assert " hg" in flags_of(found)


def flags_of(found: torch.Tensor) -> str:
    areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    (mine,) = (
        area
        for area in areas
        if (ends := [int(end, 16) for end in area.split()[0].split("-")])[0] <= found.data_ptr() < ends[1]
    )
    return next(line for line in mine.splitlines() if line.startswith("VmFlags"))
