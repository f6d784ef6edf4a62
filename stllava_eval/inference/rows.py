"""Hold the state of prompts that the engine is answering: a prefix for each image, and a row for each prompt."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from stllava_eval.inference.types import Prompt

# Tokens of room that are kept for the rest of an answer, if its limit allows more (our choice).
GROWTH = 64


@dataclass(eq=False)
class Prefix:
    """A prefix whose keys and values are cached; `slot` is its index in the shared `KeyValues`."""

    group: Hashable
    slot: int
    tokens: int
    next_position: int  # of the token behind it, as the model counts
    pixels_sha256: bytes  # hash of the processor's output for the image; the seeds of sampled answers depend on it
    users: int = 0  # number of running prompts that share it


@dataclass(eq=False)
class Row:
    """A prompt that is being answered. Its index among the rows is its slot in the rows' own `KeyValues`."""

    prompt: Prompt
    indices: list[int]  # indices of the equal prompts that wait for this answer
    ids: list[int]  # token ids behind the prefix: the suffix, and what has been generated
    cached: int = 0  # number of `ids` whose keys and values are cached
    prefix: Prefix | None = None
    seed: bytes = b""  # seed of its sampled tokens; empty if it is greedy
    inherited: list[tuple[Tensor, Tensor]] | None = None  # keys and values that an earlier prompt passes to this one
    left: list[tuple[Tensor, Tensor]] | None = None  # keys and values that it passes to later prompts
    same: Hashable = None  # equal for prompts with the same answer

    @property
    def answer(self) -> list[int]:
        """Return the token ids that have been generated."""
        return self.ids[len(self.prompt.suffix) :]

    @property
    def width(self) -> int:
        """Return the number of tokens for which room is kept: those of the row, and at most `GROWTH` more."""
        rest = self.prompt.max_new_tokens - len(self.answer)
        return len(self.ids) + min(rest, GROWTH)

    @property
    def is_running(self) -> bool:
        """Return whether the keys and values of all tokens but the last, generated one are cached."""
        return self.cached == len(self.ids) - 1 and self.inherited is None and bool(self.answer)
