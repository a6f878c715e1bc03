"""What a prompt far beyond the context does to others: the worst gap between tokens, and the time to its refusal.

    python tests/benchmarks/long_prompt.py http://127.0.0.1:30000 [--megabytes 15] [--streams 8] [--chat]

Some streams run; in their midst one long prompt is sent, as text. Run it against a server that has room for all streams
(`--max-running-requests`). Reported are the longest gaps before and from then on, and how the long prompt was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

_LINE = "The river runs past the old stone house, and 17 green lights shine. "


@dataclass
class Stream:
    """When each piece of one stream arrived, in seconds."""

    arrivals: list[float] = field(default_factory=list)

    def worst_gap(self, begin: float, end: float) -> float:
        """The longest time without a piece in a span of time."""
        inside = [begin, *(at for at in self.arrivals if begin < at < end), end]
        return max(b - a for a, b in pairwise(inside))


async def read(client: httpx.AsyncClient, options: argparse.Namespace, stream: Stream) -> None:
    """Follow one stream to its end."""
    body = {
        "prompt": [1000, 2000, 3000],
        "max_tokens": options.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                stream.arrivals.append(time.perf_counter())


def send(options: argparse.Namespace) -> tuple[float, float, httpx.Response]:
    """Send the long prompt; when, when it was answered, and how."""
    text = _LINE * int(options.megabytes * 1e6 / len(_LINE))
    body = {"messages": [{"role": "user", "content": text}]} if options.chat else {"prompt": text}
    route = "/v1/chat/completions" if options.chat else "/v1/completions"
    with httpx.Client(base_url=options.url, timeout=600) as client:
        request = client.build_request("POST", route, json=body)
        began = time.perf_counter()
        answer = client.send(request)
        return began, time.perf_counter(), answer


async def run(options: argparse.Namespace) -> None:
    """Measure once and print."""
    streams = [Stream() for _ in range(options.streams)]
    async with httpx.AsyncClient(base_url=options.url, limits=httpx.Limits(max_connections=None)) as client:
        reading = [asyncio.create_task(read(client, options, stream)) for stream in streams]
        while not all(len(stream.arrivals) > 5 for stream in streams):
            await asyncio.sleep(0.01)
        quiet_from = time.perf_counter()
        await asyncio.sleep(3)
        began, answered, answer = await asyncio.to_thread(send, options)
        await asyncio.sleep(3)
        over = time.perf_counter()
        quiet = max(stream.worst_gap(quiet_from, began) for stream in streams)
        worst = max(stream.worst_gap(began, over) for stream in streams)
        for task in reading:
            task.cancel()
    print(f"worst gap between tokens: {quiet:.3f} s before, {worst:.3f} s from the long prompt on")
    print(f"answered after {answered - began:.3f} s: {answer.status_code} {answer.text[:300]}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--megabytes", type=float, default=15)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4000, help="of each stream; it must outlast the long prompt")
    parser.add_argument("--chat", action="store_true")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
