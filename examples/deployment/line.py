"""A slow line in user space, for kernels without `tc netem`: what leaves one end arrives late at the other, or never.

    line.py NAME NAME '{"rate": 20000000, "delay_ms": 50, "loss": 0.01}'

Makes two network cards of these names and carries whole Ethernet frames between them until SIGTERM, as two netem queues would:
in each direction a frame is lost with probability `loss`, leaves when the bits before it have left at `rate` bits per second,
and arrives `delay_ms` later; a queue takes 1000 frames. So TCP above it sees real losses, and repeats in earnest.
"""

import contextlib
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
QUEUE_FRAMES, MOST_FRAME = 1000, 65536


class Direction:
    """Frames under way from one card to the other."""

    def __init__(self, source: int, sink: int, rate: float, delay: float, loss: float, seed: int) -> None:
        self.source, self.sink, self.rate, self.delay, self.loss = source, sink, rate, delay, loss
        self.under_way: deque[tuple[float, bytes]] = deque()
        self.free = 0.0
        self.draw = random.Random(seed)

    def take(self, now: float) -> None:
        """Takes what the card has to send."""
        while True:
            try:
                frame = os.read(self.source, MOST_FRAME)
            except BlockingIOError:
                return
            if self.draw.random() < self.loss or len(self.under_way) >= QUEUE_FRAMES:
                continue
            self.free = max(self.free, now) + len(frame) * 8 / self.rate
            self.under_way.append((self.free + self.delay, frame))

    def give(self, now: float) -> None:
        """Hands over what has arrived."""
        while self.under_way and self.under_way[0][0] <= now:
            try:
                os.write(self.sink, self.under_way.popleft()[1])
            except OSError:
                return  # the card is not up yet


def card(name: str) -> int:
    """Makes a network card; returns its descriptor, on which a read is a frame that it sends."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def main(first: str, second: str, told: str) -> None:
    like = json.loads(told)
    with contextlib.suppress(PermissionError):
        os.nice(-15)  # a busy computer must not make the line slower than it is
    one, two = card(first), card(second)
    rate, delay, loss = like["rate"], like["delay_ms"] / 1000, like["loss"]
    directions = [Direction(one, two, rate, delay, loss, 1), Direction(two, one, rate, delay, loss, 2)]
    print("ready", flush=True)
    while True:
        next_arrival = min((way.under_way[0][0] for way in directions if way.under_way), default=float("inf"))
        wait = min(1.0, max(0.0, next_arrival - time.monotonic()))
        readable, _, _ = select.select([one, two], [], [], wait)
        now = time.monotonic()
        for way in directions:
            if way.source in readable:
                way.take(now)
            way.give(now)


if __name__ == "__main__":
    main(*sys.argv[1:])
