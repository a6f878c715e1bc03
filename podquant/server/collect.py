"""Responses that are not streamed: wait for all of a generation, then count it."""

from __future__ import annotations

from typing import Any

from podquant.engine.request import Output
from podquant.server.generation import Generation
from podquant.server.schemas import StreamOptions


async def collect(generation: Generation, num_sequences: int) -> list[Output]:
    """Run a generation; each sequence's news as one. Raises what `Generation` does."""
    pieces: list[list[Output]] = [[] for _ in range(num_sequences)]
    async with generation:
        async for batch in generation.news():
            for index, output in batch:
                pieces[index].append(output)
    return [Output.join(outputs) for outputs in pieces]


def usage(num_prompt: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's `usage`; `num_cached` of the prompts' tokens were in the KV cache already."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def usage_of_event(options: StreamOptions, so_far: dict[str, Any]) -> dict[str, Any]:
    """What an event before the last says of the usage: nothing unless asked for, and null unless asked for more."""
    if not options.include_usage:
        return {}
    return {"usage": so_far if options.counts_always else None}
