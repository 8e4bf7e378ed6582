"""Costs counted in compiled programs, and `mc plan`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mc_core.chips import CHIPS
from mc_core.errors import UserError
from train.cli.planning import plan
from train.config import load_config
from train.planning.costs import StepCosts
from train.planning.hlo import in_loops, measure, parse, varying_axes
from train.planning.plan import estimate

CONFIG = """
data: {corpus: stdlib, window: 32}
model:
  vocab_size: 256
  num_layers: 5
  layer:
    d_model: 16
    num_heads: 2
    memory: {kind: linear}
    aggregation: grm
    segment_size: 4
    chunk_size: 4
    state_init_mode: restart
run: {steps: 200, batch_size: 8}
"""


def run_plan(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `mc plan` in a process of its own, in which JAX has not started."""
    command = [sys.executable, "-m", "train", "plan", str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def test_loop_bodies_count_once_per_iteration():
    def power(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, 7)[0]

    costs = measure(parse(jax.jit(power).lower(jnp.ones((8, 8))).compile().as_text()))
    assert costs.flops == 7 * 2 * 8**3
    assert costs.bytes >= 7 * 3 * 8 * 8 * 4
    assert not costs.collectives


HLO = """HloModule jit_step, num_partitions=8

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %r)
}

%cond (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[4,8], b: bf16[8,16]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %d = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = f32[8,8]{1,0} all-gather(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %s = f32[2,8]{1,0} reduce-scatter(%a), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %k = f32[4,8]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  %z = s32[] constant(0)
  %t = (s32[], f32[4,8]{1,0}) tuple(%z, %a)
  %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %o = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_collectives_are_counted_by_kind_axes_and_iterations():
    costs = measure(parse(HLO))
    sizes = {"data": 2, "heads": 4}
    found = {c.kind: (c.sent, varying_axes(c.groups, sizes), c.times) for c in costs.collectives}
    assert found == {
        "all-gather": (128, ("data",), 1),
        "reduce-scatter": (64, ("data",), 1),
        "collective-permute": (128, ("heads",), 1),
        "all-reduce": (2 * 128 * 3 / 4, ("heads",), 5),
    }
    assert [c.kind for c in in_loops(costs)] == ["all-reduce"]
    assert costs.flops == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("mesh['a'=8] {'a':(2)2}", ("heads",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("{}", ("data", "heads")),
    ],
)
def test_forms_of_device_groups(groups, axes):
    text = HLO.replace("[2,4]<=[8]", groups)
    (reduce,) = (c for c in measure(parse(text)).collectives if c.kind == "all-reduce")
    assert varying_axes(reduce.groups, {"data": 2, "heads": 4}) == axes


def test_bound_is_the_slowest_resource():
    chip, sizes = CHIPS["h100"], {"data": 8, "heads": 8}
    sent = {("heads",): 45e9, ("data",): 5e9}
    costs = StepCosts(1, 1, 1, 989.4e12, 3.35e12, sent, extrapolated=False)
    times = estimate(costs, sizes, chip)
    # Heads share a domain of 8; devices along data are in different ones.
    assert times == pytest.approx({"products": 1, "memory": 1, "network": 45e9 / 450e9 + 5 / 50})


def test_every_figure_of_a_chip_has_a_source():
    for chip in CHIPS.values():
        figures = vars(chip).keys() - {"description", "sources", "kinds"}
        assert chip.sources.keys() == figures
        assert all(source.startswith("https://") for source in chip.sources.values())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "run.mesh.data = 3: must be a divisor of run.batch_size = 8"),
        ("rows=2", "--mesh rows=2: must have the form data=2"),
        ("data=-1", "--mesh data=-1: all sizes must be >= 1, without -1"),
    ],
)
def test_meshes_that_cannot_be_planned_are_refused(config, mesh, message):
    with pytest.raises(UserError) as error:
        plan(config, mesh=[mesh])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("context", "words", "message"),
    [
        (3, [], "run.mesh.context = 3: must be a divisor of data.window / segment_size = 8"),
        (
            2,
            ["model.layer.state_init_mode=checkpoint", "model.layer.memory.kind=titans"],
            "run.mesh.context = 2: must be 1 for state_init_mode = 'checkpoint' of a titans memory",
        ),
        (
            2,
            ["model.mixers=[log_linear,memory]"],
            "run.mesh.context = 2: must be 1 for the mixer 'log_linear'",
        ),
    ],
)
def test_runs_whose_tokens_cannot_be_split_are_refused(config, context, words, message):
    with pytest.raises(UserError) as error:
        load_config(config, [*words, f"run.mesh.context={context}"])
    assert message in str(error.value)


@pytest.mark.slow
def test_errors_are_one_line(config):
    done = run_plan(config, "--mesh", "context=3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_plan_of_a_tiny_model_on_eight_devices(config, tmp_path):
    """Parameters are divided by fsdp; extrapolated FLOPs are those of all five blocks."""
    files = tmp_path / "plan.json", tmp_path / "exact.json"
    meshes = ["--mesh", "data=8", "--mesh", "data=2,fsdp=2,heads=2", "--mesh", "context=4"]
    assert not run_plan(config, *meshes, "--json", str(files[0])).returncode
    table = json.loads(files[0].read_text())
    rows = {row["per device"]: row for row in table["rows"]}
    # Axes of later meshes, too, precede the times.
    sent = [number for number, name in enumerate(rows) if name.startswith("sent over")]
    assert len(sent) > 2
    assert sent == list(range(sent[0], list(rows).index("products ms*")))
    assert list(rows)[-1].startswith("bound")
    assert re.match(r"0\.\d+M parameters, 5 blocks of ", table["notes"][0])
    assert rows["devices"]["data=2,fsdp=2,heads=2"] == 8
    parameters = rows["parameters GiB"]
    assert parameters["data=8"] == parameters["context=4"]
    embedding = 256 * 16 * 4 / 2**30  # divided by fsdp; projections are divided by heads, too
    assert parameters["data=2,fsdp=2,heads=2"] == pytest.approx(
        embedding / 2 + (parameters["data=8"] - embedding) / 4, rel=0.03
    )
    assert rows["optimizer GiB"]["data=8"] == pytest.approx(2 * parameters["data=8"], rel=1e-3)
    flops = rows["TFLOP*"]
    assert flops["context=4"] == pytest.approx(2 * flops["data=8"], rel=0.02)
    assert rows["sent over data, GB*"]["data=8"] == pytest.approx(
        2 * 7 / 8 * parameters["data=8"] * 2**30 / 1e9, rel=0.02
    )
    three = [*meshes[:2], "model.num_layers=3", "--json", str(files[1])]
    assert not run_plan(config, *three).returncode
    exact = {row["per device"]: row for row in json.loads(files[1].read_text())["rows"]}
    assert exact["TFLOP"]["data=8"] < flops["data=8"] < 5 / 3 * exact["TFLOP"]["data=8"]
