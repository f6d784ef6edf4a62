"""Hold the keys and values of rows and prefixes, and compute the part of a softmax that is over some of them.

The formulas of a part are in `attention`. Prefixes are held in one of two ways: `StackedPrefixes` keeps them in one
tensor per layer and attends to all of them in one product, which suits a GPU. `PackedPrefixes` keeps each prefix as
oneDNN's blocks. On a CPU the few queries of a decoding step, 1 to 17 rows of each prefix, then take half the time: a
product of 11 rows with 612 keys otherwise spends most of it on laying out the keys (benchmarks/packing.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stllava_eval.inference.packing import can_pack, grouped_product, pack_groups

# the score of a key that is not seen: its weight beside any seen key is 0, and where a window hides all keys of a part,
# the part's own softmax is finite (minus infinity would give NaN) and weighs 0 beside the other part's
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Part:
    """A softmax over a part of the keys, before its division; the module's docstring has the formulas."""

    summed: Tensor  # (batch, queries, key heads, share, width): o
    highest: Tensor  # (batch, queries, key heads, share, 1): m
    total: Tensor  # (batch, queries, key heads, share, 1): z

    def map(self, change: Callable[[Tensor], Tensor]) -> Part:
        """Return the part with each tensor changed."""
        return Part(change(self.summed), change(self.highest), change(self.total))


def attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Part:
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
        scores.view(batch, heads, count, share, -1).masked_fill_(hidden, HIDDEN)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    summed = (weights.to(values.dtype) @ values).float()
    # (batch, key heads, queries * share, n) -> (batch, queries, key heads, share, n)
    return Part(summed, highest, total).map(lambda x: x.view(batch, heads, count, share, -1).transpose(1, 2))


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


class Prefixes(ABC):
    """The keys and values of prefixes, by slot."""

    def __init__(self) -> None:
        self.like: list[tuple[Tensor, Tensor]] = []  # for each layer keys and values with its heads, width and dtype

    @abstractmethod
    def put(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], longest: int) -> None:
        """Hold (1, heads, tokens, width) keys and values of each layer in a slot; none is longer than `longest`."""

    @abstractmethod
    def move(self, source: int, target: int, tokens: int) -> None:
        """Move the prefix of `tokens` tokens in the last slot, `source`, into the slot `target`, which is given up."""

    @abstractmethod
    def of_rows(
        self, layer: int, queries: Tensor, rows: Sequence[int], tokens: Sequence[int], far: Tensor | None
    ) -> Part:
        """Attend from running rows to the prefixes that they have.

        Args:
            layer: Whose keys and values.
            queries: (prefixes, most rows of one, key heads, share, width), scaled; of each prefix the first `rows`.
            rows: Of each prefix.
            tokens: Of each prefix.
            far: Which keys are outside a query's window, (prefixes, 1, most rows, 1, most tokens); None: none.

        Returns:
            (prefixes, most rows of one, key heads, share, ...); what stands for the padding means nothing.
        """

    @abstractmethod
    def of_tokens(self, layer: int, slot: int, queries: Tensor, tokens: int, far: Tensor | None) -> Part:
        """Attend from (1, queries, key heads, share, width) to one prefix; see `of_rows`."""


class StackedPrefixes(Prefixes):
    """Prefixes in one (slots, heads, length, width) tensor of keys and one of values for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = KeyValues()
        self._padding: tuple[tuple[int, ...], Tensor | None] = ((), None)

    def put(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], longest: int) -> None:
        """See `Prefixes`."""
        self._stack.reserve(slot + 1, longest, layers)
        self._stack.write(slot, layers, layers[0][0].shape[2])
        self.like = self._stack.layers

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `Prefixes`."""
        if source != target:
            self._stack.write(target, self._stack.read(source, tokens), tokens)

    def of_rows(
        self, layer: int, queries: Tensor, rows: Sequence[int], tokens: Sequence[int], far: Tensor | None
    ) -> Part:
        """See `Prefixes`."""
        keys, values = self._stack.layers[layer]
        prefixes, longest = len(tokens), max(tokens)
        hidden = self._hidden(tuple(tokens), queries.device)
        if far is not None:
            hidden = far if hidden is None else hidden | far
        return attend(queries, keys[:prefixes, :, :longest], values[:prefixes, :, :longest], hidden)

    def _hidden(self, tokens: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return (prefixes, 1, 1, 1, most tokens), True behind the end of a prefix; None where all are equally long."""
        if self._padding[0] != tokens:
            ends = torch.tensor(tokens, device=device)[:, None, None, None, None]
            hidden = torch.arange(max(tokens), device=device) >= ends if min(tokens) < max(tokens) else None
            self._padding = tokens, hidden
        return self._padding[1]

    def of_tokens(self, layer: int, slot: int, queries: Tensor, tokens: int, far: Tensor | None) -> Part:
        """See `Prefixes`."""
        keys, values = self._stack.layers[layer]
        return attend(queries, keys[slot, None, :, :tokens], values[slot, None, :, :tokens], far)


class PackedPrefixes(Prefixes):
    """Prefixes of a network on a CPU in float32: keys and values of each as oneDNN's blocks, one group per key head."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: list[list[tuple[Any, Any]]] = []

    def put(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], longest: int) -> None:
        """See `Prefixes`."""
        # scores K q: (heads, tokens, width); summed values V' w: (heads, width, tokens)
        packed = [(pack_groups(keys[0]), pack_groups(values[0].mT)) for keys, values in layers]
        self._slots[slot:] = [packed]
        self.like = []
        for keys, values in layers:  # of no tokens, and no views: those would keep the unpacked prefix in memory
            shape = (1, keys.shape[1], 0)
            self.like.append((keys.new_empty(*shape, keys.shape[3]), values.new_empty(*shape, values.shape[3])))

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `Prefixes`."""
        self._slots[target] = self._slots[source]
        del self._slots[source]

    def of_rows(
        self, layer: int, queries: Tensor, rows: Sequence[int], tokens: Sequence[int], far: Tensor | None
    ) -> Part:
        """See `Prefixes`."""
        prefixes, most, heads, share, width = queries.shape
        part = Part(
            queries.new_empty(prefixes, most, heads, share, width),
            queries.new_empty(prefixes, most, heads, share, 1),
            queries.new_empty(prefixes, most, heads, share, 1),
        )
        for slot, (count, length) in enumerate(zip(rows, tokens, strict=True)):
            if count:
                hidden = None if far is None else far[slot, None, :, :count, :, :length]
                mine = self.of_tokens(layer, slot, queries[slot, None, :count], length, hidden)
                part.summed[slot, :count] = mine.summed[0]
                part.highest[slot, :count] = mine.highest[0]
                part.total[slot, :count] = mine.total[0]
        return part

    def of_tokens(self, layer: int, slot: int, queries: Tensor, tokens: int, far: Tensor | None) -> Part:
        """See `Prefixes`."""
        packed_keys, packed_values = self._slots[slot][layer]
        _, count, heads, share, width = queries.shape
        # (1, queries, heads, share, width) -> (heads, width, queries * share): columns of the product
        columns = queries[0].permute(1, 3, 0, 2).reshape(heads, width, count * share)
        scores = grouped_product(packed_keys, columns, tokens)  # (heads, tokens, queries * share)
        if far is not None:  # (1, 1, queries, 1, tokens) -> (1, tokens, queries, 1)
            scores.view(heads, tokens, count, share).masked_fill_(far[0, :, :, 0].mT[..., None], HIDDEN)
        highest = scores.amax(1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        summed = grouped_product(packed_values, weights, width)  # (heads, width, queries * share)

        def rows_first(x: Tensor) -> Tensor:
            """(heads, n, queries * share) -> (1, queries, heads, share, n)."""
            return x.view(heads, -1, count, share).permute(2, 0, 3, 1)[None]

        return Part(rows_first(summed), rows_first(highest), rows_first(weights.sum(1, keepdim=True)))


def prefixes_for(device: torch.device, dtype: torch.dtype) -> Prefixes:
    """Return the way of holding prefixes that suits a network."""
    return PackedPrefixes() if device.type == "cpu" and dtype == torch.float32 and can_pack() else StackedPrefixes()
