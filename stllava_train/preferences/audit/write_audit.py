"""Audit judges and data in one call: a file of candidates and a file of verdicts on them -> figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stllava_eval.errors import InputError
from stllava_eval.inference.open import open_answerer
from stllava_train.preferences.audit.figures import audit, read_references
from stllava_train.preferences.audit.page import EXAMPLES, examples, write_page
from stllava_train.preferences.judged import read_judged
from stllava_train.preferences.verdicts import Rule
from stllava_train.resumable import read_rows


def write_audit(
    candidates: Path,
    judged: Path,
    out: Path,
    *,
    images: Path | None = None,
    judges: Sequence[str] = (),
    references: Sequence[Path] = (),
    checkpoint: str | None = None,
    number: int = EXAMPLES,
) -> Path:
    """Write `audit.json` and `audit.html`: how far judges can be trusted, and what the data holds; return the page.

    Args:
        candidates: What `make_candidates` wrote.
        judged: What `judge_candidates` wrote about them.
        out: Folder to write.
        images: Folder of the images (default: the one that was asked about).
        judges: Names of the judges whose verdicts make pairs (default: all).
        references: Files of conversations with true answers about the same images.
        checkpoint: Model that is asked with a black image, to show what the text alone gives away (default: none).
        number: How many preferred pairs are shown as examples.

    Raises:
        InputError: A file cannot be read, the verdicts are on other candidates, or a judge has no verdict.
    """
    read, verdicts, folder = read_judged(candidates, judged)
    images = images or folder
    answers = read_references(references, read) if references else None
    image_blind = None
    if checkpoint:
        from stllava_train.preferences.candidates import blind_answers  # with torch

        image_blind = blind_answers(open_answerer(checkpoint), read)
    rows = read_rows(candidates)
    if unknown := sorted({*judges} - {verdict.judge for verdict in verdicts}):
        raise InputError(f"--judge {unknown[0]}: no verdict is its. Name one whose verdicts {judged} holds.")
    figures = audit(read, verdicts, images, Rule(), answers, rows=rows, judges=judges, blind=image_blind)
    shown = examples(read, verdicts, images, Rule(), number, judges=judges)
    write_page(figures, shown, out)
    return out / "audit.html"
