"""The tiny checkpoints of the conversion's tests."""

from __future__ import annotations

from tests.conversion.conftest import make_source, source

__all__ = ["make_source", "source"]
