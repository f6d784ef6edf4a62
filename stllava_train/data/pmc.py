"""Figures of PubMed Central: their addresses -> image files, and a manifest from which a killed run resumes."""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import http.client
import io
import json
import posixpath
import random
import re
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from stllava_eval.data.archives import Bounded
from stllava_eval.errors import InputError
from stllava_eval.images import SeveralFramesError, decode, read_image
from stllava_eval.storage import loads, read_bytes, whole_file
from stllava_eval.version import __version__

# Since 2026 PMC hands out single files here, one folder for each version of an article:
# https://pmc.ncbi.nlm.nih.gov/tools/pmcaws
CLOUD = "https://pmc-oa-opendata.s3.amazonaws.com"
FTP = "ftp.ncbi.nlm.nih.gov"

# All our choice.
WORKERS = 8
ATTEMPTS = 5  # of one address
BACK_OFF = 1.0  # s before the second attempt, doubled before each further one
LONGEST_WAIT = 300.0  # s; a server that asks for more is asked again by the next run
SILENCE = 60.0  # s without a byte until an attempt ends
GIVE_UP = 50  # figures in a row that could not be fetched for now: the network is gone, or we are blocked
FIGURE_BYTES = 2**26  # of one image
PACKAGE_BYTES = 2**32  # of one article's archive, and of what it unpacks to


@dataclass(frozen=True)
class Figure:
    """One image to have."""

    file: Path  # where it goes
    package: str | None  # address of the article's tar.gz; None: nobody knows
    member: str = ""  # its name in there, `PMC7236913/nihms-1587931-f0001.jpg`


@dataclass(frozen=True)
class Fetched:
    """Figure id -> what became of it. Each id is in one of the three."""

    found: dict[str, str] = field(default_factory=dict)  # sha256 of the file
    missing: dict[str, str] = field(default_factory=dict)  # why it will not be had: in the manifest
    failed: dict[str, str] = field(default_factory=dict)  # why not this time: the next run tries again


class _MissingError(Exception):
    """It is not there, and asking again would not help."""


class _NotNowError(Exception):
    """It may be there. `wait`: seconds that the server asked for; None where it named none, or has refused us."""

    def __init__(self, why: str, *, again: bool, wait: float | None = None) -> None:
        super().__init__(why)
        self.again = again
        self.wait = wait


def fetch_figures(
    figures: Mapping[str, Figure], manifest: Path, *, workers: int = WORKERS, retry_missing: bool = False
) -> Fetched:
    """Fetch what is neither on the disk nor known to be missing; each outcome is a line of the manifest at once.

    A figure is looked for at its own address in PMC's cloud, then in the article's package, which is downloaded once
    for all its figures. It is kept, byte for byte, if it decodes in full. Progress goes to stderr.

    Args:
        figures: Figure id -> where it is and goes.
        manifest: JSONL file, appended: `{"id", "found", "why", "sha256"}`. Of two lines of one id the later counts.
        workers: Articles at a time.
        retry_missing: Ask again for what the manifest calls missing.

    Raises:
        InputError: The disk is full, another run is at work here, the manifest has a line that is none, or `GIVE_UP`
            figures in a row failed. What was fetched stays, and the next run continues.
    """
    import filelock
    from tqdm import tqdm

    try:
        folders = sorted({figure.file.parent for figure in figures.values()})
        for folder in (manifest.parent, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(manifest.with_name(f".{manifest.name}.lock"), timeout=0):
            for folder in folders:
                for leftover in folder.glob(".*.unfinished"):  # of a killed run; nobody else is at work here
                    leftover.unlink()
            fetched, packages = _what_is_left(figures, _read_manifest(manifest), retry_missing)
            stop = threading.Event()
            done = len(fetched.found) + len(fetched.missing)
            with (
                manifest.open("a", encoding="utf-8") as lines,
                tqdm(desc="figures", total=len(figures), initial=done, unit="figure", disable=None) as progress,
                ThreadPoolExecutor(workers) as pool,
            ):
                jobs = [pool.submit(_fetch_package, package, wanted, stop) for package, wanted in packages.items()]
                try:
                    _collect((job.result() for job in as_completed(jobs)), fetched, lines, progress)
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    except filelock.Timeout as error:
        raise InputError(f"{manifest}: another run writes it. Wait for its end, or choose another folder.") from error
    except OSError as error:  # the disk's: the network's are outcomes
        raise InputError(
            f"{manifest.parent}: cannot be written ({error.strerror or error}). Free some space or choose another "
            "folder, then run the same command again: it continues where this one stopped."
        ) from error
    return fetched


def fetch_file(url: str, path: Path) -> None:
    """Download `url` to `path`, whole or not at all.

    Raises:
        InputError: It is not there, or cannot be had now.
    """
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        try:
            _download(url, file, PACKAGE_BYTES, threading.Event())
        except (_MissingError, _NotNowError) as error:
            raise InputError(
                f"{url}: cannot be downloaded ({error}). Get {path.name} elsewhere and pass its folder with --from."
            ) from error


def _what_is_left(
    figures: Mapping[str, Figure], known: Mapping[str, tuple[str, str]], retry_missing: bool
) -> tuple[Fetched, dict[str | None, dict[str, Figure]]]:
    """Return what the manifest and the disk say already, and by package what is still due."""
    fetched = Fetched()
    packages: dict[str | None, dict[str, Figure]] = {}
    for id, figure in figures.items():
        sha256, why = known.get(id, ("", ""))
        on_disk = figure.file.exists()
        if sha256 and on_disk:
            fetched.found[id] = sha256
        elif why and not on_disk and not retry_missing:
            fetched.missing[id] = why
        else:
            packages.setdefault(figure.package, {})[id] = figure
    return fetched, packages


def _collect(packages: Iterator[Fetched], fetched: Fetched, lines: IO[str], progress: Any) -> None:
    in_a_row = 0
    for package in packages:
        fetched.found.update(package.found)
        fetched.missing.update(package.missing)
        fetched.failed.update(package.failed)
        for id, sha256 in package.found.items():
            lines.write(json.dumps({"id": id, "found": True, "why": None, "sha256": sha256}) + "\n")
        for id, why in package.missing.items():
            lines.write(json.dumps({"id": id, "found": False, "why": why, "sha256": None}) + "\n")
        lines.flush()
        progress.update(len(package.found) + len(package.missing) + len(package.failed))
        in_a_row = 0 if package.found or package.missing else in_a_row + len(package.failed)
        if in_a_row >= GIVE_UP:
            raise InputError(
                f"{in_a_row} figures in a row could not be fetched, at last for: "
                f"{next(iter(package.failed.values()))}. Look at the network, then run the same command again: it goes "
                "on where this one stopped."
            )


def _read_manifest(path: Path) -> dict[str, tuple[str, str]]:
    """Read figure id -> (sha256, why), one of them empty. A last line cut by a kill is removed from the file."""
    if not path.exists():
        return {}
    raw = read_bytes(path)
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    known = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = loads(line)
            known[record["id"]] = (record["sha256"] or "", record["why"] or "")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not a line of this manifest, which has id, found, why, sha256. Remove the line: "
                "its figure is looked at again."
            ) from error
    return known


def _fetch_package(package: str | None, figures: Mapping[str, Figure], stop: threading.Event) -> Fetched:
    """Fetch the figures of one article."""
    fetched = Fetched()
    packed: dict[str, Figure] = {}
    for id, figure in figures.items():
        try:
            sha256 = _on_disk(figure.file) or _from_cloud(figure, stop)
        except _NotNowError as error:
            fetched.failed[id] = str(error)
        except _MissingError as error:
            fetched.missing[id] = str(error)
        else:
            if sha256:
                fetched.found[id] = sha256
            else:
                packed[id] = figure
    if not packed:
        return fetched
    try:
        folder = next(iter(packed.values())).file.parent
        members = _members(package, {figure.member for figure in packed.values()}, folder, stop)
    except _NotNowError as error:
        fetched.failed.update(dict.fromkeys(packed, str(error)))
    except _MissingError as error:
        fetched.missing.update(dict.fromkeys(packed, str(error)))
    else:
        for id, figure in packed.items():
            member = members.get(figure.member, "not in the package")
            try:
                fetched.found[id] = _keep(member, figure.file)
            except _MissingError as error:
                fetched.missing[id] = str(error)
    return fetched


def _on_disk(file: Path) -> str | None:
    """Return the hash of an image that is there already, by whatever means; None where it is broken."""
    if not file.exists():
        return None
    try:
        image = read_image(file)
        decode(image)
    except InputError:
        return None
    return hashlib.sha256(image).hexdigest()


def _from_cloud(figure: Figure, stop: threading.Event) -> str | None:
    """Return the hash of the figure as fetched from its own address; None where it is not there."""
    article, _, name = figure.member.partition("/")
    if not re.fullmatch(r"PMC\d+", article) or not name:
        return None
    # Version 1 is what LLaVA-Med's authors will have seen, and what nearly every article has alone.
    url = f"{CLOUD}/{article}.1/{urllib.parse.quote(name)}"
    image = io.BytesIO()
    try:
        _download(url, image, FIGURE_BYTES, stop)
    except _MissingError:
        return None
    return _keep(image.getvalue(), figure.file)


def _keep(image: bytes | str, file: Path) -> str:
    """Write the image if it decodes in full; its hash. A text says why there is none."""
    if isinstance(image, str):
        raise _MissingError(image)
    try:
        decode(image)
    except SeveralFramesError as error:
        raise _MissingError("an image of several frames") from error
    except InputError as error:
        raise _MissingError("not a readable image") from error
    with whole_file(file) as unfinished:
        unfinished.write_bytes(image)
    return hashlib.sha256(image).hexdigest()


def _members(package: str | None, wanted: set[str], folder: Path, stop: threading.Event) -> dict[str, bytes | str]:
    """Yield member -> its bytes, or why not. Nothing is unpacked: only the bytes of regular members are read.

    The archive lies in a nameless file in `folder`, so that a kill leaves nothing behind.
    """
    if package is None:
        raise _MissingError("no address known")
    with tempfile.TemporaryFile(dir=folder) as archive:
        _download(package_url(package), archive, PACKAGE_BYTES, stop)
        archive.seek(0)
        return _read_members(archive, wanted)


def _read_members(archive: IO[bytes], wanted: set[str]) -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {}
    unpacked = 0
    try:
        with gzip.open(archive) as content:
            bounded = Bounded(content, "the package")
            with tarfile.open(fileobj=bounded, mode="r:") as opened:  # type: ignore[call-overload]
                for member in opened:
                    unpacked += member.size
                    if unpacked > PACKAGE_BYTES:
                        raise _MissingError("package too large")
                    name = posixpath.normpath(member.name)
                    if name not in wanted or name in members:
                        continue
                    if not member.isreg():
                        members[name] = "a link, not a file, in the package"
                    elif member.size > FIGURE_BYTES:
                        members[name] = "image too large"
                    else:
                        bounded.left += member.size
                        file = opened.extractfile(member)
                        assert file is not None  # of a regular member it never is
                        members[name] = file.read()
                    if len(members) == len(wanted):
                        break
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, InputError) as error:
        raise _MissingError("broken package") from error
    return members


def package_url(url: str) -> str:
    """Return where the package is today, over https.

    NCBI moved `oa_package` below `deprecated` on 13 April 2026 and announced its end for August 2026
    (https://pmc.ncbi.nlm.nih.gov/tools/maintain-oa-subset): a package that is still there, is there.

    >>> package_url("ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/3f/46/PMC7236913.tar.gz")
    'https://ftp.ncbi.nlm.nih.gov/pub/pmc/deprecated/oa_package/3f/46/PMC7236913.tar.gz'
    """
    parts = urllib.parse.urlsplit(url)
    if parts.hostname != FTP:
        return url
    path = re.sub(r"^/pub/pmc/oa_package/", "/pub/pmc/deprecated/oa_package/", parts.path)
    return f"https://{FTP}{path}"


def _download(url: str, into: IO[bytes], limit: int, stop: threading.Event) -> None:
    """Write the reply's body to `into`, asking again with growing pauses, or as long as the server says.

    Raises:
        _MissingError: HTTP 404 or 410, more than `limit` bytes, or no http(s) address.
        _NotNowError: Every attempt failed, the server refused us, or `stop` was set.
    """
    for attempt in range(1, ATTEMPTS + 1):
        into.seek(0)
        into.truncate()
        try:
            for chunk in _chunks(url, limit):
                if stop.is_set():
                    raise _NotNowError("stopped", again=False)
                into.write(chunk)
        except _NotNowError as error:
            # random, so that workers refused together do not come back together
            pause = BACK_OFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            wait = pause if error.wait is None else error.wait + random.uniform(0, BACK_OFF)
            if not error.again or attempt == ATTEMPTS or wait > LONGEST_WAIT + BACK_OFF or stop.wait(wait):
                raise
        else:
            return


def _chunks(url: str, limit: int) -> Iterator[bytes]:
    """Yield the reply's body, as it comes. What the network can do wrong becomes `_MissingError` or `_NotNowError`."""
    if not url.startswith(("http://", "https://")):  # urllib would open file:///etc/passwd too
        raise _MissingError("no web address")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"stllava-med/{__version__}"})
        with urllib.request.urlopen(request, timeout=SILENCE) as reply:
            length, size = reply.headers.get("Content-Length"), 0
            while chunk := reply.read(2**16):
                size += len(chunk)
                if size > limit:
                    raise _MissingError("too large")
                yield chunk
            if length is not None and size != int(length):
                raise _NotNowError("connection lost", again=True)
    except urllib.error.HTTPError as error:
        error.close()
        why = f"HTTP {error.code}"
        if error.code in (404, 410):
            raise _MissingError(why) from error
        # 403 may be a block of our address, so it is no word about the file; asking on would not lift it
        again = error.code in (408, 425, 429) or error.code >= 500
        raise _NotNowError(why, again=again, wait=_seconds(error.headers.get("Retry-After"))) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        why = "timeout" if isinstance(reason, TimeoutError) else f"no connection ({type(reason).__name__})"
        raise _NotNowError(why, again=True) from error


def _seconds(retry_after: str | None) -> float | None:
    """Return the wait that a Retry-After header asks for, in seconds or until a date; None if it says neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
