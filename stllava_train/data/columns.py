"""LLaMA-Factory's dataset_info.json -> what a file's columns are called; its records under the names that we read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import file_sha256, read_json

# What follows is that of hiyouga/LLaMA-Factory, data/README.md and src/llamafactory/data/parser.py
NAME = "dataset_info.json"
# Formats, and its names of the columns that hold turns -> those of a file whose entry has no "columns"
FORMATS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
# Its names of other columns -> ours. `record` refuses what cannot be learnt from by that name
OTHERS = {
    **{name: name for name in ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected")},
    "kto_tag": "label",
}
COLUMNS = {name for columns in FORMATS.values() for name in columns} | OTHERS.keys()
KEYS = {"role_tag": "from", "content_tag": "value"}  # of a turn -> ours
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}  # likewise
TAGS = {*KEYS, *ROLES, "observation_tag", "function_tag"}


@dataclass(frozen=True)
class Columns:
    """What a file's columns are called.

    Attributes:
        formatting: Of `FORMATS`.
        ranking: Whether its records are preference pairs.
        columns: LLaMA-Factory's name of a column -> the file's.
        tags: LLaMA-Factory's name of a turn's key, or of a role -> the file's.
    """

    formatting: str = "alpaca"
    ranking: bool = False
    columns: Mapping[str, str] = field(default_factory=lambda: FORMATS["alpaca"])
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Return a hash, in 16 hex digits: two files of the same bytes with other columns are other data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def renamed(self, record: Any) -> Any:
        """Return the record as `records` and `layouts` read it, with its turns under `messages`.

        A record without the columns that hold its turns is returned as it is; its reader then names the keys it has.
        """
        alpaca = self.formatting == "alpaca"
        answers = ("chosen", "rejected") if self.ranking else ("response",) if alpaca else ()
        needed = ["prompt" if alpaca else "messages", *answers]
        if not isinstance(record, dict) or any(self.columns.get(name) not in record for name in needed):
            return record
        given = {name: record[key] for name, key in self.columns.items() if record.get(key) is not None}
        others = {key: value for key, value in record.items() if key not in self.columns.values()}
        history = given.pop("history", None) if alpaca else None
        own = {OTHERS[name]: self._turns(value) for name, value in given.items() if name in OTHERS}
        if not alpaca:
            return others | own | {"messages": self._turns(given.get("messages"))}
        rounds = history if isinstance(history, list) else []
        if not all(isinstance(turns, list) and len(turns) == 2 for turns in rounds) or (history and not rounds):
            # of another form: `record` refuses it by its name; a text there would be taken for a patient's history
            rounds, own["history"] = [], [history] if isinstance(history, str) else history
        texts = [text for turns in rounds for text in turns]
        asked = [text for name in ("prompt", "query") if (text := given.get(name)) not in (None, "")]
        texts.append("\n".join(asked) if all(isinstance(text, str) for text in asked) else asked)
        if not self.ranking:
            texts.append(given.get("response"))
        return others | own | {"messages": _said(texts)}

    def _turns(self, value: Any) -> Any:
        """Return turns, or a turn, with our names for keys and roles; anything else as it is."""
        if isinstance(value, list):
            return [self._turns(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = {self.tags[tag]: own for tag, own in KEYS.items() if tag in self.tags}
        roles = {self.tags[tag]: own for tag, own in ROLES.items() if tag in self.tags}
        turn = {keys.get(key, key): item for key, item in value.items()}
        for key in ("from", "role"):
            if isinstance(turn.get(key), str):
                turn[key] = roles.get(turn[key], turn[key])
        return turn


def _said(texts: list[Any]) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def under_our_names(record: Any, columns: Columns | None) -> Any:
    """Return `record` by the columns of its file; where none are known, one in the Alpaca format by that format's own.

    >>> under_our_names({"instruction": "Where?", "input": "", "output": "Left."}, None)
    {'messages': [{'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': 'Left.'}]}
    """
    if columns is None:
        alpaca = isinstance(record, dict) and {"instruction", "output"} <= record.keys()
        columns = (
            Columns() if alpaca and not {"chosen", "rejected", "messages", "conversations"} & record.keys() else None
        )
    return record if columns is None else columns.renamed(record)


def data_hash(file: Path) -> dict[str, str]:
    """sha256 of a file's bytes and, where `dataset_info.json` names the file, of its columns' names."""
    columns = columns_of(file)
    return {"sha256": file_sha256(file)} | ({"columns": columns.sha256} if columns else {})


def columns_of(file: Path) -> Columns | None:
    """What LLaMA-Factory's `dataset_info.json` says of a file; None where none is there or it does not name the file.

    It is looked for beside the file and in the folder above. An entry's `file_name` names the file or its folder.

    Raises:
        InputError: It cannot be read, an entry is of another form, or two entries say different things of the file.
    """
    path = file.absolute()
    for folder in (path.parent, path.parent.parent):
        if not (folder / NAME).is_file():
            continue
        try:
            entries = read_json(folder / NAME)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{folder / NAME}: cannot be read as JSON ({one_line(error)}). Fix or move it.") from error
        found: dict[str, Columns] = {}
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            given = entry.get("file_name") if isinstance(entry, dict) else None
            if isinstance(given, str) and given and folder / given in (path, path.parent):
                found[name] = _columns(f"{folder / NAME}: {name}", entry)
        names = list(found)
        if different := [name for name in names if found[name] != found[names[0]]]:
            raise InputError(
                f"{folder / NAME}: {names[0]} and {different[0]} give {file.name} different columns. Keep one."
            )
        if found:
            return found[names[0]]
    return None


def _columns(place: str, entry: dict[str, Any]) -> Columns:
    formatting, ranking = entry.get("formatting", "alpaca"), entry.get("ranking", False)
    if not isinstance(formatting, str) or formatting not in FORMATS:
        raise InputError(f"{place}: formatting is {json.dumps(formatting)[:60]}. Give one of {', '.join(FORMATS)}.")
    if not isinstance(ranking, bool):
        raise InputError(f"{place}: ranking is {json.dumps(ranking)[:60]}. Give true or false.")
    columns = _names(f"{place}: columns", entry.get("columns", FORMATS[formatting]), COLUMNS)
    tags = _names(f"{place}: tags", entry.get("tags", {}), TAGS)
    asks = "prompt" if formatting == "alpaca" else "messages"
    if asks not in columns:
        raise InputError(f"{place}: columns: none for {asks}, which formatting {formatting} needs. Name it.")
    return Columns(formatting, ranking, columns, tags)


def _names(place: str, given: Any, known: Set[str]) -> dict[str, str]:
    if not isinstance(given, dict):
        raise InputError(f"{place}: {json.dumps(given)[:60]}: no object. Give names, such as {sorted(known)[0]}.")
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{place}: {name}: unknown. Choose of {', '.join(sorted(known))}.")
        if value is not None and not (isinstance(value, str) and value):
            raise InputError(f"{place}: {name} is {json.dumps(value)[:60]}, not a name that the file has. Give one.")
    return {name: value for name, value in given.items() if value is not None}
