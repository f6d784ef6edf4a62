"""Choose the next token of each row from its logits: the likeliest one, or one sampled with a seed of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from stllava_eval.inference.rows import Row
from stllava_eval.inference.types import Prompt


def pixels_sha256(inputs: dict[str, Tensor]) -> bytes:
    """Hash the pixels that an image became."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(inputs[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def sampling_seed(prompt: Prompt, pixels: bytes) -> bytes:
    """Return a seed that depends on the sampling's seed, image, prompt and sample index alone; empty if greedy."""
    if prompt.sampling is None:
        return b""
    identity = f"{prompt.sampling.seed} {prompt.sample_index} {prompt.prefix} {prompt.suffix}".encode()
    return hashlib.sha256(identity + pixels).digest()


class Choice(LogitsProcessor):
    """Let transformers' `generate` choose the tokens that the engine chooses: all others of a row become impossible.

    Args:
        rows: For each row of the batch its prompt and, if its answer is sampled, the `pixels_sha256` of its image.
        start: Number of tokens of the padded prompts.
        suppressed: Token ids that are never generated.
    """

    def __init__(self, rows: Sequence[tuple[Prompt, bytes]], start: int, suppressed: Sequence[int]) -> None:
        self.start, self.suppressed = start, list(suppressed)
        self.rows = [Row(prompt, [], [], seed=sampling_seed(prompt, pixels)) for prompt, pixels in rows]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return (rows, vocab) scores, of which one in each row is 0 and all others are minus infinity."""
        for row, generated in zip(self.rows, input_ids[:, self.start :].tolist(), strict=True):
            row.ids = [*row.prompt.suffix, *generated]
        if self.suppressed:
            scores[:, self.suppressed] = float("-inf")
        tokens = torch.tensor(choose_tokens(scores, range(len(self.rows)), self.rows), device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def choose_tokens(logits: Tensor, which: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Return a token for each row.

    Args:
        logits: (distinct rows, vocab): rows with equal inputs share one row of them.
        which: For each row, the index of its row of logits.
        rows: The rows, with their prompts, seeds and ids so far.
    """
    # (distinct rows,) likeliest tokens, gathered to (rows,)
    tokens = logits.argmax(-1)[torch.tensor(which, device=logits.device)].tolist()
    by_sampling: dict[tuple[float, int, float], list[int]] = {}
    for index, row in enumerate(rows):
        if sampling := row.prompt.sampling:
            settings = (sampling.temperature, sampling.top_k, sampling.top_p)
            by_sampling.setdefault(settings, []).append(index)
    for settings, indices in by_sampling.items():
        gathered = torch.tensor([which[index] for index in indices], device=logits.device)
        # seeded by the token's position: a step that is repeated after memory was short samples the same token
        seeds = [rows[index].seed + len(rows[index].ids).to_bytes(4, "big") for index in indices]
        uniform = [random.Random(seed).random() for seed in seeds]
        sampled = sample_tokens(logits[gathered], *settings, uniform)  # of (indices, vocab) logits
        for index, token in zip(indices, sampled, strict=True):
            tokens[index] = token
    return tokens


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Sequence[float]) -> list[int]:
    """Sample one token per row by inverse transform: the first id whose cumulated probability exceeds `uniform`.

    The logits are divided by the temperature, then cut to the `top_k` likeliest tokens (Fan et al., arXiv:1805.04833)
    and to the fewest tokens that together have `top_p` of the probability (Holtzman et al., arXiv:1904.09751).

    Args:
        logits: (rows, vocab).
        temperature: Above 0.
        top_k: 0 keeps every token.
        top_p: Above 0; 1 keeps every token. A token that crosses the share is kept, as in transformers.
        uniform: A number in [0, 1) for each row: which token of the cumulated probabilities, in the order of ids, so
            that rounding of the logits hardly ever changes the choice.
    """
    # (rows, k) both, the likeliest token first
    kept, ids = (logits / temperature).topk(min(top_k or logits.shape[1], logits.shape[1]))
    shares = kept.double().softmax(-1)  # (rows, k) probabilities, in float64 so that the sums below hardly round
    before = shares.cumsum(-1) - shares  # (rows, k) probability of all likelier tokens
    shares = shares.masked_fill(before >= top_p, 0.0)  # the token that crosses top_p has `before` below it and stays
    ids, order = ids.sort(-1)  # (rows, k): from the order of probability to that of ids
    cumulated = shares.gather(-1, order).cumsum(-1)  # (rows, k), whose last entry is what top_p has kept
    # (rows, 1): uniform numbers, scaled to the kept probability instead of dividing all by it
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
    # (rows, 1) index of the first cumulated probability above `wanted`; rounding may push it behind the last one
    first = torch.searchsorted(cumulated, wanted, right=True).clamp_max(ids.shape[1] - 1)
    return ids.gather(-1, first)[:, 0].tolist()
