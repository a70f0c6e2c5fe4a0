"""The GGUF reader: what files hold, parts of a model, and files that are broken in every way."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import BLOCK_TYPES, is_gguf, read_gguf

TOKENS = [f"token {i} é" for i in range(50)]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, dims: Sequence[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw_file(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A file of gguf-py's writer with every kind of value."""
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 40000), ("int16", -4), ("uint32", 2**32 - 1)):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_int32("x.int32", -5)
    writer.add_uint64("x.uint64", 2**63)
    writer.add_int64("x.int64", -(2**62))
    writer.add_float32("x.float32", 1e-5)
    writer.add_float64("x.float64", 1 / 3)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "grüße")
    writer.add_array("x.strings", TOKENS)
    writer.add_array("x.floats", [0.5, -1.0])
    writer.add_array("x.flags", [True, False, True])
    writer.add_array("x.none", [])
    writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b.weight", np.arange(3, dtype=np.float16))
    blocks = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_gguf_py_writes_is_read(good: Path) -> None:
    read = read_gguf(good)
    found = {key.removeprefix("x."): value for key, value in read.metadata.items() if key.startswith("x.")}
    assert found.pop("floats").tolist() == [0.5, -1.0]
    assert found.pop("flags").tolist() == [True, False, True]
    assert found == {
        "uint8": 200,
        "int8": -3,
        "uint16": 40000,
        "int16": -4,
        "uint32": 2**32 - 1,
        "int32": -5,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 1e-5,
        "float64": 1 / 3,
        "bool": True,
        "string": "grüße",
        "strings": TOKENS,
    }
    a, b, c = (read.tensors[f"{name}.weight"] for name in "abc")
    assert (a.shape, a.type.name, a.rows.view(np.float32).tolist()[1]) == ((3, 4), "F32", [4, 5, 6, 7])
    assert (b.shape, b.rows.view(np.float16).tolist()) == ((3,), [0, 1, 2])
    assert (c.shape, c.type.name, c.row_bytes, c.nbytes, c.rows.shape) == ((2, 64), "Q8_0", 68, 136, (2, 68))


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(raw_file(tensors=[entry("a"), entry("b", offset=32)], data=bytes(48), version=2))
    assert list(read_gguf(path).tensors) == ["a", "b"]
    alignment = pair("general.alignment", 4, struct.pack("<I", 8))
    path.write_bytes(raw_file([alignment], [entry("a"), entry("b", offset=16)], bytes(32)))
    assert read_gguf(path).tensors["b"].start % 8 == 0


def test_block_types_are_those_of_gguf_py() -> None:
    sizes = gguf.constants.GGML_QUANT_SIZES
    for number, kind in BLOCK_TYPES.items():
        assert (kind.name, sizes[gguf.GGMLQuantizationType(number)]) == (
            gguf.GGMLQuantizationType(number).name,
            (kind.size, kind.nbytes),
        )


def test_nested_arrays(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"
    inner = struct.pack("<IQ2i", 5, 2, 1, 2)
    path.write_bytes(raw_file([pair("n", 9, struct.pack("<IQ", 9, 2) + inner + inner)]))
    assert [array.tolist() for array in read_gguf(path).metadata["n"]] == [[1, 2], [1, 2]]


def test_is_gguf(good: Path, tmp_path: Path) -> None:
    blob = tmp_path / "0123abcd"
    blob.write_bytes(good.read_bytes())
    other = tmp_path / "other"
    other.write_bytes(b"PK")
    assert is_gguf(good)
    assert is_gguf(blob)
    assert not is_gguf(other)
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nowhere.gguf")


def test_a_vocabulary_of_128k_tokens_takes_a_moment(tmp_path: Path) -> None:
    strings = b"".join(text(f"Ġtoken{i}") for i in range(128_000))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(raw_file([pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 128_000) + strings)]))
    start = time.thread_time()
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"][-1] == "Ġtoken127999"
    assert time.thread_time() - start < 5


# Parts of a model


@pytest.fixture
def split(tmp_path: Path) -> Callable[..., list[Path]]:
    def build(count: int = 3, *, total: int | None = None, names: Sequence[str] = ("a", "b", "c")) -> list[Path]:
        paths = []
        for number in range(count):
            pairs = [
                pair("split.no", 2, struct.pack("<H", number)),
                pair("split.count", 2, struct.pack("<H", count)),
                pair("split.tensors.count", 5, struct.pack("<i", count if total is None else total)),
                pair("first", 7, struct.pack("<?", number == 0)),
            ]
            path = tmp_path / f"model-{number + 1:05}-of-{count:05}.gguf"
            path.write_bytes(raw_file(pairs, [entry(names[number])], np.full(4, number, np.float32).tobytes()))
            paths.append(path)
        return paths

    return build


@pytest.mark.parametrize("pointed_at", [0, 1, 2])
def test_any_part_leads_to_the_whole(split: Any, pointed_at: int) -> None:
    read = read_gguf(split()[pointed_at])
    assert list(read.tensors) == ["a", "b", "c"]
    assert [float(tensor.rows.view(np.float32)[0]) for tensor in read.tensors.values()] == [0, 1, 2]
    assert read.metadata["first"] is True


def test_a_missing_part_is_named(split: Any) -> None:
    paths = split()
    paths[1].unlink()
    with pytest.raises(ConfigError, match=r"one of 3 parts, of which model-00002-of-00003\.gguf is missing"):
        read_gguf(paths[2])


def test_a_part_by_another_name(split: Any, tmp_path: Path) -> None:
    renamed = split()[0].rename(tmp_path / "mine.gguf")
    with pytest.raises(ConfigError, match=r"doesn't end in -00001-of-00003\.gguf"):
        read_gguf(renamed)


def test_parts_in_the_wrong_order(split: Any, tmp_path: Path) -> None:
    paths = split()
    paths[1].rename(tmp_path / "aside")
    paths[2].rename(paths[1])
    (tmp_path / "aside").rename(paths[2])
    with pytest.raises(ConfigError, match=r"00002-of-00003.*says it is part 2 of 3, its name 1 of 3"):
        read_gguf(paths[0])


def test_parts_that_do_not_fit_each_other(split: Any) -> None:
    with pytest.raises(ConfigError, match=r"hold 3 tensors, split\.tensors\.count says 4"):
        read_gguf(split(total=4)[0])
    with pytest.raises(ConfigError, match="'a' is in an earlier part, too"):
        read_gguf(split(names=("a", "b", "a"))[0])


# Broken files

HUGE = 2**60
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "no GGUF": (b"PK\x03\x04" + bytes(60), "starts with b'PK"),
    "GGML": (b"tjgg" + bytes(60), "before GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "version 1": (raw_file(version=1), "version is 1; supported are 2 and 3"),
    "only a magic": (b"GGUF", "needs 4 bytes"),
    "tensors": (raw_file(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    "pairs": (raw_file(counts=(0, HUGE)), f"claims {HUGE} metadata pairs"),
    "more pairs than there are": (raw_file([pair("k", 0, b"1")], counts=(0, 3)), "'' is there twice"),
    "key length": (raw_file([struct.pack("<Q", HUGE)], counts=(0, 1)), f"key at byte 32 needs {HUGE} bytes"),
    "key of no UTF-8": (raw_file([text(b"\xff\xfe") + bytes(5)]), "key is no UTF-8"),
    "key twice": (raw_file([pair("k", 0, b"\x01")] * 2), "'k' is there twice"),
    "value type": (raw_file([pair("k", 99, bytes(8))]), "unknown type 99"),
    "string length": (raw_file([pair("k", 8, struct.pack("<Q", HUGE))]), f"needs {HUGE} bytes"),
    "array length": (raw_file([pair("k", 9, struct.pack("<IQ", 4, HUGE))]), f"'k' claims {HUGE} numbers"),
    "array of strings": (raw_file([pair("k", 9, struct.pack("<IQ", 8, HUGE))]), f"'k' claims {HUGE} elements"),
    "array of arrays": (raw_file([pair("k", 9, struct.pack("<IQ", 9, HUGE))]), f"'k' claims {HUGE} elements"),
    "array element type": (
        raw_file([pair("k", 9, struct.pack("<IQ", 77, 1))]),
        "elements of 'k' have the unknown type 77",
    ),
    "a string in an array": (
        raw_file([pair("k", 9, struct.pack("<IQQ", 8, 1, HUGE))]),
        "claims more bytes than there are",
    ),
    "deep": (raw_file([pair("k", 9, struct.pack("<IQ", 9, 1) * 2000)]), "more than 4 deep"),
    "template": (raw_file([pair("tokenizer.chat_template", 8, text("x" * 10_000_000))]), "10000000 characters"),
    "alignment": (raw_file([pair("general.alignment", 4, struct.pack("<I", 24))]), "is 24, not a power of two"),
    "alignment 0": (raw_file([pair("general.alignment", 4, struct.pack("<I", 0))]), "is 0, not a power of two"),
    "alignment of words": (raw_file([pair("general.alignment", 8, text("32"))]), "is '32', not a power of two"),
    "no dimensions": (raw_file(tensors=[entry("t", ())], data=bytes(64)), "has 0 dimensions"),
    "five dimensions": (raw_file(tensors=[entry("t", (1, 1, 1, 1, 1))], data=bytes(64)), "has 5 dimensions"),
    "a dimension of 0": (raw_file(tensors=[entry("t", (4, 0))], data=bytes(64)), r"impossible shape \[0, 4\]"),
    "overflow": (raw_file(tensors=[entry("t", (2**40, 2**40))], data=bytes(64)), "impossible shape"),
    "a type of nobody": (raw_file(tensors=[entry("t", kind=77)], data=bytes(64)), r"type 77 \(unknown\)"),
    "a removed type": (raw_file(tensors=[entry("t", kind=31)], data=bytes(64)), "quantise anew"),
    "half a block": (
        raw_file(tensors=[entry("t", (33,), 8)], data=bytes(99)),
        "rows of 33, no multiple of Q8_0's block",
    ),
    "past the end": (raw_file(tensors=[entry("t", (1024,))], data=bytes(64)), r"'t' ends at byte \d+, the file has"),
    "far past the end": (raw_file(tensors=[entry("t", (2**58,))], data=bytes(64)), "ends at byte"),
    "offset": (raw_file(tensors=[entry("t", offset=HUGE)], data=bytes(64)), "ends at byte"),
    "crooked offset": (raw_file(tensors=[entry("t", offset=4)], data=bytes(64)), "no multiple|isn't a multiple"),
    "overlap": (raw_file(tensors=[entry("t", (16,)), entry("u", offset=32)], data=bytes(96)), "'t' and 'u' overlap"),
    "tensor twice": (raw_file(tensors=[entry("t"), entry("t", offset=32)], data=bytes(96)), "'t' is there twice"),
    "tensor of no UTF-8": (raw_file(tensors=[text(b"\xc0") + bytes(40)], counts=(1, 0)), "tensor name is no UTF-8"),
    "parts of words": (raw_file([pair("split.count", 2, struct.pack("<H", 65535))]), "one of 65535 parts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_at_once(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ConfigError, match=message) as error:
        read_gguf(path)
    assert "broken.gguf" in str(error.value)
    assert time.thread_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_gguf(tmp_path)


def test_cut_short_anywhere(good: Path, tmp_path: Path) -> None:
    """Everything but the padding behind the last tensor is needed."""
    content = good.read_bytes()
    end = max(tensor.start + tensor.nbytes for tensor in read_gguf(good).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(end):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            read_gguf(path)


@settings(max_examples=examples(150))
@given(st.data())
def test_flipped_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Never another exception, never long: what is read lies within the file."""
    content = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from((0, 1, 8, 9, 127, 128, 255)))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    try:
        read = read_gguf(path)
    except ConfigError:
        return
    for tensor in read.tensors.values():
        assert tensor.start + tensor.rows.nbytes <= len(content)


SAMPLE = raw_file(
    [
        pair("general.architecture", 8, text("llama")),
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("x.words", 9, struct.pack("<IQ", 8, 3) + text("a") + text("bc") + text("def")),
        pair("x.numbers", 9, struct.pack("<IQ3f", 6, 3, 1.0, 2.0, 3.0)),
        pair("x.nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ2i", 5, 2, 1, 2)),
        pair("split.count", 2, struct.pack("<H", 1)),
    ],
    [entry("a", (4, 3)), entry("b", (32,), 8, 64), entry("c", (2,), 1, 128)],
    bytes(160),
)
