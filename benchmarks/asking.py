"""How well checkpoints ask about images that they never saw, on the sample sets, whose every truth is known.

`python benchmarks/asking.py CHECKPOINT... --json FILE` reads the sets that `stllava-eval prepare --sample` wrote.

Each image's conversation starts with one round of its own rows: its first question by id and the true answer, since
stage 1 teaches to ask from the second round on. Then the model asks (template v1_sq, `VUSER:`): greedily once, and
`--draws` times at temperature 1.2, top_k 300, top_p 0.95, as the authors' `visual_sq.py`. Texts are compared as
`folded_words`; an answer is right where it is an `exact_match`. Each share is of all questions
drawn unless it says otherwise, and its 95 % interval is clustered by image.

Every question has one fate, in this order: `malformed` (`flaw` says why), `repeat` (the question of the round before:
copied, not asked), `unknown` (the sets have no such question), `not applicable` (they have, but not for this image, or
its answer is in doubt) or `applicable` (its true answer for this image is known).

- `known`: well-formed and a question that one of the three sets could ask. `new`: well-formed and in no training row.
  `new_known`: both, so a wording that only other splits have, or a wording with a value that training lacks.
- `variety`: of the well-formed questions, and of as many training questions drawn by the same seed. Distinct words and
  pairs depend on how many are drawn, so compare equal numbers only.
- `applicable`: the fate, and `applicable_shuffled`: the same questions judged for another image of another modality or
  technique (`partners`). A model that asks what can always be asked has equal shares. `applicable_training` is what the
  training questions of `variety` reach: asking well, but about no image.
- `shown_another`: asked once more with the conversation unchanged but the partner's image in view. The round before
  tells something of the image too, so `applicable` may come from reading alone; here `of_conversation` (judged for the
  image that the conversation is about) falls below `applicable` only as far as the model looks when it asks.
- `own_answers`: each applicable question is put to the model as a user's (default template, one round, greedy), with
  its image in view and with the partner's, both judged by the truth of its own image.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from figures import write

from stllava_eval.data.catalog import Row
from stllava_eval.data.sample.pictures import SETS, SPLITS
from stllava_eval.data.sample.questions import all_questions, sample_facts, true_answers
from stllava_eval.data.splits import read_rows
from stllava_eval.errors import InputError, printable
from stllava_eval.images import decode
from stllava_eval.inference.answerer import only_answers
from stllava_eval.inference.types import Answer, Question, Sampling
from stllava_eval.scoring.metrics import exact_match
from stllava_eval.scoring.metrics import words as count_words
from stllava_eval.scoring.statistics import Estimate, bootstrap_clustered, mean_clustered
from stllava_eval.scoring.words import folded_words

TEMPERATURE, TOP_K, TOP_P = 1.2, 300, 0.95  # the authors' visual_sq.py, round 2
MOST_WORDS = 30  # of a well-formed question; our choice, the longest of the sample sets has 12
MOST_TOKENS = 100  # of a question; our choice, three a word: the authors' 300 would only lengthen what is malformed
ANSWER_TOKENS = 32  # our choice, the longest answer of the sample sets has 3 words
ROLES = re.compile(r"\bV?USER\b|\bASSISTANT\b")  # the role words of the templates, which no question holds
FATES = ("malformed", "repeat", "unknown", "not applicable", "applicable")

Words = tuple[str, ...]  # a question as `folded_words`


class Answers(Protocol):
    """The part of `stllava_eval.inference.answerer.Answerer` that is needed here."""

    def answer(self, questions: Sequence[Question], progress: bool = True) -> Iterable[tuple[int, Answer]]: ...


@dataclass(frozen=True)
class Picture:
    """An image that is asked about, and what is known of it."""

    id: str
    image: bytes  # encoded
    look: str  # its modality or technique
    start: tuple[str, str]  # question and true answer of the round before
    truths: Mapping[Words, str]  # every question with a known answer -> that answer
    in_rows: frozenset[Words]  # the questions of its rows


@dataclass(frozen=True)
class Book:
    """The questions that there are.

    Args:
        trained: Every training question of the three sets, one a row.
        known: What the sets can ask of any image, trained or not.
        special: Tokens that no question may spell.
    """

    trained: Sequence[str]
    known: Collection[Words]
    special: Sequence[str] = ()

    @property
    def marks(self) -> str:
        """What training questions end with, of "?" and "."."""
        last = {question.strip()[-1:] for question in self.trained}
        return "".join(mark for mark in "?." if mark in last)


@dataclass(frozen=True)
class Asked:
    """A question that the model asked about the picture at `place`; see the module for `fate`."""

    place: int
    draw: int
    text: str
    flaw: str  # why it is malformed; empty if it is not
    fate: str

    @property
    def words(self) -> Words:
        return folded_words(self.text)


# --- what is asked about ----------------------------------------------------------------------------------------------


def read_pictures(split: str) -> list[Picture]:
    """Every image of the split of the three prepared sample sets that has rows, by id.

    Raises:
        InputError: A split is not prepared, or its rows are not those of the sample sets as they are made here.
    """
    pictures = []
    for name in SETS:
        facts = sample_facts(name, split)
        of_image: dict[str, list[Row]] = {}
        for row in sorted(read_rows(name, split), key=lambda row: row.id):
            of_image.setdefault(row.image_id, []).append(row)
        for image_id, rows in of_image.items():
            truths = {folded_words(text): truth for text, truth in true_answers(name, facts.get(image_id, {})).items()}
            if wrong := [row for row in rows if truths.get(folded_words(row.question)) != row.reference]:
                raise InputError(
                    f"{name} {split}, row {wrong[0].id}: not what the sample set says of {image_id}. Truths are known "
                    "of sample sets only: prepare them (`stllava-eval prepare --sample`) under another $STLLAVA_HOME."
                )
            look = facts[image_id].get("modality") or facts[image_id]["technique"]
            start = (rows[0].question, rows[0].reference)
            in_rows = frozenset(folded_words(row.question) for row in rows)
            pictures.append(Picture(image_id, rows[0].image, look, start, truths, in_rows))
    return sorted(pictures, key=lambda picture: picture.id)


def read_book(special: Sequence[str] = ()) -> Book:
    """The training questions of the prepared sets, and all that the sample sets can ask."""
    trained = [row.question for name in SETS for row in read_rows(name, "train")]
    known = {folded_words(question) for name in SETS for question in all_questions(name)}
    return Book(trained, known | {folded_words(question) for question in trained}, special)


def choose(pictures: Sequence[Picture], count: int, seed: int) -> list[Picture]:
    """`count` of the pictures, or all if there are fewer, in their order: the same for equal seeds."""
    places = random.Random(seed).sample(range(len(pictures)), min(count, len(pictures)))
    return [pictures[place] for place in sorted(places)]


def partners(looks: Sequence[str], seed: int) -> list[int]:
    """For each image the place of another one, each taken once, of another look unless one look has over half of them.

    In the order of looks every image takes the one that lies as far on as the commonest look has images.

    Raises:
        InputError: There are fewer than two images.
    """
    if len(looks) < 2:
        raise InputError(f"{len(looks)} images: another one is shown beside each. Pass --images 2 or more.")
    order = list(range(len(looks)))
    random.Random(seed).shuffle(order)
    order.sort(key=looks.__getitem__)
    commonest = max(Counter(looks).values())
    shift = commonest if commonest < len(order) else 1
    of = {place: order[(at + shift) % len(order)] for at, place in enumerate(order)}
    return [of[place] for place in range(len(looks))]


# --- asking and answering ---------------------------------------------------------------------------------------------


def ask(
    answerer: Answers,
    pictures: Sequence[Picture],
    shown: Sequence[int],
    sampling: Sampling | None,
    draws: int,
) -> list[Answer | None]:
    """What the model asks, `draws` questions for each picture, in the pictures' order; None where nothing came back.

    Args:
        answerer: The model.
        pictures: Whose first rounds the conversations start with.
        shown: For each picture the place of the one whose image is in view.
        sampling: None takes the likeliest words.
        draws: Questions for each picture.
    """
    questions = [
        Question(
            None,
            partial(decode, pictures[in_view].image),
            MOST_TOKENS,
            image_key=pictures[in_view].id,
            history=(picture.start,),
            sampling=sampling,
            sample_index=draw,
        )
        for picture, in_view in zip(pictures, shown, strict=True)
        for draw in range(draws)
    ]
    return _answers(answerer, questions)


def answer(answerer: Answers, pictures: Sequence[Picture], texts: Sequence[tuple[int, str]]) -> list[Answer | None]:
    """The model's greedy answers to (place of the picture in view, question); None where nothing came back."""
    questions = [
        Question(text, partial(decode, pictures[place].image), ANSWER_TOKENS, image_key=pictures[place].id)
        for place, text in texts
    ]
    return _answers(answerer, questions)


def _answers(answerer: Answers, questions: Sequence[Question]) -> list[Answer | None]:
    found = dict(only_answers(answerer.answer(questions, progress=sys.stderr.isatty()))) if questions else {}
    return [found.get(place) for place in range(len(questions))]


# --- judging ----------------------------------------------------------------------------------------------------------


def flaw(asked: Answer | None, book: Book) -> str:
    """Why this is not a well-formed question; empty if it is one.

    Of special tokens only those spelled out are seen: `Answerer` leaves the tokens themselves out of the text.
    """
    if asked is None:
        return "nothing came back"
    if not asked.ended:
        return f"no end within {MOST_TOKENS} tokens"
    if not folded_words(asked.text):
        return "no words"
    if any(token in asked.text for token in book.special):
        return "special token"
    if ROLES.search(asked.text):
        return "role word"
    if asked.text[-1] not in book.marks:
        return f"does not end in {' or '.join(book.marks)}"
    return f"over {MOST_WORDS} words" if count_words(asked.text) > MOST_WORDS else ""


def fate(text: str, about: Picture, known: Collection[Words]) -> str:
    """What becomes of a well-formed question for this picture: one of `FATES` after the first."""
    asked = folded_words(text)
    if asked == folded_words(about.start[0]):
        return "repeat"
    if asked in about.truths:
        return "applicable"
    return "not applicable" if asked in known else "unknown"


def judge(found: Sequence[Answer | None], pictures: Sequence[Picture], book: Book) -> list[Asked]:
    """What was asked with its flaw and fate, `found` as `ask` returns it."""
    draws = len(found) // len(pictures)
    judged = []
    for number, asked in enumerate(found):
        place, text, why = number // draws, asked.text if asked else "", flaw(asked, book)
        judged.append(
            Asked(place, number % draws, text, why, "malformed" if why else fate(text, pictures[place], book.known))
        )
    return judged


def is_applicable(asked: Asked, about: Picture) -> bool:
    """Whether the question has a known answer for this picture, and does not repeat the round before."""
    # a repeat is one by the conversation that it was asked in, whatever picture it is judged for
    return asked.fate not in ("malformed", "repeat") and asked.words in about.truths


def variety(questions: Sequence[str]) -> dict[str, Any]:
    """How many, and which share of the questions, of their words and of their pairs of words are distinct, in [0, 1].

    A share is None where there is nothing to share.

    Source: distinct-1 and distinct-2 of Li et al. (NAACL 2016), over all questions together.
    """
    texts = [folded_words(question) for question in questions]
    parts: dict[str, list[Any]] = {
        "questions": texts,
        "words": [word for text in texts for word in text],
        "pairs": [pair for text in texts for pair in itertools.pairwise(text)],
    }
    shares = {f"distinct_{name}": len(set(part)) / len(part) if part else None for name, part in parts.items()}
    return {"n": len(texts), "distinct": len(set(texts)), **shares}


def own_answers(
    answerer: Answers, pictures: Sequence[Picture], others: Sequence[int], asked: Sequence[Asked]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How the model answers its own applicable questions, with the picture and with another one in view; and each.

    An answer that is missing, empty or cut off is wrong, and counted.
    """
    own = [question for question in asked if question.fate == "applicable"]
    ids = [pictures[question.place].id for question in own]
    truths = [pictures[question.place].truths[question.words] for question in own]
    figures: dict[str, Any] = {"judged": len(own), "not_judged": len(asked) - len(own)}
    right: dict[str, list[float]] = {}
    answers: dict[str, list[Answer | None]] = {}
    for view, shown in (("own_image", range(len(pictures))), ("another_image", others)):
        found = answer(answerer, pictures, [(shown[question.place], question.text) for question in own])
        answers[view] = found
        right[view] = [
            exact_match(one.text, truth) if one and one.ended else 0.0 for one, truth in zip(found, truths, strict=True)
        ]
        figures |= {
            f"right_{view}": asdict(mean_clustered(right[view], ids)),
            f"unanswered_{view}": sum(one is None or not one.text for one in found),
            f"cut_{view}": sum(one is not None and bool(one.text) and not one.ended for one in found),
        }
    figures["difference"] = asdict(_difference(right["own_image"], right["another_image"], ids))
    each = [
        {"place": question.place, "draw": question.draw, "truth": truth}
        | {view: None if (one := answers[view][number]) is None else one.text for view in answers}
        for number, (question, truth) in enumerate(zip(own, truths, strict=True))
    ]
    return figures, each


def _difference(first: Sequence[float], second: Sequence[float], ids: Sequence[str]) -> Estimate:
    return bootstrap_clustered([a - b for a, b in zip(first, second, strict=True)], ids)


def report(
    answerer: Answers,
    pictures: Sequence[Picture],
    book: Book,
    sampling: Sampling | None,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Every figure of one way of asking, as the module describes them, and under `questions` what was asked."""
    others = partners([picture.look for picture in pictures], seed)
    asked = judge(ask(answerer, pictures, range(len(pictures)), sampling, draws), pictures, book)
    elsewhere = judge(ask(answerer, pictures, others, sampling, draws), pictures, book)
    ids = [pictures[question.place].id for question in asked]
    trained = {folded_words(question) for question in book.trained}
    well = [question for question in asked if not question.flaw]
    drawn = random.Random(seed).choices(book.trained, k=len(asked))  # one for each question, to judge for its picture

    def share(of: Callable[[Asked], bool], questions: Sequence[Asked] = asked) -> dict[str, Any]:
        return asdict(mean_clustered([float(of(question)) for question in questions], ids))

    def fits(question: Asked) -> bool:
        return is_applicable(question, pictures[question.place])

    def fits_partner(question: Asked) -> bool:
        return is_applicable(question, pictures[others[question.place]])

    answers, each = own_answers(answerer, pictures, others, asked)
    of_question = {(entry["place"], entry["draw"]): entry for entry in each}
    return {
        "questions_asked": len(asked),
        "images": len(pictures),
        "partners_of_equal_look": sum(pictures[a].look == pictures[b].look for a, b in enumerate(others)),
        "well_formed": share(lambda question: not question.flaw),
        "flaws": dict(sorted(Counter(question.flaw for question in asked if question.flaw).items())),
        "fates": {name: sum(question.fate == name for question in asked) for name in FATES},
        "known": share(lambda question: not question.flaw and question.words in book.known),
        "new": share(lambda question: not question.flaw and question.words not in trained),
        "new_known": share(lambda q: not q.flaw and q.words not in trained and q.words in book.known),
        "repeats": share(lambda question: question.fate == "repeat"),
        "variety": variety([question.text for question in well]),
        "variety_training": variety(drawn[: len(well)]),
        "applicable": share(fits),
        "applicable_shuffled": share(fits_partner),
        "applicable_difference": asdict(
            _difference([float(fits(q)) for q in asked], [float(fits_partner(q)) for q in asked], ids)
        ),
        "applicable_training": asdict(
            mean_clustered(
                [
                    float(folded_words(text) in pictures[question.place].truths)
                    for text, question in zip(drawn, asked, strict=True)
                ],
                ids,
            )
        ),
        "in_rows": share(lambda q: fits(q) and q.words in pictures[q.place].in_rows),
        "in_rows_shuffled": share(lambda q: fits_partner(q) and q.words in pictures[others[q.place]].in_rows),
        "shown_another": {
            "well_formed": share(lambda question: not question.flaw, elsewhere),
            "of_conversation": share(fits, elsewhere),
            "of_image": share(fits_partner, elsewhere),
            "difference": asdict(
                _difference([float(fits(q)) for q in asked], [float(fits(q)) for q in elsewhere], ids)
            ),
        },
        "own_answers": answers,
        "questions": [
            {
                "image": pictures[question.place].id,
                "draw": question.draw,
                "text": question.text,
                "flaw": question.flaw,
                "fate": question.fate,
                "text_shown_another": other.text,
                "flaw_shown_another": other.flaw,
            }
            | {
                name: value
                for name, value in of_question.get((question.place, question.draw), {}).items()
                if name not in ("place", "draw")
            }
            for question, other in zip(asked, elsewhere, strict=True)
        ],
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each figure, a column for each report."""
    from tabulate import tabulate

    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("questions / images", lambda r: f"{r['questions_asked']} / {r['images']}"),
        ("well-formed", lambda r: _shown(r["well_formed"])),
        ("known to the sets", lambda r: _shown(r["known"])),
        ("in no training row", lambda r: _shown(r["new"])),
        ("  of these known to the sets", lambda r: _shown(r["new_known"])),
        ("repeats the round before", lambda r: _shown(r["repeats"])),
        ("distinct questions / well-formed", lambda r: _distinct(r["variety"])),
        ("  as many training questions", lambda r: _distinct(r["variety_training"])),
        ("distinct-1, distinct-2", lambda r: _pair(r["variety"])),
        ("  as many training questions", lambda r: _pair(r["variety_training"])),
        ("applicable to its image", lambda r: _shown(r["applicable"])),
        ("  to another image", lambda r: _shown(r["applicable_shuffled"])),
        ("  difference", lambda r: _shown(r["applicable_difference"])),
        ("  training questions at random", lambda r: _shown(r["applicable_training"])),
        ("in its image's rows", lambda r: _shown(r["in_rows"])),
        ("  in another image's rows", lambda r: _shown(r["in_rows_shuffled"])),
        ("asked with another image in view:", lambda r: ""),
        ("  well-formed", lambda r: _shown(r["shown_another"]["well_formed"])),
        ("  applicable to the conversation's", lambda r: _shown(r["shown_another"]["of_conversation"])),
        ("  applicable to the one in view", lambda r: _shown(r["shown_another"]["of_image"])),
        ("  what looking adds", lambda r: _shown(r["shown_another"]["difference"])),
        ("own answer right, its image", lambda r: _shown(r["own_answers"]["right_own_image"])),
        ("  another image in view", lambda r: _shown(r["own_answers"]["right_another_image"])),
        ("  difference", lambda r: _shown(r["own_answers"]["difference"])),
        ("  judged", lambda r: str(r["own_answers"]["judged"])),
        ("  not judged: not applicable", lambda r: str(r["own_answers"]["not_judged"])),
        ("  empty or missing, its image / another", lambda r: _two(r["own_answers"], "unanswered")),
        ("  cut off, its image / another", lambda r: _two(r["own_answers"], "cut")),
        *((f"fate: {name}", lambda r, name=name: str(r["fates"][name])) for name in FATES),
        *(
            (f"flaw: {name}", lambda r, name=name: str(r["flaws"].get(name, 0)))
            for name in sorted({name for r in reports.values() for name in r["flaws"]})
        ),
    ]
    rows = [[name, *(show(r) for r in reports.values())] for name, show in lines]
    return tabulate(rows, headers=["", *reports], disable_numparse=True, preserve_whitespace=True)


def _shown(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "- (none)"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return f"{estimate['value']:.2f}{interval}"


def _distinct(of: Mapping[str, Any]) -> str:
    return f"{of['distinct']} / {of['n']}"


def _pair(of: Mapping[str, Any]) -> str:
    shares = (of["distinct_words"], of["distinct_pairs"])
    return ", ".join("-" if share is None else f"{share:.3f}" for share in shares)


def _two(answers: Mapping[str, Any], what: str) -> str:
    return f"{answers[f'{what}_own_image']} / {answers[f'{what}_another_image']}"


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder or hub id")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go (- prints them)")
    parser.add_argument(
        "--images", type=at_least(2), default=180, metavar="N", help="images of the three sets (default: 180)"
    )
    parser.add_argument(
        "--draws", type=at_least(1), default=4, metavar="K", help="questions drawn for each image (default: 4)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of images, partners and draws (default: 0)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    given = parser.parse_args()
    try:
        result, reports = measured(given)
    except InputError as error:
        print(printable(str(error)), file=sys.stderr)
        sys.exit(2)
    print(table(reports))
    write(result, given.json)


def measured(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What --json gets, and its reports by the names of the table's columns."""
    from stllava_eval.inference.open import open_answerer

    pictures = choose(read_pictures(given.split), given.images, given.seed)
    book = read_book()
    sampling = Sampling(TEMPERATURE, TOP_K, TOP_P, given.seed)
    result: dict[str, Any] = {
        "format": 1,
        "split": given.split,
        "seed": given.seed,
        "images": len(pictures),
        "draws": given.draws,
        "sampling": asdict(sampling),
        "checkpoints": {},
    }
    reports: dict[str, dict[str, Any]] = {}
    checkpoints = list(dict.fromkeys(given.checkpoints))
    short = [Path(checkpoint).name for checkpoint in checkpoints]
    name_of = dict(zip(checkpoints, short if len(set(short)) == len(short) else checkpoints, strict=True))
    for checkpoint in checkpoints:
        answerer = open_answerer(checkpoint)
        spelled = Book(book.trained, book.known, answerer.tokenizer.all_special_tokens)
        drawn = report(answerer, pictures, spelled, sampling, given.draws, given.seed)
        greedy = report(answerer, pictures, spelled, None, 1, given.seed)
        result["checkpoints"][checkpoint] = {"sha256": answerer.sha256, "drawn": drawn, "greedy": greedy}
        reports |= {f"{name_of[checkpoint]}, drawn": drawn, f"{name_of[checkpoint]}, greedy": greedy}
    return result, reports


if __name__ == "__main__":
    main()
