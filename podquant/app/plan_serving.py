"""Where a model can be served, and what that takes there, from its headers alone: no device is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from podquant.app.report import size_text
from podquant.app.serving_report import comparison_lines, device_text, recommendation, serving_lines
from podquant.app.source import locate_model
from podquant.cluster.topology import GENERATIONS, TpuSlice, known_slices, parse_slice
from podquant.config.rules import load_quantization_config
from podquant.engine.capacity import ServingOptions as ServingOptions  # part of this module's signatures
from podquant.engine.capacity import ServingPlan, Subject, plan_serving
from podquant.errors import CapacityError, MeshError
from podquant.weights.source import check_source, open_source

EVERYWHERE = "all"
"""In the place of a slice: compare those that there are."""


@dataclass(frozen=True)
class Served:
    """What is to be served.

    Attributes:
        model: `gs://…`, a local directory or a Hugging Face id.
        rules_path: quantize it by these rules; None: as it is.
        revision, download_dir: of a Hugging Face id.
        allow_extra_tensors: go on where tensors are there that no weight of the model is in.
    """

    model: str
    rules_path: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    allow_extra_tensors: bool = False


def serving_report(served: Served, topology: str, options: ServingOptions) -> list[str]:
    """What serving takes on a slice, or a comparison of all slices, as lines of text.

    Raises:
        CapacityError: it does not fit there; says on what, and with what, it does.
        PodquantError: the slice, the rules or the model are wrong, or the model cannot be cut so.
    """
    tpu = None if topology == EVERYWHERE else parse_slice(topology)
    subject = open_subject(served)
    if tpu is None:
        return _compare(subject, options)
    plan = plan_serving(subject, tpu, options)
    if plan.shortage:
        raise CapacityError(f"{lack(plan)}; {ways_to_fit(served, subject, plan, options)}")
    return serving_lines(plan, options)


def open_subject(served: Served) -> Subject:
    """The model, whose headers are read and checked. Raises PodquantError for what is wrong with it."""
    rules = load_quantization_config(served.rules_path) if served.rules_path else None
    uri, _ = locate_model(served.model, served.revision, served.download_dir)
    source = open_source(uri, rules)
    with closing(source):
        checked = check_source(source, allow_extra=served.allow_extra_tensors)
    return Subject(checked.config, checked.declaration, source.scheme_of)


def _compare(subject: Subject, options: ServingOptions) -> list[str]:
    fitting: list[ServingPlan] = []
    misfits: list[str] = []
    for generation in GENERATIONS:
        found: list[ServingPlan] = []
        refused = f"{generation.name}: no slice that --tp-size {options.tp_size} divides"
        for tpu in known_slices():
            if tpu.generation != generation:
                continue
            try:
                plan = plan_serving(subject, tpu, options)
            except MeshError as error:
                refused = f"{tpu.name}: {error}"
                continue
            if plan.shortage:
                refused = lack(plan)
            else:
                found.append(plan)
        fitting += found
        if not found or found[0].tpu != next(tpu for tpu in known_slices() if tpu.generation == generation):
            misfits.append(refused)
    return comparison_lines(sorted(fitting, key=lambda plan: plan.tpu.price), misfits)


def lack(plan: ServingPlan) -> str:
    """By how much a model does not fit."""
    unit, settings = device_text(plan.tpu.generation), plan.settings
    return (
        f"{plan.tpu.name}: a {unit} lacks {size_text(plan.shortage)}: of {size_text(plan.memory)} "
        f"({settings.mem_fraction_static:g} of its memory) weights take {size_text(plan.weight_bytes)}, "
        f"{settings.max_running_requests} slots {size_text(plan.slot_bytes)} and a sequence of {plan.shortest:,} "
        f"tokens {size_text(plan.shortage + plan.cache_room)}"
    )


def ways_to_fit(served: Served, subject: Subject, plan: ServingPlan, options: ServingOptions) -> str:
    """With which flags, or on which slice, a model fits that does not."""
    ways = [
        *_other_flags(subject, plan, options),
        *_quantized(served, plan, options),
        *_larger(subject, plan.tpu, options),
    ]
    return "it fits " + ", or ".join(ways) if ways else "it fits on no slice of up to 256 chips: quantize it further"


def _other_flags(subject: Subject, plan: ServingPlan, options: ServingOptions) -> Iterator[str]:
    """What makes it fit on the same slice."""
    tpu = plan.tpu
    if options.kv_cache_dtype in ("auto", "bfloat16") and _fits(subject, tpu, _with_small_cache(options)):
        yield "with --kv-cache-dtype int8"
    if options.tp_size is not None and _fits(subject, tpu, whole := replace(options, tp_size=None)):
        yield f"with --tp-size {plan_serving(subject, tpu, whole).tp_size}"
    if plan.shortage < plan.slot_bytes:
        most = int(plan.settings.max_running_requests * (1 - plan.shortage / plan.slot_bytes))
        if most > 0 and _fits(subject, tpu, replace(options, max_running_requests=most)):
            yield f"with --max-running-requests {most}"


def _quantized(served: Served, plan: ServingPlan, options: ServingOptions) -> Iterator[str]:
    """Rules by which a model fits that is not quantized, on the same slice or on a smaller one than it takes."""
    if served.rules_path is not None or plan.model.schemes:
        return
    rules, _ = recommendation(plan.tpu.generation)
    subject = open_subject(replace(served, rules_path=rules))
    flag = f"with --quantization-config-path {rules}"
    if _fits(subject, plan.tpu, options):
        yield flag
    elif _fits(subject, plan.tpu, _with_small_cache(options)):
        yield f"{flag} and --kv-cache-dtype int8"
    else:
        yield from (f"{flag} {where}" for where in _larger(subject, plan.tpu, options))


def _with_small_cache(options: ServingOptions) -> ServingOptions:
    return replace(options, kv_cache_dtype="int8")


def _larger(subject: Subject, tpu: TpuSlice, options: ServingOptions) -> Iterator[str]:
    """The cheapest slice of the same generation on which it fits, or of any if there is none."""
    anywhere = replace(options, tp_size=None, ep_size=None)
    slices = sorted(known_slices(), key=lambda tpu: tpu.price)
    same = [each for each in slices if each.generation == tpu.generation]
    for choice in (same, slices):
        for each in choice:
            if _fits(subject, each, anywhere):
                yield f"on {each.name}"
                return


def _fits(subject: Subject, tpu: TpuSlice, options: ServingOptions) -> bool:
    try:
        return not plan_serving(subject, tpu, options).shortage
    except MeshError:
        return False
