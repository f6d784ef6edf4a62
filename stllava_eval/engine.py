"""Prompts that share images -> token ids: each image encoded once, each shared prefix once, each token once.

A prompt is a prefix, which ends with the image's last token and is shared by all prompts about that image, and a
suffix of its own. The model's own forward fills the prefix's keys and values, once. Suffixes and answers then go
through the language model packed: one row of tokens in which every running prompt has its next one and new prompts have
their whole suffix. An attention function of ours looks for each token at the keys of its prefix, where they lie, and at
those of its own prompt, and joins both parts of the softmax. So nothing is padded and no prefix is copied, a prompt
that has ended makes room at once, and in float32 the tokens are those of `generate`, one prompt at a time.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import DynamicCache, LlamaModel, LogitsProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stllava_eval.errors import InputError

ROWS = 256  # our choice: from some 128 tokens on, matrix products are within 5 % of their full rate
FRESH_TOKENS = 1024  # our choice: new suffixes that join one step, so that a step's activations stay small
AHEAD = 2  # images that are read and preprocessed while the model is at work
RECOVERED = 100  # our choice: steps after which twice as much is tried again
GROWTH = 64  # tokens by which an answer is expected to grow at most, where its limit is further off
ATTENTION = "stllava_shared_prefix"
# the argument that takes a cache: transformers 5.24 renamed it in all its models at once
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Refused(Exception):  # noqa: N818  of an image, not of the program
    """The image of a prompt cannot become what the model takes; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `top_k` and `top_p` of 0 and 1 keep every token. Equal seeds draw equal answers."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """What the engine answers.

    Args:
        key: Equal for prompts about the same image.
        prefix: Token ids up to the image's last.
        inputs: Makes what the model's forward takes beside these ids, (1, 3, side, side) `pixel_values` for one. May
            raise `Refused`.
        suffix: Token ids behind the prefix, at least one.
        max_new_tokens: At least 1.
        sampling: None takes the likeliest token.
        draw: The number of the draw, where several answers to one prompt are drawn.
        stop: Whether an answer that ends in these ids has said all that is wanted.
    """

    key: Hashable
    prefix: tuple[int, ...]
    inputs: Callable[[], dict[str, Tensor]]
    suffix: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling | None = None
    draw: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None

    @property
    def group(self) -> Hashable:
        """Equal for prompts that share a prefix."""
        return self.key, self.prefix


@dataclass
class Work:
    """Tokens that went through the language model, against those of the same prompts asked one by one."""

    done: int = 0
    one_by_one: int = 0
    generated: int = 0

    @property
    def saved(self) -> float:
        """Share of the one-by-one work that sharing has saved."""
        return 1 - self.done / self.one_by_one if self.one_by_one else 0.0


class KeyValues:
    """For each layer the keys and values of several sequences: two (slots, heads, length, width) tensors."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def reserve(self, slots: int, length: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Room for `slots` sequences of `length` tokens; `like` has a tensor of each layer's heads, width and type."""
        self.layers += [
            (key.new_empty(0, key.shape[1], 0, key.shape[3]), value.new_empty(0, value.shape[1], 0, value.shape[3]))
            for key, value in like[len(self.layers) :]
        ]
        for number, (keys, values) in enumerate(self.layers):  # layer by layer: one is held twice at a time
            room = keys.shape[0] * keys.shape[2]
            if keys.shape[0] < slots or keys.shape[2] < length or room > 2 * _spared(slots) * length:
                all_slots = _spared(slots) if keys.shape[0] else slots
                self.layers[number] = (_moved(keys, all_slots, length), _moved(values, all_slots, length))

    def write(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Put the first `tokens` of (1, heads, length, width) keys and values into a slot."""
        for (keys, values), (key, value) in zip(self.layers, layers, strict=True):
            keys[slot, :, :tokens] = key[0, :, :tokens]
            values[slot, :, :tokens] = value[0, :, :tokens]

    def read(self, slot: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Windows on a slot, in the shape that `write` takes."""
        return [
            (keys[slot : slot + 1, :, :tokens], values[slot : slot + 1, :, :tokens]) for keys, values in self.layers
        ]


def _spared(slots: int) -> int:
    """With a quarter to spare, else each further sequence would move all."""
    return slots + slots // 4


def _moved(old: Tensor, slots: int, length: int) -> Tensor:
    """`old` in exactly this room: beginnings of sequences, and of each its first tokens."""
    new = old.new_zeros(slots, old.shape[1], length, old.shape[3])  # a hidden key weighs 0, and 0 times NaN is NaN
    slots, length = min(slots, old.shape[0]), min(length, old.shape[2])
    new[:slots, :, :length] = old[:slots, :, :length]
    return new


class _Filled(Exception):  # noqa: N818  nothing has gone wrong
    """All keys and values of a prefix are there."""


class _Filling(DynamicCache):
    """A cache that ends the forward at the last layer's keys and values: nobody reads what a prefix's tokens say.

    Spares most of one layer: a sixth of the prefix in the benchmark's network of six, a fortieth in a 7B.
    """

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **others: Any) -> Any:
        """See `DynamicCache`.

        Raises:
            _Filled: This was the last layer.
        """
        both = super().update(key_states, value_states, layer_idx, *args, **others)
        if layer_idx == self.last:
            raise _Filled
        return both


@dataclass(eq=False)
class _Prefix:
    """A prefix whose keys and values are held; `slot` is its place among them."""

    group: Hashable
    slot: int
    tokens: int
    pixels_sha256: bytes  # of what the image became, for the seeds of draws
    users: int = 0  # prompts at work that share it


@dataclass(eq=False)
class _Row:
    """A prompt at work: its place among the rows is its slot."""

    prompt: Prompt
    places: list[int]
    ids: list[int]  # behind the prefix: the suffix and what has been generated
    cached: int = 0  # of which the keys and values are held
    prefix: _Prefix | None = None
    seed: bytes = b""  # of its draws
    inherited: list[tuple[Tensor, Tensor]] | None = None  # keys and values that an earlier prompt leaves to this one
    left: list[tuple[Tensor, Tensor]] | None = None  # what it leaves to later ones
    same: Hashable = None  # equal for prompts with the same answer

    @property
    def answer(self) -> list[int]:
        return self.ids[len(self.prompt.suffix) :]

    @property
    def width(self) -> int:
        """Tokens that this row is expected to need at most."""
        rest = self.prompt.max_new_tokens - len(self.answer)
        return len(self.ids) + min(rest, GROWTH)


@dataclass
class _Plan:
    """One packed step: the next token of each of the first `running` rows, then all that is new of the rows after them.

    Indices count packed tokens, slots or, in `*_back`, places of a flattened grid.
    """

    own: KeyValues
    shared: KeyValues
    most_tokens: int  # of a prompt with its answer so far
    slots: Tensor  # (tokens,) of each packed token's row
    places: Tensor  # (tokens,) behind the prefix
    running: int
    running_length: int
    running_hidden: Tensor  # (running, 1, 1, 1, running_length): keys that a row has not
    grid: Tensor  # (prefixes, most rows of one) packed tokens of the running rows, by prefix
    grid_back: Tensor  # (running,)
    shared_length: int
    shared_hidden: Tensor | None  # (prefixes, 1, 1, 1, shared_length), where lengths differ
    fresh: list[tuple[int, int, int, int]]  # prefix slot, its tokens, first and last + 1 packed token that look at it
    fresh_rows: int
    fresh_length: int
    fresh_grid: Tensor  # (fresh rows, most new tokens of one)
    fresh_back: Tensor  # (new tokens,)
    fresh_hidden: Tensor  # (fresh rows, 1, most new tokens, 1, fresh_length)


_Part = tuple[Tensor, Tensor, Tensor]


def _part(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> _Part:
    """One part of a softmax: (batch, heads, queries, width) sums of values, their largest score, and sum of weights.

    Args:
        query: (batch, queries, key heads, queries of a key head, width), scaled.
        keys: (batch, key heads, keys, width).
        values: The same.
        hidden: Broadcast to (batch, key heads, queries, queries of a key head, keys); True where a key is not seen.
    """
    batch, count, heads, share, width = query.shape
    few = query.transpose(1, 2).reshape(batch, heads, count * share, width)
    # for a few queries a CPU's library takes up to three times as long the other way round
    scores = (keys @ few.mT).mT.contiguous() if count * share <= 8 else few @ keys.mT
    scores = scores.float()
    if hidden is not None:
        scores.view(batch, heads, count, share, -1).masked_fill_(hidden, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    summed = (weights.to(values.dtype) @ values).float()
    return tuple(  # type: ignore[return-value]
        part.view(batch, heads, count, share, -1).transpose(1, 2) for part in (summed, highest, total)
    )


def _joined(one: _Part, two: _Part) -> Tensor:
    """(tokens, key heads, queries of a key head, width): the softmax over both parts' keys."""
    highest = torch.maximum(one[1], two[1])
    first, second = (one[1] - highest).exp_(), (two[1] - highest).exp_()
    return (one[0] * first).add_(two[0] * second).div_((one[2] * first).add_(two[2] * second))


def _flat(part: _Part, back: Tensor) -> _Part:
    """(tokens, ...) of a part on a (batch, queries, ...) grid."""
    return tuple(tensor.flatten(0, 1)[back] for tensor in part)  # type: ignore[return-value]


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: _Plan,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of attention functions, over a packed step; see `_Plan` and the module.

    Args:
        module: The layer; its `layer_idx` chooses the keys and values.
        query: (1, heads, tokens, width), rotated.
        key: (1, key heads, tokens, width), rotated; written into the rows' own keys.
        value: (1, key heads, tokens, width).
        attention_mask: None.
        scaling: Of the scores.
        plan: Of the step.
        sliding_window: Of a layer that has one: not supported where it is shorter than a prompt with its answer.
        others: A layer's further wishes: not supported.

    Returns:
        (1, tokens, heads, width) and no weights.

    Raises:
        NotImplementedError: The layer wants something else than plain causal attention.
    """
    wishes = sorted(name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None)
    if sliding_window is not None and plan.most_tokens > sliding_window:  # a longer window hides nothing
        wishes.append(f"a sliding window of {sliding_window} tokens")
    if others.get("dropout"):
        wishes.append("dropout")
    if wishes:
        raise NotImplementedError(f"attention with {', '.join(wishes)}")
    own_keys, own_values = plan.own.layers[module.layer_idx]
    keys, values = plan.shared.layers[module.layer_idx]
    own_keys[plan.slots, :, plan.places] = key[0].transpose(0, 1)
    own_values[plan.slots, :, plan.places] = value[0].transpose(0, 1)
    heads = key.shape[1]
    packed = (query[0] * scaling).transpose(0, 1).unflatten(1, (heads, -1))  # (tokens, key heads, share, width)
    parts = []
    if plan.running:
        length, count = plan.running_length, len(plan.grid)
        apart = _part(
            packed[: plan.running, None],
            own_keys[: plan.running, :, :length],
            own_values[: plan.running, :, :length],
            plan.running_hidden,
        )
        common = _part(
            packed[plan.grid],
            keys[:count, :, : plan.shared_length],
            values[:count, :, : plan.shared_length],
            plan.shared_hidden,
        )
        alone: Any = tuple(tensor[:, 0] for tensor in apart)
        parts.append(_joined(alone, _flat(common, plan.grid_back)))
    if plan.fresh:
        rows, length = slice(plan.running, plan.running + plan.fresh_rows), plan.fresh_length
        apart = _flat(
            _part(packed[plan.fresh_grid], own_keys[rows, :, :length], own_values[rows, :, :length], plan.fresh_hidden),
            plan.fresh_back,
        )
        of_prefixes = [
            _part(packed[None, start:end], keys[slot, None, :, :tokens], values[slot, None, :, :tokens], None)
            for slot, tokens, start, end in plan.fresh
        ]
        together: Any = tuple(torch.cat([part[number][0] for part in of_prefixes]) for number in range(3))
        parts.append(_joined(apart, together))
    return torch.cat(parts).flatten(1, 2).to(query.dtype)[None], None


class Engine:
    """Prompts that share images -> token ids, in the order in which answers end. Add prompts, then iterate.

    Args:
        model: A transformers image-text model: `model.model` takes ids and pixels and fills a cache, and
            `model.model.language_model` is a decoder with causal attention and one position a token.
        ends: Token ids that end an answer.
        suppressed: Token ids that are never generated.
        rows: Prompts at work at a time, at most.
        batch_tokens: Tokens whose keys and values are held at a time; None finds it from the free memory.
    """

    def __init__(
        self,
        model: Any,
        ends: set[int],
        suppressed: Sequence[int] = (),
        rows: int = ROWS,
        batch_tokens: int | None = None,
    ) -> None:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, shared_prefix_attention)
        self.model, self.ends = model, ends
        self.suppressed = torch.tensor(sorted(suppressed), dtype=torch.long, device=model.device)
        self.most_rows = rows
        self.batch_tokens = batch_tokens
        self._whole: tuple[int, int | None] | None = None  # both, before memory was short
        self._steps = 0  # since then
        self.work = Work()
        self._waiting: OrderedDict[Hashable, deque[_Row]] = OrderedDict()
        self._same: dict[Hashable, _Row] = {}
        self._images: dict[Hashable, Future[dict[str, Tensor]]] = {}
        self._parent: _Row | None = None
        self._refused: list[tuple[_Row, Refused]] = []
        self._forget_all()

    def _forget_all(self) -> None:
        self._own, self._shared = KeyValues(), KeyValues()
        self._rows: list[_Row] = []
        self._ended: list[_Row] = []
        self._prefixes: list[_Prefix] = []

    def add(self, place: int, prompt: Prompt) -> None:
        """Wait for an answer to `prompt`; it comes under `place`.

        While iterating, prompts may be added that go on from the answer that has just come: their suffix begins with
        its prompt's suffix and answer, and what they have in common is not computed again.
        """
        drawn = (prompt.sampling, prompt.draw) if prompt.sampling else None
        same = (prompt.group, prompt.suffix, prompt.max_new_tokens, prompt.stop, drawn)
        if known := self._same.get(same):
            known.places.append(place)
            return
        row = self._same[same] = _Row(prompt, [place], list(prompt.suffix), same=same)
        queue = self._waiting.setdefault(prompt.group, deque())
        parent = self._parent
        if parent is None or parent.prompt.group != prompt.group:
            queue.append(row)
            return
        shared = 0
        for one, other in zip(parent.ids[: parent.cached], row.ids[:-1], strict=False):  # one token is to be fed
            if one != other:
                break
            shared += 1
        if shared and parent.left is None:
            try:
                kept = self._own.read(self._rows.index(parent), parent.cached)
                parent.left = [(key.clone(), value.clone()) for key, value in kept]
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        if shared and parent.left is not None:
            row.inherited, row.cached = parent.left, shared
        queue.append(row)
        self._waiting.move_to_end(prompt.group, last=False)  # while its prefix is held

    def __iter__(self) -> Iterator[tuple[int, list[int] | Refused]]:
        """(place, token ids of the answer, its end token included), as answers end; for a refused image, why."""
        with ThreadPoolExecutor(1) as self._reader:
            try:
                while self._waiting or self._rows:
                    ended = self._next()
                    while self._refused:
                        row, why = self._refused.pop(0)
                        del self._same[row.same]
                        for place in row.places:
                            yield place, why
                    for row in ended:
                        self._parent = row
                        del self._same[row.same]
                        for place in row.places:
                            yield place, row.answer
                        self._parent = None
                    self._leave()
            finally:
                for image in self._images.values():
                    image.cancel()
                self._images.clear()

    def _next(self) -> list[_Row]:
        """The rows that end with the next step, which is tried with half of what was at work if memory is short."""
        while True:
            try:
                with torch.inference_mode():
                    self._admit()
                    if not self._rows:  # the images of all that waited were refused
                        return []
                    ended = self._step()
                    self._steps += 1
                    if self._steps == RECOVERED and self._whole:
                        self._double(*self._whole)
                    return ended
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._halve(reason)

    def _double(self, rows: int, tokens: int | None) -> None:
        """Try twice as many again, up to what was allowed before memory was short."""
        self.most_rows, self._steps = min(rows, 2 * self.most_rows), 0
        if self.batch_tokens is not None:
            self.batch_tokens = 2 * self.batch_tokens if tokens is None else min(tokens, 2 * self.batch_tokens)

    def _halve(self, reason: str) -> None:
        """Put every row back, forget all keys and values, and go on with half as many."""
        rows = len(self._rows)
        held = self._held(rows, max((row.width for row in self._rows), default=0))
        if self.most_rows == 1:
            raise InputError(
                f"one question at a time does not fit into memory ({reason}). Pass dtype=bfloat16, or another device."
            )
        self._whole = self._whole or (self.most_rows, self.batch_tokens)
        # with nothing at work, it was an image or its prefix that did not fit beside what was held
        self.most_rows = max(1, (rows or self.most_rows) // 2)
        held = held or self.batch_tokens or 0
        self.batch_tokens, self._steps = held // 2 or None, 0
        logger.warning("out of memory with {} questions at work; going on with {} at most", rows, self.most_rows)
        for row in reversed(self._rows):
            self._put_back(row)
        self._forget_all()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _put_back(self, row: _Row) -> None:
        """Let a row wait again; what it has generated stays."""
        row.cached, row.inherited = 0, None
        group = row.prompt.group
        self._waiting.setdefault(group, deque()).appendleft(row)
        self._waiting.move_to_end(group, last=False)

    def _held(self, rows: int, widest: int, new_prefix: int = 0) -> int:
        """Tokens that there is room for with so many rows, the widest of `widest`, and perhaps one more prefix."""
        longest = max([new_prefix, *(prefix.tokens for prefix in self._prefixes)])
        return _spared(len(self._prefixes) + bool(new_prefix)) * longest + _spared(rows) * _room(widest)

    def _admit(self) -> None:
        """Let waiting rows join, as far as there is room; the first one always."""
        running, tokens = len(self._rows), 0
        widest = max((row.width for row in self._rows), default=0)
        while self._waiting and len(self._rows) < self.most_rows and tokens < FRESH_TOKENS:
            group, queue = next(iter(self._waiting.items()))
            prefix = next((prefix for prefix in self._prefixes if prefix.group == group), None)
            row = queue[0]
            if self._rows and self.batch_tokens is not None:
                new = 0 if prefix else len(row.prompt.prefix)
                if self._held(len(self._rows) + 1, max(widest, row.width), new) > self.batch_tokens:
                    break
            if prefix is None:
                try:
                    prefix = self._fill(row.prompt)
                except Refused as why:
                    del self._waiting[group]
                    self._refused += [(row, why) for row in queue]
                    continue
            queue.popleft()
            if not queue:
                del self._waiting[group]
            row.prefix = prefix
            prefix.users += 1
            row.seed = _seed(row.prompt, prefix.pixels_sha256)
            self._rows.append(row)
            widest = max(widest, row.width)
            tokens += len(row.ids) - row.cached
        by_prefix: Any = sorted(self._rows[running:], key=lambda row: row.prefix.slot)  # type: ignore[union-attr]
        self._rows[running:] = by_prefix

    def _fill(self, prompt: Prompt) -> _Prefix:
        """Encode an image and compute its prefix's keys and values."""
        inputs = self._inputs(prompt)
        cache: Any = _Filling(self.model.config.get_text_config().num_hidden_layers - 1)
        device, dtype = self.model.device, self.model.dtype
        moved = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}
        ids = torch.tensor([prompt.prefix], device=device)
        with suppress(_Filled):
            self.model.model(input_ids=ids, use_cache=True, **{CACHE: cache}, **moved)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if self.batch_tokens is None:
            self.batch_tokens = _free_tokens(layers, device)
        prefix = _Prefix(prompt.group, len(self._prefixes), len(prompt.prefix), pixels_sha256(inputs))
        longest = max([prefix.tokens, *(one.tokens for one in self._prefixes)])
        self._shared.reserve(prefix.slot + 1, longest, layers)
        self._shared.write(prefix.slot, layers, prefix.tokens)
        self._prefixes.append(prefix)
        self.work.done += prefix.tokens
        return prefix

    def _inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The image of a prompt, read before it was due; those of the next groups are begun."""
        ahead = iter(self._waiting.items())
        for (group, queue), _ in zip(ahead, range(AHEAD + 1), strict=False):
            if group not in self._images and not any(prefix.group == group for prefix in self._prefixes):
                self._images[group] = self._reader.submit(queue[0].prompt.inputs)
        return self._images.pop(prompt.group).result()

    def _step(self) -> list[_Row]:
        """Append a token to every row and return those that have ended."""
        self._make_room()
        logits, which = self._feed()
        self._ended = []
        for row, token in zip(self._rows, _choose(logits, which, self._rows), strict=True):
            row.ids.append(token)
            answer = row.answer
            if (
                token in self.ends
                or len(answer) >= row.prompt.max_new_tokens
                or (row.prompt.stop is not None and row.prompt.stop(answer))
            ):
                self._ended.append(row)
                self.work.generated += len(answer) * len(row.places)
                self.work.one_by_one += (len(row.prompt.prefix) + len(row.ids) - 1) * len(row.places)
        return self._ended

    def _feed(self) -> tuple[Tensor, list[int]]:
        """Feed every row what is new of it: logits of next tokens, and for each row which of them are its own."""
        rows = self._rows
        leaders: dict[Hashable, int] = {}
        running = next((number for number, row in enumerate(rows) if not _runs(row)), len(rows))
        follows = {}  # rows that are another draw of a row before them
        for number, row in enumerate(rows[running:], running):
            first = leaders.setdefault((row.prompt.group, tuple(row.ids), row.cached), number)
            if first != number:
                follows[number] = first
        order = [number for number in range(running, len(rows)) if number not in follows] + list(follows)
        moved = {old: running + new for new, old in enumerate(order)}
        rows[running:] = [rows[number] for number in order]
        copies = {moved[number]: moved[first] for number, first in follows.items()}
        fed = rows[: len(rows) - len(copies)]
        self._own.reserve(len(rows), _room(max(len(row.ids) for row in rows)), like=self._shared.layers)
        for slot, row in enumerate(fed):
            if row.inherited is not None:
                self._own.write(slot, row.inherited, row.cached)
        plan, ids, positions, last = self._plan(fed, running)
        hidden = self._forward(ids, positions, plan)
        logits = self.model.get_output_embeddings()(hidden[last]).float()
        if len(self.suppressed):
            logits[:, self.suppressed] = float("-inf")
        for slot, first in copies.items():
            self._own.write(slot, self._own.read(first, len(rows[slot].ids)), len(rows[slot].ids))
        for row in rows:
            row.cached, row.inherited = len(row.ids), None
        self.work.done += len(ids)
        return logits, list(range(len(fed))) + list(copies.values())

    def _make_room(self) -> None:
        """Put the last rows back if answers have grown beyond the tokens that may be held."""
        while len(self._rows) > 1 and self.batch_tokens is not None:
            if self._held(len(self._rows), max(len(row.ids) for row in self._rows)) <= self.batch_tokens:
                return
            self._ended = [self._rows[-1]]
            self._put_back(self._rows[-1])
            self._leave(idle_too=True)

    def _plan(self, rows: Sequence[_Row], running: int) -> tuple[_Plan, Tensor, Tensor, Tensor]:
        """The plan of a step, its (tokens,) ids and positions, and (rows,) each row's last packed token."""
        device = self.model.device
        ids: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        fresh: list[tuple[int, int, int, int]] = []
        for slot, row in enumerate(rows):
            prefix: Any = row.prefix
            start = len(ids)
            count = len(row.ids) - row.cached
            ids += row.ids[row.cached :]
            slots += [slot] * count
            places += range(row.cached, len(row.ids))
            positions += range(prefix.tokens + row.cached, prefix.tokens + len(row.ids))
            last.append(len(ids) - 1)
            if slot >= running:
                if fresh and fresh[-1][0] == prefix.slot:
                    start = fresh.pop()[2]
                fresh.append((prefix.slot, prefix.tokens, start, len(ids)))
        by_prefix: list[list[int]] = [[] for _ in self._prefixes]
        for slot, row in enumerate(rows[:running]):
            by_prefix[row.prefix.slot].append(slot)  # type: ignore[union-attr]
        widest = max(map(len, by_prefix), default=0)
        back = [0] * running
        for number, of_prefix in enumerate(by_prefix):
            for place, slot in enumerate(of_prefix):
                back[slot] = number * widest + place
        grid = [of_prefix + [0] * (widest - len(of_prefix)) for of_prefix in by_prefix]
        lengths = [prefix.tokens for prefix in self._prefixes]
        longest = max(lengths)

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        running_length = max((len(row.ids) for row in rows[:running]), default=0)
        held = tensor([len(row.ids) for row in rows[:running]])
        new = [len(row.ids) - row.cached for row in rows[running:]]
        most, fresh_length = max(new, default=0), max((len(row.ids) for row in rows[running:]), default=0)
        first = running
        fresh_grid: list[list[int]] = []
        fresh_back: list[int] = []
        for number, count in enumerate(new):
            fresh_grid.append([*range(first, first + count), *[0] * (most - count)])
            fresh_back += range(number * most, number * most + count)
            first += count
        seen = tensor([row.cached for row in rows[running:]])[:, None] + torch.arange(most, device=device)
        shared_hidden = None
        if min(lengths) < longest:
            shared_hidden = torch.arange(longest, device=device) >= tensor(lengths)[:, None, None, None, None]
        plan = _Plan(
            own=self._own,
            shared=self._shared,
            most_tokens=int(max(positions)) + 1,
            slots=tensor(slots),
            places=tensor(places),
            running=running,
            running_length=running_length,
            running_hidden=torch.arange(running_length, device=device) >= held[:, None, None, None, None],
            grid=tensor(grid),
            grid_back=tensor(back),
            shared_length=longest,
            shared_hidden=shared_hidden,
            fresh=fresh,
            fresh_rows=len(new),
            fresh_length=fresh_length,
            fresh_grid=tensor(fresh_grid),
            fresh_back=tensor(fresh_back),
            fresh_hidden=torch.arange(fresh_length, device=device) > seen[:, None, :, None, None],
        )
        return plan, tensor(ids), tensor(positions), tensor(last)

    def _forward(self, ids: Tensor, positions: Tensor, plan: _Plan) -> Tensor:
        """(tokens, width) last hidden states of a packed step."""
        decoder = self.model.model.language_model
        before = decoder.config._attn_implementation
        decoder.config._attn_implementation = ATTENTION
        try:
            return decoder(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, plan=plan
            ).last_hidden_state[0]
        finally:
            decoder.config._attn_implementation = before

    @torch.inference_mode()
    def _leave(self, idle_too: bool = False) -> None:
        """Take the ended rows out, and the prefixes that nobody needs; what is last moves into the gap.

        Args:
            idle_too: Also take out the prefixes for which prompts wait while none is at work.
        """
        for row in self._ended:
            slot = self._rows.index(row)
            tail = self._rows.pop()
            if tail is not row:
                self._own.write(slot, self._own.read(len(self._rows), tail.cached), tail.cached)
                self._rows[slot] = tail
            row.prefix.users -= 1  # type: ignore[union-attr]
        self._ended = []
        idle = [one for one in self._prefixes if not one.users]
        for prefix in [one for one in idle if idle_too or one.group not in self._waiting]:
            tail_prefix = self._prefixes.pop()
            if tail_prefix is not prefix:
                self._shared.write(
                    prefix.slot, self._shared.read(tail_prefix.slot, tail_prefix.tokens), tail_prefix.tokens
                )
                tail_prefix.slot = prefix.slot
                self._prefixes[prefix.slot] = tail_prefix


def misfit_at_once(model: Any) -> str:
    """Return why the engine cannot reproduce a model's own answers, as far as its class shows; else an empty text."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if hasattr(getattr(model, "model", None), "get_rope_index"):
        return "its image tokens have positions in three dimensions"
    return ""


def misfit(model: Any, prompt: Prompt, inputs: dict[str, Tensor]) -> str:
    """Why the engine would not give this model's own answers; empty if it does.

    Two tokens are computed by both. Their logits may differ by a thousandth of their spread in float32, by a twentieth
    in half precision (our choice: some ten times what rounding does).

    Args:
        model: As `Engine` takes it.
        prompt: Any.
        inputs: What the model's forward takes beside the ids of the whole prompt, on its device.
    """
    if why := misfit_at_once(model):
        return why
    ids = [*prompt.prefix, *prompt.suffix]
    most = 0.001 if model.dtype == torch.float32 else 0.05
    try:
        engine = Engine(model, set(), rows=1)
        engine.add(0, prompt)
        with torch.inference_mode(), ThreadPoolExecutor(1) as engine._reader:
            engine._admit()
            for _ in range(2):
                logits, _ = engine._feed()
                asked = torch.tensor([ids], device=model.device)
                others = {name: _lengthened(x, len(ids)) for name, x in inputs.items()}
                own = model(input_ids=asked, use_cache=False, **others).logits[0, -1].float()
                if (difference := (logits[0] - own).abs().max() / own.std()) > most:
                    return f"its logits differ by {difference:.2g} of their spread"
                token = int(own.argmax())
                ids.append(token)
                engine._rows[0].ids.append(token)
    except Exception as error:  # whatever a model that is built otherwise raises
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _lengthened(values: Tensor, tokens: int) -> Tensor:
    """Values per token of a prompt, such as token types, go on with the last one; others stay."""
    short = tokens - values.shape[-1] if values.dim() == 2 else 0
    return torch.cat([values, values[:, -1:].expand(-1, short)], 1) if 0 < short < 3 else values


def _room(tokens: int) -> int:
    """Tokens that a row gets room for: in steps of 32, so that not every token moves all rows."""
    return -(-tokens // 32) * 32


def _runs(row: _Row) -> bool:
    """Whether all but the last token of a row, which has been generated, is computed."""
    return row.cached == len(row.ids) - 1 and row.inherited is None and bool(row.answer)


def pixels_sha256(inputs: dict[str, Tensor]) -> bytes:
    """Hash the pixels that an image became."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(inputs[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _seed(prompt: Prompt, of_pixels: bytes) -> bytes:
    """What depends on the seed, the image, the prompt and the number of the draw, and on nothing else."""
    if prompt.sampling is None:
        return b""
    told = f"{prompt.sampling.seed} {prompt.draw} {prompt.prefix} {prompt.suffix}".encode()
    return hashlib.sha256(told + of_pixels).digest()


class Choice(LogitsProcessor):
    """The engine's choice of tokens, for transformers' `generate`: every other token of a row becomes impossible.

    Args:
        rows: For each row of the batch its prompt and, where it is drawn, the `pixels_sha256` of its image.
        start: Tokens of the padded prompts.
        suppressed: Token ids that are never generated.
    """

    def __init__(self, rows: Sequence[tuple[Prompt, bytes]], start: int, suppressed: Sequence[int]) -> None:
        self.start, self.suppressed = start, list(suppressed)
        self.rows = [_Row(prompt, [], [], seed=_seed(prompt, of_pixels)) for prompt, of_pixels in rows]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(rows, vocab) scores, of which one in each row is not minus infinity."""
        for row, generated in zip(self.rows, input_ids[:, self.start :].tolist(), strict=True):
            row.ids = [*row.prompt.suffix, *generated]
        if self.suppressed:
            scores[:, self.suppressed] = float("-inf")
        tokens = torch.tensor(_choose(scores, range(len(self.rows)), self.rows), device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _choose(logits: Tensor, which: Sequence[int], rows: Sequence[_Row]) -> list[int]:
    """A token for each row, from row `which` of the logits."""
    tokens = logits.argmax(-1)[torch.tensor(which, device=logits.device)].tolist()
    by_sampling: dict[tuple[float, int, float], list[int]] = {}
    for number, row in enumerate(rows):
        if sampling := row.prompt.sampling:
            settings = (sampling.temperature, sampling.top_k, sampling.top_p)
            by_sampling.setdefault(settings, []).append(number)
    for settings, numbers in by_sampling.items():
        of = logits[torch.tensor([which[number] for number in numbers], device=logits.device)]
        # by the token's place: a step that is tried again, after memory was short, draws the same
        uniform = [
            random.Random(rows[number].seed + len(rows[number].ids).to_bytes(4, "big")).random() for number in numbers
        ]
        for number, token in zip(numbers, draw(of, *settings, uniform), strict=True):
            tokens[number] = token
    return tokens


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Sequence[float]) -> list[int]:
    """One token a row: temperature, then the `top_k` likeliest, then the fewest that have `top_p` of the probability.

    Args:
        logits: (rows, vocab).
        temperature: Above 0.
        top_k: 0 keeps every token.
        top_p: Above 0; 1 keeps every token. A token that crosses the share is kept, as in transformers.
        uniform: A number in [0, 1) for each row: which token of the cumulated probabilities, in the order of ids, so
            that rounding of the logits hardly ever changes the choice.
    """
    kept, ids = (logits / temperature).topk(min(top_k or logits.shape[1], logits.shape[1]))  # sorted
    shares = kept.double().softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= top_p, 0.0)
    ids, order = ids.sort(-1)
    cumulated = shares.gather(-1, order).cumsum(-1)
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
    return ids.gather(-1, torch.searchsorted(cumulated, wanted, right=True).clamp_max(ids.shape[1] - 1))[:, 0].tolist()


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about the device's memory, or torch's on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_tokens(layers: Sequence[tuple[Tensor, Tensor]], device: Any) -> int:
    """Tokens whose keys and values fit into the free memory: 80 % of a GPU's, half of a CPU's (our choice)."""
    import psutil

    size = sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for of_layer in layers for tensor in of_layer)
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0] / size)
    return int(0.5 * psutil.virtual_memory().available / size)
