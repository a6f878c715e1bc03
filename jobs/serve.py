"""Ray job: serve a model on the hosts of a cluster, as a file of configs/jobs/ says.

    ray job submit --address http://HEAD:8265 --working-dir . --no-wait -- python jobs/serve.py my-job.yaml

Host 0, the one of the slice's worker 0, answers HTTP.
"""

from __future__ import annotations

import sys

from podquant.app.options import flag_kinds
from podquant.app.serve_on_ray import serve_on_ray
from podquant.app.status import job_status
from podquant.config.job import load_serve_job


def run(path: str) -> None:
    """Carry out the job of a file."""
    serve_on_ray(load_serve_job(path, flag_kinds()), address="auto")


if __name__ == "__main__":
    sys.exit(job_status(sys.argv, run))
