"""What `engine.blocks` says of prompts' content ids, by compiled code (block_ids.cpp): three times sooner. No torch."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from ctypes import c_char_p, c_int64, c_void_p

from kvasir.kernels.compiled import HERE, NativeError, compiled

logger = logging.getLogger(__name__)

ID_BYTES = 16
SOURCES = ("block_ids.cpp", "block_directory.cpp", "group_costs.cpp")


class BlockIds:
    """The compiled functions."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._hash = ctypes.CDLL(path).block_ids
        self._hash.argtypes, self._hash.restype = (c_char_p, c_char_p, c_int64, c_int64, c_void_p), None
        self._words = ctypes.PyDLL(path).token_words
        self._words.argtypes, self._words.restype = (ctypes.py_object, c_int64, c_int64, c_void_p), c_int64

    def hash(self, before: bytes, tokens: bytes, block_size: int) -> bytes:
        """Ids of the full blocks of tokens of four bytes, 16 bytes each, the first one behind `before`[16]."""
        stride = 4 * block_size
        count = len(tokens) // stride
        ids = ctypes.create_string_buffer(ID_BYTES * count)
        self._hash(before, tokens, count, stride, ids)
        return ids.raw

    def words(self, token_ids: list[int]) -> bytes:
        """Four bytes a token. TypeError or OverflowError where one is none."""
        count = len(token_ids)
        words = ctypes.create_string_buffer(4 * count)
        if self._words(token_ids, 0, count, words) < count:
            raise OverflowError("a token id takes more than 32 bits")
        return words.raw


def load() -> BlockIds | None:
    """Found, or compiled within about a second; None where that can't be."""
    if os.environ.get("KVASIR_KERNELS"):
        return None
    try:
        return BlockIds(str(compiled("block_ids", [HERE / name for name in SOURCES])[0]))
    except (NativeError, OSError, subprocess.SubprocessError, AttributeError) as error:
        logger.info("prompts are hashed in Python: %s", error)
        return None
