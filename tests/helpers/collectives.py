"""Collective operations of a compiled program, from the text of its HLO."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import jax

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")


class Collective(NamedTuple):
    """One array that one collective communicates; combined collectives have several."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the result on one device
    in_loop: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Return the arrays that a program communicates."""
    bodies: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in compiled.as_text().splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
        bodies[name].append(line)
    loops = _reachable(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                for dtype, shape in _ARRAY.findall(match[1]):
                    sizes = tuple(int(size) for size in shape.split(",") if size)
                    found.append(Collective(match[2], dtype, sizes, name in loops))
    return found


def _reachable(bodies: dict[str, list[str]]) -> set[str]:
    """Return the computations that loops call, directly or not."""
    called = {name: set(_CALLED.findall("\n".join(lines))) for name, lines in bodies.items()}
    whiles = [line for lines in bodies.values() for line in lines if " while(" in line]
    queue, loops = set(_CALLED.findall("\n".join(whiles))), set()
    while queue:
        loops.add(name := queue.pop())
        queue |= called.get(name, set()) - loops
    return loops
