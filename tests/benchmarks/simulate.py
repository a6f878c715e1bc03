"""What a model would do on a slice of TPUs that is not there: tokens/s and time to first token, by simulation.

    python tests/benchmarks/simulate.py MODEL --topology v6e:2x4 --quantization-config-path int8_w8a8.yaml \\
        --kv-cache-dtype int8 --at-once 64 128 256

The project's own scheduler chooses the steps, over pages and flags as `podquant serve` would have them; the clock is a
model of a step, no device. A step takes as long as the longer of its reads and its products, plus its collectives:

* reads: weights once, and the keys and values of each row, at `--memory-share` of the memory's speed; attention reads
  `--attention-factor` times what it needs, which is what compiling the portable one showed in time on v6e;
* products: 2 operations a weight and token, at `--product-share` of the matrix unit's speed;
* collectives: `--collective-us` for each of the two of a layer, which nobody has measured.

Requests come in all at once, and each that ends is followed by another. Nothing here ran on a TPU.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from dataclasses import dataclass, field

from podquant.app.plan_serving import Served, ServingOptions, open_subject
from podquant.cluster.topology import parse_slice
from podquant.engine.ahead import cache_shape
from podquant.engine.capacity import ServingPlan, plan_serving
from podquant.engine.pages import PagePool
from podquant.engine.request import Request, SamplingParams
from podquant.engine.roofline import decode_cost
from podquant.engine.scheduler import Scheduler
from podquant.engine.steps import Sequence, Step


@dataclass(frozen=True)
class Clock:
    """How long a step takes; see the module."""

    plan: ServingPlan
    memory_share: float
    product_share: float
    attention_factor: float
    collective_seconds: float

    def seconds(self, step: Step) -> float:
        """Of a step."""
        model, generation = self.plan.model, self.plan.tpu.generation
        cost = decode_cost(model, self.plan.subject.scheme_of, generation, 0, batch=step.num_tokens, context=1)
        positions = sum(chunk.start + chunk.length for chunk in step.chunks)
        bandwidth = generation.hbm_bandwidth / generation.devices_per_chip * self.memory_share
        cache_bytes = positions * self.plan.token_bytes * self.attention_factor
        reads = (cost.weight_bytes + cache_bytes) / bandwidth
        collectives = 2 * model.config.num_layers * self.collective_seconds * (model.layout.tp_size > 1)
        return max(reads, cost.product_seconds / self.product_share) + collectives


@dataclass
class Run:
    """One load: so many requests at once, until each place has been taken `rounds` times."""

    clock: Clock
    at_once: int
    num_prompt: int
    num_new: int
    rounds: int = 3
    now: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        plan = self.clock.plan
        shape = cache_shape(plan)
        self._scheduler = Scheduler(
            PagePool(shape.num_pages, shape.page_size),
            max_running=shape.num_slots,
            max_tokens=plan.settings.step_tokens,
        )
        self._sent: dict[int, float] = {}
        self._num_sent = 0

    def go(self) -> None:
        """Run it all."""
        for _ in range(self.at_once):
            self._send()
        while self._scheduler.has_work:
            step = self._scheduler.schedule()
            assert step is not None
            self.now += self.clock.seconds(step)
            for sequence, tokens in self._scheduler.complete(step, [[0]] * len(step.sampling)):
                self._hear(sequence, len(tokens))

    def _send(self) -> None:
        if self._num_sent < self.at_once * self.rounds:
            name = f"r{self._num_sent}"
            prompt = (self._num_sent + 1, *[1] * (self.num_prompt - 1))
            sequence = self._scheduler.add(Request(name, prompt, SamplingParams(max_tokens=self.num_new), name))
            self._sent[id(sequence)] = self.now
            self._num_sent += 1

    def _hear(self, sequence: Sequence, count: int) -> None:
        self.num_tokens += count
        if sequence.num_generated == 1:
            self.first_tokens.append(self.now - self._sent[id(sequence)])
        if sequence.finished:
            self._send()


def main() -> None:
    """Simulate, and print a line for each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--topology", required=True)
    parser.add_argument("--quantization-config-path")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "bfloat16", "int8", "fp8"], default="auto")
    parser.add_argument("--tp-size", type=int)
    parser.add_argument("--max-running-requests", type=int)
    parser.add_argument("--at-once", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--memory-share", type=float, default=0.85)
    parser.add_argument("--product-share", type=float, default=0.45)
    parser.add_argument("--attention-factor", type=float, default=2.1)
    parser.add_argument("--collective-us", type=float, default=15.0)
    arguments = parser.parse_args()
    options = ServingOptions(
        tp_size=arguments.tp_size,
        kv_cache_dtype=arguments.kv_cache_dtype,
        max_running_requests=arguments.max_running_requests,
    )
    subject = open_subject(Served(arguments.model, arguments.quantization_config_path))
    plan = plan_serving(subject, parse_slice(arguments.topology), options)
    shares = (arguments.memory_share, arguments.product_share, arguments.attention_factor)
    clock = Clock(plan, *shares, arguments.collective_us * 1e-6)
    print("simulated, not run on a TPU")
    print(f"{'at once':>8}{'tok/s':>9}{'TTFT s':>9}{'p99':>8}")
    for at_once in arguments.at_once:
        run = Run(clock, at_once, arguments.prompt_tokens, arguments.new_tokens)
        run.go()
        late = heapq.nlargest(max(1, len(run.first_tokens) // 100), run.first_tokens)[-1]
        print(f"{at_once:>8}{run.num_tokens / run.now:>9.0f}{statistics.median(run.first_tokens):>9.2f}{late:>8.2f}")


if __name__ == "__main__":
    main()
