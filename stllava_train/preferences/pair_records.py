"""Read one record of preference pairs, in the layout of any tool that we know: a question, two answers, and an image.

`pair_layouts` takes the records out of files and finds their images; what is read here becomes its pairs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.images import open_header
from stllava_eval.storage import loads
from stllava_train.data.records import PICTURES, Turn, read_picture, read_system, read_turns, short
from stllava_train.preferences.pairs import pair_of
from stllava_train.resumable import Row

KNOWN = "trl, LLaMA-Factory, ms-swift, RLHF-V, RLAIF-V, MMedPO and STLLaVA-Med-DPO"
# Keys of whole conversations, of which the last answer is the chosen and the rejected one
BOTH = (
    ("chosen_conversations", "reject_conversations"),  # STLLaVA-Med's train_dpo.py:945-975; not "rejected"
    ("chosen_conversations", "rejected_conversations"),
    ("conversations", "rejected_conversations"),  # MMedPO's data/mimic_dpo_weighted.json; POVID's too
    ("messages", "rejected_messages"),  # ms-swift 3.8, docs/source_en/Customization/Custom-dataset.md
)
# trl, RLAIF-V, LLaMA-Factory's Alpaca format, and ms-swift's older one
QUESTIONS = ("prompt", "question", "instruction", "query")
IDS = ("id", "idx", "question_id")  # RLHF-V and RLAIF-V have `idx`
# MMedPO has `weighted_score`, and its loader calls it `dpo_weight`
_WEIGHT = re.compile(r"(?:(?:dpo|loss|sample|pair|example|instance)_)?weight|weighted_score")
_NOISED = ("rejected_noised", "chosen_noised")  # MMedPO's train_dpo_weighted.py: one answer's image is noise
_PICTURE_TEXT = re.compile(  # PNG, JPEG, GIF, WebP, BMP and both kinds of TIFF begin so in base64
    r"(?:data:image/[\w.+-]+;base64,)?((?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\r\n]{40,}=*\s*)"
)
OTHER_IMAGE = "the answers are about two images that are not both named"


@dataclass
class HeldPictures:
    """The pictures that a record holds itself, by the name that replaces them in it: `held:` and their SHA-256."""

    held: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def named(self, value: Any) -> Any:
        """Return a JSON value in which a name replaces each picture that is there as bytes or base64."""
        if isinstance(value, bytes):
            return self._name(value, "")
        if isinstance(value, dict):
            inner = value.get("bytes")
            if isinstance(inner, str) and (content := _decoded(inner)) is not None:
                inner = content
            if isinstance(inner, bytes):
                return self._name(inner, str(value.get("path") or ""))
            # Parquet adds null for each key that a struct of its column lacks, so nulls are dropped
            return {key: self.named(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [self.named(item) for item in value]
        if isinstance(value, str) and (content := _decoded(value)) is not None:
            return self._name(content, "")
        return value

    def _name(self, image: bytes, path: str) -> str:
        name = f"held:{hashlib.sha256(image).hexdigest()}"
        self.held.setdefault(name, (image, path))
        return name


def _decoded(text: str) -> bytes | None:
    """Return the picture that a text holds in base64, with or without `data:image/png;base64,` before it.

    Returns:
        The encoded picture; None where the text holds something else.
    """
    if (match := _PICTURE_TEXT.fullmatch(text)) is None:
        return None
    try:
        content = base64.b64decode(match[1])
        with open_header(content):  # an id, a hash or an answer may begin with the same letters
            return content
    except (binascii.Error, InputError):
        return None


@dataclass(frozen=True)
class PairRecord:
    """What a record says.

    Attributes:
        id: Its own id, or `record-N`.
        texts: Question, chosen answer, rejected answer.
        image: Name of a file, or one of `HeldPictures`.
        weight: As of `pairs.Pair`.
        why: Why it makes no pair; None where it may make one.
        image_sha256, margin, judges, rejected_image_sha256: As of `pairs.Pair`; our own files alone have them.
        rejected_image: As `image`, of a rejected answer that is about another image.
    """

    id: str
    texts: tuple[str, str, str]
    image: str
    weight: float | None = None
    why: str | None = None
    image_sha256: str = ""
    margin: float | None = None
    judges: tuple[str, ...] = ()
    rejected_image: str | None = None
    rejected_image_sha256: str | None = None


# --- a record ---------------------------------------------------------------------------------------------------------


def read_record(location: str, number: int, record: Any, empty: Sequence[str]) -> PairRecord:
    """Read a record by its keys.

    Args:
        location: `FILE:LINE` of it, for messages.
        number: From 1, for a record without an id.
        record: As `HeldPictures.named` returns it.
        empty: Its keys whose value was null, for messages.

    Raises:
        InputError: It is in no known layout, or not as its layout has it.
    """
    if isinstance(record, dict) and "image_sha256" in record:
        return _read_ours(location, record)
    sides = answer_turns(record) if isinstance(record, dict) else None
    if sides is None:
        what = f"its keys are {', '.join(record)}"[:200] if isinstance(record, dict) else f"it is {short(record)}"
        what += f" ({', '.join(empty)} is null)" if empty else ""
        raise InputError(
            f"{location}: {what}: no known layout of pairs. `stllava-train pairs --from` reads {KNOWN}; see "
            "docs/preferences/pairs.md. Name the keys image, question, chosen and rejected, or map them in "
            "LLaMA-Factory's dataset_info.json beside the file."
        )
    record = sides.record
    id = _id(location, number, record)
    location = f"{location}: {id}"
    weight = _weight(location, record)
    rest = _rest(record, sides.used)
    (chosen, image), (rejected, image_of_rejected) = [
        _read_turns(location, key, turns, rest) for key, turns in sides.turns.items()
    ]
    if [turn.text for turn in chosen[:-1]] != [turn.text for turn in rejected[:-1]]:
        raise InputError(f"{location}: chosen and rejected do not answer the same question. Fix it, or delete it.")
    if len(chosen) > 2 or len(rejected) > 2:
        raise InputError(
            f"{location}: {len(chosen) // 2} rounds. A pair has one question: keep the last round, where it can be "
            "understood alone, or delete the record."
        )
    question = chosen[0].text
    for key, other in sides.prompts.items():
        if not isinstance(other, str) or _plain(other) != question:
            raise InputError(
                f"{location}: its {key} is {short(other)}, and the question that is read is {short(question)}. Keep "
                "one."
            )
    if image is None:
        raise InputError(f"{location}: it names no image. Add the one that it is about, or leave the record out.")
    other_images = {file for file in (image_of_rejected, *_rejected_images(record)) if file != image}
    if len(other_images) > 1:
        raise InputError(
            f"{location}: its rejected answer is about {len(other_images)} images, and one is read. Keep one."
        )
    why = OTHER_IMAGE if _has_other_image(record, image) or None in other_images else None
    texts = question, chosen[1].text, rejected[1].text
    return PairRecord(id, texts, image, weight, why, rejected_image=None if why else next(iter(other_images), None))


def _read_ours(location: str, record: Row) -> PairRecord:
    """Read a record that `stllava-train pairs` wrote."""
    try:
        pair = pair_of({"margin": None} | record)
    except ValueError as error:
        raise InputError(f"{location}: {error}") from None
    texts = pair.question, pair.chosen, pair.rejected
    known = pair.image_sha256, pair.margin, pair.judges, pair.rejected_image, pair.rejected_image_sha256
    return PairRecord(pair.id, texts, pair.image, pair.weight, None, *known)


@dataclass(frozen=True)
class AnswerTurns:
    """The two conversations of a record, each ended by one of its answers, as the file has them.

    Attributes:
        record: The record, or the object inside it, that has these keys.
        turns: The turns that end with the chosen answer, then those that end with the rejected one, by their key.
        used: Keys that are read.
        prompts: Further keys with a question, each of which must equal the question of the conversations.
    """

    record: Row
    turns: dict[str, Any]
    used: tuple[str, ...]
    prompts: dict[str, Any] = field(default_factory=dict)


def answer_turns(record: Row) -> AnswerTurns | None:
    """Return the two conversations of a record in a known layout; None where its layout is unknown."""
    for chosen, rejected in BOTH:
        if chosen in record and rejected in record:
            return AnswerTurns(record, {key: _list(record[key]) for key in (chosen, rejected)}, (chosen, rejected))
    turns = next((key for key in ("conversations", "messages") if key in record), None)
    if turns and "rejected_response" in record:  # ms-swift
        chosen_turns = _list(record[turns])
        if not isinstance(chosen_turns, list):
            chosen_turns = [chosen_turns]
        rejected_turns = [*chosen_turns[:-1], *_answer(record["rejected_response"])]
        both_turns = {turns: chosen_turns, "rejected_response": rejected_turns}
        return AnswerTurns(record, both_turns, (turns, "rejected_response"))
    if turns and "rejected_images" in record and "chosen" not in record:  # ms-swift: one answer about two images
        same_turns = _list(record[turns])
        return AnswerTurns(record, {turns: same_turns, "rejected_images": same_turns}, (turns,))
    if turns and "chosen" in record and "rejected" in record:  # LLaMA-Factory's ShareGPT and OpenAI formats
        prompt_turns = _list(record[turns])
        if not isinstance(prompt_turns, list):
            prompt_turns = [prompt_turns]
        ends = {key: _answer(record[key]) for key in ("chosen", "rejected")}
        if all(len(end) > 1 and end[0] == prompt_turns[0] for end in ends.values()):
            # UltraFeedback's answers are whole conversations, and its `messages` repeats one of them
            return _asked({key: value for key, value in record.items() if key != turns}, ("chosen", "rejected"))
        ends = {key: [*prompt_turns, *end] for key, end in ends.items()}
        return AnswerTurns(record, ends, (turns, "chosen", "rejected"))
    if "text" in record and "chosen" not in record:  # RLHF-V: the texts are an object, or one as text
        inner = _object(record["text"])
        return answer_turns({key: value for key, value in record.items() if key != "text"} | inner) if inner else None
    for keys in (("chosen", "rejected"), ("response", "rejected_response")):
        if all(key in record for key in keys):
            return _asked(record, keys)
    return None


def _asked(record: Row, keys: tuple[str, str]) -> AnswerTurns | None:
    """Return the two conversations of a record whose question has a key of its own, or is inside its answers."""
    asked = [key for key in QUESTIONS if record.get(key) not in (None, "", [])]
    prompts = {key: record[key] for key in asked}
    ends = {key: _answer(record[key]) for key in keys}
    whole = all(len(end) > 1 and all(isinstance(turn, dict) for turn in end) for end in ends.values())
    used = (*keys, *asked)
    if isinstance(prompts.get("instruction"), str) and isinstance(record.get("input"), str):
        used = (*used, "input")  # LLaMA-Factory's Alpaca format joins the two by a newline
        prompts["instruction"] = "\n".join(part for part in (prompts["instruction"], record["input"]) if part)
    if whole and all(isinstance(prompt, str) and len(_answer(prompt)) == 1 for prompt in prompts.values()):
        return AnswerTurns(record, ends, used, prompts)  # as trl's `maybe_extract_prompt`
    if not asked:
        return None
    prompt = prompts.pop(asked[0])
    prompt_turns = [{"role": "user", "content": prompt}]
    if (turns := _turns(prompt)) or isinstance(prompt, list):
        prompt_turns = turns or prompt
    for key, end in ends.items():
        if end[: len(prompt_turns)] != prompt_turns:  # the answer does not repeat the question
            ends[key] = [*prompt_turns, *end]
    return AnswerTurns(record, ends, used, prompts)


def _answer(value: Any) -> list[Any]:
    """Return as turns an answer that is a text, a turn, turns (also as JSON), or a list of one text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if turns := _turns(value):
        return turns
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return value if isinstance(value, list) else [value]


def _turns(value: Any) -> list[Any]:
    """Return the turns of a value that is a list of turns, a turn, or the JSON of either; empty for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return []
    turns = value if isinstance(value, list) else [value]
    return turns if all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns) else []


def _list(value: Any) -> Any:
    """Return a list that a column of Parquet holds as JSON, and any other value as it is."""
    if isinstance(value, str):
        try:
            read = loads(value)
        except (ValueError, RecursionError):
            return value
        return read if isinstance(read, list) else value
    return value


def _object(value: Any) -> Row:
    """Return an object, also one that is held as JSON; empty for anything else."""
    if isinstance(value, str):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _read_turns(location: str, key: str, turns: Any, rest: Row) -> tuple[list[Turn], str | None]:
    """Return the turns of one of the two conversations, without the image's tag, and its picture.

    Raises:
        InputError: It has something that training would have to drop, or is no conversation.
    """
    if not isinstance(turns, list):
        raise InputError(f"{location}: {key} is {short(turns)}, not turns of a question and an answer. Fix it.")
    if texts := [turn for turn in turns if isinstance(turn, str)]:
        raise InputError(
            f"{location}: {key}: {short(texts[0])} is in a list of texts, and a pair has one question, one chosen and "
            "one rejected answer. Make a record of each pair."
        )
    record = rest | {"messages": turns}
    wrong: list[str] = []
    # a tag in the text of an answer is counted by `pair_problem`, so it is not counted here as a second image
    first, *others = read_turns(record, wrong) or [Turn("", "", 0, ())]
    read = [first, *(replace(turn, tags=turn.tags - turn.text.count("<image>")) for turn in others)]
    picture = read_picture(record, read, wrong)
    if system := read_system(record, wrong):
        wrong.append(
            f"its system text is {short(system)}, and pairs are learnt with the template's own. Put it into the "
            "question, or take it out."
        )
    if not all(turn.learnt for turn in read):
        wrong.append("an answer's loss or weight is 0, and both answers of a pair are learnt. Leave the record out.")
    if not wrong and len(read) % 2:
        wrong.append(f"it ends with turn {len(read)}, a question without an answer. Add the answer.")
    if wrong:
        what = re.sub(r'"held:[0-9a-f]*(?:"|\.\.\.)', "one that it holds", wrong[0])
        raise InputError(f"{location}: {key}: {what}")
    return [
        replace(first, text=_plain(first.text)),
        *(replace(turn, text=turn.text.strip()) for turn in read[1:]),
    ], picture


def _plain(text: str) -> str:
    """Return a text without the image's tag, stripped."""
    return text.replace("<image>", "").strip()


def _rest(record: Row, used: Sequence[str]) -> Row:
    """Return the keys beside the conversations, which `records` has to read or to refuse.

    Facts about one of the answers (its model, its rating) are dropped. Where the record holds the picture itself, its
    address and its former path are dropped too.
    """
    plain = {
        key: value
        for key, value in record.items()
        if key not in (*used, *IDS) and not _WEIGHT.fullmatch(key) and not key.startswith(("chosen", "reject"))
    }
    if "origin_dataset" in plain and plain.get("image"):
        plain.pop("image_path", None)  # RLHF-V's and RLAIF-V's: where the image came from
    held = [key for key, value in plain.items() if '"held:' in json.dumps(value, default=str)]
    if not held:
        return plain
    others = {key: value for key, value in plain.items() if key not in held and key.lower() not in PICTURES}
    return others | {"images": [plain[key] for key in held]}


def _has_other_image(record: Row, image: str) -> bool:
    """Return whether a picture is still to be noised (MMedPO's keys), or the chosen answer has a picture of its own."""
    for key in _NOISED:
        value = record.get(key)
        if (value.lower() if isinstance(value, str) else value) not in (None, 0, "", "0", "false", "no"):
            return True
    return any(file != image for file in _named(record, ("chosen_image", "chosen_images")))


def _rejected_images(record: Row) -> list[Any]:
    """Return the pictures of the rejected answer, in MMedPO's key for them and in ms-swift's."""
    return _named(record, ("rejected_image", "rejected_images"))


def _named(record: Row, keys: Sequence[str]) -> list[Any]:
    """Return the files that these keys name; None for each that is named by something that we do not read."""
    files: list[Any] = []
    for key in keys:
        value = record.get(key)
        for item in value if isinstance(value, list) else [value]:
            file = item.get("path") if isinstance(item, dict) else item
            if file not in (None, ""):
                files.append(file if isinstance(file, str) else None)
    return files


def _id(location: str, number: int, record: Row) -> str:
    """Return a record's id as text, or `record-N` where it has none."""
    key = next((key for key in IDS if key in record), None)
    if key is None:
        return f"record-{number}"
    id = record[key]
    if isinstance(id, float) and id.is_integer():  # pandas makes floats of a column in which a number lacks
        id = int(id)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise InputError(f"{location}: {key} is {short(id)}. Give the record a text or a whole number.")
    return str(id)


def _weight(location: str, record: Row) -> float | None:
    """Return the record's weight, also one that is written as text; None where it has none."""
    keys = [key for key in record if _WEIGHT.fullmatch(key) and record[key] is not None]
    if halves := [key for key in record if re.fullmatch(r"(?:chosen|rejected)_weights?", key)]:
        raise InputError(
            f"{location}: its {halves[0]} is {short(record[halves[0]])}, and a pair has one weight. Name it weight, or "
            "take it out."
        )
    if len(keys) > 1:
        raise InputError(f"{location}: it has {keys[0]} and {keys[1]}. Keep one of the two.")
    if not keys:
        return None
    value = record[keys[0]]
    try:
        weight = math.nan if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(
            f"{location}: {keys[0]} is {short(value)}, not a number from 0 on. Fix it, or delete the record."
        )
    return weight
