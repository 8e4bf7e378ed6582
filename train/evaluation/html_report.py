"""Self-contained HTML page of an inspection: plots, tables and the text."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

import numpy as np

from train.evaluation.traces import COLUMNS, NEEDLE_COLUMNS, Inspection

# The policy forbids loading any resource.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
 margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
img {{ max-width: 100% }}
.text {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; word-break: break-all }}
.end {{ color: #888; font-size: 10px; border: 1px solid #bbb; padding: 0 .2em; margin: 0 .2em }}
.needle {{ outline: 2px solid #c00 }}
</style>
</head>
<body>
"""


def make_page(found: Inspection, pictures: Sequence[bytes]) -> str:
    """Return the page.

    Args:
        found: the inspection.
        pictures: one PNG per layer.
    """
    parts = [HEAD.format(title=escape(f"{found.run}: inside")), f"<h1>{escape(found.run)}</h1>"]
    parts.append(f"<p>{escape(found.summary)}.</p>")
    if found.needle is not None:
        words = (
            f"{found.needle.words!r} is in {found.needle.where}; {found.needle.uniform_summary}."
        )
        parts += ["<h2>The needle</h2>", f"<p>{escape(words)}</p>"]
        parts.append(f"<p><strong>{escape(found.needle.verdict)}</strong></p>")
        parts.append(_table(NEEDLE_COLUMNS, found.needle_rows))
    parts.append("<h2>Heads</h2>")
    parts.append(
        "<p>Means over tokens. Entropy: of the gates, in nats; cached: the share of the gates on "
        "cached memories; W, S: memory and momentum, Frobenius norms; ΔW: a token's update; loss: "
        "the memory's inner loss of the token, before and after its write. Recall: the share of a "
        "segment's inner loss that its writes removed, mean over all segments but the last one, "
        "which no token reads from the cache; 1 is a perfect read, 0 means that nothing was "
        "stored. Dead: the memory stays at its start, or has decayed to zero.</p>"
    )
    parts.append(_table(COLUMNS, found.rows))
    for number, picture in zip(found.blocks, pictures, strict=False):
        data = b64encode(picture).decode()
        parts.append(f"<h2>Layer {number}</h2>")
        parts.append(f'<img alt="layer {number}" src="data:image/png;base64,{data}">')
    parts.append("<h2>The text</h2>")
    parts.append(
        "<p>The darker a token, the larger the share of its gates on cached memories, mean over "
        "layers and heads; hover for the memory with the largest weight in each layer. A box "
        "ends each segment.</p>"
    )
    parts.append(f'<div class="text">{_text(found)}</div>\n</body>\n</html>\n')
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n{line('th', ('layer', 'head', *names))}\n{body}\n</table>"


def _text(found: Inspection) -> str:
    gates = np.stack([layer["gates"] for layer in found.layers])
    share = (gates / gates.sum(-1, keepdims=True)).mean(2)  # [layers, t, n + 1]
    cached = np.nan_to_num(share[..., :-1].sum(-1).mean(0))
    most, weight = share.argmax(-1), share.max(-1)
    names = (*found.plan.memory_names, "online")
    needle = found.needle.tokens if found.needle else ()
    ends = dict(zip(np.cumsum(found.lengths) - 1, range(len(found.lengths)), strict=True))
    parts = []
    for token, piece in enumerate(found.text.pieces):
        words = "; ".join(
            f"layer {layer}: {names[index]} {value:.2f}"
            for layer, index, value in zip(
                found.blocks, most[:, token], weight[:, token], strict=True
            )
        )
        marked = ' class="needle"' if token in needle else ""
        parts.append(
            f'<span{marked} style="background:rgba(230,140,0,{cached[token]:.2f})" '
            f'title="token {token}; {words}">{escape(piece)}</span>'
        )
        if token in ends:
            parts.append(f'<span class="end">{ends[token]}</span>')
    return "".join(parts)
