"""The least that a step which decodes can take on a TPU: what it reads over the memory's speed, or its products.

Time between chips, and of the host, is not in it. Of a `Model` alone, on an abstract mesh.
"""

from __future__ import annotations

from dataclasses import dataclass

from podquant.cluster.topology import Generation
from podquant.config.scheme import Scheme
from podquant.engine.memory import leaf_bytes
from podquant.model.decoder import SchemeOf
from podquant.model.layout import Leaf, Model


@dataclass(frozen=True)
class StepCost:
    """What a step that gives each of some sequences its next token takes of a device.

    Attributes:
        weight_bytes: read; of routed experts those that the tokens go to, on average, if all are as likely.
        cache_bytes: read of the KV cache.
        read_seconds: that its memory takes for both.
        product_seconds: that its matrix unit takes for the products with weights.
    """

    weight_bytes: int
    cache_bytes: int
    read_seconds: float
    product_seconds: float

    @property
    def seconds(self) -> float:
        """If reading and multiplying overlap as well as they can."""
        return max(self.read_seconds, self.product_seconds)


def decode_cost(
    model: Model, scheme_of: SchemeOf, generation: Generation, token_bytes: int, *, batch: int, context: int
) -> StepCost:
    """The cost of a step of `batch` sequences of `context` tokens each.

    Args:
        model: laid out.
        scheme_of: as it was laid out by.
        generation: of the chips.
        token_bytes: that a device keeps of a token in all layers.
        batch: sequences.
        context: tokens of each, of which layers with a window read no more than that.
    """
    weight_bytes = seconds = 0.0
    moe = model.config.moe
    for leaf, nbytes in zip(model.leaves, leaf_bytes(model), strict=True):
        share = rows = 1.0
        if leaf.is_experts and moe is not None:
            share = 1 - (1 - moe.top_k / moe.num_experts) ** batch
            rows = moe.top_k / moe.num_experts
        elif leaf.weights[0].kind == "embedding" and not model.config.tied_embeddings:
            share = min(1.0, batch / leaf.shape[0])  # its rows are looked up
            rows = 0.0
        weight_bytes += nbytes * share
        if leaf.name == "weight" and leaf.weights[0].kind != "norm":
            products = 2 * batch * rows * nbytes / leaf.dtype.itemsize
            seconds += products / _flops(generation, scheme_of(leaf.weights[0].places[0].module), leaf)
    positions = sum(min(window, context) for window in model.config.windows)
    cache_bytes = batch * token_bytes * positions // model.config.num_layers
    bandwidth = generation.hbm_bandwidth / generation.devices_per_chip
    return StepCost(int(weight_bytes), cache_bytes, (weight_bytes + cache_bytes) / bandwidth, seconds)


def _flops(generation: Generation, scheme: Scheme | None, leaf: Leaf) -> float:
    """Multiplications and additions a second of a device, for a product with this weight."""
    fast = generation.fast_8_bit
    is_fast = scheme is not None and scheme.weight_dtype == scheme.activation_dtype == fast == leaf.dtype.name
    return (generation.fast_8_bit_flops if is_fast else generation.bf16_flops) / generation.devices_per_chip
