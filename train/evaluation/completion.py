"""Streaming decoders: complete characters per token, and stop strings."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 8  # tokens of the prompt that a decoder sees, to join or split words


class TextDecoder(Protocol):
    """Turns tokens into text; buffers incomplete characters."""

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""

    def end(self) -> str:
        """Return the buffered text at the end; U+FFFD for invalid characters."""


class ByteDecoder:
    """Tokens are bytes of UTF-8; ids from 256 on are shown as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""
        # 0xFF stands in no UTF-8 text, so it is replaced.
        return self._decoder.decode(bytes([token if token < 256 else 0xFF]))

    def end(self) -> str:
        """Return U+FFFD where a character is unfinished."""
        return self._decoder.decode(b"", final=True)


class WordDecoder:
    """Tokens of a Hugging Face tokenizer; an unknown id is shown as U+FFFD.

    Args:
        tokenizer: decodes.
        prompt: the tokens before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # tokens whose text is not certain
        for token in prompt[-CONTEXT:]:
            self._stream.step(tokenizer, int(token))

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""
        if self._tokenizer.id_to_token(token) is None:
            return "\N{REPLACEMENT CHARACTER}"
        self._held.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._held.clear()
        return text

    def end(self) -> str:
        """Return the text of the tokens that form no complete character."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=False)


def make_decoder(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> TextDecoder:
    """Return the decoder for a prompt's completion; of bytes without a tokenizer."""
    return ByteDecoder() if tokenizer is None else WordDecoder(tokenizer, prompt)


class Completion:
    """Completion of one prompt.

    Attributes:
        text: so far, up to a stop string.
        tokens: number of tokens, including a stop string's.
        finish: None while running; `stop` or `length` at the end.

    Args:
        decoder: of its tokens.
        limit: the most tokens.
        stops: strings that end it.
    """

    def __init__(self, decoder: TextDecoder, limit: int, stops: Sequence[str] = ()):
        self.text = ""
        self.tokens = 0
        self.finish: str | None = None
        self._decoder = decoder
        self._limit = limit
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add the next token, and return the text that can be shown."""
        self.tokens += 1
        held = self._held + self._decoder.push(token)
        last = self.tokens == self._limit
        if last:
            held += self._decoder.end()
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self.finish, shown = "stop", min(found)
        elif last:
            self.finish, shown = "length", len(held)
        else:
            shown = len(held) - _begun(held, self._stops)
        self._held = held[shown:]
        self.text += held[:shown]
        return held[:shown]


def printable(text: str) -> str:
    """Replace control characters except line feed and tab."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of `text` that may begin a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
