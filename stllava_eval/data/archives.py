"""Open a folder, a ZIP or TAR archive or a download, and refuse what is too large or leads out of it.

`prepare.py` opens the files of a data set here, before `readers.py` reads rows from them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stllava_eval.errors import InputError, one_line

# The largest sources that are read. Sizes are checked before anything is read, because a few megabytes can unpack to
# terabytes. All of these are our choice, well above what the three data sets need.
LISTING_BYTES = 2**26  # an archive's list of its members; PathVQA's 4,998 images make 8 MB in a tar archive
TABLE_BYTES = 2**26  # a JSON or pickle file; the largest that we know, SLAKE's train.json, has 3 MB
TEXTS_BYTES = 2**28  # a Parquet file without its images; PathVQA's, the largest, has about 2 MB
NESTED_BYTES = 2**30  # zip archives inside an archive, held in memory; SLAKE's imgs.zip has 0.2 GB
PARQUET_BYTES = 2**31  # a Parquet file, held in memory; those of hub copies have up to about 0.5 GB
IMAGES_BYTES = 2**32  # all image files of a split, held in memory; PathVQA's have about 1 GB
UNPACKED_BYTES = 2**33  # an unpacked tar or Parquet file; PathVQA's train split, with an image in each row, has 3 GB


# Open a source as a list of files.


@dataclass(frozen=True)
class Files:
    """The files of a folder or archive, in its own order. Nothing is unpacked onto the disk."""

    location: str
    names: tuple[str, ...]
    open: Callable[[str], IO[bytes]]
    size: Callable[[str], int]
    """Returns the bytes of a file, as the folder or archive says before anything of it is read."""

    def read(self, name: str, most: int) -> bytes:
        """Read the whole file.

        Raises:
            InputError: It has more than `most` bytes or than it says, cannot be read, or the archive is damaged.
        """
        try:
            if (size := self.size(name)) > most:
                raise InputError(
                    f"{self.location}: {name} has {size:,} bytes, and at most {most:,} are read. {REMEDY}."
                )
            with self.open(name) as file:
                content = file.read(size + 1)
        except DAMAGES as error:
            raise InputError(f"{self.location}: {name} cannot be read ({one_line(error)}). {REMEDY}.") from error
        if len(content) > size:
            raise InputError(f"{self.location}: {name} holds more than the {size:,} bytes that it says. {REMEDY}.")
        return content


REMEDY = "Download it again"
DAMAGES = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)


class Bounded:
    """A file of which at most `left` more bytes can be read, since the sizes that an archive states need not be true.

    Raises:
        InputError: On reading more, or on going beyond `UNPACKED_BYTES`.
    """

    def __init__(self, file: Any, location: str) -> None:
        self.file, self.location, self.left = file, location, LISTING_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Read as a file does."""
        content = self.file.read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise InputError(f"{self.location}: more is in it than the files of a data set take. {REMEDY}.")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as a file does; in a compressed one, everything up to there is unpacked."""
        if whence == os.SEEK_SET and offset > UNPACKED_BYTES and not isinstance(self.file, io.BufferedReader):
            raise InputError(f"{self.location}: it unpacks to more than {UNPACKED_BYTES:,} bytes. {REMEDY}.")
        return self.file.seek(offset, whence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """Yield the files of a folder or of a zip or tar archive, and those of zip archives in it (SLAKE's imgs.zip).

    Raises:
        InputError: Neither a folder nor an archive, or an archive with a member that would leave its folder.
    """
    with ExitStack() as stack:
        if not path.is_dir() and not path.is_file():
            raise InputError(f"{path} is neither a folder nor a regular file. Pass what holds the set's files.")
        if path.is_dir():
            outer = open_folder(path)
        elif _is_tar(path):  # before zip: a tar that ends with a zip passes for one
            outer = _tar(path, stack)
        elif zipfile.is_zipfile(path):
            outer = _zip(str(path), stack.enter_context(path.open("rb")))
        else:
            raise InputError(f"{path} is neither a folder nor a zip or tar archive. Pass what holds the set's files.")
        owners: dict[str, tuple[Files, str]] = {name: (outer, name) for name in outer.names}
        left = NESTED_BYTES
        for archive in [name for name in outer.names if name.lower().endswith(".zip")]:
            location = f"{path}: {archive}"
            if path.is_dir():
                outer.size(archive)  # refuses a pipe, at which opening it would wait
                inner = _zip(location, stack.enter_context(outer.open(archive)))
            else:  # a member of an archive is slow to seek in
                inner = _zip(location, io.BytesIO(outer.read(archive, left)))
                left -= outer.size(archive)
            owners |= {f"{archive}/{name}": (inner, name) for name in inner.names}
        # Windows' own tools write a\b into an archive, which no other system takes for a folder
        spelt = {name.replace("\\", "/"): name for name in owners}
        if len(spelt) < len(owners):
            twice = next(name for name in owners if spelt[name.replace("\\", "/")] != name)
            raise InputError(f"{path}: it holds {twice} twice, with / and with \\ in the name. {REMEDY}.")
        owners = {name: owners[inside] for name, inside in spelt.items()}
        yield Files(
            str(path),
            tuple(owners),
            lambda name: owners[name][0].open(owners[name][1]),
            lambda name: owners[name][0].size(owners[name][1]),
        )


def open_folder(path: Path) -> Files:
    """Open a folder: the names of its files, without hidden ones, and how each is read."""
    names, seen = [], set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        names += [(Path(folder) / name).relative_to(path).as_posix() for name in sorted(files) if name[0] != "."]

    def size(name: str) -> int:
        try:
            status = (path / name).stat()
        except OSError as error:  # a link to nowhere
            raise InputError(f"{path}: {name} cannot be read ({error.strerror}). {REMEDY}.") from error
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe would never end
            raise InputError(f"{path}: {name} is no regular file. Pass a folder that holds the files themselves.")
        return status.st_size

    return Files(str(path), tuple(names), lambda name: (path / name).open("rb"), size)


def _zip(location: str, file: IO[bytes]) -> Files:
    bounded = Bounded(file, location)
    try:
        archive = zipfile.ZipFile(bounded)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError) as error:
        raise InputError(f"{location} is not a whole zip archive ({one_line(error)}). {REMEDY}.") from error
    bounded.left = UNPACKED_BYTES
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        # the upper 16 bits are the Unix mode of the file (Info-ZIP), by which a link is known
        _refuse_escape(location, member.filename, stat.S_ISLNK(member.external_attr >> 16))
        # with other compressions, Python unpacks everything before it checks the size
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{location}: {member.filename!r} is compressed in a way (number {member.compress_type}) that is not "
                "read here. Pack it with zip, or unpack it and pass the folder."
            )
    return Files(
        location,
        _without_litter(member.filename for member in members),
        archive.open,
        lambda name: archive.getinfo(name).file_size,
    )


def _is_tar(path: Path) -> bool:
    try:
        with _unpacked(path) as file, _tar_file(Bounded(file, str(path))):
            return True
    except DAMAGES:  # it begins like a compressed file and is none
        return False


def _unpacked(path: Path) -> Any:
    """Open the file without its compression, gzip, bzip2 or xz, which its first bytes (magic numbers) name."""
    with path.open("rb") as file:
        begin = file.read(6)
    if begin.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if begin.startswith(b"BZh"):
        return bz2.open(path)
    return lzma.open(path) if begin == b"\xfd7zXZ\0" else path.open("rb")


def _tar_file(file: Bounded) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]


def _tar(path: Path, stack: ExitStack) -> Files:
    try:
        bounded = Bounded(stack.enter_context(_unpacked(path)), str(path))
        archive = stack.enter_context(_tar_file(bounded))
        members, size = [], 0
        for member in archive:
            size += member.size
            if member.size > PARQUET_BYTES or size > UNPACKED_BYTES:  # before the next one is looked for behind it
                raise InputError(
                    f"{path}: {member.name} has {member.size:,} bytes, and at most {PARQUET_BYTES:,} are read of a "
                    f"file, {UNPACKED_BYTES:,} in all. {REMEDY}."
                )
            if not member.isdir():
                members.append(member)
    except DAMAGES as error:
        raise InputError(f"{path} is not a whole tar archive ({one_line(error)}). {REMEDY}.") from error
    bounded.left = UNPACKED_BYTES
    for member in members:
        _refuse_escape(str(path), member.name, not member.isfile())
    by_name = {member.name: member for member in members}
    return Files(
        str(path),
        _without_litter(by_name),
        lambda name: archive.extractfile(by_name[name]),  # type: ignore
        lambda name: by_name[name].size,
    )


def _refuse_escape(location: str, member: str, no_file: bool) -> None:
    """Refuse a member that unpacked elsewhere would write or point outside its folder; we unpack nothing ourselves."""
    path = PurePosixPath(member.replace("\\", "/"))
    if no_file or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", member):
        raise InputError(
            f"{location}: {member!r} is a link or leads out of the archive's folder. Do not use this archive."
        )


def _without_litter(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without those that macOS adds: `__MACOSX/._synpic1.jpg` is named like an image and is none."""

    def is_litter(name: str) -> bool:
        return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)

    return tuple(name for name in names if not is_litter(name))
