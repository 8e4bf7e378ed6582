"""The loader of configurations: strict by type hints, with the full path in every error."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers.cases import MEMORIES as EXAMPLES
from mc_core import MCConfig, MemoryConfig, ModelConfig, register_memory
from mc_core.checks import check_range
from mc_core.memories import MEMORIES
from mc_core.optimizer import OptimizerConfig
from mc_core.serialization import Tag, from_dict, non_defaults, to_dict
from train.config import (
    MQARConfig,
    NIAHConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    WeightedCorpus,
)
from train.sweeps.sweep_config import SweepConfig

SHAPES: dict[str, type] = {}


@dataclass(frozen=True)
class Square:
    tag: ClassVar[Tag] = Tag("shape", SHAPES, omitted="square")
    shape: ClassVar[str] = "square"

    side: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "side", 0.0)


@dataclass(frozen=True)
class Circle:
    tag: ClassVar[Tag] = Square.tag
    shape: ClassVar[str] = "circle"

    radius: int


SHAPES.update(square=Square, circle=Circle)


@dataclass(frozen=True)
class Nested:
    count: int = 1
    figure: Square | Circle = Square()


@dataclass(frozen=True)
class Everything:
    size: int
    rate: float = 1.0
    name: str = "a"
    flag: bool = False
    limit: float | None = None
    level: float | str = 1.0
    words: tuple[str, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    path: Path = Path("x")
    options: dict[str, Any] = field(default_factory=dict)
    nested: Nested = Nested()
    parts: tuple[Nested, ...] = ()


FULL = {
    "size": 3,
    "rate": 2,
    "name": "b",
    "flag": True,
    "limit": 0.5,
    "level": 4,
    "words": ["p", "q"],
    "pairs": [[1, 2], [3, 4]],
    "path": "folder/file",
    "options": {"a.b": [1, "x"]},
    "nested": {"count": 2, "figure": {"shape": "circle", "radius": 4}},
    "parts": [{"figure": {"side": 2.0}}],
}


def test_every_kind_of_field_is_loaded():
    loaded = from_dict(Everything, FULL)
    assert loaded == Everything(
        3, 2.0, "b", True, 0.5, 4.0, ("p", "q"), ((1, 2), (3, 4)), Path("folder/file"),
        {"a.b": [1, "x"]}, Nested(2, Circle(4)), (Nested(figure=Square(2.0)),),
    )  # fmt: skip
    assert type(loaded.rate) is type(loaded.level) is float
    assert from_dict(Everything, {"size": 3, "level": "high"}).level == "high"
    assert from_dict(Everything, {"size": 3}) == Everything(3)
    assert from_dict(Everything, {"size": 3, "words": "p"}).words == ("p",)
    assert from_dict(Everything, {"size": 3, "limit": None}).limit is None


def test_to_dict_gives_plain_values():
    plain = to_dict(Everything(3, pairs=((1, 2),), nested=Nested(2, Circle(4))))
    assert plain["pairs"] == [[1, 2]]
    assert plain["nested"] == {"count": 2, "figure": {"shape": "circle", "radius": 4}}
    assert to_dict(Nested())["figure"] == {"side": 1.0}  # the omitted tag


def test_non_defaults_omits_fields_at_their_defaults():
    assert non_defaults(Everything(3)) == {"size": 3}
    config = Everything(3, nested=Nested(2, Circle(4)))
    nested = {"count": 2, "figure": {"shape": "circle", "radius": 4}}
    assert non_defaults(config) == {"size": 3, "nested": nested}
    assert from_dict(Everything, non_defaults(config)) == config
    assert non_defaults(Nested(2)) == {"count": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sise": 1}, "unknown key 'sise'; allowed are size, rate, "),
        ({1: 2}, "unknown key 1; allowed are size, "),
        ({"nested": {"cuont": 1}}, "nested: unknown key 'cuont'; allowed are count, figure"),
        ({"nested": {"figure": {"shape": "circle"}}}, "nested.figure: key 'radius' is missing"),
        ({"nested": {"figure": {"radius": 1}}}, "nested.figure: unknown key 'radius'"),
        ({"nested": 3}, "nested = 3: must be a mapping"),
        ({"nested": {"figure": [1]}}, "nested.figure = [1]: must be a mapping"),
    ],
)
def test_unknown_and_missing_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_dict(Everything, {"size": 3} | keys)


def test_a_missing_key_at_the_root_is_named():
    with pytest.raises(ValueError, match=r"^key 'size' is missing$"):
        from_dict(Everything, {})
    with pytest.raises(ValueError, match=r"^a\.b: key 'size' is missing$"):
        from_dict(Everything, {}, "a.b")
    with pytest.raises(ValueError, match=r"^file = \[1\]: must be a mapping$"):
        from_dict(Everything, [1])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *(("size", value, "of type int") for value in (1.0, "1", None, True, [1], {})),
        *(("rate", value, "of type float") for value in ("1", None, False)),
        *(("rate", value, "finite") for value in (float("nan"), float("inf"), -float("inf"))),
        ("limit", float("inf"), "finite"),
        *(("limit", value, "of type float or None") for value in (True, "x")),
        *(("level", value, "of type float or str") for value in (True, None, [1])),
        *(("name", value, "of type str") for value in (1, None, ["a"])),
        *(("flag", value, "of type bool") for value in (1, 0, "true", None)),
        *(("words", value, "text or a list of text") for value in (1, None, {"a": 1})),
        *(("pairs", value, "a list") for value in (1, None, "12")),
        ("path", 3, "the path of a file"),
        *(("options", value, "a mapping with text keys") for value in (3, None, {1: 2})),
        ("parts", {"count": 1}, "a list"),
    ],
)
def test_values_of_another_type_are_refused(key, value, allowed):
    message = re.escape(f"{key} = {value!r}: must be {allowed}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_dict(Everything, {"size": 3, key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nested": {"count": "x"}}, "nested.count = 'x': must be of type int"),
        ({"words": ["a", 1]}, "words[1] = 1: must be of type str"),
        ({"pairs": [[1, 2], [3]]}, "pairs[1] = [3]: must be a list of 2 values"),
        ({"pairs": [[1, True]]}, "pairs[0][1] = True: must be of type int"),
        ({"parts": [{}, {"count": 0.5}]}, "parts[1].count = 0.5: must be of type int"),
        ({"parts": [{"figure": {"side": -1}}]}, "parts[0].figure.side = -1.0: must be >= 0.0"),
        ({"nested": {"figure": {"side": -1}}}, "nested.figure.side = -1.0: must be >= 0.0"),
    ],
)
def test_errors_name_the_full_path(keys, message):
    for path in ("", "run"):
        text = f"{path}.{message}" if path else message
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            from_dict(Everything, {"size": 3} | keys, path)


def test_an_unknown_tag_is_refused():
    for shape in ("cube", None, 3, ["circle"]):
        message = f"nested.figure.shape = {shape!r}: must be one of 'square', 'circle'"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            from_dict(Everything, {"size": 3, "nested": {"figure": {"shape": shape}}})


def test_a_class_refuses_the_tag_of_another():
    assert from_dict(Circle, {"radius": 1}) == from_dict(Circle, {"shape": "circle", "radius": 1})
    with pytest.raises(ValueError, match=r"^shape = 'square': must be 'circle'$"):
        from_dict(Circle, {"shape": "square"})
    for kind, cls in MEMORIES.items():
        assert from_dict(MemoryConfig, {"kind": kind}) == cls.from_dict({}) == cls()


@pytest.fixture
def custom_memory():
    """A memory that a user registered, with an option of its own."""
    before = dict(MEMORIES)

    @register_memory
    @dataclass(frozen=True)
    class CustomConfig(MemoryConfig):
        kind = "custom"
        description = "of a test"
        ranges = {"step": (0.0, 1.0), "retention": (0.0, 1.0)}  # noqa: RUF012 - read only

        coefficients: str = "token"
        step: float = 0.1
        retention: float = 0.99
        rounds: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.rounds > 9:
                raise ValueError("rounds must be small")

    yield CustomConfig
    MEMORIES.clear()
    MEMORIES.update(before)


def round_trip(config: Any) -> None:
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), plain) == config
    assert to_dict(from_dict(type(config), plain)) == plain


def run_config(data: Any, memory: MemoryConfig) -> TrainConfig:
    layer = MCConfig(8, 2, memory, "ssc", conv_width=4)
    return TrainConfig(
        data, ModelConfig(256, 2, layer, mixers=("window", "memory")), RunConfig(900)
    )


def test_every_configuration_makes_a_round_trip(custom_memory):
    text = TextConfig(("x", "y"), separator="")
    mixed = TextConfig((WeightedCorpus("x", 0.7), WeightedCorpus("y", 2.0)), validation=("z",))
    tasks = (
        text,
        mixed,
        MQARConfig(256, ((8, 2), (12, 3))),
        NIAHConfig("essay", "uuid", (64, 128)),
    )
    variants = [memory for cls in MEMORIES.values() for memory in cls.variants()]
    assert custom_memory() in variants
    for memory in (*variants, *EXAMPLES.values(), custom_memory(rounds=5)):
        round_trip(memory)
        round_trip(run_config(text, memory))
    for data in tasks:
        round_trip(run_config(data, custom_memory(step=0.5)))
    config = dataclasses.replace(
        run_config(text, custom_memory()), optimizer=OptimizerConfig(0.1, 3, clip_norm=None)
    )
    round_trip(config)
    sweep = {"base": "a.yaml", "directory": "d", "rates": [1, 0.1], "rows": [{"run.steps": 3}]}
    assert from_dict(SweepConfig, sweep) == SweepConfig(
        Path("a.yaml"), "d", rows=({"run.steps": 3},), rates=(1.0, 0.1)
    )


def test_the_path_of_a_custom_memory(custom_memory):
    plain = to_dict(run_config(TextConfig(("x",)), custom_memory()))
    for key, value, message in (
        ("step", "x", "step = 'x': must be of type float"),
        ("step", 2.0, "step = 2.0: must be in (0.0, 1.0]"),
        ("rounds", True, "rounds = True: must be of type int"),
    ):
        plain["model"]["layer"]["memory"] = {"kind": "custom", key: value}
        with pytest.raises(ValueError, match=f"^{re.escape(f'model.layer.memory.{message}')}$"):
            from_dict(TrainConfig, plain)
    plain["model"]["layer"]["memory"] = {"kind": "custom", "rounds": 10}
    with pytest.raises(ValueError, match=r"^model.layer.memory: rounds must be small$"):
        from_dict(TrainConfig, plain)
    plain["model"] |= {"layer": {"d_model": 6, "num_heads": 2}, "mixers": ["attention"]}
    message = "model.layer.d_model = 6: must be a multiple of 2 * num_heads = 4"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_dict(TrainConfig, plain)
