"""KL divergence and perplexity of quantization files on a text, against the project's own unquantized float32 logits.

    python tests/benchmarks/quality.py CHECKPOINT [--text FILE] [--configs int8.yaml …] [--kv-cache bfloat16 int8 fp8]

Without a text it takes the prose of Python's own documentation (`pydoc_data.topics`). Figures in nats a token.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from podquant.config.rules import load_quantization_config
from podquant.config.scheme import CacheDtype
from podquant.families.registry import read_model_config
from podquant.model.batch import flat_batch
from podquant.model.kv_cache import Cache
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.tokenizer.tokenizer import Tokenizer
from podquant.weights.load import load_weights
from podquant.weights.source import open_source

SEED_FILES = ["int8.yaml", "int8_w8a8.yaml", "fp8.yaml", "fp8_w8a8.yaml"]


class Scorer:
    """Log-probabilities of every next token over windows of a text, in float32 on one CPU device."""

    def __init__(self, checkpoint: str, config: str | None, length: int, cache: CacheDtype = "auto") -> None:
        source = open_source(checkpoint, load_quantization_config(config) if config else None)
        model_config = read_model_config(source.config, source.tensors)
        model = Model(model_config, source.scheme_of, Numerics("float32", "cpu"), make_mesh("cpu", 1))
        self._weights = load_weights(model, source)
        source.close()
        page_size = 64
        self._shape = CacheShape(length // page_size + 1, page_size, 1, length, cache)
        arrays = model.cache_arrays(self._shape)
        self._cache = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays)
        table = np.zeros((1, self._shape.table_width), np.int32)
        table[0, : length // page_size] = np.arange(1, length // page_size + 1)
        self._table = jnp.asarray(table)

        def forward(weights: Any, cache: Cache, tokens: jax.Array, table: jax.Array) -> jax.Array:
            decoder = model.decoder(weights)
            starts, lengths = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
            pages = {"page_size": page_size, "pages_per_layer": self._shape.num_pages}
            at = flat_batch(model.config, length, starts, lengths, lengths, table, **pages)
            hidden, _ = decoder.hidden(tokens, cache, at)
            return jax.nn.log_softmax(decoder.logits(hidden)[:, : model_config.vocab_size], axis=-1)

        specs = (tuple(s.spec for s in model.shardings), PartitionSpec(), PartitionSpec(), PartitionSpec())
        self._forward = jax.jit(
            jax.shard_map(forward, mesh=model.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        )

    def __call__(self, window: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[T, V] float32 for int32 ids [T]."""
        return np.asarray(self._forward(self._weights, self._cache, jnp.asarray(window), self._table))


def prose() -> str:
    """Running text of Python's documentation, without its code and headings."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    kept = [" ".join(p.split()) for p in paragraphs if not p.startswith(" ") and len(p) > 200]
    return "\n\n".join(re.sub(r"[*`]", "", p) for p in kept)


def main() -> None:
    """Print one row for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--configs", nargs="*", default=SEED_FILES)
    parser.add_argument("--kv-cache", nargs="*", default=[], help="keys and values kept so, of the model as it is")
    options = parser.parse_args()
    text = options.text.read_text() if options.text else prose()
    tokenizer = Tokenizer.load(Path(options.checkpoint), {})
    ids = np.asarray(tokenizer.encode(text)[: options.tokens], np.int32)
    windows = ids[: len(ids) // options.window * options.window].reshape(-1, options.window)
    scorer = Scorer(options.checkpoint, None, options.window)
    reference = [scorer(window) for window in windows]
    print(f"{windows.size} tokens, perplexity of the reference {_perplexity(reference, windows):.2f}")
    print(f"{'file':<28}{'KL':>9}{'perplexity':>12}{'top-1':>8}")
    measured: list[tuple[str, str | None, CacheDtype]] = [(name, name, "auto") for name in options.configs]
    measured += [(f"keys and values in {name}", None, name) for name in options.kv_cache]
    for label, config, cache in measured:
        scorer = Scorer(options.checkpoint, config, options.window, cache)
        found = [scorer(window) for window in windows]
        pairs = list(zip(reference, found, strict=True))
        kl = np.mean([(np.exp(r) * (r - f)).sum(-1).mean() for r, f in pairs])
        top = np.mean([(r.argmax(-1) == f.argmax(-1)).mean() for r, f in pairs])
        print(f"{label:<28}{kl:>9.5f}{_perplexity(found, windows):>12.2f}{top:>8.3f}", flush=True)


def _perplexity(scores: list[np.ndarray[Any, Any]], windows: np.ndarray[Any, Any]) -> float:
    losses = [-s[np.arange(len(w) - 1), w[1:]].mean() for s, w in zip(scores, windows, strict=True)]
    return float(np.exp(np.mean(losses)))


if __name__ == "__main__":
    main()
