"""Read the rows of VQA-RAD, SLAKE and PathVQA from the files in which they are published, for `prepare.py`."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files as package_files
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from stllava_eval.data import fields
from stllava_eval.data.archives import (
    IMAGES_BYTES,
    PARQUET_BYTES,
    REMEDY,
    TABLE_BYTES,
    TEXTS_BYTES,
    UNPACKED_BYTES,
    Files,
)
from stllava_eval.data.catalog import DATASETS, Row, SourceRow
from stllava_eval.data.splits import listed
from stllava_eval.errors import InputError, one_line
from stllava_eval.images import IMAGE_BYTES
from stllava_eval.storage import loads

if TYPE_CHECKING:
    import pyarrow as pa


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def read_source_rows(name: str, split: str, files: Files) -> tuple[list[SourceRow], list[str]]:
    """Read the split's rows in the source's order.

    Returns:
        The rows, and notes for the manifest.

    Raises:
        InputError: The source has no such split, or rows are broken or share an id.
    """
    part = split.removesuffix("_zh")
    records, location = {"vqarad": _vqarad, "slake": _slake, "pathvqa": _pathvqa}[name](split, part, files)
    rows: list[SourceRow] = []
    broken: dict[str, list[str]] = defaultdict(list)  # the rows, by what is wrong with them
    unwrapped: dict[str, list[str]] = defaultdict(list)  # the rows, by the field that was a list
    for number, record in enumerate(records):
        plain = _unwrapped(name, record)
        try:
            rows.append(_source_row(name, plain, number, location))
        except _BrokenRowError as error:
            broken[str(error)].append(error.location)
            continue
        for field, value in plain.items():
            if value is not record[field]:
                unwrapped[field].append(rows[-1].location)
    # A set has all ids and kinds or none of them. If some rows lack them, they were lost in a conversion.
    for what, lack in (
        ("qid", [row.location for row in rows if row.id is None]),
        ("answer_type", [row.location for row in rows if row.kind is None]),
    ):
        if lack and (len(lack) < len(rows) or (name, what) == ("slake", "answer_type")):
            broken[f"no {what}"] += lack
    if broken:
        problems = [f"{listed(locations)}: {what}" for what, locations in broken.items()]
        raise InputError(
            f"{files.location}: {sum(map(len, broken.values()))} broken rows. {listed(problems)}. "
            "Correct them, or pass an unchanged copy."
        )
    rows = [replace(row, id=row.id or f"row-{number}") for number, row in enumerate(rows)]
    repeated = [str(id) for id, times in Counter(row.id for row in rows).items() if times > 1]
    if repeated:
        raise InputError(
            f"{files.location}: {location} has several rows of one id: {listed(repeated)}. Ids are unique."
        )
    notes = []
    for field, locations in unwrapped.items():
        notes.append(
            f"{field} was a list of one text in {len(locations)} rows, and that text is taken: {listed(locations)}"
        )
    if rows and rows[0].kind is None and (name, split) != ("vqarad", "test"):
        rows = [replace(row, kind=_yes_no_kind(row.reference)) for row in rows]
        notes.append(f"kind from the answer (closed: yes or no) in {len(rows)} rows: {location} has no answer_type")
    return rows, notes


def _unwrapped(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its texts out of lists of one text."""
    own = ("question", "answer", "answer_type", *DATASETS[name].categories.values())
    return {field: fields.alone(value) if field in own else value for field, value in record.items()}


def _vqarad(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """Read VQA-RAD: the public file holds both splits, distinguished by `phrase_type`; data_RAD has a file for each."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in files.names:
        if name.endswith((".json", ".jsonl")):
            records = _json_records(files, name)
            if records and {"image_name", "question", "answer"} <= records[0].keys():
                tables[name] = records
    for name, records in tables.items():
        if any(_is_test(record) for record in records):
            return [record for record in records if _is_test(record) == (split == "test")], name
    for name, records in tables.items():
        if PurePosixPath(name).stem.startswith(split):
            return records, name
    return _parquet_records(
        files, part, "VQA-RAD's public JSON file or data_RAD's trainset.json and testset.json, with the images"
    )


def _is_test(record: Mapping[str, Any]) -> bool:
    return str(fields.alone(record.get("phrase_type"))).startswith("test_")


def _slake(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """Read the rows of the split's language; a hub copy without `answer_type` needs SLAKE's own JSON file beside it."""
    language = "zh" if split.endswith("_zh") else "en"
    stem = part.replace("validation", "validate")
    own, location = [], ""
    for name in files.names:
        if PurePosixPath(name).name in (f"{stem}.json", f"{stem}.jsonl", f"{part}.json", f"{part}.jsonl"):
            own, location = _json_records(files, name), name
            if not own:
                raise InputError(f"{files.location}: {name} holds no list of records. Download it from its authors.")
    own = _in_language(own, language, files, location)
    if own and not _parquet_names(files, part):
        return own, location
    records, location = _parquet_records(files, part, f"SLAKE's own {stem}.json with imgs/ or imgs.zip")
    if any(not fields.missing(record.get("answer_type")) for record in records):
        return _in_language(records, language, files, location), location
    if not own or [_line(record) for record in own] != [_line(record) for record in records]:
        raise InputError(
            f"{files.location}: {location} has no answer_type, and a closed answer of SLAKE need not be yes or no. "
            f"Put SLAKE's own {stem}.json with the same rows beside it, or prepare BoKelvin/SLAKE."
        )
    return [{**record, "image": copy["image"]} for record, copy in zip(own, records, strict=True)], location


def _in_language(records: Sequence[dict[str, Any]], language: str, files: Files, location: str) -> list[dict[str, Any]]:
    """Return the records of one language; a copy without `q_lang` is English.

    Raises:
        InputError: A record says neither en nor zh: it would be in no split.
    """
    chosen = []
    for number, record in enumerate(records):
        written = fields.alone(record.get("q_lang", "en"))
        folded = written.strip().lower() if isinstance(written, str) else ""
        if folded not in ("en", "zh"):
            raise InputError(
                f"{files.location}: {location} row {number}: q_lang {written!r:.60} is neither en nor zh. "
                "Pass an unchanged copy."
            )
        if folded == language:
            chosen.append(record)
    return chosen


def _pathvqa(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """Read the authors' pickles: `*_vqa.pkl`, which names the question's type, before `*_qa.pkl`."""
    short = part.replace("validation", "val")
    for ending in ("vqa", "qa"):
        for name in files.names:
            if PurePosixPath(name).name == f"{short}_{ending}.pkl":
                return [_from_pickle(record) for record in _pickled(files, name)], name
    return _parquet_records(files, part, f"PathVQA's {short}_vqa.pkl or {short}_qa.pkl, with the images")


def _from_pickle(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of either pickle with the fields' usual names; a `label` holds answers and their weights.

    The answer is the one with the largest weight; there is none if two share it.
    """
    if "sent" not in record:
        return {**record, "image_name": record.get("image"), "image": None}
    label = record.get("label")
    if not isinstance(label, dict) or not all(
        isinstance(weight, int | float) and math.isfinite(weight) for weight in label.values()
    ):
        label = {}
    most = max(label.values(), default=0)
    best = [answer for answer, weight in label.items() if weight == most]
    answer = best[0] if len(best) == 1 else None
    return {**record, "question": record["sent"], "answer": answer, "image_name": record.get("img_id")}


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Unpickle lists, dicts, texts and numbers only: any other pickle can run a program of its author's.

    This is the unpickler that is written in Python: the one in C allocates memory for as many objects as a pickle
    claims.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"it holds {module}.{name}, and only lists, dicts, texts and numbers are read")


def _pickled(files: Files, name: str) -> list[dict[str, Any]]:
    content = files.read(name, TABLE_BYTES)
    try:
        records = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises nearly everything
        raise InputError(
            f"{files.location}: {name} is refused: {one_line(error)}. Download it from its authors."
        ) from error
    return _checked(records, files, name)


def _json_records(files: Files, name: str) -> list[dict[str, Any]]:
    """Read the records of a JSON or JSON Lines file; none where it holds something else."""
    content = files.read(name, TABLE_BYTES)
    try:
        if name.endswith(".jsonl") or _is_lines(content):
            lines = enumerate(content.splitlines(), 1)
            return _checked([_json_line(line, number) for number, line in lines if line.strip()], files, name)
        records = loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{files.location}: {name} is no JSON ({error}). Download it again.") from error
    return records if isinstance(records, list) and all(isinstance(record, dict) for record in records) else []


def _is_lines(content: bytes) -> bool:
    """Return whether the first line is an object of its own, as in what `datasets` writes to a file named .json."""
    first, _, others = content.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return first.startswith(b"{") and first.rstrip().endswith(b"}") and others.lstrip().startswith(b"{")


def _json_line(line: bytes, number: int) -> Any:
    try:
        return loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _checked(records: Any, files: Files, name: str) -> list[dict[str, Any]]:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{files.location}: {name} is not a list of records. Download it from its authors.")
    return records


def _parquet_names(files: Files, part: str) -> list[str]:
    """Return `data/test-00000-of-00001.parquet` and its like, or in the hub's own conversion `test/0000.parquet`."""
    paths = [PurePosixPath(name) for name in files.names if name.endswith(".parquet")]
    return sorted(str(path) for path in paths if part in (path.stem.split("-")[0], path.parent.name))


def _parquet_records(files: Files, part: str, otherwise: str) -> tuple[list[dict[str, Any]], str]:
    """Read the split's records from a hub copy's parquet files; rows of one image share its bytes.

    Args:
        files: The source.
        part: train, validation or test, as the files or their folder are named.
        otherwise: What could have been there instead, for the message.
    """
    import pyarrow as pa

    names = _parquet_names(files, part)
    if not names:
        raise InputError(
            f"{files.location} holds no {part} split: neither {otherwise}, nor a hub copy's {part}-*.parquet. "
            "Pass the folder or archive that was downloaded, or a hub id."
        )
    records: list[dict[str, Any]] = []
    shared: dict[bytes, bytes] = {}
    left = IMAGES_BYTES
    for name in names:
        content = files.read(name, PARQUET_BYTES)
        try:
            _check_image_column(pa.BufferReader(content), f"{files.location}: {name}")
            for record in parquet_rows(pa.BufferReader(content), f"{files.location}: {name}"):
                image = (record.get("image") or {}).get("bytes")
                if image is not None:
                    left -= len(image) if image not in shared else 0
                    if left < 0:
                        raise InputError(
                            f"{files.location}: {part} images of more than {IMAGES_BYTES:,} bytes. {REMEDY}."
                        )
                    record["image"]["bytes"] = shared.setdefault(image, image)
                records.append(record)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{files.location}: {name} is not a hub copy's parquet file ({one_line(error)}). {REMEDY}."
            ) from error
    return records, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_image_column(source: Any, location: str) -> None:
    """Refuse a parquet file whose images are something else than files; it may have none, and name them.

    Raises:
        InputError: With the column's type, and what it should be.
        pyarrow.ArrowException, OSError: It is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(source)
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    parts = list(kind) if pa.types.is_struct(kind) else [] if pa.types.is_null(kind) else None
    if parts is None or any(part.name == "bytes" and not _holds_bytes(part.type) for part in parts):
        raise InputError(f"{location}: its column image is {kind!s:.60}; {fields.IMAGE}. Write it so.")


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def parquet_rows(source: Any, location: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, some at a time.

    Args:
        source: A file, by path or as pyarrow opened it.
        location: For messages.

    Raises:
        InputError: It unpacks to more than `UNPACKED_BYTES`, or to more than `TEXTS_BYTES` beside its columns
            `image`, `images` and the like.
        pyarrow.ArrowException, OSError: It is no parquet file.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if (size := sum(group.total_byte_size for group in groups)) > UNPACKED_BYTES:
            raise InputError(
                f"{location} unpacks to {size:,} bytes, and at most {UNPACKED_BYTES:,} are read. {REMEDY}."
            )
        left = TEXTS_BYTES
        # batches are small, because a value that the file stores once may be in every row
        for batch in file.iter_batches(batch_size=16):
            columns = zip(batch.schema.names, batch, strict=True)
            left -= sum(column.nbytes for name, column in columns if not name.startswith("image"))
            if left < 0:
                raise InputError(f"{location} holds more than {TEXTS_BYTES:,} bytes beside its images. {REMEDY}.")
            yield from batch.to_pylist()


class _BrokenRowError(InputError):
    """A row cannot be read; the message has the reason, and `location` names the row."""

    def __init__(self, location: str, what: str) -> None:
        super().__init__(what)
        self.location = location


def _source_row(name: str, record: Mapping[str, Any], number: int, file: str) -> SourceRow:
    """Return the row in a record.

    Raises:
        _BrokenRowError: A field that is read is missing, or is no text, number, id or image.
    """
    location = f"{file} row {number}"
    try:
        # PathVQA has no ids of its own
        qid = str(number) if name == "pathvqa" else fields.identity(record.get("qid"), "qid")
        location = location if qid is None or name == "pathvqa" else f"qid {qid}"
        if lacking := [field for field in ("question", "answer") if record.get(field) is None]:
            raise InputError(f"no {' and no '.join(lacking)}")
        question = fields.text(record["question"], "question")
        if not question.strip():
            raise InputError("question is empty")
        reference = fields.text(record["answer"], "answer", numbers=name == "vqarad")
        picture, image = _picture(name, record), fields.image(record.get("image"))
        if not (image or picture):
            raise InputError("no image")
        content = (
            image if isinstance(image, bytes) else picture or image
        )  # the set's name goes before a path, which is one of the writer's disk
        return SourceRow(
            location,
            # data_RAD has ids of its own for VQA-RAD's questions
            f"data_RAD-{qid}" if qid and name == "vqarad" and "qid_linked_id" not in record else qid,
            content or b"",
            picture,
            question,
            reference,
            _yes_no_kind(reference) if name == "pathvqa" else _kind(record.get("answer_type")),
            {column: _category(record.get(field), field) for column, field in DATASETS[name].categories.items()},
            isinstance(image, str),
        )
    except InputError as error:
        raise _BrokenRowError(location, str(error)) from error


def _kind(value: object) -> str | None:
    """Return open or closed, as `answer_type` has it; two rows of VQA-RAD say "CLOSED "."""
    if fields.missing(value):
        return None
    kind = fields.text(value, "answer_type").strip().lower()
    if kind not in ("open", "closed"):
        raise InputError(f"answer_type {value!r:.60} is neither OPEN nor CLOSED")
    return kind


def _category(value: object, field: str) -> str:
    """Return a category as the set names it; VQA-RAD's public file has test_para where data_RAD's has para."""
    return "" if fields.missing(value) else fields.text(value, field).removeprefix("test_")


def _picture(name: str, record: Mapping[str, Any]) -> str | None:
    """Return the image's name, for which every set has its own field. OctoMed/SLAKE gives SLAKE's number alone."""
    for field in ("image_name", "img_name"):  # SLAKE's names have a folder: xmlab1/source.jpg
        if picture := fields.image_name(record.get(field), field, folders=1 if name == "slake" else 0):
            return picture
    if name != "slake":
        return None
    number = fields.identity(record.get("img_id"), "img_id")
    return f"xmlab{number}/source.jpg" if number else None


def _yes_no_kind(reference: str) -> str:
    return "closed" if _normalised(reference) in ("yes", "no") else "open"


def find_images(rows: Sequence[SourceRow], files: Files) -> tuple[list[bytes], list[str]]:
    """Find the image file of every row by its name, anywhere in the source.

    Returns:
        The images in the order of the rows, empty where missing, and a description of each that is missing.

    Raises:
        InputError: The images are too large together, or two files of one name differ.
    """
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            for key in {path.name, path.stem, _last_two(name)}:
                candidates[key].append(name)
    named = {image: _last_two(image) for image in (row.image for row in rows) if isinstance(image, str)}
    wanted = {name for key in named.values() for name in candidates[key]}
    if (size := sum(files.size(name) for name in wanted)) > IMAGES_BYTES:
        raise InputError(
            f"{files.location}: images of {size:,} bytes, and at most {IMAGES_BYTES:,} are read. {REMEDY}."
        )
    # Files are read in their order: a tar.gz has no index, so another order would unpack it again for each file.
    content = {name: files.read(name, IMAGE_BYTES) for name in files.names if name in wanted}
    for image, key in named.items():
        if len({content[name] for name in candidates[key]}) > 1:
            raise InputError(
                f"{files.location}: {image} is {' and '.join(candidates[key])}, which differ. Keep one of them."
            )
    by_image = {image: content[candidates[key][0]] if candidates[key] else b"" for image, key in named.items()}
    images = [by_image[row.image] if isinstance(row.image, str) else row.image for row in rows]
    lacking = [row for row, image in zip(rows, images, strict=True) if not image]
    missing = [f"{row.location}: no {row.image!r}" for row in lacking]
    if lacking and lacking[0].path_alone:
        missing[0] += f" in the source, and its image has a path and no bytes ({fields.IMAGE})"
    return images, missing


def _last_two(name: str) -> str:
    return fields.image_name(name, "image", folders=1) or ""


def row_of(source_row: SourceRow, image: bytes, pixels: str) -> Row:
    """Return a row whose kind is known; where a copy has dropped the image's name, its pixels name it."""
    assert source_row.kind is not None
    assert source_row.id is not None
    return Row(
        source_row.id,
        image,
        source_row.image_id or pixels[:16],
        source_row.question,
        source_row.reference,
        source_row.kind,
        source_row.categories,
    )


# The rows of VQA-RAD's official test are listed in tasks/vqarad/test_ids.csv.


@dataclass(frozen=True)
class OfficialRow:
    """One row of the official test, without the data set's own words."""

    qid: str  # the question's id in the public file
    data_rad_qid: str
    kind: str
    image_name: str
    text: str  # `_line_hash` of question and answer
    pixels: str  # first 16 hex digits of the image's `_pixel_hash`


@cache
def _official_rows() -> tuple[OfficialRow, ...]:
    text = (package_files("stllava_eval.tasks") / "vqarad" / "test_ids.csv").read_text(encoding="utf-8")
    return tuple(OfficialRow(**line) for line in csv.DictReader(text.splitlines()))


def data_rad_ids() -> dict[str, str]:
    """Return the public id of each question of VQA-RAD's official test, by its id in data_RAD's own files."""
    return {row.data_rad_qid: row.qid for row in _official_rows()}


def match_official_vqarad(
    source_rows: Sequence[SourceRow], images: Sequence[bytes], pixels: Mapping[bytes, str]
) -> tuple[list[Row], list[str]]:
    """Return the test rows in official order with public qid, kind and image name, and notes for the manifest.

    A row is recognised by question, answer and image. Where a copy has dropped the image's name, its pixels give it. If
    the copy has encoded the images again, a row of the image whose text occurs once gives it, else the order of rows.
    """
    waiting: dict[str, list[OfficialRow]] = defaultdict(list)
    for known in _official_rows():
        waiting[known.text].append(known)
    texts = [_line_hash(row.question, row.reference) for row in source_rows]
    pixels_of = [pixels[image][:16] for image in images]
    names = {known.pixels: known.image_name for known in _official_rows()}
    for text, seen in zip(texts, pixels_of, strict=True):
        if len(waiting[text]) == 1:
            names.setdefault(seen, waiting[text][0].image_name)
    rows: dict[str, Row] = {}
    unknown, by_order, changed = [], [], set()
    # Images without a name come last, so that they take only rows that no named image fits.
    for number in sorted(range(len(source_rows)), key=lambda number: pixels_of[number] not in names):
        row, candidates = source_rows[number], waiting[texts[number]]
        name = row.image_id or names.get(pixels_of[number])
        fitting = [known for known in candidates if name in (None, known.image_name) and row.kind in (None, known.kind)]
        if not fitting:
            unknown.append(row.location)
            continue
        if name is None:
            by_order.append(row.location)
        known = fitting[0]
        candidates.remove(known)
        if known.pixels != pixels_of[number]:
            changed.add(known.image_name)
        rows[known.qid] = Row(
            known.qid, images[number], known.image_name, row.question, row.reference, known.kind, row.categories
        )
    if unknown:
        raise InputError(
            f"vqarad test: {len(unknown)} rows are not in the official test with this image: {listed(unknown)}. "
            "Prepare an unchanged copy."
        )
    notes = []
    if changed:
        notes.append(f"the pixels of {len(changed)} images differ from the originals")
    if by_order:
        notes.append(
            "rows matched by question, answer and order alone, since nothing names their image: " + listed(by_order)
        )
    return [rows[known.qid] for known in _official_rows() if known.qid in rows], notes


def _normalised(text: str) -> str:
    """Return the text in lower case, with single spaces and none before a mark, since copies differ in these."""
    return re.sub(r" (?=[?.,;:!])", "", " ".join(text.lower().split()))


def _line(record: Mapping[str, Any]) -> tuple[str, str]:
    return _normalised(str(record.get("question"))), _normalised(str(record.get("answer")))


def _line_hash(question: str, reference: str) -> str:
    return hashlib.sha256(f"{_normalised(question)}\t{_normalised(reference)}".encode()).hexdigest()[:16]


def text_hash(rows: Iterable[Row]) -> str:
    """Return the hex SHA-256 of questions, references and kinds, whatever the rows' order, ids and letter case."""
    lines = sorted(f"{_line_hash(row.question, row.reference)} {row.kind}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def ids_hash(rows: Iterable[Row]) -> str:
    """Return the hex SHA-256 of which question and reference each id has, whatever the rows' order and letter case."""
    lines = sorted(f"{row.id} {_line_hash(row.question, row.reference)}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
