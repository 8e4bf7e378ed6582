"""The picture of `mc demo`: recall, the gates of one head, and the bytes of the state."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mc_core import Plan
from mc_core.files import to_png

COLORS = ("C7", "C0", "C1")


class Score(NamedTuple):
    """Recall and size of a model."""

    name: str
    cells: tuple[tuple[int, float], ...]  # (tokens, share of needles found); empty if not trained
    state_bytes: int  # of a stream's cache after `state_tokens` tokens
    state_tokens: int


class Router(NamedTuple):
    """Gates of one head on one example."""

    gates: np.ndarray  # [t, n + 1], the online memory last
    plan: Plan
    needle: tuple[int, ...]  # segments that contain the needle's value
    answer: int  # first token of the answer
    weight: float  # mean weight of the answer's tokens on these segments
    block: int
    head: int


def draw_demo(scores: Sequence[Score], router: Router) -> bytes:
    """Return the picture as PNG."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.0, 2.1, 0.9))
    _draw_recall(axes[0], [score for score in scores if score.cells])
    _draw_router(axes[1], router)
    _draw_bytes(axes[2], scores)
    return to_png(figure, dpi=130)


def _draw_recall(axes: Axes, scores: Sequence[Score]) -> None:
    width = 0.8 / len(scores)
    for number, score in enumerate(scores):
        places = np.arange(len(score.cells)) + (number - (len(scores) - 1) / 2) * width
        shares = [100 * share for _, share in score.cells]
        bars = axes.bar(places, shares, width, color=COLORS[number], label=score.name)
        axes.bar_label(bars, fmt="%.0f%%", padding=2)
    lengths = [f"{tokens} bytes" for tokens, _ in scores[0].cells]
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_ylim(0, 130)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel("needles found, %")
    axes.set_title("recall", fontsize="medium")
    axes.legend(fontsize="small", loc="upper center", frameon=False)


def _draw_router(axes: Axes, router: Router) -> None:
    tokens, memories = router.gates.shape
    image = axes.imshow(
        router.gates.T, aspect="auto", origin="lower", vmin=0, vmax=1, interpolation="nearest"
    )
    for border in router.plan.ends[:-1]:
        axes.axvline(border - 0.5, color="white", linewidth=0.5)
    first, last = router.needle[0], router.needle[-1]
    start = router.plan.ends[first]
    box = Rectangle((start - 0.5, first - 0.5), tokens - start, 1 + last - first, fill=False)
    box.set(edgecolor="red", linewidth=1.5)
    axes.add_patch(box)
    axes.axvline(router.answer - 0.5, color="red", linewidth=1.0, linestyle=":")
    axes.set_yticks(range(memories), [*map(str, range(memories - 1)), "online"], fontsize="small")
    axes.set_ylabel("cached segment")
    axes.set_xlabel("token")
    axes.set_title(
        f"gates of layer {router.block}, head {router.head}; red: the needle's number, the answer",
        fontsize="medium",
    )
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def _draw_bytes(axes: Axes, scores: Sequence[Score]) -> None:
    sizes = [score.state_bytes / 1000 for score in scores]
    bars = axes.barh(range(len(scores)), sizes, color=COLORS[: len(scores)])
    axes.bar_label(bars, fmt="%.0f kB", padding=2)
    axes.set_yticks([])
    for place, score in enumerate(scores):
        axes.text(0, place + 0.42, score.name, fontsize="small", va="bottom")
    axes.set_xlim(0, 1.35 * max(sizes))
    axes.set_ylim(-0.6, len(scores) - 0.2)
    axes.set_xticks([])
    axes.set_title(f"state after {scores[0].state_tokens} tokens", fontsize="medium")
