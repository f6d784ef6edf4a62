"""Draw candidates: questions that a checkpoint asks about each image, and its answers to each.

This is the first step of the preference data: stage 1's checkpoint + images -> candidates -> judge -> pairs -> DPO.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.images import open_image
from stllava_eval.inference.answerer import only_answers
from stllava_eval.inference.decoding import special_ids
from stllava_eval.inference.types import Answer, Question
from stllava_eval.scoring.words import folded_words
from stllava_eval.storage import read_text
from stllava_train.data.conversations import ROLE, image_file
from stllava_train.data.leaks import ImageRef, screen_images
from stllava_train.preferences.rows import Candidate, count, rouge_l
from stllava_train.resumable import ResumableJsonl, Row

if TYPE_CHECKING:
    from stllava_eval.inference.base import EngineAnswerer
    from stllava_eval.inference.types import Sampling


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
AT_ONCE = 1024  # images whose prompts are made at a time (our choice): a million would fill the memory


@dataclass(frozen=True)
class CandidateSettings:
    """How candidates are drawn. The defaults are `ours`; `PRESETS` has the authors' own.

    Attributes:
        describe: The first question about every image, answered greedily before the model asks.
        describe_tokens, question_tokens, answer_tokens: Most tokens of each.
        questions: That are asked about an image.
        question_temperature, question_top_k, question_top_p: How they are drawn; see `engine.Sampling`.
        answers: To each question.
        answer_temperature, answer_top_k, answer_top_p: How they are drawn.
        need_question_mark: Leave out what does not end in one, or does not end at all.
        near_repeat: Leave out a question whose ROUGE-L F1 with an earlier one about its image is this or more, in
            [0, 1]; above 1 keeps all.
        alike: Two answers are alike from this ROUGE-L F1 on, in [0, 1]; above 1, none are.
        redraws: Further answers drawn, at most, in place of those alike or without an end. A question that is short of
            answers after them is left out.
        seed: Of all draws. Each depends on it, the image, the conversation and its number alone.
    """

    describe: str = "Can you describe the image in detail?"  # authors' visual_sq.py
    describe_tokens: int = 1024  # authors' visual_sq.py
    questions: int = 5  # authors' visual_sq.py, --n_shot; the paper does not say
    question_tokens: int = 300  # authors' visual_sq.py
    question_temperature: float = 1.2  # authors' visual_sq.py
    question_top_k: int = 300  # authors' visual_sq.py
    question_top_p: float = 0.95  # authors' visual_sq.py
    answers: int = 2  # paper
    answer_tokens: int = 1024  # authors' model_collectA.py
    answer_temperature: float = 1.2  # paper
    answer_top_k: int = 100  # paper
    answer_top_p: float = 0.95  # paper
    need_question_mark: bool = True  # our choice
    # our choice. With the 0.7 of Self-Instruct (arXiv:2212.10560) "Is this a grey matter map?" would repeat "white"
    near_repeat: float = 0.9
    alike: float = 0.9  # our choice
    redraws: int = 4  # our choice
    seed: int = 0


# The authors keep every question and every pair, equal ones too
AUTHORS = CandidateSettings(need_question_mark=False, near_repeat=2.0, alike=2.0, redraws=0)
PRESETS = {"ours": CandidateSettings(), "authors": AUTHORS}


def check_settings(settings: CandidateSettings) -> None:
    """Check that every value is in its range.

    Raises:
        InputError: A value lies outside.
    """
    for name, least in (("describe_tokens", 1), ("question_tokens", 1), ("answer_tokens", 1), ("questions", 1)):
        if getattr(settings, name) < least:
            raise InputError(f"{name}={getattr(settings, name)}: give a whole number from {least} on.")
    if settings.answers < 2:
        raise InputError(f"answers={settings.answers}: there is nothing to prefer. Give 2 or more.")
    for of in ("question", "answer"):
        if not getattr(settings, f"{of}_temperature") > 0:
            raise InputError(f"{of}_temperature={getattr(settings, f'{of}_temperature')}: give a number above 0.")
        if getattr(settings, f"{of}_top_k") < 0:
            raise InputError(f"{of}_top_k={getattr(settings, f'{of}_top_k')}: give 1 or more, or 0 for all tokens.")
        if not 0 < getattr(settings, f"{of}_top_p") <= 1:
            raise InputError(f"{of}_top_p={getattr(settings, f'{of}_top_p')}: give a share above 0, up to 1.")
    for name in ("near_repeat", "alike"):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name}={getattr(settings, name)}: give a share above 0; above 1 nothing is left out.")
    for name in ("redraws", "seed"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name}={getattr(settings, name)}: give 0 or more.")


def images_in(folder: Path) -> list[str]:
    """List the image files under `folder`, by their names relative to it, sorted.

    Raises:
        InputError: There is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Pass the one that holds the images.")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not names:
        raise InputError(f"{folder}: it holds no image ({', '.join(sorted(SUFFIXES))}). Pass another folder.")
    return names


def listed_images(file: Path, folder: Path) -> list[str]:
    """Read the names of images from a text file, one per line, relative to `folder`.

    Raises:
        InputError: It cannot be read, names none, one twice, or one that is not there.
    """
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). Pass a text file with an image's name a line.") from error
    first: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name.strip():
            continue
        if PurePosixPath(name.strip()).is_absolute() or {".", ".."} & set(name.strip().split("/")):
            raise InputError(
                f"{file}:{number}: {name.strip()}: not a plain name in {folder}. Write it relative to that."
            )
        if image_file(folder, name.strip()) is None:
            raise InputError(f"{file}:{number}: {name.strip()}: not in {folder}. Pass its folder with --images.")
        if (before := first.setdefault(name.strip(), number)) != number:
            raise InputError(f"{file}:{number}: {name.strip()} is in line {before} too. Name each image once.")
    if not first:
        raise InputError(f"{file}: it names no image. Write one a line.")
    return list(first)


def sampled(names: Sequence[str], count: int | None, seed: int, what: str = "images") -> list[str]:
    """Return `count` of the names, drawn by the seed, in their order; all of them without a count.

    Raises:
        InputError: There are fewer.
    """
    if count is None:
        return list(names)
    if not 1 <= count <= len(names):
        raise InputError(f"--sample {count}: there are {len(names)} {what}. Give a number from 1 to that.")
    indices = random.Random(seed).sample(range(len(names)), count)
    return [names[index] for index in sorted(indices)]


Images = Sequence[tuple[str, Path, str]]
"""(name, file, pixel hash) of each."""


def write_candidates(
    draw: Callable[[Images], Iterator[Row]],
    checkpoint: Mapping[str, str],
    names: Sequence[str],
    folder: Path,
    out: Path,
    settings: CandidateSettings,
    allow_test_images: bool = False,
    progress: bool = True,
) -> Counter[str]:
    """Let the model ask about every image and answer itself; write a row per image to `out`.

    A row holds `image`, `image_sha256`, `description` and `questions`, each with its `id`, `question`, `answers`, and
    in `left_out` why it is no candidate, else null. A call with the same arguments resumes after a kill, with the
    images that have no row; which images are answered together changes no row in float32.

    Args:
        draw: Makes the rows of some images: `rows_of`, or `ray.candidates_by_ray`.
        checkpoint: Name, sha256 and dtype of what asks and answers.
        names: Images, relative to `folder`.
        folder: Of the images.
        out: `NAME.jsonl`.
        settings: How `draw` draws questions and answers.
        allow_test_images: Ask about images of prepared test splits too.
        progress: Whether to show bars on stderr.

    Returns:
        How many "images", "images that cannot be decoded", "questions", "candidates", and questions skipped by each
        of `SKIP_REASONS`.

    Raises:
        InputError: An image is in a test split, or `out` holds another job's rows.
    """
    screened = screen_images([ImageRef(str(folder / name), name, folder / name) for name in names], progress)
    if screened.leaks and not allow_test_images:
        raise InputError(
            f"{screened.leaks[0]} {len(screened.leaks)} images are of a test split: what is learnt from them would "
            "spoil its scores. Leave them out (--list), or pass --allow-test-images."
        )
    hashes = {name: screened.pixels.get(folder / name) for name in names}
    decided_by = {
        "stage": "candidates",
        "checkpoint": dict(checkpoint),
        "settings": asdict(settings),
        "images": {"count": len(names), "sha256": _sha256([[name, hashes[name]] for name in names])},
        "test_images": len(screened.leaks),
    }
    ledger = ResumableJsonl(out, lambda row: row["image"], decided_by)
    for problem in screened.broken:
        if problem.id not in ledger.rows:
            ledger.add([{"image": problem.id, "broken": problem.what, "questions": []}])
    _add_rows(ledger, [(name, folder / name, hashes[name] or "") for name in names], draw, progress)
    counts = count(ledger.rows.values())
    ledger.finish(names, counts=counts, folder=str(folder.resolve()))
    return counts


def _add_rows(ledger: ResumableJsonl, images: Images, draw: Callable[[Images], Iterator[Row]], progress: bool) -> None:
    """Add the rows of the images that have none yet, `AT_ONCE` images at a time."""
    from tqdm import tqdm

    due = [image for image in images if image[0] not in ledger.rows]
    done = len(images) - len(due)
    hidden = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=len(images), initial=done, unit="image", disable=hidden, file=sys.stderr) as bar:
        for start in range(0, len(due), AT_ONCE):
            for row in draw(due[start : start + AT_ONCE]):
                ledger.add([row])
                bar.update()


def blind_answers(answerer: EngineAnswerer, candidates: Sequence[Candidate], tokens: int = 1024) -> dict[str, str]:
    """Return the model's greedy answer to each question with a black image in view, by candidate id.

    It shows what the text alone gives away.
    """
    import PIL.Image

    black = partial(PIL.Image.new, "RGB", (64, 64))
    questions = [Question(candidate.question, black, tokens, image_key="black") for candidate in candidates]
    return {candidates[index].id: answer.text for index, answer in only_answers(answerer.answer(questions))}


# --- images side by side ----------------------------------------------------------------------------------------------


class _ImageWork:
    """What is known so far of one image, and what is to be asked about it next: describe, ask, choose, answer."""

    def __init__(self, name: str, file: Path, sha256: str, settings: CandidateSettings) -> None:
        self.name, self.file, self.sha256, self.settings = name, file, sha256, settings
        self.description = ""
        self.asked: dict[int, Answer] = {}  # by the number of the question
        self.why: dict[int, str | None] = {}
        self.answers: dict[int, dict[int, Answer]] = {}  # to each question that is kept, by the number of the draw
        self.drawn: Counter[int] = Counter()  # answers to each question, those under way too

    def describe(self) -> Question:
        return self._question(self.settings.describe, max_new_tokens=self.settings.describe_tokens, template="v1_sq")

    def ask(self, description: str) -> list[Question]:
        settings, self.description = self.settings, description
        sampling = _sampling(
            settings.question_temperature, settings.question_top_k, settings.question_top_p, settings.seed
        )
        rounds = ((settings.describe, description),)
        return [
            self._question(
                None, max_new_tokens=settings.question_tokens, history=rounds, sampling=sampling, sample_index=number
            )
            for number in range(settings.questions)
        ]

    def choose(self, special: Sequence[str]) -> None:
        """Decide of every question whether it is kept, in the order of their numbers."""
        kept = [self.settings.describe]
        for number in range(self.settings.questions):
            self.why[number] = skip_reason(self.asked[number], kept, self.settings, special)
            if self.why[number] is None:
                kept.append(self.asked[number].text)
                self.answers[number] = {}

    def answer(self, number: int) -> list[tuple[int, Question]]:
        """Return (sample index, question) of the answers that are missing; none as long as some are under way."""
        settings, drawn = self.settings, self.drawn[number]
        if len(self.answers[number]) < drawn:
            return []  # what is drawn next must not depend on which of them comes first
        short = settings.answers - len(self.usable(number))
        draws = range(drawn, drawn + min(short, settings.answers + settings.redraws - drawn))
        self.drawn[number] += len(draws)
        sampling = _sampling(settings.answer_temperature, settings.answer_top_k, settings.answer_top_p, settings.seed)
        text = self.asked[number].text
        return [
            (draw, self._question(text, max_new_tokens=settings.answer_tokens, sampling=sampling, sample_index=draw))
            for draw in draws
        ]

    def usable(self, number: int) -> list[str]:
        """Return the answers in the order of their draws, without those alike an earlier one, empty or cut."""
        texts: list[str] = []
        for _, answer in sorted(self.answers[number].items()):
            sound = self.settings.alike > 1 or (answer.ended and answer.text)
            if sound and all(rouge_l(answer.text, before) < self.settings.alike for before in texts):
                texts.append(answer.text)
        return texts

    @property
    def done(self) -> bool:
        return bool(self.why) and all(len(got) == self.drawn[number] for number, got in self.answers.items())

    def row(self) -> Row:
        questions = []
        for number in range(self.settings.questions):
            why, answers = self.why[number], []
            if why is None:
                answers = self.usable(number)
                if len(answers) < self.settings.answers:
                    ended = sum(one.ended and bool(one.text) for one in self.answers[number].values())
                    why = "answers alike" if ended >= self.settings.answers else "answers without end"
            questions.append(
                {
                    "id": f"{self.name}#{number}",
                    "question": self.asked[number].text,
                    "answers": answers,
                    "left_out": why,
                }
            )
        return {
            "image": self.name,
            "image_sha256": self.sha256,
            "description": self.description,
            "questions": questions,
        }

    def _question(self, text: str | None, **others: Any) -> Question:
        return Question(
            text, partial(open_image, self.file, "Put it back; the same call resumes."), image_key=self.sha256, **others
        )


def rows_of(answerer: EngineAnswerer, images: Images, settings: CandidateSettings) -> Iterator[Row]:
    """Yield a row for each image as soon as it is done, in no order; see `write_candidates`.

    The next questions about an image are asked as soon as they are known, so that the model works on many images side
    by side. Each image is encoded once, and the questions about it share its prefix.
    """
    works = [_ImageWork(*image, settings) for image in images]
    steps = [("describe", work, 0, 0) for work in works]  # of every question put to the model: what it is for
    special = list(special_ids(answerer.tokenizer).values())
    done: list[_ImageWork] = []

    def on_answer(index: int, answer: Answer) -> list[Question]:
        step, work, number, draw = steps[index]
        further: list[tuple[str, int, int, Question]] = []
        if step == "describe":
            questions = work.ask(without(answer.text, special))
            further = [("ask", number, 0, question) for number, question in enumerate(questions)]
        elif step == "ask":
            work.asked[number] = answer
            if len(work.asked) == settings.questions:
                work.choose(special)
                further = [("answer", number, *due) for number in work.answers for due in work.answer(number)]
        else:
            work.answers[number][draw] = answer
            further = [("answer", number, *due) for due in work.answer(number)]
        steps.extend((step, work, number, draw) for step, number, draw, _ in further)
        if work.done:
            done.append(work)
        return [question for *_, question in further]

    described = [work.describe() for work in works]
    for _ in only_answers(answerer.answer(described, progress=False, on_answer=on_answer)):
        while done:
            yield done.pop().row()


def skip_reason(asked: Answer, kept: Sequence[str], settings: CandidateSettings, special: Sequence[str]) -> str | None:
    """Return why a question is skipped, one of `SKIP_REASONS`, given those kept before it; None where it is kept."""
    words = folded_words(asked.text)
    if not words or ROLE.search(asked.text) or asked.text != without(asked.text, special):
        return "no question"
    if settings.need_question_mark and not (asked.ended and asked.text.endswith("?")):
        return "no question"
    if settings.near_repeat <= 1 and any(words == folded_words(before) for before in kept):
        return "repeat"
    if any(rouge_l(asked.text, before) >= settings.near_repeat for before in kept):
        return "near repeat"
    return None


def without(text: str, special: Sequence[str]) -> str:
    """Return `text` without what the tokenizer would take for its own tokens: it could not be asked."""
    for token in special:
        text = text.replace(token, "")
    return text.strip()


def _sampling(*how: Any) -> Sampling:
    from stllava_eval.inference.types import Sampling  # brings torch: a judge reads candidates without it

    return Sampling(*how)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
