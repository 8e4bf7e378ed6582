"""Plots of a layer's trace, one panel per quantity, as PNG."""

from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mc_core import Plan
from mc_core.aggregations import AGGREGATIONS
from mc_core.files import to_png

WIDTH, LINES = 11.0, 1.5  # inches: of a picture, and the height of a panel of lines


def draw_layer(
    layer: dict[str, np.ndarray],
    plan: Plan,
    title: str,
    aggregation: str,
    needle: tuple[int, ...] = (),
) -> bytes:
    """Draw gates, their entropy, norms and inner losses of a layer, and the recall of its memories.

    Args:
        layer: fields of a `Trace` and `recall` by name, without the batch axis.
        plan: the segments.
        title: figure title.
        aggregation: aggregation of the model; sparse ones add a panel of selection frequencies.
        needle: segments to highlight.
    """
    heads, memories = layer["gates"].shape[1:]
    lines = {
        "entropy of\nthe gates (nats)": ("entropy",),
        "norm of\nthe memory": ("memory_norm",),
        "norm of\nthe momentum": ("momentum_norm",),
        "norm of\nthe update": ("update_norm",),
        "inner loss\n(dotted: before)": ("loss_after", "loss_before"),
    }
    lines = {label: names for label, names in lines.items() if names[0] in layer}
    counts = AGGREGATIONS[aggregation].sparse and memories > 2
    heights = [min(2.4, 0.4 + 0.14 * memories)] * heads + [LINES] * (len(lines) + 1 + counts)
    figure = Figure(figsize=(WIDTH, 0.6 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    panels: list[Axes] = list(grid[:, 0])
    by_token = panels[: heads + len(lines)]
    for axes in by_token[1:]:
        axes.sharex(by_token[0])
    draw_gates(by_token[:heads], layer["gates"], plan)
    for axes, segment in product(by_token[:heads], needle):
        axes.axhspan(segment - 0.5, segment + 0.5, fill=False, color="red")
    for axes, (label, names) in zip(by_token[heads:], lines.items(), strict=True):
        for name, style in zip(names, ("-", ":"), strict=False):
            for head, values in enumerate(layer[name].T):
                axes.plot(values, style, color=f"C{head % 10}", linewidth=0.9, label=f"head {head}")
        _mark_segments(axes, plan, "0.8")
        axes.set_ylabel(label, fontsize="small")
    if heads <= 10:
        by_token[heads].legend(ncols=heads, fontsize="x-small", loc="upper left")
    by_token[-1].set_xlabel("token")
    recall = panels[heads + len(lines)]
    draw_bars(recall, layer["recall"])
    recall.set_ylabel("recall of the\nsegment's memory", fontsize="small")
    if counts:
        draw_selections(panels[-1], layer["read_count"], plan)
    figure.suptitle(f"{title}: gate weights of each token, per head")
    return to_png(figure, dpi=110)


def draw_gates(panels: list[Axes], gates: np.ndarray, plan: Plan) -> None:
    """Draw gates [t, h, n + 1] as one heat map per head, with the online memory on top."""
    memories = gates.shape[-1]
    # Square-root color scale: with many memories, most weights are small.
    highest = float(np.max(gates, initial=1.0, where=np.isfinite(gates)))
    scale = PowerNorm(0.5, vmin=0.0, vmax=highest)
    step = -(-(memories - 1) // 8)
    ticks = [*range(0, memories - 1, step), memories - 1]
    names = [*(plan.memory_names[i] for i in ticks[:-1]), "online"]
    for head, axes in enumerate(panels):
        image = axes.imshow(
            gates[:, head].T, aspect="auto", origin="lower", norm=scale, interpolation="nearest"
        )
        _mark_segments(axes, plan, "white")
        axes.set_ylabel(f"head {head}")
        axes.set_yticks(ticks, names, fontsize="x-small")
    panels[0].figure.colorbar(image, ax=panels, pad=0.01)


def draw_selections(axes: Axes, counts: np.ndarray, plan: Plan) -> None:
    """Draw the share of the possible readers that select each memory, from counts [n, h]."""
    read = plan.readers > 0
    draw_bars(axes, counts[read] / plan.readers[read, None])
    axes.set_ylabel("share of later tokens\nthat select the memory", fontsize="small")
    axes.set_ylim(0, 1)
    if plan.has_buckets:
        axes.set_xlabel("exponent of the bucket")


def draw_bars(axes: Axes, values: np.ndarray) -> None:
    """Draw values [n, h] as one group of bars per segment, with one bar per head."""
    segments, heads = values.shape
    for head in range(heads):
        shift = (head + 0.5) / heads - 0.5
        place = np.arange(segments) + 0.8 * shift
        axes.bar(place, values[:, head], 0.8 / heads, color=f"C{head % 10}")
    axes.set_xlabel("segment")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_segments(axes: Axes, plan: Plan, color: str) -> None:
    for border in plan.ends[:-1]:
        axes.axvline(border - 0.5, color=color, linewidth=0.5)
