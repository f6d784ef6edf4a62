"""Few candidates, a judge that is fair to them, and one call of each kind, as `stllava-train judge` makes it."""

import re
from collections import Counter

from conftest import png
from fault_server import MODEL, FaultServer, text

from stllava_eval.images import decode, pixel_hash
from stllava_eval.inference.endpoint import Endpoint
from stllava_train.preferences.judges import judging
from stllava_train.preferences.judges.endpoint import EndpointJudge
from stllava_train.preferences.judges.judging import judge, open_verdicts, still_due
from stllava_train.preferences.judges.prices import Price, spent
from stllava_train.preferences.judges.prompt import PRESETS, questions
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import row_of
from stllava_train.resumable import read_rows

PIXELS = [pixel_hash(decode(png((50 * number, 10, 20)))) for number in range(5)]


OURS, AUTHORS = PRESETS["ours"], PRESETS["authors"]


def candidates(count: int = 6, answers: tuple[str, ...] = ("left", "right")) -> list[Candidate]:
    """Of which the judge of these tests prefers the answer that ends in "right"."""
    return [
        Candidate(f"{number % 5}.png#{number}", f"{number % 5}.png", PIXELS[number % 5], f"Side {number}?", answers)
        for number in range(count)
    ]


def fair(request) -> str:
    """A judge that looks at the answers and not at their places."""
    first, second = re.findall(r"\[Answer \d\]\n(.*)", text(request))
    return f"{2 + 6 * first.endswith('right')} {2 + 6 * second.endswith('right')}\nBecause."


def asked_of(some: list[Candidate], preset=OURS, repetitions: int = 1):
    return questions(some, preset.both_orders, repetitions)


PRICE = Price(2.0, 10.0, 0.5)


def run(url: str, some, images, written, out, price=None, preset=OURS, budget=None, **endpoint) -> Counter:
    by = EndpointJudge(Endpoint(url, MODEL, **endpoint), preset, images, price)
    with open_verdicts(out, written, "ours") as ledger:
        due = still_due(asked_of(some), MODEL, ledger, preset)
        left = None if budget is None else budget - spent(ledger.rows.values(), MODEL, price)
        found = by.verdicts(due, left, ledger.rows, lambda verdict: ledger.add([row_of(verdict)]))
        try:
            return judge(ledger, due, found, progress=False)
        finally:
            judging.finish(ledger, some)


def cost(path) -> float:
    return sum(row["cost"] for row in read_rows(path))


def billed(there: FaultServer, price: Price = PRICE) -> float:
    """What the server's own bill comes to, in USD."""
    return sum(price.of(*tokens) for tokens in there.bill)


def batched(url: str, some, images, written, out, budget=None, price=PRICE, preset=OURS) -> Counter:
    by = EndpointJudge(Endpoint(url, MODEL, retries=0), preset, images, price)
    with open_verdicts(out, written, "ours") as ledger:
        due = still_due(asked_of(some), MODEL, ledger, preset)
        mark = lambda verdict: ledger.add([row_of(verdict)])  # noqa: E731
        found = by.batch_verdicts(due, out.with_suffix(".batches.json"), ledger.rows, budget, mark)
        try:
            return judge(ledger, due, found, progress=False)
        finally:
            judging.finish(ledger, some)


FEW = ["questions=3", "describe_tokens=8", "question_tokens=8", "answer_tokens=10"]


def longer(request) -> str:
    first, second = re.findall(r"\[Answer \d\]\n(.*?)\n\n\[End", text(request), re.DOTALL)
    return f"{1 + min(9, len(first))} {1 + min(9, len(second))}"
