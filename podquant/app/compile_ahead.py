"""The steps of a server compiled here for a slice that is not here: whether they fit, and what they read.

libtpu can abort the process that loads it, so a child process compiles. Knows nothing of compilers but that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from podquant.app.plan_serving import Served as Served  # part of this module's signatures
from podquant.app.plan_serving import lack, open_subject, ways_to_fit
from podquant.app.report import size_text, table
from podquant.app.serving_report import device_text, schemes_text
from podquant.cluster.topology import GENERATIONS, TpuSlice, known_slices, parse_slice
from podquant.engine.ahead import Compiled as Compiled
from podquant.engine.ahead import cache_shape
from podquant.engine.capacity import ServingOptions as ServingOptions  # part of this module's signatures
from podquant.engine.capacity import ServingPlan, plan_serving
from podquant.errors import CapacityError, ConfigError, StorageError

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    # Without these three libtpu asks the network what machine it is on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
_ON_TPU_VMS = " --xla_tpu_use_enhanced_launch_barrier=true"
"""What JAX adds to LIBTPU_INIT_ARGS there: it is a part of the cache's keys."""

_TAIL = 2000
"""Characters of what the compiler said last that an error shows."""


def compile_report(
    served: Served,
    topology: str,
    options: ServingOptions,
    out: str | None = None,
    on_compiled: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Compile the largest steps of a model for a slice.

    Args:
        served: the model.
        topology: the slice.
        options: how it is to be served.
        out: a directory to write JAX's persistent compilation cache to.
        on_compiled: told of each step once it is compiled.

    Returns:
        What was compiled, as lines of text.

    Raises:
        ConfigError: no such slice, none that libtpu compiles for, or there is no libtpu here.
        CapacityError: a step does not fit; says by how much, and what does.
        StorageError: `out` cannot be written.
        PodquantError: as for a plan.
    """
    tpu = _compilable(topology)
    _require_libtpu()
    folder = _made(out)
    subject = open_subject(served)
    plan = plan_serving(subject, tpu, options)
    if plan.shortage:
        raise CapacityError(f"{lack(plan)}; {ways_to_fit(served, subject, plan, options)}")
    asked = {
        "served": dataclasses.asdict(served),
        "slice": tpu.name,
        "options": dataclasses.asdict(options),
        "out": folder and str(folder),
    }
    found = _run(asked, tpu, on_compiled)
    worst = max(found, key=lambda step: step.lacking)
    if worst.lacking:
        raise CapacityError(
            f"{tpu.name}: {worst.name}: the compiler lacks {size_text(worst.lacking)} of a "
            f"{device_text(tpu.generation)}'s memory for what the step takes beside weights and cache; lower "
            f"--mem-fraction-static, which is {plan.settings.mem_fraction_static:g}, or --max-running-requests"
        )
    return [*_lines(plan, found), *_cache_lines(folder)]


def _compilable(topology: str) -> TpuSlice:
    """The slice, if libtpu knows it: others can abort the process. Raises ConfigError."""
    tpu = parse_slice(topology)
    if tpu.generation.compiler_name is None:
        known = ", ".join(row.compiler_name for row in GENERATIONS if row.compiler_name)
        raise ConfigError(
            f"{topology}: libtpu describes {tpu.generation.name} with other devices than its machines show: nothing "
            f"is compiled ahead for it; expected a slice of {known}"
        )
    names = [each.name for each in known_slices() if each.generation == tpu.generation]
    if tpu.name not in names:
        raise ConfigError(f"{topology}: libtpu is asked for known slices only: expected one of {', '.join(names)}")
    return tpu


def _require_libtpu() -> None:
    if find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for TPUs takes libtpu, which is not installed: install podquant[tpu], on Linux on x86-64"
        )


def _made(out: str | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}: choose a directory that can be written") from error
    return folder


def _run(asked: object, tpu: TpuSlice, on_compiled: Callable[[str], None]) -> list[Compiled]:
    found = []
    with TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "podquant.app.compile_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | _ENVIRONMENT | {"LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", "") + _ON_TPU_VMS},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        with child:
            try:
                child.stdin.write(json.dumps(asked))
                child.stdin.close()
                for line in child.stdout:
                    found.append(Compiled(**json.loads(line)))
                    on_compiled(f"compiled {found[-1].name} in {found[-1].seconds:.1f} s")
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            raise ConfigError(_ended(child.returncode, tpu, found, errors.read()))
    return found


def _ended(status: int, tpu: TpuSlice, found: Sequence[Compiled], errors: str) -> str:
    """What to say of a compiler that did not come to its end."""
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    after = f" after {found[-1].name}" if found else ""
    return (
        f"{tpu.name}: the compiler {how}{after}; choose another slice or other flags: on a pod this would not compile "
        f"either. It said last: {errors.strip()[-_TAIL:]}"
    )


def _lines(plan: ServingPlan, found: Sequence[Compiled]) -> list[str]:
    unit = device_text(plan.tpu.generation)
    rows = [("step", "seconds", "HBM bytes", "must read", "ratio", "arguments", "temp", "collectives")]
    for step in found:
        rows.append(
            (
                step.name,
                f"{step.seconds:.1f}",
                size_text(step.hbm_bytes),
                size_text(step.bound_bytes),
                f"{step.hbm_bytes / step.bound_bytes:.2f}",
                size_text(step.argument_bytes),
                size_text(step.temp_bytes),
                " ".join(f"{count:g} {kind}" for kind, count in sorted((step.collectives or {}).items())),
            )
        )
    most = max(step.argument_bytes + step.temp_bytes for step in found)
    shape = cache_shape(plan)
    tokens = shape.num_pages * shape.page_size
    planned = plan.weight_bytes + plan.slot_bytes + plan.token_bytes * tokens
    return [
        f"compiled for {plan.tpu.name}, not run: --tp-size {plan.tp_size} --ep-size {plan.ep_size}, "
        f"{schemes_text(plan)}, {shape.num_slots} slots, {tokens:,} tokens of cache; bytes of a {unit}",
        "",
        *table(rows),
        "",
        f"fits: {size_text(most)} of the {size_text(plan.tpu.generation.device_bytes)} that programs may use; the plan "
        f"says {size_text(planned)}",
        f"HBM bytes: read off the schedule of a step that generates for {found[0].decodes} sequences of "
        f"{found[0].context:,} tokens and takes a prompt besides; must read: weights and cache, once",
        f"{len(found)} programs in {sum(step.seconds for step in found):.1f} s",
    ]


def _cache_lines(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    files = [path for path in folder.iterdir() if path.name.endswith("-cache")]
    size = sum(path.stat().st_size for path in files)
    return [
        f"{len(files)} programs, {size_text(size)}, are in {folder} as JAX's persistent compilation cache keeps them; "
        "that a pod looks for them under the same keys is not verified"
    ]
