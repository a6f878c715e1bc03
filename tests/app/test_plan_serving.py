"""Where a model can be served: the report of a slice, the comparison of all, and what to do where it does not fit."""

from __future__ import annotations

import re

import pytest

from podquant.app.plan_serving import EVERYWHERE, Served, ServingOptions, serving_report
from podquant.cluster.topology import known_slices, parse_slice
from podquant.errors import CapacityError, ConfigError
from tests.checkpoint.hollow import write_hollow
from tests.engine.shapes import LLAMA_3_8B, LLAMA_3_70B

DEFAULT = ServingOptions()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama-3-70B's headers."""
    return str(write_hollow(tmp_path_factory.mktemp("hollow") / "70b", LLAMA_3_70B))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama-3-8B's headers."""
    return str(write_hollow(tmp_path_factory.mktemp("hollow") / "8b", LLAMA_3_8B))


def test_a_slice_is_described_by_memory_room_and_speed(large: str) -> None:
    text = "\n".join(serving_report(Served(large, "int8_w8a8.yaml"), "v6e:2x4", DEFAULT))
    for line in (
        r"serving +a chip  v6e:2x4, 8 chips on 1 host: --tp-size 8$",
        r"weights +8\.83 GB  int8_w8a8$",
        r"slots +16\.42 MB  of 256 sequences at a time$",
        r"KV cache +21\.34 GB  the rest of 30\.19 GB, 0\.9 of the 33\.54 GB that programs may use$",
        r"a token +40\.96 kB  in the cache: bfloat16, each on one device$",
        r"room for 520,960 tokens: 254 sequences of 2,048, or 3 of 131,072, the whole context$",
        r" +64 +14\.07 GB +5\.37 GB +8\.59 ms +7,452$",
        r" +256 +no room +-$",
        r"recommended for v6e: int8_w8a8\.yaml \(v6e multiplies int8 at twice the rate of bfloat16",
        r"default: --max-running-requests 256: ",
        r"default: --page-size 128: ",
    ):
        assert re.search("^" + line, text, re.MULTILINE), line


def test_flags_that_are_given_are_no_defaults(large: str) -> None:
    options = ServingOptions(max_running_requests=64, kv_cache_dtype="int8")
    text = "\n".join(serving_report(Served(large, "int8_w8a8.yaml"), "v6e:4x4", options))
    assert "default: --max-running-requests" not in text
    assert "in the cache: int8, 2 copies, as there are 8 key/value heads for 16 devices" in text
    assert "16 chips on 4 hosts: --tp-size 16" in text


def test_half_chips_are_called_that(large: str) -> None:
    text = "\n".join(serving_report(Served(large, "fp8_w8a8.yaml"), "tpu7x:2x2x1", DEFAULT))
    assert "a half chip  tpu7x:2x2x1, 4 chips on 1 host: --tp-size 8" in text
    assert "recommended for tpu7x: fp8_w8a8.yaml" in text


def test_all_slices_are_compared_cheapest_first(large: str) -> None:
    lines = serving_report(Served(large, "int8_w8a8.yaml"), EVERYWHERE, DEFAULT)
    rows = [line.split() for line in lines[1 : lines.index("")]]
    prices = [float(row[2]) for row in rows]
    assert prices == sorted(prices)
    assert rows[0][:5] == ["v5e:2x4", "8", "9.60", "8", "x"]
    misfits = [line for line in lines if line.startswith("does not fit: ")]
    assert [line.split()[3] for line in misfits] == ["v5e:2x2:", "v6e:1x1:"]  # the next smaller of each generation
    assert "a chip lacks 2.63 GB" in misfits[0]
    assert len(rows) + 3 == len(known_slices())  # v5e:1x1 lacks more than v5e:2x2


def advice(served: Served, topology: str, options: ServingOptions = DEFAULT) -> str:
    with pytest.raises(CapacityError) as caught:
        serving_report(served, topology, options)
    message = str(caught.value)
    assert message.startswith(f"{topology}: a ")
    return message.partition("; it fits ")[2]


def test_what_does_not_fit_is_told_with_what_and_where_it_does(large: str, small: str) -> None:
    assert advice(Served(large, "int8.yaml"), "v5e:2x2") == "on v5e:2x4"
    assert advice(Served(large), "v5e:2x4") == "with --quantization-config-path int8_w8a8.yaml, or on v5e:4x4"
    assert advice(Served(large), "tpu7x:2x2x1", ServingOptions(tp_size=1)) == (
        "with --tp-size 8, or with --quantization-config-path fp8_w8a8.yaml, or on tpu7x:2x2x1"
    )
    assert (
        advice(Served(large), "v6e:1x1") == "with --quantization-config-path int8_w8a8.yaml on v6e:2x2, or on v6e:2x4"
    )
    tight = ServingOptions(mem_fraction_static=0.494)
    assert advice(Served(small, "int8.yaml"), "v5e:1x1", tight).startswith("with --kv-cache-dtype int8, or ")
    many = ServingOptions(max_running_requests=20_000)
    assert re.match(
        r"with --max-running-requests 1\d{4}, or on v5e:2x2$", advice(Served(small, "int8.yaml"), "v5e:1x1", many)
    )


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x4"])
def test_advice_holds(large: str, topology: str) -> None:
    """What is advised fits, and the next smaller slice does not."""
    where = advice(Served(large), topology).rpartition("on ")[2]
    assert serving_report(Served(large), where, DEFAULT)
    same = [tpu for tpu in known_slices() if tpu.generation == parse_slice(where).generation]
    before = same[same.index(parse_slice(where)) - 1]
    advice(Served(large), before.name)


def test_an_unknown_slice_is_refused_with_those_that_exist(small: str) -> None:
    with pytest.raises(
        ConfigError, match=r"v6e has no slice of that size: .*1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
    ):
        serving_report(Served(small), "v6e:3x5", DEFAULT)
    with pytest.raises(ConfigError, match=r"expected a generation \(v4, v5litepod, v5p, v6e, tpu7x\)"):
        serving_report(Served(small), "h100:8", DEFAULT)
