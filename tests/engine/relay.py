"""A bad cable: hands packets from one TUN device to another, late, and loses some. `python relay.py DEVICE DEVICE`.

Commands come line by line on the standard input: `bad SECONDS SHARE` (delay one way, share of packets lost), `only PORT` (a
firewall: of TCP over IPv4 what goes to or from this port) and `cut`. Each is answered with `ok`.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


def opened(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def ports(packet: bytes) -> tuple[int, ...]:
    """Of TCP over IPv4; else none."""
    if packet[0] >> 4 != 4 or packet[9] != 6:
        return ()
    found: tuple[int, int] = struct.unpack_from("!HH", packet, 4 * (packet[0] & 15))
    return found


def main() -> None:
    ends = [opened(name) for name in sys.argv[1:3]]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    delay, loss, cut, only = 0.0, 0.0, False, 0
    due: list[tuple[float, int, int, bytes]] = []
    number, rng = 0, random.Random(0)
    print("ok", flush=True)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for ready in select.select([*ends, 0], [], [], wait)[0]:
            if ready == 0:
                words = os.read(0, 4096).split()
                if not words:
                    return
                if words[0] == b"cut":
                    cut = True
                elif words[0] == b"only":
                    only = int(words[1])
                else:
                    delay, loss = float(words[1]), float(words[2])
                print("ok", flush=True)
                continue
            packet = os.read(ready, 65536)
            number += 1
            if only and only not in ports(packet):
                continue
            if not cut and rng.random() >= loss:
                heapq.heappush(due, (time.monotonic() + delay, number, other[ready], packet))
        while due and due[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(due)
            try:
                if not cut:
                    os.write(to, packet)
            except OSError:  # its queue is full, or it isn't up yet: lost
                continue


if __name__ == "__main__":
    main()
