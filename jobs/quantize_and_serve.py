"""Ray job: convert a checkpoint on the hosts of a cluster unless that is done, then serve the artifact on them.

    ray job submit --address http://HEAD:8265 --working-dir . --no-wait -- python jobs/quantize_and_serve.py my-job.yaml

Submitted again after it was stopped or has failed, it goes on where it was.
"""

from __future__ import annotations

import sys

from podquant.app.options import flag_kinds
from podquant.app.quantize_and_serve import quantize_and_serve
from podquant.app.status import job_status
from podquant.config.job import load_quantize_and_serve_job


def run(path: str) -> None:
    """Carry out the job of a file."""
    quantize_and_serve(*load_quantize_and_serve_job(path, flag_kinds()), address="auto")


if __name__ == "__main__":
    sys.exit(job_status(sys.argv, run))
