"""Hold the state of prompts that the engine is answering: a prefix for each image, and a row for each prompt."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from stllava_eval.inference.types import Prompt

GROWTH = 64  # tokens by which an answer is expected to grow at most, where its limit is further off (our choice)


@dataclass(eq=False)
class Prefix:
    """A prefix whose keys and values are held; `slot` is its index in the shared `KeyValues`."""

    group: Hashable
    slot: int
    tokens: int
    pixels_sha256: bytes  # of what the image became, for the seeds of sampled answers
    users: int = 0  # prompts at work that share it


@dataclass(eq=False)
class Row:
    """A prompt at work: its index among the rows is its slot in the rows' own `KeyValues`."""

    prompt: Prompt
    indices: list[int]  # of the equal prompts that wait for this answer
    ids: list[int]  # behind the prefix: the suffix and what has been generated
    cached: int = 0  # of which the keys and values are held
    prefix: Prefix | None = None
    seed: bytes = b""  # of its sampled tokens
    inherited: list[tuple[Tensor, Tensor]] | None = None  # keys and values that an earlier prompt leaves to this one
    left: list[tuple[Tensor, Tensor]] | None = None  # what it leaves to later ones
    same: Hashable = None  # equal for prompts with the same answer

    @property
    def answer(self) -> list[int]:
        """Token ids that have been generated."""
        return self.ids[len(self.prompt.suffix) :]

    @property
    def width(self) -> int:
        """Tokens that this row is expected to need at most, for which room is kept."""
        rest = self.prompt.max_new_tokens - len(self.answer)
        return len(self.ids) + min(rest, GROWTH)

    @property
    def is_running(self) -> bool:
        """Whether the keys and values of all tokens but the last one, which was generated, are cached."""
        return self.cached == len(self.ids) - 1 and self.inherited is None and bool(self.answer)
