"""Ports of this machine that nobody listens on."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

FIRST, END = 12_000, 32_768
"""Ports are taken from this range: from 32768 on the kernel gives them to any program that connects."""


def free_ports(count: int) -> range:
    """`count` neighbouring ports that are free on all interfaces.

    They are free when this returns: whoever wants them has to listen on them soon.
    """
    while True:
        first = random.SystemRandom().randrange(FIRST, END - count)  # a seeded run must not repeat its ports
        ports = range(first, first + count)
        with ExitStack() as stack, suppress(OSError):
            for port in ports:
                stack.enter_context(socket.socket()).bind(("", port))
            return ports
