"""What is done with an artifact once it is there: look, check, put slices together, write it for other software.

What takes long shows its progress on stderr; what there is to say is returned.
"""

from __future__ import annotations

from contextlib import closing

from podquant.app.progress import progress
from podquant.app.report import manifest_lines, quality_lines, size_text
from podquant.artifact.export import ExportFormat, export_artifact
from podquant.artifact.manifest import Manifest
from podquant.artifact.merge import merge_artifact
from podquant.artifact.reader import Artifact, read_manifest
from podquant.artifact.verify import verify_artifact
from podquant.storage.store import open_store

__all__ = ["export", "inspect", "merge", "verify"]

verify = verify_artifact


def inspect(artifact: str) -> list[str]:
    """Manifest, schemes, sizes and the quality table, as lines."""
    with closing(Artifact.open(artifact)) as opened:
        return [*manifest_lines(opened.manifest), "", *quality_lines(opened.read_quality())]


def merge(artifact: str, out: str) -> list[str]:
    """Write the same artifact at tp_size 1, an ordinary Hugging Face checkpoint; returns what was done."""
    source = _manifest(artifact)
    with progress("merging", _size(source)) as advance:
        manifest = merge_artifact(artifact, out, advance)
    return [f"{out}: {source.tp_size} slices put together, {len(manifest.files)} files"]


def export(artifact: str, out: str, *, form: ExportFormat | None, portable: bool) -> list[str]:
    """Write a checkpoint that podquant serves too, as one that is quantized already; returns what was done.

    Args:
        form, portable: as `export_artifact` takes them.
    """
    manifest = _manifest(artifact)
    with progress("exporting", _size(manifest)) as advance:
        exported = export_artifact(artifact, out, form=form, portable=portable, on_bytes=advance)
    section = exported.section or {}
    lines = [
        f"{out}: {size_text(exported.nbytes)} in {exported.num_files} files, "
        f"{section.get('quant_method', 'not quantized any more')} {section.get('format', '')}".rstrip()
    ]
    if form == "fp8-block" and any(
        module.scheme and module.scheme.activation_dtype for module in manifest.modules.values()
    ):
        lines.append(
            "this form does not say how activations are quantized: podquant serves it with activations left alone"
        )
    return lines


def _manifest(artifact: str) -> Manifest:
    with closing(open_store(artifact)) as store:
        return read_manifest(store)


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())
