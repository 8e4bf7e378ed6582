"""A model whose training draws random numbers."""

from flax import nnx


class Dropping(nnx.Module):
    """A model with a random stream."""

    def __init__(self, config, *, rngs, dtype):
        self.embed = nnx.Embed(config.vocab_size, 8, rngs=rngs, dtype=dtype)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.dropout(self.embed(tokens)))
