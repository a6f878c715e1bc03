"""`podquant export ARTIFACT OUT`: write an artifact's weights as other software takes them."""

from __future__ import annotations

import argparse
from contextlib import closing

from podquant.app.progress import progress
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
    from podquant.app.report import size_text
    from podquant.artifact.export import export_artifact
    from podquant.artifact.reader import read_manifest
    from podquant.storage.store import open_store

    if arguments.format is None and not arguments.portable:
        raise ConfigError(
            f"{arguments.artifact}: an artifact is a checkpoint that other software loads as it is: say what is to "
            f"change, by --format ({', '.join(_FORMS)}) or --portable or both"
        )
    with closing(open_store(arguments.artifact)) as store:
        manifest = read_manifest(store)
    with progress("exporting", sum(file.size for file in manifest.files.values())) as advance:
        exported = export_artifact(
            arguments.artifact, arguments.out, form=arguments.format, portable=arguments.portable, on_bytes=advance
        )
    says = exported.section or {}
    print(
        f"{arguments.out}: {size_text(exported.nbytes)} in {exported.num_files} files, "
        f"{says.get('quant_method', 'not quantized any more')} {says.get('format', '')}".rstrip()
    )
    if arguments.format == "fp8-block" and any(
        module.scheme and module.scheme.activation_dtype for module in manifest.modules.values()
    ):
        print("this form does not say how activations are quantized: podquant serves it with activations left alone")
    return 0
