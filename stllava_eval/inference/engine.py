"""Prompts that share images -> token ids: each image encoded once, each shared prefix once, each token once.

A prompt is a prefix, which ends with the image's last token and is shared by all prompts about that image, and a
suffix of its own. The model's own forward fills the prefix's keys and values, once. Suffixes and answers then go
through the language model packed: one sequence of tokens in which every running prompt has its next token and every new
prompt has its whole suffix. `attention.shared_prefix_attention` computes for each token one softmax over the keys of
its prefix, where they are stored, and one over those of its own prompt, and merges both. So nothing is padded and no
prefix is copied, a prompt that has ended makes room at once, and in float32 the tokens are those of `generate`, one
prompt at a time.

One step: `_admit` lets waiting prompts join, `_feed` plans the packed step and computes logits, `choose_tokens` picks a
token for each row, `_leave` removes the rows that have ended. If memory is short, `_halve` repeats the step with half
as many rows.
"""

from __future__ import annotations

import gc
import inspect
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import DynamicCache, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stllava_eval.errors import InputError
from stllava_eval.inference.attention import ATTENTION, Plan, plan_step, shared_prefix_attention
from stllava_eval.inference.keys import KeyValues, prefixes_for, with_spare_slots
from stllava_eval.inference.rows import Prefix, Row
from stllava_eval.inference.sampling import choose_tokens, pixels_sha256, sampling_seed
from stllava_eval.inference.types import Prompt

ROWS = 256  # our choice: from some 128 tokens on, matrix products are within 5 % of their full rate
FRESH_TOKENS = 1024  # our choice: new suffixes that join one step, so that a step's activations stay small
AHEAD = 2  # images that are read and preprocessed while the model is at work
RECOVERED = 100  # our choice: steps after which twice as much is tried again
# the argument that takes a cache: transformers 5.24 renamed it in all its models at once
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Refused(Exception):  # noqa: N818  of an image, not of the program
    """The image of a prompt cannot become what the model takes; the message says why."""


@dataclass
class DecodingWork:
    """Tokens that went through the language model, against those of the same prompts asked one by one."""

    done: int = 0
    one_by_one: int = 0
    generated: int = 0

    @property
    def saved(self) -> float:
        """Share of the one-by-one work that sharing has saved."""
        return 1 - self.done / self.one_by_one if self.one_by_one else 0.0


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


class Engine:
    """Prompts that share images -> token ids, in the order in which answers end. Add prompts, then iterate.

    Args:
        model: A transformers image-text model: `model.model` takes ids and pixels and fills a cache, and
            `model.get_decoder()` is its text model, whose layers attend causally, some perhaps within a window.
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
        self.work = DecodingWork()
        self._waiting: OrderedDict[Hashable, deque[Row]] = OrderedDict()
        self._same: dict[Hashable, Row] = {}
        self._images: dict[Hashable, Future[dict[str, Tensor]]] = {}
        self._parent: Row | None = None
        self._refused: list[tuple[Row, Refused]] = []
        self._forget_all()

    def _forget_all(self) -> None:
        self._own, self._shared = KeyValues(), prefixes_for(self.model.device, self.model.dtype)
        self._rows: list[Row] = []
        self._ended: list[Row] = []
        self._prefixes: list[Prefix] = []

    def add(self, index: int, prompt: Prompt) -> None:
        """Add `prompt` to those that wait; iterating gives its answer with `index`.

        While iterating, prompts may be added that continue from the answer that has just come: their suffix begins with
        its prompt's suffix and answer, and what they have in common is not computed again.
        """
        same = self._same_key(prompt)
        if known := self._same.get(same):
            known.indices.append(index)
            return
        row = self._same[same] = Row(prompt, [index], list(prompt.suffix), same=same)
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

    @staticmethod
    def _same_key(prompt: Prompt) -> Hashable:
        """Return what is equal for prompts with the same answer."""
        drawn = (prompt.sampling, prompt.sample_index) if prompt.sampling else None
        return (prompt.group, prompt.suffix, prompt.max_new_tokens, prompt.stop, drawn)

    def try_tokens(self, prompt: Prompt, tokens: int) -> tuple[list[int], Tensor]:
        """Compute the first tokens of one answer; its prompt then waits, and its prefix stays filled.

        Returns:
            The token ids behind the prefix, generated ones included, and their (tokens, vocab) logits.
        """
        row = Row(prompt, [], list(prompt.suffix), same=self._same_key(prompt))
        self._same[row.same] = row
        self._waiting[prompt.group] = deque([row])
        logits = []
        with torch.inference_mode(), ThreadPoolExecutor(1) as self._reader:
            self._admit()
            for _ in range(tokens):
                logits.append(self._feed()[0][0])
                row.ids.append(int(logits[-1].argmax()))
        ids, row.ids = row.ids, list(prompt.suffix)
        self._rows.clear()
        row.prefix.users -= 1  # type: ignore[union-attr]
        self._put_back(row)
        return ids, torch.stack(logits)

    def __iter__(self) -> Iterator[tuple[int, list[int] | Refused]]:
        """Yield (index, token ids of the answer with its end token) as answers end; (index, why) if refused."""
        with ThreadPoolExecutor(1) as self._reader:
            try:
                while self._waiting or self._rows:
                    ended = self._next()
                    while self._refused:
                        row, why = self._refused.pop(0)
                        del self._same[row.same]
                        for index in row.indices:
                            yield index, why
                    for row in ended:
                        self._parent = row
                        del self._same[row.same]
                        for index in row.indices:
                            yield index, row.answer
                        self._parent = None
                    self._leave()
            finally:
                for image in self._images.values():
                    image.cancel()
                self._images.clear()

    def _next(self) -> list[Row]:
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
        """Put every row back, forget all keys and values, and continue with half as many."""
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
        logger.warning("out of memory with {} questions at work; continuing with at most {}", rows, self.most_rows)
        for row in reversed(self._rows):
            self._put_back(row)
        self._forget_all()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _put_back(self, row: Row) -> None:
        """Let a row wait again; what it has generated stays."""
        row.cached, row.inherited = 0, None
        group = row.prompt.group
        self._waiting.setdefault(group, deque()).appendleft(row)
        self._waiting.move_to_end(group, last=False)

    def _held(self, rows: int, widest: int, new_prefix: int = 0) -> int:
        """Tokens that there is room for with so many rows, the widest of `widest`, and perhaps one more prefix."""
        longest = max([new_prefix, *(prefix.tokens for prefix in self._prefixes)])
        return with_spare_slots(len(self._prefixes) + bool(new_prefix)) * longest + with_spare_slots(rows) * _room(
            widest
        )

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
            row.seed = sampling_seed(row.prompt, prefix.pixels_sha256)
            self._rows.append(row)
            widest = max(widest, row.width)
            tokens += len(row.ids) - row.cached
        by_prefix: Any = sorted(self._rows[running:], key=lambda row: row.prefix.slot)  # type: ignore[union-attr]
        self._rows[running:] = by_prefix

    def _fill(self, prompt: Prompt) -> Prefix:
        """Encode an image and store its prefix's keys and values, (1, key heads, tokens, width) for each layer."""
        inputs = self._inputs(prompt)
        cache: Any = _Filling(self.model.config.get_text_config().num_hidden_layers - 1)
        device, dtype = self.model.device, self.model.dtype
        moved = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}
        ids = torch.tensor([prompt.prefix], device=device)
        positions: list[Tensor | None] = []  # that the model gives to the prefix: with images, they may be no counter
        hook = self.model.get_decoder().register_forward_pre_hook(
            lambda _, __, named: positions.append(named.get("position_ids")), with_kwargs=True
        )
        try:
            with suppress(_Filled):
                self.model.model(input_ids=ids, use_cache=True, **{CACHE: cache}, **moved)
        finally:
            hook.remove()
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if self.batch_tokens is None:
            self.batch_tokens = _free_tokens(layers, device)
        tokens = len(prompt.prefix)
        behind = _position_behind(positions[0], tokens)
        prefix = Prefix(prompt.group, len(self._prefixes), tokens, behind, pixels_sha256(inputs))
        longest = max([prefix.tokens, *(held.tokens for held in self._prefixes)])
        self._shared.put(prefix.slot, layers, longest)
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

    def _step(self) -> list[Row]:
        """Append a token to every row; return the rows that end with it."""
        self._make_room()
        logits, which = self._feed()
        self._ended = []
        for row, token in zip(self._rows, choose_tokens(logits, which, self._rows), strict=True):
            row.ids.append(token)
            answer = row.answer
            if (
                token in self.ends
                or len(answer) >= row.prompt.max_new_tokens
                or (row.prompt.stop is not None and row.prompt.stop(answer))
            ):
                self._ended.append(row)
                self.work.generated += len(answer) * len(row.indices)
                self.work.one_by_one += (len(row.prompt.prefix) + len(row.ids) - 1) * len(row.indices)
        return self._ended

    def _feed(self) -> tuple[Tensor, list[int]]:
        """Feed the new tokens of every row to the language model in one packed step.

        Rows that are sampled from one prompt are equal until their first token: one of them is fed, and the others copy
        its keys and values.

        Returns:
            (fed rows, vocab) logits of the next token, and for each row the index of its logits.
        """
        rows = self._rows
        leaders: dict[Hashable, int] = {}
        running = next((number for number, row in enumerate(rows) if not row.is_running), len(rows))
        follows = {}  # rows that are another sampled answer to the prompt of a row before them
        for number, row in enumerate(rows[running:], running):
            first = leaders.setdefault((row.prompt.group, tuple(row.ids), row.cached), number)
            if first != number:
                follows[number] = first
        order = [number for number in range(running, len(rows)) if number not in follows] + list(follows)
        moved = {old: running + new for new, old in enumerate(order)}
        rows[running:] = [rows[number] for number in order]
        copies = {moved[number]: moved[first] for number, first in follows.items()}
        fed = rows[: len(rows) - len(copies)]
        self._own.reserve(len(rows), _room(max(len(row.ids) for row in rows)), like=self._shared.like)
        for slot, row in enumerate(fed):
            if row.inherited is not None:
                self._own.write(slot, row.inherited, row.cached)
        plan, ids, positions, last = plan_step(fed, running, self._prefixes, self._own, self._shared, self.model.device)
        hidden = self._forward(ids, positions, plan)
        logits = self.model.get_output_embeddings()(hidden[last]).float()  # (tokens, width) -> (fed rows, vocab)
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

    def _forward(self, ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Return the (tokens, width) last hidden states of a packed step."""
        decoder = self.model.get_decoder()
        before = decoder.config._attn_implementation
        decoder.config._attn_implementation = ATTENTION
        try:
            return decoder(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                plan=plan,  # (1, tokens): a batch of one
            ).last_hidden_state[0]
        finally:
            decoder.config._attn_implementation = before

    @torch.inference_mode()
    def _leave(self, idle_too: bool = False) -> None:
        """Remove the ended rows and the prefixes that nobody needs; the last row or prefix moves into each gap.

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
        idle = [prefix for prefix in self._prefixes if not prefix.users]
        for prefix in [prefix for prefix in idle if idle_too or prefix.group not in self._waiting]:
            tail_prefix = self._prefixes.pop()
            self._shared.move(tail_prefix.slot, prefix.slot, tail_prefix.tokens)
            if tail_prefix is not prefix:
                tail_prefix.slot = prefix.slot
                self._prefixes[prefix.slot] = tail_prefix


def engine_mismatch_of_class(model: Any) -> str:
    """Return why the engine cannot reproduce a model's own answers, as far as its configuration shows; else ""."""
    text = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(text, "cross_attention_layers", None):
        return "its text model reads images by cross-attention, not as tokens of the prompt"
    if getattr(text, "num_kv_shared_layers", 0):
        return "some of its layers use the keys and values of others"
    if other := sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        return f"some of its layers keep no keys and values of each token ({', '.join(other)})"
    return ""


def engine_mismatch(engine: Engine, prompt: Prompt, inputs: dict[str, Tensor]) -> str:
    """Return why an engine would not give its model's own answers; an empty text if it does.

    Two tokens are computed by both. Their logits may differ by a thousandth of their spread in float32, by a twentieth
    in half precision (our choice: some ten times what rounding does). The prompt waits in the engine afterwards, with
    its prefix filled, so that it costs one pass of the model beside the work that has to be done.

    Args:
        engine: As it will answer, with nothing at work.
        prompt: Any.
        inputs: What the model's forward takes beside the ids of the whole prompt, on its device.
    """
    model = engine.model
    if why := engine_mismatch_of_class(model):
        return why
    most = 0.001 if model.dtype == torch.float32 else 0.05
    try:
        ids, ours = engine.try_tokens(prompt, 2)
        asked = torch.tensor([[*prompt.prefix, *ids[:-1]]], device=model.device)
        others = {name: _lengthened(x, asked.shape[1]) for name, x in inputs.items()}
        with torch.inference_mode():
            own = model(input_ids=asked, use_cache=False, **others).logits[0, -2:].float()
    except Exception as error:  # whatever a model that is built otherwise raises
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    never = ours.isinf()  # suppressed tokens
    difference = ((ours - own).masked_fill(never, 0).abs().amax(-1) / own.std(-1)).max()
    return f"its logits differ by {difference:.2g} of their spread" if not difference <= most else ""


def _position_behind(positions: Tensor | None, tokens: int) -> int:
    """Return the position of the token behind a prefix.

    It is the next whole number behind the highest so far in every family that gives image tokens positions in three
    dimensions (Qwen2-VL, arXiv:2409.12191, section 2.1): a text token has the same number in all three.

    Args:
        positions: (1, tokens), or (dimensions, 1, tokens), as the text model was given them; None counts tokens.
        tokens: Of the prefix.
    """
    return tokens if positions is None else int(positions.max()) + 1


def _lengthened(values: Tensor, tokens: int) -> Tensor:
    """Repeat the last of (1, tokens) values, such as token types, for generated tokens; return others as they are."""
    short = tokens - values.shape[-1] if values.dim() == 2 else 0
    return torch.cat([values, values[:, -1:].expand(-1, short)], 1) if 0 < short < 3 else values


def _room(tokens: int) -> int:
    """Return the tokens that a row gets room for: in steps of 32, so that not every token moves all (our choice)."""
    return -(-tokens // 32) * 32


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about the device's memory, or torch's on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_tokens(layers: Sequence[tuple[Tensor, Tensor]], device: Any) -> int:
    """Return the tokens whose keys and values fit into 80 % of a GPU's free memory, or half of a CPU's (our choice)."""
    import psutil

    size = sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for of_layer in layers for tensor in of_layer)
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0] / size)
    return int(0.5 * psutil.virtual_memory().available / size)
