"""Ray job: serve a model on the hosts of a cluster, as a file of configs/jobs/ says.

    ray job submit --address http://HEAD:8265 --working-dir . --no-wait -- python jobs/serve.py my-job.yaml

Host 0, the one of the slice's worker 0, answers HTTP.
"""

from __future__ import annotations

import sys

from podquant.app.options import flag_kinds
from podquant.cli.main import guarded
from podquant.cli.serve import run_job
from podquant.config.job import load_serve_job


def main() -> int:
    """Exit status: 0, 1 after an error of podquant's, 2 for wrong usage."""
    if len(sys.argv) != 2:
        print("usage: python jobs/serve.py JOB.yaml", file=sys.stderr)
        return 2
    return guarded(lambda: run_job(load_serve_job(sys.argv[1], flag_kinds()), address="auto"))


if __name__ == "__main__":
    sys.exit(main())
