"""How fast weights are quantized, beside a copy of memory: `python tests/benchmarks/quantize.py`.

Prints GB/s of input on one core, quality statistics included, the best of several rounds; run it on a quiet machine.
First it prints what the compiled kernels cost to load: seconds the first time ever, tenths of one from the disk cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from podquant.config.scheme import Scheme
from podquant.quantize.kernels import quantizer
from podquant.quantize.qarray import QArray
from podquant.quantize.weights import quantize_window

SOURCES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]
SCHEMES = [
    Scheme(dtype, weight_block_size=block) for dtype in ("int8", "float8_e4m3fn") for block in (None, (128, 128))
]


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="GB/s of weight quantization on one core")
    parser.add_argument("--rows", type=int, default=4096, help="rows of the weight")
    parser.add_argument("--columns", type=int, default=4096, help="columns of the weight")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is measured; the best counts")
    arguments = parser.parse_args()
    for bits in (16, 32):
        print(f"kernels for {bits}-bit sources ready in {best_seconds(partial(quantizer, bits), 1):.2f} s")
    shape = (arguments.rows, arguments.columns)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    for source in SOURCES:
        weight = values.astype(source)
        copy = np.empty_like(weight)
        np.copyto(copy, weight)
        seconds = best_seconds(partial(np.copyto, copy, weight), arguments.rounds)
        print(f"{source.name:9s} {'copy':26s} {weight.nbytes / seconds / 1e9:6.2f} GB/s")
        for scheme in SCHEMES:
            out = QArray.empty(shape, scheme)
            work = partial(quantize_window, weight, scheme, first_row=0, total_rows=len(weight), out=out)
            work()
            seconds = best_seconds(work, arguments.rounds)
            print(f"{source.name:9s} {scheme.label:26s} {weight.nbytes / seconds / 1e9:6.2f} GB/s")


if __name__ == "__main__":
    main()
