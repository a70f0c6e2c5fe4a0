"""GGUF files, memory-mapped: metadata, and where each tensor's bytes lie. Versions 2 and 3, little endian, split files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No torch: a gateway reads vocabularies with this.
Every number a file gives is checked against the file's size before anything is made from it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kvasir.engine.errors import ConfigError

MAGIC = b"GGUF"
OLDER_MAGICS = (b"lmgg", b"fmgg", b"tjgg")
SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
MAX_DIMS = 4
MAX_DEPTH = 4
"""Arrays within arrays."""
MAX_TEMPLATE = 2**20
"""Characters of a chat template; the longest in use have 20 KB."""
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Value type -> numpy's word for it."""


@dataclass(frozen=True)
class BlockType:
    """`size` numbers of a row take `nbytes` bytes."""

    name: str
    size: int
    nbytes: int


BLOCK_TYPES = {
    number: BlockType(name, size, nbytes)
    for number, name, size, nbytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}
REFUSED_TYPES = {
    **dict.fromkeys((4, 5), "a Q4_2 or Q4_3 of 2023, which llama.cpp removed"),
    **dict.fromkeys((9, 15), "Q8_1 or Q8_K, which only exist during a multiplication"),
    **dict.fromkeys((31, 32, 33, 36, 37, 38), "repacked for one processor, which llama.cpp removed: quantise anew"),
    41: "Q1_0",
}


class Mapped:
    """A file in memory, copy on write: torch wants memory it may write to, the file stays as it is."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            _fail(path, error.strerror or str(error))
        except ValueError:
            _fail(path, "it is empty")
        self.bytes = np.frombuffer(self.memory, np.uint8)

    def release(self, part: npt.NDArray[np.uint8]) -> None:
        """These bytes of it won't be needed soon: they needn't count as this process's memory any longer."""
        if hasattr(self.memory, "madvise"):
            first, last = (at - self.bytes.ctypes.data for at in np.lib.array_utils.byte_bounds(part))
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_DONTNEED, page, last - page)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `shape` has rows first, as torch has it (the file lists dimensions the other way round)."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int
    file: Mapped

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.size * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """[..., bytes of a row]: the file's own bytes, nothing is read yet."""
        return self.file.bytes[self.start : self.start + self.nbytes].reshape(*self.shape[:-1], self.row_bytes)


@dataclass(frozen=True)
class GGUF:
    """A model file, all its parts together. Arrays of numbers are numpy's, of strings lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """A file that is called .gguf or starts like one."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GGUF:
    """The model that this file is or is a part of. ConfigError names the file and what is wrong with it."""
    part = _Reader(path).read()
    count = part.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return part
    parts = [part if sibling == path else _Reader(sibling).read() for sibling in _siblings(path, count)]
    for number, each in enumerate(parts):
        said = each.metadata.get("split.no"), each.metadata.get("split.count")
        if said != (number, count):
            _fail(
                each.path, f"its metadata says it is part {said[0]} of {said[1]}, its name {number} of {count} (from 0)"
            )
    tensors: dict[str, StoredTensor] = {}
    for each in parts:
        twice = tensors.keys() & each.tensors.keys()
        if twice:
            _fail(each.path, f"tensor {min(twice)!r} is in an earlier part, too")
        tensors.update(each.tensors)
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        _fail(path, f"its parts hold {len(tensors)} tensors, split.tensors.count says {expected}")
    return GGUF(parts[0].path, parts[0].metadata, tensors)


def _siblings(path: Path, count: int) -> list[Path]:
    found = SPLIT_NAME.search(path.name)
    if not found:
        _fail(
            path,
            f"it is one of {count} parts, but its name doesn't end in -00001-of-{count:05}.gguf: the others can't be found",
        )
    stem = path.name[: found.start()]
    parts = [path.with_name(f"{stem}-{number:05}-of-{found[2]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _fail(path, f"it is one of {count} parts, of which {', '.join(missing[:3])}{more} is missing")
    return parts


def _fail(path: Path, what: str) -> NoReturn:
    raise ConfigError(f"{path} can't be read as GGUF: {what}")


class _Reader:
    """Walks through a file's header once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = Mapped(path)
        self.data = self.file.memory
        self.size = len(self.data)
        self.at = 0

    def read(self) -> GGUF:
        tensor_count, pair_count = self._head()
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._name("key")
            if key in metadata:
                self._fail(f"key {key!r} is there twice")
            metadata[key] = self._value(self._number("<I"), key)
            if key.startswith("tokenizer.chat_template"):
                self._check_template(key, metadata[key])
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment!r}, not a power of two")
        return GGUF(self.path, metadata, self._tensors(tensor_count, alignment))

    def _check_template(self, key: str, template: Any) -> None:
        if isinstance(template, str) and len(template) > MAX_TEMPLATE:
            self._fail(f"{key} has {len(template)} characters; a template may have {MAX_TEMPLATE}")

    def _head(self) -> tuple[int, int]:
        magic = self._bytes(4, "magic")
        if magic in OLDER_MAGICS:
            self._fail("it is a GGML file from before GGUF (August 2023): convert it anew")
        if magic != MAGIC:
            self._fail(f"it starts with {magic!r}, not with {MAGIC!r}")
        version = self._number("<I")
        if version in (2 << 24, 3 << 24):
            self._fail("it is big endian; only little endian files are supported")
        if version not in (2, 3):
            self._fail(f"its version is {version}; supported are 2 and 3")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        for what, count, least in (("tensors", tensors, 32), ("metadata pairs", pairs, 13)):
            if count * least > self.size:
                self._fail(f"it claims {count} {what}, more than fit into its {self.size} bytes")
        return tensors, pairs

    def _tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        entries = [self._tensor_entry() for _ in range(count)]
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                self._fail(f"tensor {name!r} is there twice")
            if offset % alignment:
                self._fail(f"tensor {name!r} starts at {offset}, which isn't a multiple of the alignment {alignment}")
            tensor = StoredTensor(name, shape, kind, base + offset, self.file)
            if tensor.start + tensor.nbytes > self.size:
                end = tensor.start + tensor.nbytes
                self._fail(
                    f"tensor {name!r} ends at byte {end}, the file has {self.size}; was it downloaded to its end?"
                )
            tensors[name] = tensor
        self._check_overlap(tensors)
        return tensors

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._name("tensor name")
        dims = self._number("<I")
        if not 1 <= dims <= MAX_DIMS:
            self._fail(f"tensor {name!r} has {dims} dimensions; from 1 to {MAX_DIMS} are possible")
        shape = tuple(reversed([self._number("<Q") for _ in range(dims)]))
        if not all(shape) or math.prod(shape) >= 2**63:
            self._fail(f"tensor {name!r} has the impossible shape {list(shape)}")
        number = self._number("<I")
        kind = BLOCK_TYPES.get(number)
        if kind is None:
            self._fail(
                f"tensor {name!r} has type {number} ({REFUSED_TYPES.get(number, 'unknown')}), which is not supported"
            )
        if shape[-1] % kind.size:
            self._fail(f"tensor {name!r} has rows of {shape[-1]}, no multiple of {kind.name}'s block of {kind.size}")
        return name, shape, kind, self._number("<Q")

    def _check_overlap(self, tensors: dict[str, StoredTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for before, after in pairwise(ordered):
            if before.start + before.nbytes > after.start:
                self._fail(f"tensors {before.name!r} and {after.name!r} overlap")

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self._text(key).decode("utf-8", "replace")
        if kind == ARRAY:
            return self._array(key, depth)
        if kind not in SCALARS:
            self._fail(f"the value of {key!r} has the unknown type {kind}")
        number = self._numbers(kind, 1, key)[0]
        return float(str(number)) if kind == FLOAT32 else number.item()  # 1e-05, not 9.999999747378752e-06

    def _array(self, key: str, depth: int) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind in SCALARS:
            return self._numbers(kind, count, key)
        least = {STRING: 8, ARRAY: 12}.get(kind)
        if least is None:
            self._fail(f"the elements of {key!r} have the unknown type {kind}")
        if count * least > self.size - self.at:
            self._fail(f"{key!r} claims {count} elements, more than fit into its {self.size} bytes")
        if kind == STRING:
            return list(self._strings(count, key))
        if depth == MAX_DEPTH:
            self._fail(f"{key!r} has arrays within arrays, more than {MAX_DEPTH} deep")
        return [self._value(ARRAY, key, depth + 1) for _ in range(count)]

    def _strings(self, count: int, key: str) -> Iterator[str]:
        """Vocabularies have hundreds of thousands: everything is a local name here."""
        data, at, size, length_of = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += length_of(data, at)[0]
            if end > size:
                self._fail(f"{key!r} is cut off, or a string in it claims more bytes than there are")
            yield data[at + 8 : end].decode("utf-8", "replace")
            at = end
        self.at = at

    def _numbers(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        dtype = np.dtype(SCALARS[kind])
        if count * dtype.itemsize > self.size - self.at:
            self._fail(f"{key!r} claims {count} numbers, of which only a part is there")
        found = (
            np.frombuffer(self.data, np.uint8 if kind == BOOL else dtype, count, self.at)
            if count
            else np.empty(0, dtype)
        )
        self.at += count * dtype.itemsize
        return found != 0 if kind == BOOL else found

    def _name(self, what: str) -> str:
        raw = self._text(what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"a {what} is no UTF-8: {raw[:40]!r}")

    def _text(self, what: str) -> bytes:
        return self._bytes(self._number("<Q"), what)

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._bytes(struct.calcsize(code), "header"))[0])

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            self._fail(f"its {what} at byte {self.at} needs {count} bytes, the file has {self.size}")
        self.at += count
        return self.data[self.at - count : self.at]

    def _fail(self, what: str) -> NoReturn:
        _fail(self.path, what)
