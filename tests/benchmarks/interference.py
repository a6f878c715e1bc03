"""How much a long prompt delays what is being generated: gaps between tokens of running streams while it is computed.

podquant serve MODEL --context-length 24576 --max-total-tokens 49152 …
python tests/benchmarks/interference.py http://127.0.0.1:30000 [--streams 8] [--prompt-tokens 20000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from itertools import pairwise

import httpx


async def stream(client: httpx.AsyncClient, model: str, prompt: list[int], new: int, arrivals: list[float]) -> None:
    """Ask, and note when each token comes."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                arrivals.append(time.perf_counter())


async def measure(options: argparse.Namespace) -> None:
    """Start the streams, then the prompt, and print the gaps before it and beside it."""
    chooser = random.Random(0)
    async with httpx.AsyncClient(base_url=options.url, timeout=900.0) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        streams: list[list[float]] = [[] for _ in range(options.streams)]

        def some(count: int) -> list[int]:
            return chooser.choices(range(1000, 40000), k=count)

        tasks = [asyncio.create_task(stream(client, model, some(32), options.new_tokens, each)) for each in streams]
        while not all(len(each) > options.before for each in streams):
            await asyncio.sleep(0.05)
        sent = time.perf_counter()
        first: list[float] = []
        await stream(client, model, some(options.prompt_tokens), 1, first)
        for task in tasks:
            task.cancel()
    gaps = [(b, b - a) for each in streams for a, b in pairwise(each)]
    alone = [gap for at, gap in gaps if at < sent]
    beside = [gap for at, gap in gaps if sent <= at <= first[0]]
    print(f"first token of {options.prompt_tokens} after {first[0] - sent:.1f} s")
    for name, found in (("before", alone), ("beside", beside)):
        print(f"{name}: gaps median {1e3 * statistics.median(found):.0f} ms, worst {1e3 * max(found):.0f} ms")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=20000)
    parser.add_argument("--new-tokens", type=int, default=4000)
    parser.add_argument("--before", type=int, default=40)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
