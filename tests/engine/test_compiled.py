"""Which programs there are, and when: a step is as large as there is a program for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from podquant.engine.compiled import Programs
from podquant.engine.programs import Bucket
from podquant.families.registry import read_model_config
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh

LLAMA = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "llama" / "config.json").read_text())
SIZES = [1, 2, 4, 8]


def programs(platform: str = "cpu", *, is_lazy: bool = False) -> Programs:
    model = Model(read_model_config(LLAMA, ()), lambda module: None, Numerics("float32", platform), make_mesh("cpu", 1))
    return Programs(model, CacheShape(3, 16, 2, 256), SIZES, 1, is_lazy=is_lazy)


def test_on_a_cpu_two_are_enough_to_begin_with_and_the_rest_follows() -> None:
    found = programs()
    assert found.first == [Bucket(4), Bucket(1)]  # two sequences, and as many tokens of prompts
    found.compile(found.first)
    assert found.max_tokens == 4
    assert [found.bucket(n, scores=False).num_tokens for n in (1, 2, 4)] == [1, 4, 4]
    ended = threading.Event()
    found.start_rest(ended.set)
    assert ended.wait(60)
    assert found.max_tokens == 8
    assert [found.bucket(n, scores=False).num_tokens for n in (1, 2, 4, 5)] == [1, 2, 4, 8]
    found.close()


def test_elsewhere_all_are_there_before_the_first_request() -> None:
    assert programs("tpu").first == [Bucket(8, scores=True), *map(Bucket, (8, 4, 2, 1))]


def test_at_first_use_a_step_has_its_own_size() -> None:
    found = programs(is_lazy=True)
    assert found.first == []
    assert found.max_tokens == 8
    assert found.bucket(3, scores=False) == Bucket(4)
    assert found.bucket(3, scores=True) == Bucket(8, scores=True)
    found.start_rest(pytest.fail)
    found.close()


def test_no_more_is_compiled_once_it_is_closed() -> None:
    found = programs()
    found.close()
    found.start_rest(pytest.fail)
    found.close()
    assert found.num_compiled == 0


SCRIPT = """
import threading
from tests.engine.test_compiled import programs
found = programs()
get, started = found.get, threading.Event()
def watched(bucket):
    started.set()
    get(bucket)
    print(bucket.num_tokens, flush=True)
found.get = watched
found.start_rest(lambda: None)
started.wait()
"""


@pytest.mark.slow
def test_a_process_that_ends_waits_for_one_program_at_the_most() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "8\n"
