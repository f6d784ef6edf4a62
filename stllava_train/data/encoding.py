"""Turn a conversation into token ids, and say which of them are learnt.

The collators of both training stages call this: conversations -> token ids and kinds -> labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stllava_eval.errors import InputError
from stllava_train.data.conversations import Conversation
from stllava_train.data.records import short

NOTHING, ANSWER, QUESTION = 0, 1, 2  # what a token is learnt as


def in_epoch(conversation: Conversation, seed: int, epoch: int) -> Conversation:
    """Return `conversation` as `epoch` sees it: the rounds of an unordered one in an order drawn for it.

    So in each epoch other questions can be learnt, and behind other rounds (our choice).
    """
    if not conversation.unordered:
        return conversation
    indices = range(len(conversation.rounds))
    return conversation.part(sorted(indices, key=lambda index: uniform(seed, epoch, conversation.id, "order", index)))


def asked(conversation: Conversation, seed: int, epoch: int, sq_r: float) -> tuple[bool, ...]:
    """Return for each round whether its question is learnt: rendered as VUSER's, not as USER's.

    A question that is not the first of an image's conversation is, with probability `sq_r` in [0, 1]. As in the
    authors' `preprocess_v1_sq2`; there the draw depends on the number of workers, here on seed, epoch, id and round
    alone.
    """
    return tuple(
        number > 0 and conversation.image is not None and uniform(seed, epoch, conversation.id, "ask", number) < sq_r
        for number in range(len(conversation.rounds))
    )


def uniform(*key: Any) -> float:
    """Return a number in [0, 1) that `key` alone decides: the first 48 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Encoded:
    """A conversation, or several of one image, as the network takes it; a list entry each for every token.

    A token sees what stands before it in its own thread and in thread 0: the prompt up to the image's end, which the
    others share. A conversation by itself is all thread 0.
    """

    ids: list[int]  # one for every vector of the image
    kinds: list[int]  # NOTHING, ANSWER or QUESTION: what it is learnt as
    positions: list[int]
    threads: list[int]


class Encoder:
    """Conversations -> token ids, through a checkpoint's processor.

    Learnt are, by character offsets in the rendered text, every answer with the space before it and its `</s>`, and
    likewise the questions in `asks`. It is the authors' masking rule (`preprocess_v1_sq2` in their train.py), which
    their code reaches by counting tokens. An answer that the conversation says is not learnt is read as the others are
    and has no loss. A conversation's own system text takes the place of the template's.

    Args:
        processor: Of the checkpoint.
        template: `v1`, or `v1_sq` whose system text speaks of asking, which the authors' stage 1 puts before every
            conversation; `either` takes one of the two by a draw, so that the model answers with the prompt it will be
            evaluated with, and asks with the one it will ask with (our choice).
        image_tokens: Vectors that an image becomes.

    Raises:
        InputError: The processor lacks the template.
    """

    def __init__(self, processor: Any, template: str, image_tokens: int) -> None:
        self.tokenizer, self.image_tokens = processor.tokenizer, image_tokens
        self.image_token = self.tokenizer.convert_tokens_to_ids("<image>")
        chat = processor.chat_template
        known = chat if isinstance(chat, dict) else {"default": chat}
        names = ("v1", "v1_sq") if template == "either" else (template,)
        if missing := [name for name in names if name not in known]:
            has = ", ".join(sorted(known))
            can = [name for name in ("v1", "v1_sq") if name in known]
            what = (
                f"Choose {' or '.join(can)}." if can else "Training needs v1 or v1_sq: start from another checkpoint."
            )
            raise InputError(f"template {missing[0]!r}: the checkpoint has {has}. {what}")
        self._templates = [known[name] for name in names]

    def __call__(self, conversation: Conversation, asks: Sequence[bool], draw: float = 0.0) -> Encoded:
        """Encode a conversation. `asks`: see `asked`. `draw`, in [0, 1], chooses the template if there is a choice.

        Raises:
            InputError: A turn holds one of the tokenizer's own tokens; or see `rendered`.
        """
        text, spans = self.rendered(conversation, asks, draw)
        # not verbose: it would warn of texts longer than the tokenizer's own limit, which is no limit here
        own = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        kinds = [NOTHING] * len(own.input_ids)
        index = 0  # of a token; spans and tokens are in the order of the text, so that one pass finds all
        for start, end, kind in spans:
            while own.offset_mapping[index][0] < start:
                index += 1
            while index < len(kinds) and own.offset_mapping[index][1] <= end:
                if own.offset_mapping[index][0] < own.offset_mapping[index][1]:  # not a token without characters
                    kinds[index] = kind
                index += 1
        ids = own.input_ids
        if ids.count(self.image_token) != (conversation.image is not None):
            raise InputError(f"{conversation.location}: {conversation.id}: it holds <image> as text. Reword it.")
        if conversation.image is not None:
            at = ids.index(self.image_token)  # one token becomes as many as the image has vectors
            ids = ids[:at] + [self.image_token] * self.image_tokens + ids[at + 1 :]
            kinds = kinds[:at] + [NOTHING] * self.image_tokens + kinds[at + 1 :]
        return Encoded(ids, kinds, list(range(len(ids))), [0] * len(ids))

    def together(self, conversation: Conversation, asks: Sequence[bool], draw: float = 0.0) -> Encoded:
        """Encode as `__call__`; but the rounds of an unordered conversation see the image and themselves, no others.

        It is then several conversations behind one copy of the image: a round whose question is learnt continues the
        round before it, as learning to ask needs, and every other one starts a conversation, as in an evaluation.
        """
        starts = [number for number, ask in enumerate(asks) if not ask]
        if not conversation.unordered or conversation.image is None or len(starts) < 2:
            return self(conversation, asks, draw)
        alone = [
            self(conversation.part(range(start, end)), asks[start:end], draw)
            for start, end in zip(starts, [*starts[1:], len(asks)], strict=True)
        ]
        # All begin alike, with the prompt up to the image's end: thread 0. What follows in each is a thread of its own,
        # at the positions that it has when it is encoded alone
        shared = alone[0].ids.index(self.image_token) + self.image_tokens
        packed = Encoded(alone[0].ids[:shared], [NOTHING] * shared, list(range(shared)), [0] * shared)
        for thread, encoded in enumerate(alone, 1):
            packed.ids.extend(encoded.ids[shared:])
            packed.kinds.extend(encoded.kinds[shared:])
            packed.positions.extend(encoded.positions[shared:])
            packed.threads.extend([thread] * len(encoded.ids[shared:]))
        return packed

    def rendered(
        self, conversation: Conversation, asks: Sequence[bool], draw: float = 0.0
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """Render the text with one `<image>`, and its learnt spans in characters: (start, end, ANSWER or QUESTION).

        The span of an answer that is not learnt is marked NOTHING.

        Raises:
            InputError: The conversation has a system text, and the template has none that it could take the place of.
        """
        messages: list[dict[str, Any]] = []
        kinds: list[int] = []
        for number, (question, answer) in enumerate(conversation.rounds):
            content: Any = question
            if conversation.image is not None and number == 0:
                content = [{"type": "image"}, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content, "ask": asks[number]})
            messages.append({"role": "assistant", "content": answer})
            learnt = ANSWER if conversation.learns(number) else NOTHING
            kinds += [QUESTION, learnt] if asks[number] else [learnt]
        template = self._templates[round(draw * (len(self._templates) - 1))]
        text, spans = self._render(template, messages)
        longer = 0  # how much the own system text moves the spans, which are all behind it
        if conversation.system is not None:
            start, own = self._system_text(conversation, template)
            text = text[:start] + conversation.system + text[start + len(own) :]
            longer = len(conversation.system) - len(own)
        return text, [(start + longer, end + longer, kind) for (start, end), kind in zip(spans, kinds, strict=True)]

    def _render(self, template: str, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Render these messages; return the text, and where the template's generation marks begin and end in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        made: Any = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (spans,) = made
        return text, spans

    def _system_text(self, conversation: Conversation, template: str) -> tuple[int, str]:
        """Return (offset, text) of the template's own: what it writes before the first message, without `<s>`.

        Raises:
            InputError: It writes nothing there.
        """
        before, _ = self._render(template, [])
        own = before.removeprefix(self.tokenizer.bos_token or "").strip()
        if not own:
            raise InputError(
                f"{conversation.location}: {conversation.id}: its system text is {short(conversation.system)}, and the "
                "checkpoint's template has none that it could replace. Put it into the first question, or take it out."
            )
        return before.index(own), own
