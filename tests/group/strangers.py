"""What somebody without a secret can do to the ports of a group."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from tests.cluster.ray_cluster import descendants

IMPOSTOR = """
import sys, jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=1, initialization_timeout=2)
print("joined")
"""
"""Calls a port as JAX's coordinator, to be rank 1; without credentials."""


def listening_ports(pid: int) -> list[int]:
    """TCP ports on which a process, or one below it, listens."""
    inodes = set()
    for each in (pid, *descendants(pid)):
        for descriptor in Path(f"/proc/{each}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return sorted({int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A" and line[9] in inodes})


def call_as_strangers(port: int) -> None:
    """Say nothing, and say things that mean nothing."""
    for noise in (b"", b"\0" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", os.urandom(5000), b"\xff" * 70_000):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(noise)
