"""A LLaVA-style JSON file -> checked conversations -> token ids, and which of them are learnt."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.home import once, read_text
from stllava_train.columns import columns_of, under_our_names
from stllava_train.record import Turn, read_picture, read_system, read_turns, short, tags

NOTHING, ANSWER, QUESTION = 0, 1, 2  # what a token is learnt as
FOLDER_OR_OUT = "Pass the folder of the images with --images, or leave the record out."
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
HALF = re.compile("[\ud800-\udfff]")  # a character cut in two
ROLE = re.compile(r"\b(?:V?USER|ASSISTANT):")


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about one image, or about none.

    Attributes:
        id: The record's own; with a number behind it where another conversation has the same, see `numbered`.
        image: The image's file, or None for text alone. It stands before the first question.
        rounds: (question, answer), stripped, without the image's tag.
        place: `FILE:LINE`, for messages; see `records`.
        unordered: The record's key `unordered`: its rounds are questions of a data set that do not build on each other.
        system: The record's own system text, in the place of the template's; None leaves the template's.
        learnt: Whether the answer of each round is learnt; None where all are. See `record.Turn`.
    """

    id: str
    image: Path | None
    rounds: tuple[tuple[str, str], ...]
    place: str
    unordered: bool = False
    system: str | None = None
    learnt: tuple[bool, ...] | None = None

    def part(self, places: Sequence[int]) -> Conversation:
        """The rounds at these places, in this order, as a conversation."""
        learnt = None if self.learnt is None else tuple(self.learnt[place] for place in places)
        return replace(self, rounds=tuple(self.rounds[place] for place in places), learnt=learnt)

    def learns(self, place: int) -> bool:
        """Whether the answer of the round at `place` is learnt."""
        return self.learnt is None or self.learnt[place]

    @property
    def content(self) -> tuple[Any, ...]:
        """What is learnt of it beside its image: two with the same are one twice."""
        return self.rounds, self.system, self.learnt


@dataclass(frozen=True)
class Problem:
    """What is wrong with a record, and what would be right."""

    place: str  # see `records`
    id: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.id or 'a record'}: {self.what}"


def read_conversations(file: Path, images: Path | None = None) -> tuple[list[Conversation], list[Problem]]:
    """The sound records of `file`, in its order, and every problem of the others.

    The format is LLaVA's: a JSON array, or a record a line, of `{"id", "image", "conversations": [{"from": "human",
    "value": ...}, {"from": "gpt", "value": ...}, ...]}`; or that of OpenAI, Qwen, trl, LLaMA-Factory and ms-swift:
    `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "images": [...]}`, where a
    content is a text or parts of text and image; or LLaMA-Factory's Alpaca format. Columns may have other names where
    its `dataset_info.json` maps them. See `record` and `columns`. Turns are stripped. As in the authors'
    `preprocess_multimodal` the image comes first whatever the place of its tag in the first turn. A record without
    `id` gets its number in the file.

    Args:
        file: JSON or JSONL.
        images: The folder that images are relative to (default: that of `file`).

    Raises:
        InputError: The file is missing, a pipe, no UTF-8 or no JSON, or holds no record.
    """
    (sound,), problems = read_files([file], images)
    return sound, problems


def read_files(files: Sequence[Path], images: Path | None = None) -> tuple[list[list[Conversation]], list[Problem]]:
    """The sound records of each file, and every problem of all. See `read_conversations`, and `numbered` for ids."""
    read: list[list[Conversation]] = []
    problems: list[Problem] = []
    for file in files:
        folder = file.parent if images is None else images
        of: list[Conversation] = []
        number = 0
        for number, (place, record) in enumerate(records(file), 1):
            wrong: list[str] = []
            conversation = _conversation(record, number, place, folder, wrong)
            problems += [Problem(place, conversation.id, what) for what in wrong]
            if not wrong:
                of.append(conversation)
        if not number:
            raise InputError(f"{file}: it holds no record. See docs/data.md for the format.")
        read.append(of)
    return numbered(read, problems), problems


def numbered(read: Sequence[Sequence[Conversation]], problems: list[Problem]) -> list[list[Conversation]]:
    """`read`, in which every conversation has an id of its own.

    LLaVA's mix of 665k gives some 250,000 records the id of another one, which is their image's: `a`, `a-2`, `a-3` they
    are here. A record whose image and content are those of another one of its id goes to `problems`, not into the list.
    """
    taken = {one.id for of in read for one in of}
    said: dict[tuple[Any, ...], str] = {}
    times: Counter[str] = Counter()
    found: list[list[Conversation]] = []
    for of in read:
        found.append([])
        for one in of:
            if before := said.get(key := (one.id, one.image, *one.content)):
                what = f"its id, image and rounds are those of {before}. Keep one of the two."
                problems.append(Problem(one.place, one.id, what))
                continue
            said[key] = one.place
            times[one.id] += 1
            id = one.id
            if times[one.id] > 1:
                id = next(new for number in count(times[one.id]) if (new := f"{one.id}-{number}") not in taken)
                taken.add(id)
            found[-1].append(replace(one, id=id))
    return found


def counted(conversations: Sequence[Conversation]) -> str:
    """How many, and about how many images, in words: a picture that is not there shows in these numbers.

    >>> counted([Conversation("a", None, (), ""), Conversation("b", Path("0.png"), (), "")])
    '2 conversations about 1 image (1 about none)'
    """
    return counted_about("conversation", [one.image for one in conversations])


def counted_about(noun: str, images: Sequence[Path | str | None]) -> str:
    """As `counted`; `images`: of each of the things that `noun` names, None where it has none."""
    many, pictures, without = len(images), len({*images} - {None}), images.count(None)
    line = f"{many:,} {noun}{'s' * (many != 1)} about {pictures:,} image{'s' * (pictures != 1)}"
    return line + (f" ({without:,} about none)" if without else "")


def own_in_words(conversations: Sequence[Conversation]) -> list[str]:
    """A line about answers that are not learnt and one about system texts of conversations, where there are some."""
    silent = sum(not one.learns(place) for one in conversations for place in range(len(one.rounds)))
    systems = sum(one.system is not None for one in conversations)
    return [
        *([f"{silent:,} answer{'s' * (silent != 1)} not learnt, by loss or weight 0"] if silent else []),
        *([f"{systems:,} with a system text of their own, in the place of the template's"] if systems else []),
    ]


def records(file: Path, of: str = "conversations") -> Iterator[tuple[str, Any]]:
    """(place, record), of a JSON array or a record a line, under the names that we read; see `columns`.

    `of` says what a record is, for messages.

    The place is `FILE:LINE` of its beginning, from 1; `FILE:LINE:COLUMN` where another record begins before it on that
    line, since `json.dump` writes all on one. No two records share a place.

    Raises:
        InputError: See `read_conversations`.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise InputError(f"{file}: cannot be read ({why}). Pass a JSON file of {of}.") from error
    columns = columns_of(file)
    decoder = json.JSONDecoder(object_pairs_hook=once)
    space = re.compile(r"\s*")
    at = space.match(text).end()  # type: ignore[union-attr]
    array = text[at : at + 1] == "["
    at += array
    line, counted, begin, taken = 1, 0, 0, 0  # `begin` of the line; `taken`: the last one that a record begins on
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if more := text.count("\n", counted, at):
            line, begin = line + more, text.rindex("\n", counted, at) + 1
        counted = at
        if at == len(text) or (array and text[at] == "]"):
            break
        begins = at - begin + 1
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "lineno", line)
            what = getattr(error, "msg", "nested too deeply")
            what = what if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
            raise InputError(f"{file}:{where}: no JSON ({what}). Mend the file or write it again.") from error
        yield f"{file}:{line}" + (f":{begins}" if line == taken else ""), under_our_names(record, columns)
        taken = line
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if array and text[at : at + 1] == ",":
            at += 1
        elif array and text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise InputError(f"{file}:{line}: no JSON (a comma or ] is missing). Mend the file or write it again.")
    if array and (at == len(text) or text[at + 1 :].strip()):
        what = "the closing ] is missing" if at == len(text) else "more stands behind the closing ]"
        raise InputError(f"{file}:{line}: no JSON ({what}). Mend the file or write it again.")


def _conversation(record: Any, number: int, place: str, folder: Path, wrong: list[str]) -> Conversation:
    """The record, `number` from 1; what is wrong with it goes to `wrong`."""
    if not isinstance(record, dict):
        wrong.append(f"it is {short(record)}, not an object with id and conversations.")
        return Conversation("", None, (), place)
    name = record.get("id", f"record-{number}")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        wrong.append(f"its id is {short(name)}. Give it a text or a whole number.")
        name = ""
    turns = read_turns(record, wrong)
    image = None
    if (given := read_picture(record, turns, wrong)) is not None and (image := image_file(folder, given)) is None:
        shown = given if len(given) <= 255 else short(given)  # a longer one may be the image itself, as text
        wrong.append(f"its image {shown} is not in {folder}. {FOLDER_OR_OUT}")
    texts = [_text(number, turn, given is not None, wrong) for number, turn in enumerate(turns)]
    if turns and len(turns) % 2:
        wrong.append(f"it ends with turn {len(turns)}, a question without an answer. Add the answer, or drop the turn.")
    unordered = record.get("unordered", False)
    if not isinstance(unordered, bool):
        wrong.append(f"its unordered is {short(unordered)}. Give true or false, or leave it out.")
    learnt = tuple(turn.learnt for turn in turns[1::2])
    if learnt and not any(learnt):
        wrong.append("none of its answers is learnt, by their loss or weight. Leave the record out.")
    return Conversation(
        str(name),
        image,
        tuple(zip(texts[::2], texts[1::2], strict=False)),
        place,
        bool(unordered),
        _system(record, wrong),
        None if all(learnt) else learnt,
    )


def _system(record: dict[str, Any], wrong: list[str]) -> str | None:
    """Its own system text; None where it has none."""
    text = read_system(record, wrong)
    _refuse_text("its system text", text, "Take it out.", wrong)
    return text or None


def image_file(folder: Path, name: str) -> Path | None:
    """The file that a record's `image` names; None where there is none, or the name is too long to be one."""
    try:
        return folder / name if (folder / name).is_file() else None
    except (OSError, ValueError):
        return None


def _text(number: int, turn: Turn, has_image: bool, wrong: list[str]) -> str:
    """The text of a turn, `number` from 0, stripped and without the image's tag."""
    name = f"turn {number + 1}"
    text = turn.text.replace("<image>", "").strip()
    if not text and turn.role:
        wrong.append(f"{name} is empty. Write the {turn.role}, or drop its round.")
    cure = "Take it out: its image comes first." if has_image else "Name its image, or leave the record out."
    _refuse_text(name, text, cure, wrong)
    return text


def _refuse_text(name: str, text: str, cure: str, wrong: list[str]) -> None:
    """What the tokenizer or the template would take for its own; `cure`: of another family's tag for an image."""
    if named := [token for token in SPECIAL if token in text]:
        wrong.append(f"{name} holds {named[0]}, which the tokenizer would take for its own. Reword it.")
    if role := ROLE.search(text):
        wrong.append(f"{name} holds {role[0]}, which would read as the start of a turn. Reword it.")
    if others := tags(text):
        wrong.append(
            f"{name} holds {short(others[0])}, which stands for no image here and would be learnt as text. {cure}"
        )
    if HALF.search(text):
        wrong.append(f"{name} holds half a character. Mend its encoding.")


def in_epoch(conversation: Conversation, seed: int, epoch: int) -> Conversation:
    """`conversation` as `epoch` sees it: an unordered one with its rounds in an order drawn from seed, epoch and id.

    So every question is learnt at times, and behind others at others (our choice).
    """
    if not conversation.unordered:
        return conversation
    places = range(len(conversation.rounds))
    return conversation.part(sorted(places, key=lambda place: uniform(seed, epoch, conversation.id, "order", place)))


def asked(conversation: Conversation, seed: int, epoch: int, sq_r: float) -> tuple[bool, ...]:
    """For each round, whether its question is learnt: rendered as VUSER's, not as USER's.

    A question that is not the first of an image's conversation is, with probability `sq_r` in [0, 1]. As in the
    authors' `preprocess_v1_sq2`; there the draw hung on the number of workers, here on seed, epoch, id and round alone.
    """
    return tuple(
        number > 0 and conversation.image is not None and uniform(seed, epoch, conversation.id, "ask", number) < sq_r
        for number in range(len(conversation.rounds))
    )


def uniform(*key: Any) -> float:
    """A number in [0, 1) that `key` alone decides."""
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
    likewise the questions in `asks`: section 2.3 of the authors' rule, which their code reached by counting tokens.
    An answer that the conversation says is not learnt is read as the others are and has no loss. A conversation's own
    system text takes the place of the template's.

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
        """`asks`: see `asked`; `draw`, in [0, 1], chooses the template where there is a choice.

        Raises:
            InputError: A turn holds one of the tokenizer's own tokens; or see `rendered`.
        """
        text, spans = self.rendered(conversation, asks, draw)
        # not verbose: it would warn of texts longer than the tokenizer's own limit, which is no limit here
        own = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        kinds = [NOTHING] * len(own.input_ids)
        place = 0
        for start, end, kind in spans:
            while own.offset_mapping[place][0] < start:
                place += 1
            while place < len(kinds) and own.offset_mapping[place][1] <= end:
                if own.offset_mapping[place][0] < own.offset_mapping[place][1]:
                    kinds[place] = kind
                place += 1
        ids = own.input_ids
        if ids.count(self.image_token) != (conversation.image is not None):
            raise InputError(f"{conversation.place}: {conversation.id}: it holds <image> as text. Reword it.")
        if conversation.image is not None:
            at = ids.index(self.image_token)
            ids = ids[:at] + [self.image_token] * self.image_tokens + ids[at + 1 :]
            kinds = kinds[:at] + [NOTHING] * self.image_tokens + kinds[at + 1 :]
        return Encoded(ids, kinds, list(range(len(ids))), [0] * len(ids))

    def together(self, conversation: Conversation, asks: Sequence[bool], draw: float = 0.0) -> Encoded:
        """As `__call__`; but the rounds of an unordered conversation see the image and themselves, not each other.

        It is then several conversations behind one copy of the image: a round whose question is learnt goes on from the
        round before it, as learning to ask needs, and every other one starts a conversation, as in an evaluation.
        """
        starts = [number for number, ask in enumerate(asks) if not ask]
        if not conversation.unordered or conversation.image is None or len(starts) < 2:
            return self(conversation, asks, draw)
        alone = [
            self(conversation.part(range(start, end)), asks[start:end], draw)
            for start, end in zip(starts, [*starts[1:], len(asks)], strict=True)
        ]
        shared = alone[0].ids.index(self.image_token) + self.image_tokens
        return Encoded(
            ids=alone[0].ids[:shared] + [token for one in alone for token in one.ids[shared:]],
            kinds=[NOTHING] * shared + [kind for one in alone for kind in one.kinds[shared:]],
            positions=list(range(shared)) + [position for one in alone for position in one.positions[shared:]],
            threads=[0] * shared + [number for number, one in enumerate(alone, 1) for _ in one.ids[shared:]],
        )

    def rendered(
        self, conversation: Conversation, asks: Sequence[bool], draw: float = 0.0
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """The text with one `<image>`, and what of it is learnt: (start, end, ANSWER or QUESTION), in characters.

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
        longer = 0
        if conversation.system is not None:
            start, own = self._system_text(conversation, template)
            text = text[:start] + conversation.system + text[start + len(own) :]
            longer = len(conversation.system) - len(own)
        return text, [(start + longer, end + longer, kind) for (start, end), kind in zip(spans, kinds, strict=True)]

    def _render(self, template: str, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of these messages, and where of it generation marks begin and end."""
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
        """(place, text) of the template's own: what it writes before the first message, without `<s>` and blanks.

        Raises:
            InputError: It writes nothing there.
        """
        before, _ = self._render(template, [])
        own = before.removeprefix(self.tokenizer.bos_token or "").strip()
        if not own:
            raise InputError(
                f"{conversation.place}: {conversation.id}: its system text is {short(conversation.system)}, and the "
                "checkpoint's template has none that it could replace. Put it into the first question, or take it out."
            )
        return before.index(own), own
