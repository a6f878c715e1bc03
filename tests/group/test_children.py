"""Processes that cannot be started."""

from __future__ import annotations

import resource
import threading

from podquant.engine.options import EngineOptions
from podquant.group.children import Children
from podquant.group.launch import Deadlines, Launch, Member, new_nonce
from podquant.group.messages import Ended, Report


def test_a_process_that_cannot_be_started_is_reported_to_have_ended() -> None:
    reports: list[Report] = []
    children = Children(b"secret", reports.append)
    launch = Launch(Member(0, 0, 1), 3, new_nonce(), EngineOptions("m"), Deadlines(), "h")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads = threading.active_count()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        children.launch(launch)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (report,) = reports
    assert (report.member, report.generation) == (launch.member, 3)
    assert isinstance(report.message, Ended)
    assert report.message.reason == "cannot be started: [Errno 24] Too many open files"
    assert (children.pids, threading.active_count()) == ([], threads)
