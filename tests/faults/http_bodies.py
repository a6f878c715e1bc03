"""What the worst bodies do to everybody else: the longest wait for /health and for the next piece of a running stream.

    python tests/faults/http_bodies.py http://127.0.0.1:30000 --pid PID [--bodies 2000] [--seed 0] [--senders 2]

Run it against a server on this machine, with a model of a real tokenizer. Bodies of 16 MiB are generated from the seed
and sent to every route, while another process asks for /health and follows a stream. Reported are the worst waits, with
what was sent in them, the server's memory before and after, the statuses, and every answer from 500 on that was not
meant.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import urlsplit

import httpx

BOUND = 16 << 20
MEANT = frozenset({429, 503})
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
OTHERS = (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/nowhere"), ("GET", "/"), ("DELETE", "/tokenize"))

Shape = Callable[[random.Random, int], str]

SCALARS = (
    "1",
    "-1",
    "31234",
    "0.5",
    "1e300",
    "1e999",
    "true",
    "null",
    '"a"',
    '""',
    "[]",
    "{}",
    "[1]",
    '{"a":1}',
    "NaN",
)
MESSAGES = (
    '{"role":"user","content":"hi"}',
    '{"role":"user","content":""}',
    '{"role":"assistant","content":null}',
    '{"role":"nobody"}',
    '{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"[1,2,3]"}}]}',
    '{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}',
)
PARTS = ('{"type":"text","text":"a"}', '{"type":"image_url","image_url":{}}', '{"type":1}', "1")
TEXTS = (
    "a",
    " ",
    "\\n",
    '\\"',
    "\\\\",
    "\\u00e9",
    "\\ud83d\\ude00",
    "é",
    "漢",
    "The house is green. ",
    "<|im_end|>",
    "0",
    "\\ud800",
)
FIELDS = [
    "prompt",
    "messages",
    "tokens",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "metadata",
    "model",
    "user",
    "n",
    "max_tokens",
    "temperature",
    "seed",
    "logprobs",
    "documents",
    "tools",
    "chat_template_kwargs",
    "response_format",
    "bad_words",
    "stream_options",
    "suffix",
    "unknown",
]


def values(piece: str, size: int) -> str:
    """A list of one value again and again."""
    return "[" + ",".join([piece] * max(size // (len(piece.encode()) + 1), 1)) + "]"


def wide(rng: random.Random, size: int) -> str:
    """A list of scalars."""
    return values(rng.choice(SCALARS), size)


def lists(rng: random.Random, size: int) -> str:
    """Lists in a list."""
    inner = values(rng.choice(SCALARS), min(size, rng.choice((10, 1000, 100_000, 1_000_000))))
    return values(inner, size)


def deep(rng: random.Random, size: int) -> str:
    """Nesting, closed or not."""
    depth = rng.choice((50, 99, 101, 1000, size // 2))
    begin, end = rng.choice((("[", "]"), ('{"a":', "}")))
    return begin * min(depth, size // (2 * len(begin))) + "1" + end * rng.choice((0, depth))


def text(rng: random.Random, size: int) -> str:
    """One text."""
    piece = rng.choice(TEXTS)
    return '"' + piece * (size // len(piece.encode())) + '"'


def texts(rng: random.Random, size: int) -> str:
    """Up to 128 texts."""
    number = rng.choice((2, 64, 128))
    same = text(rng, size // number)
    return "[" + ",".join([same] * number) + "]"


def keys(rng: random.Random, size: int) -> str:
    """An object of many keys, or of a long one."""
    if rng.random() < 0.3:
        return '{"' + rng.choice(TEXTS) * (size // 8) + '":1}'
    piece = rng.choice(("1", '"a"', "[]"))
    return "{" + ",".join([f'"{i:07x}":{piece}' for i in range(size // (11 + len(piece)))]) + "}"


def number(rng: random.Random, size: int) -> str:
    """Numbers of many digits."""
    digits = rng.choice((4000, 5000, size))
    return values(rng.choice(("1", "0.1", "1e1", "-9")) + "1" * min(digits, size - 8), size)


def messages(rng: random.Random, size: int) -> str:
    """Many messages, or one of many parts."""
    if rng.random() < 0.5:
        return values(rng.choice(MESSAGES), rng.choice((size, 1 << 19)))
    return '[{"role":"user","content":' + values(rng.choice(PARTS), rng.choice((size, 1 << 20))) + "}]"


def chat(rng: random.Random, size: int) -> str:
    """Few messages of long texts."""
    number = rng.choice((1, 2, 100, 1000))
    piece = rng.choice(TEXTS)
    inner = piece * (size // number // len(piece.encode()))
    return "[" + ",".join(['{"role":"user","content":"' + inner + '"}'] * number) + "]"


SHAPES: tuple[Shape, ...] = (wide, lists, deep, text, texts, keys, number, messages, chat)
OF_FIELD: dict[str, tuple[Shape, ...]] = {
    "messages": (messages, messages, chat, chat, wide),
    "prompt": (wide, lists, text, texts, texts, deep),
    "tokens": (wide, wide, lists, number),
    "stop": (wide, texts, text),
}
OWN_FIELD = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}


def body(rng: random.Random, route: str) -> tuple[str, bytes]:
    """A body for a route, and what it is."""
    own = OWN_FIELD.get(route, "prompt")
    name = own if rng.random() < 0.6 else rng.choice(FIELDS)
    shape = rng.choice(OF_FIELD.get(name, SHAPES))
    size = rng.choice((BOUND - 4096, BOUND - 4096, 1 << 20, 1 << 14))
    copies = 1 if size == 1 << 14 else rng.choice((1, 16, 128))  # what fits the context is computed, again for each
    rest = {"n": copies, "max_tokens": 1, "stream": rng.random() < 0.3}
    small = {"prompt": [5], "messages": [{"role": "user", "content": "a"}], "tokens": [5]}
    others = {} if name == own else {own: small[own]}
    if "completions" in route:
        others |= rest
    others.pop(name, None)
    pieces = [json.dumps(others)[1:-1], f'"{name}":{shape(rng, size)}']
    rng.shuffle(pieces)
    data = ("{" + ",".join(piece for piece in pieces if piece) + "}").encode()[: BOUND - 1]
    what = f"{route} {name}={shape.__name__} {len(data) >> 10} KiB {data[:50]!r}"
    if rng.random() < 0.05:
        data, what = shape(rng, size).encode()[: BOUND - 1], what + " bare"
    return what, data


@dataclass
class Sent:
    """One body and its answer."""

    what: str
    began: float
    ended: float
    status: int
    answer: str


@dataclass
class Sender:
    """Sends bodies and remembers what came of each."""

    url: str
    key: str | None
    sent: list[Sent] = field(default_factory=list)

    def send(self, method: str, route: str, what: str, data: bytes, pieces: int) -> None:
        """One request, its body whole or in chunks of so many bytes."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        began = time.perf_counter()
        try:
            if pieces:
                chunks: Iterator[bytes] = (data[i : i + pieces] for i in range(0, len(data), pieces))
                connection.request(method, route, chunks, headers, encode_chunked=True)
            else:
                connection.request(method, route, data, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read(1000).decode(errors="replace")
        except OSError as error:
            status, answer = 0, repr(error)
        finally:
            connection.close()
        self.sent.append(Sent(what, began, time.perf_counter(), status, answer))
        if time.perf_counter() - began > 5:
            print(f"{time.perf_counter() - began:.1f} s {status} {what}", flush=True)


def probe(url: str, key: str | None, stop: Event, waits: multiprocessing.Queue[tuple[str, float, float]]) -> None:
    """In a process of its own: ask for /health, and follow streams; each wait with when it began."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def health() -> None:
        with httpx.Client(base_url=url, timeout=600) as client:
            while not stop.is_set():
                began = time.perf_counter()
                status = client.get("/health").status_code
                waits.put(("health" if status == 200 else f"health {status}", began, time.perf_counter()))
                time.sleep(0.02)

    def stream() -> None:
        ask = {"prompt": [1000, 2000, 3000], "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=url, timeout=600, headers=headers) as client:
            while not stop.is_set():
                with client.stream("POST", "/v1/completions", json=ask) as response:
                    last = None
                    for line in response.iter_lines():
                        if stop.is_set():
                            return
                        if line.startswith("data: {"):
                            now = time.perf_counter()
                            if last is not None:
                                waits.put(("stream", last, now))
                            last = now

    threads = [threading.Thread(target=health), threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def memory(pid: int) -> float:
    """MiB that a process holds."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024


def send_all(options: argparse.Namespace) -> list[Sent]:
    """Every body, by some threads; each makes its own, as the seed and its number say."""
    numbers = iter(range(options.bodies))
    lock = threading.Lock()
    sender = Sender(options.url, options.key)

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            rng = random.Random(f"{options.seed} {number}")
            route = rng.choice(ROUTES)
            what, data = body(rng, route)
            method = "POST"
            if rng.random() < 0.05:
                method, route = rng.choice(OTHERS)
                what = f"{method} {route} {what}"
            pieces = rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 7, 1 << 16))
            if pieces and pieces < 100:
                data, what = data[: 1 << 16], what + f" in chunks of {pieces}"
            sender.send(method, route, f"#{number} {what}", data, pieces)
            if len(sender.sent) % 100 == 0:
                print(f"{len(sender.sent)} sent, {memory(options.pid):.0f} MiB", flush=True)

    threads = [threading.Thread(target=work) for _ in range(options.senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sender.sent


def warm_up(options: argparse.Namespace) -> None:
    """Have steps of every size compiled, which on a CPU happens at their first use; beside a stream."""
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    with httpx.Client(base_url=options.url, timeout=600, headers=headers) as client:
        for power in range(12):
            for more in ({}, {"echo": True, "logprobs": 1}):
                body = {"prompt": [1000 + power] * ((1 << power) - 1 or 1), "max_tokens": 1, **more}
                client.post("/v1/completions", json=body).raise_for_status()


def report(sent: list[Sent], waits: list[tuple[str, float, float]]) -> None:
    """The worst waits, each with what was sent in it; statuses; what was not meant."""
    for kind in sorted({kind for kind, _, _ in waits}):
        worst = sorted((wait for wait in waits if wait[0] == kind), key=lambda wait: wait[1] - wait[2])[:5]
        lengths = sorted(end - begin for name, begin, end in waits if name == kind)
        print(f"{kind}: {len(lengths)} waits, median {lengths[len(lengths) // 2]:.3f} s, worst:")
        for _, begin, end in worst:
            during = [one.what for one in sent if one.began < end and one.ended > begin]
            print(f"    {end - begin:.3f} s: {'; '.join(during)[:400]}")
    slow = sorted(sent, key=lambda one: one.began - one.ended)[:5]
    print("slowest answers:", *(f"\n    {one.ended - one.began:.1f} s {one.status} {one.what}" for one in slow))
    print("statuses:", dict(sorted(collections.Counter(one.status for one in sent).items())))
    unmeant = [one for one in sent if one.status == 0 or (one.status >= 500 and one.status not in MEANT)]
    print(
        "not meant:",
        len(unmeant),
        *(f"\n    {one.status} {one.what}\n        {one.answer[:300]}" for one in unmeant[:20]),
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--senders", type=int, default=2, help="bodies in flight at a time")
    parser.add_argument("--key", help="the server's API key")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    stop, queue = spawn.Event(), spawn.Queue()
    probing = spawn.Process(target=probe, args=(options.url, options.key, stop, queue), daemon=True)
    probing.start()
    waits: list[tuple[str, float, float]] = []
    threading.Thread(target=lambda: waits.extend(iter(queue.get, None)), daemon=True).start()
    while not any(kind == "stream" for kind, _, _ in waits):
        time.sleep(0.1)
    warm_up(options)
    waits.clear()
    time.sleep(3)
    before = memory(options.pid)
    began = time.perf_counter()
    sent = send_all(options)
    print(f"{len(sent)} bodies in {time.perf_counter() - began:.0f} s")
    time.sleep(5)
    print(f"memory: {before:.0f} MiB before, {memory(options.pid):.0f} MiB after")
    stop.set()
    probing.join()
    quiet = [wait for wait in waits if wait[2] < began]
    for kind in sorted({kind for kind, _, _ in quiet}):
        worst = max(end - begin for name, begin, end in quiet if name == kind)
        print(f"before any body: {kind} {worst:.3f} s at the worst")
    report(sent, [wait for wait in waits if wait[2] >= began])


if __name__ == "__main__":
    main()
