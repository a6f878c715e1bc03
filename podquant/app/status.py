"""How a program of podquant's ends: its exit status, and its own errors as one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from podquant.app.signals import exiting_on_sigterm
from podquant.errors import PodquantError
from podquant.foreign import cut_words


def exit_status(call: Callable[[], int | None]) -> int:
    """What `call` returns (None: 0); of podquant's own errors, 1, after a line on stderr.

    Ended by Ctrl-C it is 130, and SIGTERM exits with 143, wherever it finds the program.
    """
    try:
        with exiting_on_sigterm():
            status = call()
        sys.stdout.flush()
        return status or 0
    except PodquantError as error:
        print(f"error: {cut_words(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough: `podquant inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def job_status(arguments: Sequence[str], run: Callable[[str], None]) -> int:
    """The exit status of a Ray job's program, whose `arguments` are its own name and a job file; 2 for wrong usage."""
    if len(arguments) != 2:
        print(f"usage: python {arguments[0]} JOB.yaml", file=sys.stderr)
        return 2
    return exit_status(lambda: run(arguments[1]))
