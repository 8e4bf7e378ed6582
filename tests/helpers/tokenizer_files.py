"""Tokenizers of a few tokens, and a text for them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXT = "the memory reads the text\r\n\tand é, 漢 and \N{ZERO WIDTH NO-BREAK SPACE} too  \n"


def byte_level(*, merges: bool = True, dropout: float | None = None) -> Tokenizer:
    """A tokenizer that gives back every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the")] if merges else []
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    made = Tokenizer(models.BPE(vocabulary, pairs, dropout=dropout))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def words(*vocabulary: str) -> Tokenizer:
    """A tokenizer of whole words, which drops blanks and maps all else to [UNK]."""
    names = ["[UNK]", *vocabulary]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made
