"""Read files of conversations, LLaVA's JSON or another tool's, and check every record.

This is where training begins: conversations -> `encoding` -> stage 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import has_lone_surrogate, read_text, unique_keys
from stllava_train.data.columns import columns_of, under_our_names
from stllava_train.data.records import Turn, read_picture, read_system, read_turns, short, tags

FOLDER_OR_OUT = "Pass the folder of the images with --images, or leave the record out."
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
ROLE = re.compile(r"\b(?:V?USER|ASSISTANT):")


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about one image, or about none.

    Attributes:
        id: The record's own; with a number behind it where another conversation has the same, see `numbered`.
        image: The image's file, or None for text alone. It stands before the first question.
        rounds: (question, answer), stripped, without the image's tag.
        location: `FILE:LINE`, for messages; see `read_records`.
        unordered: The record's key `unordered`: its rounds are questions of a data set that do not build on each other.
        system: The record's own system text, in the place of the template's; None leaves the template's.
        learnt: Whether the answer of each round is learnt; None where all are. See `record.Turn`.
    """

    id: str
    image: Path | None
    rounds: tuple[tuple[str, str], ...]
    location: str
    unordered: bool = False
    system: str | None = None
    learnt: tuple[bool, ...] | None = None

    def part(self, indices: Sequence[int]) -> Conversation:
        """Return the rounds at these indices, in this order, as a conversation."""
        learnt = None if self.learnt is None else tuple(self.learnt[index] for index in indices)
        return replace(self, rounds=tuple(self.rounds[index] for index in indices), learnt=learnt)

    def learns(self, index: int) -> bool:
        """Return whether the answer of the round at `index` is learnt."""
        return self.learnt is None or self.learnt[index]

    @property
    def content(self) -> tuple[Any, ...]:
        """Return what is learnt beside the image: two conversations with the same image and content are duplicates."""
        return self.rounds, self.system, self.learnt


@dataclass(frozen=True)
class Problem:
    """What is wrong with a record, and what would be right."""

    location: str  # see `read_records`
    id: str
    what: str

    def __str__(self) -> str:
        return f"{self.location}: {self.id or 'a record'}: {self.what}"


def read_conversations(file: Path, images: Path | None = None) -> tuple[list[Conversation], list[Problem]]:
    """Read a file: return its sound records, in its order, and every problem of the others.

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
    """Return the sound records of each file, and every problem of all; see `read_conversations`, `numbered` for ids."""
    read: list[list[Conversation]] = []
    problems: list[Problem] = []
    for file in files:
        folder = file.parent if images is None else images
        sound: list[Conversation] = []
        number = 0
        for number, (location, record) in enumerate(read_records(file), 1):
            wrong: list[str] = []
            conversation = _conversation(record, number, location, folder, wrong)
            problems += [Problem(location, conversation.id, what) for what in wrong]
            if not wrong:
                sound.append(conversation)
        if not number:
            raise InputError(f"{file}: it holds no record. See docs/train/data.md for the format.")
        read.append(sound)
    return numbered(read, problems), problems


def numbered(read: Sequence[Sequence[Conversation]], problems: list[Problem]) -> list[list[Conversation]]:
    """Return the conversations of `read`, file by file, each with an id of its own.

    LLaVA's mix of 665k gives some 250,000 records the id of another one, which is their image's: here they become `a`,
    `a-2`, `a-3`. A record whose image and content are those of another one of its id goes to `problems`, not
    into the list.
    """
    taken = {conversation.id for conversations in read for conversation in conversations}
    first: dict[tuple[Any, ...], str] = {}  # id, image and content -> location of the first record that has them
    times: Counter[str] = Counter()  # records seen so far of each id
    unique: list[list[Conversation]] = []
    for conversations in read:
        unique.append([])
        for conversation in conversations:
            id = conversation.id
            key = id, conversation.image, *conversation.content
            if key in first:
                what = f"its id, image and rounds are those of {first[key]}. Keep one of the two."
                problems.append(Problem(conversation.location, id, what))
                continue
            first[key] = conversation.location
            times[id] += 1
            if times[id] > 1:
                id = next(new for number in count(times[id]) if (new := f"{conversation.id}-{number}") not in taken)
                taken.add(id)
            unique[-1].append(replace(conversation, id=id))
    return unique


def counted(conversations: Sequence[Conversation]) -> str:
    """Say how many conversations there are, and about how many images: a missing image shows in these numbers.

    >>> counted([Conversation("a", None, (), ""), Conversation("b", Path("0.png"), (), "")])
    '2 conversations about 1 image (1 about none)'
    """
    return counted_about("conversation", [one.image for one in conversations])


def counted_about(noun: str, images: Sequence[Path | str | None]) -> str:
    """Do as `counted` for records named by `noun`; `images` has one entry per record, None where it has none."""
    many, pictures, without = len(images), len({*images} - {None}), images.count(None)
    line = f"{many:,} {noun}{'s' * (many != 1)} about {pictures:,} image{'s' * (pictures != 1)}"
    return line + (f" ({without:,} about none)" if without else "")


def own_in_words(conversations: Sequence[Conversation]) -> list[str]:
    """Return a line about answers that are not learnt and one about own system texts, where there are some."""
    silent = sum(learnt is False for conversation in conversations for learnt in conversation.learnt or ())
    systems = sum(conversation.system is not None for conversation in conversations)
    return [
        *([f"{silent:,} answer{'s' * (silent != 1)} not learnt, by loss or weight 0"] if silent else []),
        *([f"{systems:,} with a system text of their own, in the place of the template's"] if systems else []),
    ]


def read_records(file: Path, of: str = "conversations") -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of a JSON array or of a record per line, under the names that we read; see `columns`.

    `of` says what a record is, for messages.

    The location is `FILE:LINE` of its beginning, from 1; `FILE:LINE:COLUMN` where another record begins before it on
    that line, since `json.dump` writes all on one. No two records share a location.

    Raises:
        InputError: See `read_conversations`.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise InputError(f"{file}: cannot be read ({why}). Pass a JSON file of {of}.") from error
    columns = columns_of(file)
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    space = re.compile(r"\s*")
    at = space.match(text).end()  # type: ignore[union-attr]
    array = text[at : at + 1] == "["
    at += array
    # `counted`: line ends are counted up to here; `begin` of the line; `taken`: the last line that a record begins on
    line, counted, begin, taken = 1, 0, 0, 0
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
            raise InputError(f"{file}:{where}: no JSON ({what}). Fix the file or write it again.") from error
        yield f"{file}:{line}" + (f":{begins}" if line == taken else ""), under_our_names(record, columns)
        taken = line
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if array and text[at : at + 1] == ",":
            at += 1
        elif array and text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise InputError(f"{file}:{line}: no JSON (a comma or ] is missing). Fix the file or write it again.")
    if array and (at == len(text) or text[at + 1 :].strip()):
        what = "the closing ] is missing" if at == len(text) else "there is more behind the closing ]"
        raise InputError(f"{file}:{line}: no JSON ({what}). Fix the file or write it again.")


def _conversation(record: Any, number: int, location: str, folder: Path, wrong: list[str]) -> Conversation:
    """Return the record as a conversation, `number` from 1; what is wrong with it goes to `wrong`."""
    if not isinstance(record, dict):
        wrong.append(f"it is {short(record)}, not an object with id and conversations.")
        return Conversation("", None, (), location)
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
        location,
        bool(unordered),
        _system(record, wrong),
        None if all(learnt) else learnt,
    )


def _system(record: dict[str, Any], wrong: list[str]) -> str | None:
    """Return the record's own system text; None where it has none."""
    text = read_system(record, wrong)
    _refuse_text("its system text", text, "Take it out.", wrong)
    return text or None


def image_file(folder: Path, name: str) -> Path | None:
    """Return the file that a record's `image` names; None where there is none, or the name is too long to be one."""
    try:
        return folder / name if (folder / name).is_file() else None
    except (OSError, ValueError):
        return None


def _text(number: int, turn: Turn, has_image: bool, wrong: list[str]) -> str:
    """Return the text of a turn, `number` from 0, stripped and without the image's tag."""
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
        wrong.append(f"{name} holds {short(others[0])}, which marks no image here and would be learnt as text. {cure}")
    if has_lone_surrogate(text):
        wrong.append(f"{name} holds half a character. Fix its encoding.")
