"""How fast and how large `podquant convert` is, next to `cp -r` of the same files, both with a warm page cache.

    .venv/bin/python tests/benchmarks/convert.py /scratch [--keep] [--repeat 3] [--quantization-config-path int8.yaml]

Makes a synthetic checkpoint of 3 GB in bfloat16 (Llama-shaped, 4 files, a 600 MB embedding) in a new directory below
the one given, and removes it again. Peak memory is the resident set of the whole process, less that of an interpreter
that has imported JAX.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FILES = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 73_248,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in Hugging Face's order."""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    kv_width = width * config["num_key_value_heads"] // config["num_attention_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", kv_width, width),
            ("self_attn.v_proj", kv_width, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", ffn, width),
            ("mlp.up_proj", ffn, width),
            ("mlp.down_proj", width, ffn),
        ):
            yield f"{prefix}.{name}.weight", (rows, columns)
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def make_checkpoint(directory: Path, changes: Mapping[str, Any] = {}) -> int:
    """Write the checkpoint, with these changes of its config; returns its bytes. Values are normal."""
    config = {**CONFIG, **changes}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    everything = list(tensors(config))
    total = sum(2 * int(np.prod(shape)) for _, shape in everything)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(FILES)]
    done = 0
    for name, shape in everything:
        groups[min(FILES - 1, done * FILES // total)].append((name, shape))
        done += 2 * int(np.prod(shape))
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        header, offset = {}, 0
        for name, shape in group:
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in group:
                left = int(np.prod(shape))
                while left:
                    chunk = noise[: min(left, len(noise))].astype(ml_dtypes.bfloat16)
                    out.write(chunk.view(np.uint8))
                    left -= len(chunk)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def run(command: list[str]) -> tuple[float, float, int]:
    """Wall and processor time in seconds and peak resident bytes of a command that must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}: {text.decode()}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Measure, and print one line for each repetition and the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint, and use one that is there")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quantization-config-path", default="int8.yaml")
    arguments = parser.parse_args()
    place = arguments.directory / "podquant-benchmark"
    source, copy, artifact = place / "source", place / "copy", place / "artifact"
    place.mkdir(parents=True, exist_ok=True)
    try:
        total = sum(f.stat().st_size for f in source.iterdir()) if source.exists() else make_checkpoint(source)
        *_, baseline = run([sys.executable, "-c", "import jax, jax.numpy"])
        podquant = [sys.executable, "-m", "podquant.cli.main", "convert", str(source), str(artifact)]
        podquant += ["--quantization-config-path", arguments.quantization_config_path]
        print(f"source {total / 1e9:.2f} GB; an interpreter with JAX {baseline / 1e6:.0f} MB resident")
        for command in (["cp", "-r", str(source), str(copy)], podquant):  # warm the page cache and numba's
            run(command)
            shutil.rmtree(copy if command[0] == "cp" else artifact)
        best_copy, best_convert = float("inf"), float("inf")
        for _ in range(arguments.repeat):
            os.sync()
            copied, copy_cpu, _ = run(["cp", "-r", str(source), str(copy)])
            shutil.rmtree(copy)
            os.sync()
            converted, convert_cpu, peak = run(podquant)
            shutil.rmtree(artifact)
            best_copy, best_convert = min(best_copy, copied), min(best_convert, converted)
            print(
                f"cp {copied:.2f} s ({copy_cpu:.2f} s of CPU), {total / copied / 1e9:.2f} GB/s; "
                f"convert {converted:.2f} s ({convert_cpu:.2f} s of CPU), {total / converted / 1e9:.2f} GB/s; "
                f"ratio {converted / copied:.2f}; peak {(peak - baseline) / 1e6:+.0f} MB over the interpreter "
                f"with JAX ({peak / 1e6:.0f} MB)"
            )
        print(f"best: cp {best_copy:.2f} s, convert {best_convert:.2f} s, ratio {best_convert / best_copy:.2f}")
    finally:
        if not arguments.keep:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
