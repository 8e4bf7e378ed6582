"""`mc bench`: counts, timings and outputs; no test depends on speed."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench import jax_layers, layer, memory, peers, scaling
from bench.ceilings import Ceilings
from bench.count import count_flops
from bench.timing import Subject, Timing, alternate, ratio
from helpers.tiny_run import mc, write_config
from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_core.errors import UserError
from mc_core.tables import ResultTable, cell, counted
from mc_jax import MemoryCachingLayer
from mc_jax.sharding import axes_sharding, make_mesh, split_rows
from parity.environment import SETTINGS

MEMORIES = {
    "linear": LinearConfig(),
    "normalized": LinearConfig(normalize=True, feature_map="elu+1"),
    "swla": SWLAConfig(),
    "dla": DLAConfig(expansion=2),
    "titans": TitansConfig(expansion=2, depth=3),
}


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Collecting takes longer than the tiny subjects, and nothing here depends on it."""
    monkeypatch.setattr("bench.timing.gc.collect", lambda: None)


def layer_of(memory, aggregation):
    config = MCConfig(8, 2, memory=memory, aggregation=aggregation, segment_size=8, chunk_size=4)
    return MemoryCachingLayer(config, rngs=nnx.Rngs(0))


@functools.cache
def flops(kind, aggregation, tokens, backward=True):
    """Count a layer's products, forward and backward; nothing is compiled."""
    graphdef, params = nnx.split(layer_of(MEMORIES[kind], aggregation))

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    def both(params, x):
        y, pull = jax.vjp(forward, params, x)
        return pull(y)

    return count_flops(both if backward else forward, params, jnp.ones((1, tokens, 8)))


class Clock:
    """A clock that only work moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(f"bench.timing.time.{name}", lambda: self.now)

    def work(self, *seconds):
        """Return a function that takes `seconds[i]` in call i."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_subjects_alternate_after_warmup(monkeypatch):
    """Compilation and warm-up are not timed; fast subjects have an untimed run in every turn."""
    clock, calls = Clock(monkeypatch), []
    works = {"a": clock.work(50, 0.9, 0.7, 0.5, 0.7, 0.5), "b": clock.work(60, 1.5, 2.0, 3.0)}
    subjects = {name: lambda name=name: (calls.append(name), works[name]()) for name in works}
    times = alternate(subjects, runs=2, warmup=2)
    assert "".join(calls) == "abab" + "aab" * 2
    for seconds in (times["a"].seconds, times["a"].processor):
        assert seconds == pytest.approx((0.5, 0.5))
    assert times["b"].seconds == pytest.approx((2.0, 3.0))


def test_ratio_is_the_median_over_turns():
    slow = Timing(seconds=(4.0, 40.0, 6.0), processor=(2.0, 2.0, 2.0))
    fast = Timing(seconds=(2.0, 10.0, 6.0), processor=(1.0, 0.5, 1.0))
    assert ratio(slow, fast) == (2.0, 2.0)
    assert slow.median == 6.0


def test_scan_counts_every_iteration():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5

    def loop(a, b):
        step = jax.checkpoint(lambda carry, _: (carry + jnp.sum(a @ b), None))
        return jax.lax.scan(step, 0.0, None, length=7)[0]

    assert count_flops(jax.jit(loop), a, b) == 7 * 2 * 3 * 4 * 5


def test_more_expensive_branch_counts():
    a = jnp.ones((4, 4))
    chosen = lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)  # noqa: E731
    assert count_flops(chosen, a) == 2 * 2 * 4**3


# FLOPs for 64 tokens in 8 segments, forward and backward. Update these values if a change lowers
# them; a change that raises them must give a reason in its commit.
OPERATIONS = {
    ("linear", "grm"): 269_824,
    ("linear", "soup"): 269_824,
    ("linear", "ssc"): 333_824,
    ("swla", "grm"): 321_280,
    ("swla", "soup"): 321_280,
    ("swla", "ssc"): 385_280,
    ("dla", "grm"): 641_536,
    ("dla", "soup"): 641_536,
    ("dla", "ssc"): 991_232,
    ("titans", "grm"): 1_394_176,
    ("titans", "soup"): 1_401_344,
    ("titans", "ssc"): 2_169_856,
}


@pytest.mark.parametrize(
    "case",
    [  # Every second pair of kind and aggregation is a slow test.
        pytest.param(case, marks=pytest.mark.slow if (i + i // 3) % 2 else ())
        for i, case in enumerate(OPERATIONS)
    ],
    ids="+".join,
)
def test_operations_do_not_increase(case):
    assert flops(*case, 64) <= OPERATIONS[case]


@pytest.mark.parametrize("kind", ["linear", pytest.param("titans", marks=pytest.mark.slow)])
def test_ssc_operations_are_linear_in_tokens(kind):
    """Without the scores, which are one product of width k per pair and have no gradient."""
    scores = lambda t: 2 * 2 * t * (t // 8) * 4  # noqa: E731  flops, heads, pairs, k
    long, short = (flops(kind, "ssc", t) - scores(t) for t in (1024, 512))
    assert long / short < 2.05


@pytest.mark.parametrize("kind", ["dla", "titans"])
@pytest.mark.parametrize("aggregation", ["grm", "soup"])
def test_dense_reads_take_half_of_all_pairs(kind, aggregation):
    n, t, h, k = 16, 128, 2, 4
    widths = [k, *[2 * k] * (MEMORIES[kind].depth - 1), k]
    one = sum(2 * into * out for into, out in itertools.pairwise(widths))
    square = t * n * h * one
    connector, scores = 2 * t * 8 * 8, 2 * t * n * h * k
    gates = connector + scores
    dense = flops(kind, aggregation, t, False) - flops(kind, "none", t, False) - gates
    assert dense < 0.6 * square


def test_mlp_memory_is_larger_than_kv_below_four_head_widths():
    """An MLP of expansion 4 has 4k/S times the size of the keys and values of S tokens."""
    for segment, warned in ((128, True), (1024, False)):
        layer = MCConfig(1536, 16, memory=TitansConfig(), segment_size=segment)
        report = memory.run(ModelConfig(256, 24, layer), [1 << 20], "float32")
        assert report.rows[0]["cache / KV"] == pytest.approx(4 * 96 / segment, rel=0.02)
        assert any("outgrows" in note for note in report.notes) == warned


def test_exponents_are_fitted_in_logarithms():
    rows = [
        {"aggregation": "grm", "tokens": t, "processor ms": 3 * t**1.5, "GFLOP": t**2}
        for t in (1024, 2048, 8192)
    ]
    (found,) = scaling.exponents(rows).values()
    np.testing.assert_allclose(found, (1.5, 2.0))


def test_report_has_command_machine_and_empty_cells():
    rows = [{"name": "a|b", "ms": 1234.5, "none": None}, {"name": "c", "error": 0.00123}]
    report = ResultTable("Title", rows, ("a note",), {"cores": 2}, "mc bench layer")
    assert report.columns == ["name", "ms", "error"]
    assert report.as_markdown() == (
        "## Title\n\n`mc bench layer`\n\n| name | ms | error |\n| --- | ---: | ---: |\n"
        "| a\\|b | 1,234 |  |\n| c |  | 0.00123 |\n\na note.\ncores 2.\n"
    )
    assert json.loads(report.as_json())["rows"][0]["ms"] == 1234.5


def test_cells_of_a_table():
    values = (None, True, False, 7, 65_536, 99.96, 1234.5, 0.00123, "a")
    assert [cell(value) for value in values] == [
        *("", "yes", "NO", "7", "65,536", "100", "1,234", "0.00123", "a")
    ]


def test_counted_nouns_have_a_plural():
    numbers = (0, 1, 2, 1000)
    assert [counted(number, "document") for number in numbers] == [
        *("0 documents", "1 document", "2 documents", "1,000 documents")
    ]


def test_layer_command_writes_results(monkeypatch, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown")}
    options = ["--tokens", 8, "--segment", 4, "--width", 8, "--heads", 2, "--batch", 1, "--runs", 0]
    for name, path in files.items():
        options += [f"--{name}", path]
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert mc(monkeypatch, "bench", "layer", "--kind", "swla", *options) == 0
    written = json.loads(files["json"].read_text())
    assert written["command"].startswith("OMP_NUM_THREADS=1 mc bench layer --kind swla --tokens 8")
    (row,) = written["rows"]
    assert row["MiB"] > 0
    assert row["compile s"] > 0
    assert "swla+grm" in capsys.readouterr().out
    assert "| jax swla+grm t=8" in files["markdown"].read_text()


@pytest.mark.slow
def test_batch_split_over_devices_is_equal_work():
    """Outputs, gradients and FLOPs equal those of one device; each device has half of the rows."""
    config = MCConfig(8, 2, memory=TitansConfig(expansion=1), segment_size=4, chunk_size=2)
    one, two = peers._jax(config, 12, "mc_jax", (1, 2))
    assert (one.name, two.name) == ("mc_jax", "mc_jax, 2 devices")
    assert (one.devices, two.devices) == (1, 2)
    assert one.flops == two.flops
    y, _, x = two.run()
    for array in (y, x):
        assert [shard.data.shape for shard in array.addressable_shards] == [(1, 12, 8)] * 2
        assert len(array.devices()) == 2
    results = map(peers._output_and_input_gradient, (one, two))
    assert peers._distance(*results) < 1e-5


def test_bytes_are_summed_over_devices():
    held, x = jnp.ones((1, 256)), jnp.ones((4, 256))
    one = jax_layers.compiled_subject("", jnp.add, (held, x), 1)
    held = jax.device_put(held, axes_sharding(make_mesh(devices=jax.local_devices()[:2])))
    two = jax_layers.compiled_subject("", jnp.add, (held, split_rows(x, held)), 1)
    assert one.bytes == held.nbytes + 2 * x.nbytes
    assert two.bytes == 2 * held.nbytes + 2 * x.nbytes


def test_peers_are_compared_with_subjects_on_as_many_devices(monkeypatch):
    clock = Clock(monkeypatch)
    took = {"a": 8.0, "a, 2 devices": 4.0, "b": 12.0, "b, 2 devices": 5.0}
    subjects = [
        Subject(name, clock.work(seconds), 10, devices=2 if "2" in name else 1)
        for name, seconds in took.items()
    ]
    for relative, expected in ((True, (None, None, 1.5, 1.25)), (False, (None, 2, 2 / 3, 1.6))):
        comparison = peers.Comparison(lambda _: subjects, relative_time=relative)
        rows = peers.measure("", comparison, 2, (1, 2))
        column = "relative time" if relative else "times faster"
        assert [row.get(column) for row in rows] == [x and pytest.approx(x) for x in expected]


@pytest.mark.slow
def test_device_options_of_layers_and_models(monkeypatch, tmp_path, capsys):
    jax.devices()  # the command would request two devices, and there are eight
    options = ["--tokens", 8, "--segment", 4, "--width", 8, "--heads", 2, "--runs", 0]
    file = tmp_path / "out.json"
    words = ["--devices", 1, "--devices", 2, "--json", file]
    assert mc(monkeypatch, "bench", "layer", *options, *words) == 0
    written = json.loads(file.read_text())
    one, two = (row["layer"] for row in written["rows"])
    assert two == f"{one}, 2 devices"
    assert "MiB are summed over them" in written["notes"][-1]
    rates = []
    monkeypatch.setattr("bench.model.measure", lambda dtype: Ceilings(1e9, 1e9))
    for number in (1, 2):
        words = ["--mesh", f"data={number}", "--runs", 1, "--json", file]
        assert mc(monkeypatch, "bench", "model", write_config(tmp_path / str(number)), *words) == 0
        written = json.loads(file.read_text())
        rates.append(written["rows"][0]["GFLOP"])
        assert any("2 devices: the batch" in note for note in written["notes"]) == (number == 2)
    assert rates[0] == rates[1]
    capsys.readouterr()


def test_ceilings_per_device_count(monkeypatch):
    """A large product uses all cores of a CPU; rates of GPUs add up."""
    one = Ceilings(100.0, 10.0)
    assert one.of(2) == one
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert one.of(2) == Ceilings(200.0, 20.0)
    assert peers.default_devices() == (1,)


def test_ceilings_per_dtype(monkeypatch):
    rates = {"float32": Ceilings(1e9, 1e9), "bfloat16": Ceilings(4e9, 1e9)}
    monkeypatch.setattr("bench.layer.measure", lambda dtype: rates[dtype])
    both = {"dtypes": tuple(rates), "frameworks": ("jax", "torch"), "passes": ("forward",)}
    grid = layer.Grid(tokens=(8,), chunks=(4,), segments=(4,), width=8, heads=2, **both)
    report = layer.run(grid, 1)
    for row in report.rows:
        rate = next(of.matmul for dtype, of in rates.items() if dtype in row["layer"])
        assert row["floor ms"] == pytest.approx(1e12 * row["GFLOP"] / rate)
    assert "float32 1 GFLOP/s, 1.0 GB/s; bfloat16 4 GFLOP/s" in report.notes[0]


def test_scaling_command_writes_plot(monkeypatch, tmp_path):
    options = ["--tokens", 8, "--tokens", 16, "--segment", 4, "--width", 8, "--heads", 2]
    plot = tmp_path / "curves.png"
    words = ["bench", "scaling", "--aggregation", "none", "--runs", 1, "--plot", plot, *options]
    assert mc(monkeypatch, *words) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer", "--json", "nowhere/x.json"], "nowhere/x.json: its folder does not exist"),
        (["layer", "--markdown", "."], "Invalid value for '--markdown': file '.' is a directory."),
        (["layer", "--tokens", 0], "Invalid value for '--tokens'"),
        (["layer", "--width", 7, "--heads", 2], "d_model = 7: must be a multiple of num_heads = 2"),
        (["layer", "--kind", "rnn"], "'rnn' is not one of"),
        (["layer", "--devices", 3], "--devices = 3: must be a divisor of the batch = 2"),
        (["layer", "--devices", 9, "--batch", 9], "--devices = 9: must be <= 8"),
        (["layer", "--devices", 0], "Invalid value for '--devices'"),
        (["peers", "--devices", 3], "--devices = 3: must be a divisor of the batch = 2"),
        (["scaling", "--runs", 0], "--runs 0: must be >= 1"),
        (["peers", "--only", "none"], "--only none: must be one of linear-1024"),
        (["memory", "no.yaml"], "no.yaml"),
        (["model", "no.yaml"], "no.yaml"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_invalid_benchmarks_are_one_line_errors(monkeypatch, capsys, words, message):
    assert mc(monkeypatch, "bench", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mc: ")
    assert message in error
    assert error.count("\n") == 1


def test_peers_with_different_outputs_are_refused():
    one, other = np.ones(3), np.ones(3) + 1e-7
    assert peers._distance([one, one], [one, other]) < 1e-6
    with pytest.raises(UserError, match="outputs differ by 1e\\+00"):
        peers._distance([one, one], [one, 2 * one])


def test_layer_table_compares_start_modes():
    grid = layer.Grid(tokens=(8,), chunks=(4,), segments=(4,), starts=("checkpoint", "restart"),
                      width=8, heads=2)  # fmt: skip
    names = list(layer.build(grid))
    assert [("restart" in name, "checkpoint" in name) for name in names] == [(0, 1), (1, 0)]
