"""Compiles C++ of this folder into a shared library, by the system's compiler and for this CPU. No torch.

Libraries are kept in the user's cache folder, or a folder among temporary files where that can't be written, under a hash of all
that shaped them: sources, flags, compiler and CPU. Nothing is run from where another user could have put it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# products are fused with sums wherever they meet, by clang as by gcc: else a row's bits would depend on the path it takes
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-math-errno", "-ffp-contract=fast", "-w"),
)
TIMEOUT_S = 300
"""Half a minute for the longest file; a machine that is busy loading models takes its time."""


class NativeError(Exception):
    """Why the library can't be had."""


def compiler() -> str | None:
    """The system's."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def command(program: str, inputs: Iterable[Path], target: Path, *flags: str) -> list[str]:
    """The call that makes `target` of them."""
    # Apple's clang for ARM knows -mcpu alone
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [program, *FLAGS, tune, *flags, *map(str, inputs), "-o", str(target)]


def build(program: str, sources: Sequence[Path], target: Path, *flags: str) -> None:
    """Makes `target` of them, compiled side by side; objects stay beside it. NativeError with what the compiler says."""

    def call(inputs: Iterable[Path], made: Path, *more: str) -> Path:
        run = subprocess.run(
            command(program, inputs, made, *flags, *more), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if run.returncode:
            raise NativeError(f"{program} failed: {run.stderr.strip()[:500]}")
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(lambda source: call([source], target.with_name(f"{source.stem}.o"), "-c"), sources)
        call(list(objects), target, "-shared")


def compiled(name: str, sources: Sequence[Path]) -> tuple[Path, str]:
    """The library's path, and how it came there; `name` begins the file's name. NativeError, OSError or SubprocessError when
    it can't be had."""
    program = compiler()
    if program is None:
        raise NativeError("there is no C++ compiler (c++, g++ or clang++; on Debian: apt-get install g++)")
    key, obstacles = key_of(program, sources), []
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(folder)
            if folder.stat().st_mode & 0o022:
                raise PermissionError(f"others may write to {folder} (chmod go-w)")
            return _kept_or_made(folder / f"{name}-{key}.so", name, program, sources)
        except OSError as error:
            obstacles.append(str(error))
    raise NativeError(f"there is no place for compiled code: {'; '.join(obstacles)}")


def _kept_or_made(target: Path, name: str, program: str, sources: Sequence[Path]) -> tuple[Path, str]:
    if target.exists():
        _check_owner(target)  # its folder may have been open once
        return target, f"{target}, compiled before"
    with _alone(target.with_name(f"{name}.lock")):
        if target.exists():
            return target, f"{target}, compiled by another process"
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            build(program, sources, made)
            with made.open("rb") as written:  # a machine that goes down must not leave half of it under its name
                os.fsync(written.fileno())
            made.replace(target)
    seconds = time.perf_counter() - begin
    logger.info("compiled in %.1f s: %s", seconds, target)
    return target, f"{target}, compiled in {seconds:.1f} s"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of ranks that start at once one compiles; on file systems without locks all do, and each ends with a whole file."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _folders() -> Iterator[Path]:
    """Where compiled code may be kept, the usual place first."""
    with suppress(RuntimeError):  # a user of whom the system knows no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvasir" / "compiled"
    yield Path(tempfile.gettempdir()) / f"kvasir-{os.geteuid()}"


def _check_owner(path: Path) -> None:
    """PermissionError where it is another user's, whose code would run as this one; or his link, which may lead elsewhere soon."""
    if not {path.lstat().st_uid, path.stat().st_uid} <= {0, os.geteuid()}:
        raise PermissionError(f"{path} belongs to another user")


def key_of(program: str, sources: Sequence[Path]) -> str:
    """A hash of everything that the compiled code depends on."""
    digest = hashlib.blake2b(digest_size=12)
    version = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    for part in (*_texts(sources), _spelt(program, sources), version, _cpu()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _spelt(program: str, sources: Sequence[Path]) -> bytes:
    """The call, wherever the sources lie: another checkout of the same ones finds what was compiled."""
    return " ".join(command(program, (Path(path.name) for path in sources), Path("-"))).encode()


def _texts(sources: Sequence[Path]) -> Iterator[bytes]:
    for path in (*sources, *sorted(HERE.glob("*.h"))):
        yield path.read_bytes()


def _cpu() -> bytes:
    """What -march=native goes by: the model and the instructions that the system lets us use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().split(b"\n\n")[0].splitlines() if info.exists() else []
    kept = (b"model name", b"flags", b"Features", b"CPU implementer", b"CPU part", b"model\t", b"stepping")
    return b"\n".join(
        [platform.machine().encode(), platform.processor().encode(), *(x for x in lines if x.startswith(kept))]
    )
