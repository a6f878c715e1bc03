"""What the prefix cache spares: the time to the first token of prompts that begin alike, beside that of others.

    python tests/benchmarks/prefix.py http://127.0.0.1:30000 [--shared 1000] [--own 24] [--requests 32] [--at-once 4]

Two lots of requests take turns, in one run: in one, all prompts begin with the same tokens, in the other each with its
own. Reported are the mean times to the first token, their ratio, and the tokens that `usage` says were cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from statistics import mean

import httpx


async def first_token(client: httpx.AsyncClient, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of a prompt, and how much of it was cached."""
    body = {
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, cached = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - began
            usage = json.loads(line.removeprefix("data: ")).get("usage")
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
    return first, cached


async def measure(options: argparse.Namespace) -> None:
    """Run both lots, a group of each in turn."""
    chance = random.Random(options.seed)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(100, options.vocabulary) for _ in range(count)]

    beginning = tokens(options.shared)
    found: dict[str, list[tuple[float, int]]] = {"shared": [], "own": []}
    async with httpx.AsyncClient(base_url=options.url) as client:
        await first_token(client, tokens(options.shared + options.own))
        for _ in range(options.requests // options.at_once):
            for name, lot in found.items():
                prompts = [
                    (beginning if name == "shared" else tokens(options.shared)) + tokens(options.own)
                    for _ in range(options.at_once)
                ]
                lot += await asyncio.gather(*(first_token(client, prompt) for prompt in prompts))
    for name, lot in found.items():
        seconds, cached = mean(each for each, _ in lot), sum(each for _, each in lot)
        print(f"{name:>6}: first token after {seconds * 1000:.0f} ms, {cached:,} tokens cached")
    print(f"ratio: {mean(t for t, _ in found['shared']) / mean(t for t, _ in found['own']):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--shared", type=int, default=1000, help="tokens that prompts begin with")
    parser.add_argument("--own", type=int, default=24, help="tokens behind them")
    parser.add_argument("--requests", type=int, default=32, help="of each lot")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
