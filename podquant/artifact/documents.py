"""The JSON files of an artifact other than its manifest. Knows nothing of storage: values in, bytes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from podquant.artifact.manifest import TensorEntry


def encode_json(document: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file of the artifact: depends only on the values and their order."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_index(tensors: Mapping[str, TensorEntry]) -> bytes:
    """Hugging Face's index of an artifact at tp_size 1: which file holds which tensor."""
    return encode_json(
        {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: tensor.pieces[0].file for name, tensor in tensors.items()},
        }
    )
