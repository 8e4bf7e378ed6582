"""A short text at the end of a run: a continuation of the validation text."""

from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from mc_core.errors import NotFiniteError, UserError
from mc_jax import LanguageModel
from train.config import TrainConfig
from train.data.documents import clip
from train.data.tokenizer import load_tokenizer
from train.evaluation.completion import printable
from train.evaluation.generate import GenerationOptions, Speed, complete
from train.evaluation.prompts import Prompt

PROMPT_BYTES = 256


class Sample(NamedTuple):
    """A prompt and its continuation; plain values, saved as JSON."""

    prompt: str
    text: str
    note: str  # sampling options, or the reason why there is no sample


def draw_sample(model: LanguageModel, config: TrainConfig, validation: bytes) -> Sample:
    """Continue the beginning of the validation text by `run.sample_tokens` tokens."""
    options = GenerationOptions(config.run.sample_tokens, temperature=0.8, batch_size=1)
    # At most half of a training window, and at least one whole character.
    text = clip(validation, min(PROMPT_BYTES, max(4, int(config.data.mean_tokens) // 2)))
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    try:
        # Prefill in blocks of one token, to avoid compiling a second program.
        (row,) = complete(model, tokenizer, [Prompt("validation", text)], options, Speed(), block=1)
    except (UserError, NotFiniteError) as error:
        return Sample(text.decode(errors="replace"), "", f"no sample: {error}")
    note = f"{row.tokens} tokens at temperature {options.temperature}, seed {options.seed}"
    return Sample(text.decode(errors="replace"), row.text, note)


def print_sample(console: Console, name: str, sample: Sample) -> None:
    """Print the prompt and the sample, with a prefix on every line."""

    def show(label: str, text: str) -> None:
        console.print(label, soft_wrap=True, highlight=False, markup=False)
        lines = "".join(f"| {line}\n" for line in printable(text).split("\n"))
        console.print(Text(lines), soft_wrap=True, end="")

    if sample.text:
        show("start of the validation text:", sample.prompt)
        show(f"continuation by {name} ({sample.note}):", sample.text)
    else:
        console.print(sample.note, soft_wrap=True, highlight=False, markup=False)
