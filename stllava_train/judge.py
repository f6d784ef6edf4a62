"""Candidates -> verdicts: which answer a judge prefers, asked in both orders."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.home import read_bytes, read_json, read_text, write_json
from stllava_eval.images import IMAGE_BYTES, decode, opened, pixel_hash
from stllava_train.candidates import Candidate
from stllava_train.ledger import Ledger
from stllava_train.recipe import read_yaml
from stllava_train.verdicts import Verdict, row_of, verdict_of

if TYPE_CHECKING:
    from stllava_eval.server import Endpoint, Failure, Reply, Request

# --- what is put to a judge -------------------------------------------------------------------------------------------

# Paper, Fig. 3; the code's rule.json was not published
RULE_TEXT = (
    "We would like to request your feedback on the quality of two answers in response to the user question displayed "
    "above. The user asks the question on observing an image. For your reference, you will see an image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of the answers. Each answer receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Answer 1 and 2, "
    "respectively. The two scores are separated by a space."
)
# The reply where the server keeps to a form. Scores come first, as in the paper's prompt
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "scores",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "score_1": {"type": "number", "description": "of Answer 1, 1 to 10"},
                "score_2": {"type": "number", "description": "of Answer 2, 1 to 10"},
                "reason": {"type": "string"},
            },
            "required": ["score_1", "score_2", "reason"],
            "additionalProperties": False,
        },
    },
}
# A bracket that the prompt's own marks begin with, in a text of the model's
MARK = re.compile(r"\[(?=\s*(?:/\s*)?(?:end\b|answer\b|question\b|system\b|image\b))", re.IGNORECASE)
# An answer that speaks to its judge, not to who asked. Our choice; it finds what is blunt, not what is clever
TO_THE_JUDGE = re.compile(
    r"\b(?:score|rate|grade)\s+(?:this|my|answer [12])\s+(?:answer|response|reply|10|ten|highest)\b"
    r"|\b(?:score|rate|grade|give|award)\s+(?:this|my|me|it|answer [12])\b.{0,30}\b(?:10|ten|points?|scores?|best)\b"
    r"|\b(?:ignore|disregard|forget)\b.{0,30}\b(?:instructions?|rules?|prompt|other answer|answer [12])\b"
    r"|\b(?:prefer|choose|pick|select)\s+(?:(?:this|my)\s+(?:answer|response|reply)|answer [12])\b"
    r"|\b(?:dear|note to the|attention:?) (?:judge|grader|evaluator)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Preset:
    """How a judge is asked. `PRESETS` has ours and the authors'.

    Attributes:
        temperature: Of the judge's words.
        max_tokens: Of its reply, at most.
        both_orders: Ask with each answer shown first once.
        form: Ask for `FORM`, where the server knows it.
        guarded: Marks of the prompt in the model's texts lose their bracket; answers that speak to the judge are not
            judged.
        strict: Read scores as the authors' code does.
    """

    temperature: float
    max_tokens: int
    both_orders: bool
    form: bool
    guarded: bool
    strict: bool


PRESETS = {
    "ours": Preset(0.0, 1024, both_orders=True, form=True, guarded=True, strict=False),  # temperature: our choice
    "authors": Preset(0.2, 1024, both_orders=False, form=False, guarded=False, strict=True),  # eval_gpt4v_review.py
}


def prompt(question: str, first: str, second: str, guarded: bool = True) -> str:
    """What a judge reads, beside the image.

    Source: the template of the authors' `eval_gpt4v_review.py` with the rule of the paper's Fig. 3. Where `guarded`,
    what the model wrote cannot end its own part of it: "[End of Answer 1]" in an answer becomes "(End of Answer 1]".
    """
    texts = [MARK.sub("(", text) if guarded else text for text in (question, first, second)]
    return (
        f"[Question]\n{texts[0]}\n\n[Answer 1]\n{texts[1]}\n\n[End of Answer 1]\n\n"
        f"[Answer 2]\n{texts[2]}\n\n[End of Answer 2]\n\n[System]\n{RULE_TEXT}\n\n"
    )


def image_url(image: bytes) -> str:
    """A data URL: a JPEG or PNG file of 8 bits, upright, as it is; else what `decode` makes of the image, as PNG.

    Raises:
        InputError: It cannot be decoded.
    """
    picture = decode(image)
    with opened(image) as header:
        kind, plain = header.format, header.mode in ("RGB", "L") and not header.has_transparency_data
        plain = plain and header.getexif().get(0x0112, 1) == 1  # EXIF's orientation
    if plain and kind in ("JPEG", "PNG"):
        return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"
    png = io.BytesIO()
    picture.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


# --- what a judge says ------------------------------------------------------------------------------------------------

LONGEST_LINE = 200  # characters of a line that holds scores and nothing else (our choice)
NUMBER = r"(?<![\d.-])(\d{1,2}(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?(?![\d.]*\d)"
LABEL = re.compile(
    r"(?:scores?\s+(?:for|of)\s+)?(?:answer|assistant|a)\s*([12])\s*(?:'s)?\s*(?:scores?)?\s*[:=-]", re.IGNORECASE
)
FILLER = re.compile(r"[\s*_`#,;:|&()\[\]/-]|\b(?:scores?|and|vs|points?)\b|\.(?=\s|$)", re.IGNORECASE)


def read_scores(reply: str) -> tuple[float, float] | None:
    """The two scores in a judge's reply, each in 1 to 10; None where it does not say two.

    A JSON object with `score_1` and `score_2`; or the first line with words or figures, where it holds two scores and
    nothing else but marks and labels ("8 6", "8, 6", "**8 6**", "8/10 6/10", "Answer 1: 8, Answer 2: 6"); or two lines
    with a label each. Scores in a sentence are not looked for: any number in it could be taken for one.
    """
    if (form := _in_form(reply)) is not None:
        return _in_range(*form)
    lines = [" ".join(line.split()) for line in reply.splitlines()]  # patterns meet no long runs of blanks
    lines = [line for line in lines if re.search(r"\w", line) and not line.startswith("```")][:2]
    if any(len(line) > LONGEST_LINE for line in lines[:1]):
        return None
    lines = [line[:LONGEST_LINE] for line in lines]
    for text in (lines[:1], lines):
        labels = LABEL.findall(" ".join(text))
        rest = LABEL.sub(" ", " ".join(text))
        found = re.findall(NUMBER, rest)
        alone = labels in ([], ["1", "2"]) and not FILLER.sub("", re.sub(NUMBER, "", rest))
        if len(found) == 2 and alone and (len(text) < 2 or labels):
            return _in_range(*map(float, found))
    return None


def read_scores_authors(reply: str) -> tuple[float, float] | None:
    """As the authors' `parse_score`: the first line, its commas blanks, cut at every single blank into two numbers."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return None
    return None if -1 in (first, second) or not math.isfinite(first + second) else (first, second)


def _in_form(reply: str) -> tuple[float, float] | None:
    start, end = reply.find("{"), reply.rfind("}")
    try:
        made = json.loads(reply[start : end + 1])
        first, second = made["score_1"], made["score_2"]
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (first, second))
        return (float(first), float(second)) if numbers else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _in_range(first: float, second: float) -> tuple[float, float] | None:
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """USD per million tokens of the prompt and of the reply; the factor on both in the Batch API."""

    prompt: float
    reply: float
    batch: float = 1.0

    def of(self, prompt_tokens: float, reply_tokens: float) -> float:
        """USD."""
        return (self.prompt * prompt_tokens + self.reply * reply_tokens) / 1e6


def read_price(model: str, file: Path | None = None) -> Price | None:
    """What `model` costs, by the entry of its name or the longest that its name begins with; None without one.

    Args:
        model: `gpt-4o-2024-11-20` finds `gpt-4o`.
        file: A YAML file as our own `prices.yaml`, which is the default.

    Raises:
        InputError: The file cannot be read, or an entry is no price.
    """
    file = file or Path(__file__).parent / "prices.yaml"
    try:
        entries = read_yaml(read_text(file), str(file))
        prices = {
            str(name): Price(**{key: float(value) for key, value in entry.items()}) for name, entry in entries.items()
        }
        for name, one in prices.items():
            if not all(0 <= number < 1e6 for number in (one.prompt, one.reply, one.batch)):
                raise ValueError(f"{name} has a price that is none, or below 0")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        what = " ".join(str(error).split())
        raise InputError(
            f"{file}: no list of prices ({what}). Write a line a model: `NAME: {{prompt: 2.5, reply: 10, batch: 0.5}}`."
        ) from error
    names = [name for name in prices if model == name or model.startswith(f"{name}-")]
    return prices[max(names, key=len)] if names else None


REPLY_TOKENS = 150  # of a reply with its reasons, for estimates. Our choice; a model that reasons first writes more
CHARACTERS = 4.0  # a token, for estimates: what OpenAI's guide gives for English


def image_tokens(width: int, height: int) -> int:
    """What an image comes to in tokens, for estimates: GPT-4o's count; other models count otherwise, most of them less.

    Source: OpenAI's vision guide, detail "high": at most 2048 px wide and high, then its shorter side at most 768; 85
    tokens, and 170 for every tile of 512 px.
    """
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    tiles = [-(-max(1, round(side * scale)) // 512) for side in (width, height)]
    return 85 + 170 * tiles[0] * tiles[1]


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One question to a judge. See `Verdict`."""

    candidate: Candidate
    shown: tuple[int, int]
    repetition: int = 0

    def texts(self) -> tuple[str, str, str]:
        """Question, and the two answers in the order shown."""
        answers = self.candidate.answers
        return self.candidate.question, answers[self.shown[0]], answers[self.shown[1]]

    def key(self, judge: str) -> tuple[Any, ...]:
        """As `Verdict.key`."""
        return self.candidate.id, judge, self.shown, self.repetition


def questions(candidates: Iterable[Candidate], both_orders: bool, repetitions: int = 1) -> list[Asked]:
    """Everything that a judge is asked about these candidates: every two answers, one order after the other."""
    return [
        Asked(candidate, shown, repetition)
        for candidate in candidates
        for low, high in combinations(range(len(candidate.answers)), 2)
        for shown in ([(low, high), (high, low)] if both_orders else [(low, high)])
        for repetition in range(repetitions)
    ]


def speaks_to_the_judge(candidate: Candidate) -> bool:
    """Whether an answer tries to tell its judge what to say, in a way that `TO_THE_JUDGE` knows."""
    return any(TO_THE_JUDGE.search(text) for text in candidate.answers)


def open_verdicts(out: Path, candidates: Path, preset: str) -> Ledger:
    """The file of verdicts on these candidates, to go on with or new.

    Raises:
        InputError: It holds verdicts on others, or by another preset.
    """
    sha256 = hashlib.sha256(read_bytes(candidates)).hexdigest()
    return Ledger(
        out,
        lambda row: verdict_of(row).key,
        {"stage": "judge", "candidates": {"file": candidates.name, "sha256": sha256}, "preset": preset},
    )


def still_due(asked: Iterable[Asked], judge: str, ledger: Ledger) -> list[Asked]:
    """Those without a verdict: nobody is asked, or paid, twice. Those that failed are asked again."""
    return [one for one in asked if (row := ledger.rows.get(one.key(judge))) is None or row["outcome"] == "failed"]


class EndpointJudge:
    """A model behind an OpenAI-compatible server.

    What a server does not take is left out from the first refusal on: `FORM`, the temperature, `max_tokens` where it
    wants `max_completion_tokens`.

    Args:
        endpoint: The server and model.
        name: That verdicts bear; the model's name if None.
        preset: How it is asked.
        images: The folder of the candidates' images.
        price: Of its tokens; None where none is known.
    """

    def __init__(
        self, endpoint: Endpoint, preset: Preset, images: Path, price: Price | None = None, name: str | None = None
    ) -> None:
        self.endpoint, self.preset, self.images, self.price = endpoint, preset, images, price
        self.name = name or endpoint.model
        self._form, self._temperature, self._limit = preset.form, True, "max_tokens"
        self._urls: dict[str, str] = {}  # of the last images: the questions about one follow each other

    def request(self, asked: Asked) -> Request:
        """What is sent: the text, then the image, as the authors' script has them."""
        content = [
            {"type": "text", "text": prompt(*asked.texts(), self.preset.guarded)},
            {"type": "image_url", "image_url": {"url": self._image(asked.candidate)}},
        ]
        return {
            "messages": [{"role": "user", "content": content}],
            self._limit: self.preset.max_tokens,
            **({"temperature": self.preset.temperature} if self._temperature else {}),
            **({"response_format": FORM} if self._form else {}),
        }

    def _image(self, candidate: Candidate) -> str:
        """Its data URL.

        Raises:
            InputError: The file is not there, or shows something else than what was asked about.
        """
        if (known := self._urls.get(candidate.image)) is not None:
            return known
        image = read_image(self.images, candidate)
        try:
            same = pixel_hash(decode(image)) == candidate.image_sha256
        except InputError:
            same = False
        if not same:
            raise InputError(
                f"{self.images / candidate.image}: not the image that {candidate.id} asks about. Put it back, or pass "
                "the images' folder with --images."
            )
        if len(self._urls) >= IMAGES_KEPT:
            self._urls.pop(next(iter(self._urls)), None)
        return self._urls.setdefault(candidate.image, image_url(image))

    def verdicts(self, asked: Sequence[Asked], budget: float | None = None) -> Iterator[Verdict]:
        """A verdict for each, as they come. With a budget, in USD, it ends before what could cost more than is left,
        as long as no prompt is billed with more tokens than the dearest before it.

        Raises:
            InputError: As `Endpoint.replies`; or a budget is given and no price is known.
        """
        self._check_budget(budget)
        left, due = budget, list(asked)
        most = 0.0 if budget is None else max((estimated_tokens(one, self.images) for one in due), default=0.0)
        at_once = 1  # until it is known what the server takes
        while due:
            if left is not None and self.price is not None:
                worst = self.price.of(most, self.preset.max_tokens)
                # few at a time, lest a server that comes to bill more for a prompt than before is noticed late
                at_once = min(at_once, self.endpoint.concurrency, int(left / worst) if worst else at_once)
                if at_once <= 0:
                    return
            wave, due = due[:at_once], due[at_once:]
            again: list[Asked] = []
            for place, reply in self.endpoint.replies([partial(self.request, one) for one in wave]):
                if not hasattr(reply, "text") and self._adapts(reply.reason):
                    again.append(wave[place])
                    continue
                verdict = self._verdict(wave[place], reply)
                if left is not None:
                    left -= verdict.cost or 0.0
                most = max(most, reply.prompt_tokens)
                yield verdict
            due = again + due
            at_once = 1 if again else max(WAVE, 4 * self.endpoint.concurrency)

    def batch_verdicts(
        self, asked: Sequence[Asked], file: Path, answered: Iterable[tuple[Any, ...]] = (), budget: float | None = None
    ) -> Iterator[Verdict]:
        """Through OpenAI's Batch API: what earlier calls handed in and is done; then the rest is handed in.

        The ids of the batches under way are kept in `file`. A batch that was made when a kill came before it was
        written down is found again by its mark, so that nothing is paid twice.

        Args:
            asked: The questions without a verdict.
            file: Of the batches of all judges.
            answered: Keys of the questions that have one.
            budget: In USD.

        Raises:
            InputError: The server has no Batch API, or declines; a batch has replies to other questions than these; or
                the budget is less than all could cost.
        """
        self._check_budget(budget)
        batches = _Batches(self.endpoint, file, self.name)
        done = {_custom_id(key) for key in answered}
        due = {_custom_id(one.key(self.name)): one for one in asked}
        discount = self.price.batch if self.price else 1.0
        for batch in batches.ended():
            replies = dict(batches.replies(batch, self.preset.max_tokens))
            if others := len(replies.keys() - due.keys() - done):
                raise InputError(
                    f"{file}: {batch} has replies to {others} questions that are not asked now. Call with the "
                    "--sample, --repeat and --preset that it was handed in with."
                )
            for name, reply in replies.items():
                if (one := due.pop(name, None)) is not None:
                    verdict = self._verdict(one, reply)
                    yield verdict if verdict.cost is None else replace(verdict, cost=verdict.cost * discount)
            batches.forget(batch)
        if due and not batches.under_way:
            if budget is not None and self.price is not None:
                tokens = sum(estimated_tokens(one, self.images) for one in due.values())
                if (most := self.price.of(tokens, self.preset.max_tokens * len(due)) * discount) > budget:
                    raise InputError(
                        f"--budget: {len(due)} questions in a batch could cost {most:.2f} USD, and {budget:.2f} is "
                        "left. Raise it, or judge fewer (--sample)."
                    )
            model = self.endpoint.model
            batches.hand_in((name, {"model": model, **self.request(one)}) for name, one in due.items())
        if batches.under_way:
            print(f"{self.name}: {batches.state()}. Call again later, within a day.", file=sys.stderr)

    def _check_budget(self, budget: float | None) -> None:
        if budget is not None and self.price is None:
            raise InputError(
                f"--budget: no price of {self.name} is known. Write one into a file, in USD per million tokens: "
                f"`{self.name}: {{prompt: 2, reply: 8}}`. Pass it with --prices."
            )

    def _adapts(self, reason: str) -> bool:
        """Whether a refusal names something that can be left out, which then is."""
        if not re.match(r"HTTP (?:200 with error )?(?:400|404|415|422|501)", reason):
            return False
        if self._form and re.search(r"response_format|json_schema|structured|guided|grammar", reason):
            self._form = False
        elif self._limit == "max_tokens" and "max_completion_tokens" in reason:
            self._limit = "max_completion_tokens"
        elif self._temperature and "temperature" in reason:
            self._temperature = False
        else:
            return False
        return True

    def _verdict(self, asked: Asked, reply: Reply | Failure) -> Verdict:
        from stllava_eval.metrics import is_refusal
        from stllava_eval.server import Failure

        scores, why, outcome, text = None, None, "scored", None
        if isinstance(reply, Failure):
            outcome, why = ("refused" if reply.refused else "failed"), reply.reason
        else:
            text = reply.text
            scores = (read_scores_authors if self.preset.strict else read_scores)(text)
            if scores is None:
                outcome, why = ("refused", "a refusal") if is_refusal(text) else ("unparsable", "no two scores")
        tokens = (reply.prompt_tokens, reply.tokens)
        candidate = asked.candidate
        return Verdict(
            id=candidate.id,
            image=candidate.image,
            image_sha256=candidate.image_sha256,
            judge=self.name,
            shown=asked.shown,
            repetition=asked.repetition,
            outcome=outcome,
            scores=scores,
            reply=text,
            why=why,
            model=reply.model,
            date=now(),
            prompt_sha256=hashlib.sha256(prompt(*asked.texts(), self.preset.guarded).encode()).hexdigest(),
            tokens=tokens if any(tokens) else None,
            cost=None if self.price is None else self.price.of(*tokens),
        )


def _custom_id(key: tuple[Any, ...]) -> str:
    """Of a question in a batch, by what it asks."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]


BATCH_REQUESTS, BATCH_BYTES = 50_000, 150_000_000  # OpenAI's limits are 50,000 and 200 MB


class _Batches:
    """The batches of a judge that are under way, their ids in a file beside those of other judges."""

    def __init__(self, endpoint: Endpoint, file: Path, judge: str) -> None:
        self.endpoint, self.file, self.judge = endpoint, file, judge
        self._all: dict[str, list[str]] = {}
        if file.exists():
            try:
                found = read_json(file)["batches"]
                self._all = {str(name): list(map(str, ids)) for name, ids in found.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{file}: no list of batches ({error!r}). Delete it if none is under way.") from error
        self.ids = self._all.setdefault(judge, [])
        self._known: dict[str, dict[str, Any]] = {}

    @property
    def under_way(self) -> list[str]:
        return [one for one in self.ids if not self._ended(one)]

    def state(self) -> str:
        return ", ".join(f"batch {one} is {self._known.get(one, {}).get('status')}" for one in self.under_way)

    def ended(self) -> list[str]:
        for one in self.ids:
            self._known[one] = self._json(partial(_retrieve, one), one)
        return [one for one in self.ids if self._ended(one)]

    def replies(self, batch: str, max_tokens: int) -> Iterator[tuple[str, Reply | Failure]]:
        """(custom id, what came) of a batch that has ended. What is in neither of its files was not asked."""
        from stllava_eval.server import Failure

        for kind in ("output_file_id", "error_file_id"):
            if not (file := self._known[batch].get(kind)):
                continue
            text = self.endpoint.call(partial(_content, file), batch)
            for line in text.split("\n"):  # no other sign ends a line of JSON
                try:
                    row = json.loads(line)
                    name, response = str(row["custom_id"]), row.get("response") or {}
                    if response.get("status_code") == 200:
                        yield name, self.endpoint.read_reply(response["body"], max_tokens)
                    else:
                        said = row.get("error") or (response.get("body") or {}).get("error") or {}
                        reason = f"HTTP {response.get('status_code')}: {said.get('message')}"
                        yield name, Failure(self.endpoint.line(reason), 1)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # half a line; its question is asked again

    def hand_in(self, requests: Iterable[tuple[str, Request]]) -> None:
        lines: list[bytes] = []
        for name, request in requests:
            row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request}
            line = json.dumps(row).encode() + b"\n"
            if lines and (len(lines) == BATCH_REQUESTS or sum(map(len, lines)) + len(line) > BATCH_BYTES):
                self._hand_in(lines)
                lines = []
            lines.append(line)
        self._hand_in(lines)

    def forget(self, batch: str) -> None:
        self.ids.remove(batch)
        self._write()

    def _hand_in(self, lines: Sequence[bytes]) -> None:
        mark = hashlib.sha256(b"".join(lines)).hexdigest()
        listed = self._json(lambda client: client.batches.with_raw_response.list(limit=100), "list of batches")
        made = next(  # a kill may have come between making it and writing it down
            (
                one
                for one in listed.get("data") or ()
                if (one.get("metadata") or {}).get("stllava") == mark
                and one["id"] not in self.ids
                and one.get("status") not in GIVEN_UP
            ),
            None,
        )
        if made is None:
            body = b"".join(lines)
            file = self._json(
                lambda client: client.files.with_raw_response.create(file=("judge.jsonl", body), purpose="batch"),
                "file of requests",
            )
            made = self._json(
                lambda client: client.batches.with_raw_response.create(
                    input_file_id=file["id"],
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"stllava": mark},
                ),
                "new batch",
            )
        self._known[made["id"]] = made
        self.ids.append(made["id"])
        self._write()

    def _ended(self, batch: str) -> bool:
        return self._known.get(batch, {}).get("status") in ("completed", *GIVEN_UP)

    def _json(self, send: Callable[[Any], Any], what: str) -> dict[str, Any]:
        try:
            made = json.loads(self.endpoint.call(send, what))
            return dict(made)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.endpoint.base_url}: {what}: its reply is no object. Call again.") from error

    def _write(self) -> None:
        write_json(self.file, {"format": 1, "batches": self._all})


def _retrieve(batch: str, client: Any) -> Any:
    return client.batches.with_raw_response.retrieve(batch)


def _content(file: str, client: Any) -> Any:
    return client.files.with_raw_response.content(file)


GIVEN_UP = ("failed", "expired", "cancelled")  # states of a batch; what it has answered is in its files


def read_image(folder: Path, candidate: Candidate) -> bytes:
    """The image's file.

    Raises:
        InputError: It is not there, or see `images.read_image`.
    """
    file = folder / candidate.image
    try:
        return read_bytes(file, IMAGE_BYTES)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}). Put it back, or pass the images' folder with --images."
        ) from error


def estimated_tokens(asked: Asked, folder: Path) -> float:
    """Of the prompt with its image, about.

    Raises:
        InputError: The image is not there, or is none.
    """
    content = read_image(folder, asked.candidate)
    try:
        with opened(content) as header:
            of_image = image_tokens(*header.size)
    except InputError as error:
        raise InputError(f"{folder / asked.candidate.image}: {error}") from error
    return len(prompt(*asked.texts())) / CHARACTERS + of_image


def forecast(model: str, asked: Sequence[Asked], folder: Path, price: Price | None, max_tokens: int) -> str:
    """What it would come to, before anything is asked.

    Args:
        model: Its name.
        asked: All that would be.
        folder: Of the images.
        price: None leaves the cost out.
        max_tokens: Of a reply.
    """
    tokens = sum(estimated_tokens(one, folder) for one in asked)
    lines = [
        f"{model}: {len(asked):,} questions about {len({one.candidate.image for one in asked}):,} images",
        f"about {tokens:,.0f} tokens of prompts (images as GPT-4o counts them) and {REPLY_TOKENS * len(asked):,} of "
        f"replies, at {REPLY_TOKENS} each; at most {max_tokens * len(asked):,}",
    ]
    if price is None:
        lines.append("no price is known: pass one with --prices")
    else:
        about, most = (price.of(tokens, count * len(asked)) for count in (REPLY_TOKENS, max_tokens))
        lines.append(f"about {about:,.2f} USD, at most about {most:,.2f}; in a batch {about * price.batch:,.2f}")
    return "\n".join(lines)


IMAGES_KEPT = 64  # in memory, ready to be sent (our choice)
WAVE = 256  # questions, at least, until it is looked again at what they cost (our choice)


def now() -> str:
    """The time, UTC, in seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def judge(ledger: Ledger, asked: Sequence[Asked], verdicts: Iterable[Verdict], progress: bool = True) -> Counter[str]:
    """Put verdicts into the file as they come; how many have each outcome.

    Args:
        ledger: See `open_verdicts`.
        asked: What they answer, for the bar.
        verdicts: Each is on the disk before the next one is looked at.
        progress: Whether to show a bar on stderr.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    spent = 0.0
    hidden = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=len(asked), desc="judging", unit="verdict", disable=hidden, file=sys.stderr) as bar:
        for verdict in verdicts:
            ledger.add([row_of(verdict)])
            counts[verdict.outcome] += 1
            spent += verdict.cost or 0.0
            bar.set_postfix_str(f"{spent:.4f} USD" if spent else "", refresh=False)
            bar.update()
    return counts


def finish(ledger: Ledger, candidates: Sequence[Candidate], finished: bool = True) -> None:
    """Write the file anew, by judge and then in the order of the candidates; see `Ledger.finish`."""
    place = {candidate.id: number for number, candidate in enumerate(candidates)}
    order = sorted(ledger.rows, key=lambda key: (key[1], place.get(key[0], len(place)), sorted(key[2]), key[2], key[3]))
    ledger.finish(order, finished)


# --- exact knowledge --------------------------------------------------------------------------------------------------

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
    from stllava_eval.home import home
    from stllava_eval.images import pixel_hash
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
