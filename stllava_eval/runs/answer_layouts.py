"""Read the rows of a file of answers, in any known layout; each comes with its location, for messages."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import loads, read_bytes, read_text

# Largest size of an unpacked Parquet or Excel file (our choice, 1 GiB). 6,761 answers of 4,096 tokens, the most that
# PathVQA's test split can have, take a tenth of it.
UNPACKED_BYTES = 2**30


def rows_of(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of a file: JSON lines, a JSON array, CSV, TSV, Parquet or an Excel sheet.

    The layout is chosen by the file's suffix; a file with any other suffix is a JSON array if it begins with `[`, and
    JSON lines otherwise.

    Returns:
        One pair per row: its location in the file, for messages, and its fields by name. The cells of CSV, TSV and
        Excel are texts, even if they hold a number.

    Raises:
        InputError: The file cannot be read, is too large, or does not have the layout that its suffix names.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            return [(f"{file} row {number}", row) for number, row in enumerate(_parquet(file, read_bytes(file)))]
        if suffix == ".xlsx":
            return _excel(file, read_bytes(file))
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}). Pass answers as JSON lines, a JSON array, CSV, TSV, Parquet or xlsx."
        ) from error
    if suffix in (".csv", ".tsv"):
        return _separated(file, text, "\t" if suffix == ".tsv" else ",")
    if text.lstrip().startswith("["):
        return [(f"{file} item {number}", row) for number, row in enumerate(_array(file, text))]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # an answer may hold other line separators
        if not line.strip():
            continue
        try:
            row = loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}:{number}: not JSON ({error}). Each line must be one object with id and answer."
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: not an object. Each line must be one object with id and answer.")
        rows.append((f"{file}:{number}", row))
    return rows


def _array(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}). Pass a list of objects with id and answer.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{file} item {number}: not an object. Each item must be one object with id and answer.")
    return rows


def _separated(file: Path, text: str, mark: str) -> list[tuple[str, dict[str, Any]]]:
    table = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        head = next(table, [])
        _check_head(file, head)
        rows = []
        for cells in table:
            if not cells:
                continue
            if len(cells) != len(head):
                raise InputError(
                    f"{file}:{table.line_num}: {len(cells)} cells, but the first line names {len(head)} columns. "
                    "Put answers that contain a separator or a line break into quotes."
                )
            rows.append((f"{file}:{table.line_num}", dict(zip(head, cells, strict=True))))
        return rows
    except csv.Error as error:
        raise InputError(f"{file}:{table.line_num}: cannot be read as a table ({error}). Export it again.") from error


def _parquet(file: Path, content: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(pa.BufferReader(content))
        groups = range(opened.num_row_groups)
        _check_size(file, sum(opened.metadata.row_group(number).total_byte_size for number in groups))
        names = [name for name in opened.schema_arrow.names if name != "image"]  # images are not needed
        return opened.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a Parquet file ({one_line(error)}). Export it again.") from error


def _excel(file: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of an Excel file with one sheet, such as VLMEvalKit writes."""
    import openpyxl  # lmms-eval installs it

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            _check_size(file, sum(member.file_size for member in packed.infolist()))
        # Formulas are read as they were typed, because an answer that begins with "=" is stored as a formula.
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=False)
        sheets = {sheet.title: [list(line) for line in sheet.iter_rows(values_only=True)] for sheet in book.worksheets}
    except InputError:
        raise
    except Exception as error:  # openpyxl raises what its XML reader, zipfile and its own checks happen to raise
        raise InputError(f"{file}: not an Excel file ({one_line(error)}). Export it again.") from error
    filled = {title: lines for title, lines in sheets.items() if any(map(any, lines))}
    if len(filled) != 1:
        raise InputError(
            f"{file}: {len(filled)} sheets have rows ({', '.join(filled)}). Keep only the sheet with the answers."
        )
    head, *lines = next(iter(filled.values()))
    while head and head[-1] is None:
        head.pop()
    _check_head(file, head)
    return [
        (f"{file} row {number}", dict(zip(map(str, head), map(_cell, line), strict=False)))
        for number, line in enumerate(lines, 2)
        if any(cell is not None for cell in line)
    ]


def _cell(value: Any) -> Any:
    """Return a cell as the text that was written: an empty one is an empty cell, and digits may be a number."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, float) else value


def single_item(value: Any) -> Any:
    """Return the one item of a list, and any other value as it is.

    >>> single_item(["yes"])
    'yes'
    """
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def asked_in(row: Mapping[str, Any]) -> str | None:
    """Return what a row's conversation asks: its user's turns, in `messages` (OpenAI's) or `conversations` (LLaVA's).

    >>> asked_in({"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]})
    'Is it?'
    """
    turns: list[Any] = next(
        (row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), []
    )
    said: list[str] = []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
            content = turn.get("content", turn.get("value"))
            parts = content if isinstance(content, list) else [{"text": content}]
            said += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(said) if said else None


def _check_head(file: Path, head: Sequence[Any]) -> None:
    if twice := next((name for name in head if list(head).count(name) > 1), None):
        raise InputError(f"{file}: two columns are named {twice!r}. Keep only one of them.")
    if not any(head):
        raise InputError(f"{file}: the first line names no columns. It must name id and answer.")


def _check_size(file: Path, size: int) -> None:
    if size > UNPACKED_BYTES:
        raise InputError(
            f"{file}: it has {size:,} bytes when unpacked, and at most {UNPACKED_BYTES:,} are read. Pass a file with "
            "the answers only."
        )
