"""What the processes of a group must have in common before they compute together, as digests to compare.

Two hosts with other weights or other code would run, and answer nonsense; they are found here, by name. Knows nothing
of how digests travel.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import podquant
from podquant.checkpoint.fingerprint import Fingerprint, differs
from podquant.engine.options import EngineOptions
from podquant.group.launch import OWN_OPTIONS
from podquant.weights.source import WeightSource

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")


@dataclass(frozen=True)
class Fingerprints:
    """What a process would compute with.

    Attributes:
        weights: of the model.
        config: a digest of config.json and the engine's options, but for each host's own.
        code: a digest of podquant's own files, and of the versions of what they compute with.
    """

    weights: Fingerprint
    config: str
    code: str


def fingerprints(source: WeightSource, options: EngineOptions) -> Fingerprints:
    """Of this process: equal on hosts that may serve together.

    Where a host finds the model is its own business: paths are left out.

    Raises:
        StorageError: the weights cannot be read.
    """
    engine = {name: value for name, value in asdict(options).items() if name not in OWN_OPTIONS}
    config = _digest(json.dumps([source.config, engine], sort_keys=True).encode())
    return Fingerprints(source.fingerprint, config, _code())


def differences(there: Fingerprints, here: Fingerprints, whose: str) -> list[str]:
    """What is to be said of a process `there`, compared with the one `here`; empty if they may serve together.

    Args:
        whose: the process here: "rank 0's".
    """
    found = [f"its weights {text}"] if (text := differs(there.weights, here.weights, whose)) else []
    for name in ("config", "code"):
        others, mine = getattr(there, name), getattr(here, name)
        if others != mine:
            found.append(f"its {name} differs from {whose} (there {others[:12]}, here {mine[:12]})")
    return found


class Agreement:
    """What the replicas of a service have in common, in every generation: that of the first of all to be ready."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: Fingerprints | None = None

    def differences(self, found: Fingerprints) -> list[str]:
        """What is to be said of a replica that is ready; empty if it may serve beside the others."""
        with self._lock:
            self._first = self._first or found
        return differences(found, self._first, "those of the replica that was first")


def _code() -> str:
    root = Path(podquant.__file__).parent
    files = [(str(path.relative_to(root)), _digest(path.read_bytes())) for path in sorted(root.rglob("*.py"))]
    return _digest(json.dumps([files, [version(name) for name in _LIBRARIES]]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
