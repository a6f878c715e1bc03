"""Ray job: convert a checkpoint on the hosts of a cluster, as a file of configs/jobs/ says.

    ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/convert.py my-job.yaml

Submitted again after it was stopped or has failed, it goes on where it was.
"""

from __future__ import annotations

import sys

from podquant.app.convert_on_ray import convert_on_ray
from podquant.app.status import job_status
from podquant.config.job import load_convert_job


def run(path: str) -> None:
    """Carry out the job of a file."""
    convert_on_ray(load_convert_job(path), address="auto")


if __name__ == "__main__":
    sys.exit(job_status(sys.argv, run))
