"""A conversion from job to artifact, in this process or on hosts that the caller brings; told on a terminal or not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict

from podquant.app.progress import progress
from podquant.app.report import note_lines, quality_lines, size_text, time_line
from podquant.app.signals import stopping
from podquant.app.source import SourceOptions, open_source
from podquant.checkpoint.index import Checkpoint
from podquant.cluster.hosts import Hosts, Progress
from podquant.config.job import ConvertJob
from podquant.conversion import run
from podquant.conversion.plan import Plan
from podquant.conversion.run import Conversion, check_target
from podquant.errors import ArtifactExistsError


def convert(
    job: ConvertJob,
    *,
    hosts: AbstractContextManager[Hosts] | None = None,
    download_dir: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Carry out a job; prints nothing.

    Args:
        hosts: where units are done, entered once the source is known to be good; None for this process.
        download_dir: download a Hugging Face id whole, to there, first.
        on_progress: told the source bytes done so far, and in all; what it raises ends the conversion.

    Raises:
        PodquantError: as `open_source` and `podquant.conversion.run.convert`.
    """
    with _opened(job, download_dir) as (checkpoint, plan), hosts or nullcontext() as entered:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            on_progress(done, plan.bytes_in)

        return _carry_out(job, checkpoint, plan, entered, advance)


def run_job(
    job: ConvertJob, *, hosts: AbstractContextManager[Hosts] | None = None, download_dir: str | None = None
) -> None:
    """Carry out a job in the main thread, and print what was done and how good it is; ends on SIGTERM and Ctrl-C.

    Args:
        hosts, download_dir: as for `convert`.
    """
    with _opened(job, download_dir) as (checkpoint, plan):
        for line in note_lines(plan):
            print(line, file=sys.stderr)
        with (
            hosts or nullcontext() as entered,
            _shown(plan, is_here=entered is None) as shown,
            stopping(shown) as advance,
        ):
            made = _carry_out(job, checkpoint, plan, entered, advance)
    print(*quality_lines({name: asdict(figures) for name, figures in made.quality.items()}), sep="\n")
    print(time_line(made.seconds))
    written = sum(file.size for file in made.manifest.files.values())
    before = f"; {made.num_units_resumed} units were done before" if made.num_units_resumed else ""
    print(
        f"{job.target}: {size_text(plan.bytes_in)} converted to {size_text(written)} in {len(plan.units)} units{before}"
    )


def is_done(job: ConvertJob) -> bool:
    """Whether an artifact is at the target already, and the job is not to overwrite it."""
    try:
        check_target(job.target, overwrite=job.overwrite)
    except ArtifactExistsError:
        check_target(job.target, overwrite=True)  # refuses what is no artifact
        return True
    return False


@contextmanager
def _opened(job: ConvertJob, download_dir: str | None) -> Iterator[tuple[Checkpoint, Plan]]:
    """The source and its plan, once all is checked that can be before hosts are reserved."""
    check_target(job.target, overwrite=job.overwrite)
    checkpoint, plan = open_source(
        SourceOptions(
            job.source,
            job.quantization_config_path,
            job.revision,
            download_dir,
            job.tp_size,
            job.strict_rules,
            job.weights_only,
            job.allow_extra_tensors,
        )
    )
    with closing(checkpoint):
        yield checkpoint, plan


@contextmanager
def _shown(plan: Plan, *, is_here: bool) -> Iterator[Progress]:
    """What shows progress here; the hosts of a cluster show it themselves."""
    if not is_here:
        yield lambda count: None
        return
    with progress("converting", plan.bytes_in) as advance:
        yield advance


def _carry_out(
    job: ConvertJob, checkpoint: Checkpoint, plan: Plan, hosts: Hosts | None, advance: Progress
) -> Conversion:
    return run.convert(
        checkpoint,
        plan,
        job.target,
        hosts=hosts,
        threads=job.cluster.threads_per_worker,
        overwrite=job.overwrite,
        allow_nonfinite=job.allow_nonfinite,
        on_progress=advance,
    )
