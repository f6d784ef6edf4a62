"""Compute what a judge costs in USD from tokens of questions and replies, before and after it is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from stllava_eval.errors import InputError
from stllava_eval.images import open_header
from stllava_eval.storage import read_text
from stllava_train.plain_yaml import read_yaml
from stllava_train.preferences.judges.prompt import LONGEST_SIDE, Comparison, prompt, read_image
from stllava_train.preferences.verdicts import Verdict, verdict_of
from stllava_train.resumable import Row

if TYPE_CHECKING:
    from stllava_eval.inference.replies import Bill, Reply


# What may follow a model's name: a date as OpenAI, Anthropic and Mistral write them, or the newest version
SNAPSHOT = r"-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4,6}|latest|preview)"


@dataclass(frozen=True)
class Price:
    """A price in USD per million tokens of the prompt and of the reply, and the factor on both in the Batch API.

    Tokens of a prompt that a server has cached count as the others do, so that the cost is never too low.
    """

    prompt: float
    reply: float
    batch: float = 1.0

    def of(self, prompt_tokens: float, reply_tokens: float) -> float:
        """Return the cost of so many tokens, in USD."""
        return (self.prompt * prompt_tokens + self.reply * reply_tokens) / 1e6


def read_price(model: str, file: Path | None = None) -> Price | None:
    """Return the price of a model, by the entry of its name or of the model that it is a snapshot of; None without one.

    Args:
        model: `gpt-4o-2024-11-20` finds `gpt-4o`. `gpt-5.4-pro` does not find `gpt-5.4`: it is another model.
        file: A YAML file as our own `prices.yaml`, which is the default.

    Raises:
        InputError: The file cannot be read, or an entry is no price.
    """
    file = file or Path(__file__).parent / "prices.yaml"
    try:
        entries = read_yaml(read_text(file), str(file))
        prices: dict[str, Price] = {}
        for name, entry in entries.items():
            price = Price(**{key: float(value) for key, value in entry.items()})
            if not all(0 <= number < 1e6 for number in (price.prompt, price.reply, price.batch)):
                raise ValueError(f"{name} has a price that is none, or below 0")
            prices[str(name)] = price
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        what = " ".join(str(error).split())
        raise InputError(
            f"{file}: no list of prices ({what}). Write a line a model: `NAME: {{prompt: 2.5, reply: 10, batch: 0.5}}`."
        ) from error
    names = [name for name in prices if model == name or re.fullmatch(re.escape(name) + SNAPSHOT, model)]
    return prices[max(names, key=len)] if names else None


REPLY_TOKENS = 150  # per reply with its reasons, for estimates. Our choice; a model that reasons first writes more
CHARACTERS = 4.0  # per token, for estimates: what OpenAI's guide gives for English


def image_tokens(width: int, height: int) -> int:
    """Return an image's tokens as GPT-4o counts them, for estimates; most other models count fewer.

    Source: OpenAI's vision guide, detail "high": at most 2048 px wide and high, then its shorter side at most 768; 85
    tokens, and 170 for every tile of 512 px.
    """
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    tiles = [-(-max(1, round(side * scale)) // 512) for side in (width, height)]
    return 85 + 170 * tiles[0] * tiles[1]


def estimated_reply(reply: Reply, max_tokens: int) -> float:
    """Return the tokens of a reply, by the server's count; where it has none, by what was written.

    A reply without a count that its limit cut has as many tokens as were allowed: its thought may not have been sent.
    """
    if reply.tokens or (reply.counted and not reply.written):
        return reply.tokens
    return max_tokens if reply.cut else min(max_tokens, reply.written / CHARACTERS)


def estimated_tokens(asked: Comparison, folder: Path) -> float:
    """Estimate the tokens of a prompt with its image.

    Raises:
        InputError: The image is missing, or cannot be read.
    """
    content = read_image(folder, asked.candidate)
    try:
        with open_header(content) as header:
            tokens_of_image = image_tokens(*header.size)
    except InputError as error:
        raise InputError(f"{folder / asked.candidate.image}: {error}") from error
    return len(prompt(*asked.texts())) / CHARACTERS + tokens_of_image


def forecast(model: str, asked: Sequence[Comparison], folder: Path, price: Price | None, max_tokens: int) -> str:
    """Return in words how many tokens the questions would take, and what they would cost; nothing is asked.

    Args:
        model: The model's name.
        asked: All comparisons that would be asked.
        folder: The folder of the images.
        price: None leaves the cost out.
        max_tokens: Tokens of a reply, at most.
    """
    tokens = sum(estimated_tokens(comparison, folder) for comparison in asked)
    images = {comparison.candidate.image for comparison in asked}
    lines = [
        f"{model}: {len(asked):,} questions about {len(images):,} images",
        f"about {tokens:,.0f} tokens of prompts (images as GPT-4o counts them) and {REPLY_TOKENS * len(asked):,} of "
        f"replies, at {REPLY_TOKENS} each; at most {max_tokens * len(asked):,}",
    ]
    if price is None:
        lines.append("no price is known: pass one with --prices")
    else:
        about, most = (price.of(tokens, count * len(asked)) for count in (REPLY_TOKENS, max_tokens))
        lines.append(f"about {about:,.2f} USD, at most about {most:,.2f}; in a batch {about * price.batch:,.2f}")
    return "\n".join(lines)


def paid(
    verdict: Verdict,
    before: Bill,
    came: Reply | None,
    price: Price | None,
    estimate: Callable[[], float],
    most: float,
    limit: int,
    share: float = 1.0,
) -> Verdict:
    """Return the verdict with the cost of further requests added to it.

    A request whose reply never came counts as the most that it can have cost. Once a reply to the same question has
    come, it counts as much as that reply.

    Args:
        verdict: It has the cost of earlier requests.
        before: The bill of all attempts but for the reply that came.
        came: That reply, whether it answers or not.
        price: None where none is known; then the tokens alone are added.
        estimate: Tokens of the prompt, about.
        most: Tokens of the longest prompt billed so far.
        limit: Tokens that a reply is allowed.
        share: Of the price that the reply costs, in a batch; what came before it was asked directly.
    """
    counted = before if came is None else before.plus_reply(came)
    then = verdict.tokens or (0, 0)
    tokens = (then[0] + counted.prompt_tokens, then[1] + counted.tokens)
    verdict = replace(verdict, tokens=tokens if any(tokens) else None)
    if price is None:
        return verdict
    requests, open_cost = verdict.unsettled or (0, 0.0)
    cost = (verdict.cost or 0.0) - open_cost + price.of(before.prompt_tokens, before.tokens)
    estimated = verdict.estimated - open_cost
    requests += before.unknown
    if came is None:
        if before.unknown:
            open_cost += before.unknown * price.of(max(most, estimate()), limit)
        unsettled = (requests, open_cost) if requests else None
        return replace(verdict, cost=cost + open_cost, estimated=estimated + open_cost, unsettled=unsettled)
    each = price.of(came.prompt_tokens or estimate(), estimated_reply(came, limit))
    estimated += requests * each + (each - price.of(came.prompt_tokens, came.tokens)) * share
    cost += each * (share + requests)
    return replace(verdict, cost=max(0.0, cost), estimated=max(0.0, estimated), unsettled=None)


def cost_of(verdict: Verdict, price: Price | None) -> float | None:
    """Return what a verdict has cost, in USD; `price` is used where the call that it comes from had none."""
    if verdict.cost is None and price is not None:
        return price.of(*(verdict.tokens or (0, 0)))
    return verdict.cost


def spent(rows: Iterable[Row], judge: str = "", price: Price | None = None) -> float:
    """Return what verdicts have cost, in USD.

    Args:
        rows: Rows of verdicts.
        judge: The judge whose verdicts are counted by `price` where they have no cost, as of a call without a price.
        price: Of that judge.
    """
    verdicts = map(verdict_of, rows)
    return sum(cost_of(verdict, price if verdict.judge == judge else None) or 0.0 for verdict in verdicts)


class Purse:
    """What a call may still spend, in USD, and what is held back of it for requests under way; None is no limit."""

    def __init__(self, left: float | None) -> None:
        self.left = left
        self._held: dict[Hashable, float] = {}
        self._lock = Lock()  # requests are begun in threads

    def holds(self, name: Hashable, amount: float) -> bool:
        """Hold back what a request could cost, and replace what was held for it; return False where less is left."""
        with self._lock:
            others = sum(held for key, held in self._held.items() if key != name)
            if self.left is not None and others + amount > self.left:
                return False
            self._held[name] = amount
            return True

    def pays(self, name: Hashable, cost: float) -> None:
        """Take what the request has cost, and hold nothing for it any more."""
        with self._lock:
            self._held.pop(name, None)
            if self.left is not None:
                self.left -= cost
