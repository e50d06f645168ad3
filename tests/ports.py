"""Ports for the rendezvous of a test's ranks."""

import random
import socket
from contextlib import suppress


def free_port():
    """Return a port that nobody listens on, and that no connection is given meanwhile.

    It is below Linux's range for connections, from which port 0 would choose.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port
