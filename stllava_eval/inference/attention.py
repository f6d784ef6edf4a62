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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stllava_eval.inference.rows import Prefix, Row

ATTENTION = "stllava_shared_prefix"


class KeyValues:
    """For each layer the keys and values of several sequences: two (slots, heads, length, width) tensors."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def reserve(self, slots: int, length: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make room for `slots` sequences of `length` tokens; `like` shows each layer's heads, width and dtype."""
        self.layers += [
            (key.new_empty(0, key.shape[1], 0, key.shape[3]), value.new_empty(0, value.shape[1], 0, value.shape[3]))
            for key, value in like[len(self.layers) :]
        ]
        for number, (keys, values) in enumerate(self.layers):  # layer by layer, so that only one is held twice
            room = keys.shape[0] * keys.shape[2]
            if keys.shape[0] < slots or keys.shape[2] < length or room > 2 * with_spare_slots(slots) * length:
                all_slots = with_spare_slots(slots) if keys.shape[0] else slots
                self.layers[number] = (_moved(keys, all_slots, length), _moved(values, all_slots, length))

    def write(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Write the first `tokens` of (1, heads, length, width) keys and values into a slot, for each layer."""
        for (keys, values), (key, value) in zip(self.layers, layers, strict=True):
            keys[slot, :, :tokens] = key[0, :, :tokens]
            values[slot, :, :tokens] = value[0, :, :tokens]

    def read(self, slot: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return views of a slot, (1, heads, tokens, width) keys and values for each layer."""
        return [
            (keys[slot : slot + 1, :, :tokens], values[slot : slot + 1, :, :tokens]) for keys, values in self.layers
        ]


def with_spare_slots(slots: int) -> int:
    """Return `slots` and a quarter more, so that not every further sequence moves all (our choice)."""
    return slots + slots // 4


def _moved(old: Tensor, slots: int, length: int) -> Tensor:
    """Return the first slots and tokens of `old` in a tensor of exactly (slots, heads, length, width)."""
    new = old.new_zeros(slots, old.shape[1], length, old.shape[3])  # a hidden key weighs 0, and 0 times NaN is NaN
    slots, length = min(slots, old.shape[0]), min(length, old.shape[2])
    new[:slots, :, :length] = old[:slots, :, :length]
    return new


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
    shared: KeyValues
    most_tokens: int  # of a prompt with its answer so far
    slots: Tensor  # (tokens,) slot of each packed token's row
    own_positions: Tensor  # (tokens,) position of each packed token in its row, behind the prefix
    running: int
    running_length: int  # tokens of the longest running row
    running_hidden: Tensor  # (running, 1, 1, 1, running_length)
    grid: Tensor  # (prefixes, most rows of one prefix) packed tokens of the running rows, by prefix
    grid_back: Tensor  # (running,)
    shared_length: int  # tokens of the longest prefix
    shared_hidden: Tensor | None  # (prefixes, 1, 1, 1, shared_length); None where all prefixes are equally long
    fresh: list[Fresh]
    fresh_rows: int
    fresh_length: int  # tokens of the longest fresh row
    fresh_grid: Tensor  # (fresh rows, most new tokens of one)
    fresh_back: Tensor  # (new tokens,)
    fresh_hidden: Tensor  # (fresh rows, 1, most new tokens, 1, fresh_length)


def plan_step(
    rows: Sequence[Row],
    running: int,
    prefixes: Sequence[Prefix],
    own: KeyValues,
    shared: KeyValues,
    device: torch.device,
) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Plan a step over the new tokens of `rows`, of which the first `running` have one each.

    Args:
        rows: In the order of their slots; fresh rows of one prefix are neighbours.
        running: How many of them have all but their last, generated token cached.
        prefixes: In the order of their slots.
        own: Keys and values of the rows.
        shared: Keys and values of the prefixes.
        device: The model's.

    Returns:
        The plan, (tokens,) packed ids and positions, and (rows,) the index of each row's last packed token.
    """
    ids: list[int] = []
    slots: list[int] = []
    own_positions: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    fresh: list[Fresh] = []
    for slot, row in enumerate(rows):
        prefix: Any = row.prefix
        start = len(ids)
        ids += row.ids[row.cached :]
        slots += [slot] * (len(row.ids) - row.cached)
        own_positions += range(row.cached, len(row.ids))
        positions += range(prefix.tokens + row.cached, prefix.tokens + len(row.ids))
        last.append(len(ids) - 1)
        if slot >= running:
            if fresh and fresh[-1].slot == prefix.slot:  # one run for neighbours with one prefix
                start = fresh.pop().start
            fresh.append(Fresh(prefix.slot, prefix.tokens, start, len(ids)))

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    grid, grid_back = _running_grid(rows[:running], len(prefixes))
    fresh_grid, fresh_back = _fresh_grid(rows[running:], running)
    lengths = [prefix.tokens for prefix in prefixes]
    shared_length = max(lengths)
    shared_hidden = None
    if min(lengths) < shared_length:  # (shared_length,) against (prefixes, 1, 1, 1, 1)
        shared_hidden = torch.arange(shared_length, device=device) >= tensor(lengths)[:, None, None, None, None]
    running_length = max((len(row.ids) for row in rows[:running]), default=0)
    held = tensor([len(row.ids) for row in rows[:running]])  # (running,)
    most_new = max((len(row.ids) - row.cached for row in rows[running:]), default=0)
    fresh_length = max((len(row.ids) for row in rows[running:]), default=0)
    # (fresh rows, most_new): the position in its row of each new token, which is also the last key that it sees
    seen = tensor([row.cached for row in rows[running:]])[:, None] + torch.arange(most_new, device=device)
    plan = Plan(
        own=own,
        shared=shared,
        most_tokens=int(max(positions)) + 1,
        slots=tensor(slots),
        own_positions=tensor(own_positions),
        running=running,
        running_length=running_length,
        running_hidden=torch.arange(running_length, device=device) >= held[:, None, None, None, None],
        grid=tensor(grid),
        grid_back=tensor(grid_back),
        shared_length=shared_length,
        shared_hidden=shared_hidden,
        fresh=fresh,
        fresh_rows=len(rows) - running,
        fresh_length=fresh_length,
        fresh_grid=tensor(fresh_grid),
        fresh_back=tensor(fresh_back),
        fresh_hidden=torch.arange(fresh_length, device=device) > seen[:, None, :, None, None],
    )
    return plan, tensor(ids), tensor(positions), tensor(last)


def _running_grid(rows: Sequence[Row], prefixes: int) -> tuple[list[list[int]], list[int]]:
    """Return a (prefixes, most rows of one) grid of running rows, and for each row its index in the flattened grid."""
    by_prefix: list[list[int]] = [[] for _ in range(prefixes)]
    for slot, row in enumerate(rows):  # a running row has one packed token, whose index is the row's slot
        by_prefix[row.prefix.slot].append(slot)  # type: ignore[union-attr]
    widest = max(map(len, by_prefix), default=0)
    back = [0] * len(rows)
    for prefix_slot, slots in enumerate(by_prefix):
        for column, slot in enumerate(slots):
            back[slot] = prefix_slot * widest + column
    return [slots + [0] * (widest - len(slots)) for slots in by_prefix], back


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


@dataclass(frozen=True)
class _Part:
    """A softmax over a part of the keys, before its division; the module's docstring has the formulas."""

    summed: Tensor  # (batch, queries, key heads, share, width): o
    highest: Tensor  # (batch, queries, key heads, share, 1): m
    total: Tensor  # (batch, queries, key heads, share, 1): z

    def map(self, change: Callable[[Tensor], Tensor]) -> _Part:
        return _Part(change(self.summed), change(self.highest), change(self.total))


def _part(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> _Part:
    """Return the part of a softmax that is over `keys`, in float32.

    Args:
        query: (batch, queries, key heads, share, width), scaled; `share` query heads share a key head.
        keys: (batch, key heads, keys, width).
        values: The same.
        hidden: Broadcasts to (batch, key heads, queries, share, keys); True where a key is not seen.
    """
    batch, count, heads, share, width = query.shape
    # (batch, queries, key heads, ...) -> (batch, key heads, queries * share, width): one product per key head
    flat = query.transpose(1, 2).reshape(batch, heads, count * share, width)
    # (batch, key heads, queries * share, keys) either way; a CPU's library takes up to three times as long for a few
    # rows on the left as for a few columns on the right
    scores = (keys @ flat.mT).mT.contiguous() if count * share <= 8 else flat @ keys.mT
    scores = scores.float()
    if hidden is not None:
        scores.view(batch, heads, count, share, -1).masked_fill_(hidden, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    summed = (weights.to(values.dtype) @ values).float()
    # (batch, key heads, queries * share, n) -> (batch, queries, key heads, share, n)
    return _Part(summed, highest, total).map(lambda x: x.view(batch, heads, count, share, -1).transpose(1, 2))


def _merged(one: _Part, other: _Part) -> Tensor:
    """Return the softmax over the keys of both parts, in the parts' (tokens, key heads, share, width)."""
    highest = torch.maximum(one.highest, other.highest)
    first, second = (one.highest - highest).exp_(), (other.highest - highest).exp_()
    total = (one.total * first).add_(other.total * second)
    return (one.summed * first).add_(other.summed * second).div_(total)


def _ungrid(part: _Part, back: Tensor) -> _Part:
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
        sliding_window: Of a layer that has one: not supported where it is shorter than a prompt with its answer.
        others: Further arguments of a layer: not supported.

    Returns:
        (1, tokens, heads, width) and no weights.

    Raises:
        NotImplementedError: The layer wants something else than plain causal attention.
    """
    _check_plain(plan, sliding_window, others)
    own_keys, own_values = plan.own.layers[module.layer_idx]  # (slots, key heads, length, width)
    # the two index tensors select (tokens, key heads, width), since a slice stands between them
    own_keys[plan.slots, :, plan.own_positions] = key[0].transpose(0, 1)
    own_values[plan.slots, :, plan.own_positions] = value[0].transpose(0, 1)
    heads = key.shape[1]
    # (heads, tokens, width) -> (tokens, heads, width) -> (tokens, key heads, share, width)
    packed = (query[0] * scaling).transpose(0, 1).unflatten(1, (heads, -1))
    parts = []
    if plan.running:
        parts.append(_attend_running(packed, plan, module.layer_idx))
    if plan.fresh:
        parts.append(_attend_fresh(packed, plan, module.layer_idx))
    # (tokens, key heads, share, width) -> (1, tokens, heads, width)
    return torch.cat(parts).flatten(1, 2).to(query.dtype)[None], None


def _attend_running(packed: Tensor, plan: Plan, layer: int) -> Tensor:
    """Return (running, key heads, share, width) of the running rows, each of which has one query."""
    own_keys, own_values = plan.own.layers[layer]
    keys, values = plan.shared.layers[layer]
    length, prefixes = plan.running_length, len(plan.grid)
    own = _part(
        packed[: plan.running, None],  # (running, 1 query, key heads, share, width)
        own_keys[: plan.running, :, :length],
        own_values[: plan.running, :, :length],
        plan.running_hidden,
    )
    shared = _part(
        packed[
            plan.grid
        ],  # (prefixes, most rows of one, key heads, share, width): the rows of a prefix are its queries
        keys[:prefixes, :, : plan.shared_length],
        values[:prefixes, :, : plan.shared_length],
        plan.shared_hidden,
    )
    return _merged(own.map(lambda x: x[:, 0]), _ungrid(shared, plan.grid_back))


def _attend_fresh(packed: Tensor, plan: Plan, layer: int) -> Tensor:
    """Return (new tokens, key heads, share, width) of the fresh rows."""
    own_keys, own_values = plan.own.layers[layer]
    keys, values = plan.shared.layers[layer]
    rows, length = slice(plan.running, plan.running + plan.fresh_rows), plan.fresh_length
    own = _part(
        packed[plan.fresh_grid],  # (fresh rows, most new tokens, key heads, share, width)
        own_keys[rows, :, :length],
        own_values[rows, :, :length],
        plan.fresh_hidden,
    )
    by_prefix = []
    for run in plan.fresh:
        slot, tokens = run.slot, run.prefix_tokens
        queries = packed[None, run.start : run.end]  # (1, tokens of the run, key heads, share, width)
        part = _part(queries, keys[slot, None, :, :tokens], values[slot, None, :, :tokens], None)
        by_prefix.append(part.map(lambda x: x[0]))
    shared = _Part(
        torch.cat([part.summed for part in by_prefix]),
        torch.cat([part.highest for part in by_prefix]),
        torch.cat([part.total for part in by_prefix]),
    )
    return _merged(_ungrid(own, plan.fresh_back), shared)


def _check_plain(plan: Plan, sliding_window: int | None, others: Mapping[str, Any]) -> None:
    """Raise NotImplementedError where a layer wants something else than plain causal attention."""
    wishes = sorted(name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None)
    if sliding_window is not None and plan.most_tokens > sliding_window:  # a longer window hides nothing
        wishes.append(f"a sliding window of {sliding_window} tokens")
    if others.get("dropout"):
        wishes.append("dropout")
    if wishes:
        raise NotImplementedError(f"attention with {', '.join(wishes)}")
