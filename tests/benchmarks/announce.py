"""What it costs to broadcast a decode step to the other hosts of a group, over TCP on this machine.

    .venv/bin/python tests/benchmarks/announce.py [--followers 1 3 15] [--steps 2000] [--batch 64] [--context 8192]

Rank 0 sends each step to every follower before it dispatches it: that time is added to a step unless the devices are
busy with the one before. Followers here are processes that receive, check and decode, and do nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

import numpy as np

from podquant.engine.programs import FROM_DEVICE, NUM_INTS, Bucket, Floats, Inputs
from podquant.group.launch import Deadlines
from podquant.group.lockstep import StepBroadcaster
from podquant.group.messages import FROM_RANK, TO_RANK, EndOfSteps, Step
from podquant.group.wire import Connection, PeerListener, connect

KEY = b"a secret of the benchmark"


def follow(port: int, steps: int) -> None:
    """Receive that many steps, and the end."""
    with connect(("127.0.0.1", port), TO_RANK, KEY, timeout=30) as connection:
        received = 0
        while not isinstance(message := connection.receive(timeout=30), EndOfSteps):
            received += isinstance(message, Step)
    assert received == steps


def measure(followers: int, steps: int, inputs: Inputs, bucket: Bucket) -> tuple[float, float]:
    """Microseconds of one broadcast, the median and the 99th percentile."""
    listener = PeerListener("127.0.0.1", 0)
    processes = [multiprocessing.Process(target=follow, args=(listener.port, steps)) for _ in range(followers)]
    for process in processes:
        process.start()
    connections = []
    for _ in range(followers):
        peer = listener.accept(timeout=60)
        assert peer is not None
        connections.append(Connection(peer, FROM_RANK, KEY, is_server=True))
    broadcaster = StepBroadcaster(connections, Deadlines())
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        broadcaster.broadcast(bucket, inputs)
        seconds.append(time.perf_counter() - begin)
        time.sleep(0.002)  # a step of the devices
    broadcaster.end()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for connection in connections:
        connection.close()
    listener.close()
    return 1e6 * statistics.median(seconds), 1e6 * float(np.percentile(seconds, 99))


def main() -> None:
    """Measure, and print a line for each number of followers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--followers", type=int, nargs="+", default=[1, 3, 15])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--page-size", type=int, default=64)
    arguments = parser.parse_args()
    num_pages = arguments.context // arguments.page_size // 2  # sequences that fill half of the context
    inputs = Inputs(
        rows=np.ones((arguments.batch, NUM_INTS + num_pages), np.int32),
        floats=np.zeros((arguments.batch, len(Floats._fields)), np.float32),
        tokens=np.full(arguments.batch, FROM_DEVICE, np.int32),
        ends=np.zeros((0, 2), np.int32),
    )
    size = sum(array.nbytes for array in inputs if array is not None)
    for followers in arguments.followers:
        median, late = measure(followers, arguments.steps, inputs, Bucket(arguments.batch))
        print(f"{followers} followers, about {size:,} bytes a step: median {median:.0f} us, 99 % within {late:.0f} us")


if __name__ == "__main__":
    main()
