"""Prepare the three data sets: turn downloaded files into checked splits, which tasks, training and reports read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stllava_eval.data.archives import open_files
from stllava_eval.data.catalog import Edition, Manifest, Row, known_data_set
from stllava_eval.data.readers import find_images, ids_hash, match_official_vqarad, read_source_rows, row_of, text_hash
from stllava_eval.data.splits import (
    edition_of,
    finished_split,
    hash_images,
    listed,
    lock_split,
    log,
    manifest_file,
    parquet_file,
    use_edition,
    what_to_run,
    write_checked,
)
from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import local_path


def prepare(name: str, split: str, source: str | Path | None = None, home_folder: Path | None = None) -> Manifest:
    """Check a split against its known editions and write it under `home_folder` (default `$STLLAVA_HOME`).

    Afterwards it is the edition in use, which tasks ask about; another edition that was in use is kept beside it. If
    the same source has been prepared, has not changed since, and its file is whole, it is not read again.

    Args:
        name: A key of `DATASETS`.
        split: A key of its `splits`.
        source: A folder or archive with the authors' files or a hub copy's, or a hub id (default: the set's).

    Raises:
        InputError: The source cannot be read or is not an edition we know, an image is missing or broken, or the disk
            is full. What was prepared before stays.
    """
    dataset = known_data_set(name, split)
    if not dataset.splits[split]:
        raise InputError(f"{dataset.title} has no {split} split of its own; `stllava-eval prepare --sample` makes one.")
    given = str(source or dataset.hub)
    with lock_split(name, split, home_folder):
        done = finished_split(name, split, given, home_folder)
        if done is not None:
            log.info(
                "%s %s is prepared from %s already: %s", name, split, given, parquet_file(name, split, home_folder)
            )
            use_edition(*done, home_folder)
            return done[0]
        path, resolved = _fetch(name, split, given)
        with open_files(path) as files:
            source_rows, notes = read_source_rows(name, split, files)
            images, missing = find_images(source_rows, files)
        present = ((row.location, image) for row, image in zip(source_rows, images, strict=True) if image)
        pixels = hash_images(f"{name} {split}", present, missing)
        if (name, split) == ("vqarad", "test"):
            rows, more = match_official_vqarad(source_rows, images, pixels)
            notes += more
        else:
            rows = [row_of(row, image, pixels[image]) for row, image in zip(source_rows, images, strict=True)]
        edition = edition_of(name, split, rows, resolved)
        rows = [replace(row, id=edition.prefix + row.id) for row in rows]
        doubts = _doubts(edition, rows)
        return write_checked(
            name,
            split,
            rows,
            pixels,
            edition=edition.name,
            official=edition.official and not doubts,
            sample=False,
            source=given,
            resolved=resolved,
            licence=dataset.licence,
            notes=(*notes, *_remarks(dataset.splits[split], edition, rows), *doubts),
            home_folder=home_folder,
        )


def prepare_on_first_use(name: str, split: str) -> None:
    """Prepare the split from the set's hub copy unless something, a sample included, is prepared.

    Raises:
        InputError: The hub cannot be reached, with what to run instead.
    """
    dataset = known_data_set(name, split)
    if manifest_file(name, split).exists():
        return
    log.warning("%s %s is not prepared yet: fetching %s from the hub", name, split, dataset.hub)
    for note in prepare(name, split).notes:
        log.warning("%s %s: %s", name, split, note)


def _fetch(name: str, split: str, given: str) -> tuple[Path, str]:
    """Return the source's path on this disk, downloaded if it is a hub id, and its full name."""
    if (path := local_path(given)) is not None:
        return path, str(path.resolve())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise InputError(
            f"{given}: no such folder or archive. Pass one with the files of {name}, or a hub id owner/name."
        )
    import huggingface_hub  # slow to import, and only downloads need it

    part = split.removesuffix("_zh")
    wanted = ["*.json", "*.jsonl", "*.pkl", "*.zip", f"*{part}*.parquet", f"*{part}/*.parquet"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(given, repo_type="dataset", allow_patterns=wanted, etag_timeout=5)
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{given} cannot be fetched from the hub ({one_line(error)}). Download the files of {name} elsewhere and "
            f"run {what_to_run(name, split)}."
        ) from error
    return folder, f"{given}@{folder.name}"


def _doubts(edition: Edition, rows: Sequence[Row]) -> list[str]:
    """Explain, in notes for the manifest, why rows with an edition's counts are not that edition; none if they are."""
    if edition.text is not None and edition.text != text_hash(rows)[:16]:
        return [f"not official: counts as the {edition.name}, but other questions, references or kinds"]
    if edition.ids is not None and edition.ids != ids_hash(rows)[:16]:
        return [f"not official: the text of the {edition.name}, but under other ids, so answers of others do not fit"]
    written_out = [row.id for row in rows if re.fullmatch(r"\[.*\]|\{.*\}|nan|<NA>", row.reference.strip())]
    if edition.text is None and written_out:
        return [
            f"not official: counts as the {edition.name}, but the references of {len(written_out)} rows are lists, "
            f"objects or missing values that were written out as text: {listed(written_out)}"
        ]
    return []


def _remarks(known: Sequence[Edition], edition: Edition, rows: Sequence[Row]) -> list[str]:
    """Return further notes for the manifest of an edition that fits."""
    notes = []
    if not edition.verified:
        notes.append(f"unverified: {edition}, and what this leaves out is documented nowhere we could check")
    if not edition.official and (own := next((published for published in known if published.official), None)):
        notes.append(f"not the split as its authors published it: {own}")
    empty = [row.id for row in rows if not row.reference.strip()]
    if empty:
        notes.append(f"no reference in {len(empty)} rows: {listed(empty)}")
    return notes
