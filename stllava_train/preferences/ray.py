"""Rows of a stage -> the same rows, made by many workers on many machines, with Ray Data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_train.preferences.candidates import CandidateSettings, rows_of
from stllava_train.preferences.verdicts import Verdict, verdict_of

if TYPE_CHECKING:
    from stllava_train.preferences.judges.prices import Price
    from stllava_train.preferences.judges.prompt import Comparison, Preset
    from stllava_train.resumable import Row

IMAGES, QUESTIONS = 64, 256  # of a batch: what a worker that dies has to do again (our choice)


def candidates_by_ray(
    images: Sequence[tuple[str, Path, str]], settings: CandidateSettings, workers: int, **answerer: Any
) -> Iterator[Mapping[str, Any]]:
    """As `candidates.rows_of`, each worker with a copy of the checkpoint, on a GPU of its own where there are some.

    Args:
        images: (name, file, pixel hash); every machine sees the files under these paths.
        settings: How questions and answers are drawn.
        workers: How many there are.
        answerer: Arguments of `Answerer`.

    Raises:
        InputError: Ray is not installed, or a worker cannot do its work.
    """
    items = [{"name": name, "file": str(file.resolve()), "sha256": sha256} for name, file, sha256 in images]
    yield from _mapped(items, _Candidates, (settings, answerer), workers, IMAGES, gpus=float(workers_have_gpus()))


def verdicts_by_ray(
    asked: Sequence[Comparison],
    preset: Preset,
    images: Path,
    price: Price | None,
    workers: int,
    endpoint: Mapping[str, Any],
    name: str,
    earlier: Mapping[tuple[Any, ...], Row],
) -> Iterator[Verdict]:
    """As `EndpointJudge.verdicts`. Requests at a time and requests a minute are those of all workers together.

    Args:
        asked: The questions.
        preset: How they are asked.
        images: Their folder, which every machine sees under this path.
        price: Of the model's tokens.
        workers: How many there are.
        endpoint: Arguments of `Endpoint`; the key is `$OPENAI_API_KEY` where the workers were started. It is not sent
            to them, because Ray writes what it sends into its logs.
        name: That verdicts bear.
        earlier: As in `EndpointJudge.verdicts`. Requests are not marked as under way: what a worker that dies has asked
            is not part of the cost.

    Raises:
        InputError: Ray is not installed, or a worker cannot do its work.
    """
    shared = dict(endpoint)
    shared["concurrency"] = max(1, shared["concurrency"] // workers)
    if shared.get("per_minute"):
        shared["per_minute"] /= workers
    items = [
        {
            "candidate": json.dumps(asdict(one.candidate)),
            "shown": list(one.shown),
            "repetition": one.repetition,
            "earlier": json.dumps(earlier.get(one.key(name))),
        }
        for one in asked
    ]
    arguments = (preset, str(images.resolve()), price, shared, name)
    for row in _mapped(items, _Judge, arguments, workers, QUESTIONS, gpus=0):
        yield verdict_of(dict(row))


class _Candidates:
    """A worker that draws candidates."""

    def __init__(self, settings: CandidateSettings, answerer: Mapping[str, Any]) -> None:
        import torch

        from stllava_eval.inference.open import open_answerer

        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # Ray counts a core for each worker
        self.settings, self.answerer = settings, open_answerer(**answerer)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        images = zip(*(map(str, batch[key]) for key in ("name", "file", "sha256")), strict=True)
        rows = rows_of(self.answerer, [(name, Path(file), sha256) for name, file, sha256 in images], self.settings)
        return {"row": [json.dumps(row) for row in rows]}


class _Judge:
    """A worker that asks a judge."""

    def __init__(
        self, preset: Preset, images: str, price: Price | None, endpoint: Mapping[str, Any], name: str
    ) -> None:
        from stllava_eval.inference.endpoint import Endpoint
        from stllava_train.preferences.judges.endpoint import EndpointJudge

        self.judge = EndpointJudge(Endpoint(**endpoint), preset, Path(images), price, name)
        self.ended: InputError | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        from stllava_train.preferences.judges.prompt import Comparison
        from stllava_train.preferences.rows import Candidate

        asked, earlier = [], {}
        columns = (batch[key] for key in ("candidate", "shown", "repetition", "earlier"))
        for candidate, shown, repetition, row in zip(*columns, strict=True):
            made = json.loads(str(candidate))
            made["answers"] = tuple(made["answers"])
            one = Comparison(Candidate(**made), (int(shown[0]), int(shown[1])), int(repetition))
            asked.append(one)
            if (before := json.loads(str(row))) is not None:
                earlier[one.key(self.judge.name)] = before
        if self.ended is not None:
            raise self.ended
        rows = []
        try:
            for verdict in self.judge.verdicts(asked, earlier=earlier):
                rows.append(json.dumps(asdict(verdict)))
        except InputError as error:
            if not rows:
                raise
            self.ended = error  # what came before it is paid, and handed on first
        return {"row": rows}


def _mapped(
    items: Sequence[Mapping[str, Any]],
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    workers: int,
    batch: int,
    gpus: float,
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows that workers make of the items, as they come."""
    ray = _import_ray()
    if not items:
        return
    _connect()
    # a block for each batch, so that no worker waits for another one's
    data = ray.data.from_items(list(items), override_num_blocks=max(1, -(-len(items) // batch)))
    made = data.map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=batch,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=min(workers, max(1, -(-len(items) // batch)))),
    )
    try:
        for row in made.iter_rows():
            yield json.loads(row["row"])
    except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
        raise InputError(f"--engine ray: {_first_cause(error)}") from error


def _connect() -> None:
    """Connect to the cluster of `$RAY_ADDRESS`, else to one on this machine alone."""
    import logging

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's makers
    import ray

    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def workers_have_gpus() -> bool:
    """Return whether the cluster has GPUs; then each worker gets one.

    Raises:
        InputError: Ray is not installed.
    """
    ray = _import_ray()
    _connect()
    return bool(ray.cluster_resources().get("GPU"))


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray: Ray is not installed. Run `pip install 'stllava-med[ray]'`.") from error
    return ray


def _first_cause(error: BaseException) -> str:
    """Return the one line of an `InputError` in a worker, or what else went wrong there."""
    text = str(error)
    messages = [line for line in text.splitlines() if "InputError: " in line]
    return messages[-1].split("InputError: ", 1)[1] if messages else " ".join(text.splitlines()[-1:])
