"""`mc inspect`: gates, memory norms and inner losses of a trained model, token by token."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mc_core.errors import UserError
from mc_core.files import to_bytes, write_atomic
from train.evaluation.html_report import make_page
from train.evaluation.inspection_plots import draw_layer
from train.evaluation.traces import (
    COLUMNS,
    NEEDLE_COLUMNS,
    InspectedModel,
    Inspection,
    to_json,
    trace_text,
)

LIMIT = 4096  # tokens by default
ROWS = 32  # of a printed table


def inspect(
    source: InspectedModel,
    path: Path,
    console: Console,
    *,
    output: Path,
    json_file: Path | None = None,
    tokens: int | None = None,
    needle: str | None = None,
) -> Inspection:
    """Run a model on a text, and write plots, an HTML page and the numbers.

    Args:
        source: from `load_trained` or `make_untrained`.
        path: text file.
        console: receives a table and the paths of the files.
        output: folder of `inspect.html` and `layer-<i>.png`.
        json_file: output file of the numbers, or None.
        tokens: maximum number of tokens, from the start of the text; None = 4,096.
        needle: words of the text; report the gate weights of the segment that contains them.

    Raises:
        UserError: the model has no memory, or the text or the needle cannot be used.
        OSError: a file cannot be read or written.
    """
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens = {tokens}: must be >= 1")
    found = trace_text(source, path, tokens or LIMIT, needle)
    output.mkdir(parents=True, exist_ok=True)
    framed = found.needle.segments if found.needle else ()
    pictures = [
        draw_layer(layer, found.plan, f"layer {number}", found.config.aggregation, framed)
        for number, layer in zip(found.blocks, found.layers, strict=True)
    ]
    numbered = zip(found.blocks, pictures, strict=True)
    files = {f"layer-{number}.png": picture for number, picture in numbered}
    files["inspect.html"] = to_bytes(make_page(found, pictures))
    for name, content in files.items():
        write_atomic(output / name, content)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(to_json(found)) + "\n").encode())
    print_inspection(console, found)
    written = [output / "inspect.html", *([] if json_file is None else [json_file])]
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
    return found


def print_inspection(console: Console, found: Inspection) -> None:
    """Print the values of each head, one row per head, and the gates' weight on the needle."""

    def print_line(words: str) -> None:
        console.print(words, soft_wrap=True, highlight=False)

    def show(names: tuple[str, ...], rows: list[list[str]]) -> None:
        table = Table("layer", "head", *names, box=None, collapse_padding=True, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for row in rows[:ROWS]:
            table.add_row(*row)
        console.print(table)
        if len(rows) > ROWS:
            print_line(f"{len(rows) - ROWS} more rows: see the page")

    print_line(f"{found.summary}; means over tokens, recall over segments")
    show(COLUMNS, found.rows)
    if (needle := found.needle) is not None:
        print_line(f"weight on the needle's {needle.where}; {needle.uniform_summary}")
        show(NEEDLE_COLUMNS, found.needle_rows)
        print_line(needle.verdict)
