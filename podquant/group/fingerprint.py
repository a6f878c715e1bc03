"""What the processes of a group must have in common before they compute together, as digests to compare.

Two hosts with other weights or other code would run, and answer nonsense; they are found here, by name. Knows nothing
of how digests travel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import podquant
from podquant.engine.options import EngineOptions
from podquant.weights.source import WeightSource

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")


def fingerprints(source: WeightSource, options: EngineOptions) -> dict[str, str]:
    """Digests of `weights`, `config` (of model and engine) and `code`: equal on hosts that may serve together.

    Where a host finds the model is its own business: paths are left out.
    """
    engine = asdict(replace(options, model_path="", download_dir=None, quantization_config_path=None))
    return {
        "weights": source.fingerprint,
        "config": _digest(json.dumps([source.config, engine], sort_keys=True).encode()),
        "code": _code(),
    }


def differences(mine: Mapping[str, str], theirs: Mapping[str, object]) -> list[str]:
    """What two hosts do not have in common, in words; empty if nothing."""
    return [
        f"{name} (there {str(theirs.get(name))[:12]}, here {digest[:12]})"
        for name, digest in mine.items()
        if theirs.get(name) != digest
    ]


def _code() -> str:
    """podquant's own files, and the versions of what they compute with."""
    root = Path(podquant.__file__).parent
    files = [(str(path.relative_to(root)), _digest(path.read_bytes())) for path in sorted(root.rglob("*.py"))]
    return _digest(json.dumps([files, [version(name) for name in _LIBRARIES]]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
