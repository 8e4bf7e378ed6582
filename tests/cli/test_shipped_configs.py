"""Shipped configurations: names, their list, and every CONFIG argument."""

from pathlib import Path

import click
import pytest
import typer

from helpers.tiny_run import fails, mc
from mc_core.errors import UserError
from train.cli.app import app
from train.config import load_config
from train.shipped_configs import FOLDER, describe, find_config, first_sentence, shipped_names
from train.sweeps.sweep_config import load_sweep, make_runs

NAMES = shipped_names()


def leaves(command, *names):
    """Yield every command below a group, with its words."""
    if not hasattr(command, "commands"):
        yield names, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, *names, name)


CONFIG_COMMANDS = {
    names: parameter
    for names, command in leaves(typer.main.get_command(app))
    for parameter in command.params
    if parameter.name == "config"
}


def test_names_are_the_files_of_the_folder():
    assert {FOLDER / f"{name}.yaml" for name in NAMES} == set(FOLDER.rglob("*.yaml"))
    assert {"demo", "mqar/base", "niah/sweep"} <= set(NAMES)


def test_every_config_argument_takes_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names in (("train",), ("sweep",), ("bench", "memory"), ("parity", "train"), ("convert",)):
        assert names in CONFIG_COMMANDS
    for names, parameter in CONFIG_COMMANDS.items():
        context = click.Context(click.Command("mc"))
        found = parameter.process_value(context, "mqar/base")
        assert found == FOLDER / "mqar" / "base.yaml", names


def test_existing_file_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    assert find_config(Path("demo")) == FOLDER / "demo.yaml"
    (tmp_path / "mqar").mkdir()
    (tmp_path / "mqar" / "base").write_text("")
    assert find_config(Path("mqar/base")) == Path("mqar/base")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("demmo", "demo, demo_none"),
        ("configs/demo.yaml", "demo, demo_none"),
        ("base", "mqar/base, niah/base, text/base"),
        ("mqar/bse", "mqar/base, "),
        ("x" * 300, ""),
    ],
)
def test_unknown_name_lists_the_nearest(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_config(Path(name))
    assert str(error.value).startswith(f"{name}: No such file or directory, and no shipped config")
    listed = (
        str(error.value).partition("nearest names: ")[2].removesuffix(" (`mc configs` lists all)")
    )
    assert set(near.split(", ")) - {""} <= set(listed.split(", ")) <= set(NAMES)


@pytest.mark.parametrize(
    "words", [("train", "demmo"), ("sweep", "demmo"), ("bench", "model", "demmo")]
)
def test_unknown_name_is_a_usage_error(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    fails(tmp_path / "x", monkeypatch, capsys, "nearest names: demo, demo_none", *words)


def test_shipped_name_runs_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mc(monkeypatch, "bench", "memory", "demo_none", "--tokens", "1024") == 0
    assert "mc bench memory demo_none --tokens 1024" in capsys.readouterr().out
    assert load_config(find_config(Path("demo_none"))).run.directory == "runs/demo_none"
    assert load_sweep(find_config(Path("niah/sweep"))).directory == "runs/niah"


def test_configs_are_listed(monkeypatch, capsys):
    assert mc(monkeypatch, "configs") == 0
    rows = [line.split("│")[1:5] for line in capsys.readouterr().out.splitlines() if "│" in line]
    listed = {name.strip(): [cell.strip() for cell in rest] for name, *rest in rows}
    assert set(listed) == set(NAMES)  # a description that does not fit would wrap
    assert listed["demo_none"] == [
        "mc train", "text", "The demo without caching, the baseline for grm."
    ]  # fmt: skip
    assert listed["niah/sweep"][:2] == ["mc sweep", "niah"]


def test_listed_task_of_a_sweep_is_that_of_its_runs():
    (runs,) = {
        run.config.data.task
        for row in make_runs(load_sweep(FOLDER / "niah" / "evidence.yaml")).values()
        for run in row
    }
    assert describe("niah/evidence").task == runs


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One.\na: 1\n", "One."),
        ("# S-NIAH-1 in base.yaml,\n# 2.5 lines. Two.\n", "S-NIAH-1 in base.yaml, 2.5 lines."),
        ("# Why? Because.\n", "Why?"),
        ("# no end\n\n# other\n", "no end"),
        ("a: 1  # not at the start\n", ""),
    ],
)
def test_description_is_the_first_sentence(text, sentence):
    assert first_sentence(text) == sentence
