"""Fuzz with coverage: python tests/fuzz/run.py [TARGET ...] [--seconds 60]. Prints executions and what was found.

Each target runs in a process of its own, from the corpus beside this file; what is new goes to build/fuzz. What ends a run
is left there as crash-*: put it into the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROWN = HERE.parents[1] / "build" / "fuzz"


def fuzz(name: str, arguments: list[str]) -> None:
    """This process's work: never returns."""
    import atheris

    with atheris.instrument_imports(include=["kvasir.cluster", "kvasir.engine"]):
        import targets

    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """One target in a child; whether nothing was found."""
    (grown := GROWN / name).mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=8192"]
    command = [sys.executable, __file__, "--child", name, str(grown), str(HERE / "corpus" / name), *limits]
    child = subprocess.run([*command, f"-artifact_prefix={GROWN}/{name}-"], capture_output=True, text=True)
    done = re.findall(r"Done (\d+) runs", child.stderr) or re.findall(r"^#(\d+)", child.stderr, re.MULTILINE)
    good = child.returncode == 0
    print(f"{name}: {done[-1] if done else 0} runs, {'nothing found' if good else 'FOUND SOMETHING'}", flush=True)
    if not good:
        print(child.stderr[-4000:], flush=True)
    return good


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="of each (default: 60)")
    options = parser.parse_args()
    from targets import TARGETS

    if unknown := {*options.targets} - {*TARGETS}:
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there is: {', '.join(sorted(TARGETS))}")
    good = [run(name, options.seconds) for name in options.targets or TARGETS]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
