"""Choose which pairs are learnt from: by rule, margin, balance and held-out images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stllava_eval.errors import InputError
from stllava_eval.scoring.words import folded_words
from stllava_train.data.encoding import uniform
from stllava_train.preferences.pairs import Pair, PairSet
from stllava_train.preferences.verdicts import AUTHORS_RULE, Rule

# --- which pairs are written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairOptions:
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
    skipped: dict[str, int]
    options: PairOptions


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


def check_options(options: PairOptions) -> None:
    """Raise InputError where an option makes no sense."""
    if options.per_image is not None and options.per_image < 1:
        raise InputError(f"--per-image {options.per_image}: no pair. Give a number from 1 on.")
    if not 0 <= options.held_out < 1:
        raise InputError(f"--held-out {options.held_out}: no share. Give a number from 0 on and below 1, such as 0.1.")


def select_pairs(made: PairSet, options: PairOptions = PairOptions()) -> Split:
    """Select the pairs that are learnt from and those that are held out, by the options.

    Raises:
        InputError: An option makes no sense, or a file would be empty.
    """
    check_options(options)
    pairs = made.pairs if options.per_image is None else largest_margins(made.pairs, options.per_image)
    train, held_out = split(pairs, options.held_out, options.seed)
    further = {"smaller margin than others of its image": len(made.pairs) - len(pairs)}
    for asked, why, balanced in (
        (options.balance_verdict, "balance of yes and no", verdict_balanced),
        (options.balance_length, "balance of lengths", length_balanced),
    ):
        if asked:
            before = len(train) + len(held_out)
            train, held_out = balanced(train, options.seed), balanced(held_out, options.seed)
            further[why] = before - len(train) - len(held_out)
    skipped = made.skipped | {why: number for why, number in further.items() if number}
    if not train:
        whys = "; ".join(f"{why}: {number}" for why, number in skipped.items())
        raise InputError(f"no pair to learn from ({whys or 'there is none'}). Judge more candidates, or ask for less.")
    if options.held_out and not held_out:
        raise InputError(
            f"--held-out {options.held_out}: nothing is held out of "
            f"{len({pair.image_sha256 for pair in pairs})} images. "
            "Give a larger share or another --seed."
        )
    return Split(train, held_out, skipped, options)


def largest_margins(pairs: Sequence[Pair], per_image: int) -> list[Pair]:
    """Return at most `per_image` pairs of each image, those with the largest margins, in their order.

    Of equal margins the lower id stays; an unknown margin counts as the smallest. Equal pixels are one image.
    """
    by_image: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_image[pair.image_sha256].append(pair)
    best: set[str] = set()
    for about_one in by_image.values():
        about_one.sort(key=lambda pair: (-_margin(pair), pair.id))
        best.update(pair.id for pair in about_one[:per_image])
    return [pair for pair in pairs if pair.id in best]


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (pairs to learn from, pairs held out), each in their order; no image is in both.

    An image is held out with probability `held_out`, in [0, 1), by its pixels and the seed alone: other images, names
    and the order change nothing, and a larger share holds out what a smaller one does. Copies of a picture whose pixels
    differ are different images.
    """
    parts: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        parts[uniform(seed, "held out", pair.image_sha256) < held_out].append(pair)
    return parts


def length_balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Return as many pairs whose chosen answer is longer, in words, as pairs whose rejected one is; in their order.

    Pairs of the more frequent kind are dropped, the smallest margins first, of equal margins by a draw: by id it would
    always be the last images. Pairs of equal lengths stay.

    Judges like longer answers, and DPO learns that length first: the answers grow, right or wrong (Park et al. 2024,
    arXiv:2403.19159). Of balanced pairs, and of held-out ones, a model that is only longer gets half right.
    """
    return _balanced(pairs, lambda pair: len(pair.chosen.split()) - len(pair.rejected.split()), seed)


def verdict_balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Return as many pairs whose chosen answer begins with yes as pairs where it begins with no; in their order.

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
    """Return as many pairs of a positive sign as of a negative one; those with the smallest margins are dropped."""
    positive = [pair for pair in pairs if sign(pair) > 0]
    negative = [pair for pair in pairs if sign(pair) < 0]
    fewer, more = sorted((positive, negative), key=len)
    more.sort(key=lambda pair: (_margin(pair), uniform(seed, "balance", pair.id)))
    dropped = {pair.id for pair in more[: len(more) - len(fewer)]}
    return [pair for pair in pairs if pair.id not in dropped]


def _margin(pair: Pair) -> float:
    """Return a margin for sorting: an unknown one is smaller than any other."""
    return -1.0 if pair.margin is None else pair.margin
