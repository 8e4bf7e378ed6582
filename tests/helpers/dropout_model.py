"""A model whose training draws random numbers."""

from flax import nnx

from mc_jax.cross_entropy import label_scores


class Dropping(nnx.Module):
    """A model with a random stream."""

    def __init__(self, config, *, rngs, dtype, param_dtype):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed = nnx.Embed(config.vocab_size, 8, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def score(self, tokens, labels):
        x = self.dropout(self.embed(tokens))
        return label_scores(self.embed.attend, x, labels, self.embed.num_embeddings)
