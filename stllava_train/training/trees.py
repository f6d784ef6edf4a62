"""Lay out the pairs of one image as a tree of shared prefixes, and compute attention over it.

Stage 2 has pairs of answers to one question about one image, so the image, the prompt and often the first words of the
answers are equal. Pairs -> `DpoCollator` -> trees, in which every prefix is computed once -> `share_prefixes`, whose
network returns the rows of the answers -> trl's loss, in `dpo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stllava_train.data.conversations import Conversation
from stllava_train.data.encoding import ANSWER, Encoder
from stllava_train.data.pixels import Pixels
from stllava_train.preferences.pairs import Pair, relative_weights

ATTENTION = "stllava_tree"
# all but cuDNN's, which makes a plan for every new shape, and every batch has one: on an H200 half of a step's time
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MIXED = ("aot", "aot_unpaired", "bco_pair")  # losses that sort or centre a batch's rewards: no pair has its own


# --- pairs to batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and one answer to it, as token ids; `begin` is the index of the answer's first token."""

    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Tree:
    """Token sequences laid out one after the other, without the prefixes that an earlier one has.

    Attributes:
        ids: The token ids.
        positions: The position of each token in its own sequence, for RoPE.
        paths: For each sequence the indexes of its tokens in `ids`, from its first token to its last.
        trunk_length: How many tokens at the front are one whole sequence: there, attention is plainly causal.
    """

    ids: list[int]
    positions: list[int]
    paths: list[Tensor]
    trunk_length: int

    def attention_mask(self) -> Tensor:
        """Return (tokens, tokens), True where a token (first axis) attends to another: itself and its ancestors."""
        mask = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for path in self.paths:
            # rows and columns of one sequence: causal among themselves. Shared prefixes are written again, equally.
            mask[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return mask


def tree(sequences: Sequence[Sequence[int]]) -> Tree:
    """Return the sequences as a tree of their shared prefixes.

    In sorted order a sequence shares its longest prefix with the one before it, so one look back finds it.

    >>> made = tree([[1, 2, 3], [1, 2, 4]])
    >>> made.ids, made.positions, [path.tolist() for path in made.paths], made.trunk_length
    ([1, 2, 3, 4], [0, 1, 2, 2], [[0, 1, 2], [0, 1, 3]], 3)
    """
    ids: list[int] = []
    positions: list[int] = []
    paths: list[Tensor] = [torch.empty(0)] * len(sequences)
    before: Sequence[int] = ()
    path: list[int] = []
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    for number in order:
        sequence = sequences[number]
        shared = 0
        while shared < min(len(before), len(sequence)) and before[shared] == sequence[shared]:
            shared += 1
        path = [*path[:shared], *range(len(ids), len(ids) + len(sequence) - shared)]
        ids += sequence[shared:]
        positions += range(shared, len(sequence))
        paths[number] = torch.tensor(path)
        before = sequence
    return Tree(ids, positions, paths, len(sequences[order[0]]))


class DpoCollator:
    """Make a batch of B pairs, in which every image and every shared prefix is computed once.

    For trl's loss, the chosen answers before the rejected ones; a row is the last token of a prompt and its answer:
        input_ids, attention_mask, completion_mask: (2B, width).
    For the network, as `share_prefixes` changes it, of R images:
        tree_ids, tree_positions: (R, tokens).
        tree_mask: (R, 1, rest, tokens), of the last `rest` tokens; the others attend to all tokens before them.
        pixel_values: (R, 3, side, side).
        places: (2B, width), the index of each token of `input_ids` among the R * tokens.
    For our trainer:
        pairs: (B,), indexes of the pairs.
        ref_chosen_logps, ref_rejected_logps: (B,), nats; with a cached reference.
        weights: (B,), see `relative_weights`; of pairs with weights.
        offsets: (B,), see `dpo.offsets_of`; where the loss takes them.
    """

    def __init__(self, pairs: Sequence[Pair], folder: Path, processor: Any, encoder: Encoder, padding: int) -> None:
        self.pairs, self.folder, self.encoder, self.padding = pairs, folder, encoder, padding
        self.pixels = Pixels(processor.image_processor)
        self.reference: Mapping[int, tuple[float, float]] = {}
        self.weights = relative_weights(pairs)
        self.offsets: Sequence[float] = ()
        self._encoded: dict[int, tuple[PromptAnswer, PromptAnswer]] = {}

    def encoded(self, index: int) -> tuple[PromptAnswer, PromptAnswer]:
        """Return the chosen and the rejected answer of a pair, each tokenised together with its prompt."""
        if index not in self._encoded:
            pair = self.pairs[index]
            self._encoded[index] = self._answered(pair, pair.chosen), self._answered(pair, pair.rejected)
        return self._encoded[index]

    def _answered(self, pair: Pair, answer: str) -> PromptAnswer:
        conversation = Conversation(pair.id, self.folder / pair.image, ((pair.question, answer),), pair.id)
        encoded = self.encoder(conversation, (False,))  # its question is not learnt
        return PromptAnswer(tuple(encoded.ids), encoded.kinds.index(ANSWER))

    def __call__(self, entries: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Return the batch of these entries, each with the `place` of a pair."""
        indexes = [entry["place"] for entry in entries]
        chosen, rejected = zip(*[self.encoded(index) for index in indexes], strict=True)
        chosen_images, rejected_images = zip(*[self.pairs[index].images for index in indexes], strict=True)
        answers = [*chosen, *rejected]  # trl takes the first half of a batch for the chosen answers
        images = [*chosen_images, *rejected_images]  # the two images of a pair differ only where it is a contrast
        batch = pack(answers, images, self.padding)
        batch["pixel_values"] = torch.stack([self.pixels(self.folder / image) for image in dict.fromkeys(images)])
        batch["pairs"] = torch.tensor(indexes)
        if self.reference:
            known = torch.tensor([self.reference[index] for index in indexes])  # (B, 2)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = known[:, 0], known[:, 1]
        if self.weights:
            batch["weights"] = torch.tensor([self.weights[index] for index in indexes])
        if self.offsets:
            batch["offsets"] = torch.tensor([self.offsets[index] for index in indexes])
        return batch


def pack(answers: Sequence[PromptAnswer], images: Sequence[Any], padding: int) -> dict[str, Tensor]:
    """Return the batch of `DpoCollator` without its pixels; its rows are the images in the order of their first answer.

    Args:
        answers: The chosen ones before the rejected ones, pair by pair in the same order.
        images: What each answer is about; answers about equal ones share a row.
        padding: A token id.
    """
    rows: dict[Any, list[int]] = {}  # image -> the answers about it
    for number, image in enumerate(images):
        rows.setdefault(image, []).append(number)
    trees = [tree([answers[number].ids for number in of_row]) for of_row in rows.values()]
    length = max(len(made.ids) for made in trees)
    # (R, tokens, tokens); a padding token attends to itself, because softmax over a row of nothing is NaN
    mask = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    places: list[Tensor] = [torch.empty(0)] * len(answers)
    for row, (made, of_row) in enumerate(zip(trees, rows.values(), strict=True)):
        mask[row, : len(made.ids), : len(made.ids)] = made.attention_mask()
        for number, path in zip(of_row, made.paths, strict=True):
            # from the prompt's last token, which predicts the answer's first one; rows are flattened to R * tokens
            places[number] = path[answers[number].begin - 1 :] + row * length
    scored = [torch.tensor(answer.ids[answer.begin - 1 :]) for answer in answers]

    def padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    real = padded([torch.ones_like(row) for row in scored])
    answered = real.clone()
    answered[:, 0] = 0  # (2B, width): the prompt's last token is not scored
    return {
        "input_ids": padded(scored, padding),
        "attention_mask": real,
        "completion_mask": answered,
        "tree_ids": padded([torch.tensor(made.ids) for made in trees], padding),
        "tree_positions": padded([torch.tensor(made.positions) for made in trees]),
        # the shortest trunk of the batch: in front of it, every row is plainly causal and needs no mask
        "tree_mask": mask[:, None, min(made.trunk_length for made in trees) :],
        "places": padded(places),
    }


def share_prefixes(model: Any) -> Any:
    """Return the network, adapted or not, changed to take `DpoCollator`'s batches too: trees in, answers' rows out.

    It is the backbone and not the loss that is changed, so that all of trl's losses, weights and figures hold, and
    whatever wraps the network's parts (PEFT, DDP, FSDP2) still sees its own forward.
    """
    backbone = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    whole = backbone.forward
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, tree_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    # for good, and not around each call: gradient checkpointing comes back to the layers in the backward pass
    backbone.language_model.config._attn_implementation = ATTENTION

    def forward(*given: Any, tree_ids: Tensor | None = None, **others: Any) -> Any:
        if tree_ids is None:
            return whole(*given, **others)
        places = others.pop("places")  # (2B, width)
        del others["input_ids"], others["attention_mask"]
        others["position_ids"] = others.pop("tree_positions")
        outputs = whole(input_ids=tree_ids, needed=places.flatten(), **others)  # (2B * width, hidden), see `scored`
        # back to (2B, width, hidden), so that the head and trl's loss see an ordinary batch of short rows
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(0, places.shape)
        return outputs

    last = backbone.language_model.layers[-1]
    whole_layer = last.forward

    def scored(hidden_states: Tensor, needed: Tensor | None = None, **others: Any) -> Tensor:
        """Compute the last layer, and its MLP (two thirds of its work) for the tokens that are scored alone."""
        if needed is None:
            return whole_layer(hidden_states, **others)
        attended, _ = last.self_attn(hidden_states=last.input_layernorm(hidden_states), **others)
        # (R, tokens, hidden) -> (R * tokens, hidden) -> (2B * width, hidden)
        hidden = (hidden_states + attended).flatten(0, 1).index_select(0, needed)
        return hidden + last.mlp(last.post_attention_layernorm(hidden))

    last.forward, backbone.forward = scored, forward
    return model


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tree_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention over the trees of a batch, with the signature that transformers calls.

    The tokens of the trunk are one text, for which torch has its fastest kernels: on a GPU, flash attention, which
    takes no mask and skips the half that is masked. Only the few tokens behind the trunk need the mask. Without a tree,
    this is the attention of transformers.

    Args:
        module: The attention layer.
        query: (R, heads, tokens, width of a head).
        key: (R, heads of keys, tokens, width of a head); fewer heads than `query` where heads share them.
        value: As `key`.
        mask: Of transformers; unused with a tree.
        tree_mask: (R, 1, rest, tokens), see `DpoCollator`.
        others: Of transformers; `scaling` is read.

    Returns:
        (R, tokens, heads, width of a head), and None for the attention weights.
    """
    if tree_mask is None:
        return sdpa_attention_forward(module, query, key, value, mask, **others)
    front = query.shape[2] - tree_mask.shape[2]  # tokens - rest
    shared = key.shape[1] != query.shape[1]  # grouped-query attention
    attend = partial(scaled_dot_product_attention, scale=others["scaling"], enable_gqa=shared)
    with sdpa_kernel(KERNELS):
        text = attend(query[:, :, :front], key[:, :, :front], value[:, :, :front], is_causal=True)
        branches = attend(query[:, :, front:], key, value, attn_mask=tree_mask)
    return torch.cat([text, branches], 2).transpose(1, 2), None
