"""Score final answers question by question, and take means with 95 % intervals clustered by image.

It reads the references from prepared splits; run folders and every report take their scores from here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from stllava_eval.data.splits import numbered_edition, read_manifest, read_split
from stllava_eval.errors import InputError
from stllava_eval.scoring.categories import asks
from stllava_eval.scoring.final_answer import FINAL, SIGNATURES, FinalAnswer, is_failed_request
from stllava_eval.scoring.metrics import SCORES, score_replies
from stllava_eval.scoring.statistics import mean_clustered
from stllava_eval.scoring.verdict import is_refusal

NOT_RECORDED = "not recorded"
FIXED_FIELDS = ("id", "image_id", "image_sha256", "image", "question", "reference", "kind")  # the rest are categories


@dataclass(frozen=True)
class ScoreRow:
    """One mean: of which score, over which questions, with its 95 % interval clustered by image.

    `category` is `all`, `field=value` with a field of the data set, or `asks=...` (`categories.ASKS`); `value`, `low`,
    `high` are in the score's own unit (shares in [0, 1], words in words) and None where there is nothing to say (no
    question; one image has no interval).
    """

    task: str
    metric: str
    signature: str
    category: str
    value: float | None
    n: int
    images: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class QuestionScores:
    """The image of an answered question, and its scores by name."""

    image_id: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """The score table of one task, and the scores that it is made of."""

    rows: list[ScoreRow]
    unanswered: list[str]
    """Ids of questions without an answer: they are in no mean."""
    questions: dict[str, QuestionScores]
    """The scores of the answered questions by id, in the split's order."""
    empty: int = 0
    """Number of replies with an empty final answer, without those that were cut off while the model was thinking."""
    doubts: str = ""
    """Why the means may say little about the model: half of its replies or more are empty, cut or refusals."""


Replies = Mapping[str, str | Sequence[FinalAnswer]]
"""By question id: the final answer of each reply, or one plain answer."""

# The settings that decide the answers of given weights to given questions. They are in every score's signature, and
# `compare` and `gate` compare them.
DECIDING = (
    *("extract", "images", "decoding", "draws", "max_new_tokens", "until"),
    *("system", "enable_thinking", "min_pixels", "max_pixels"),
)


def dataset_of(task: str) -> str:
    """Return the data set that a task asks about: `vqarad_short` -> `vqarad`."""
    return task.split("_")[0]


def score_table(
    task: str,
    answers: Replies,
    prompt: str = NOT_RECORDED,
    settings: Mapping[str, Any] = MappingProxyType({}),
    split: str = "test",
) -> Scored:
    """Score final answers, by question id, against a prepared split of `task`.

    Failed requests of API adapters and missing ids are unanswered: they are counted and listed, and are in no mean. If
    a question has several sampled replies, its score is their mean; the interval over images then covers both sources
    of variance, that of the questions and that of sampling (Miller, arXiv:2411.00640). The means of the
    N-th reply to each question have the category `draw=N`.

    Args:
        task: The task that was asked.
        answers: The answers by question id.
        prompt: The preset that was asked, for the signature.
        settings: The settings of `DECIDING` that are known, for the signature.
        split: The split that was asked.

    Raises:
        InputError: The split is not prepared, or an id is not of it.
    """
    manifest, rows = prepared_split(dataset_of(task), split)
    unknown = sorted(set(answers) - {row["id"] for row in rows})
    if unknown:
        counted = {str(number) for number in range(len(answers))}
        hint = " They look like row numbers, 0 to n-1." if answers.keys() == counted else ""
        raise InputError(
            f"{task}: {len(unknown)} unknown ids ({first_ids(unknown)}).{hint} Ids are the data set's own, as in "
            f"{manifest['dataset']} {manifest['split']} ({manifest['edition']}), for example {rows[0]['id']}; "
            "--ignore-unknown leaves out those of other splits."
        )
    other = numbered_edition(dataset_of(task), manifest["split"], answers)
    if other is not None and other.name != manifest["edition"] and not manifest["sample"]:
        raise InputError(
            f"{task}: the {len(answers)} ids are the row numbers of the {other.name}, 0 to {other.rows - 1}, and "
            f"the {manifest['edition']} is asked, whose numbers are other questions. Prepare that edition; its "
            f"ids are {other.prefix}0 to {other.prefix}{other.rows - 1}."
        )
    return score_answers(task, rows, answers, manifest, prompt, settings)


def categories_of(row: Mapping[str, Any]) -> list[str]:
    """Return the categories that a question is counted in: `field=value` of its data set, and `asks=...`."""
    fields = [f"{name}={row[name]}" for name in row if name not in FIXED_FIELDS and row[name]]
    return fields + [f"asks={what}" for what in asks(row["question"])]


def question_scores(name: str, answers: Replies) -> dict[str, QuestionScores]:
    """Return the scores of each answered question of a data set's prepared test split, by id, in the split's order.

    Raises:
        InputError: The split is not prepared.
    """
    return _question_scores(prepared_split(name)[1], answers)


def _finals(given: str | Sequence[FinalAnswer]) -> Sequence[FinalAnswer]:
    return [FinalAnswer(given)] if isinstance(given, str) else given


def _question_scores(rows: Iterable[Mapping[str, Any]], answers: Replies) -> dict[str, QuestionScores]:
    by_id = {}
    for row in rows:
        if (given := answers.get(row["id"])) is not None:
            scores = score_replies(_finals(given), row["reference"], row["kind"], row["question"])
            if scores:  # else every request failed
                by_id[row["id"]] = QuestionScores(row["image_id"], scores)
    return by_id


def score_answers(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    answers: Replies,
    manifest: Mapping[str, Any],
    prompt: str,
    settings: Mapping[str, Any],
) -> Scored:
    """Score the final answers of one task: a mean with its interval for every score and category.

    Args:
        task: The task that was asked.
        rows: The questions that were asked, rows of the prepared split.
        answers: The answers by question id.
        manifest: The prepared split's manifest.
        prompt: The preset that was asked, for the signature.
        settings: The settings of `DECIDING` that are known, for the signature.
    """
    questions = _question_scores(rows, answers)
    data = f"{manifest['dataset']} {manifest['split']} {manifest['edition']}"
    asked = f"{data}|prompt {prompt}{_settings_text(settings)}"
    table = []
    for (metric, group), (values, images) in _values_by_cell(rows, answers, questions).items():
        mean = mean_clustered(values, images)
        signature = f"{SCORES[metric].signature}|{asked}"
        table.append(ScoreRow(task, metric, signature, group, mean.value, mean.n, mean.clusters, mean.low, mean.high))
    order = list(SCORES)
    table.sort(key=lambda row: (row.category != "all", row.category, order.index(row.metric)))
    unanswered = [row["id"] for row in rows if row["id"] not in questions]
    replies = [final for given in answers.values() for final in _finals(given)]
    return Scored(table, unanswered, questions, sum(map(_is_empty, replies)), _doubts(replies))


def _values_by_cell(
    rows: Sequence[Mapping[str, Any]], answers: Replies, questions: Mapping[str, QuestionScores]
) -> dict[tuple[str, str], tuple[list[float], list[str]]]:
    """Return the values of each (score, category), each with the image of its question."""
    cells: dict[tuple[str, str], tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))

    def count(group: str, scored: QuestionScores) -> None:
        for metric, value in scored.scores.items():
            values, images = cells[metric, group]
            values.append(value)
            images.append(scored.image_id)

    for row in rows:
        if row["id"] in questions:
            for group in ["all", *categories_of(row)]:
                count(group, questions[row["id"]])
    draws = max((len(_finals(given)) for given in answers.values()), default=1)
    for draw in range(draws if draws > 1 else 0):  # a single reply has no means of its own
        alone = {name: _finals(given)[draw : draw + 1] for name, given in answers.items()}
        for scored in _question_scores(rows, alone).values():
            count(f"draw={draw}", scored)
    return cells


def _settings_text(settings: Mapping[str, Any]) -> str:
    """Return the settings of `DECIDING` as a part of a signature, `|images own|...`, without those that are not set."""
    known = {"extract": SIGNATURES[FINAL], **settings}
    asked = ""
    for name in DECIDING:
        if known.get(name) in (None, []) or (name, known[name]) == ("draws", 1):
            continue
        asked += f"|{name} {json.dumps(known[name]) if name == 'until' else known[name]}"
    return asked


def _is_empty(final: FinalAnswer) -> bool:
    """Return whether a reply ended and has no answer; those cut off while the model was thinking are counted apart."""
    return not final.cut and not final.answer.strip()


def _doubts(replies: Sequence[FinalAnswer]) -> str:
    """Return a sentence if half of the replies or more (our choice) are empty, cut off, or refusals; else nothing."""
    asked = [final for final in replies if not is_failed_request(final.answer)]
    cut = sum(final.cut for final in asked)
    empty = sum(map(_is_empty, asked))
    refused = sum(is_refusal(final.answer) for final in asked)
    if not asked or 2 * (cut + empty + refused) < len(asked):
        return ""
    parts = [(cut, "cut in their thought"), (empty, "empty"), (refused, "refusals")]
    counts = ", ".join(f"{count} {what}" for count, what in parts if count)
    return (
        f"of {len(asked)} replies {counts}: these scores may say little about the model. Look at `reply` in "
        "answers.jsonl; a longer max_new_tokens lets a thought end."
    )


def prepared_split(name: str, split: str = "test") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the manifest and the rows, without images, of a prepared split."""
    return asdict(read_manifest(name, split)), read_split(name, split, images=False).to_list()


def split_rows(name: str, split: str = "test") -> list[dict[str, Any]]:
    """Return the rows of a prepared split, without images, in its order.

    Raises:
        InputError: The split is not prepared.
    """
    return prepared_split(name, split)[1]


def first_ids(ids: Sequence[str]) -> str:
    """Return a text with the first ten ids, and how many more there are."""
    return ", ".join(id if len(id) <= 80 else f"{id[:77]}..." for id in ids[:10]) + (
        f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    )
