"""The table of a sweep."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from mc_core.tables import ResultTable, Row
from parity.environment import result_table
from train.evaluation.score import wilson
from train.sweeps import bits_per_byte
from train.sweeps.labels import label
from train.sweeps.recorded import Recorded
from train.sweeps.results import RunResult, is_text, made_with, without_state
from train.sweeps.sweep_config import SweepConfig

RULE = (
    "rate: of those tried with the first seed, the one with the best validation accuracy "
    "(ties: the lower loss, then the lower rate)"
)
MEASURE = (
    "accuracy: all test cells and seeds together, with Wilson's 95% interval for independent "
    "questions; lowest and highest: over the seeds"
)


def by_row(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Group results by row, in order."""
    rows: dict[str, list[RunResult]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    return rows


def score(results: Sequence[RunResult]) -> dict[str, float]:
    """Return the accuracy over all test cells of several runs, with its interval."""
    cells = [cell for result in results for cell in result["test"]]
    right, asked = (sum(cell[name] for cell in cells) for name in ("right", "asked"))
    low, high = wilson(int(right), int(asked))
    return {"accuracy": right / asked, "low": low, "high": high}


def make_table(
    title: str,
    results: Sequence[RunResult],
    config: SweepConfig,
    *,
    recorded: Recorded | None = None,
    cells: bool = True,
) -> ResultTable:
    """Return a table with rate, size and accuracy of each row.

    With `recorded`, the table also has the recorded accuracy; with `cells`, also the range over the
    seeds and the accuracy of each test cell. For text, see `bits_per_byte.make_table`.
    """
    if any(map(is_text, results)):
        return bits_per_byte.make_table(title, by_row(results), config, cells=cells)
    own = by_row(results)
    flops = flops_column([rows[0] for rows in own.values()])
    recorded_rows = {} if recorded is None else recorded.rows
    rows = [
        _line(name, own[name], flops.get(name, {}), recorded_rows.get(name), cells) for name in own
    ]
    tokens = max((result["state_tokens"] for result in results), default=0)
    rates = "the base's" if config.rates is None else ", ".join(f"{x:g}" for x in config.rates)
    seeds = ", ".join(map(str, config.seeds))
    notes = [RULE, f"rates tried: {rates}; seeds: {seeds}", MEASURE]
    state = f"state: bytes of a stream's cache after {tokens} tokens, all layers"
    notes.append(state + without_state(results))
    notes.append(
        f"kFLOP, MFLOP: per token, matrix products of the forward pass, averaged over {tokens} "
        "tokens"
    )
    notes.append(f"runs: {made_with(results)}")
    return result_table(title, rows, [*notes, *(recorded.notes if recorded else ())])


def flops_column(results: Sequence[RunResult]) -> dict[str, Row]:
    """Return the FLOPs per token of each row, in a common unit."""
    flops = {row["row"]: row["flops_per_token"] for row in results if "flops_per_token" in row}
    mega = max(flops.values(), default=0.0) >= 1e6
    unit, name = (1e6, "MFLOP") if mega else (1e3, "kFLOP")
    return {row: {name: count / unit} for row, count in flops.items()}


def _line(
    name: str, own: list[RunResult], flops: Row, recorded_rows: list[RunResult] | None, cells: bool
) -> Row:
    good = [result for result in own if not result.get("error")]
    row: Row = {
        "row": name if cells else label(own[0]),
        "rate": f"{own[0]['rate']:g}",
        "seeds": len(good) if cells else None,
        "parameters": good[0]["parameters"] if cells and good else None,
        "state": own[0]["state_bytes"],
        **flops,
        **_figures(good, cells),
        "recorded %": 100 * score(recorded_rows)["accuracy"] if recorded_rows else None,
        "failed": len(own) - len(good) or None,
    }
    for number, cell in enumerate(good[0]["test"] if cells and good else ()):
        same = [result["test"][number] for result in good]
        right, asked = (sum(one[key] for one in same) for key in ("right", "asked"))
        size = ":".join(str(cell[key]) for key in ("tokens", "pairs") if key in cell)
        row[size] = 100 * right / asked
    return row | {"s": sum(result["seconds"] for result in good) / len(good) if good else None}


def _figures(good: list[RunResult], cells: bool) -> Row:
    """Return the accuracy of the runs of a row, and its range over the seeds."""
    whole = score(good) if good else {}
    each = [100 * score([result])["accuracy"] for result in good]
    spread = cells and len(each) > 1
    return {
        "accuracy %": 100 * whole["accuracy"] if good else None,
        "from %": 100 * whole["low"] if good else None,
        "to %": 100 * whole["high"] if good else None,
        "lowest %": min(each) if spread else None,
        "highest %": max(each) if spread else None,
    }


def for_terminal(report: ResultTable) -> Table:
    """Return a table for terminals of 80 columns; the first column is never truncated."""
    made = report.table()
    made.box, made.show_edge, made.pad_edge, made.collapse_padding = SIMPLE, False, False, True
    words = [word for row in report.rows for word in row["row"].split()]
    made.columns[0].min_width = max(map(len, words), default=0)
    for column in made.columns:
        column.header = str(column.header).replace(" ", "\n")
    return made
