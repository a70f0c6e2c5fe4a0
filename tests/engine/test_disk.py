"""Blocks in host memory and on a disk: what leaves first, what a killed process leaves behind, and every way to be bad."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import until

from kvasir.engine import disk as disk_module
from kvasir.engine import disk_folder as folder_module
from kvasir.engine.disk import HEAD, PAUSE_S, Disk
from kvasir.engine.disk_folder import LOOK_S, RESTART_S, claim
from kvasir.engine.host import Host
from kvasir.engine.lane import Lane
from kvasir.engine.shelf import MOST_TURNS, Shelf

BYTES = 1000
MARK = b"m" * 16
FILE = BYTES + HEAD.size


def content(number: int) -> bytes:
    return number.to_bytes(16, "big")


def data(number: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(BYTES))


def opened(root: Path, blocks: int = 100, mark: bytes = MARK, rank: int = 0, copy: int | None = None) -> Disk:
    own = claim(root, mark.hex(), rank, copy)
    assert own is not None
    disk = Disk(own, mark, BYTES, blocks * FILE)
    disk.scan()
    return disk


def read(disk: Disk, number: int) -> bool:
    """Whether the block is there; then it is right."""
    into = bytearray(BYTES)
    found = disk.read(content(number), memoryview(into))
    assert not found or into == data(number)
    return found


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != "lock")


# -- what leaves first


def test_the_least_recently_used_leaves_first_and_what_was_reused_gets_further_turns() -> None:
    shelf = Shelf(3)
    for name in (b"a", b"b", b"c"):
        assert shelf.put(name, 1) == []
    shelf.use([b"a"])
    shelf.use([b"b"], again=True)
    assert shelf.put(b"d", 1) == [b"c"]
    assert shelf.put(b"e", 1) == [b"a"]
    assert shelf.put(b"f", 1) == [b"d"]  # b had its further turn
    assert shelf.put(b"g", 1) == [b"e"]
    assert shelf.put(b"h", 1) == [b"b"]
    assert shelf.put(b"huge", 4) == [b"huge"]


class SlowShelf:
    """The same, written plainly: a list of [content, bytes, turns], the next to leave first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[list[Any]] = []

    def put(self, name: bytes, size: int) -> list[bytes]:
        if size > self.capacity:
            return [name]
        self.drop(name)
        left = self.shrink(self.capacity - size)
        self.held.append([name, size, 0])
        return left

    def shrink(self, size: int) -> list[bytes]:
        left = []
        while sum(entry[1] for entry in self.held) > size:
            entry = self.held.pop(0)
            if entry[2]:
                self.held.append([entry[0], entry[1], entry[2] - 1])
            else:
                left.append(entry[0])
        return left

    def use(self, names: list[bytes], *, again: bool) -> None:
        for name in names:
            for entry in [entry for entry in self.held if entry[0] == name]:
                self.held.remove(entry)
                self.held.append([name, entry[1], min(MOST_TURNS, entry[2] + again)])

    def drop(self, name: bytes) -> None:
        self.held = [entry for entry in self.held if entry[0] != name]


@pytest.mark.parametrize("seed", range(10))
def test_a_shelf_does_what_the_plain_one_does(seed: int) -> None:
    draw = random.Random(seed)
    shelf, plain = Shelf(30), SlowShelf(30)
    told: set[bytes] = set()
    listens = draw.randrange(1000)
    for step in range(2000):
        name = content(draw.randrange(20))
        match draw.randrange(5):
            case 0 | 1:
                size = draw.choice((1, 3, 9, 31))
                assert shelf.put(name, size) == plain.put(name, size)
            case 2:
                names = [content(draw.randrange(20)) for _ in range(3)]
                again = draw.random() < 0.5
                shelf.use(names, again=again)
                plain.use(names, again=again)
            case 3:
                shelf.drop(name)
                plain.drop(name)
            case _:
                size = draw.randrange(40)
                assert shelf.shrink(size) == plain.shrink(size)
        assert [*shelf] == [entry[0] for entry in plain.held]
        assert not shelf.check()
        if step == listens:
            shelf.listen()
        if step >= listens and draw.random() < 0.3:
            for changed, held in shelf.drain().items():
                (told.add if held else told.discard)(changed)
            assert told == {*shelf}
        elif step < listens:
            assert not shelf.drain()


def test_host_memory_holds_what_fits_and_gives_back_what_it_was_given() -> None:
    host, draw = Host(BYTES, 10 * BYTES + 1), random.Random(0)
    for _ in range(1000):
        number = draw.randrange(30)
        known = content(number) in host.shelf
        into = bytearray(BYTES)
        match draw.randrange(4):
            case 0:
                assert host.write(content(number), data(number))
            case 1:
                assert host.read(content(number), memoryview(into)) is known
                assert not known or into == data(number)
            case 2:
                host.use([content(number)], again=draw.random() < 0.5)
            case _:
                host.forget(content(number))
        assert not host.check()
    assert host.stored > 50 < host.shelf.evicted
    assert not Host(BYTES, 5).write(content(1), data(1))


# -- the disk


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    for number in range(10):
        assert disk.write(content(number), data(number))
    assert disk.write(content(3), data(3))
    disk.close()
    disk = opened(tmp_path)
    assert all(read(disk, number) for number in range(10))
    assert not read(disk, 11)
    assert (disk.loaded, disk.failed, len(disk.shelf)) == (10, 0, 10)
    assert stat.S_IMODE(files(tmp_path)[0].stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / MARK.hex() / "0" / "0").stat().st_mode) == 0o700


def test_blocks_of_groups_of_layers_are_there_after_a_restart_too(tmp_path: Path) -> None:
    """Their names are longer."""
    names = [content(1), content(1) + b"1", content(1) + b"8 bytes!"]
    disk = opened(tmp_path)
    assert all(disk.write(name, data(1)) for name in names)
    disk.close()
    disk = opened(tmp_path)
    assert {*disk.shelf} == {*names}
    assert all(disk.read(name, memoryview(bytearray(BYTES))) for name in names)
    disk.close()
    other = opened(tmp_path, 1, mark=b"o" * 16)
    assert other.write(content(1), data(1))
    assert not (tmp_path / MARK.hex()).exists()


def test_the_order_of_use_outlives_the_process(tmp_path: Path) -> None:
    disk = opened(tmp_path, 4)
    for number in range(4):
        disk.write(content(number), data(number))
        time.sleep(0.01)  # the file system's clock
    disk.use([content(0)], again=False)
    disk.close()
    disk = opened(tmp_path, 4)
    disk.write(content(9), data(9))
    assert [read(disk, number) for number in (0, 1, 2, 3, 9)] == [True, False, True, True, True]


def test_what_a_clock_that_was_ahead_left_does_not_stay_for_ever(tmp_path: Path) -> None:
    """Of blocks and of other models' folders; among themselves blocks keep their order."""
    ahead = time.time() + 10**6
    other, younger = (opened(tmp_path, mark=mark * 16) for mark in (b"o", b"y"))
    disk = opened(tmp_path, 4)
    for number in range(4):
        disk.write(content(number), data(number))
    for each in (other, disk):
        each.write(content(9), data(9))
        each.close()
    os.utime(next(tmp_path.glob(f"{(b'o' * 16).hex()}/0/0/lock")), (ahead, ahead))
    for number, later in ((3, 0), (1, 1)):
        os.utime(disk._path(content(number)), (ahead + later, ahead + later))
    disk = opened(tmp_path, 4)
    assert [*disk.shelf] == [content(number) for number in (2, 9, 3, 1)]
    time.sleep(0.01)  # the file system's clock
    disk.use([content(2)], again=False)
    disk.close()
    younger.close()
    opened(tmp_path, mark=b"y" * 16).close()
    disk = opened(tmp_path, 4)
    assert [*disk.shelf][-1] == content(2)
    assert [other.folder.parent.name for other in disk._claim._others] == [(mark * 16).hex() for mark in (b"o", b"y")]


@pytest.mark.parametrize(("free", "sharers", "blocks"), [(400 * FILE, 1, 40), (400 * FILE, 2, 20), (10**13, 1, None)])
def test_who_names_no_size_gets_a_tenth_of_what_is_free_and_no_more_than_50_gb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, sharers: int, blocks: int | None
) -> None:
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    own = claim(tmp_path, MARK.hex(), 0)
    assert own is not None
    disk = Disk(own, MARK, BYTES, None, sharers)
    disk.scan()
    assert disk.shelf.capacity == (blocks * FILE if blocks else 50 * 10**9)
    for number in range(45 if blocks else 0):
        disk.write(content(number), data(number))
    assert len(files(tmp_path)) == (blocks or 0)


def test_never_more_than_its_size(tmp_path: Path) -> None:
    disk = opened(tmp_path, 5)
    for number in range(50):
        disk.write(content(number), data(number))
        assert len(files(tmp_path)) == min(number + 1, 5)
    disk.close()
    disk = opened(tmp_path, 3)  # it was told less
    assert len(files(tmp_path)) == 3
    assert all(read(disk, number) for number in (47, 48, 49))
    disk.close()
    assert not opened(tmp_path, 0).write(content(1), data(1))


@pytest.mark.parametrize("cut", [0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 500, FILE - 1])
def test_a_truncated_file_is_no_block(tmp_path: Path, cut: int) -> None:
    disk = opened(tmp_path)
    disk.write(content(1), data(1))
    os.truncate(files(tmp_path)[0], cut)
    assert not read(disk, 1)
    assert disk.failed == 1
    assert not files(tmp_path)
    assert disk.write(content(1), data(1))
    assert read(disk, 1)


@pytest.mark.parametrize("at", [0, 8, 24, 48, HEAD.size - 1, HEAD.size, HEAD.size + 321, FILE - 1])
def test_a_changed_byte_is_noticed(tmp_path: Path, at: int) -> None:
    disk = opened(tmp_path)
    disk.write(content(1), data(1))
    (file,) = files(tmp_path)
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)
    assert not read(disk, 1)
    assert content(1) not in disk.shelf


def test_another_models_block_or_another_content_is_noticed(tmp_path: Path) -> None:
    """Whatever somebody copied where."""
    ours, others = opened(tmp_path), opened(tmp_path, mark=b"o" * 16)
    ours.write(content(1), data(1))
    ours.write(content(2), data(2))
    others.write(content(1), data(7))
    first, second, other = (files(tmp_path / mark.hex()) for mark in (MARK, MARK, b"o" * 16))
    other[0].replace(first[0])
    assert not read(ours, 1)
    ours.write(content(1), data(1))
    second[1].replace(first[0])
    assert not read(ours, 1)


def test_a_folder_that_vanished_costs_nothing_but_its_blocks(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    disk.write(content(1), data(1))
    (tmp_path / MARK.hex()).rename(tmp_path / "unplugged")
    assert not read(disk, 1)
    assert not disk.write(content(2), data(2))
    assert disk.failed == 2


def test_a_full_disk_gets_some_back_and_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = opened(tmp_path)
    for number in range(20):
        disk.write(content(number), data(number))
    monkeypatch.setattr(os, "replace", _full)
    assert not disk.write(content(30), data(30))
    assert "No space left" in caplog.text
    assert len(files(tmp_path)) == 18
    monkeypatch.undo()
    assert not disk.write(content(30), data(30))
    now = time.monotonic()
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: now + PAUSE_S + 1)
    assert disk.write(content(30), data(30))
    assert read(disk, 30)
    assert read(disk, 19)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_unfinished_files_are_removed_and_foreign_ones_are_not(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    disk.write(content(1), data(1))
    (file,) = files(tmp_path)
    foreign = [file.parent / name for name in ("README", file.name.upper() + "AB", "ff" * 16, "a.part")]
    unfinished = [file.parent / name for name in (f"{file.name}.part", "00" * 16)]
    for path in (*foreign, *unfinished):
        path.write_bytes(b"x")
    disk.close()
    assert len(opened(tmp_path).shelf) == 1
    assert files(tmp_path) == sorted([file, *foreign])


def test_a_folder_that_cannot_be_read_hides_its_own_blocks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What isn't known takes room that nobody counts, and is never removed."""
    disk = opened(tmp_path)
    names = [bytes([number]) * 16 for number in range(8)]
    assert all(disk.write(name, data(1)) for name in names)
    disk.close()
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: _full() if Path(path).name == "03" else real(path))
    assert {*opened(tmp_path).shelf} == {*names} - {names[3]}


def test_a_folder_that_others_could_read_is_private_again(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    assert disk.write(content(1), data(1))
    disk.close()
    folder = tmp_path / MARK.hex() / "0" / "0"
    folder.chmod(0o755)
    disk = opened(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert read(disk, 1)


WRITER = """
import random, sys
from pathlib import Path
from kvasir.engine.disk import Disk
from kvasir.engine.disk_folder import claim
own = claim(Path(sys.argv[1]), (b"m" * 16).hex(), 0)
disk = Disk(own, b"m" * 16, 1000, 300 * 1076)
disk.scan()
print("ready", flush=True)
for number in range(10**9):
    disk.write((number % 1000).to_bytes(16, "big"), memoryview(random.Random(number % 1000).randbytes(1000)))
"""


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    for pause in (0.0, 0.05, 0.2):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert claim(tmp_path, MARK.hex(), 0, 0) is None
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        disk = opened(tmp_path, 300)
        assert len(disk.shelf) == len(files(tmp_path)) <= 300
        assert all(read(disk, int.from_bytes(name, "big")) for name in [*disk.shelf])
        disk.close()
    assert len(files(tmp_path)) > 10


# -- whose folder is whose


def test_each_copy_and_rank_has_a_folder_and_finds_it_again(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    follower = opened(tmp_path, rank=1, copy=1)
    assert claim(tmp_path, MARK.hex(), 1, 1) is None
    for number, disk in enumerate((first, second, follower)):
        disk.write(content(number), data(number))
    for disk in (first, second, follower):
        disk.close()
    assert read(opened(tmp_path), 0)
    assert read(opened(tmp_path), 1)
    assert read(opened(tmp_path, rank=1, copy=1), 2)


def test_what_models_left_that_are_no_longer_served_goes_first(tmp_path: Path) -> None:
    marks = [bytes([number]) * 16 for number in range(3)]
    for number, mark in enumerate(marks):
        disk = opened(tmp_path, mark=mark)
        for block in range(10):
            disk.write(content(block), data(block))
        if number < 2:
            disk.close()
        time.sleep(0.01)
    ours = opened(tmp_path, 15)
    for number in range(15):
        ours.write(content(number), data(number))
        assert len(files(tmp_path)) <= max(15, number + 1) + 10 + 5
    assert len(ours.shelf) == 15
    left = [len(files(tmp_path / mark.hex())) for mark in marks]
    assert left == [0, 0, 10]  # the last one is being served


def tree(root: Path) -> dict[str, bytes | None]:
    """All that lies in it; None stands for a folder."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_nothing_is_touched_that_is_not_ours(tmp_path: Path) -> None:
    """Somebody's home, say, with other programs' locks in it, and with folders that are named like ours."""
    model, block = "0a" * 16, "0b" * 16
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "0" / "0").mkdir(parents=True)
    root = tmp_path / "home"
    for name in (
        ".mozilla/firefox/abc.default/lock",
        ".mozilla/firefox/abc.default/logins.json",
        "cache/apt/archives/lock",
        f"{model.upper()}/0/0/lock",
        f"{model}00/0/0/lock",
        f"{model}/1.5/0/lock",
        f"{model}/01/0/lock",
        f"{model}/0/first/lock",
        f"{model}/0/0/notes/{block}",
        f"{model}/0/0/0b/letter",
        f"{model}/0/0/0b/{'0c' * 16}",
        f"{model}/0/0/0b/{block}.tmp",
        f"{model}/0/0/letter",
        f"{model}/letter",
        f"{'0e' * 16}/0/0/0b/{block}",  # nobody's lock
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")
    for name in (f"0/0/0b/{block}", "0/0/lock"):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_bytes(b"precious")
    (root / ("0d" * 16)).symlink_to(elsewhere)
    (root / model / "0" / "0" / "0c").symlink_to(elsewhere / "0" / "0" / "0b")
    before = tree(tmp_path)
    for name in ("lock", f"0b/{block}", f"0b/{block}.part", "0f/" + "0f" * 16):  # ours among it: that goes
        path = root / model / "0" / "0" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(0 if name == "lock" else 2 * FILE))
    ours = opened(root, 2)
    for number in range(5):
        assert ours.write(content(number), data(number))
    assert {name: held for name, held in tree(tmp_path).items() if MARK.hex() not in name} == before


def test_a_disk_that_takes_no_change_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only or unplugged, while room is made too."""
    other = opened(tmp_path, mark=b"o" * 16)
    other.write(content(1), data(1))
    other.close()
    disk = opened(tmp_path, 1)
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *said, **more: _full() if "lock" in str(path) else real(path, *said, **more)
    )
    assert not disk.write(content(2), data(2))
    assert disk.failed == 1
    monkeypatch.undo()
    now = time.monotonic()
    monkeypatch.setattr(disk_module.time, "monotonic", lambda: now + 1000)
    assert disk.write(content(2), data(2))
    assert len(files(tmp_path)) == 1


def test_copies_that_run_share_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "LOOK_S", 0)
    copies: list[Disk] = []
    for held in (6, 3, 2):
        copies.append(opened(tmp_path, 6))
        for number in range(7):
            for disk in copies:
                assert disk.write(content(number), data(number))
        assert [len(disk.shelf) for disk in copies] == [held] * len(copies)
        assert len(files(tmp_path)) == 6
    others = [claim(tmp_path, MARK.hex(), 0) for _ in range(4)]
    assert not copies[0].write(content(1), data(1))  # a seventh of the size holds no block
    assert len(copies[0].shelf) == 0
    assert None not in others


def test_a_copy_that_never_writes_gives_its_part_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "LOOK_S", 0)
    monkeypatch.setattr("kvasir.engine.lane.IDLE_S", 0.01)
    disk = opened(tmp_path, 6)
    for number in range(6):
        assert disk.write(content(number), data(number))
    others = [opened(tmp_path, 6)]
    disk.use([content(0)], again=True)
    assert len(disk.shelf) == 3
    others.append(opened(tmp_path, 6))
    lane = Lane(disk)
    until(lambda: len(disk.shelf) == 2)
    lane.end()
    lane.thread.join(60)
    assert len(files(tmp_path)) == 2


def test_copies_find_their_blocks_after_a_restart_and_leave_none_when_they_stay_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, later = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + later)
    copies = [opened(tmp_path, 12) for _ in range(4)]
    later += LOOK_S
    for disk in copies:
        for number in range(20):
            disk.write(content(number), data(number))
    for disk in copies:
        disk.close()
    copies = [opened(tmp_path, 12)]
    for number in range(30, 50):
        copies[0].write(content(number), data(number))
    assert len(copies[0].shelf) == 12  # the others haven't said yet that they start again
    copies += [opened(tmp_path, 12) for _ in range(2)]
    assert all(read(disk, number) for disk in copies[1:] for number in (17, 18, 19))
    for number, left in ((50, 12 + 3), (51, 12)):  # what the fourth had goes when it hasn't come back
        later += RESTART_S / 2 + 1
        for disk in copies:
            assert disk.write(content(number), data(number))
        assert [len(disk.shelf) for disk in copies] == [4, 4, 4]
        assert len(files(tmp_path)) == left
