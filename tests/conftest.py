"""The strict environment every test runs in, and how a run is shared out among processes; see CONTRIBUTING.md."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    # What any process of a run compiles, all have: the workers, and the hosts and jobs that tests start. Every run
    # begins with an empty directory, so it trusts nothing of an earlier one.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="podquant-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

_CLUSTER = "tests/cluster/"
_ONE_UNIT = (_CLUSTER, "tests/server/")
"""Folders whose tests all go to one worker, as they share what is started once: a Ray cluster, servers."""
_FEW_FILES = 3
"""So few files are run in this process: starting workers would take longer."""

_current: list[pytest.Item] = []


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module() -> Iterator[None]:
    """Lets go of what a module compiled: thousands of programs would take gigabytes by the end of a run."""
    yield
    jax.clear_caches()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, as tests also wait; none for a few files."""
    files = {argument.partition("::")[0] for argument in config.args}
    if len(files) <= _FEW_FILES and all(file.endswith(".py") for file in files):
        return 0
    return (os.cpu_count() or 1) + 1


class _ByFile(LoadScopeScheduling):
    """A file is run by one worker, in the order of collection, and so is a folder of `_ONE_UNIT`."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in _ONE_UNIT if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Say how tests are shared out."""
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before -m is heeded
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, the cluster's before them, so that no worker has much left when the others are done."""
    for item in items:
        if item.nodeid.startswith(_CLUSTER) or item.get_closest_marker("matrix"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.nodeid.startswith(_CLUSTER), item.path not in slow))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tell the hook below whose turn it is."""
    _current.append(item)
    try:
        return (yield)
    finally:
        _current.pop()


def _refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    """The quick core starts no processes: an audit hook."""
    is_of_a_server = "podquant.tokenizer.template_child" in str(arguments[1:2])  # one, and small
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and _current and not is_of_a_server:
        item = _current[-1]
        if not item.get_closest_marker("slow"):
            raise AssertionError(f"{item.nodeid} starts a process ({event}): mark it slow, see CONTRIBUTING.md")


sys.addaudithook(_refuse_processes)


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
