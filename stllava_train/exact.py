"""Candidates about sample images -> verdicts by what is known of them, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from stllava_eval.errors import InputError
from stllava_eval.home import home
from stllava_eval.images import decode, pixel_hash
from stllava_train.asking import Asked
from stllava_train.verdicts import Verdict

EXACT = "exact"
RIGHT, WRONG = 10.0, 1.0  # our choice: the ends of the scale


def exact_verdicts(asked: Iterable[Asked], truths: Mapping[str, Mapping[tuple[str, ...], str]]) -> Iterator[Verdict]:
    """Verdicts from what is known of the sample images: an answer with the words of the true one has 10, another 1.

    It is no model and says so: `model` is "exact knowledge of the sample sets". A question that the sample sets cannot
    answer of its image is "unknown". For demonstrations and tests: real images have no such judge.

    Args:
        asked: The questions.
        truths: See `sample_truths`.
    """
    from stllava_eval.metrics import exact_match, folded_words

    for one in asked:
        candidate = one.candidate
        truth = truths.get(candidate.image_sha256, {}).get(folded_words(candidate.question))
        scores = None
        if truth is not None:
            first, second = (RIGHT if exact_match(candidate.answers[place], truth) else WRONG for place in one.shown)
            scores = (first, second)
        yield Verdict(
            id=candidate.id,
            image=candidate.image,
            image_sha256=candidate.image_sha256,
            judge=EXACT,
            shown=one.shown,
            repetition=one.repetition,
            outcome="unknown" if scores is None else "scored",
            scores=scores,
            reply=None if truth is None else f"The answer is known: {truth}",
            why="the sample sets do not answer this question" if truth is None else None,
            model="exact knowledge of the sample sets",
            date=None,
            prompt_sha256=None,
            tokens=None,
            cost=0.0,
        )


def sample_truths() -> dict[str, dict[tuple[str, ...], str]]:
    """Pixel hash of every image of the prepared sample sets -> every question that it answers, by words -> its answer.

    Raises:
        InputError: No sample set is prepared.
    """
    from stllava_eval.datasets import read_manifest, read_rows
    from stllava_eval.metrics import folded_words
    from stllava_eval.sample import SETS, SPLITS, sample_facts, true_answers

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
