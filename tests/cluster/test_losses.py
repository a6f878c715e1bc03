"""How often a task may be lost, in each way, and what is said when it is given up."""

from __future__ import annotations

import pytest

from podquant.cluster.hosts import Task
from podquant.cluster.losses import Budget, Cause, Loss, note
from podquant.cluster.ray_inquest import Worker, find_cause

TASK = Task("unit-3", print, contents="2 tensors, a.weight to b.weight", memory=312_000_000)
OTHER = Task("unit-4", print)
WHAT = "unit-3 (2 tensors, a.weight to b.weight; a worker holds up to 312 MB for it by forecast, beside Python itself)"


def losses(budget: Budget, *causes: Cause) -> list[str | None]:
    """What each loss in turn leads to."""
    errors = [budget.spend(TASK, Loss(cause, "on 10.0.0.7")) for cause in causes]
    return [None if error is None else str(error) for error in errors]


@pytest.mark.parametrize("cause", [Cause.ERROR, Cause.CRASHED, Cause.KILLED, Cause.MEMORY])
def test_what_a_task_does_to_its_workers_is_borne_max_retries_times(cause: Cause) -> None:
    *borne, last = losses(Budget(3), *[cause] * 4)
    assert borne == [None] * 3
    assert last is not None
    assert last.startswith(f"{WHAT}: its worker {cause.value} 4 times, last: on 10.0.0.7. ")
    assert losses(Budget(0), cause) != [None]


def test_a_lack_of_memory_is_named_at_once() -> None:
    loss = Loss(Cause.MEMORY, "on 10.0.0.7")
    assert f"This was {WHAT}. If it happens again: Run fewer workers on a host (workers_per_host)" in note(TASK, loss)
    *_, last = losses(Budget(1), Cause.MEMORY, Cause.MEMORY)
    assert last is not None
    assert "its worker was killed for its memory 2 times, last: on 10.0.0.7. Run fewer workers on a host" in last


def test_all_ways_share_one_budget() -> None:
    *borne, last = losses(Budget(3), Cause.MEMORY, Cause.CRASHED, Cause.KILLED, Cause.ERROR)
    assert borne == [None] * 3
    assert last is not None
    assert "was killed for its memory 1 times, crashed 1 times" in last


def test_lost_hosts_are_borne_for_long_and_do_not_count_with_the_rest() -> None:
    assert losses(Budget(0), *[Cause.HOST] * 15) == [None] * 15
    budget = Budget(3)
    assert losses(budget, *[Cause.HOST] * 15, *[Cause.KILLED] * 3) == [None] * 18
    assert losses(budget, Cause.HOST) != [None]
    assert losses(Budget(0), *[Cause.LATE] * 3) == [None] * 3
    assert losses(Budget(9), *[Cause.LATE] * 4)[-1] is not None


def test_tasks_have_a_budget_each() -> None:
    budget = Budget(1)
    assert losses(budget, Cause.KILLED) == [None]
    assert budget.spend(OTHER, Loss(Cause.KILLED, "there")) is None
    error = budget.spend(OTHER, Loss(Cause.KILLED, "there"))
    assert str(error).startswith("unit-4: its worker was killed from outside 2 times, last: there. If that was for")


WORKER = Worker("10.0.0.7", "node", 42, "/logs/worker-42.err", {"/proc/vmstat": 5})


@pytest.mark.parametrize(
    ("kills", "log", "cause", "detail"),
    [
        (
            5,
            ":task_name:f\n*** SIGSEGV received at time=1 on cpu 0 ***\n",
            Cause.CRASHED,
            "by SIGSEGV; its log there",
        ),
        (
            6,
            "Fatal Python error: Bus error\n\nStack",
            Cause.CRASHED,
            "by Bus error; its log there: /logs/worker",
        ),
        (6, ":task_name:f\n", Cause.MEMORY, "while the kernel's OOM killer was at work there"),
        (5, "", Cause.KILLED, "by SIGKILL or an exit of its own, without a trace in its log /logs/worker-42.err"),
    ],
)
def test_what_became_of_a_worker(kills: int, log: str, cause: Cause, detail: str) -> None:
    loss = find_cause(WORKER, {"/proc/vmstat": kills, "/sys/fs/cgroup/memory.events": 9}, log)
    assert loss.cause is cause
    assert loss.detail.startswith("process 42 on 10.0.0.7, ")
    assert detail in loss.detail
