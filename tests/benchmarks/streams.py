"""What many open streams cost a server: its threads and memory before, while all are open, and after.

    python tests/benchmarks/streams.py http://127.0.0.1:30000 --pid PID [--streams 2000] [--tokens 8]

Run it against a server on this machine whose queue has room for all of them (`--max-queued-requests`), with as many
file descriptors allowed (`ulimit -n`) to both. Every stream must end with its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import httpx


class Opening:
    """Counts streams whose headers have arrived."""

    def __init__(self, expected: int) -> None:
        self._missing = expected
        self.is_done = asyncio.Event()

    def count(self) -> None:
        """One more."""
        self._missing -= 1
        if not self._missing:
            self.is_done.set()


def figures(pid: int) -> str:
    """Threads and resident memory of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return f"{int(lines['Threads'])} threads, {int(lines['VmRSS'].split()[0]) / 1024:.0f} MiB"


async def follow(client: httpx.AsyncClient, tokens: int, opening: Opening) -> int:
    """Open a stream, and follow it to its end; how many pieces came."""
    body = {"prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    async with client.stream("POST", "/v1/completions", json=body, timeout=None) as response:
        response.raise_for_status()
        opening.count()
        return sum([line.count('"token_ids":[') async for line in response.aiter_lines()])


async def run(options: argparse.Namespace) -> None:
    """Measure once and print."""
    print(f"before: {figures(options.pid)}")
    began = time.perf_counter()
    opening = Opening(options.streams)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=options.url, limits=limits) as client:
        reading = [asyncio.create_task(follow(client, options.tokens, opening)) for _ in range(options.streams)]
        ended = asyncio.gather(*reading)
        first: set[asyncio.Future[Any]] = {asyncio.create_task(opening.is_done.wait()), ended}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        print(f"{options.streams} open after {time.perf_counter() - began:.1f} s: {figures(options.pid)}")
        pieces = await ended
    whole = sum(count > 0 for count in pieces)
    print(f"{whole} of {options.streams} ended after {time.perf_counter() - began:.1f} s: {figures(options.pid)}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--streams", type=int, default=2000, help="how many")
    parser.add_argument("--tokens", type=int, default=8, help="of each")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
