"""Plans of serving as lines of plain text. Knows nothing of terminals, or of how a plan comes about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podquant.app.report import size_text, table
from podquant.cluster.topology import Generation
from podquant.engine.capacity import AT_ONCE, ServingOptions, ServingPlan
from podquant.engine.settings import notes

_BOUND = (
    "at most: reading at the full speed of the memory, or multiplying at that of the matrix unit, whichever takes "
    "longer; what passes between chips, and the host, take time besides"
)


def serving_lines(plan: ServingPlan, options: ServingOptions) -> list[str]:
    """What serving on one slice takes.

    Args:
        plan: of a model that fits.
        options: by which it was made; what they leave open is listed with the reason for the choice.
    """
    tpu, unit = plan.tpu, device_text(plan.tpu.generation)
    chips, hosts = _counted(tpu.num_chips, "chip"), _counted(tpu.num_hosts, "host")
    sizes = f"--tp-size {plan.tp_size}" + (f" --ep-size {plan.ep_size}" if plan.ep_size > 1 else "")
    sizes += f" --dp-size {plan.dp_size}" if plan.dp_size > 1 else ""
    share, given = plan.settings.mem_fraction_static, size_text(tpu.generation.device_bytes)
    rows = [
        ("serving", f"a {unit}"),
        ("weights", size_text(plan.weight_bytes)),
        ("slots", size_text(plan.slot_bytes)),
        ("KV cache", size_text(plan.cache_room)),
        ("a token", size_text(plan.token_bytes)),
    ]
    says = [
        f"{tpu.name}, {chips} on {hosts}: {sizes}",
        schemes_text(plan),
        f"of {plan.settings.max_running_requests} sequences at a time",
        f"the rest of {size_text(plan.memory)}, {share:g} of the {given} that programs may use",
        f"in the cache: {_cache_text(plan)}",
    ]
    lines = [f"{row}  {said}" for row, said in zip(table(rows), says, strict=True)]
    lines += [_room_line(plan), "", *_step_lines(plan, unit), _BOUND, ""]
    lines.append(f"recommended for {tpu.generation.name}: {' '.join(recommendation(tpu.generation))}")
    lines += [f"default: {line}" for line in notes(options, plan.defaults)]
    return lines


def comparison_lines(plans: Sequence[ServingPlan], misfits: Iterable[str]) -> list[str]:
    """A table of the slices that a model fits on, the cheapest first, and what others lack."""
    titles = ("slice", "chips", "$/h", "tp x dp", "weights", "KV cache", "2k tokens", "longest")
    rows = [(*titles, *(f"tok/s at {count}" for count in AT_ONCE))]
    for plan in plans:
        rows.append(
            (
                plan.tpu.name,
                str(plan.tpu.num_chips),
                f"{plan.tpu.price:.2f}",
                f"{plan.tp_size} x {plan.dp_size}",
                size_text(plan.weight_bytes),
                size_text(plan.cache_room),
                f"{plan.sequences(plan.shortest):,}",
                f"{min(plan.cache_tokens, plan.context_length):,}",
                *(_speed_text(plan.tokens_per_second(count)) for count in AT_ONCE),
            )
        )
    lines = table(rows) if plans else []
    lines += [
        "",
        "weights and KV cache: of a device, which is a chip, or half of one of tpu7x",
        "2k tokens: sequences of 2,048 tokens that the caches hold together; longest: tokens of the longest that fits",
        f"tok/s {_BOUND}",
        "$/h: Google's list prices on demand in the USA, for the order only: https://cloud.google.com/tpu/pricing",
    ]
    return lines + [f"does not fit: {misfit}" for misfit in misfits]


def recommendation(generation: Generation) -> tuple[str, str]:
    """The rules that suit a chip, by the name of the file that podquant ships, and why, in brackets."""
    name = generation.name
    if generation.fast_8_bit == "int8":
        why = (
            f"({name} multiplies int8 at twice the rate of bfloat16: prompts take half the time; int8.yaml keeps "
            "activations in bfloat16, and a step that decodes reads the same bytes)"
        )
        return "int8_w8a8.yaml", why
    if generation.fast_8_bit is not None:
        why = f"({name} multiplies fp8 at twice the rate of bfloat16, and upcasts int8: prompts take half the time)"
        return "fp8_w8a8.yaml", why
    return "int8.yaml", f"({name} multiplies no 8-bit type faster than bfloat16: 8 bits save bytes, by weights alone)"


def device_text(generation: Generation) -> str:
    """What JAX shows as a device."""
    return "chip" if generation.devices_per_chip == 1 else "half chip"


def schemes_text(plan: ServingPlan) -> str:
    """How the weights are quantized."""
    labels = sorted(scheme.label for scheme in plan.model.schemes)
    return " and ".join(labels) if labels else f"{plan.model.numerics.dtype}, not quantized"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _cache_text(plan: ServingPlan) -> str:
    dtype = plan.model.numerics.dtype if plan.cache_dtype == "auto" else plan.cache_dtype
    if plan.copies == 1:
        return f"{dtype}, each on one device"
    if plan.model.config.latent is not None:
        return f"{dtype}, its latents on each of {plan.tp_size} devices"
    heads = plan.model.config.num_kv_heads
    return f"{dtype}, {plan.copies:g} copies, as there are {heads} key/value heads for {plan.tp_size} devices"


def _room_line(plan: ServingPlan) -> str:
    longest = min(plan.cache_tokens, plan.context_length)
    line = (
        f"room for {plan.dp_size * plan.cache_tokens:,} tokens: {plan.sequences(plan.shortest):,} sequences of "
        f"{plan.shortest:,}"
    )
    if longest == plan.shortest:
        return line
    if longest == plan.context_length:
        return f"{line}, or {plan.sequences(longest):,} of {longest:,}, the whole context"
    return f"{line}; the longest has {longest:,}, less than the context of {plan.context_length:,}"


def _step_lines(plan: ServingPlan, unit: str) -> list[str]:
    rows = [("at once", f"a {unit} reads", "of it KV", "at least", "tokens/s at most")]
    for count in AT_ONCE:
        cost, speed = plan.step(count), plan.tokens_per_second(count)
        if speed is None:
            rows.append((str(count), "no room", "", "", _speed_text(speed)))
            continue
        read = size_text(cost.weight_bytes + cost.cache_bytes)
        rows.append((str(count), read, size_text(cost.cache_bytes), f"{1e3 * cost.seconds:.2f} ms", _speed_text(speed)))
    return table(rows, right_from=0)


def _speed_text(speed: float | None) -> str:
    return "-" if speed is None else f"{speed:,.0f}"
