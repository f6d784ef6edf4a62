"""lmms-eval's command line -> the same, and a JSON file that says what its model spent on answering.

`python benchmarks/timed_lmms_eval.py FILE [lmms-eval's arguments]` runs `lmms_eval` in this process. Around the model's
`generate_until` it reads the process's CPU clock; before and after it measures what the necessary work costs here and
now: one image through vision tower and projector, one prefix of 611 tokens through the language model. FILE holds
these seconds, the answers, and the prompts that the model was given. `--model plain` is transformers' own `generate`
(class `Plain` below), left padded, in batches of `--batch_size` sorted by length.
"""

from __future__ import annotations

import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from figures import status
from lmms_eval import models
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

PREFIX = 611  # tokens before the question in the real prompt: <s>, 34 of the system's text, 576 of the image
REPEATS = 2  # before and after, beside a first one that warms up


class Plain(lmms):
    """What one writes with transformers alone: LLaVA's own class, our processor, `generate` on padded batches."""

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, dtype: str = "float32", **_: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from stllava_eval.network.checkpoint import open_checkpoint
        from stllava_eval.network.pretrained import is_generic

        super().__init__()
        self.batch_size, self.dtype = int(batch_size), getattr(torch, dtype)
        # of LLaVA our own, whose pixels are PIL's
        own = (
            AutoProcessor.from_pretrained if is_generic(pretrained) else lambda name: open_checkpoint(name).processor()
        )
        self.processor: Any = own(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=self.dtype).eval()
        self.prompts: list[list[int]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        texts = [self.prompt(request.args[0]) for request in requests]
        lengths = [len(self.processor.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        order = sorted(range(len(requests)), key=lengths.__getitem__)
        results: dict[int, GenerationResult] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            answers = self.answer([requests[place] for place in places], [texts[place] for place in places])
            results |= dict(zip(places, answers, strict=True))
        return [results[place] for place in range(len(requests))]

    def prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(self, requests: Sequence[Instance], texts: list[str]) -> list[GenerationResult]:
        from stllava_eval.images import decode

        images = []
        for request in requests:
            *_, doc_id, task, split = request.args
            images.append(decode(self.task_dict[task][split][doc_id]["image"]["bytes"]))
        inputs = self.processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
        self.prompts += [ids[seen.bool()].tolist() for ids, seen in zip(*map(inputs.get, INPUTS), strict=True)]
        caps = [int(request.args[2]["max_new_tokens"]) for request in requests]
        with torch.inference_mode():
            output = self.model.generate(**inputs.to(self.dtype), do_sample=False, max_new_tokens=max(caps))
        tokenizer, results = self.processor.tokenizer, []
        for ids, cap in zip(output[:, inputs.input_ids.shape[1] :].tolist(), caps, strict=True):
            ids = [*ids[:cap], tokenizer.eos_token_id]
            ids = ids[: ids.index(tokenizer.eos_token_id)]
            results.append(
                GenerationResult(tokenizer.decode(ids, skip_special_tokens=True), TokenCounts(output_tokens=len(ids)))
            )
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError


INPUTS = ("input_ids", "attention_mask")


def cpu_seconds(work: Callable[[], Any]) -> list[float]:
    """Of each of a few calls; the first one, which warms up, is not counted."""
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
    return seconds[1:]


def necessary(network: Any) -> dict[str, list[float]]:
    """CPU seconds of the two pieces of work that no engine can leave out, once an image and once a token.

    They are measured on this process's own network, with its weights laid out as they are for answering.
    """
    text, vision = network.config.text_config, network.config.vision_config
    dtype = network.dtype
    if hasattr(vision, "image_size"):
        image = {"pixel_values": torch.randn(1, 3, vision.image_size, vision.image_size, dtype=dtype)}
    else:  # Qwen's patches of two frames, (patches, 3 * 2 * side * side), in the grid that 672 px have
        from toy_qwen import SIDE

        side = SIDE // vision.patch_size
        patches = torch.randn(side * side, 3 * vision.temporal_patch_size * vision.patch_size**2, dtype=dtype)
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}
    prefix = torch.randn(1, PREFIX, text.hidden_size, dtype=dtype)
    language = network.get_decoder()
    return {
        "image": cpu_seconds(lambda: network.model.get_image_features(**image)),
        "token": [one / PREFIX for one in cpu_seconds(lambda: language(inputs_embeds=prefix, use_cache=False))],
    }


def prompts_of(answerer: Any, requests: Sequence[Instance], asked: Sequence[Any]) -> list[list[int]]:
    """Return the token ids of the prompts that our engine was given."""
    if hasattr(answerer, "token_ids"):
        return [answerer.token_ids(request.args[0]) for request in requests]
    prompts = [answerer._prompt(index, question) for index, question in enumerate(asked)]
    return [[*prompt.prefix, *prompt.suffix] for prompt in prompts]


def watched_questions(answerer: Any) -> list[Any]:
    """The list in which the questions will stand that `answerer` is given."""
    seen: list[Any] = []
    answer = answerer.answer

    def watched(questions: Sequence[Any], *others: Any, **named: Any) -> Any:
        seen.extend(questions)
        return answer(questions, *others, **named)

    answerer.answer = watched
    return seen


def watched_prompts(lm: Any) -> list[list[int]]:
    """The list in which the token ids of each prompt will stand that `lm` gives to `generate`."""
    if hasattr(lm, "prompts"):
        return lm.prompts
    seen: list[list[int]] = []
    generate = lm.model.generate

    def watched(**inputs: Any) -> Any:
        seen.extend(inputs["input_ids"].tolist())
        return generate(**inputs)

    lm.model.generate = watched
    return seen


def said(result: Any) -> str:
    """Return an answer's text: some of lmms-eval's adapters return nothing else."""
    return result if isinstance(result, str) else result.text


def counted(lm: Any, result: Any) -> int:
    """Return the tokens of an answer, its end not counted."""
    if isinstance(result, str):
        return len(lm.tokenizer(result, add_special_tokens=False).input_ids)
    return result.token_counts.output_tokens


def time_answering(lm: Any, report: dict[str, Any]) -> None:
    """Make `lm.generate_until` fill `report`: seconds are CPU seconds of this process."""
    generate_until, ours = lm.generate_until, hasattr(lm, "answerer")
    network = lm.answerer.model if ours else lm.model
    if network.dtype != torch.float32 and hasattr(lm, "reasoning_prompt"):  # lmms-eval's Qwen reads bfloat16 alone
        network.float()

    def timed(requests: Sequence[Instance]) -> list[Any]:
        began = time.process_time()
        prompts = [] if ours else watched_prompts(lm)
        asked = watched_questions(lm.answerer) if ours else []
        before = necessary(network)
        start, wall = time.process_time(), time.perf_counter()
        results = generate_until(requests)
        answering, wall = time.process_time() - start, time.perf_counter() - wall
        after = necessary(network)
        if ours:  # its engine need not call `generate`
            prompts = prompts_of(lm.answerer, requests, asked)
        questions = [str(request.args[-3]) for request in requests]  # row of the data set
        prefix = next(place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
        report.update(
            answering=answering,
            answering_wall=wall,
            **{name: statistics.median(before[name] + after[name]) for name in before},
            answers={name: said(result).strip() for name, result in zip(questions, results, strict=True)},
            tokens={name: counted(lm, result) for name, result in zip(questions, results, strict=True)},
            prompts=sorted(sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in prompts),
            prefix_tokens=prefix,  # the same in every prompt
            suffix_tokens=sum(len(ids) - prefix for ids in prompts),
        )
        report["measuring"] = time.process_time() - began - answering
        return results

    lm.generate_until = timed


def main() -> None:
    file = Path(sys.argv.pop(1)).resolve()
    sys.modules["timed_lmms_eval"] = sys.modules["__main__"]  # so that lmms-eval finds `Plain` here
    models.MODEL_REGISTRY_V2.register_manifest(ModelManifest("plain", chat_class_path="timed_lmms_eval.Plain"))
    report: dict[str, Any] = {}
    create = lmms.create_from_arg_string.__func__  # type: ignore[attr-defined]

    def create_timed(cls: type, *args: Any, **named: Any) -> Any:
        lm = create(cls, *args, **named)
        time_answering(lm, report)
        return lm

    lmms.create_from_arg_string = classmethod(create_timed)  # type: ignore[assignment,method-assign]
    try:
        runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
    finally:
        report["peak_bytes"] = status("VmHWM")
        file.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
