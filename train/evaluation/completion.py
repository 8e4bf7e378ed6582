"""Streaming decoders: complete characters per token, and stop strings."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 8  # prompt tokens given to a decoder as context


class TextDecoder(Protocol):
    """Turns tokens into text; buffers incomplete characters."""

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""

    def end(self) -> str:
        """Return the buffered text at the end; U+FFFD for invalid characters."""


class ByteDecoder:
    """Decodes byte tokens as UTF-8; ids >= 256 become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""
        # 0xFF is invalid in UTF-8, so it is decoded as U+FFFD.
        return self._decoder.decode(bytes([token if token < 256 else 0xFF]))

    def end(self) -> str:
        """Return U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


class TokenizerDecoder:
    """Decodes tokens of a Hugging Face tokenizer; unknown ids become U+FFFD.

    Args:
        tokenizer: tokenizer that decodes.
        prompt: tokens that precede the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._buffer: list[int] = []  # tokens whose text is incomplete
        for token in prompt[-CONTEXT:]:
            self._stream.step(tokenizer, int(token))

    def push(self, token: int) -> str:
        """Return the text that is certain after this token."""
        if self._tokenizer.id_to_token(token) is None:
            return "\N{REPLACEMENT CHARACTER}"
        self._buffer.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._buffer.clear()
        return text

    def end(self) -> str:
        """Return the text of the remaining tokens."""
        buffer, self._buffer = self._buffer, []
        return self._tokenizer.decode(buffer, skip_special_tokens=False)


def make_decoder(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> TextDecoder:
    """Return the decoder for the completion of a prompt; tokenizer None = bytes."""
    return ByteDecoder() if tokenizer is None else TokenizerDecoder(tokenizer, prompt)


class Completion:
    """Completion of one prompt.

    Attributes:
        text: decoded text, up to a stop string.
        tokens: number of tokens, including a stop string's.
        finish: reason of the end, `stop` or `length`; None while running.

    Args:
        decoder: decoder of the tokens.
        limit: maximum number of tokens.
        stops: strings that end the completion.
    """

    def __init__(self, decoder: TextDecoder, limit: int, stops: Sequence[str] = ()):
        self.text = ""
        self.tokens = 0
        self.finish: str | None = None
        self._decoder = decoder
        self._limit = limit
        self._stops = stops
        self._buffer = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add the next token, and return the new text that cannot be part of a stop string."""
        self.tokens += 1
        buffer = self._buffer + self._decoder.push(token)
        last = self.tokens == self._limit
        if last:
            buffer += self._decoder.end()
        found = [at for at in map(buffer.find, self._stops) if at >= 0]
        if found:
            self.finish, shown = "stop", min(found)
        elif last:
            self.finish, shown = "length", len(buffer)
        else:
            shown = len(buffer) - _stop_prefix_length(buffer, self._stops)
        self._buffer = buffer[shown:]
        self.text += buffer[:shown]
        return buffer[:shown]


def printable(text: str) -> str:
    """Replace control characters except line feed and tab."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _stop_prefix_length(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
