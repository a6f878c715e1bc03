"""Quantized weights that config.json does not tell of, known by what their tensors are called and made of.

Taken for plain they would be noise. Knows the forms only by name: none is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.quantization import KEYS
from podquant.errors import UnsupportedModelError

CODES = ("I8", "F8_E4M3", "F8_E5M2", "U8", "I32", "U32", "I16", "U16", "I64")
"""Types on disk that the weight of a module has only if it is quantized."""


@dataclass(frozen=True)
class _Form:
    """How one tool stores quantized weights.

    Attributes:
        tool: its name.
        name: a pattern for a tensor that it alone makes, of the module `m`.
        beside: other tensors of that module that it makes.
    """

    tool: str
    name: str
    beside: tuple[str, ...] = ()


_FORMS = (
    _Form("GPTQ", r"(?P<m>.+)\.qweight", ("{m}.g_idx",)),
    _Form("AWQ", r"(?P<m>.+)\.qweight", ("{m}.qzeros",)),
    _Form("bitsandbytes (4 bits)", r"(?P<m>.+)\.weight\.(absmax|quant_map|quant_state\.bitsandbytes__.+)"),
    _Form("bitsandbytes (int8)", r"(?P<m>.+)\.SCB"),
    _Form("quanto", r"(?P<m>.+)\.weight\._(data|scale|shift)(\..+)?"),
    _Form("HQQ", r"(?P<m>.+)\.W_q"),
    _Form("torchao", r"(?P<m>.+?)(:|\._weight_)_?(qdata|tensor_impl|int_data|scale|zero_point)([:_.].+)?"),
    _Form("MXFP4", r"(?P<m>.+)_blocks", ("{m}_scales",)),
    _Form("ModelOpt (NVFP4)", r"(?P<m>.+)\.weight_scale_2"),
    _Form("MLX", r"(?P<m>.+)\.scales", ("{m}.biases",)),
    _Form("DeepSeek's fp8 in blocks", r"(?P<m>.+)\.weight_scale_inv"),
    _Form("AutoFP8 or ModelOpt", r"(?P<m>.+)\.weight_scale", ("{m}.input_scale",)),
    _Form("compressed-tensors", r"(?P<m>.+)\.weight_(packed|zero_point|shape|scale)"),
    _Form("GPTQ or AWQ", r"(?P<m>.+)\.(qweight|qzeros)"),
)
"""The first that fits counts."""


def quantized_by(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The tool that quantized some of these weights, in words, and the tensor that tells; None if they are plain."""
    for form in _FORMS:
        if (name := _first(tensors, form)) is not None:
            return form.tool, name
    for name, info in tensors.items():
        if name.endswith(".weight") and len(info.shape) >= 2 and info.dtype.disk in CODES:
            return "an unknown tool", name
    return None


def declared_config(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json as the weights bear it out, and what to say of the difference.

    A section that says quantized where every weight is plain (left over from the checkpoint that these were made of)
    is left out.

    Args:
        tensors: of the headers.
        where: the checkpoint, for messages.

    Raises:
        UnsupportedModelError: weights are quantized and there is no such section; names the tool and a tensor.
    """
    found, said = quantized_by(tensors), [key for key in KEYS if config.get(key)]
    if found is None:
        plain = {key: value for key, value in config.items() if key not in said}
        return plain, tuple(f"{key} of config.json is left out: every weight is plain" for key in said)
    if said:
        return dict(config), ()
    tool, name = found
    info = tensors[name]
    raise UnsupportedModelError(
        f"{where}: holds {name} {info.dtype.disk} {list(info.shape)}, as a checkpoint quantized by {tool} does, but "
        "config.json has no quantization_config: what its codes mean is not known. Take config.json as the tool wrote "
        "it, or the original checkpoint"
    )


def _first(tensors: Mapping[str, TensorInfo], form: _Form) -> str | None:
    """A tensor that a form's tool has made."""
    for name in tensors:
        match = re.fullmatch(form.name, name)
        if match and all(each.format(m=match["m"]) in tensors for each in form.beside):
            return name
    return None
