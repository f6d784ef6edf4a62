"""Write prepared splits as Parquet files with a manifest, and read them again.

`prepare.py` writes what it has checked; tasks, training and reports read the rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.archives import open_folder
from stllava_eval.data.catalog import DATASETS, FORMAT, Edition, Manifest, Row, counted_rows, known_data_set
from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_eval.storage import file_sha256, home, local_path, read_json, whole_file, write_json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


log = logging.getLogger("stllava_eval")
LISTED = 20  # most rows that a message names (our choice)
# Our choice: pyarrow holds a row group's images in one array, whose 32-bit offsets end at 2 GiB; writing takes about
# three times this size in memory
ROW_GROUP_BYTES = 2**28


def write_split(
    name: str,
    split: str,
    rows: Sequence[Row],
    *,
    edition: str,
    official: bool,
    sample: bool,
    source: str,
    licence: str,
    notes: Sequence[str] = (),
    home_folder: Path | None = None,
) -> Manifest:
    """Write rows as `<home>/data/<name>/<split>.parquet` and `.json`. Equal rows give equal bytes.

    Counts are not compared with an edition here; `prepare` does that.

    Raises:
        InputError: An image cannot be decoded, two rows share an id, one image_id has two images, the disk is full, or
            a sample would replace a real split.
    """
    known_data_set(name, split)
    pixels = hash_images(f"{name} {split}", ((row.id, row.image) for row in rows))
    with lock_split(name, split, home_folder):
        return write_checked(
            name,
            split,
            rows,
            pixels,
            edition=edition,
            official=official,
            sample=sample,
            source=source,
            resolved=source,
            licence=licence,
            notes=tuple(notes),
            home_folder=home_folder,
        )


def is_prepared(name: str, split: str, home_folder: Path | None = None) -> bool:
    """Return whether a split has been written under `home_folder` (default `$STLLAVA_HOME`), whole or damaged."""
    return manifest_file(name, split, home_folder).exists()


def read_manifest(name: str, split: str, home_folder: Path | None = None) -> Manifest:
    """Read the manifest of a prepared split.

    Args:
        name: A key of `DATASETS`.
        split: A key of its `splits`; with `@` and the beginning of a name behind it, as in `test@deduplicated`, the
            prepared edition of that name instead of the one in use.
        home_folder: See `prepare`.

    Raises:
        InputError: Nothing is prepared, or by another version; with the command to run.
    """
    return _found_edition(name, split, home_folder)[0]


def _found_edition(name: str, split: str, home_folder: Path | None) -> tuple[Manifest, Path]:
    """Return the manifest and the parquet file that a split's name means; see `read_manifest`."""
    part, _, wanted = split.partition("@")
    known_data_set(name, part)
    if not wanted:
        return _read_manifest(name, part, manifest_file(name, part, home_folder)), parquet_file(name, part, home_folder)
    prepared = _editions(name, part, home_folder)
    fitting = [edition for edition in prepared if _slug(edition[0].edition).startswith(_slug(wanted))]
    if len(fitting) != 1:
        held = ", ".join(f"{part}@{_slug(manifest.edition)}" for manifest, _ in prepared) or "none"
        raise InputError(
            f"{name} {split}: {len(fitting)} of the prepared editions have such a name; there is {held}. Name one of "
            f"them, or run {what_to_run(name, part)}."
        )
    return fitting[0]


def prepared_editions(name: str, split: str, home_folder: Path | None = None) -> list[Manifest]:
    """Return the manifests of all prepared editions of a split that can be read, that of the one in use first.

    Raises:
        InputError: There is no such set or split.
    """
    known_data_set(name, split)
    return [manifest for manifest, _ in _editions(name, split, home_folder)]


def numbered_edition(name: str, split: str, ids: Collection[str]) -> Edition | None:
    """Return the edition of PathVQA that has as many rows as there are ids, if these are 0 to n - 1; else None.

    PathVQA has no ids of its own, so files number its rows, and the number of rows tells its two editions apart.

    >>> numbered_edition("pathvqa", "test", [str(number) for number in range(6719)]).name
    'deduplicated test'
    """
    editions = known_data_set(name, split).splits[split] if name == "pathvqa" else ()
    fitting = (edition for edition in editions if edition.rows == len(ids))
    return next((edition for edition in fitting if set(ids) == {str(number) for number in range(edition.rows)}), None)


def how_to_use(manifest: Manifest) -> str:
    """Return the command that takes a prepared edition into use, for messages."""
    source = manifest.resolved if local_path(manifest.resolved) else manifest.source
    split = "" if manifest.split == "test" else f" --split {manifest.split}"
    return f"`stllava-eval prepare {manifest.dataset}{split} --from {shlex.quote(source)}`"


def _read_manifest(name: str, split: str, path: Path) -> Manifest:
    try:
        written = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"{name} {split} is not prepared: there is no {path}. Run {what_to_run(name, split)}."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove it and prepare {name} again.") from error
    if not isinstance(written, dict) or written.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a manifest of format {FORMAT}. Remove it and prepare {name} again.")
    try:
        return Manifest(**{**written, "notes": tuple(written["notes"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a whole manifest ({error}). Remove it and prepare {name} again.") from error


def read_split(name: str, split: str, images: bool = True, home_folder: Path | None = None) -> datasets.Dataset:
    """Read the prepared split into memory: the parquet file's columns, `image` as `{"bytes", "path"}`, not decoded.

    The cache of `datasets` is bypassed: it identifies a file by name and time, so it may return an older content.

    Args:
        name: See `read_manifest`.
        split: See `read_manifest`.
        images: Whether to hold the column `image`.
        home_folder: See `prepare`.

    Raises:
        InputError: Nothing is prepared, or the file is not the one that its manifest describes.
    """
    import datasets
    import pyarrow as pa

    manifest, path = _found_edition(name, split, home_folder)
    with _whole_parquet(manifest, path) as file:
        columns = [column for column in file.schema_arrow.names if images or column != "image"]
        groups = [file.read_row_group(number, columns=columns) for number in range(file.num_row_groups)]
    features = datasets.Features(
        {name: datasets.Image(decode=False) if name == "image" else datasets.Value("string") for name in columns}
    )
    return datasets.Dataset(
        pa.concat_tables(groups),
        info=datasets.DatasetInfo(features=features),
        # our own fingerprint: `datasets` would serialise every image to compute one
        fingerprint=hashlib.sha256(f"{manifest.sha256_file} {images}".encode()).hexdigest()[:16],
    )


def read_rows(name: str, split: str, home_folder: Path | None = None) -> list[Row]:
    """Read the prepared split as rows; rows of one image share its bytes.

    Raises:
        InputError: See `read_split`.
    """
    manifest, path = _found_edition(name, split, home_folder)
    rows: list[Row] = []
    shared: dict[bytes, bytes] = {}
    with _whole_parquet(manifest, path) as file:
        for batch in file.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                image = record.pop("image")["bytes"]
                del record["image_sha256"]
                own = {field: record.pop(field) for field in ("id", "image_id", "question", "reference", "kind")}
                rows.append(Row(image=shared.setdefault(image, image), categories=record, **own))
    return rows


def pixel_hash_of(image: bytes) -> str:
    """Return the hash of an encoded image's decoded pixels."""
    return pixel_hash(decode(image))


def hash_images(title: str, images: Iterable[tuple[str, bytes]], missing: Sequence[str] = ()) -> dict[bytes, str]:
    """Return the hash of the decoded pixels of each image file; each distinct file is decoded once.

    Args:
        title: What the progress bar and the message say.
        images: Each row's name and its image.
        missing: Descriptions of the missing images, for the message.

    Raises:
        InputError: Images are missing or unreadable; all of them are named.
    """
    from tqdm import tqdm

    users: dict[bytes, list[str]] = defaultdict(list)
    for row, image in images:
        users[image].append(row)

    def attempt(image: bytes) -> str | InputError:
        try:
            return pixel_hash_of(image)
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(attempt, users), f"{title}: images", len(users), disable=None)
        outcomes = dict(zip(users, progress, strict=True))
    broken = [*missing]
    for image, outcome in outcomes.items():
        if isinstance(outcome, InputError):
            broken.append(f"{users[image][0]} ({len(users[image])} rows): {outcome}")
    if broken:
        raise InputError(f"{title}: {len(broken)} missing or unreadable images. {listed(broken)}")
    return {image: str(outcome) for image, outcome in outcomes.items()}


def edition_of(name: str, split: str, rows: Sequence[Row], source: str) -> Edition:
    """Return the known edition that has the rows' counts.

    Raises:
        InputError: No edition has them.
    """
    closed, images = sum(row.kind == "closed" for row in rows), len({row.image_id for row in rows})
    editions = DATASETS[name].splits[split]
    for edition in editions:
        if edition.rows == len(rows) and edition.closed in (None, closed) and edition.images in (None, images):
            return edition
    raise InputError(
        f"{name} {split} from {source}: found {counted_rows(len(rows), closed, images, verb='')}; "
        f"{'; '.join(map(str, editions))}. Prepare a whole, unchanged copy."
    )


def write_checked(
    name: str,
    split: str,
    rows: Sequence[Row],
    pixels: Mapping[bytes, str],
    *,
    sample: bool,
    home_folder: Path | None,
    **described: Any,
) -> Manifest:
    """Write checked rows and return their manifest; another edition that was in use is kept.

    The Parquet file is written first and the manifest last. In between there is no manifest, so a kill leaves nothing
    that looks prepared.

    Args:
        name: A key of `DATASETS`.
        split: A key of its `splits`.
        rows: The rows, in the split's order.
        pixels: The hash of each image's decoded pixels, by its file's content (`hash_images`).
        sample: Whether it is sample data.
        home_folder: See `prepare`.
        described: The other fields of `Manifest`: edition, source, licence and the like.

    Raises:
        InputError: A sample would replace a real split, rows are wrong, or the disk is full.
    """
    path, manifest_path = parquet_file(name, split, home_folder), manifest_file(name, split, home_folder)
    if sample and manifest_path.exists() and not read_manifest(name, split, home_folder).sample:
        raise InputError(
            f"{path} is the real {name} {split}, and a sample does not replace it. "
            "Set STLLAVA_HOME to another folder for the sample."
        )
    _check_rows(f"{name} {split}", rows)
    for leftover in path.parent.glob(f".{split}.*.unfinished"):  # of a killed run: the lock keeps other processes out
        leftover.unlink()
    with whole_file(path) as unfinished:
        _write_parquet(unfinished, rows, pixels)
        sha256_file = file_sha256(unfinished)
        _make_room(name, split, described["edition"], home_folder)
    manifest = Manifest(
        dataset=name,
        split=split,
        sample=sample,
        counts=_counts(rows),
        sha256_rows=_hash_lines(
            [row.id, row.image_id, row.question, row.reference, row.kind, row.categories] for row in rows
        ),
        sha256_pixels=_hash_lines(sorted({(row.image_id, pixels[row.image]) for row in rows})),
        sha256_file=sha256_file,
        **described,
    )
    write_json(manifest_path, {"format": FORMAT, **asdict(manifest)})
    for old in (".json", ".parquet"):  # the same edition, which was kept from another source
        _kept(path, manifest.edition).with_suffix(old).unlink(missing_ok=True)
    return manifest


def _write_parquet(file: Path, rows: Sequence[Row], pixels: Mapping[bytes, str]) -> None:
    """Write rows as a Parquet file in row groups; each distinct image of a group is stored once."""
    import pyarrow.parquet as pq

    groups = _row_groups(rows)
    first, end = groups[0]
    schema = _table(rows[first:end], pixels).schema
    with pq.ParquetWriter(
        file,
        schema,
        # a dictionary per row group stores an image once, however large; image files are compressed already
        use_dictionary=True,
        dictionary_pagesize_limit=2**31 - 1,
        compression={column: "none" if column == "image.bytes" else "zstd" for column in _leaves(schema)},
    ) as writer:
        for first, end in groups:
            writer.write_table(_table(rows[first:end], pixels), row_group_size=end - first)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return the counts in a manifest: of rows, open and closed questions, and images."""
    closed = sum(row.kind == "closed" for row in rows)
    images = len({row.image_id for row in rows})
    return {"rows": len(rows), "open": len(rows) - closed, "closed": closed, "images": images}


def _make_room(name: str, split: str, edition: str, home_folder: Path | None) -> None:
    """Rename another edition that is in use, so that it is kept; remove a sample or the same edition."""
    path, manifest_path = parquet_file(name, split, home_folder), manifest_file(name, split, home_folder)
    with suppress(InputError):  # nothing is prepared, or nothing that can be read
        used = read_manifest(name, split, home_folder)
        if not used.sample and used.edition != edition:
            kept = _kept(path, used.edition)
            with suppress(FileNotFoundError):  # a kill came between these two renames
                path.replace(kept)
            manifest_path.replace(kept.with_suffix(".json"))
    manifest_path.unlink(missing_ok=True)


def _kept(path: Path, edition: str) -> Path:
    """Return the path of an edition that is prepared and not in use: `test@deduplicated-test.parquet`."""
    return path.with_name(f"{path.stem}@{_slug(edition)}.parquet")


def _slug(edition: str) -> str:
    """Return an edition's name as a part of a file's name: `deduplicated-test`."""
    return re.sub(r"[^a-zA-Z0-9_]+", "-", edition).strip("-")


def _editions(name: str, split: str, home_folder: Path | None) -> list[tuple[Manifest, Path]]:
    """Return the manifest and the parquet file of each prepared edition, the one in use first."""
    used = manifest_file(name, split, home_folder)
    editions = []
    for path in [used, *sorted(used.parent.glob(f"{split}@*.json"))]:
        with suppress(InputError):
            editions.append((_read_manifest(name, split, path), path.with_suffix(".parquet")))
    return editions


def use_edition(manifest: Manifest, file: Path, home_folder: Path | None) -> None:
    """Take a prepared edition into use."""
    path = parquet_file(manifest.dataset, manifest.split, home_folder)
    if file == path:
        return
    _make_room(manifest.dataset, manifest.split, manifest.edition, home_folder)
    file.replace(path)
    file.with_suffix(".json").replace(path.with_suffix(".json"))


def _check_rows(title: str, rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError(f"{title} has no rows. Pass at least one.")
    repeated = [id for id, times in Counter(row.id for row in rows).items() if times > 1]
    if repeated:
        raise InputError(f"{title}: several rows of one id: {listed(repeated)}. Ids are unique.")
    wrong = [f"{row.id}: {row.kind!r}" for row in rows if row.kind not in ("open", "closed")]
    if wrong:
        raise InputError(f"{title}: a kind is open or closed, not {listed(wrong)}.")
    images: dict[str, bytes] = {}
    mixed = set()
    for row in rows:
        if images.setdefault(row.image_id, row.image) != row.image:
            mixed.add(row.image_id)
    if mixed:
        raise InputError(f"{title}: one image_id, several images: {listed(sorted(mixed))}. An image has one name.")


def _row_groups(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the first row and the end of each row group: as few as fit, since each stores its images."""
    starts, size = [0], 0
    for number, row in enumerate(rows):
        size += len(row.image)
        if size > ROW_GROUP_BYTES and number > starts[-1]:
            starts.append(number)
            size = len(row.image)
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def _table(rows: Sequence[Row], pixels: Mapping[bytes, str]) -> pa.Table:
    """Return the rows as an Arrow table whose metadata declare `image` an image to `datasets`."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "image": pa.array(
            [{"bytes": row.image, "path": row.image_id} for row in rows],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        "image_id": [row.image_id for row in rows],
        "image_sha256": [pixels[row.image] for row in rows],
        "question": [row.question for row in rows],
        "reference": [row.reference for row in rows],
        "kind": [row.kind for row in rows],
        **{category: [row.categories[category] for row in rows] for category in rows[0].categories},
    }
    features = {
        name: {"_type": "Image"} if name == "image" else {"dtype": "string", "_type": "Value"} for name in columns
    }
    table = pa.table(
        {name: values if name == "image" else pa.array(values, pa.string()) for name, values in columns.items()}
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the leaf columns as Parquet names them: those of the struct `image` are `image.bytes` and `image.path`."""
    leaves: list[str] = []
    for name in schema.names:
        leaves += ["image.bytes", "image.path"] if name == "image" else [name]
    return leaves


def parquet_file(name: str, split: str, home_folder: Path | None = None) -> Path:
    """Return the path of a prepared split's Parquet file."""
    return (home_folder or home()) / "data" / name / f"{split}.parquet"


def manifest_file(name: str, split: str, home_folder: Path | None = None) -> Path:
    """Return the path of a prepared split's manifest."""
    return parquet_file(name, split, home_folder).with_suffix(".json")


def lock_split(name: str, split: str, home_folder: Path | None) -> AbstractContextManager:
    """Return the lock that is held while a split is prepared.

    The ranks of one run all find the split missing, and one of them prepares it.
    """
    import filelock

    path = parquet_file(name, split, home_folder).with_name(f".{split}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be created ({error.strerror}). Set STLLAVA_HOME to another folder."
        ) from error
    return filelock.FileLock(path)


def finished_split(name: str, split: str, given: str, home_folder: Path | None) -> tuple[Manifest, Path] | None:
    """Return the manifest and file of the edition that was prepared from this source, if both are as they were."""
    source = local_path(given)
    for manifest, path in _editions(name, split, home_folder):
        same = manifest.resolved == str(source.resolve()) if source is not None else manifest.source == given
        if same and not _changed(source, path.with_suffix(".json").stat().st_mtime):
            with suppress(InputError), _whole_parquet(manifest, path):
                return manifest, path
    return None


def _changed(source: Path | None, since: float) -> bool:
    """Return whether a file of a local source was written or put there after a time (s, of its disk's clock)."""
    if source is None:
        return False
    try:
        files = [source / name for name in open_folder(source).names] if source.is_dir() else [source]
        # ctime, because unpacking an archive sets mtime back
        return any(max(file.stat().st_ctime, file.lstat().st_ctime) > since for file in files)
    except OSError:  # a link to nowhere
        return True


def _whole_parquet(manifest: Manifest, path: Path) -> Any:
    """Open the split's Parquet file, and check that it is the one that the manifest describes.

    Raises:
        InputError: It is another file, or an earlier version wrote it.
    """
    import pyarrow.parquet as pq

    again = f"Run {what_to_run(manifest.dataset, manifest.split)} again."
    if not path.exists() or file_sha256(path) != manifest.sha256_file:
        raise InputError(
            f"{path} is not the file that was prepared: its sha256 is not the manifest's. Remove it. {again}"
        )
    file = pq.ParquetFile(path)
    editions = DATASETS[manifest.dataset].splits[manifest.split]
    prefix = next((edition.prefix for edition in editions if edition.name == manifest.edition), "")
    if prefix and not file.read_row_group(0, columns=["id"])["id"][0].as_py().startswith(prefix):
        file.close()
        raise InputError(
            f"{path} was prepared by an earlier version, whose ids of the {manifest.edition} were also those of the "
            f"official one. {again}"
        )
    return file


def _hash_lines(lines: Iterable[Any]) -> str:
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def what_to_run(name: str, split: str) -> str:
    """Return the commands that prepare this split, for messages."""
    chosen = "" if split == "test" else f" --split {split}"  # the command prepares the test split by default
    return f"`stllava-eval prepare {name}{chosen} --from DIR`, or `stllava-eval prepare {name} --sample`"


def listed(items: Sequence[str]) -> str:
    """Return the first items and how many more there are, for messages."""
    more = f" ... and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return "; ".join(items[:LISTED]) + more
