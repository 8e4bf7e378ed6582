"""Costs of a compiled program, counted in the text of its optimized HLO.

The compiler's own analysis counts the body of a loop once. Here, it counts once per iteration.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}

_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?(\w+)'?=(\d+)")
_PART = re.compile(r"'?(\w+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\}|\{\})")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}|(?:true|false)_computation=%?([\w.\-]+)")

# Bytes that a device sends, as multiples of operand and result, for groups of g devices in a ring.
_SENT = {
    "all-reduce": lambda operand, result, g: 2 * operand * (g - 1) / g,
    "all-gather": lambda operand, result, g: result * (g - 1) / g,
    "reduce-scatter": lambda operand, result, g: operand * (g - 1) / g,
    "all-to-all": lambda operand, result, g: operand * (g - 1) / g,
    "collective-permute": lambda operand, result, g: operand,
}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dimensions of each result
    operands: tuple[str, ...]
    text: str  # attributes
    is_root: bool

    @property
    def bytes(self) -> float:
        """Number of bytes of the results."""
        return _bytes_of(self.shapes)


class Program(NamedTuple):
    """Instructions of all computations by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    devices: int


class Collective(NamedTuple):
    """A communication between devices."""

    kind: str
    sent: float  # bytes that a device sends per execution
    results: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dimensions on a device
    groups: tuple[tuple[int, ...], ...]  # devices that communicate
    times: int  # number of executions
    in_loop: bool

    @property
    def result(self) -> float:
        """Number of bytes of the results on a device."""
        return _bytes_of(self.results)


@dataclass
class Costs:
    """Costs on one device."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # read and written by all instructions; an upper bound of memory traffic
    collectives: list[Collective] = field(default_factory=list)


def parse(text: str) -> Program:
    """Parse the text of an HLO module, as `compiled.as_text()` returns it.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _NAME.match(line)):
            instruction = _instruction(found, line[found.end() :])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("HLO: the text has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def measure(program: Program) -> Costs:
    """Count the costs of a program on one device."""
    costs = Costs()
    _add(program, program.entry, costs, 1, in_loop=False)
    return costs


def varying_axes(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes over which groups of devices communicate.

    Args:
        groups: indices of the devices, in the order of the mesh.
        sizes: size of each axis, in order.
    """
    shape = tuple(sizes.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        varying |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, varies in zip(sizes, varying, strict=True) if varies)


def _instruction(name: re.Match[str], rest: str) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(rest[:end])
    )
    opcode, _, call = rest[end:].strip().partition("(")
    close = _closing("(" + call) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", call[:close]))
    if opcode == "parameter":
        operands = (call[:close],)  # its number
    return Instruction(name[2], opcode, shapes, operands, call[close:], bool(name[1]))


def _closing(text: str) -> int:
    """Return the place of the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"HLO: brackets do not match: {text[:80]}")


def _bytes_of(arrays: Sequence[tuple[str, Sequence[int]]]) -> float:
    return sum(_item(dtype) * math.prod(dims) for dtype, dims in arrays)


def _item(dtype: str) -> float:
    """Return the bytes of an element; types without a size, such as tokens, have none."""
    digits = re.search(r"\d+", dtype)
    return BYTES.get(dtype, int(digits[0]) / 8 if digits else 0)


def _add(program: Program, name: str, costs: Costs, times: int, *, in_loop: bool) -> None:
    """Add the costs of a computation that runs `times` times."""
    computation = program.computations[name]
    for x in computation.values():
        operands = [computation[o].bytes for o in x.operands if o in computation]
        kind = x.opcode.removesuffix("-start")
        if x.opcode == "while":
            trips = _TRIPS.search(x.text)
            body = re.search(r"body=%?([\w.\-]+)", x.text)
            assert body
            _add(program, body[1], costs, times * int(trips[1] if trips else 1), in_loop=True)
        elif x.opcode == "conditional":
            _add_costliest(program, x, costs, times, in_loop=in_loop)
        elif kind in _SENT:
            groups = _groups(x, program)
            if len(groups[0]) > 1:
                sent = _SENT[kind](sum(operands), x.bytes, len(groups[0]))
                costs.collectives.append(Collective(kind, sent, x.shapes, groups, times, in_loop))
        elif x.opcode in ("call", "async-start"):
            for called in _CALLED.findall(x.text):
                _add(program, called, costs, times, in_loop=in_loop)
            continue
        elif x.opcode == "fusion":
            (called,) = _CALLED.findall(x.text)
            inside = program.computations[called]
            costs.flops += times * sum(_product_flops(i, inside) for i in inside.values())
            costs.bytes += times * _fusion_bytes(inside)
            continue
        costs.flops += times * _product_flops(x, computation)
        if x.opcode not in _FREE | {"while", "conditional"}:
            costs.bytes += times * _bytes(x, computation)


def _add_costliest(
    program: Program, x: Instruction, costs: Costs, times: int, *, in_loop: bool
) -> None:
    """Add the branch of a conditional with the most FLOPs."""
    names = itertools.chain(*(pair for pair in _BRANCHES.findall(x.text)))
    branches = [n.strip().lstrip("%") for found in names if found for n in found.split(",")]
    options = []
    for branch in branches:
        option = Costs()
        _add(program, branch, option, times, in_loop=in_loop)
        options.append(option)
    most = max(options, key=lambda option: option.flops)
    costs.flops += most.flops
    costs.bytes += most.bytes
    costs.collectives += most.collectives


def _product_flops(x: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Return the FLOPs of a matrix product, 0 for other instructions."""
    if x.opcode != "dot":
        return 0.0
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.text)
    left = computation[x.operands[0]].shapes[0][1]
    depth = math.prod(left[int(axis)] for axis in contracted[1].split(",")) if contracted else 1
    return 2.0 * depth * math.prod(x.shapes[0][1])


def _bytes(x: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Return the bytes that an instruction reads and writes; a slice reads only itself."""
    sizes = [computation[o].bytes for o in x.operands if o in computation]
    if x.opcode in _SLICES:
        return 2 * x.bytes
    if x.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    return x.bytes + sum(sizes)


def _fusion_bytes(inside: Mapping[str, Instruction]) -> float:
    """Return the bytes that a fusion reads and writes."""
    total = 0.0
    for parameter in (i for i in inside.values() if i.opcode == "parameter"):
        users = (i for i in inside.values() if parameter.name in i.operands)
        total += min(parameter.bytes, sum(_read(parameter, user) for user in users))
    for root in (i for i in inside.values() if i.is_root):
        results = [inside[o] for o in root.operands] if root.opcode == "tuple" else [root]
        for result in results:
            updates = result.opcode == "dynamic-update-slice"
            total += inside[result.operands[1]].bytes if updates else result.bytes
    return total


def _read(parameter: Instruction, user: Instruction) -> float:
    """Return the bytes that an instruction of a fusion reads of a parameter."""
    is_first = user.operands[0] == parameter.name
    if user.opcode in _SLICES and is_first:
        return user.bytes
    if user.opcode == "dynamic-update-slice" and is_first:
        return 0
    return parameter.bytes


def _groups(x: Instruction, program: Program) -> tuple[tuple[int, ...], ...]:
    """Return the devices that communicate, as groups or as pairs of source and target."""
    if mesh := _MESH_GROUPS.search(x.text):
        axes, order, parts = _AXIS.findall(mesh[1]), mesh[2], _PART.findall(mesh[3])
        count = math.prod(int(size) for _, size in axes)
        devices = _devices(order) if order else np.arange(count)
        return _mesh_groups(devices, dict(axes), parts)
    found = _PAIRS.search(x.text) or _GROUPS.search(x.text)
    if found is None:
        raise ValueError(f"HLO: {x.opcode} has no known list of devices: {x.text[:200]}")
    text = found[1]
    if text.startswith("{{"):
        return tuple(
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)
        )
    if text == "{}":
        return (tuple(range(program.devices)),)
    shape, _, order = text.partition("<=")
    return tuple(tuple(row) for row in _devices(order).reshape(_ints(shape[1:-1])).tolist())


def _devices(text: str) -> np.ndarray:
    """Return devices from `[2,4]T(1,0)`, numbers in that shape, transposed; or from `0,1`."""
    dims, *order = re.findall(r"[\[(]([\d,]+)[\])]", text) or (None,)
    if dims is None:
        return np.array(_ints(text))
    devices = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (devices.transpose(_ints(order[0])) if order else devices).reshape(-1)


def _mesh_groups(
    devices: np.ndarray, axes: Mapping[str, str], parts: Sequence[tuple[str, str, str]]
) -> tuple[tuple[int, ...], ...]:
    """Return the groups along axes, or along parts of them.

    Args:
        devices: the devices of the mesh, the last axis fastest.
        axes: size of each axis of the compiler's mesh.
        parts: name of an axis, and, if only a part of it communicates, the product of the sizes
            before the part, and the size of the part.
    """
    shape: list[int] = []
    chosen: list[int] = []
    for name, size in axes.items():
        total, done = int(size), 1
        for _, before, part in sorted(
            (p for p in parts if p[0] == name), key=lambda p: int(p[1] or 1)
        ):
            shape += [int(before or 1) // done, int(part or total)]
            chosen.append(len(shape) - 1)
            done = math.prod((int(before or 1), int(part or total)))
        shape.append(total // done)
    devices = np.moveaxis(devices.reshape(shape), chosen, range(-len(chosen), 0))
    width = math.prod(shape[axis] for axis in chosen)
    return tuple(tuple(row) for row in devices.reshape(-1, width).tolist())


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def in_loops(costs: Costs) -> Iterator[Collective]:
    """Yield the collectives inside of loops."""
    return (c for c in costs.collectives if c.in_loop)
