"""fp8 weights as chips without e4m3fn hold them: the same logits, bit for bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from podquant.config.rules import load_quantization_config
from podquant.families.registry import read_model_config
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.weights.load import load_weights
from podquant.weights.source import open_source
from tests.engine.test_goldens import GOLDENS, Array, all_logits, reference

pytestmark = pytest.mark.slow

RULES = """
quantization:
  {block}
  dense: {{rules: [{{module_path: '.*', weight_dtype: float8_e4m3fn}}]}}
  moe: {{weight_dtype: float8_e4m3fn}}
"""


def logits(name: str, rules: Path, device_kind: str) -> Array:
    source = open_source(str(GOLDENS / name), load_quantization_config(str(rules)))
    config, numerics = read_model_config(source.config, source.tensors), Numerics("float32", "tpu", device_kind)
    model = Model(config, source.scheme_of, numerics, make_mesh("cpu", 2))
    rebiased = {leaf.dtype for leaf in model.leaves} & {np.dtype(ml_dtypes.float8_e4m3b11fnuz)}
    assert bool(rebiased) == (device_kind != "TPU7x")
    weights = load_weights(model, source)
    source.close()
    return all_logits(model, weights, reference(name)["input_ids"][:1])


@pytest.mark.parametrize(("name", "block"), [("llama", ""), ("deepseek_v3", "weight_block_size: [8, 20]")])
def test_rebiased_weights_give_the_same_bits(tmp_path: Path, name: str, block: str) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.format(block=block))
    np.testing.assert_array_equal(logits(name, rules, "TPU v6 lite"), logits(name, rules, "TPU7x"))
