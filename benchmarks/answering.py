"""How fast questions are answered: our engine against lmms-eval's `llava_hf` (A) and plain batches of 8 (B).

`python benchmarks/answering.py --json FILE` runs the command `lmms_eval --tasks vqarad|slake|pathvqa` for each of them
on the same random network (toy_llava.py), the same prompts, questions and images, greedy, float32, on one thread. A is
lmms-eval's own adapter, which takes one question at a time; B is transformers' `generate` on left-padded batches of 8,
sorted by length (`Plain` in timed_lmms_eval.py), with our pixels. Ours is called as anyone calls it: no batch size.

Every round has new questions and images, and the three take turns to be first. What is compared is the CPU time of the
model's `generate_until`: preparing images and prompts, answering, and what the adapter does with its answers.
`slake_short` is the median of A's seconds / ours, `slake_short_vs_batched` of B's / ours, each beside its quartiles;
`_whole_command` is the same of the whole process: imports, loading of the weights and scores, alike for all, come on
top. `over_bound_...` is our seconds / those of the work that no engine can leave out, each image and its prefix
once and each further token once, at the rate at which this process forwards one prefix. `identical` is the share of
answers equal to A's, which are those of `generate` one at a time. `--family qwen` compares with lmms-eval's
`qwen2_5_vl` (A), on the network of toy_qwen.py; A sends each image as JPEG once more, so its answers may be others.
Images are 336 px, so that nobody resizes them: A
resizes with torchvision, whose pixels differ from PIL's by up to two grey levels, and a random network goes on from
there to other answers (3 of 10 at 512 px).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import write
from toy_llava import MOST_TOKENS, OFFICIAL, SHAPES, jpeg, write_checkpoint, write_questions
from toy_qwen import PIXELS, write_qwen

HERE = Path(__file__).resolve().parent
# model, its arguments beside `pretrained`, and what is typed on the command line
SYSTEMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ours": ("stllava_med", "", ()),
    "llava_hf": ("llava_hf", "device=cpu,device_map=cpu", ("--batch_size", "1")),  # it refuses any other
    "batched": ("plain", "", ("--batch_size", "8")),
    "ours_equal_tokens": ("stllava_med", "batch_tokens={tokens}", ()),  # what B holds at a time, see `memory`
    "other_images": ("stllava_med", "images=other", ()),
    "ours_bf16": ("stllava_med", "dtype=bfloat16", ()),
    "batched_bf16": ("plain", "dtype=bfloat16", ("--batch_size", "8")),
    "one_by_one_bf16": ("plain", "dtype=bfloat16", ("--batch_size", "1")),
}
TIMED = ("ours", "llava_hf", "batched")
OF_QWEN: dict[str, tuple[str, str, tuple[str, ...]]] = {  # as SYSTEMS; A is named as LLaVA's is
    "ours": ("stllava_med", "", ()),
    "llava_hf": (
        "qwen2_5_vl",
        f"device=cpu,device_map=cpu,min_pixels={PIXELS},max_pixels={PIXELS}",
        ("--batch_size", "1"),  # its default; it takes batches too, which are B
    ),
    "batched": ("plain", "", ("--batch_size", "8")),
    "other_images": ("stllava_med", "images=other", ()),
}
ALONE = {  # one thread, no hub, and nothing of the caller's runs
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
# what llava_hf imports for videos, which nothing here has
DECORD = "class VideoReader: ...\n\n\ndef cpu(index): ...\n"

Report = dict[str, Any]  # what timed_lmms_eval.py writes


class Bench:
    """A folder with the two networks, in which data are written and systems are run."""

    def __init__(self, folder: Path, family: str = "llava") -> None:
        self.folder, self.family = folder, family
        self.systems = OF_QWEN if family == "qwen" else SYSTEMS
        (folder / "stubs").mkdir()
        (folder / "stubs" / "decord.py").write_text(DECORD)
        for length in MOST_TOKENS:
            (write_qwen if family == "qwen" else write_checkpoint)(folder / length, length)

    def run(self, system: str, home: Path, task: str, length: str) -> Report:
        """What `system` says of itself when lmms-eval runs it on the data under `home`."""
        model, others, typed = self.systems[system]
        report = home / f"{system}.json"
        command = [sys.executable, str(HERE / "timed_lmms_eval.py"), str(report)]
        command += ["--model", model, "--tasks", task, "--gen_kwargs", f"max_new_tokens={MOST_TOKENS[length]}"]
        others = others.format(tokens=8 * (640 + MOST_TOKENS[length]))
        command += ["--model_args", ",".join([f"pretrained={self.folder / length}", *filter(None, [others])])]
        command += ["--output_path", str(home / "output" / system), "--log_samples", *typed]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STLLAVA_")}
        paths = [str(self.folder / "stubs"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {**ALONE, "STLLAVA_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
        log = home / f"{system}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=self.folder)
            _, code, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(code)
        found = json.loads(report.read_text()) if report.exists() else {}
        if process.returncode or "answers" not in found:
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{log.read_text()[-3000:]}")
        return found | {"whole_command": used.ru_utime + used.ru_stime - found["measuring"]}

    def round(self, key: str, counts: Sequence[int], number: int, systems: Sequence[str]) -> dict[str, Report]:
        """The reports of `systems`, in this order, on the questions of round `number`."""
        task, length = key.split("_")
        home = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=self.folder))
        write_questions(home, task, counts, seed=1000 * list(SHAPES).index(key) + number)
        reports: dict[str, Report] = {}
        for system in systems:
            reports[system] = self.run(system, home, task, length)
            seconds, tokens = reports[system]["answering"], reports[system]["tokens"].values()
            print(
                f"{key} round {number}: {system} {seconds:.1f} s, {reports[system]['whole_command']:.1f} s in all, "
                f"{len(tokens)} answers of {statistics.mean(tokens):.1f} tokens",
                file=sys.stderr,
                flush=True,
            )
        if len({json.dumps(report["prompts"]) for report in reports.values()}) > 1:
            raise SystemExit(f"{key}: the systems were given different prompts, so their times mean nothing")
        return reports


def bound(report: Report, images: int) -> float:
    """CPU seconds of the work that no engine can leave out, at the rate measured beside `report`."""
    tokens = images * report["prefix_tokens"] + report["suffix_tokens"] + sum(report["tokens"].values())
    return images * report["image"] + tokens * report["token"]


def equal(reports: Mapping[str, Report], one: str, other: str) -> list[bool]:
    """For each question, whether two systems gave the same answer."""
    answers = reports[one]["answers"], reports[other]["answers"]
    return [answers[0][question] == answers[1][question] for question in answers[0]]


def ratios(key: str, values: Sequence[float]) -> dict[str, Any]:
    middle = statistics.median(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    return {key: middle, f"{key}_quartiles": [quartiles[0], quartiles[2]], f"{key}_rounds": list(values)}


def of_shape(key: str, rounds: Sequence[Mapping[str, Report]], images: int) -> dict[str, Any]:
    """The ratios of one shape."""

    def times(system: str, what: str) -> list[float]:
        return [reports[system][what] for reports in rounds]

    def compared(system: str, what: str) -> list[float]:
        return [theirs / ours for theirs, ours in zip(times(system, what), times("ours", what), strict=True)]

    return {
        **ratios(key, compared("llava_hf", "answering")),
        **ratios(f"{key}_vs_batched", compared("batched", "answering")),
        **ratios(f"{key}_whole_command", compared("llava_hf", "whole_command")),
        **ratios(f"{key}_vs_batched_whole_command", compared("batched", "whole_command")),
        **ratios(
            f"over_bound_{key}",
            [reports["ours"]["answering"] / bound(reports["ours"], images) for reports in rounds],
        ),
    }


def by_system(rounds: Sequence[Mapping[str, Report]], what: str) -> dict[str, float]:
    return {system: statistics.median(reports[system][what] for reports in rounds) for system in TIMED}


def figures(measured: Mapping[str, Sequence[Mapping[str, Report]]], counts: Mapping[str, Sequence[int]]) -> Report:
    """Everything that is told about the rounds of each shape."""
    same: dict[str, list[bool]] = defaultdict(list)
    for rounds in measured.values():
        for reports in rounds:
            same["identical"] += equal(reports, "ours", "llava_hf")
            same["identical_vs_batched"] += equal(reports, "ours", "batched")
    result: Report = {}
    for key, rounds in measured.items():
        result |= of_shape(key, rounds, len(counts[key]))
    result |= {name: statistics.mean(values) for name, values in same.items()}
    result["compared_questions"] = {name: len(values) for name, values in same.items()}
    for name, what in (
        ("cpu_seconds", "answering"),
        ("cpu_seconds_whole_command", "whole_command"),
        ("wall_seconds", "answering_wall"),
        ("peak_bytes", "peak_bytes"),
        ("seconds_an_image", "image"),
        ("seconds_a_token", "token"),
    ):
        result[name] = {key: by_system(rounds, what) for key, rounds in measured.items()}
    result["shapes"] = {
        key: {
            "questions": sum(counts[key]),
            "images": len(counts[key]),
            "rounds": len(rounds),
            "prefix_tokens": rounds[0]["ours"]["prefix_tokens"],
            "suffix_tokens": rounds[0]["ours"]["suffix_tokens"] / sum(counts[key]),
            "answer_tokens": {
                system: statistics.mean(one for reports in rounds for one in reports[system]["tokens"].values())
                for system in TIMED
            },
        }
        for key, rounds in measured.items()
    }
    return result


def alone(bench: Bench, key: str, counts: Sequence[int], rounds: int) -> list[float]:
    """Our seconds over those of the necessary work, in each round of a shape."""
    reports = [bench.round(key, counts, number, ["ours"])["ours"] for number in range(rounds)]
    return [report["answering"] / bound(report, len(counts)) for report in reports]


def checked(bench: Bench) -> Report:
    """That the set-up is fair: equal prompts and nearly equal pixels; answers depend on the image. Warms up, too."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    from stllava_eval.network.checkpoint import open_checkpoint

    reports = bench.round("slake_short", (2, 2, 2, 2), 999, [*TIMED, "other_images"])
    changed = equal(reports, "ours", "other_images").count(False)
    if bench.family == "qwen":  # A sends images as JPEG, so its pixels are others
        return {"changed_by_other_images": changed / len(reports["ours"]["answers"])}
    folder = str(bench.folder / "short")
    processors = [open_checkpoint(folder).processor(), AutoProcessor.from_pretrained(folder)]
    image = Image.open(io.BytesIO(jpeg(np.random.default_rng(0))))
    pixels = [one.image_processor(image, return_tensors="pt")["pixel_values"] for one in processors]
    return {
        "pixel_difference": (pixels[0] - pixels[1]).abs().max().item(),
        "changed_by_other_images": changed / len(reports["ours"]["answers"]),
    }


def memory(bench: Bench, counts: Mapping[str, Sequence[int]]) -> Report:
    """Peak bytes of our process / of B's, where ours may hold the tokens of B's batch: 8 prompts of 640 and answers."""
    ratios_of = {}
    for key in counts:
        reports = bench.round(key, counts[key], 0, ["ours_equal_tokens", "batched"])
        ratios_of[key] = reports["ours_equal_tokens"]["peak_bytes"] / reports["batched"]["peak_bytes"]
    return {"peak_memory_vs_batched": ratios_of}


def bf16(bench: Bench, counts: Mapping[str, Sequence[int]]) -> Report:
    """Shares of answers that batching changes in bfloat16, where sums depend on their order: ours, and plain."""
    differ: dict[str, list[bool]] = defaultdict(list)
    for key in counts:
        reports = bench.round(key, counts[key], 0, ["ours_bf16", "batched_bf16", "one_by_one_bf16"])
        differ["differing_bf16"] += equal(reports, "ours_bf16", "one_by_one_bf16")
        differ["differing_bf16_batched"] += equal(reports, "batched_bf16", "one_by_one_bf16")
    shares: Report = {name: values.count(False) / len(values) for name, values in differ.items()}
    return shares | {"compared_questions_bf16": len(differ["differing_bf16"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds of each shape (default: 3)")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help="some of, with commas between (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="every fourth image only")
    parser.add_argument("--official", action="store_true", help="sets of 100 questions with the official tests' counts")
    parser.add_argument("--alone", action="store_true", help="ours only: time over the necessary work, no ratios")
    parser.add_argument("--family", choices=("llava", "qwen"), default="llava", help="(default: llava)")
    parser.add_argument("--memory", action="store_true", help="also compare peak memory at equal tokens held")
    parser.add_argument("--bf16", action="store_true", help="also count the answers that batching changes in bfloat16")
    given = parser.parse_args()
    shapes = given.shapes.split(",")
    if unknown := sorted(set(shapes) - set(SHAPES)):
        parser.error(f"--shapes {', '.join(unknown)}: unknown. Pass some of {', '.join(SHAPES)}.")
    all_counts = {key: OFFICIAL[key.split("_")[0]] if given.official else SHAPES[key] for key in shapes}
    counts = {key: all_counts[key][:: 4 if given.quick else 1] for key in shapes}
    measured: dict[str, list[dict[str, Report]]] = {}
    with tempfile.TemporaryDirectory(prefix="stllava-answering-") as folder:
        bench = Bench(Path(folder), given.family)
        result: Report = {"format": 1, **{name: vars(given)[name] for name in ("quick", "family", "official")}}
        if given.alone:
            result |= {f"over_bound_{key}": alone(bench, key, counts[key], given.rounds) for key in shapes}
            write(result, given.json)
            return
        result |= checked(bench)
        for number in range(given.rounds):
            for key in shapes:
                order = [*TIMED[number % 3 :], *TIMED[: number % 3]]
                measured.setdefault(key, []).append(bench.round(key, counts[key], number, order))
            result |= figures(measured, counts)
            if given.json != "-":
                write(result, given.json)  # what there is, should a later round not end
        if given.memory:
            result |= memory(bench, counts)
        if given.bf16:
            result |= bf16(bench, counts)
    write(result, given.json)


if __name__ == "__main__":
    main()
