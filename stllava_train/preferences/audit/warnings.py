"""Compare the figures of an audit with thresholds, and put what is wrong into words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tables = NDArray[np.float64]  # (..., 3, 3)


UNSCORED = 0.05  # share of a judge's verdicts without scores from which the page warns. Our choice
SLIGHT = 0.2  # agreement beyond chance up to which Landis and Koch (Biometrics 1977) call it slight
BLIND = 0.5  # share of chosen answers that come without the image from which the page warns. Our choice


# --- what stands out --------------------------------------------------------------------------------------------------


def checks(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what a reader should know first: `about`, `level` (warning, fine or not tested) and a sentence, `text`.

    A bias is warned of where its interval leaves out one half. With many judges, one in twenty is by chance.
    """
    checks_made = [(name, *check) for name, figure in figures["judging"].items() for check in _of_judge(figure)]
    checks_made += [(" and ".join(figure["judges"]), *_of_two(figure)) for figure in figures["agreement"]]
    checks_made += [("leaks", *check) for check in _of_leaks(figures["leaks"])]
    repeats, blind = figures["data"]["repeats"], figures["blind"]
    text = f"{_percent(repeats)} of the candidates repeat a question about their image."
    checks_made.append(("data", "warning" if repeats["value"] else "fine", text))
    if blind["value"] is None:
        text = f"Whether questions can be answered without the image cannot be determined: {blind['why']}."
        checks_made.append(("data", "not tested", text))
    else:
        text = f"{_percent(blind)} of the chosen answers come without the image too."
        checks_made.append(("data", "fine" if blind["value"] < BLIND else "warning", text))
    return [{"about": about, "level": level, "text": text} for about, level, text in checks_made]


def _of_judge(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (level, text) of each check of one judge."""
    if (silent := 1 - one["scored"]["value"]) >= UNSCORED:
        yield "warning", f"{100 * silent:.1f} % of its verdicts have no scores. What it scored may be unlike the rest."
    if not all(one["orders"].values()):
        yield "not tested", "It saw each pair in one order: a bias to a position looks like a better answer."
    else:
        yield _of_half(
            one["prefers_first"], "a bias to a position", "the answer shown first", "the answer shown second"
        )
    yield _of_half(one["prefers_longer"], "a bias to length", "the longer answer", "the shorter answer")
    right = one["prefers_right"]
    if right["value"] is None:
        yield "not tested", f"Whether it prefers what is right cannot be determined: {right['why']}."
    elif right["low"] is not None and right["low"] > 0.5:
        yield "fine", f"It prefers the right answer: {_percent(right)} where it prefers one."
    else:
        yield "warning", f"It is not shown to prefer the right answer: {_percent(right)} where it prefers one."


def _of_half(share: Mapping[str, Any], bias: str, above: str, below: str) -> tuple[str, str]:
    """Return (level, text) of a share that is one half where there is no bias."""
    if share["low"] is None:
        return (
            "not tested",
            f"Whether it has {bias} cannot be determined: {share.get('why', 'all is about one image')}.",
        )
    if share["low"] <= 0.5 <= share["high"]:
        return "fine", f"No sign of {bias}: {_percent(share)}, where one half is none."
    return "warning", f"It prefers {above if share['value'] > 0.5 else below}: {_percent(share)}, not one half."


def _of_two(one: Mapping[str, Any]) -> tuple[str, str]:
    """Return (level, text) of two judges, by the higher of the lower ends: kappa fails where one class dominates."""
    lows = [one[name]["low"] for name in ("kappa", "ac1") if one[name]["low"] is not None]
    shown = f"kappa {_interval(one['kappa'])}, AC1 {_interval(one['ac1'])}"
    if one["equal"]["value"] == 1:
        return "fine", f"They agree on all {one['equal']['n']} pairs that both scored."
    if not lows:
        why = one["equal"].get("why", "all is about one image")
        return "not tested", f"Their agreement beyond chance cannot be determined: {why}."
    if max(lows) > SLIGHT:
        return "fine", f"They agree beyond chance: {shown}."
    return "warning", f"They are not shown to agree more than slightly: {shown}."


def _of_leaks(leaks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (level, text) of what is in test splits."""
    if not leaks["prepared"]:
        yield "not tested", f"{leaks['images']['why'].capitalize()}."
        return
    for share, text in (
        (leaks["images"], "of the images are, or look like, images of a test split"),
        (leaks["both"], "of the candidates ask what a test split asks about the same image"),
    ):
        yield "warning" if share["value"] else "fine", f"{_percent(share)} {text}."
    if leaks["not_prepared"]:
        yield "not tested", f"Not compared with {', '.join(leaks['not_prepared'])}: their test splits are not prepared."
    if leaks["samples"]:
        yield "not tested", f"Of {', '.join(leaks['samples'])} only the sample is prepared: compared with nothing else."


def _interval(figure: Mapping[str, Any]) -> str:
    value = number_text(figure["value"], 2)
    return (
        value
        if figure["low"] is None
        else f"{value} [{number_text(figure['low'], 2)}, {number_text(figure['high'], 2)}]"
    )


def _percent(share: Mapping[str, Any]) -> str:
    value = f"{100 * share['value']:.1f} %"
    return value if share["low"] is None else f"{value} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def number_text(value: float | None, digits: int = 0) -> str:
    """Return a number as `1,234`, or a dash for nothing."""
    return "–" if value is None else f"{value:z,.{digits}f}".replace("-", "−")
