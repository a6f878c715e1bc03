"""What a DeepSeek config.json says beyond the common fields."""

from __future__ import annotations

import math

from podquant.families.config import ConfigReader, RopeConfig
from podquant.families.latent import LatentConfig


def read_latent(reader: ConfigReader, rope: RopeConfig) -> LatentConfig:
    """Read the sizes of latent attention; what is absent has the value transformers gives it.

    A context that YaRN has stretched sharpens the scores: they are scaled by the square of `0.1 m ln(factor) + 1` with
    m = `mscale_all_dim` (DeepSeek-V2's and V3's modeling files, and `yarn_apply_mscale` of transformers).
    """
    nope_dim, rope_dim = reader.count("qk_nope_head_dim", 128), reader.count("qk_rope_head_dim", 64)
    scale = (nope_dim + rope_dim) ** -0.5
    factor, weight = rope.parameters.get("factor", 1.0), rope.parameters.get("mscale_all_dim", 0.0)
    if rope.kind == "yarn" and factor > 1:
        scale *= (0.1 * weight * math.log(factor) + 1.0) ** 2
    direct = "q_lora_rank" in reader.values and reader.values["q_lora_rank"] is None
    return LatentConfig(
        q_rank=None if direct else reader.count("q_lora_rank", 1536),
        kv_rank=reader.count("kv_lora_rank", 512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=reader.count("v_head_dim", 128),
        interleaved=reader.flag("rope_interleave", True),
        score_scale=scale,
    )
