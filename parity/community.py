"""Layers of `memory-caching` 0.1.0 (PyPI, PyTorch) as layers of this package.

Tables map every configuration field and every parameter; fields without an equivalent are errors.
`linear` and `swla` layers convert completely. `dla` and `titans` layers have no parameters for
their initial memories, which are zero and have biases; with a nonzero initial memory, results agree
as long as the biases are zero. See `docs/migration.md`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mc_core import DLAConfig, MCConfig, MemoryConfig, MLPConfig, SWLAConfig, TitansConfig
from mc_core.checks import check_keys, raise_config_error
from mc_core.prefixes import strip_prefixes
from mc_core.pretrained import one_dtype
from mc_core.weights import ArraySpec, Flat, check_leaves, leaves
from mc_torch import MemoryCachingLayer
from parity.convert import TOLERANCE, relative_rms
from parity.files import Config, Format, ModuleWeights
from parity.weights import load_torch, to_numpy

PACKAGE = "memory-caching 0.1.0"
BATCH, TOKENS, SEGMENT = 2, 45, 16  # of the batch on which outputs are compared

# Parameter names of memory-caching and of this package, each [d, d].
PARAMETERS = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "u_proj.weight": "u_proj.weight",  # in this package, only if it is used
    "o_proj.weight": "out_proj.weight",
}
# Fields with the same name and meaning.
SAME = (
    "d_model",
    "num_heads",
    "aggregation",
    "segmentation",
    "segment_size",
    "state_init_mode",
    "ssc_top_k",
    "use_q_as_u",
    "softmax_temperature",
    "detach_cached_states",
    "detach_cached_context",
)
# Never used: all memories of the package can be interpolated.
WITHOUT_EFFECT = ("allow_output_mixture_fallback",)
BACKENDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "swla": ("alpha", "beta", "lam"),
    "dla": (
        "memory_width",
        "memory_depth",
        "objective",
        "inner_update_mode",
        "step_size",
        "momentum",
    ),
    "titans": (
        "memory_width",
        "memory_depth",
        "objective",
        "inner_update_mode",
        "step_size",
        "momentum",
        "retention_alpha",
        "update_convention",
    ),
}
FIELDS = (*SAME, *WITHOUT_EFFECT, "backend", *(kind for kind in BACKENDS if BACKENDS[kind]))


def from_community(
    config: Any, state_dict: Mapping[str, torch.Tensor], initial: Sequence[torch.Tensor] = ()
) -> tuple[MCConfig, Flat]:
    """Return the configuration and parameters of an equivalent layer of this package.

    Args:
        config: `MCConfig` of the layer, or its `dataclasses.asdict`. `backend` and the section of
            that name must be those of the layer's backend object, which the old package uses.
        state_dict: parameters of the layer.
        initial: initial memory of `dla` and `titans`, one array [h, out, in] per memory layer;
            must not be zero, because the gradients of a zero MLP memory vanish.

    Returns:
        Configuration and parameters in PyTorch's layout; see `load_torch` and `to_jax`.

    Raises:
        ValueError: a field has no equivalent, or parameters do not match; lists all of these.
    """
    fields = config if isinstance(config, dict) else dataclasses.asdict(config)
    ours = map_config(fields)
    given = leaves(state_dict)
    dtype = one_dtype(given) if given else "float32"
    square = ArraySpec((ours.d_model, ours.d_model), dtype)
    check_leaves(given, dict.fromkeys(PARAMETERS, square))
    flat = {PARAMETERS[name]: to_numpy(tensor) for name, tensor in state_dict.items()}
    if not ours.gated or ours.use_q_as_u:
        del flat["u_proj.weight"]
    return ours, flat | _initial(ours, initial, dtype)


def map_config(fields: dict[str, Any]) -> MCConfig:
    """Return the configuration of the equivalent layer; `fields` is from `dataclasses.asdict`.

    Raises:
        ValueError: a field has no equivalent.
    """
    check_keys("config", fields, FIELDS, FIELDS)
    kind = fields["backend"]
    if kind not in BACKENDS:
        raise_config_error("config", "backend", kind, "one of " + ", ".join(map(repr, BACKENDS)))
    if fields["aggregation"] not in ("residual", "grm", "soup", "ssc"):
        raise_config_error(
            "config", "aggregation", fields["aggregation"], "'residual', 'grm', 'soup' or 'ssc'"
        )
    ours = MCConfig(
        **{name: fields[name] for name in SAME}, pooling="sum", qk_norm="none", output_norm="none"
    )
    if kind == "linear":
        return ours
    part = fields[kind]
    check_keys(f"config.{kind}", part, BACKENDS[kind], BACKENDS[kind])
    if kind == "swla":
        return dataclasses.replace(ours, memory=_swla(part))
    return dataclasses.replace(ours, memory=_mlp(kind, part, ours.head_dim), chunk_size=1)


def _swla(part: dict[str, Any]) -> SWLAConfig:
    alpha = part["alpha"]
    if not 0 < alpha <= 1:
        raise_config_error("config", "swla.alpha", alpha, "in (0, 1], the range of `retention`")
    return SWLAConfig("constant", retention=alpha, previous=part["beta"], newest=part["lam"])


def _mlp(kind: str, part: dict[str, Any], head: int) -> MemoryConfig:
    if part["inner_update_mode"] != "differentiable":
        mode = part["inner_update_mode"]
        allowed = "'differentiable': writes are always differentiated here"
        raise_config_error("config", f"{kind}.inner_update_mode", mode, allowed)
    if kind == "titans" and part["update_convention"] != "gradient_descent":
        convention, allowed = (
            part["update_convention"],
            "'gradient_descent': 'paper' ascends the loss",
        )
        raise_config_error("config", "titans.update_convention", convention, allowed)
    if part["memory_width"] % head:
        allowed = f"a multiple of the head width {head}"
        raise_config_error("config", f"{kind}.memory_width", part["memory_width"], allowed)
    same: dict[str, Any] = {
        "depth": part["memory_depth"],
        "expansion": part["memory_width"] // head,
        "objective": part["objective"],
        "step": part["step_size"],
        "residual": False,
        "inner_clip": None,
        "coefficients": "constant",
    }
    if kind == "dla" and not part["momentum"]:
        return DLAConfig(**same)
    # Here, `dla` has no momentum: use Titans with the same loss.
    return TitansConfig(
        **same, momentum=part["momentum"], retention=part.get("retention_alpha", 1.0)
    )


def _initial(config: MCConfig, initial: Sequence[torch.Tensor], dtype: str) -> Flat:
    memory, h, width = config.memory, config.num_heads, config.head_dim
    if not isinstance(memory, MLPConfig):
        dims = [width]  # a matrix starts at zero in both packages
    else:
        dims = [width, *[width * memory.expansion] * (memory.depth - 1), width]
        if not initial:
            raise ValueError(
                f"config.backend = {memory.kind!r}: starts at a zero memory, so reads ignore "
                "the query, and has biases, which are not supported: only 'linear' and 'swla' "
                "convert completely"
            )
    given = {f"initial.{layer}": tensor for layer, tensor in enumerate(initial)}
    wanted = {
        f"initial.{layer}": ArraySpec((h, dims[layer + 1], dims[layer]), dtype)
        for layer in range(len(dims) - 1)
    }
    check_leaves(leaves(given), wanted)
    if given and not any(bool(tensor.any()) for tensor in given.values()):
        raise ValueError("initial: must not be zero: all gradients would vanish")
    return {name: to_numpy(tensor) for name, tensor in given.items()}


def community_format(report: Callable[[str], object]) -> Format:
    """Return the `Format` of saved layers of `memory-caching`.

    The file is `torch.save({"config": dataclasses.asdict(layer.config), "state_dict":
    layer.state_dict()}, path)` of a `linear` or `swla` layer. If the package is installed, reading
    compares the outputs of its layer with those of the converted layer in float64.

    Args:
        report: called with a message about the difference of the outputs.
    """

    def read(path: Path) -> ModuleWeights:
        try:
            fields, state_dict = _load(path)
            config, flat = from_community(fields, state_dict)
        except OSError:
            raise
        except Exception as error:  # torch.load raises various exceptions
            raise ValueError(f"{path}: {error}") from error
        if find_spec("memory_caching") is None:
            report(f"{PACKAGE} is not installed: outputs were not compared")
            return ModuleWeights(config, flat, "torch")
        distance = relative_rms(_ours(config, flat), _theirs(fields, state_dict))
        if not distance < TOLERANCE:
            raise ValueError(
                f"{path}: not converted: outputs differ from those of {PACKAGE} by {distance:.1e} "
                f"(relative RMS, float64), allowed is {TOLERANCE:.0e}"
            )
        report(f"outputs of {PACKAGE} differ by {distance:.1e}")
        return ModuleWeights(config, flat, "torch")

    return Format("community", "torch", read, _write)


def _write(path: Path, config: Config, flat: Flat) -> None:
    del config, flat
    raise ValueError(f"{path}: the format of {PACKAGE} can only be read")


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    keys = ("config", "state_dict")
    check_keys("file", loaded, keys, keys)
    tensors = loaded["state_dict"]
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError("file: state_dict must hold only tensors")
    return loaded["config"], strip_prefixes(tensors, path, PARAMETERS.__contains__)


def _batch(d_model: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((BATCH, TOKENS, d_model)))


def _ours(config: MCConfig, flat: Flat) -> np.ndarray:
    config = dataclasses.replace(config, segment_size=min(config.segment_size, SEGMENT))
    layer = MemoryCachingLayer(config, device="cpu", dtype=torch.float64)
    load_torch(layer, {name: array.astype(np.float64) for name, array in flat.items()})
    with torch.no_grad():
        return layer(_batch(config.d_model)).numpy()


def _theirs(fields: dict[str, Any], state_dict: Mapping[str, torch.Tensor]) -> np.ndarray:
    import memory_caching as theirs

    swla = theirs.SWLAConfig(**fields["swla"])
    shared = {name: fields[name] for name in SAME}
    config = theirs.MCConfig(**shared, backend=fields["backend"], swla=swla)
    linear = fields["backend"] == "linear"
    layer = theirs.MemoryCachingLayer(
        config=config,
        backend=theirs.LinearMemoryBackend() if linear else theirs.SWLABackend(swla),
    ).double()
    layer.load_state_dict({name: tensor.double() for name, tensor in state_dict.items()})
    with torch.no_grad():
        x = _batch(config.d_model)
        return layer(x, segment_size=min(config.segment_size, SEGMENT)).numpy()
