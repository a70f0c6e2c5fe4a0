"""Large memory in huge pages: tensors like any others, and the system is asked for them."""

from __future__ import annotations

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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_the_system_is_asked_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without huge pages")
    found = huge_pages.empty(9 << 20, dtype=torch.uint8)
    assert found.data_ptr() % huge_pages.HUGE == 0
    areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    (mine,) = (
        area
        for area in areas
        if (ends := [int(end, 16) for end in area.split()[0].split("-")])[0] <= found.data_ptr() < ends[1]
    )
    assert " hg" in next(line for line in mine.splitlines() if line.startswith("VmFlags"))
