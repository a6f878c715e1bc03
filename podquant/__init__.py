"""podquant: quantize a checkpoint on the pod that will serve it, then serve it.

    podquant.plan(MODEL, "int8.yaml")              # what would be done
    podquant.convert(MODEL, OUT, "int8.yaml")      # write the artifact
    podquant.verify(OUT)                           # check it to the last byte
    with podquant.load(OUT) as engine:             # run it in this process
        engine.generate("Once upon a time", max_tokens=64)

What is public is in `__all__`; errors are in `podquant.errors`. Nothing is imported before it is used: JAX and Numba
take seconds, and a command that only prints its help needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from podquant.app.inference import Engine, load
    from podquant.app.library import convert, plan, verify
    from podquant.config.job import ClusterOptions
    from podquant.conversion.plan import Plan
    from podquant.conversion.run import Conversion
    from podquant.engine.options import EngineOptions
    from podquant.engine.request import Output, SamplingParams
    from podquant.errors import PodquantError

    __version__: str

__all__ = [
    "ClusterOptions",
    "Conversion",
    "Engine",
    "EngineOptions",
    "Output",
    "Plan",
    "PodquantError",
    "SamplingParams",
    "__version__",
    "convert",
    "load",
    "plan",
    "verify",
]

_HOMES = {
    "ClusterOptions": "podquant.config.job",
    "Conversion": "podquant.conversion.run",
    "Engine": "podquant.app.inference",
    "EngineOptions": "podquant.engine.options",
    "Output": "podquant.engine.request",
    "Plan": "podquant.conversion.plan",
    "PodquantError": "podquant.errors",
    "SamplingParams": "podquant.engine.request",
    "convert": "podquant.app.library",
    "load": "podquant.app.inference",
    "plan": "podquant.app.library",
    "verify": "podquant.app.library",
}
"""Public name → the module it comes from."""


if not TYPE_CHECKING:  # for a checker every name would be there

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("podquant")
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module 'podquant' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
