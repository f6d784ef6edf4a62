"""Judge candidates about sample images by what is known of these images, without a model.

The verdicts go where those of every judge go: into `judged.jsonl`, from which pairs are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_eval.storage import home
from stllava_train.preferences.judges.prompt import Comparison
from stllava_train.preferences.verdicts import Verdict

EXACT = "exact"
RIGHT, WRONG = 10.0, 1.0  # our choice: the ends of the scale


def exact_verdicts(
    asked: Iterable[Comparison], truths: Mapping[str, Mapping[tuple[str, ...], str]]
) -> Iterator[Verdict]:
    """Yield verdicts from what is known of the sample images: an answer with the words of the true one has 10, else 1.

    It is no model and says so: `model` is "exact knowledge of the sample sets". A question that the sample sets cannot
    answer of its image is "unknown". For demonstrations and tests: real images have no such judge.

    Args:
        asked: The questions.
        truths: See `sample_truths`.
    """
    from stllava_eval.scoring.metrics import exact_match
    from stllava_eval.scoring.words import folded_words

    for comparison in asked:
        candidate = comparison.candidate
        truth = truths.get(candidate.image_sha256, {}).get(folded_words(candidate.question))
        scores = None
        if truth is not None:
            answers = [candidate.answers[index] for index in comparison.shown]
            first, second = (RIGHT if exact_match(answer, truth) else WRONG for answer in answers)
            scores = (first, second)
        yield replace(
            comparison.unscored(EXACT),
            outcome="unknown" if scores is None else "scored",
            scores=scores,
            reply=None if truth is None else f"The answer is known: {truth}",
            why="the sample sets do not answer this question" if truth is None else None,
            model="exact knowledge of the sample sets",
            cost=0.0,
        )


def open_exact_judge() -> Callable[[Iterable[Comparison]], Iterator[Verdict]]:
    """Return the judge that knows what the prepared sample images show.

    Raises:
        InputError: No sample set is prepared.
    """
    return partial(exact_verdicts, truths=sample_truths())


LOCAL_JUDGES: dict[str, Callable[[], Callable[[Iterable[Comparison]], Iterator[Verdict]]]] = {EXACT: open_exact_judge}
"""Judges that are no model behind a server, by the name that `--judge` takes: each is opened, then given questions."""


def sample_truths() -> dict[str, dict[tuple[str, ...], str]]:
    """Return what the prepared sample sets know: pixel hash of an image -> question, by its words -> the true answer.

    Raises:
        InputError: No sample set is prepared.
    """
    from stllava_eval.data.sample.pictures import SETS, SPLITS
    from stllava_eval.data.sample.questions import sample_facts, true_answers
    from stllava_eval.data.splits import read_manifest, read_rows
    from stllava_eval.scoring.words import folded_words

    truths: dict[str, dict[tuple[str, ...], str]] = {}
    for name in SETS:
        for split in SPLITS:
            if not (home() / "data" / name / f"{split}.json").exists() or not read_manifest(name, split).sample:
                continue
            facts = sample_facts(name, split)
            images = {row.image_id: row.image for row in read_rows(name, split)}
            for image_id, image in images.items():
                known = true_answers(name, facts.get(image_id, {}))
                truths[pixel_hash(decode(image))] = {folded_words(text): answer for text, answer in known.items()}
    if not truths:
        raise InputError(
            "--judge exact: no sample set is prepared. Run `stllava-eval prepare --sample`, or name a model."
        )
    return truths
