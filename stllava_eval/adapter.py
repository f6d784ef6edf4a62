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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger

from stllava_eval.answering import Answer, Answerer, Question, default_checkpoint, open_answerer
from stllava_eval.errors import InputError, printable
from stllava_eval.images import decode
from stllava_eval.metrics import is_failed_request
from stllava_eval.plugin import MODEL
from stllava_eval.runs import answered, data_hashes, dataset_of, refuse_old_folder, trained_on, write_run
from stllava_eval.server import Failure, ServerAnswerer
from stllava_eval.unfinished import Unfinished, question_key

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = ("own", "other", "black")
BACKENDS = ("transformers", "openai_server")
SERVER = ("base_url", "model", "concurrency", "retries", "timeout", "reasoning")
CHECKPOINT = (
    *("pretrained", "device", "dtype", "four_bit", "batch_tokens"),
    *("base", "vision_tower", "projector", "vision_lora", "prototypes", "iterations"),
)


@dataclass(frozen=True)
class _Asked:
    """A request, as processes can tell it to each other."""

    key: str
    task: str
    split: str
    doc_id: int
    text: str
    image_id: str
    max_new_tokens: int
    until: tuple[str, ...]
    ours: bool


@contextmanager
def ends_the_process() -> Iterator[None]:
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
        backend: `transformers`; `openai_server` asks a server at `base_url` for the model `model` and takes
            `concurrency`, `retries`, `timeout`, `reasoning` (see `server.ServerAnswerer`), and of the arguments above
            `images` only.

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
        with ends_the_process():
            if backend not in BACKENDS:
                raise InputError(f"--model_args backend={backend}: unknown. Pass one of {', '.join(BACKENDS)}.")
            named: dict[str, object] = {"pretrained": pretrained, "device": device, "dtype": dtype}
            named |= {"four_bit": four_bit or None, "batch_tokens": batch_tokens}
            takes = SERVER if backend == "openai_server" else CHECKPOINT
            if unknown := sorted({*parts, *(name for name in named if named[name] is not None)} - set(takes)):
                raise InputError(
                    f"--model_args {', '.join(unknown)}: unknown with backend={backend}. "
                    f"It takes images, {', '.join(takes)}."
                )
            if images not in IMAGES:
                raise InputError(f"--model_args images={images}: unknown. Pass one of {', '.join(IMAGES)}.")
            if not isinstance(four_bit, bool):
                raise InputError(f"--model_args four_bit={four_bit}: pass True or False.")
            self.images = images
            if batch_tokens is not None and (type(batch_tokens) is not int or batch_tokens < 1):
                raise InputError(f"--model_args batch_tokens={batch_tokens}: pass a whole number of tokens from 1 on.")
            self.rows = _rows(batch_size)
            self._rank = int(os.environ.get("RANK", 0))
            self._world_size = int(os.environ.get("WORLD_SIZE", 1))
            if self._rank == 0:
                refuse_old_folder()
            self.answerer: Answerer | ServerAnswerer
            if backend == "openai_server":
                if "base_url" not in parts:
                    raise InputError("--model_args backend=openai_server: needs base_url=http://HOST:PORT/v1 too.")
                if self.rows:
                    raise InputError(f"--batch_size {batch_size}: a server makes its own batches. Pass concurrency=N.")
                self.answerer = ServerAnswerer(**parts)
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
            self._answers: dict[tuple[str, int], Answer | Failure] = {}
            self._rows_of_images: dict[tuple[str, str], dict[str, int]] = {}
            self._cached = False
            self._answering = {"questions": 0, "seconds": 0.0}
            self._unfinished: Unfinished | None = None
            _key_the_cache(self)

    @property
    def device(self) -> Any:
        """Where the weights lie; lmms-eval gathers on it."""
        return self.answerer.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request; under a response cache, those that it does not hold."""
        with ends_the_process():
            answers = self._answered(requests)
            self._answers.update({_place(request): answer for request, answer in zip(requests, answers, strict=True)})
            results = [
                GenerationResult(f"[LMMS_EVAL_REQUEST_FAILED after {one.attempts} attempts] {one.reason}")
                if isinstance(one, Failure)
                else GenerationResult(one.text, TokenCounts(output_tokens=one.tokens))
                for one in answers
            ]
            if not self._cached:
                self.record(requests, results)
            return results

    def _answered(self, requests: Sequence[Instance]) -> list[Answer | Failure]:
        """The answers, those of a run of the same fingerprint that did not end among them.

        lmms-eval deals questions to processes one by one, which would let each of them encode nearly every image. So
        the processes tell each other what they were asked, and deal it out anew, whole images at a time.
        """
        self._unfinished = Unfinished(self.fingerprint(), self._rank)
        asked = [self._ask(request) for request in requests]
        everyones = self._gathered(({one.key: one for one in asked if one.ours}, self._unfinished.answers))
        answers = {key: answer for _, known in everyones for key, answer in known.items()}
        ours = {key: one for theirs, _ in everyones for key, one in theirs.items()}
        if done := len(ours.keys() & answers.keys()):
            logger.info("{} of {} questions were answered by a run that did not end", done, len(ours))
        open_ = [one for key, one in sorted(ours.items()) if key not in answers]
        mine = {key: self._question(ours[key]) for key in _dealt(open_, self._world_size)[self._rank]}
        mine |= {
            one.key: self._foreign_question(one, request)
            for one, request in zip(asked, requests, strict=True)
            if not one.ours
        }
        fresh = self._answer(mine, {key for key in mine if key in ours})
        outcomes: dict[str, Answer | Failure] = dict(answers)
        for of_process in self._gathered(fresh):
            outcomes |= of_process
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
        if failed and len(failed) == len(outcomes):
            raise InputError(f"none of {len(failed)} questions was answered: {failed[0].reason}")
        if failed and self._rank == 0:
            logger.warning("{} of {} questions have no answer: {}", len(failed), len(outcomes), failed[0].reason)
        return [outcomes[one.key] for one in asked]

    def _answer(self, questions: dict[str, Question], kept: set[str]) -> dict[str, Answer | Failure]:
        """Outcomes by key; answers to the keys in `kept` are written down about every second."""
        assert self._unfinished is not None
        keys, outcomes = list(questions), {}
        fresh: list[tuple[str, Answer]] = []
        begun = written = time.monotonic()
        try:
            for place, outcome in self.answerer.answer(list(questions.values()), progress=self._rank == 0):
                outcomes[keys[place]] = outcome
                if isinstance(outcome, Answer) and keys[place] in kept:
                    fresh.append((keys[place], outcome))
                if time.monotonic() - written >= 1:
                    self._unfinished.add(fresh)
                    fresh, written = [], time.monotonic()
        finally:  # Ctrl-C too
            self._unfinished.add(fresh)
        self._answering["questions"] += len(outcomes)
        self._answering["seconds"] += time.monotonic() - begun
        return outcomes

    def _gathered(self, value: Any) -> list[Any]:
        """What every process hands in here, in the order of ranks."""
        if self._world_size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _ask(self, request: Instance) -> _Asked:
        doc_id, task, split = request.args[-3:]
        settings = self._settings(request)
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0 or settings.get("num_beams", 1) > 1:
            raise InputError(f"{task}: stllava_med answers greedily; leave do_sample, temperature and num_beams alone.")
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        limit = int(settings.get("max_new_tokens", 1024))
        data = self.task_dict[task][split]
        ours = "image_id" in data.column_names  # another task's data is in no fingerprint, so its answers are not kept
        text, image_id = (request.args[0], data["image_id"][doc_id]) if ours else ("", "")
        key = question_key(task, split, doc_id, text, limit, until)
        return _Asked(key, task, split, doc_id, text, image_id, limit, until, ours)

    def _question(self, asked: _Asked) -> Question:
        """A question of one of our tasks; nothing is decoded before its image is due."""
        of, image_id = dataset_of(asked.task), asked.image_id
        if self.images == "other":
            image_id = self._another(asked)
        row = self._first_rows(asked.task, asked.split)[image_id]
        image: Callable[[], Image] = partial(self._decoded, asked.task, asked.split, row)
        if self.images == "black":
            of, image_id, image = "", "", _black
        return Question(asked.text, image, asked.max_new_tokens, asked.until, (of, asked.split, image_id))

    def _foreign_question(self, asked: _Asked, request: Instance) -> Question:
        """A question of a task that is not ours."""
        text, images = self._content(request, self.task_dict[asked.task][asked.split][asked.doc_id])
        if len(images) != 1 or self.images == "other":
            raise InputError(
                f"{asked.task} question {asked.doc_id}: {len(images)} images. stllava_med answers about one image."
            )
        image = _black if self.images == "black" else partial(_rgb, images[0])
        return Question(text, image, asked.max_new_tokens, asked.until)

    def _first_rows(self, task: str, split: str) -> dict[str, int]:
        """The first row of each image."""
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

    def _another(self, asked: _Asked) -> str:
        """The image half the data set further on: the same for every batch size and process count."""
        order = sorted(self._first_rows(asked.task, asked.split))
        if len(order) < 2:
            raise InputError(f"--model_args images=other: {asked.task} has one image, so no question has another one.")
        return order[(order.index(asked.image_id) + len(order) // 2) % len(order)]

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _content(self, request: Instance, doc: dict[str, Any]) -> tuple[str, list[Image]]:
        """Text and images of a chat request that is not one of ours."""
        parts = [part for message in request.args[1](doc) for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts), [part["url"] for part in parts if part["type"] == "image"]

    def record(self, requests: Sequence[Instance], responses: Sequence[Any]) -> None:
        """Write the run folder, on rank 0, from the requests and responses of all ranks. Every rank must call it."""
        rows = []
        for request, response in zip(requests, responses, strict=True):
            doc_id, task, split = request.args[-3:]
            data = self.task_dict[task][split]
            if "image_id" in data.column_names:
                doc = data.remove_columns("image")[doc_id]
                answer = self._answers.get(_place(request))
                rows.append(answered(task, doc, request.args[0], unwrap_generation_output(response)[0], answer))
        rows = [row for of_process in self._gathered(rows) for row in of_process]
        if self._rank == 0 and rows:
            folder = write_run(rows, self.manifest(), answering=self._answering)
            logger.info("run folder: {}", folder)
        self._gathered(None)  # until the run is written, every process keeps its answers
        if self._unfinished is not None:
            self._unfinished.done()

    def manifest(self) -> dict[str, Any]:
        """What decides the answers; two runs with equal `fingerprint` have equal answers (in fp32)."""
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
            **self.answerer.preprocessing,
        }

    def fingerprint(self) -> str:
        """Hash of weights, images and prompt, and of what is done with them: the identity of a cached answer."""
        deciding = {
            "checkpoint": self.answerer.sha256,
            "dtype": str(self.answerer.dtype),
            "images": self.images,
            "data": data_hashes(),
            **self.answerer.preprocessing,
        }
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: our tasks are answered in words."""
        with ends_the_process():
            raise InputError("stllava_med answers in words and has no loglikelihood; choose a generate_until task.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: our tasks have one round."""
        with ends_the_process():
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


def _place(request: Instance) -> tuple[str, int]:
    return request.args[-2], request.args[-3]


def _dealt(asked: Sequence[_Asked], processes: int) -> list[list[str]]:
    """The keys of the questions for each process: whole images, so that all processes have about as much to do.

    The dearest image goes to whom has least. An image costs its prefix, taken as 640 tokens (the network's 576 and the
    system's words), a question with its answer 32 (our choice).
    """
    by_image: dict[tuple[str, str, str], list[str]] = {}
    for one in asked:
        by_image.setdefault((dataset_of(one.task), one.split, one.image_id), []).append(one.key)
    dealt: list[list[str]] = [[] for _ in range(processes)]
    costs = [0] * processes
    for keys in sorted(by_image.values(), key=lambda keys: (-len(keys), keys[0])):
        process = costs.index(min(costs))
        dealt[process] += keys
        costs[process] += 640 + 32 * len(keys)
    return dealt


def _rows(given: int | str | None) -> int | None:
    """The questions at work at a time; lmms-eval hands over 1 if nothing was typed, and a string if something was."""
    if given is None or given == "auto" or (type(given) is int and given == 1):
        return None
    rows = int(given) if str(given).isdecimal() else 0
    if rows < 1:
        raise InputError(f"--batch_size {given}: not a batch size. Pass a whole number from 1 on, or auto.")
    return rows


def _rgb(image: Image) -> Image:
    return image.convert("RGB")


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
            model_args = f"{model_args}|{current.fingerprint()}"
        return create(cache_root, model=model, model_args=model_args, **others)

    def execute_and_record(self: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list[Any]:
        if not isinstance(lm, StllavaMed):
            return execute(self, lm, reqtype, requests)
        lm._cached = True
        try:
            responses = execute(self, lm, reqtype, requests)
        finally:
            lm._cached = False
        with ends_the_process():
            lm.record(requests, responses)
        return responses

    current = model

    def valid(response: Any, request_type: str) -> bool:
        return is_valid(response, request_type) and not is_failed_request(str(unwrap_generation_output(response)[0]))

    valid.original = is_valid  # type: ignore[attr-defined]
    create_keyed.original = create  # type: ignore[attr-defined]
    execute_and_record.original = execute  # type: ignore[attr-defined]
    ResponseCache._is_valid_response = staticmethod(valid)
    ResponseCache.create = create_keyed  # type: ignore[method-assign,assignment]
    ResponseCache.execute = execute_and_record  # type: ignore[method-assign]
