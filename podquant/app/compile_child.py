"""The process in which libtpu compiles: reads what from stdin, writes one JSON object a line to stdout.

`podquant.app.compile_ahead` starts it with the environment that libtpu needs. Knows nothing of people.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax

from podquant.app.plan_serving import Served, open_subject
from podquant.cluster.topology import parse_slice
from podquant.engine.ahead import compile_steps
from podquant.engine.capacity import ServingOptions, plan_serving


def main() -> None:
    """Compile what stdin asks for."""
    asked = json.load(sys.stdin)
    if asked["out"] is not None:
        jax.config.update("jax_compilation_cache_dir", asked["out"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    subject = open_subject(Served(**asked["served"]))
    plan = plan_serving(subject, parse_slice(asked["slice"]), ServingOptions(**asked["options"]))
    for compiled in compile_steps(plan):
        print(json.dumps(dataclasses.asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
