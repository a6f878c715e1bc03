"""`podquant export ARTIFACT OUT`: write an artifact's weights as other software takes them."""

from __future__ import annotations

import argparse

from podquant.errors import ConfigError

_FORMS = ("pack-quantized", "fp8-block")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant export`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert wrote")
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")
    parser.add_argument(
        "--format",
        choices=_FORMS,
        help="pack-quantized: int8 weight-only, four codes to an int32, as compressed-tensors has it. fp8-block: "
        "float8 in blocks with weight_scale_inv, as DeepSeek has it; embedding and lm_head in bfloat16",
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="write a quantized embedding and lm_head back in bfloat16: few loaders take them quantized",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write a checkpoint that podquant serves too, as one that is quantized already."""
    from podquant.app.artifacts import export

    if arguments.format is None and not arguments.portable:
        raise ConfigError(
            f"{arguments.artifact}: an artifact is a checkpoint that other software loads as it is: say what is to "
            f"change, by --format ({', '.join(_FORMS)}) or --portable or both"
        )
    print(*export(arguments.artifact, arguments.out, form=arguments.format, portable=arguments.portable), sep="\n")
    return 0
