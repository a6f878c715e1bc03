"""`podquant serve` as a process, and the flags it takes."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from podquant.cli.main import main

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "llama"
FAST = ["--device", "cpu", "--skip-tokenizer-init", "--skip-server-warmup", "--max-running-requests", "1"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.slow
def test_it_serves_and_drains_on_sigterm(checkpoint: Path) -> None:
    """The command line of the seed document, as written but for the model, the device and the mesh of this machine."""
    port = free_port()
    command = (
        f"--model-path {checkpoint} --trust-remote-code --dist-init-addr=0.0.0.0:10011 --nnodes=1 --tp-size=2 "
        "--device=cpu --random-seed=3 --node-rank=0 --mem-fraction-static=0.8 --max-prefill-tokens=8192 "
        "--download-dir=/tmp --dtype=bfloat16 --skip-server-warmup --quantization-config-path=int8.yaml "
        f"--skip-tokenizer-init --port {port} --max-running-requests 1"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "podquant.launch_server", *command.split()], stderr=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(process, client)
            ask = {"prompt": [3, 4, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=ask) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                events = [line for line in lines if line.startswith("data: ")]
            assert events[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in events[-2]  # what was in flight has ended, whole
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen[str], client: httpx.Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("not ready in time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--tp-size", "3"], "tensor-parallel sizes that fit"),
        (["{model}", "--quantization-config-path", "int9.yaml"], "int9.yaml"),
        (["{model}", "--page-size", "48"], "--page-size: expected a power of two"),
        (["{model}/nothing"], "nothing"),
        pytest.param(["gs://bucket/model"], "bucket", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.format(model=checkpoint) for argument in arguments]
    assert main(["serve", *filled, *FAST, "--port", "0"]) == 1
    err = capfd.readouterr().err
    assert "error: " in err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--tp-size", "two"], ["--device", "abacus"]])
def test_wrong_usage_is_an_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "model", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err
