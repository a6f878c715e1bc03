"""Plans, artifacts and quality figures as lines of plain text. Knows nothing of terminals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from podquant.artifact.manifest import Manifest, ModuleRule
from podquant.conversion.forecast import Forecast
from podquant.conversion.plan import Plan
from podquant.conversion.receipts import Seconds

_NUMBER = re.compile(r"\d+")


def plan_lines(plan: Plan, *, threads: int, window_bytes: int, spread: Forecast | None = None) -> list[str]:
    """What a conversion would do: modules with their schemes and rules, units, bytes and memory, on hosts if asked."""
    source = plan.source
    lines = [f"source   {source.name}: {len(source.files)} files, {size_text(plan.bytes_in)} to convert"]
    lines += ["", *_module_lines(plan.modules), ""]
    rows = [("unit", "tensors", "files", "in", "out")]
    for unit in plan.units:
        sizes = (size_text(unit.bytes_in), size_text(unit.bytes_out))
        rows.append((unit.file, str(len(unit.tensors)), str(len(unit.sizes)), *sizes))
    lines += table(rows)
    if plan.tp_size > 1:
        lines += ["", *_rank_lines(plan)]
    lines += [
        "",
        f"reads {size_text(plan.bytes_in)}, writes {size_text(plan.bytes_out)}; "
        f"peak memory {size_text(plan.peak_memory(threads, window_bytes))} with {threads} threads",
    ]
    if spread is not None:
        lines += ["", *_forecast_lines(spread), ""]
    lines += note_lines(plan)
    return lines


def note_lines(plan: Plan) -> list[str]:
    """What a user should know of a plan before it is carried out."""
    lines = [f"warning: {rule}" for rule in plan.unmatched]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.redundant is not None:
        left_out, kept = plan.redundant
        lines.append(f"note: {left_out.name} is left out: config.json ties it to {kept.name}")
    if not any(module.scheme for module in plan.modules.values()):
        lines.append("warning: nothing is quantized: every module is kept in its own dtype")
    return lines


def manifest_lines(manifest: Manifest) -> list[str]:
    """What an artifact says about itself."""
    weights = [tensor for tensor in manifest.tensors.values() if tensor.scheme is not None]
    total = sum(file.size for file in manifest.files.values())
    quantized, everything = sum(t.nbytes for t in weights), sum(t.nbytes for t in manifest.tensors.values())
    lines = [
        f"written by   {manifest.written_by}, tp_size {manifest.tp_size}",
        f"source       {manifest.source.name}, {size_text(sum(f.size for f in manifest.source.files.values()))}",
        f"files        {len(manifest.files)}, {size_text(total)}",
        f"tensors      {len(manifest.tensors)}, {size_text(everything)}; "
        f"{len(weights)} of them codes, {size_text(quantized)}",
        "",
        *_module_lines(manifest.modules),
        "",
    ]
    rows = [("file", "size", "CRC32C")]
    rows += [(name, size_text(file.size), f"{file.crc32c:08x}") for name, file in manifest.files.items()]
    return lines + table(rows)


def quality_lines(quality: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What quantization did, one line for the tensors that differ in numbers only, and one for all.

    Args:
        quality: tensor → the figures of `Quality`, as `quality.json` holds them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, figures in quality.items():
        groups.setdefault(_NUMBER.sub("*", name), []).append(figures)
    rows: list[tuple[str, ...]] = [("weight", "count", "SQNR dB", "least", "max error", "zeros", "scales")]
    rows += [_quality_row(name, figures) for name, figures in groups.items()]
    if len(groups) > 1:
        rows.append(_quality_row("all", list(quality.values())))
    return table(rows) if quality else []


def time_line(seconds: Seconds) -> str:
    """Where the time of the workers went: whether storage or processors are what more of would help."""
    return (
        f"time in all workers: reading {seconds.read:.1f} s and quantizing {seconds.quantize:.1f} s, in threads; "
        f"writing {seconds.write:.1f} s, waiting for the threads {seconds.wait:.1f} s"
    )


def size_text(count: int) -> str:
    """A byte count for people: `1.50 GB` (of 10**9 bytes)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def table(rows: Sequence[tuple[str, ...]], *, right_from: int = 1) -> list[str]:
    """Rows in aligned columns: those from `right_from` on to the right, the others to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < right_from else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _forecast_lines(spread: Forecast) -> list[str]:
    """What the hosts of a cluster would do; reads and writes are those of the busiest host."""
    titles = ("hosts", "workers", "units", "at most", "reads", "writes", "busiest/mean", "memory/worker", "memory/host")
    row = (
        str(spread.num_hosts),
        str(spread.num_hosts * spread.workers_per_host),
        str(spread.num_units),
        f"{spread.most_units}/worker",
        f"{size_text(spread.bytes_in)}/host",
        f"{size_text(spread.bytes_out)}/host",
        f"{spread.balance:.2f}",
        size_text(spread.worker_memory),
        size_text(spread.host_memory),
    )
    return table([titles, row], right_from=0)


def _rank_lines(plan: Plan) -> list[str]:
    """What each tensor-parallel rank gets, and what is stored once for all."""
    folders: dict[str, int] = {}
    for unit in plan.units:
        for name, size in unit.sizes.items():
            folder = name.partition("/")[0]
            folders[folder] = folders.get(folder, 0) + size
    return table([("folder", "out"), *((name, size_text(folders[name])) for name in sorted(folders))])


def _module_lines(modules: Mapping[str, ModuleRule]) -> list[str]:
    """One line for the modules that differ in numbers only and are quantized alike by one rule."""
    groups: dict[tuple[str, str, str], int] = {}
    for name, module in modules.items():
        scheme = "kept" if module.scheme is None else module.scheme.label
        if module.scheme is not None and module.scheme.activation_dtype is None:
            scheme += " weight-only"
        key = (_NUMBER.sub("*", name), scheme, module.rule)
        groups[key] = groups.get(key, 0) + 1
    rows = [("module", "count", "scheme", "rule"), *((key[0], str(n), *key[1:]) for key, n in groups.items())]
    return table(rows, right_from=len(rows[0]))


def _quality_row(name: str, figures: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    sqnr = [f["sqnr_db"] for f in figures if f["sqnr_db"] is not None]

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values)

    return (
        name,
        str(len(figures)),
        f"{mean(sqnr):.2f}" if sqnr else "exact",
        f"{min(sqnr):.2f}" if sqnr else "exact",
        f"{max(f['max_error_ratio'] for f in figures):.5f}",
        f"{100 * mean(f['zeros_share'] for f in figures):.2f}%",
        f"{min(f['scale_min'] for f in figures):.2e}..{max(f['scale_max'] for f in figures):.2e}",
    )
