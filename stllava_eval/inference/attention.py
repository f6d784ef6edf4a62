"""Attend to prefixes that several rows share: each prefix's keys and values are held once, and no row is padded.

The keys of a token are those of its prefix P, which many rows share, and those of its own row R. The softmax over both
is computed in two parts and merged. For scores s_j = q . k_j / sqrt(width), each part X of {P, R} gives

    m_X = max_X s_j,    z_X = sum_X exp(s_j - m_X),    o_X = sum_X exp(s_j - m_X) v_j

and with m = max(m_P, m_R) the attention over all keys is

    o = (exp(m_P - m) o_P + exp(m_R - m) o_R) / (exp(m_P - m) z_P + exp(m_R - m) z_R)

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), as FlashAttention (arXiv:2205.14135, section
3.1) merges its blocks. Hydragen (arXiv:2402.05099, section 3) shares prefixes in the same way.

A step packs all new tokens of all rows into one sequence. First come the running rows, with one token each; they see
all of their own keys. Behind them come the fresh rows, with several tokens each; they see their own keys causally.

A layer may have a sliding window: a token at index i of its prompt then sees the keys at indices j with i - window < j.
Indices count tokens; the positions that rotate queries and keys are the model's own, and may count otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stllava_eval.inference.keys import KeyValues, Part, Prefixes, attend
from stllava_eval.inference.rows import Prefix, Row

ATTENTION = "stllava_shared_prefix"


@dataclass(frozen=True)
class Fresh:
    """A run of packed tokens of fresh rows that share a prefix."""

    slot: int  # of the prefix
    prefix_tokens: int
    start: int  # first packed token
    end: int  # last packed token + 1


@dataclass
class Plan:
    """One packed step: one token of each of the `running` rows, then all new tokens of the fresh rows after them.

    A grid is a (batch, queries) table of packed token indices, padded with 0; its `*_back` tensor holds, for each
    packed token, its index in the flattened grid, so that what was computed for the padding is never read. A `*_hidden`
    mask is True where a key is not seen; its shape broadcasts to (batch, key heads, queries, share, keys).
    """

    own: KeyValues
    prefixes: Prefixes
    prefix_rows: list[int]  # running rows of each prefix
    prefix_tokens: list[int]  # of each prefix
    most_tokens: int  # of a prompt with its answer so far
    indices: Tensor  # (tokens,) index of each packed token in its prompt, prefix included
    slots: Tensor  # (tokens,) slot of each packed token's row
    own_positions: Tensor  # (tokens,) position of each packed token in its row, behind the prefix
    running: int
    running_length: int  # tokens of the longest running row
    running_hidden: Tensor  # (running, 1, 1, 1, running_length)
    grid: Tensor  # (prefixes, most rows of one prefix) packed tokens of the running rows, by prefix
    grid_back: Tensor  # (running,)
    fresh: list[Fresh]
    fresh_rows: int
    fresh_length: int  # tokens of the longest fresh row
    fresh_grid: Tensor  # (fresh rows, most new tokens of one)
    fresh_back: Tensor  # (new tokens,)
    fresh_hidden: Tensor  # (fresh rows, 1, most new tokens, 1, fresh_length)
    windowed: dict[int, _Masks] = field(default_factory=dict)  # by window, made where a layer first asks for one

    def masks(self, window: int | None) -> _Masks:
        """Return what a layer with this window does not see; None sees everything before a token."""
        if window is None or window >= self.most_tokens:
            return _Masks(self.running_hidden, None, self.fresh_hidden, [None] * len(self.fresh))
        if window not in self.windowed:
            self.windowed[window] = self._within(window)
        return self.windowed[window]

    def _within(self, window: int) -> _Masks:
        """Return the masks that also hide the keys `window` or more tokens before each token."""
        device = self.indices.device
        prefix_keys = torch.arange(max(self.prefix_tokens), device=device)
        running, far, fresh = self.running_hidden, None, self.fresh_hidden
        far_of_fresh: list[Tensor | None] = []
        if self.running:
            own_keys = torch.arange(self.running_length, device=device)
            running = running | (own_keys <= self.own_positions[: self.running, None, None, None, None] - window)
            # (prefixes, most rows of one) -> (prefixes, 1, most rows, 1, most tokens)
            far = prefix_keys <= self.indices[self.grid][:, None, :, None, None] - window
        if self.fresh:
            own_keys = torch.arange(self.fresh_length, device=device)
            # (fresh rows, most new tokens) -> (fresh rows, 1, most new tokens, 1, fresh_length)
            fresh = fresh | (own_keys <= self.own_positions[self.fresh_grid][:, None, :, None, None] - window)
        for run in self.fresh:  # (1, 1, tokens of the run, 1, prefix_tokens)
            queries = self.indices[None, None, run.start : run.end, None, None]
            far_of_fresh.append(prefix_keys[: run.prefix_tokens] <= queries - window)
        return _Masks(running, far, fresh, far_of_fresh)


@dataclass(frozen=True)
class _Masks:
    """What a layer does not see in a step.

    Attributes:
        running: Of the running rows' own keys, as in `Plan`.
        far: Of their prefixes' keys, those outside a window, (prefixes, 1, most rows, 1, most tokens); None: none.
        fresh: Of the fresh rows' own keys, as in `Plan`.
        far_of_fresh: For each run of fresh rows, (1, 1, tokens of the run, 1, prefix_tokens) or None.
    """

    running: Tensor
    far: Tensor | None
    fresh: Tensor
    far_of_fresh: Sequence[Tensor | None]


def plan_step(
    rows: Sequence[Row],
    running: int,
    prefixes: Sequence[Prefix],
    own: KeyValues,
    keys: Prefixes,
    device: torch.device,
) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Plan a step over the new tokens of `rows`, of which the first `running` have one each.

    Args:
        rows: In the order of their slots; fresh rows of one prefix are neighbours.
        running: How many of them have all but their last, generated token cached.
        prefixes: In the order of their slots.
        own: Keys and values of the rows.
        keys: Keys and values of the prefixes.
        device: The model's.

    Returns:
        The plan, (tokens,) packed ids and positions, and (rows,) the index of each row's last packed token.
    """
    new, fresh = _pack(rows, running)

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    grid, grid_back, prefix_rows = _running_grid(rows[:running], len(prefixes))
    fresh_grid, fresh_back = _fresh_grid(rows[running:], running)
    running_length = max((len(row.ids) for row in rows[:running]), default=0)
    held = tensor([len(row.ids) for row in rows[:running]])  # (running,)
    most_new = max((len(row.ids) - row.cached for row in rows[running:]), default=0)
    fresh_length = max((len(row.ids) for row in rows[running:]), default=0)
    # (fresh rows, most_new): the position in its row of each new token, which is also the last key that it sees
    seen = tensor([row.cached for row in rows[running:]])[:, None] + torch.arange(most_new, device=device)
    plan = Plan(
        own=own,
        prefixes=keys,
        prefix_rows=prefix_rows,
        prefix_tokens=[prefix.tokens for prefix in prefixes],
        most_tokens=max(new.indices) + 1,
        indices=tensor(new.indices),
        slots=tensor(new.slots),
        own_positions=tensor(new.own_positions),
        running=running,
        running_length=running_length,
        running_hidden=torch.arange(running_length, device=device) >= held[:, None, None, None, None],
        grid=tensor(grid),
        grid_back=tensor(grid_back),
        fresh=fresh,
        fresh_rows=len(rows) - running,
        fresh_length=fresh_length,
        fresh_grid=tensor(fresh_grid),
        fresh_back=tensor(fresh_back),
        fresh_hidden=torch.arange(fresh_length, device=device) > seen[:, None, :, None, None],
    )
    return plan, tensor(new.ids), tensor(new.positions), tensor(new.last)


@dataclass
class _NewTokens:
    """What is known of each packed token of a step, and for each row the index of its last one."""

    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of its row
    own_positions: list[int] = field(default_factory=list)  # index in its row, behind the prefix
    indices: list[int] = field(default_factory=list)  # in its prompt, prefix included
    positions: list[int] = field(default_factory=list)  # as the model counts
    last: list[int] = field(default_factory=list)


def _pack(rows: Sequence[Row], running: int) -> tuple[_NewTokens, list[Fresh]]:
    """Return the new tokens of all rows, one behind the other, and the runs of fresh rows that share a prefix."""
    new, fresh = _NewTokens(), list[Fresh]()
    for slot, row in enumerate(rows):
        prefix: Any = row.prefix
        start = len(new.ids)
        new.ids += row.ids[row.cached :]
        new.slots += [slot] * (len(row.ids) - row.cached)
        new.own_positions += range(row.cached, len(row.ids))
        new.indices += range(prefix.tokens + row.cached, prefix.tokens + len(row.ids))
        new.positions += range(prefix.next_position + row.cached, prefix.next_position + len(row.ids))
        new.last.append(len(new.ids) - 1)
        if slot >= running:
            if fresh and fresh[-1].slot == prefix.slot:  # one run for neighbours with one prefix
                start = fresh.pop().start
            fresh.append(Fresh(prefix.slot, prefix.tokens, start, len(new.ids)))
    return new, fresh


def _running_grid(rows: Sequence[Row], prefixes: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Lay out the running rows by prefix.

    Returns:
        A (prefixes, most rows of one) grid of rows, for each row its index in the flattened grid, and the number of
        rows of each prefix.
    """
    by_prefix: list[list[int]] = [[] for _ in range(prefixes)]
    for slot, row in enumerate(rows):  # a running row has one packed token, whose index is the row's slot
        by_prefix[row.prefix.slot].append(slot)  # type: ignore[union-attr]
    widest = max(map(len, by_prefix), default=0)
    back = [0] * len(rows)
    for prefix_slot, slots in enumerate(by_prefix):
        for column, slot in enumerate(slots):
            back[slot] = prefix_slot * widest + column
    return [slots + [0] * (widest - len(slots)) for slots in by_prefix], back, list(map(len, by_prefix))


def _fresh_grid(rows: Sequence[Row], first: int) -> tuple[list[list[int]], list[int]]:
    """Return a (rows, most new tokens) grid of packed tokens from `first` on, and each token's index in it."""
    counts = [len(row.ids) - row.cached for row in rows]
    most = max(counts, default=0)
    grid: list[list[int]] = []
    back: list[int] = []
    for number, count in enumerate(counts):
        grid.append([*range(first, first + count), *[0] * (most - count)])
        back += range(number * most, number * most + count)
        first += count
    return grid, back


def _merged(one: Part, other: Part) -> Tensor:
    """Return the softmax over the keys of both parts, in the parts' (tokens, key heads, share, width)."""
    highest = torch.maximum(one.highest, other.highest)
    first, second = (one.highest - highest).exp_(), (other.highest - highest).exp_()
    total = (one.total * first).add_(other.total * second)
    return (one.summed * first).add_(other.summed * second).div_(total)


def _ungrid(part: Part, back: Tensor) -> Part:
    """Return (tokens, ...) of a part whose queries are a (batch, queries) grid."""
    return part.map(lambda x: x.flatten(0, 1)[back])


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: Plan,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a packed step, with the interface of transformers' attention functions.

    Args:
        module: The layer; its `layer_idx` chooses the keys and values.
        query: (1, heads, tokens, width), rotated.
        key: (1, key heads, tokens, width), rotated; written into the rows' own keys.
        value: (1, key heads, tokens, width).
        attention_mask: None.
        scaling: Factor of the scores.
        plan: The plan of the step.
        sliding_window: Of a layer that has one: a token sees itself and `sliding_window - 1` tokens before it.
        others: Further arguments of a layer: not supported.

    Returns:
        (1, tokens, heads, width) and no weights.

    Raises:
        NotImplementedError: The layer wants something else than plain causal attention.
    """
    _check_plain(others)
    own_keys, own_values = plan.own.layers[module.layer_idx]  # (slots, key heads, length, width)
    # the two index tensors select (tokens, key heads, width), since a slice stands between them
    own_keys[plan.slots, :, plan.own_positions] = key[0].transpose(0, 1)
    own_values[plan.slots, :, plan.own_positions] = value[0].transpose(0, 1)
    heads = key.shape[1]
    # (heads, tokens, width) -> (tokens, heads, width) -> (tokens, key heads, share, width)
    packed = (query[0] * scaling).transpose(0, 1).unflatten(1, (heads, -1))
    masks = plan.masks(sliding_window)
    parts = []
    if plan.running:
        parts.append(_attend_running(packed, plan, module.layer_idx, masks))
    if plan.fresh:
        parts.append(_attend_fresh(packed, plan, module.layer_idx, masks))
    # (tokens, key heads, share, width) -> (1, tokens, heads, width)
    return torch.cat(parts).flatten(1, 2).to(query.dtype)[None], None


def _attend_running(packed: Tensor, plan: Plan, layer: int, masks: _Masks) -> Tensor:
    """Return (running, key heads, share, width) of the running rows, each of which has one query."""
    keys, values = plan.own.layers[layer]
    own = attend(
        packed[: plan.running, None],  # (running, 1 query, key heads, share, width)
        keys[: plan.running, :, : plan.running_length],
        values[: plan.running, :, : plan.running_length],
        masks.running,
    )
    # (prefixes, most rows of one, key heads, share, width): the rows of a prefix are its queries
    by_prefix = packed[plan.grid]
    shared = plan.prefixes.of_rows(layer, by_prefix, plan.prefix_rows, plan.prefix_tokens, masks.far)
    return _merged(own.map(lambda x: x[:, 0]), _ungrid(shared, plan.grid_back))


def _attend_fresh(packed: Tensor, plan: Plan, layer: int, masks: _Masks) -> Tensor:
    """Return (new tokens, key heads, share, width) of the fresh rows."""
    keys, values = plan.own.layers[layer]
    rows, length = slice(plan.running, plan.running + plan.fresh_rows), plan.fresh_length
    own = attend(
        packed[plan.fresh_grid],  # (fresh rows, most new tokens, key heads, share, width)
        keys[rows, :, :length],
        values[rows, :, :length],
        masks.fresh,
    )
    by_prefix = []
    for run, far in zip(plan.fresh, masks.far_of_fresh, strict=True):
        queries = packed[None, run.start : run.end]  # (1, tokens of the run, key heads, share, width)
        part = plan.prefixes.of_tokens(layer, run.slot, queries, run.prefix_tokens, far)
        by_prefix.append(part.map(lambda x: x[0]))
    shared = Part(
        torch.cat([part.summed for part in by_prefix]),
        torch.cat([part.highest for part in by_prefix]),
        torch.cat([part.total for part in by_prefix]),
    )
    return _merged(_ungrid(own, plan.fresh_back), shared)


def _check_plain(others: Mapping[str, Any]) -> None:
    """Raise NotImplementedError where a layer wants something else than plain causal attention."""
    wishes = sorted(name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None)
    if others.get("dropout"):
        wishes.append("dropout")
    if wishes:
        raise NotImplementedError(f"attention with {', '.join(wishes)}")
