"""Ray job: convert a checkpoint on the hosts of a cluster, as a file of configs/jobs/ says.

    ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/convert.py my-job.yaml

Submitted again after it was stopped or has failed, it goes on where it was.
"""

from __future__ import annotations

import sys

from podquant.cli.convert import run_job
from podquant.cli.main import guarded
from podquant.config.job import load_convert_job


def main() -> int:
    """Exit status: 0, 1 after an error of podquant's, 2 for wrong usage."""
    if len(sys.argv) != 2:
        print("usage: python jobs/convert.py JOB.yaml", file=sys.stderr)
        return 2
    return guarded(lambda: run_job(load_convert_job(sys.argv[1]), address="auto"))


if __name__ == "__main__":
    sys.exit(main())
