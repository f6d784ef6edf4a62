"""Verdicts -> preference pairs: a chosen and a rejected answer to a question about an image, in the files DPO reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.home import whole_file
from stllava_eval.metrics import folded_words
from stllava_train.candidates import Candidate
from stllava_train.conversations import ROLE, SPECIAL, image_file, uniform
from stllava_train.ledger import Ledger, Row, line, read_rows
from stllava_train.record import tags
from stllava_train.verdicts import AUTHORS_RULE, Rule, Verdict, preferences

FORMATS = ("trl", "authors", "llama-factory", "ms-swift")


@dataclass(frozen=True)
class Pair:
    """Two answers to a question about an image, of which one is to become likelier than the other.

    Of an image-contrast pair the two answers are about two images, and are one text as a rule; see `contrast`.

    Attributes:
        id: Of the candidate; with the places of the two answers where it has more than two, `a.png#0:0-2`.
        image: The image's file, relative to the folder of images.
        image_sha256: `pixel_hash` of it.
        question, chosen, rejected: Stripped, without the image's tag.
        margin: Score of the chosen less that of the rejected, in points of 10, at least 0; None where no scores are
            known, as in the authors' files.
        judges: Who prefer the chosen, sorted; empty where not known.
        weight: Of its loss beside those of the file's other pairs, finite and 0 or more, such as MMedPO's clinical
            relevance from 0 to 1; None where its file has no weights, and all pairs count alike.
        rejected_image, rejected_image_sha256: What the rejected answer is about, where that is another image than
            `image`; else None.
    """

    id: str
    image: str
    image_sha256: str
    question: str
    chosen: str
    rejected: str
    margin: float | None
    judges: tuple[str, ...]
    weight: float | None = None
    rejected_image: str | None = None
    rejected_image_sha256: str | None = None

    @property
    def images(self) -> tuple[str, str]:
        """Of the chosen and of the rejected answer."""
        return self.image, self.rejected_image or self.image

    @property
    def pictures(self) -> dict[str, str]:
        """The file of each different image -> its hash."""
        other = {self.rejected_image: self.rejected_image_sha256 or ""} if self.rejected_image else {}
        return {self.image: self.image_sha256} | other


OPTIONAL = ("weight", "rejected_image", "rejected_image_sha256")
KEYS = tuple(field.name for field in fields(Pair) if field.name not in OPTIONAL)


def row_of(pair: Pair) -> Row:
    """The row that a file holds: its keys, and of the optional ones those that the pair has."""
    return {key: value for key, value in asdict(pair).items() if key in KEYS or value is not None}


@dataclass(frozen=True)
class Kept:
    """Pairs, and how many are left out by why."""

    pairs: list[Pair]
    left_out: dict[str, int]


def make_pairs(
    candidates: Sequence[Candidate], verdicts: Iterable[Verdict], rule: Rule, judges: Sequence[str] = ()
) -> Kept:
    """A pair for every two answers of which one is preferred, in the order of the candidates.

    Every two answers of every candidate are either a pair or left out once, by one of `verdicts.FATES` or by `trouble`.

    Args:
        candidates: What was judged.
        verdicts: On them alone.
        rule: How verdicts become preferences.
        judges: Whose verdicts count (default: all that occur).

    Raises:
        InputError: A verdict is on no candidate, or a judge has none.
    """
    verdicts = list(verdicts)
    of = {one.id: one for one in candidates}
    for verdict in verdicts:
        judged = of.get(verdict.id)
        both = min(verdict.shown), max(verdict.shown)
        if (
            judged is None
            or both not in combinations(range(len(judged.answers)), 2)
            or verdict.image_sha256 != judged.image_sha256
        ):
            raise InputError(
                f"{verdict.id}: {verdict.judge} judged answers {verdict.shown[0]} and {verdict.shown[1]} about image "
                f"{verdict.image_sha256[:12]}, which are no candidate's. Pass the candidates that were judged."
            )
    known = {one.judge for one in verdicts}
    if strangers := sorted({*judges} - known):
        raise InputError(f"--judge {strangers[0]}: no verdict is its. There are those of {', '.join(sorted(known))}.")
    names = sorted({*judges} or known)
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    for one in preferences(candidates, verdicts, rule, names):
        if one.chosen is None or one.rejected is None:
            left_out[one.fate] += 1
            continue
        candidate = of[one.id]
        answers = candidate.answers
        texts = candidate.question.strip(), answers[one.chosen].strip(), answers[one.rejected].strip()
        if why := trouble(*texts):
            left_out[why] += 1
            continue
        id = one.id if len(candidate.answers) == 2 else f"{one.id}:{one.answers[0]}-{one.answers[1]}"
        pairs.append(Pair(id, candidate.image, candidate.image_sha256, *texts, one.margin, one.judges))
    return Kept(pairs, dict(left_out))


def trouble(question: str, chosen: str, rejected: str, two_images: bool = False) -> str | None:
    """Why these stripped texts make no pair; None where they do.

    Args:
        question, chosen, rejected: The texts.
        two_images: The answers are about two images, and may be one text.

    >>> trouble("Where?", "Left.</s>", "Right.")
    '</s> in chosen'
    """
    for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
        if not text:
            return f"empty {name}"
        if marks := [mark for mark in (*SPECIAL, "<image>") if mark in text] + ROLE.findall(text) + tags(text):
            return f"{marks[0]} in {name}"
        if re.search("[\ud800-\udfff]", text):
            return f"half a character in {name}"
    return "chosen equals rejected" if chosen == rejected and not two_images else None


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, each of them checked.

    Raises:
        InputError: It cannot be read or holds none, or a row is no pair.
    """
    found: dict[str, Pair] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            pair = pair_of(row)
            if pair.id in found:
                raise ValueError(f"id {pair.id} appears twice. Give each pair one of its own.")
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        found[pair.id] = pair
    if not found:
        raise InputError(f"{path}: it holds no pair. Pass what `stllava-train pairs` wrote.")
    check_weights(path, list(found.values()))
    return list(found.values())


def check_weights(path: Path, pairs: Sequence[Pair]) -> None:
    """Raises InputError where some pairs have a weight and others have none, or all weights are 0."""
    weights = [pair.weight for pair in pairs]
    if None in weights and any(weight is not None for weight in weights):
        without = next(pair.id for pair in pairs if pair.weight is None)
        raise InputError(f"{path}: {without}: it has no weight, and others have one. Give each pair a weight, or none.")
    if weights and not any(weight is None or weight > 0 for weight in weights):
        raise InputError(f"{path}: the weight of every pair is 0, so nothing would be learnt. Raise some.")


def relative_weights(pairs: Sequence[Pair]) -> list[float]:
    """The weight of each pair divided by the mean weight of them all; none where the pairs have no weights.

    MMedPO (arXiv:2412.06141) multiplies the loss of a pair by its clinical relevance, from 0 to 1, and takes the mean
    over the batch (`dpo_trainer_weighted.py` in aiming-lab/MMedPO). That the weights are divided by their mean before
    is our choice: what counts is how they compare, equal weights train as none do, and learning rate and gradient
    clipping keep their meaning. Over an epoch it is the weighted mean of the losses.
    """
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    if not weights:
        return []
    most = max(weights)
    shares = [weight / most for weight in weights]  # their sum is finite, however large the weights are
    mean = math.fsum(shares) / len(shares)
    return [share / mean for share in shares]


def weights_in_words(pairs: Sequence[Pair]) -> list[str]:
    """A line about the weights; none where there are none."""
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    if not weights:
        return []
    mean = math.fsum(weight / len(weights) for weight in weights)
    return [f"weights from {min(weights):g} to {max(weights):g}; in the loss each is divided by their mean, {mean:.4g}"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_inside(value: Any) -> bool:
    """Whether it names a file that lies in the folder it is relative to."""
    if not isinstance(value, str) or value == "" or "\0" in value:
        return False
    return not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_margin(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


# What a row holds -> whether a value is right, and what would be
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) and value != "", "a text"),
    "image": (is_inside, "a file's name relative to the folder of images"),
    "image_sha256": (_is_hash, "64 hex digits"),
    "question": (_is_text, "a text"),
    "chosen": (_is_text, "a text"),
    "rejected": (_is_text, "a text"),
    "margin": (_is_margin, "a number from 0 on, or null"),
    "judges": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"),
    "weight": (_is_margin, "a number from 0 on"),
    "rejected_image": (is_inside, "a file's name relative to the folder of images"),
    "rejected_image_sha256": (_is_hash, "64 hex digits"),
}


def pair_of(row: Row) -> Pair:
    """The pair that a row of a file holds.

    Raises:
        ValueError: It is none; the message says why.
    """
    form = f"A pair has {', '.join(KEYS)}; see docs/preferences.md. `stllava-train pairs --from` reads other layouts."
    if missing := [key for key in KEYS if key not in row]:
        raise ValueError(f"no {missing[0]}. {form}")
    if others := [key for key in row if key not in CHECKS]:
        raise ValueError(f"{others[0]} is no key of a pair. {form}")
    for key, (is_right, right) in CHECKS.items():
        if key in row and not is_right(row[key]):
            raise ValueError(f"{key} is {json.dumps(row[key])[:60]}, not {right}. Mend the line, or delete it.")
    texts = {key: row[key].strip() for key in ("question", "chosen", "rejected")}
    two_images = "rejected_image" in row
    if two_images != ("rejected_image_sha256" in row):
        raise ValueError("rejected_image and rejected_image_sha256 go together. Give both, or neither.")
    if two_images and row["rejected_image_sha256"] == row["image_sha256"]:
        raise ValueError("image and rejected_image have the same pixels. Name another one, or delete the line.")
    if why := trouble(**texts, two_images=two_images):
        raise ValueError(f"{why}. Mend the line, or delete it.")
    return Pair(**row | texts | {"judges": tuple(row["judges"])})


# --- which pairs are written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Which pairs are written where. The default writes all to one file.

    Attributes:
        per_image: Pairs of an image, at most; see `largest_margins`.
        balance_length: See `length_balanced`. Each of the two files is balanced by itself.
        balance_verdict: See `verdict_balanced`, likewise.
        held_out: Share of the images whose pairs are held out, in [0, 1); see `split`.
        seed: Of what is drawn.
    """

    per_image: int | None = None
    balance_length: bool = False
    balance_verdict: bool = False
    held_out: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """The pairs to learn from and those held out, and how many are left out by why, on the way to here."""

    train: list[Pair]
    held_out: list[Pair]
    left_out: dict[str, int]
    options: Options


def rule_of(name: str, min_margin: float | None) -> Rule:
    """Return the rule of this name, `ours` or `authors`, with another smallest margin where one is given (points).

    Raises:
        InputError: The margin is outside of the scale.
    """
    rule = AUTHORS_RULE if name == "authors" else Rule()
    if min_margin is None:
        return rule
    if not 0 <= min_margin <= 9:
        raise InputError(f"--min-margin {min_margin}: points of a scale from 1 to 10. Give 0 to 9.")
    return replace(rule, min_margin=min_margin)


def check_options(options: Options) -> None:
    """Raises InputError where one makes no sense."""
    if options.per_image is not None and options.per_image < 1:
        raise InputError(f"--per-image {options.per_image}: no pair. Give a number from 1 on.")
    if not 0 <= options.held_out < 1:
        raise InputError(f"--held-out {options.held_out}: no share. Give a number from 0 on and below 1, such as 0.1.")


def selected(kept: Kept, options: Options = Options()) -> Split:
    """`kept`, or fewer, by the options.

    Raises:
        InputError: An option makes no sense, or a file would be empty.
    """
    check_options(options)
    pairs = kept.pairs if options.per_image is None else largest_margins(kept.pairs, options.per_image)
    train, held_out = split(pairs, options.held_out, options.seed)
    further = {"smaller margin than others of its image": len(kept.pairs) - len(pairs)}
    for asked, why, balanced in (
        (options.balance_verdict, "balance of yes and no", verdict_balanced),
        (options.balance_length, "balance of lengths", length_balanced),
    ):
        if asked:
            before = len(train) + len(held_out)
            train, held_out = balanced(train, options.seed), balanced(held_out, options.seed)
            further[why] = before - len(train) - len(held_out)
    left_out = kept.left_out | {why: number for why, number in further.items() if number}
    if not train:
        whys = "; ".join(f"{why}: {number}" for why, number in left_out.items())
        raise InputError(f"no pair to learn from ({whys or 'there is none'}). Judge more candidates, or ask for less.")
    if options.held_out and not held_out:
        raise InputError(
            f"--held-out {options.held_out}: nothing is held out of {len({one.image_sha256 for one in pairs})} images. "
            "Give a larger share or another --seed."
        )
    return Split(train, held_out, left_out, options)


def largest_margins(pairs: Sequence[Pair], per_image: int) -> list[Pair]:
    """At most so many pairs of each image, those with the largest margins, in their order.

    Of equal margins the lower id stays; an unknown margin counts as the smallest. Equal pixels are one image.
    """
    of: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        of[pair.image_sha256].append(pair)
    best = {one.id for some in of.values() for one in sorted(some, key=lambda one: (-_margin(one), one.id))[:per_image]}
    return [pair for pair in pairs if pair.id in best]


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to learn from, pairs held out), each in their order; no image is in both.

    An image is held out with probability `held_out`, in [0, 1), by its pixels and the seed alone: other images, names
    and the order change nothing, and a larger share holds out what a smaller one does. Copies of a picture whose pixels
    differ are different images.
    """
    parts: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        parts[uniform(seed, "held out", pair.image_sha256) < held_out].append(pair)
    return parts


def length_balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """As many pairs whose chosen answer is the longer one as pairs whose rejected one is, in words; in their order.

    Pairs of the more frequent kind are dropped, the smallest margins first, of equal margins by a draw: by id it would
    always be the last images. Pairs of equal lengths stay.

    Judges like longer answers, and DPO learns that length first: the answers grow, right or wrong (Park et al. 2024,
    arXiv:2403.19159). Of balanced pairs, and of held-out ones, a model that is only longer gets half right.
    """
    return _balanced(pairs, lambda pair: len(pair.chosen.split()) - len(pair.rejected.split()), seed)


def verdict_balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """As many pairs whose chosen answer begins with yes as pairs where it begins with no; in their order.

    Pairs are dropped as in `length_balanced`; those of other answers stay.

    A model asks about what is not there more often than about what is, and so "no" is the better answer more often. It
    is what DPO then learns: on the sample sets (docs/results.md) 62 % of such pairs had "no" chosen, and yes went from
    48 to 33 % of the answers.
    """

    def sign(pair: Pair) -> int:
        first = folded_words(pair.chosen)[:1]
        return (first == ("yes",)) - (first == ("no",))

    return _balanced(pairs, sign, seed)


def _balanced(pairs: Sequence[Pair], sign: Callable[[Pair], int], seed: int) -> list[Pair]:
    """As many pairs of a positive sign as of a negative one; the surplus with the smallest margins is dropped."""
    positive = [pair for pair in pairs if sign(pair) > 0]
    negative = [pair for pair in pairs if sign(pair) < 0]
    fewer, more = sorted((positive, negative), key=len)
    more.sort(key=lambda pair: (_margin(pair), uniform(seed, "balance", pair.id)))
    dropped = {pair.id for pair in more[: len(more) - len(fewer)]}
    return [pair for pair in pairs if pair.id not in dropped]


def _margin(pair: Pair) -> float:
    """For sorting: an unknown margin is smaller than any other."""
    return -1.0 if pair.margin is None else pair.margin


# --- files ------------------------------------------------------------------------------------------------------------


def write_pairs(
    made: Split, out: Path, source: Mapping[str, Any], formats: Sequence[str] = (), images: Path | None = None
) -> list[Path]:
    """Write `NAME.jsonl`, where pairs are held out `NAME-held-out.jsonl` too, and the same pairs for other trainers.

    Beside each file of pairs lies its manifest: the source, the options, and how many pairs were left out by why. Other
    trainers' files are `NAME.trl.jsonl`, `NAME.authors.json`, `NAME.ms-swift.jsonl` and the folder
    `NAME.llama-factory/`, LLaMA-Factory's `dataset_dir`. All but the authors' hold whole paths of the images.

    Args:
        made: See `selected`.
        out: `NAME.jsonl`.
        source: What the pairs were made of, for the manifest.
        formats: Of `FORMATS`.
        images: The folder of the images; formats other than the authors' need it.

    Returns:
        The files written, manifests aside.

    Raises:
        InputError: `out` holds other pairs or something else, an image is missing, or the disk is full.
    """
    if unknown := [format for format in formats if format not in FORMATS]:
        raise InputError(f"--format {unknown[0]}: unknown. Choose of {', '.join(FORMATS)}.")
    parts = {"train": (out, made.train)}
    if made.held_out:
        parts["held-out"] = (out.with_name(f"{out.stem}-held-out{out.suffix}"), made.held_out)
    exports: dict[Path, str] = {}
    for format in dict.fromkeys(formats):
        exports |= _exports(dict(parts.values()), out, format, images)
    for part, (path, pairs) in parts.items():
        decided_by = {"stage": "pairs", "part": part, "source": source, "options": asdict(made.options)}
        ledger = Ledger(path, lambda row: row["id"], decided_by | {"rows_sha256": _sha256(pairs)})
        ledger.add(row_of(pair) for pair in pairs if pair.id not in ledger.rows)
        counts = {"train": len(made.train), "held_out": len(made.held_out), "left_out": made.left_out}
        ledger.finish([pair.id for pair in pairs], counts=counts)
    for file, text in exports.items():
        with whole_file(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
    return [*(path for path, _ in parts.values()), *exports]


def _exports(parts: Mapping[Path, Sequence[Pair]], out: Path, format: str, images: Path | None) -> dict[Path, str]:
    """The text of each file of a format; `parts` by their files of pairs."""
    texts: dict[Path, str] = {}
    listed: Row = {}
    for path, pairs in parts.items():
        lines = [line(exported(pair, format, *_image_paths(pair, format, images))) for pair in pairs]
        if format in ("trl", "ms-swift"):
            texts[path.with_suffix(f".{format}.jsonl")] = "".join(lines)
            continue
        array = "[\n" + ",\n".join(text.rstrip("\n") for text in lines) + "\n]\n"
        if format == "authors":
            texts[path.with_suffix(".authors.json")] = array
            continue
        folder = out.with_suffix(".llama-factory")
        texts[folder / f"{path.stem}.json"] = array
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
        known = {"file_name": f"{path.stem}.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
        listed[path.stem] = known  # LLaMA-Factory finds a file by this entry alone
        texts[folder / "dataset_info.json"] = json.dumps(listed, indent=2, ensure_ascii=False) + "\n"
    return texts


def refusal_of_two_images(format: str) -> str:
    """The line that refuses to export image-contrast pairs in a format other than ms-swift's."""
    return (
        f"--format {format}: its chosen and rejected answers are about two images, and {format} has one image for "
        "both. Write --format ms-swift, or none."
    )


def exported(pair: Pair, format: str, image: str, rejected_image: str = "") -> Row:
    """The pair as another trainer reads it, one of `FORMATS`; `layouts` reads it back.

    `id` and `weight` (where the pair has one) go with it. The other trainers pass over both keys.

    Args:
        pair: The pair.
        format: Of `FORMATS`.
        image: Its image, as the format names it.
        rejected_image: The same of the rejected answer's, where that is another one.

    Raises:
        InputError: The pair has two images, and the format one.
    """
    asked = {"from": "human", "value": f"<image>\n{pair.question}"}
    chosen, rejected = ({"from": "gpt", "value": text} for text in (pair.chosen, pair.rejected))
    named: Row = {"id": pair.id}
    weight = {} if pair.weight is None else {"weight": pair.weight}
    if pair.rejected_image and format != "ms-swift":
        raise InputError(f"{pair.id}: {refusal_of_two_images(format)}")
    if format == "authors":  # train_dpo.py:945-975
        conversations = {"chosen_conversations": [asked, chosen], "reject_conversations": [asked, rejected]}
        return named | {"image": image} | conversations | weight
    if format == "llama-factory":
        # hiyouga/LLaMA-Factory, data/README.md, "Sharegpt Format": "Preference Dataset", "Multimodal Image Dataset"
        return named | {"conversations": [asked], "chosen": chosen, "rejected": rejected, "images": [image]} | weight
    if format == "ms-swift":
        # modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, "RLHF", "Multimodal"; no newline behind
        # the tag: its templates for LLaVA add one
        turns = [{"role": "user", "content": f"<image>{pair.question}"}, {"role": "assistant", "content": pair.chosen}]
        if pair.rejected_image:  # ms-swift 3.8 and later, the same page: "rejected_messages", "rejected_images"
            rejected_turns = [turns[0], {"role": "assistant", "content": pair.rejected}]
            two = {"rejected_messages": rejected_turns, "rejected_images": [rejected_image]}
            return named | {"messages": turns, "images": [image]} | two | weight
        return named | {"messages": turns, "rejected_response": pair.rejected, "images": [image]} | weight
    # trl 1.16, DataCollatorForVisionPreference in trainer/dpo_trainer.py
    question = [{"type": "image"}, {"type": "text", "text": pair.question}]
    answers = {
        name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return named | {"images": [image], "prompt": [{"role": "user", "content": question}]} | answers | weight


def _image_paths(pair: Pair, format: str, images: Path | None) -> list[str]:
    """Of its one image or of its two, the chosen answer's before the rejected one's."""
    if format == "authors":
        return list(pair.pictures)
    if images is None:
        raise InputError(f"--format {format}: its rows hold the images' paths. Pass their folder with --images.")
    files = []
    for image in pair.pictures:
        if (file := image_file(images.resolve(), image)) is None:
            raise InputError(
                f"{pair.id}: its image {image} is not in {images}. Pass the folder of the images with --images."
            )
        files.append(str(file))
    return files


def _sha256(pairs: Sequence[Pair]) -> str:
    return hashlib.sha256(json.dumps([row_of(pair) for pair in pairs]).encode()).hexdigest()
