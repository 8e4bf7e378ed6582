"""Token ids out of range: an error if their values are known, else NaN.

Ids at masked tokens and padding are not read. Both packages accept all integer dtypes.
"""

from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers import torch_calls
from helpers.cases import make_case
from mc_core import LinearConfig, MCConfig, ModelConfig, checks
from mc_core.weights import to_torch
from mc_jax.cross_entropy import cross_entropy
from mc_jax.pretrained import get_weights

SIZE = 11
LAYER = MCConfig(4, 1, LinearConfig(), "grm", segment_size=3, chunk_size=2, conv_width=2)
CONFIG = ModelConfig(SIZE, 1, LAYER)
OUT_OF_RANGE = pytest.mark.parametrize("wrong", [SIZE, -1, -100, 2**31 - 1])
TOKENS = np.random.default_rng(0).integers(SIZE, size=(3, 7)).astype(np.int32)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7], bool)


# Much faster than compiling.
COMPILED = mock.patch.object(torch.compiler, "is_compiling", return_value=True)


class Jax:
    """The JAX model in two compiled programs: a loss with gradients, and a stream."""

    array = staticmethod(jnp.asarray)
    trace = staticmethod(jax.eval_shape)  # closed-over ids are known when tracing

    def __init__(self):
        self.model = mc_jax.LanguageModel(CONFIG, rngs=nnx.Rngs(0))
        graph, self.params = nnx.split(self.model)

        def loss(params, tokens, mask, weights):
            logits = nnx.merge(graph, params)(tokens, mask)
            loss = jnp.where(weights, jax.nn.logsumexp(logits, -1) - logits[..., 0], 0)
            return jnp.sum(loss), logits

        self._grads = jax.jit(jax.value_and_grad(loss, has_aux=True))
        self._extend = jax.jit(
            lambda params, tokens, cache, padding: nnx.merge(graph, params).extend(
                tokens, cache, padding=padding
            )
        )

    def grads(self, tokens, mask, weights):
        """Return logits, and the loss and its gradients in one list."""
        (loss, logits), grads = self._grads(self.params, tokens, mask, weights)
        return np.asarray(logits), [loss, *jax.tree.leaves(grads)]

    def extend(self, tokens, cache, padding):
        return self._extend(self.params, tokens, cache, padding)


class Torch:
    """The same in PyTorch, with `is_compiling` set."""

    array = staticmethod(torch.tensor)

    def __init__(self):
        self.model = mc_torch.LanguageModel(CONFIG)
        weights = to_torch(get_weights(SIDES["jax"]().model))
        self.model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})

    def grads(self, tokens, mask, weights):
        tokens, mask, weights = map(torch.tensor, (tokens, mask, weights))
        self.model.zero_grad()
        with COMPILED:
            logits = self.model(tokens, mask)
        loss = torch.where(weights, torch.logsumexp(logits, -1) - logits[..., 0], 0).sum()
        loss.backward()
        return logits.detach().numpy(), [loss.detach(), *(p.grad for p in self.model.parameters())]

    @staticmethod
    def trace(run):
        with torch.no_grad():
            return run()

    def extend(self, tokens, cache, padding):
        with torch.no_grad(), COMPILED:
            return self.model.extend(torch.tensor(tokens), cache, padding=torch.tensor(padding))


SIDES = {"jax": cache(Jax), "torch": cache(Torch)}


@pytest.fixture(params=SIDES)
def side(request):
    return SIDES[request.param]()


def get(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def assert_equal_trees(left, right):
    assert len(left) == len(right)
    for one, other in zip(map(get, left), map(get, right), strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_array_equal(one, other)


def with_id(wrong, *where):
    tokens = TOKENS.copy()
    for place in where:
        tokens[place] = wrong
    return tokens


@OUT_OF_RANGE
def test_ids_at_masked_tokens_are_not_read(side, wrong):
    """Neither values nor gradients depend on them, eager and compiled."""
    logits, grads = side.grads(TOKENS, MASK, MASK)
    tokens = np.where(MASK, TOKENS, np.int32(wrong))
    masked, grads_of_masked = side.grads(tokens, MASK, MASK)
    assert_equal_trees([masked], [logits])
    assert_equal_trees(grads_of_masked, grads)


def test_ids_at_masked_tokens_are_not_checked(side):
    tokens = side.array(np.where(MASK, TOKENS, np.int32(-100)))
    mask, model = side.array(MASK), side.model
    cache = model.init_cache(3, 7)
    side.trace(lambda: model(tokens, mask))
    side.trace(lambda: model.inspect(tokens, mask)[0])
    side.trace(lambda: model.extend(tokens, cache, mask)[0])
    side.trace(lambda: model.extend(tokens, cache, padding=~mask)[0])
    with pytest.raises(ValueError, match=r"tokens\[0, 0\] = -100"):
        model.extend(tokens, cache, ~mask)


@OUT_OF_RANGE
def test_compiled_program_gives_nan_after_invalid_id(side, wrong):
    """Earlier tokens, other rows and their gradients are unaffected."""
    everywhere = np.ones_like(MASK)
    out_of_range = np.zeros_like(MASK)
    out_of_range[0, 3:] = out_of_range[2, 6:] = True
    logits, grads = side.grads(TOKENS, everywhere, ~out_of_range)
    broken, grads_of_rest = side.grads(with_id(wrong, (0, 3), (2, 6)), everywhere, ~out_of_range)
    assert np.isnan(broken[out_of_range]).all()
    assert_equal_trees([broken[~out_of_range]], [logits[~out_of_range]])
    assert_equal_trees(grads_of_rest, grads)


@OUT_OF_RANGE
def test_stream_stays_nan_after_invalid_id(side, wrong):
    nothing = np.zeros_like(MASK)
    start = side.model.init_cache(3, 21)
    right, cache = side.extend(TOKENS, start, nothing)
    left, broken = side.extend(with_id(wrong, (1, 4)), start, nothing)
    expected = np.zeros_like(MASK)
    expected[1, 4:] = True
    np.testing.assert_array_equal(np.isnan(get(left)).any(-1), expected)
    assert_equal_trees([get(left)[~expected]], [get(right)[~expected]])
    for _ in range(2):
        right, cache = side.extend(TOKENS, cache, nothing)
        left, broken = side.extend(TOKENS, broken, nothing)
        assert np.isnan(get(left)[1]).all()
        assert_equal_trees([get(left)[[0, 2]]], [get(right)[[0, 2]]])
    # The cache is full, but an invalidated row needs no capacity.
    with pytest.raises(
        ValueError, match="max_tokens = 21: the call would advance position 21 to 22"
    ):
        side.model.extend(side.array(TOKENS[:, :1]), broken)


def test_padded_ids_are_not_read(side):
    padding = ~MASK
    right, cache = side.extend(TOKENS, side.model.init_cache(3, 21), padding)
    tokens = np.where(padding, np.int32(-100), TOKENS)
    left, other = side.extend(tokens, side.model.init_cache(3, 21), padding)
    assert_equal_trees([get(left)[MASK]], [get(right)[MASK]])
    left, right = (side.extend(TOKENS, one, padding)[0] for one in (other, cache))
    assert_equal_trees([get(left)[MASK]], [get(right)[MASK]])


ENTRIES = {
    "forward": lambda model, tokens: model(tokens),
    "inspect": lambda model, tokens: model.inspect(tokens),
    "extend": lambda model, tokens: model.extend(tokens, model.init_cache(len(tokens), 9)),
}


@OUT_OF_RANGE
@pytest.mark.parametrize("entry", ENTRIES)
def test_ids_out_of_range_raise_with_position(side, entry, wrong):
    tokens = side.array(with_id(wrong, (1, 5), (2, 0)))
    with pytest.raises(ValueError, match=rf"tokens\[1, 5\] = {wrong}: must be in 0..10$"):
        ENTRIES[entry](side.model, tokens)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_non_integer_ids_are_rejected(side, entry, dtype):
    tokens = side.array(np.ones((2, 3), dtype))
    with pytest.raises(ValueError, match=f"tokens has dtype {dtype}: must be an integer dtype"):
        ENTRIES[entry](side.model, tokens)


@pytest.mark.parametrize(
    "dtype",
    [
        "int8",
        pytest.param("int16", marks=pytest.mark.slow),
        "int64",
        pytest.param("uint8", marks=pytest.mark.slow),
        pytest.param("uint16", marks=pytest.mark.slow),
        "uint32",
    ],
)
def test_all_integer_dtypes_agree(dtype):
    models, tokens = {name: one().model for name, one in SIDES.items()}, TOKENS.astype(dtype)
    with torch.no_grad():
        assert_equal_trees(
            [models["torch"](torch.tensor(tokens))], [models["torch"](torch.tensor(TOKENS))]
        )
    jax.eval_shape(lambda: models["jax"](jnp.asarray(tokens)))
    for size in (SIZE, 1000):  # the second is beyond some dtypes
        given = np.array([0, SIZE - 1, 120, np.iinfo(dtype).max, np.iinfo(dtype).min], dtype)
        given = given[: 4 if dtype == "int64" else 5]  # JAX has 32 bits here
        ids, wrong = mc_jax.ids.safe_ids(given.clip(max=2**31 - 1), size)
        mirror, out_of_range = mc_torch.ids.safe_ids(torch.tensor(given), size)
        inside = (given.astype(float) >= 0) & (given.astype(float) < size)
        np.testing.assert_array_equal(ids, np.where(inside, given, 0))
        np.testing.assert_array_equal(ids, mirror)
        np.testing.assert_array_equal(wrong, ~inside)
        np.testing.assert_array_equal(wrong, out_of_range)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_places_are_indices_of_tokens(side, dtype):
    """-1 is not the last token, and a place out of range gives NaN only there."""
    places = np.array([[6, 0], [3, 3], [1, 5]], dtype)
    tokens, model = side.array(TOKENS), side.model
    for wrong in (7, 200):
        broken = places.copy()
        broken[2, 0] = wrong
        with pytest.raises(ValueError, match=rf"places\[2, 0\] = {wrong}: must be in 0..6"):
            model(tokens, None, side.array(broken))
    with pytest.raises(ValueError, match=r"places\[0, 1\] = -1: must be in 0..6"):
        model(tokens, None, side.array(np.array([[0, -1]] * 3)))
    with pytest.raises(ValueError, match="places has dtype float32: must be an integer dtype"):
        model(tokens, None, side.array(np.zeros((3, 2), np.float32)))
    side.trace(lambda: model(tokens, None, side.array(places)))


@pytest.mark.slow
def test_compiled_torch_gives_nan_at_invalid_ids_and_places():
    model = SIDES["torch"]().model
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        right = model(torch.tensor(TOKENS))
        places = torch.tensor([[6, -1], [7, 0], [2, 2]])
        left = run(torch.tensor(with_id(SIZE, (2, 3))), None, places)
    out_of_range = torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    assert left[out_of_range].isnan().all()
    expected = torch.stack([right[0, 6], right[1, 0], right[2, 2], right[2, 2]])
    torch.testing.assert_close(left[~out_of_range], expected)


def test_torch_func_does_not_check_ids():
    """`torch.func.vmap` cannot raise for one of its samples."""
    model, tokens = mc_torch.LanguageModel(CONFIG), with_id(SIZE, (1, 2))
    with torch.no_grad():
        logits = torch.func.vmap(lambda row: model(row[None])[0])(torch.tensor(tokens))
    out_of_range = np.zeros_like(MASK)
    out_of_range[1, 2:] = True
    np.testing.assert_array_equal(logits.isnan().any(-1), out_of_range)


def test_generated_tokens_are_not_checked(monkeypatch):
    """Token -1 (no finite logits) invalidates only its row, without synchronization."""
    model, checked = mc_torch.LanguageModel(CONFIG), []
    with torch.no_grad():
        model.embed.weight[9] = torch.nan
    monkeypatch.setattr(
        mc_torch.model,
        "check_ids",
        lambda *args: checked.append(args[-1]) or mc_torch.ids.check_ids(*args),
    )
    alone = [one.tolist() for one in mc_torch.generate(model, [[1, 2]], 4)]
    checked.clear()
    both = [one.tolist() for one in mc_torch.generate(model, [[1, 2], [9, 1]], 4)]
    assert both == [[*token, -1] for token in alone]
    assert checked == [True, False, False, False]


LABELS = np.array([[3, -100, 5], [SIZE, 2, -1]])


def test_labels_with_zero_weight_are_not_read():
    """Label -100 with weight 0 gives a finite loss; with another weight the loss is NaN."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, SIZE)))
    read = (LABELS >= 0) & (LABELS < SIZE)

    @jax.jit
    @jax.value_and_grad
    def loss(logits, labels):
        return jnp.where(read, cross_entropy(logits, labels, read), 0).sum()

    assert_equal_trees(loss(logits, LABELS), loss(logits, np.where(read, LABELS, 0)))
    assert np.isfinite(cross_entropy(logits, LABELS, read)).all()
    np.testing.assert_array_equal(np.isnan(cross_entropy(logits, LABELS)), ~read)


def test_first_invalid_id_is_named():
    ids = np.array([[1, 2], [9, -1]], np.int64)
    with pytest.raises(ValueError, match=r"^labels\[1, 0\] = 9: must be in 0..8$"):
        checks.check_ids("labels", ids, 9)
    checks.check_ids("labels", ids, 9, ids == 2)
    checks.check_ids("labels", ids[:0], 9)
    with pytest.raises(ValueError, match=r"x\[0\] = 18446744073709551615: must be in 0..3"):
        checks.check_ids("x", np.array([2**64 - 1], np.uint64), 4)


@pytest.mark.parametrize("method", ["chunked", "recurrent"])
@pytest.mark.parametrize("memory", ["linear-normalized", "swla", "titans-norm"])
def test_inputs_at_masked_tokens_are_not_read(memory, method):
    """NaN and infinities in q, k, v, u and coefficients do not reach values and gradients."""
    case = make_case(memory, "grm", tokens=7, mask="some")

    def fill(x, value):
        return np.where(case.mask.reshape(2, 7, *[1] * (x.ndim - 2)), x, value)

    results = [
        [
            *jax.tree.leaves(torch_calls.gradients(one, method)),
            *torch_calls.leaves(torch_calls.run(one, method)),
        ]
        for value in (0.5, np.nan, np.inf)
        for one in [case.map_inputs(lambda x: fill(x, value))]  # noqa: B023
    ]
    for dirty in results[1:]:
        assert_equal_trees(dirty, results[0])


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1, 2], [3, 4, SIZE]]}, r"prompts\[1\]\[2\] = 11: must be in 0..10"),
        ({"prompts": [[-1]]}, r"prompts\[0\]\[0\] = -1: must be in 0..10"),
        ({"prompts": [[True]]}, r"prompts\[0\] has dtype bool: must be an integer dtype"),
        ({"rows": [0.5]}, r"rows\[0\] = 0.5: must be an integer"),
        ({"rows": [True]}, r"rows\[0\] = True: must be an integer"),
        ({"seed": 1.0}, "seed = 1.0: must be an integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5: must be an integer"),
        ({"top_k": 1.5}, "top_k = 1.5: must be an integer"),
    ],
)
def test_generate_validates_ids_and_integers(framework, options, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 2} | options
    package = {"jax": mc_jax, "torch": mc_torch}[framework]
    with pytest.raises(ValueError, match=message):
        package.generate(SIDES[framework]().model, **arguments)
