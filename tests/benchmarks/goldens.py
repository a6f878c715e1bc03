"""Every golden in every mode on every layout, of which tests/engine/test_goldens.py has a choice: by hand.

    python -m tests.benchmarks.goldens [CHECKPOINT ...]

Prints the distance from the reference in each mode, as it is on each layout, and `!` behind what is too far.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from tests.engine.test_goldens import (
    LAYOUTS,
    MODES,
    MOE_LAYOUTS,
    MOE_NAMES,
    NAMES,
    VARIANTS,
    Cell,
    compute,
    distance,
)


def main(names: Sequence[str]) -> int:
    """A line for each checkpoint and mode; 1 if anything is too far."""
    num_far = 0
    with TemporaryDirectory() as directory:
        for name in names:
            layouts = dict.fromkeys((*LAYOUTS, *chain(*MOE_LAYOUTS))) if name in MOE_NAMES else LAYOUTS
            for mode in MODES:
                texts = []
                for layout in layouts:
                    cell = Cell(name, mode, *layout)
                    found, most = distance(cell, compute(*cell, Path(directory)))
                    num_far += found > most
                    texts.append(f"{cell.tp}/{cell.ep} {found:.1e}{'!' * (found > most)}")
                print(f"{name:15} {mode:10}", *texts, flush=True)
            jax.clear_caches()
    return int(num_far > 0)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    sys.exit(main(sys.argv[1:] or (*NAMES, *VARIANTS, *MOE_NAMES)))
