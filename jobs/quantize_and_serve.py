"""Ray job: convert a checkpoint on the hosts of a cluster unless that is done, then serve the artifact on them.

    ray job submit --address http://HEAD:8265 --working-dir . --no-wait -- python jobs/quantize_and_serve.py my-job.yaml

Submitted again after it was stopped or has failed, it goes on where it was.
"""

from __future__ import annotations

import sys

from podquant.app.options import flag_kinds
from podquant.cli import convert, serve
from podquant.cli.main import guarded
from podquant.config.job import load_quantize_and_serve_job


def run(path: str) -> int:
    """Both halves; what is wrong with the second is found before the first begins."""
    conversion, serving = load_quantize_and_serve_job(path, flag_kinds())
    options = serve.serve_options(serving)
    if convert.is_done(conversion):
        print(f"{conversion.target}: is there already, and is served as it is")
    else:
        serve.check_source(options, conversion.source, conversion.revision)
        convert.run_job(conversion, address="auto")
    return serve.run_job(serving, address="auto")


def main() -> int:
    """Exit status: 0, 1 after an error of podquant's, 2 for wrong usage."""
    if len(sys.argv) != 2:
        print("usage: python jobs/quantize_and_serve.py JOB.yaml", file=sys.stderr)
        return 2
    return guarded(lambda: run(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
