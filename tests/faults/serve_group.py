"""A serving group under random faults while clients stream: `python -m tests.faults.serve_group --hosts 2`.

Run by hand. Every answer that ends well must be right (greedy, known), every other must end with an error event or a
503; and the group must serve again by itself after each fault. Exits with 1 if any of that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.cluster.ray_cluster import descendants
from tests.group.hosts import Service, is_alive
from tests.group.references import GOLDENS, PROMPTS, expected_tokens

FLAGS = ("--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--liveness-seconds", "6")
NUM_CLIENTS = 8
LONGEST_RECOVERY = 240.0


class Proxy:
    """A TCP port that passes everything on to another, unless it is told to swallow one direction or both."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.swallows: frozenset[str] = frozenset()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            caller = self._server.accept()[0]
            try:
                callee = socket.create_connection(self._target, 5)
            except OSError:
                caller.close()
                continue
            threading.Thread(target=self._pass_on, args=(caller, callee), daemon=True).start()

    def _pass_on(self, caller: socket.socket, callee: socket.socket) -> None:
        with caller, callee, selectors.DefaultSelector() as ready, contextlib.suppress(OSError):
            ready.register(caller, selectors.EVENT_READ, (callee, "to host 0"))
            ready.register(callee, selectors.EVENT_READ, (caller, "from host 0"))
            while True:
                for key, _ in ready.select():
                    target, direction = key.data
                    if direction in self.swallows:  # as a network that drops packets: nothing is read, nothing ends
                        time.sleep(0.05)
                        continue
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    if not data:
                        return
                    target.sendall(data)


@dataclass
class Tally:
    """What clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def stream_for_ever(url: str, prompt: list[int], expected: list[int], tally: Tally, is_over: threading.Event) -> None:
    body = {"prompt": prompt, "max_tokens": len(expected), "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=120) as http:
        while not is_over.is_set():
            outcome = stream_once(http, body, expected)
            tally.counts[outcome] += 1
            if outcome.startswith("WRONG"):
                tally.wrong.append(outcome)
            if outcome != "right":
                time.sleep(0.3)


def stream_once(http: httpx.Client, body: dict[str, object], expected: list[int]) -> str:
    tokens: list[int] = []
    has_begun = False
    try:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            has_begun = True
            if answer.status_code != 200:
                answer.read()
                return f"{answer.status_code}" if answer.status_code in (429, 503) else f"WRONG: {answer.text[:200]}"
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return "right" if tokens == expected else f"WRONG: {tokens} instead of {expected}"
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return "error event"
                tokens += event["choices"][0].get("token_ids") or []
    except httpx.TransportError as error:
        # a server without file descriptors cannot take a connection; one that has answered must go on to the end
        return f"WRONG: {type(error).__name__}: {error}" if has_begun else "no connection"
    return f"WRONG: the stream ended without an end, after {len(tokens)} tokens"


class Faults:
    """What can happen to a group; each returns what it was, and has undone it."""

    def __init__(
        self, service: Service, proxy: Proxy, cache: Path, chance: random.Random, names: Sequence[str]
    ) -> None:
        self._service, self._proxy, self._cache, self._chance, self._names = service, proxy, cache, chance, names

    def any(self) -> str:
        """One of them, at random."""
        kinds: list[Callable[[], str]] = [
            self.kill_a_member,
            self.kill_a_host,
            self.stop_a_process,
            self.cut_the_link,
            self.take_the_descriptors,
            self.fill_the_disk,
        ]
        return self._chance.choice([kind for kind in kinds if kind.__name__ in self._names or not self._names])()

    def kill_a_member(self) -> str:
        number = self._some_host()
        for pid in self._members(number):
            os.kill(pid, signal.SIGKILL)
        return f"kill the member of host {number}"

    def kill_a_host(self) -> str:
        number = self._chance.choice([n for n in self._service.hosts if n])
        self._service.hosts[number].kill()
        self._service.hosts[number].wait()
        seconds = self._pause(5)
        self._service.start(number, "--dist-init-addr", self._proxy.address)
        return f"kill host {number}, start it after {seconds:.0f} s"

    def stop_a_process(self) -> str:
        number = self._some_host()
        pids = self._members(number)
        is_host = number and self._chance.random() < 0.4
        pid = self._service.hosts[number].pid if is_host or not pids else pids[0]
        os.kill(pid, signal.SIGSTOP)
        seconds = self._pause(40)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return f"stop {'' if is_host else 'the member of '}host {number} for {seconds:.0f} s"

    def cut_the_link(self) -> str:
        which = self._chance.choice([{"to host 0"}, {"from host 0"}, {"to host 0", "from host 0"}])
        self._proxy.swallows = frozenset(which)
        seconds = self._pause(40)
        self._proxy.swallows = frozenset()
        return f"cut {' and '.join(sorted(which))} for {seconds:.0f} s"

    def take_the_descriptors(self) -> str:
        """From the process of a host, while one of its members ends and would be started again."""
        number = self._some_host()
        pid = self._service.hosts[number].pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) - 1, limits[1]))
        for each in self._members(self._some_host()):
            os.kill(each, signal.SIGKILL)
        seconds = self._pause(15)
        if is_alive(pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        return f"no file descriptors on host {number} for {seconds:.0f} s"

    def fill_the_disk(self) -> str:
        """Of the compile cache, while members start."""
        filler = self._cache / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        for pid in self._members(self._some_host()):
            os.kill(pid, signal.SIGKILL)
        seconds = self._pause(20)
        filler.unlink()
        return f"the compile cache's disk full for {seconds:.0f} s"

    def _some_host(self) -> int:
        return self._chance.choice(list(self._service.hosts))

    def _members(self, number: int) -> list[int]:
        return [pid for pid in descendants(self._service.hosts[number].pid) if is_alive(pid)]

    def _pause(self, longest: float) -> float:
        seconds = self._chance.uniform(1, longest)
        time.sleep(seconds)
        return seconds


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A folder with little room; one on the common disk where nothing may be mounted."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        print(f"no small disk: {mounted.stderr.decode().strip()}; a file of 32 MB takes its place")
    try:
        yield place
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(place)], check=False)


def seconds_to_recovery(service: Service, expected: list[list[int]]) -> float:
    """Until it is ready and answers right."""
    begin = time.monotonic()
    while time.monotonic() - begin < LONGEST_RECOVERY:
        with contextlib.suppress(httpx.TransportError):
            if service.http.get("/ready").status_code == 200:
                body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
                answer = service.http.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["token_ids"] == expected[0], answer.text
                    return time.monotonic() - begin
        time.sleep(0.1)
    raise AssertionError(f"not within {LONGEST_RECOVERY:g} s\n{service.said()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=30.0, help="end earlier than after --faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of faults, as cut_the_link")
    arguments = parser.parse_args()
    expected = expected_tokens(GOLDENS / "llama")
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "cache") as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        flags = ("--tp-size", str(arguments.hosts), *FLAGS)
        others = range(1, arguments.hosts)
        service = Service(
            GOLDENS / "llama", arguments.hosts, *flags, folder=Path(name), environment=environment, absent=others
        )
        with service:
            proxy = Proxy(service.meeting)
            for number in others:
                service.start(number, "--dist-init-addr", proxy.address)
            print(f"serves after {service.wait_until_ready():.1f} s", flush=True)
            is_right = run(service, proxy, cache, expected, end, arguments)
    raise SystemExit(0 if is_right else 1)


def run(
    service: Service,
    proxy: Proxy,
    cache: Path,
    expected: list[list[int]],
    end: float,
    arguments: argparse.Namespace,
) -> bool:
    """Faults until they or the minutes are over; True if all was as it must be."""
    tally, is_over = Tally(), threading.Event()
    clients = [
        threading.Thread(
            target=stream_for_ever,
            args=(str(service.http.base_url), PROMPTS[n % 3], expected[n % 3], tally, is_over),
        )
        for n in range(NUM_CLIENTS)
    ]
    for client in clients:
        client.start()
    faults = Faults(service, proxy, cache, random.Random(arguments.seed), arguments.only)
    seconds: list[float] = []
    try:
        while len(seconds) < arguments.faults and time.monotonic() < end:
            before = sum(tally.counts.values())
            what = faults.any()
            seconds.append(seconds_to_recovery(service, expected))
            answers = sum(tally.counts.values()) - before
            print(f"{len(seconds):3}  {seconds[-1]:6.1f} s  {what} ({answers} answers meanwhile)", flush=True)
            time.sleep(1)
    finally:
        is_over.set()
        for client in clients:
            client.join()
        print(f"answers: {dict(tally.counts.most_common(8))}")
        print(f"{len(seconds)} faults; served again after {statistics.median(seconds or [0]):.1f} s, ", end="")
        print(f"at worst {max(seconds, default=0):.1f} s; a fault that undoes itself is counted from then")
    return not tally.wrong


if __name__ == "__main__":
    main()
