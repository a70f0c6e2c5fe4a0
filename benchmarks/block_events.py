"""What block events cost: blocks a second that a group publishes, and that a gateway follows, on one core.

Each of the groups holds `--held` blocks and replaces them one by one: half of all changes are stored, half evicted. A 70 B
model at 7,700 tokens a second stores about 500 blocks of 16 tokens a second.
Examples: python benchmarks/block_events.py --groups 64 --held 20000
          python benchmarks/block_events.py --stops --groups 64 --held 50000   # how long a gateway's loop stands still
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from refusals import refuse

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.directory import BlockDirectory, BlockFeed
from kvasir.engine.block_ids import loading
from kvasir.proto import group_pb2 as pb


def run(groups: int, held: int, batch: int, rounds: int) -> tuple[float, float, int]:
    """(blocks/s published, blocks/s followed, bytes of a block's change)."""
    journals = [BlockJournal(str(number)) for number in range(groups)]
    rings = [[os.urandom(16) for _ in range(held)] for _ in range(groups)]
    directory = BlockDirectory()
    feeds = [BlockFeed(directory, directory.join()) for _ in range(groups)]
    for number, (journal, ring, feed) in enumerate(zip(journals, rings, feeds, strict=True)):
        journal.take("device", dict.fromkeys(ring, True))
        deque(journal.flush(), 0)
        feed.begin(str(number))
        for message in journal.snapshot():
            feed.take(message)
    published = followed = 0.0
    changes = size = 0
    for turn in range(rounds):
        for journal, ring, feed in zip(journals, rings, feeds, strict=True):
            at = turn * batch % held
            new = [os.urandom(16) for _ in range(batch)]
            told = dict.fromkeys(ring[at : at + batch], False) | dict.fromkeys(new, True)
            ring[at : at + batch] = new
            begin = time.process_time()
            journal.take("device", told)
            frames = [pb.GroupMessage(blocks=blocks).SerializeToString() for blocks in journal.flush()]
            middle = time.process_time()
            for frame in frames:
                feed.take(pb.GroupMessage.FromString(frame).blocks)
            end = time.process_time()
            published, followed = published + middle - begin, followed + end - middle
            changes, size = changes + len(told), size + sum(map(len, frames))
    assert directory.num_holdings == groups * held, "the directory has lost count"
    return changes / published, changes / followed, round(size / changes)


def stops(groups: int, held: int) -> dict[str, float]:
    """The longest that a loop is held up, seconds of the processor: by first snapshots, by those behind a gap in which half of
    all blocks changed, and by groups that leave."""
    loading().result()
    work = deque[Callable[[], None]]()
    directory = BlockDirectory(later=work.append)
    numbers = [directory.join() for _ in range(groups)]
    feeds = [BlockFeed(directory, number) for number in numbers]
    journals = [BlockJournal(str(number)) for number in range(groups)]
    rings = [[os.urandom(16) for _ in range(held)] for _ in range(groups)]

    def longest(calls: Sequence[Callable[[], object]]) -> float:
        gc.freeze()  # what the groups hold is none of the loop's
        most = 0.0
        coming = deque(calls)
        while coming or work:  # by turns, as a loop does
            for queue in (coming, work):
                if queue:
                    begin = time.thread_time()
                    queue.popleft()()
                    most = max(most, time.thread_time() - begin)
        return most

    def snapshots(changed: int) -> list[Callable[[], object]]:
        calls = list[Callable[[], object]]()
        for number, (journal, ring, feed) in enumerate(zip(journals, rings, feeds, strict=True)):
            new = [os.urandom(16) for _ in range(changed)]
            journal.take("device", dict.fromkeys(ring[:changed], False) | dict.fromkeys(new + ring[changed:], True))
            deque(journal.flush(), 0)
            feed.begin(str(number))
            frames = [message.SerializeToString() for message in journal.snapshot()]
            calls += [lambda frame=frame, feed=feed: feed.take(pb.Blocks.FromString(frame)) for frame in frames]  # type: ignore[misc]
        return calls

    found = {"first": longest(snapshots(0)), "half of it changed": longest(snapshots(held // 2))}
    assert directory.num_holdings == groups * held, "the directory has lost count"
    found["leaving"] = longest([lambda number=number: directory.leave(number) for number in numbers])  # type: ignore[misc]
    assert directory.num_holdings == 0, "the directory has lost count"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64, help="that one gateway follows")
    parser.add_argument("--held", type=int, default=20_000, help="blocks of each")
    parser.add_argument("--batch", type=int, default=500, help="new blocks in a message")
    parser.add_argument("--rounds", type=int, default=20, help="messages of each group")
    parser.add_argument("--stops", action="store_true", help="how long a gateway's loop is held up by snapshots")
    args = parser.parse_args()
    if args.stops:
        refuse(parser, args, "with --stops", "batch", "rounds")
        for what, seconds in stops(args.groups, args.held).items():
            print(
                f"{args.groups} groups of {args.held} blocks, {what}: the loop stops for {seconds * 1e3:.1f} ms at most"
            )
        return
    if args.batch > args.held:
        parser.error("--batch: no more blocks than --held")
    published, followed, size = run(args.groups, args.held, args.batch, args.rounds)
    print(
        f"{args.groups} groups of {args.held} blocks: published {published:,.0f} and followed {followed:,.0f} changes/s"
    )
    print(f"of CPU time on one core, {size} bytes each")


if __name__ == "__main__":
    main()
