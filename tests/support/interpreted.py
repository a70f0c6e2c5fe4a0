"""What of Triton's interpreter isn't as on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

product = np.matmul


def row_by_row(patch: pytest.MonkeyPatch) -> None:
    """As a tile's product on a GPU, that of the interpreter is the same for a row whatever the others are: numpy's isn't on every
    CPU."""

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return product(a[:, None], b)[:, 0].astype(dtype or a.dtype)

    patch.setattr("triton.runtime.interpreter.np.matmul", matmul)
