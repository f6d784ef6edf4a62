"""Read candidates together with the verdicts on them: what pairs and audits are made of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable
from stllava_eval.storage import file_sha256

if TYPE_CHECKING:
    from stllava_train.preferences.rows import Candidate
    from stllava_train.preferences.verdicts import Verdict


def read_judged(candidates: Path, judged: Path) -> tuple[list[Candidate], list[Verdict], Path]:
    """Return the candidates, the verdicts on them, and the folder of their images.

    A file of verdicts that is not finished is named on stderr, and what it holds is returned.

    Raises:
        InputError: The verdicts are on other candidates.
    """
    # numpy and the scores, which help texts must not wait for
    from stllava_train.preferences.rows import read_candidates
    from stllava_train.preferences.verdicts import read_verdicts
    from stllava_train.resumable import read_manifest

    manifest, judging = manifest_of_candidates(candidates), read_manifest(judged)
    sha256, judged_file = hash_of_input(candidates), judging.get("candidates") or {}
    if judged_file.get("sha256") != sha256:
        raise InputError(
            f"{judged}: it judges {judged_file.get('file')} as it was, not {candidates}. Pass what was judged."
        )
    if not judging.get("finished"):
        print(printable(f"{judged}: not everything in it is judged"), file=sys.stderr)
    return read_candidates(candidates), read_verdicts(judged), Path(manifest["folder"])


def manifest_of_candidates(file: Path) -> dict[str, Any]:
    """Return the manifest of a file of candidates.

    Raises:
        InputError: The manifest is missing, or of another stage.
    """
    from stllava_train.resumable import read_manifest

    if not file.is_file():
        raise InputError(f"{file}: no such file. Pass what `stllava-train candidates` wrote.")
    manifest = read_manifest(file)
    if manifest.get("stage") != "candidates":
        raise InputError(f"{file}: of stage {manifest.get('stage')}. Pass what `stllava-train candidates` wrote.")
    return {"finished": False, "folder": "."} | manifest


def hash_of_input(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex; raises InputError where it cannot be read."""
    try:
        return file_sha256(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Pass another file.") from error
