"""How fast an OpenAI-compatible server decodes: output tokens/s, time to first token, inter-token latency.

    python tests/benchmarks/serve.py http://127.0.0.1:30000 [--concurrency 1 8] [--text-prompts]

Prompts are random token ids, which every server understands alike; `--text-prompts` sends words instead, for servers
that take text only. Each concurrency runs once unmeasured, then `--rounds` times; reported are the best round and the
median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Timing:
    """When a request was sent and when each piece of its output came, in seconds."""

    sent: float
    arrivals: list[float]
    num_tokens: int


def prompt(options: argparse.Namespace, seed: int) -> str | list[int]:
    """A prompt of the wanted number of tokens; as words, about as many."""
    chooser = random.Random(seed)
    if options.text_prompts:
        return " ".join(chooser.choices(["time", "river", "stone", "green", "house", "light"], k=options.prompt_tokens))
    return chooser.choices(range(1000, options.largest_token), k=options.prompt_tokens)


async def ask(client: httpx.AsyncClient, options: argparse.Namespace, seed: int) -> Timing:
    """One streamed completion."""
    body = {
        "model": options.model,
        "prompt": prompt(options, seed),
        "max_tokens": options.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, arrivals, num_tokens = time.perf_counter(), [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now, event = time.perf_counter(), json.loads(line[len("data: ") :])
                if event["choices"]:
                    arrivals.append(now)
                if event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
    return Timing(sent, arrivals, num_tokens or len(arrivals))


async def measure(client: httpx.AsyncClient, options: argparse.Namespace, concurrency: int, seed: int) -> list[float]:
    """Tokens/s over all, median TTFT, median and 99th percentile of the inter-token latency in ms."""
    requests = (ask(client, options, seed + i) for i in range(concurrency))
    timings = await asyncio.gather(*requests)
    seconds = max(t.arrivals[-1] for t in timings) - min(t.sent for t in timings)
    gaps = sorted(b - a for t in timings for a, b in zip(t.arrivals, t.arrivals[1:], strict=False))
    return [
        sum(t.num_tokens for t in timings) / seconds,
        statistics.median(t.arrivals[0] - t.sent for t in timings),
        1e3 * statistics.median(gaps),
        1e3 * gaps[int(0.99 * (len(gaps) - 1))],
    ]


async def run(options: argparse.Namespace) -> None:
    """Measure each concurrency and print a row for it."""
    async with httpx.AsyncClient(base_url=options.url, timeout=600.0) as client:
        if not options.model:
            options.model = (await client.get("/v1/models")).json()["data"][0]["id"]
        print(f"{'at once':>8}{'tok/s best':>12}{'median':>9}{'TTFT s':>9}{'ITL ms':>9}{'p99':>9}")
        for concurrency in options.concurrency:
            await measure(client, options, concurrency, 0)
            rounds = [await measure(client, options, concurrency, 100 * r) for r in range(1, options.rounds + 1)]
            best, median = max(row[0] for row in rounds), statistics.median(row[0] for row in rounds)
            ttft, gap, tail = (statistics.median(row[i] for row in rounds) for i in (1, 2, 3))
            print(f"{concurrency:>8}{best:>12.1f}{median:>9.1f}{ttft:>9.3f}{gap:>9.2f}{tail:>9.2f}", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="", help="the first the server lists, if not given")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest-token", type=int, default=40000, help="token ids are drawn from 1000 to this")
    parser.add_argument("--text-prompts", action="store_true")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
