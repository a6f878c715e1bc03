"""How many bytes a compiled TPU program moves through HBM, read off its scheduled HLO.

XLA's own `cost_analysis` counts a loop's body once, and the copies into VMEM that the scheduler places as if each were
traffic of its own. Here every operand and result that lies in HBM is counted where the schedule touches it: of an array
that is sliced, gathered from or updated in place, only that part; a loop's body as often as it runs; of branches, the
one that moves least, which is that of requests that ask for nothing special. Knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%[\w.-]+")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls)=(%[\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_TILE = re.compile(r"T\(([\d,]+)\)")

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")

_FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
)
_VIEWS = frozenset(("bitcast", "reshape", "transpose", "copy", "bitcast-convert"))
"""Inside a fusion they move nothing: what they give is read from where their operand lies."""

_PARTS = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Written in place: which operand holds what is new."""


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: with its `%`.
        type: of the result, layouts and memory spaces included.
        opcode: what it does.
        operands: names.
        attributes: what stands behind the operands.
        is_root: whether it is its computation's result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, with the names of scopes: `jit(step)/while/body/scope/while`."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The computations it runs."""
        return _CALLED.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """Those of which it runs one."""
        found = _BRANCHES.search(self.attributes)
        return found[1].split(", ") if found else []

    @property
    def nbytes(self) -> float:
        """Of its result, wherever that lies."""
        return sum(size for size, _ in arrays_of(self.type))

    @property
    def hbm_bytes(self) -> float:
        """Of those of its results that lie in HBM."""
        return sum(size for size, in_hbm in arrays_of(self.type) if in_hbm)


Trips = Callable[[Instruction], float]
"""How often a loop runs whose count is not in the program."""


def arrays_of(text: str) -> Iterator[tuple[float, bool]]:
    """For each array of a type: its bytes, padded to the tiles of its layout, and whether it lies in HBM."""
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = [int(size) for size in dims.split(",") if size]
        order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis]
        tile = _TILE.search(layout)
        if tile and shape:
            for axis, size in zip(order, reversed([int(each) for each in tile[1].split(",")]), strict=False):
                shape[axis] = -(-shape[axis] // size) * size
        yield math.prod(shape) * _item_bits(dtype) / 8, "S(" not in layout


def _item_bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0  # tokens have none


class Program:
    """The scheduled HLO of a program.

    Args:
        text: of `jax.stages.Compiled.as_text`.
        trips: for loops whose count depends on the values they are given.
    """

    def __init__(self, text: str, trips: Trips = lambda loop: 1.0) -> None:
        self._trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0]
                self.computations[name] = current = {}
                if line.startswith("ENTRY"):
                    self.entry = name
            elif match := _INSTRUCTION.match(line):
                root, name, kind, opcode, rest = match.groups()
                inside, attributes = _split(rest)
                current[name] = Instruction(name, kind, opcode, tuple(_NAME.findall(inside)), attributes, bool(root))

    @cached_property
    def hbm_bytes(self) -> float:
        """Read and written by one run."""
        return self._moved(self.entry)

    @cached_property
    def collectives(self) -> dict[str, float]:
        """How often one run meets a collective of each kind."""
        found: dict[str, float] = {}
        self._count(self.entry, 1.0, found)
        return found

    def _count(self, name: str, times: float, found: dict[str, float]) -> None:
        for instruction in self.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found[kind] = found.get(kind, 0) + times
            elif instruction.opcode == "while":
                self._count(instruction.called[-1], times * self._runs(instruction), found)
            elif instruction.opcode == "conditional":
                self._count(min(instruction.branches, key=self._moved), times, found)
            elif instruction.opcode in ("call", "call-start", "async-start"):
                self._count(instruction.called[0], times, found)

    def _runs(self, loop: Instruction) -> float:
        """How often a loop runs: up to the constant that its condition compares its counter with."""
        condition, _ = self._loop(loop)
        inside = self.computations[condition]
        root = next(each for each in inside.values() if each.is_root)
        for operand in root.operands:
            if inside[operand].opcode == "constant" and root.opcode == "compare" and "direction=LT" in root.attributes:
                return float(inside[operand].attributes)
        return self._trips(loop)

    def _loop(self, loop: Instruction) -> tuple[str, str]:
        """Condition and body."""
        found = dict(re.findall(r"\b(condition|body)=(%[\w.-]+)", loop.attributes))
        return found["condition"], found["body"]

    def _moved(self, name: str) -> float:
        inside = self.computations[name]
        return sum(self._moved_by(instruction, inside) for instruction in inside.values())

    def _moved_by(self, instruction: Instruction, inside: dict[str, Instruction]) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode == "while":
            return self._runs(instruction) * sum(map(self._moved, self._loop(instruction)))
        if opcode == "conditional":
            return min(map(self._moved, instruction.branches))
        if opcode in ("call", "call-start", "async-start"):
            return self._moved(instruction.called[0])
        if opcode == "slice-start":  # ((from), to, a flag)
            (_, from_hbm), (size, to_hbm), *_ = arrays_of(instruction.type)
            return size * (from_hbm + to_hbm)
        if opcode == "copy-start":  # (to, from, a flag)
            return 0.0 if _is_fetched_before(instruction, inside) else instruction.hbm_bytes
        if opcode == "fusion":
            return self._fused(instruction, inside)
        source = inside[instruction.operands[0]] if instruction.operands else None
        if opcode in _PARTS and source is not None:
            return instruction.hbm_bytes + (instruction.nbytes if source.hbm_bytes else 0.0)
        if opcode in _UPDATES:
            new = inside[instruction.operands[_UPDATES[opcode]]]
            return new.hbm_bytes + (new.nbytes if instruction.hbm_bytes else 0.0)
        return instruction.hbm_bytes + sum(inside[operand].hbm_bytes for operand in set(instruction.operands))

    def _fused(self, fusion: Instruction, inside: dict[str, Instruction]) -> float:
        body = fusion.called[0]
        total = 0.0
        for number, operand in enumerate(fusion.operands):
            if inside[operand].hbm_bytes:
                part, is_result = self._used(body, self._parameter(body, number))
                total += inside[operand].hbm_bytes if is_result else min(part, inside[operand].hbm_bytes)
        return total + self._written(body, fusion)

    def _parameter(self, body: str, number: int) -> str:
        return next(
            each.name
            for each in self.computations[body].values()
            if each.opcode == "parameter" and each.attributes == str(number)
        )

    def _used(self, body: str, name: str) -> tuple[float, bool]:
        """Bytes that a fused computation reads of an array, and whether the array is its result, as it is."""
        inside = self.computations[body]
        if inside[name].is_root:
            return 0.0, True
        total, is_result = 0.0, False
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode in _PARTS and user.operands[0] == name:
                total += user.nbytes
            elif user.opcode in _UPDATES and user.operands[0] == name:
                continue
            elif user.opcode in _VIEWS or user.opcode == "fusion":
                passes = True
                if user.opcode == "fusion":
                    inner = user.called[0]
                    part, passes = self._used(inner, self._parameter(inner, user.operands.index(name)))
                    total += part
                if passes:
                    part, reaches = self._used(body, user.name)
                    total, is_result = total + part, is_result or reaches
            else:
                total += inside[name].nbytes
        return total, is_result

    def _written(self, body: str, fusion: Instruction) -> float:
        """Bytes that a fusion writes to HBM: of an update in place, what is new."""
        inside = self.computations[body]
        root = next(each for each in inside.values() if each.is_root)
        parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0.0
        for part, (size, in_hbm) in zip(parts, arrays_of(fusion.type), strict=False):
            if in_hbm:
                total += self._new(body, part, size)
        return total

    def _new(self, body: str, result: Instruction, size: float) -> float:
        inside = self.computations[body]
        while result.opcode in _VIEWS:
            result = inside[result.operands[0]]
        if result.opcode in _UPDATES:
            return inside[result.operands[_UPDATES[result.opcode]]].nbytes
        if result.opcode == "fusion":
            return self._new(
                result.called[0], next(e for e in self.computations[result.called[0]].values() if e.is_root), size
            )
        return size


def _is_fetched_before(copy: Instruction, inside: dict[str, Instruction]) -> bool:
    """Whether an array lies in VMEM when the program begins, because the run before has fetched it at its end."""
    return "cross_program_prefetch_index" in copy.attributes and any(
        other.opcode == "copy-start" and other.operands == copy.operands and other.name != copy.name
        for other in inside.values()
    )


def _split(rest: str) -> tuple[str, str]:
    """What stands in an instruction's brackets and behind them; of parameters and constants, the first alone."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            inside, behind = rest[:at], rest[at + 1 :]
            return (inside, behind) if "%" in inside or not inside else ("", inside)
    return rest, ""
