"""FLOPs of a program, counted in its jaxpr.

The count of the compiler includes a loop body once, regardless of the number of iterations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of all matrix products in `function(*args)`.

    A product with n outputs and contracted length k has 2 n k FLOPs. A scan body counts once per
    iteration, and the body of a `shard_map` once per device; a conditional counts as its most
    expensive branch. Elementwise operations are ignored.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            if contracted:
                depth = math.prod(shape[axis] for axis in contracted)
                total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [_count(part) for part in _inside(parameters)]
        if name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * _repetitions(name, parameters)
    return total


def _repetitions(name: str, parameters: dict[str, Any]) -> int:
    """Return the number of times that the body of an equation runs, on all devices together."""
    if name == "scan":
        return int(parameters["length"])
    if name == "shard_map":
        # The name of the parameter depends on the version of JAX.
        (axes,) = (value for key, value in parameters.items() if key.endswith("manual_axes"))
        return math.prod(parameters["mesh"].shape[axis] for axis in axes)
    return 1


def _inside(parameters: dict[str, Any]) -> list[Any]:
    """Return the jaxprs in the parameters of an equation."""
    found = []
    for value in parameters.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
