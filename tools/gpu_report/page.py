"""The report: one JSON and one Markdown file, written after every step."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.gpu_report.steps import ReportStep, Settings, StepOutcome


class Report:
    """Outcomes of the steps, written as `report.json` and `report.md` whenever one is added.

    Args:
        out: folder of the report.
        steps: the steps in the order of the report.
        settings: how they run.
        machine: hardware and software versions.
    """

    def __init__(
        self, out: Path, steps: Iterable[ReportStep], settings: Settings, machine: dict[str, Any]
    ):
        self.outcomes: dict[str, StepOutcome] = {}
        self._out, self._steps, self._settings = out, list(steps), settings
        self._machine = machine

    def add(self, step: ReportStep, outcome: StepOutcome) -> None:
        """Add the outcome of a step, print it and write the report."""
        self.outcomes[step.name] = outcome
        print(f"{outcome.status:9} {step.name} {outcome.seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Write both files."""
        device = self._machine.get("device", "an unknown machine")
        about = ", ".join(f"{name} {value}" for name, value in self._machine.items())
        known = [step for step in self._steps if step.name in self.outcomes]
        overview = ["| step | outcome | seconds |", "| --- | --- | ---: |"]
        sections, steps = [], {}
        for step in known:
            outcome = self.outcomes[step.name]
            overview.append(f"| {step.title} | {outcome.status} | {outcome.seconds:.0f} |")
            steps[step.name], text = self._section(step, outcome)
            sections += [f"## {step.title}", "", text]
        tiny = "small sizes, which only test the report; " if self._settings.tiny else ""
        head = [f"# Measured on {device}", "", f"`make gpu-report`; {tiny}{about}.", ""]
        data = {"machine": self._machine, "steps": steps}
        _write(self._out / "report.json", json.dumps(data, indent=1) + "\n")
        _write(self._out / "report.md", "\n".join([*head, *overview, "", *sections]))

    def _section(self, step: ReportStep, outcome: StepOutcome) -> tuple[dict[str, Any], str]:
        """Return the entry of a step in the JSON file, and its Markdown."""
        command = " ".join((step.tiny if self._settings.tiny else step.command).split())
        entry: dict[str, Any] = {"title": step.title, "command": f"mc {command}"} | asdict(outcome)
        entry["seconds"] = round(outcome.seconds, 1)
        lines = []
        if outcome.status != "done":
            reason = f": {outcome.reason}" if outcome.reason else ""
            lines = [f"`mc {command}`: {outcome.status} after {outcome.seconds:.0f} s{reason}.", ""]
        result, page = (self._settings.folder / f"{step.name}.{x}" for x in ("json", "md"))
        if step.trains:
            entry["result"] = curve = read_curve(self._settings.folder / step.name)
            lines += [f"`mc {command}`", "", *_curve_table(curve)]
        elif page.exists():
            written = f" --json {result} --markdown {page}"
            entry["result"] = _without_leaves(json.loads(result.read_text().replace(written, "")))
            lines.append(page.read_text().replace("## ", "### ", 1).replace(written, ""))
        return entry, "\n".join(lines)


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Return the validation rows of a run, with the speed of the last row of training."""
    rows, speed, loss = [], None, None
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # incomplete: the run was stopped
            continue
        speed, loss = row.get("tokens_per_second", speed), row.get("loss", loss)
        names = [name for name in row if name.startswith("validation")]
        if names:
            rows.append({"step": row["step"]} | {name: row[name] for name in names})
    if rows or loss is not None:
        rows.append({"loss": loss, "tokens_per_second": speed})
    return rows


def _curve_table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ["No step was logged.", ""]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    table = [names, ["---:"] * len(names), *cells]
    return [*(f"| {' | '.join(row)} |" for row in table), ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _without_leaves(result: dict[str, Any]) -> dict[str, Any]:
    """Drop the entries of single arrays from results of the parity command."""
    if "cases" not in result:
        return result
    keys = ("name", "dtype", "ok")
    cases = [{key: case[key] for key in keys if key in case} for case in result["cases"]]
    return result | {"cases": cases}


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
