"""Write an audit as a page: its figures, and examples of pairs with all that judges said of them."""

from __future__ import annotations

import base64
import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.images import open_image
from stllava_eval.scoring.metrics import words
from stllava_eval.storage import json_text, write_together
from stllava_train.preferences.audit.judges import known_verdicts
from stllava_train.preferences.audit.warnings import number_text
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import PAIR_OUTCOMES, Preference, Rule, Verdict, preferences

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tables = NDArray[np.float64]  # (..., 3, 3)


EXAMPLES, OTHER_EXAMPLES = 24, 4  # preferred pairs to look at, and pairs of each other outcome. Our choice
PASS_IMAGES = "Pass the folder of the images with --images."  # the remedy where one cannot be read
THUMBNAIL, QUALITY = 256, 80  # px of its longer side at most; of the JPEG. Our choice


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Two answers to look at, and all that judges said of them.

    Attributes:
        candidate: Their question and image.
        pair: What the verdicts come to.
        verdicts: On the two, sorted by judge, order and repetition.
        thumbnail: The image as a data URI, a JPEG of at most `THUMBNAIL` px a side.
    """

    candidate: Candidate
    pair: Preference
    verdicts: tuple[Verdict, ...]
    thumbnail: str


def examples(
    candidates: Sequence[Candidate],
    verdicts: Iterable[Verdict],
    images: Path,
    rule: Rule,
    number: int = EXAMPLES,
    seed: int = 0,
    *,
    judges: Sequence[str] = (),
) -> list[Example]:
    """Draw pairs by the seed: `number` that are preferred, and up to `OTHER_EXAMPLES` of each other outcome.

    Args:
        candidates, verdicts, images, rule, judges: As for `audit`.
        number: Of preferred pairs; the others are never more than this either.
        seed: Of the draw.

    Raises:
        InputError: An image cannot be read.
    """
    by_id = {candidate.id: candidate for candidate in candidates}
    latest = {verdict.key: verdict for verdict in verdicts}
    known = known_verdicts(latest.values(), by_id)
    by_answers: dict[tuple[str, tuple[int, int]], list[Verdict]] = defaultdict(list)
    for verdict in known:
        by_answers[verdict.id, (min(verdict.shown), max(verdict.shown))].append(verdict)
    pairs = preferences(candidates, known, rule, judges)
    thumbnail = cache(_thumbnail)
    drawn = []
    for outcome in PAIR_OUTCOMES:
        some = [pair for pair in pairs if pair.outcome == outcome]
        most = number if outcome == "preferred" else min(number, OTHER_EXAMPLES)
        indices = random.Random(f"{seed} {outcome}").sample(range(len(some)), min(most, len(some)))
        for index in sorted(indices):
            pair = some[index]
            candidate = by_id[pair.id]
            shown = tuple(by_answers[pair.id, pair.answers])
            drawn.append(Example(candidate, pair, shown, thumbnail(images / candidate.image)))
    return drawn


def _thumbnail(file: Path) -> str:
    """Return the image as a data URI, a JPEG of at most `THUMBNAIL` px a side."""
    picture = open_image(file, PASS_IMAGES)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def write_page(figures: Mapping[str, Any], examples: Sequence[Example], out: Path) -> None:
    """Write the figures to `audit.json` in the folder `out`, and figures and examples to `audit.html`.

    The page asks for nothing from elsewhere and runs no script. Whatever a model or a judge wrote is shown as text.

    Raises:
        InputError: The folder cannot be written; what was in it stays as it was.
    """
    html = page(figures, examples).encode(errors="replace")  # half a character has no UTF-8
    write_together(out, {"audit.json": json_text(figures), "audit.html": html})


def page(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """Render the page as HTML; see `write_page`."""
    import jinja2

    from stllava_eval.reports.cells import NOTICE

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent_or_dash, "number": number_text, "signed": _signed}
    environment.globals |= {"reach": _reach, "columns": _columns, "words": words}
    source = files("stllava_train.preferences.audit").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        figures=figures, examples=examples, notice=NOTICE, outcomes=PAIR_OUTCOMES
    )


def _signed(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:+z,.{digits}f}".replace("-", "−")


def _percent_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _reach(estimates: Iterable[Mapping[str, Any]]) -> float:
    """Return a round number that no estimate or end of an interval exceeds: half the width of an axis around 0."""
    ends = [abs(one[end]) for one in estimates for end in ("value", "low", "high") if one[end] is not None]
    most = max(ends, default=0.0) or 1.0
    step = 10.0 ** math.floor(math.log10(most))
    return math.ceil(most / step) * step


def _columns(scores: Mapping[str, int]) -> list[tuple[int, int, float]]:
    """Return (score, times, height in [0, 1]) for 1 to 10; halves go to the higher, what is beyond to the nearest."""
    times: Counter[int] = Counter()
    for score, number in scores.items():
        times[min(10, max(1, math.floor(float(score) + 0.5)))] += number
    most = max(times.values(), default=1)
    return [(score, times[score], times[score] / most) for score in range(1, 11)]
