"""What XLA has to be told, by chip, to compile the steps of a model well. Knows nothing of models or programs."""

from __future__ import annotations

from collections.abc import Mapping

_LARGE_TILES = "xla_tpu_control_large_2nd_minor_layout_for_x16"
"""Whether 16-bit arrays may have tiles of 16 rows inside a program, where they come in tiles of 8."""


def compiler_options(device_kind: str, dtype: str) -> Mapping[str, bool]:
    """The `compiler_options` of `jax.stages.Lowered.compile`.

    On TPU7x XLA lays 16-bit weights out anew in front of every product, in tiles that suit its matrix unit better: a
    copy of each, written and read in every step (libtpu 0.0.50; a Llama-3-70B over 4 chips: three times the bytes).

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: of activations and unquantized weights.
    """
    return {_LARGE_TILES: False} if device_kind == "TPU7x" and dtype == "bfloat16" else {}
