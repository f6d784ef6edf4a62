"""lmms-eval's requests <-> answering, and the run folder that remembers what was answered.

lmms-eval catches every exception, prints it and exits 0; a failure here must not look like success, so it ends the
process: 2 and one line for a wrong input, 1 and the traceback for a bug.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable
from stllava_eval.images import decode, read_image, rgb
from stllava_eval.inference.open import default_checkpoint, open_answerer
from stllava_eval.inference.replies import Failure
from stllava_eval.inference.types import Answer, Question, QuestionAnswerer
from stllava_eval.lmms.model_args import (
    ANSWERING,
    ASKING,
    check_arguments,
    check_values,
    open_server,
    refuse_fewshot,
    rows_at_work,
    take_prompt_arguments,
    take_sampling,
    take_whole_number,
)
from stllava_eval.lmms.plugin import MODEL
from stllava_eval.lmms.resume import SavedAnswers, question_key
from stllava_eval.runs.folder import answer_row, data_hashes, refuse_old_folder, trained_on, write_run
from stllava_eval.runs.scores import DECIDING, FIXED_FIELDS, dataset_of
from stllava_eval.scoring.final_answer import (
    FINAL,
    SIGNATURES,
    check_rule,
    final_answers,
    is_failed_request,
    opens_thought,
    pack_replies,
    unpack_final_answers,
    unpack_replies,
    with_opened_thoughts,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _AskedQuestion:
    """A question of a request, in a form that processes can exchange."""

    key: str
    task: str
    split: str
    doc_id: int
    text: str
    image_id: str
    max_new_tokens: int
    until: tuple[str, ...]
    ours: bool
    draw: int = 0


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an exception into an exit code that lmms-eval cannot swallow."""
    try:
        yield
    except InputError as error:
        print(printable(f"stllava_med: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


class StllavaMed(lmms):
    """The model `stllava_med` of lmms-eval, for chat tasks.

    Args (`--model_args name=value,...`):
        pretrained: Folder or hub id (default: see `answering.default_checkpoint`).
        dtype: float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).
        images: `own`; `other` shows each question the image of another one, `black` a black square. A model that
            reads its images loses most of its score with either.
        base, vision_tower, projector, vision_lora, prototypes, iterations: What `pretrained` does not hold or name
            itself; see `network.checkpoint.open_checkpoint`.
        four_bit: True holds the language model in 4 bits (needs bitsandbytes and a folder of our own layout).
        batch_tokens: Tokens whose keys and values are held at a time (default: what the free memory holds).
        extract: The rule that takes the final answer out of a reply: `final`, or `none` for the raw reply, as the
            papers' scripts score it (see `extract.final_answer`).
        max_new_tokens: Of every reply, thought included (default: what the task says).
        system: A system prompt before every question, or `@FILE` that holds it.
        enable_thinking: True or False for a chat template that knows the switch.
        min_pixels, max_pixels: Of an image, as the model's processor, or what is sent to a server, is to have it.
        temperature, top_p, top_k, seed: How replies are sampled (default: the likeliest token, always).
        draws: How many replies to sample for each question, at most 1,000; its score is their mean.
        backend: `transformers`; `openai_server` asks a server at `base_url` for the model `model` and takes
            `concurrency`, `retries`, `timeout`, `reasoning` (see `server.ServerAnswerer`), and of the arguments above
            `images` and those from `extract` on.

    `--batch_size N` keeps at most N questions at work at a time; untyped or `auto`, the memory and the engine decide.
    From Python, 1 is the same as untyped; pass "1".
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        images: str = "own",
        four_bit: bool = False,
        batch_tokens: int | None = None,
        backend: str = "transformers",
        **parts: Any,
    ) -> None:
        super().__init__()
        with exit_on_error():
            refuse_fewshot(sys.argv)
            named: dict[str, object] = {"pretrained": pretrained, "device": device, "dtype": dtype}
            named |= {"four_bit": four_bit or None, "batch_tokens": batch_tokens}
            check_arguments(backend, {*parts, *(name for name in named if named[name] is not None)})
            check_values(images, four_bit, batch_tokens)
            asking = {name: parts.pop(name) for name in ASKING if name in parts}
            self.rule = check_rule(asking.pop("extract", FINAL), "--model_args extract")
            self.limit: int | None = take_whole_number(asking, "max_new_tokens", 1)
            self.sampling, self.draws = take_sampling(asking)
            parts |= take_prompt_arguments(asking)
            self.images = images
            self.rows = rows_at_work(batch_size)
            self._rank = int(os.environ.get("RANK", 0))
            self._world_size = int(os.environ.get("WORLD_SIZE", 1))
            if self._rank == 0:
                refuse_old_folder()
            self.answerer: QuestionAnswerer
            if backend == "openai_server":
                self.answerer = open_server(parts, self.rows, batch_size)
            else:
                self.answerer = open_answerer(
                    str(pretrained or default_checkpoint()),
                    device=device,
                    dtype=dtype,
                    four_bit=four_bit,
                    rows=self.rows,
                    batch_tokens=batch_tokens,
                    **parts,
                )
            self._answers: dict[tuple[str, int], list[Answer | Failure]] = {}
            self._rows_by_split: dict[tuple[str, str], tuple[Any, list[dict[str, Any]] | None]] = {}
            self._rows_of_images: dict[tuple[str, str], dict[str, int]] = {}
            self._cached = False
            self._answering = {"questions": 0, "seconds": 0.0}
            self._saved: SavedAnswers | None = None
            _key_the_cache(self)

    @property
    def device(self) -> Any:
        """Return the device of the weights; lmms-eval gathers results on it."""
        return self.answerer.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request; under a response cache, those that it does not hold."""
        with exit_on_error():
            replies = self._answered(requests)
            self._answers.update({_question_index(request): of for request, of in zip(requests, replies, strict=True)})
            results = [self._result(request, of) for request, of in zip(requests, replies, strict=True)]
            if not self._cached:
                self.record(requests, results)
            return results

    def _result(self, request: Instance, replies: Sequence[Answer | Failure]) -> GenerationResult:
        """Return the replies to a request as the one text that lmms-eval passes on; sealed only if needed."""
        texts = [
            f"[LMMS_EVAL_REQUEST_FAILED after {reply.attempts} attempts] {reply.reason}"
            if isinstance(reply, Failure)
            else reply.text
            for reply in replies
        ]
        passed_on = texts[0]
        doc_id, task, split = request.args[-3:]
        if rows := self._rows_of(task, split):
            question = rows[doc_id]["question"]
            if unpack_final_answers(passed_on, question) != final_answers(texts, request.args[0], self.rule):
                passed_on = pack_replies(texts, request.args[0], self.rule)
        tokens = [reply.tokens for reply in replies if isinstance(reply, Answer)]
        return GenerationResult(passed_on, TokenCounts(output_tokens=sum(tokens)) if tokens else None)

    def _answered(self, requests: Sequence[Instance]) -> list[list[Answer | Failure]]:
        """Return the replies to each request, including those that an unfinished run of this fingerprint has saved.

        lmms-eval distributes questions over processes one by one, so that each process would encode nearly every
        image. So the processes exchange what they were asked, and we reassign whole images (`_keys_by_process`).
        """
        self._saved = SavedAnswers(self.fingerprint(), self._rank)
        asked_by_request = [self._ask(request) for request in requests]
        asked_here = {question.key: question for of_request in asked_by_request for question in of_request}
        kept_here = {key: question for key, question in asked_here.items() if question.ours}
        exchanged = self._gathered((kept_here, self._saved.answers))
        answers = {key: answer for _, saved in exchanged for key, answer in saved.items()}
        kept = {key: question for questions, _ in exchanged for key, question in questions.items()}
        if done := len(kept.keys() & answers.keys()):
            logger.info("{} of {} questions were answered by a run that did not end", done, len(kept))
        unanswered = [question for key, question in sorted(kept.items()) if key not in answers]
        mine = {key: self._question(kept[key]) for key in _keys_by_process(unanswered, self._world_size)[self._rank]}
        for questions, request in zip(asked_by_request, requests, strict=True):
            mine |= {
                question.key: self._foreign_question(question, request) for question in questions if not question.ours
            }
        fresh = self._answer(mine, {key for key in mine if key in kept})
        outcomes: dict[str, Answer | Failure] = dict(answers)
        for of_process in self._gathered(fresh):
            outcomes |= of_process
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
        if failed and len(failed) == len(outcomes):
            asked = self.answerer.preprocessing.get("base_url", self.answerer.name)
            raise InputError(
                f"{asked}: none of {len(failed)} questions was answered: {failed[0].reason.rstrip('.')}. "
                "When that is put right, the same command asks again."
            )
        if failed and self._rank == 0:
            logger.warning("{} of {} questions have no answer: {}", len(failed), len(outcomes), failed[0].reason)
        outcomes |= self._with_opened_thoughts({key: outcomes[key] for key in sorted(kept.keys() & outcomes.keys())})
        return [[outcomes[question.key] for question in questions] for questions in asked_by_request]

    def _with_opened_thoughts(self, outcomes: dict[str, Answer | Failure]) -> dict[str, Answer | Failure]:
        """Return the replies, preceded by the thought mark if the chat template wrote one.

        A local model's prompt shows it; behind a server, the replies do.
        """
        replies = {key: reply for key, reply in outcomes.items() if isinstance(reply, Answer)}
        if mark := opens_thought(self.answerer.preprocessing["prompt"]):
            return {key: replace(reply, text=f"{mark}{reply.text}") for key, reply in replies.items()}
        assert self._saved is not None
        written = [reply.text for reply in replies.values()]
        # under --use_cache, the few replies that are missing may all be cut, and show nothing by themselves
        texts = with_opened_thoughts(written, [reply.ended for reply in replies.values()], self._saved.opening)
        changed = [text[: -len(before)] for text, before in zip(texts, written, strict=True) if text != before]
        if self._rank == 0 and changed:
            self._saved.remember_opening(changed[0].rstrip())
        return {key: replace(reply, text=text) for (key, reply), text in zip(replies.items(), texts, strict=True)}

    def _answer(self, questions: dict[str, Question], kept: set[str]) -> dict[str, Answer | Failure]:
        """Return the outcomes by key; answers to the keys in `kept` are saved about every second."""
        assert self._saved is not None
        keys, outcomes = list(questions), {}
        fresh: list[tuple[str, Answer]] = []
        begun = written = time.monotonic()
        try:
            for index, outcome in self.answerer.answer(list(questions.values()), progress=self._rank == 0):
                outcomes[keys[index]] = outcome
                if isinstance(outcome, Answer) and keys[index] in kept:
                    fresh.append((keys[index], outcome))
                if time.monotonic() - written >= 1:
                    self._saved.add(fresh)
                    fresh, written = [], time.monotonic()
        finally:  # Ctrl-C too
            self._saved.add(fresh)
        self._answering["questions"] += len(outcomes)
        self._answering["seconds"] += time.monotonic() - begun
        return outcomes

    def _gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of ranks."""
        if self._world_size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _rows_of(self, task: str, split: str) -> list[dict[str, Any]] | None:
        """Return the rows of one of our prepared splits without their images; None of another task.

        They are read once: datasets takes a millisecond for a row, and copies all features for a list of columns.
        """
        data = self.task_dict[task][split]
        known = self._rows_by_split.get((task, split))
        if known is None or known[0] is not data:
            ours = dataset_of(task) in DATASETS and set(FIXED_FIELDS) <= set(data.column_names)
            known = data, list(data.remove_columns("image")) if ours else None
            self._rows_by_split[task, split] = known
        return known[1]

    def _ask(self, request: Instance) -> list[_AskedQuestion]:
        """Return the questions of a request: one for each reply that is sampled."""
        doc_id, task, split = request.args[-3:]
        settings = self._settings(request)
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0 or settings.get("num_beams", 1) > 1:
            raise InputError(
                f"{task}: stllava_med answers greedily; leave do_sample, temperature and num_beams alone, or sample by "
                "--model_args temperature=...,draws=..."
            )
        limit, until = self._limits(request)
        rows = self._rows_of(task, split)
        ours = rows is not None  # another task's data is in no fingerprint, so its answers are not kept
        if not ours and self.draws > 1:
            raise InputError(f"{task}: draws={self.draws} is for the tasks of stllava-med. Leave it out.")
        if ours and (request.repeats or 1) > 1:
            raise InputError(
                f"{task}: repeats are not read. Pass --model_args temperature=...,draws={request.repeats}."
            )
        text, image_id = ("", "") if rows is None else (request.args[0], rows[doc_id]["image_id"])
        key = question_key(task, split, doc_id, text, limit, until)
        return [
            _AskedQuestion(
                f"{key}/{draw}" if draw else key, task, split, doc_id, text, image_id, limit, until, ours, draw
            )
            for draw in range(self.draws)
        ]

    def _limits(self, request: Instance) -> tuple[int, tuple[str, ...]]:
        """Return the limit of new tokens of a reply, and the texts before which it ends.

        Raises:
            InputError: The task, or `--gen_kwargs`, gives something else.
        """
        settings = self._settings(request)
        until = settings.get("until") or ()
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
            raise InputError(f"{request.args[-2]}: generation_kwargs until={until!r}: pass a text or a list of texts.")
        limit = settings.get("max_new_tokens", 1024) if self.limit is None else self.limit
        if isinstance(limit, float) and limit.is_integer():  # lmms-eval reads 1e3 and -5 so
            limit = int(limit)
        if type(limit) is not int or limit < 1:
            raise InputError(
                f"{request.args[-2]}: generation_kwargs max_new_tokens={limit}: pass a whole number from 1 on."
            )
        return limit, tuple(until)

    def _question(self, asked: _AskedQuestion) -> Question:
        """Return a question of one of our tasks; its image is decoded when the engine needs it."""
        of, image_id = dataset_of(asked.task), asked.image_id
        if self.images == "other":
            image_id = self._another(asked)
        row = self._first_rows(asked.task, asked.split)[image_id]
        image: Callable[[], Image] = partial(self._decoded, asked.task, asked.split, row)
        if self.images == "black":
            of, image_id, image = "", "", _black
        key = (of, asked.split, image_id)
        return Question(
            asked.text, image, asked.max_new_tokens, asked.until, key, sampling=self.sampling, sample_index=asked.draw
        )

    def _foreign_question(self, asked: _AskedQuestion, request: Instance) -> Question:
        """Return a question of a task that is not ours."""
        text, images = self._content(request, self.task_dict[asked.task][asked.split][asked.doc_id])
        if len(images) != 1 or self.images == "other":
            raise InputError(
                f"{asked.task} question {asked.doc_id}: {len(images)} images. stllava_med answers about one image."
            )
        image = _black if self.images == "black" else partial(_upright, images[0])
        return Question(text, image, asked.max_new_tokens, asked.until, sampling=self.sampling)

    def _first_rows(self, task: str, split: str) -> dict[str, int]:
        """Return the first row of each image, by image id."""
        if (task, split) not in self._rows_of_images:
            rows = enumerate(self.task_dict[task][split]["image_id"])
            self._rows_of_images[task, split] = {name: row for row, name in reversed(list(rows))}
        return self._rows_of_images[task, split]

    def _decoded(self, task: str, split: str, row: int) -> Image:
        doc = self.task_dict[task][split][row]
        try:
            return decode(doc["image"]["bytes"])
        except InputError as error:
            raise InputError(f"{task} {split}, image {doc['image_id']}: {error}") from error

    def _another(self, asked: _AskedQuestion) -> str:
        """Return the image half the data set further on: the same for every batch size and number of processes."""
        order = sorted(self._first_rows(asked.task, asked.split))
        if len(order) < 2:
            raise InputError(f"--model_args images=other: {asked.task} has one image, so no question has another one.")
        return order[(order.index(asked.image_id) + len(order) // 2) % len(order)]

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _content(self, request: Instance, doc: dict[str, Any]) -> tuple[str, list[Image]]:
        """Return the text and the images of a chat request of a task that is not ours."""
        parts = [part for message in request.args[1](doc) for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts), [part["url"] for part in parts if part["type"] == "image"]

    def record(self, requests: Sequence[Instance], responses: Sequence[Any]) -> None:
        """Write the run folder, on rank 0, from the requests and responses of all ranks. Every rank must call it."""
        rows = []
        limits: dict[str, set[tuple[int, tuple[str, ...]]]] = {}
        for request, response in zip(requests, responses, strict=True):
            doc_id, task, split = request.args[-3:]
            docs = self._rows_of(task, split)
            if docs is None:
                continue
            doc = docs[doc_id]
            text = unwrap_generation_output(response)[0]
            known = dict(enumerate(self._answers.get(_question_index(request), ())))
            limits.setdefault(task, set()).add(self._limits(request))
            rows += [
                answer_row(task, doc, request.args[0], final, known.get(draw), SIGNATURES[self.rule], draw)
                for draw, final in enumerate(unpack_final_answers(text, doc["question"]))
            ]
        everyones = self._gathered((rows, limits))
        rows = [row for of_process, _ in everyones for row in of_process]
        asked_with = {
            task: {
                "max_new_tokens": max(limit for limit, _ in of),
                "until": sorted({stop for _, stops in of for stop in stops}),
            }
            for _, of_process in everyones
            for task, of in of_process.items()
        }
        if self._rank == 0 and rows:
            folder = write_run(rows, self.manifest(), answering=self._answering, asked_with=asked_with)
            logger.info("run folder: {}", folder)
        self._gathered(None)  # until the run is written, every process keeps its answers
        if self._saved is not None:
            self._saved.done()

    def manifest(self) -> dict[str, Any]:
        """Return what decides the answers; two runs with equal `fingerprint` have equal answers (in fp32)."""
        return {
            "model": MODEL,
            "checkpoint": {
                "name": self.answerer.name,
                "sha256": self.answerer.sha256,
                "trained_on": trained_on(self.answerer.name),
            },
            "device": str(self.answerer.device),
            "dtype": str(self.answerer.dtype).removeprefix("torch."),
            "batch_size": self.rows or "auto",
            "processes": self._world_size,
            "images": self.images,
            **{
                name: None for name in DECIDING if name in ASKING and name not in ("extract", "max_new_tokens", "draws")
            },
            **self._preprocessing(),
        }

    def _preprocessing(self) -> dict[str, Any]:
        """Return how questions and images are processed, and how replies are decoded."""
        done = dict(self.answerer.preprocessing)
        if sampling := self.sampling:
            done["decoding"] = (
                f"sampled: temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, "
                f"seed {sampling.seed}"
            )
        return done

    def fingerprint(self) -> str:
        """Return a hash of the weights, images, prompt and their processing: the identity of a cached answer."""
        deciding = {
            "answering": ANSWERING,
            "checkpoint": self.answerer.sha256,
            "dtype": str(self.answerer.dtype),
            "images": self.images,
            "data": data_hashes(),
            **({} if self.limit is None else {"max_new_tokens": self.limit}),
            **self._preprocessing(),
        }
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise InputError, because our tasks are answered in words."""
        with exit_on_error():
            raise InputError("stllava_med answers in words and has no loglikelihood; choose a generate_until task.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise InputError, because our tasks have one round."""
        with exit_on_error():
            raise InputError("stllava_med answers one round; choose a generate_until task.")

    def clean(self) -> None:
        """Keep the weights: lmms-eval would delete them, and the same object could not answer again."""


class StllavaMedSimple(StllavaMed):
    """The model `stllava_med` for simple tasks (`--force_simple`)."""

    is_simple = True

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _content(self, request: Instance, doc: dict[str, Any]) -> tuple[str, list[Image]]:
        return request.args[0], request.args[2](doc)


def _question_index(request: Instance) -> tuple[str, int]:
    return request.args[-2], request.args[-3]


def _keys_by_process(asked: Sequence[_AskedQuestion], processes: int) -> list[list[str]]:
    """Return the keys of the questions for each process: whole images, such that the processes have similar loads.

    The most expensive image goes to the process with the least load. An image costs its prefix, taken as 640 tokens
    (576 of the image and those of the system prompt), and a question with its answer 32 (our choice).
    """
    by_image: dict[tuple[str, str, str], list[str]] = {}
    for question in asked:
        by_image.setdefault((dataset_of(question.task), question.split, question.image_id), []).append(question.key)
    dealt: list[list[str]] = [[] for _ in range(processes)]
    costs = [0] * processes
    for keys in sorted(by_image.values(), key=lambda keys: (-len(keys), keys[0])):
        process = costs.index(min(costs))
        dealt[process] += keys
        costs[process] += 640 + 32 * len(keys)
    return dealt


def _upright(image: Any) -> Image:
    """Return an image of another task, opened as ours are."""
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, str | Path):
        try:
            return decode(read_image(Path(image)))
        except OSError as error:
            raise InputError(f"{image}: cannot be read ({error.strerror}). Pass an image file.") from error
    return rgb(image)


def _black() -> Image:
    import PIL.Image

    return PIL.Image.new("RGB", (64, 64))  # CLIP resizes it; every side gives the same pixels


def _key_the_cache(model: StllavaMed) -> None:
    """Put `model`'s fingerprint into the keys of lmms-eval's `--use_cache`, and let the run folder hold its hits too.

    lmms-eval's own key knows neither weights nor images: a retrained checkpoint at the same path would be served the
    old answers; and it would serve a request that failed for good. Only calls made for our model are changed.
    """
    from lmms_eval.caching.response_cache import ResponseCache

    create = getattr(ResponseCache.create, "original", ResponseCache.create)
    is_valid = getattr(ResponseCache._is_valid_response, "original", ResponseCache._is_valid_response)
    execute = getattr(ResponseCache.execute, "original", ResponseCache.execute)

    def create_keyed(cache_root: str, *, model: Any = "", model_args: Any = "", **others: Any) -> ResponseCache:
        if model == MODEL or isinstance(model, StllavaMed):
            model_args = f"{model_args}|{current.fingerprint()}|{SIGNATURES[current.rule]}|{current.draws}"
        return create(cache_root, model=model, model_args=model_args, **others)

    def execute_and_record(self: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list[Any]:
        if not isinstance(lm, StllavaMed):
            return execute(self, lm, reqtype, requests)
        lm._cached = True
        try:
            responses = execute(self, lm, reqtype, requests)
        finally:
            lm._cached = False
        with exit_on_error():
            lm.record(requests, responses)
        return responses

    current = model

    def valid(response: Any, request_type: str) -> bool:
        replies = unpack_replies(str(unwrap_generation_output(response)[0]))
        return is_valid(response, request_type) and not any(map(is_failed_request, replies))

    valid.original = is_valid  # type: ignore[attr-defined]
    create_keyed.original = create  # type: ignore[attr-defined]
    execute_and_record.original = execute  # type: ignore[attr-defined]
    ResponseCache._is_valid_response = staticmethod(valid)
    ResponseCache.create = create_keyed  # type: ignore[method-assign,assignment]
    ResponseCache.execute = execute_and_record  # type: ignore[method-assign]
