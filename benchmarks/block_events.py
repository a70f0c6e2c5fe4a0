"""What block events cost: blocks a second that a group publishes, and that a gateway follows, on one core.

Each of the groups holds `--held` blocks and replaces them one by one: half of all changes are stored, half evicted. A 70 B
model at 7,700 tokens a second stores about 500 blocks of 16 tokens a second.
Example: python benchmarks/block_events.py --groups 64 --held 20000
"""

from __future__ import annotations

import argparse
import os
import time

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.directory import BlockDirectory, BlockFeed
from kvasir.proto import group_pb2 as pb


def run(groups: int, held: int, batch: int, rounds: int) -> tuple[float, float, int]:
    """(blocks/s published, blocks/s followed, bytes of a block's change)."""
    journals = [BlockJournal(str(number)) for number in range(groups)]
    rings = [[os.urandom(16) for _ in range(held)] for _ in range(groups)]
    directory = BlockDirectory()
    feeds = [BlockFeed(directory, directory.join()) for _ in range(groups)]
    for number, (journal, ring, feed) in enumerate(zip(journals, rings, feeds, strict=True)):
        journal.take("device", dict.fromkeys(ring, True))
        journal.flush()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64, help="that one gateway follows")
    parser.add_argument("--held", type=int, default=20_000, help="blocks of each")
    parser.add_argument("--batch", type=int, default=500, help="new blocks in a message")
    parser.add_argument("--rounds", type=int, default=20, help="messages of each group")
    args = parser.parse_args()
    if args.batch > args.held:
        parser.error("--batch: no more blocks than --held")
    published, followed, size = run(args.groups, args.held, args.batch, args.rounds)
    print(
        f"{args.groups} groups of {args.held} blocks: published {published:,.0f} and followed {followed:,.0f} changes/s"
    )
    print(f"of CPU time on one core, {size} bytes each")


if __name__ == "__main__":
    main()
