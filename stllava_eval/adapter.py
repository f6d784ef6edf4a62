"""lmms-eval's requests <-> answering, and the run folder that remembers what was answered.

lmms-eval catches every exception, prints it and exits 0; a failure here must not look like success, so it ends the
process: 2 and one line for a wrong input, 1 and the traceback for a bug.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger

from stllava_eval.answering import Answer, Answerer, Question, default_checkpoint
from stllava_eval.errors import InputError, printable
from stllava_eval.images import decode
from stllava_eval.plugin import MODEL
from stllava_eval.runs import answered, data_hashes, refuse_old_folder, write_run
from stllava_eval.unfinished import Unfinished, question_key

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = ("own", "other", "black")
PARTS = ("base", "vision_tower", "projector", "vision_lora", "prototypes", "iterations")


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
        **parts: Any,
    ) -> None:
        super().__init__()
        with ends_the_process():
            if unknown := sorted(set(parts) - set(PARTS)):
                raise InputError(
                    f"--model_args {', '.join(unknown)}: unknown. "
                    f"It takes pretrained, device, dtype, images, four_bit, {', '.join(PARTS)}."
                )
            if images not in IMAGES:
                raise InputError(f"--model_args images={images}: unknown. Pass one of {', '.join(IMAGES)}.")
            if not isinstance(four_bit, bool):
                raise InputError(f"--model_args four_bit={four_bit}: pass True or False.")
            self.images = images
            self.batch_size = _batch_size(batch_size)
            self._rank = int(os.environ.get("RANK", 0))
            self._world_size = int(os.environ.get("WORLD_SIZE", 1))
            if self._rank == 0:
                refuse_old_folder()
            self.answerer = Answerer(str(pretrained or default_checkpoint()), device, dtype, four_bit, **parts)
            self._answers: dict[tuple[str, int], Answer] = {}
            self._first_rows: dict[tuple[str, str], dict[str, int]] = {}
            self._cached = False
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
            results = [GenerationResult(answer.text, TokenCounts(output_tokens=answer.tokens)) for answer in answers]
            if not self._cached:
                self.record(requests, results)
            return results

    def _answered(self, requests: Sequence[Instance]) -> list[Answer]:
        """The answers, those of a run of the same fingerprint that did not end among them."""
        questions = [self._question(request) for request in requests]
        self._unfinished = Unfinished(self.fingerprint(), self._rank)
        keys = [self._key(request, question) for request, question in zip(requests, questions, strict=True)]
        answers = [self._unfinished.answers.get(key) for key in keys]
        rest = [place for place, answer in enumerate(answers) if answer is None]
        if len(rest) < len(answers):
            logger.info(
                "{} of {} questions were answered by a run that did not end", len(answers) - len(rest), len(answers)
            )
        asked = [questions[place] for place in rest]
        fresh: list[tuple[str, Answer]] = []
        try:
            for place, answer in zip(
                rest, self.answerer.answer(asked, self.batch_size, progress=self._rank == 0), strict=True
            ):
                answers[place] = answer
                if keys[place]:
                    fresh.append((keys[place], answer))
                if len(fresh) >= self.batch_size:
                    self._unfinished.add(fresh)
                    fresh = []
        finally:  # Ctrl-C too
            self._unfinished.add(fresh)
        return [answer for answer in answers if answer is not None]

    def _key(self, request: Instance, question: Question) -> str:
        """Empty for a task that is not ours: no fingerprint knows its data."""
        doc_id, task, split = request.args[-3:]
        ours = "image_id" in self.task_dict[task][split].column_names
        return question_key(task, split, doc_id, question) if ours else ""

    def _question(self, request: Instance) -> Question:
        doc_id, task, split = request.args[-3:]
        doc = self.task_dict[task][split][doc_id]
        settings = self._settings(request)
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0 or settings.get("num_beams", 1) > 1:
            raise InputError(f"{task}: stllava_med answers greedily; leave do_sample, temperature and num_beams alone.")
        if "image_id" in doc:  # one of ours: nothing is decoded before its batch is due
            text = request.args[0]
            image: Callable[[], Image] = partial(decode, doc["image"]["bytes"])
            if self.images == "other":
                image = partial(decode, self._image_of_another(task, split, doc["image_id"]))
        else:
            text, images = self._content(request, doc)
            if len(images) != 1 or self.images == "other":
                raise InputError(
                    f"{task} question {doc_id}: {len(images)} images. stllava_med answers about one image."
                )
            image = partial(_rgb, images[0])
        if self.images == "black":
            image = _black
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        return Question(text, image, int(settings.get("max_new_tokens", 1024)), until)

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _content(self, request: Instance, doc: dict[str, Any]) -> tuple[str, list[Image]]:
        """Text and images of a chat request that is not one of ours."""
        parts = [part for message in request.args[1](doc) for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts), [part["url"] for part in parts if part["type"] == "image"]

    def _image_of_another(self, task: str, split: str, image_id: str) -> bytes:
        """The image half the data set further on: the same for every batch size and process count."""
        if (task, split) not in self._first_rows:
            rows = enumerate(self.task_dict[task][split]["image_id"])
            self._first_rows[task, split] = {name: row for row, name in reversed(list(rows))}
        first_rows = self._first_rows[task, split]
        order = sorted(first_rows)
        if len(order) < 2:
            raise InputError(f"--model_args images=other: {task} has one image, so no question has another one.")
        other = order[(order.index(image_id) + len(order) // 2) % len(order)]
        return self.task_dict[task][split][first_rows[other]]["image"]["bytes"]

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
        if self._world_size > 1:
            import torch.distributed

            gathered: list[Any] = [None] * self._world_size
            torch.distributed.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        if self._rank == 0 and rows:
            folder = write_run(rows, self.manifest())
            logger.info("run folder: {}", folder)
        if self._world_size > 1:
            torch.distributed.barrier()  # until the run is written, every process keeps its answers
        if self._unfinished is not None:
            self._unfinished.done()

    def manifest(self) -> dict[str, Any]:
        """What decides the answers; two runs with equal `fingerprint` have equal answers (in fp32)."""
        return {
            "model": MODEL,
            "checkpoint": {"name": self.answerer.name, "sha256": self.answerer.sha256},
            "device": str(self.answerer.device),
            "dtype": str(self.answerer.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
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


def _batch_size(given: int | str) -> int:
    """lmms-eval hands over an int by default and a string when typed; `auto` is 16 here (our choice)."""
    if str(given).startswith("auto"):
        return 16
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise InputError(f"--batch_size {given}: not a batch size. Pass a whole number from 1 on, or auto.")
    return size


def _rgb(image: Image) -> Image:
    return image.convert("RGB")


def _black() -> Image:
    import PIL.Image

    return PIL.Image.new("RGB", (64, 64))  # CLIP resizes it; every side gives the same pixels


def _key_the_cache(model: StllavaMed) -> None:
    """Put `model`'s fingerprint into the keys of lmms-eval's `--use_cache`, and let the run folder hold its hits too.

    lmms-eval's own key knows neither weights nor images: a retrained checkpoint at the same path would be served the
    old answers. Only calls made for our model are changed.
    """
    from lmms_eval.caching.response_cache import ResponseCache

    create = getattr(ResponseCache.create, "original", ResponseCache.create)
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
    create_keyed.original = create  # type: ignore[attr-defined]
    execute_and_record.original = execute  # type: ignore[attr-defined]
    ResponseCache.create = create_keyed  # type: ignore[method-assign,assignment]
    ResponseCache.execute = execute_and_record  # type: ignore[method-assign]
