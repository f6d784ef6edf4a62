"""A record of a data file, as LLaVA, OpenAI, Qwen, trl, LLaMA-Factory or ms-swift lay it out -> its turns and picture.

What would change training and is not read is named here, so that nothing is dropped without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

TURNS = ("conversations", "conversatons", "messages", "conversation")  # LLaVA-Med's own files misspell it
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
SYSTEM = ("system", "developer")  # roles
SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # of a record
LEARNT = ("loss", "weight", "train")  # keys of an answer in ms-swift, OpenAI's fine-tuning format and axolotl
# Keys that hold a picture's file, as `_snake` writes them
PICTURES = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url"),
    *("image_urls", "img", "imgs", "img_path", "img_paths", "img_file", "img_name", "img_url", "file_name", "filename"),
    *("media", "picture", "pictures", "photo", "figure", "input_image"),
)
INSIDE = {*PICTURES} - {"file_name", "filename", "media", "figure"}  # those that name nothing else, however deep
NAMED_IN = (*PICTURES, "path", "file", "url", "name")  # keys of an object that stands for one picture
# and those under which it holds the picture itself, or what stands for it on a server
HELD = ("bytes", "base64", "b64", "b64_json", "data", "array", "source", "file_id", "uri", "inline_data")

# Keys of other names that speak of a picture, and values that name one
_ABOUT_PICTURES = re.compile(
    r"(?:^|_)(?:image|img|pic|picture|photo|fig|figure|media|scan|slide|slice|frame|dicom|nifti|pixel|video|audio|visual"
    r"|x_?ray|radiograph|mammogram)s?(?:files?|names?|paths?|urls?|ids?|list)?\d*(?:_|$)"
)
_PICTURE_FILE = re.compile(
    r"[^\n]{1,500}\.(?:jpe?g|png|bmp|gif|tiff?|webp|dcm|dicom|nii|nii\.gz|mha|nrrd|svs|jp2|heic|avif|mp4|avi|mov|npy)"
    r"(?:[?#]\S*)?"
    r"|(?:data:image/|iVBORw0KGgo|/9j/4|R0lGOD|UklGR)\S*",  # or the picture itself, in base64
    re.IGNORECASE,
)
# Keys that say what is learnt, or how strongly: trl, ms-swift (`loss`), OpenAI (`weight`), axolotl (`train`) and others
_LEARNT = re.compile(
    r"(?:no_|skip_|is_|only_)?(?:loss|train|mask|supervis|learn|ignore)\w*|labels?|ask|repeats?"
    r"|(?:(?:loss|sampling|sample|turn|token|example|row|instance)_)?(?:weights?|masks?)"
)
# Keys with more to learn from or to be shown, which we do not read
_MORE = re.compile(
    r"tools|functions|tool_calls?|tool_call_id|function_calls?|history|reasoning\w*|think\w*|thoughts?"
    r"|chosen\w*|reject\w*|refusal"
)
# The places that other families' texts keep for a picture: <IMAGE>, <image1>, <|image_pad|>, <ImageHere>, [IMG], ...
# `<|...|>` is always a token of a tokenizer
_TAGS = re.compile(
    r"<\|[^<>|\n]{1,40}\|>"
    r"|<[/|]?\s?(?:\w{1,30}_)?(?:image|img|picture|photo|figure|vision|visual|video|audio|media)[\w\s:.-]{0,30}[/|]?>"
    r"|<img\b[^<>]*>|</?im_(?:start|end|patch|sep)>|</?(?:bbox|ref-object|ref|box|quad|boi|eoi|pic|dicom)>"
    r"|&lt;/?(?:image|img)\w{0,20}&gt;"
    r"|\[/?(?:img|image|video)(?:[_ ]?\w{1,10})?\]|\{\{?\s?(?:image|img)\w{0,20}\s?\}"
    r"|!\[[^\]\n]{0,200}\]\([^)\n]{1,300}\)|data:image/",
    re.IGNORECASE,
)


def tags(text: str) -> list[str]:
    """Return the tags for a picture in a text, as any family writes them, at most 40 characters of each.

    >>> tags("<|image_pad|>Where? [IMG]")
    ['<|image_pad|>', '[IMG]']
    """
    if not any(sign in text for sign in "<[{&!:"):  # what each of them has; a mix of 665k conversations is read at once
        return []
    return [tag[0][:40] for tag in _TAGS.finditer(text)]


@dataclass(frozen=True)
class Turn:
    """What a turn says.

    Attributes:
        role: question or answer; "" where it is neither.
        text: With `<image>` where the record has it.
        tags: Places for a picture: each `<image>` in the text is one, and each part of type image.
        pictures: Files that it names itself.
        learnt: Whether an answer is learnt. ms-swift, OpenAI and axolotl switch that off by `"loss": false`,
            `"weight": 0` and `"train": false`.
    """

    role: str
    text: str
    tags: int
    pictures: tuple[str, ...]
    learnt: bool = True


def read_turns(record: dict[str, Any], wrong: list[str]) -> list[Turn]:
    """Return the turns of a record, without a system turn, see `read_system`; what is wrong goes to `wrong`."""
    keys = [key for key in TURNS if record.get(key) is not None]
    turns = record[keys[0]] if keys else None
    if len(keys) > 1:
        wrong.append(f"it has {keys[0]} and {keys[1]}. Keep one of the two.")
    if not isinstance(turns, list) or not turns:
        wrong.append(_no_turns(record, keys))
        return []
    _refuse_learnt(record, None, "its", wrong)
    if _is_system(turns[0]):
        turns = turns[1:]
        if not turns:
            wrong.append("it has a system text alone. Add a question and its answer.")
    return [_turn(number, turn, wrong) for number, turn in enumerate(turns)]


def _no_turns(record: dict[str, Any], keys: Sequence[str]) -> str:
    if keys:
        return f"its {keys[0]} are {short(record[keys[0]])}. Give a list of turns from human and gpt."
    named = f"its keys are {', '.join(record)}"[:200]
    return (
        f"{named}, of which none holds a conversation. Name the turns conversations or messages, or map the names in "
        "LLaMA-Factory's dataset_info.json beside the file."
    )


def read_system(record: dict[str, Any], wrong: list[str]) -> str:
    """Return the text of a record's system turn, or of its key `system`, stripped; empty where it has none.

    What is wrong with it goes to `wrong`.
    """
    texts = [(f"its {key}", record.get(key)) for key in SYSTEM_KEYS]
    turns = next((record[key] for key in TURNS if record.get(key) is not None), None)
    if isinstance(turns, list) and turns and _is_system(turns[0]):
        texts.append(("its system turn", _text(turns[0])))
        _refuse_learnt(turns[0], "system", "its system turn's", wrong)
        _refuse_pictures(turns[0], wrong)
    found: dict[str, None] = {}
    for name, value in texts:
        text = value
        if isinstance(value, list):
            parts = [_part(part, name, wrong) for part in value]
            if any(kind == "image" for kind, _, _ in parts):
                wrong.append(f"{name} holds an image. It belongs into the first turn.")
            text = "".join(said for _, said, _ in parts)
        if isinstance(text, str) and text.strip():
            found[text.strip()] = None
        elif text is not None and not isinstance(text, str):
            wrong.append(f"{name} is {short(value)}, not a text. Give one, or leave it out.")
    if len(found) > 1:
        wrong.append(f"it has {len(found)} system texts ({', '.join(map(short, found))}). Keep one of them.")
    return next(iter(found), "")


def _refuse_pictures(turn: dict[str, Any], wrong: list[str]) -> None:
    """Refuse the pictures that a system turn names."""
    for key, value in turn.items():
        if value not in (None, "", [], {}) and (_snake(key) in PICTURES or _ABOUT_PICTURES.search(_snake(key))):
            wrong.append(f"its system turn's {key} is {short(value)}. A picture belongs into the first turn.")


def _is_system(turn: Any) -> bool:
    return isinstance(turn, dict) and _role(turn) in SYSTEM


def _role(turn: dict[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _text(turn: dict[str, Any]) -> Any:
    return turn.get("value", turn.get("content"))


def _turn(number: int, turn: Any, wrong: list[str]) -> Turn:
    """Read a turn; `number` counts from 0."""
    name = f"turn {number + 1}"
    due = "answer" if number % 2 else "question"
    content = _text(turn) if isinstance(turn, dict) else None
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(turn, dict) or not isinstance(parts, str | list):
        wrong.append(f"{name} is {short(turn)}, not an object with from and value.")
        return Turn("", "", 0, ())
    given = _role(turn)
    role = ROLES.get(given, "") if isinstance(given, str) else ""
    if role != due:
        right = "human" if due == "question" else "gpt"
        wrong.append(f"{name} is from {short(given)}, not from {right}. They take turns, human first.")
    if len([key for key in ("value", "content") if turn.get(key) is not None]) > 1:
        wrong.append(f"{name} has value and content. Keep one of the two.")
    _refuse_learnt(turn, due, f"{name}'s", wrong)
    learnt = due == "question" or _is_learnt(turn, name, wrong)
    pictures = [
        file for key, value in turn.items() if _snake(key) in PICTURES for file in _files(value, f"{name}'s", wrong)
    ]
    if isinstance(parts, str):
        return Turn(role, parts, parts.count("<image>"), tuple(pictures), learnt)
    texts: list[str] = []
    tags = 0
    for part in parts:
        kind, text, files = _part(part, name, wrong)
        tags += kind == "image"
        texts.append(text)
        pictures += files
    joined = "".join(texts)
    return Turn(role, joined, tags + joined.count("<image>"), tuple(pictures), learnt)


def _is_learnt(turn: dict[str, Any], name: str, wrong: list[str]) -> bool:
    """Return whether an answer is learnt, by the keys `LEARNT`."""
    said = {key: on for key, value in turn.items() if _snake(key) in LEARNT and (on := _switch(value)) is not None}
    if len({*said.values()}) > 1:
        wrong.append(f"{name} has {' and '.join(f'{key} {short(turn[key])}' for key in said)}. Keep one of them.")
    return all(said.values())


def _part(part: Any, name: str, wrong: list[str]) -> tuple[str, str, list[str]]:
    """Return (text or image, its text, the files it names) of one part of a content in parts."""
    if isinstance(part, str):
        return "text", part, []
    fields = part if isinstance(part, dict) else {}
    kind, text = fields.get("type"), fields.get("text")
    text = text if isinstance(text, str) else ""
    files = [file for key in fields if _snake(key) in NAMED_IN for file in _files(fields[key], f"{name}'s", wrong)]
    if not files and _held(fields):
        wrong.append(f"{name} has the part {short(part)}, which names no file. Save its picture as one and name that.")
    if files or kind in ("image", "image_url", "input_image"):
        return "image", text, files
    if kind in (None, "text", "input_text", "output_text") and isinstance(fields.get("text"), str):
        return "text", text, []
    wrong.append(f"{name} has the part {short(part)}, and only parts of text and of one image are read.")
    return "", "", []


def read_picture(record: dict[str, Any], turns: list[Turn], wrong: list[str]) -> str | None:
    """Return the one file that a record names as its picture; None where it has none.

    What is wrong goes to `wrong`: several pictures, a picture behind the first turn, a tag without a picture, and keys
    that name a picture which would not be shown.
    """
    before = len(wrong)
    named = {key: _files(value, "its", wrong, key) for key, value in record.items() if _snake(key) in PICTURES}
    sources = [*named.values(), *([file] for turn in turns for file in turn.pictures)]
    local = [files for files in sources if not all(map(_is_address, files))]
    # beside a file, the address under another key is the one that it was downloaded from
    distinct = list(dict.fromkeys(file for files in (local or sources) for file in files))
    if len(distinct) > 1:
        wrong.append(
            f"it names {len(distinct)} pictures ({short(distinct[0])}, {short(distinct[1])}), and one is read. Make a "
            "record of each, or leave it out."
        )
    elif distinct and _is_base64(distinct[0]):
        wrong.append(f"its image is {short(distinct[0])}, the picture itself. Save it as a file and name that.")
    elif distinct and _is_address(distinct[0]):
        wrong.append(f"its image {short(distinct[0])} is a web address. Download it and name the file.")
    for number, turn in enumerate(turns):
        if number and (turn.tags or turn.pictures):
            what = "<image>" if "<image>" in turn.text or not turn.pictures else "an image"
            wrong.append(f"turn {number + 1} holds {what}. It belongs into the first turn.")
        elif turn.tags and not distinct:
            wrong.append(
                f"turn {number + 1} holds <image> and the record names no image. Add its image, or leave the record "
                "out."
            )
        elif turn.tags > 1 and len(distinct) <= 1:
            wrong.append(f"turn {number + 1} holds {turn.tags} images, and one is read. Make a record of each.")
    if len(wrong) == before:
        lists = [record[key] for key in TURNS if isinstance(record.get(key), list)]
        said = [turn for of in lists for turn in of if isinstance(turn, dict) and not _is_system(turn)]
        inner = [(f"turn {number}'s", turn) for number, turn in enumerate(said, 1)]
        for whose, fields in (("its", record), *inner):
            _refuse_strays(fields, whose, distinct, wrong)
    read = len(distinct) == 1 and not _is_address(distinct[0]) and not _is_base64(distinct[0])
    return distinct[0] if read else None


def _refuse_strays(fields: dict[str, Any], whose: str, pictures: list[str], wrong: list[str]) -> None:
    """Refuse keys that name a picture and that nobody reads.

    Beside a picture, what speaks of it is let pass (its size, its id, the name of the same file in another folder).
    """
    for key, value in fields.items():
        read = _snake(key) in PICTURES or key in (*TURNS, "from", "role", "value", "content")
        if read or value in (None, "", [], {}, False, 0):
            continue
        files = [text for text in _texts(value) if _PICTURE_FILE.fullmatch(text.strip())]
        about = _ABOUT_PICTURES.search(_snake(key)) or _names_inside(value)
        others = [
            file for file in files if not _is_address(file) and not any(_same(file, picture) for picture in pictures)
        ]
        if (about and others) if pictures else (about or files):
            wrong.append(
                f"{whose} {key} is {short(value)}, which names a picture that is not read. Name its one file under "
                "image, or leave the record out."
            )


def _same(file: str, other: str) -> bool:
    """Return whether two names end alike, suffixes aside: of one file in two folders, or in two formats."""
    one, two = (re.split(r"[/\\]", re.sub(r"\.\w+$", "", name)) for name in (file, other))
    least = min(len(one), len(two))
    return one[-least:] == two[-least:]


def _refuse_learnt(fields: dict[str, Any], due: str | None, whose: str, wrong: list[str]) -> None:
    """Keys that would change what is learnt and are not read, of a record (`due` None) or of a turn."""
    for key, value in fields.items():
        plain = _snake(key)
        metadata = due is None and (
            (plain == "history" and isinstance(value, str))  # a patient's
            or (
                plain.startswith("label") and not isinstance(value, bool)
            )  # the class of an image; KTO's is true or false
        )
        if metadata or value in (None, "", [], {}):
            continue
        if _MORE.fullmatch(plain):
            pair = " `stllava-train pairs --from` reads preference pairs." if plain[:6] in ("chosen", "reject") else ""
            wrong.append(f"{whose} {key} is {short(value)}, which would not be learnt. Take it out.{pair}")
        elif _LEARNT.fullmatch(plain) and _is_amount(value) and not _as_done(due, plain, value):
            if due == "question":
                what = "the recipe's sq_r draws which questions are learnt. Take it out."
            elif due == "system":
                what = "a system text is never learnt. Take it out."
            elif due == "answer" and plain in LEARNT:
                what = "an answer is learnt with weight 1 or, with 0, not at all. Give one of them, or take it out."
            else:
                what = "every answer is learnt with the same weight. Take it out, or leave the record out."
            wrong.append(f"{whose} {key} is {short(value)}, and {what}")


def _as_done(due: str | None, key: str, value: Any) -> bool:
    """Whether a key says what is done: an answer is learnt, or not where it says so, and a system text is not."""
    if due == "answer" and key in LEARNT:
        return _switch(value) is not None
    if due == "system":
        return key in LEARNT and _switch(value) is False
    return due != "question" and _is_one(value)


def _switch(value: Any) -> bool | None:
    """Return what 0, 1, false or true says, also as text; None of anything else.

    >>> _switch(0.0), _switch("true"), _switch(0.5)
    (False, True, None)
    """
    text = str(value).strip().lower() if isinstance(value, str | bool | int | float) else ""
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(text)


def _is_amount(value: Any) -> bool:
    """Return whether it switches or weighs: a truth value, a number, also as text, or a list of these."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_amount, value))
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*(?:true|false|[-+]?\d*\.?\d+)\s*", value, re.IGNORECASE))
    return isinstance(value, bool | int | float)


def _is_one(value: Any) -> bool:
    """Return whether it says what is done anyway."""
    if isinstance(value, list):
        return all(map(_is_one, value))
    return value == 1 or (isinstance(value, str) and value.strip().lower() in ("true", "1", "1.0"))


def _files(value: Any, whose: str, wrong: list[str], key: str = "image") -> list[str]:
    """Return the files that the value of a key for pictures names."""
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str) and "\0" not in value:
        return [unquote(urlsplit(value).path) if value.lower().startswith(("file:///", "file://localhost/")) else value]
    if isinstance(value, list):
        return [file for item in value for file in _files(item, whose, wrong, key)]
    if isinstance(value, dict):
        held = [of for inner, of in value.items() if _snake(inner) in NAMED_IN]
        if found := [file for of in held for file in _files(of, whose, wrong, key)]:
            if _held(value):
                wrong.append(f"{whose} {key} is {short(value)}: a picture, and the name of one. Keep one of the two.")
            return found
    wrong.append(f"{whose} {key} is {short(value)}, not the name of one file.")
    return []


def _names_inside(value: Any) -> bool:
    """Whether a key for pictures is somewhere inside a value, with a text in it: a name may have no suffix."""
    if isinstance(value, list):
        return any(map(_names_inside, value))
    return isinstance(value, dict) and any(
        _names_inside(inner) or (_snake(key) in INSIDE and any(text.strip() for text in _texts(inner)))
        for key, inner in value.items()
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, however deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, str):
        yield value
    for one in inner:
        yield from _texts(one)


def _held(fields: dict[str, Any]) -> bool:
    """Return whether an object that stands for a picture holds it, or stands for one that is kept elsewhere."""
    return any(value not in (None, "", [], {}) for key, value in fields.items() if _snake(key) in HELD)


def _is_base64(file: str) -> bool:
    return file.startswith(("data:", "iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")) and len(file) > 80  # our choice


def _is_address(file: str) -> bool:
    return bool(re.match(r"[a-zA-Z][\w+.-]+://", file))


@lru_cache(4096)
def _snake(key: str) -> str:
    """Return a key in lower case with underscores: imagePath, Image-Path -> image_path."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s.]+", "_", key).lower()


def short(value: Any) -> str:
    """Return a value as JSON, for messages: at most 40 characters of it."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
