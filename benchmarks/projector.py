"""The prototype extractor against the authors' form: time, peak memory, and what rounding does to the assignment.

`python benchmarks/projector.py --json FILE` measures at the real sizes (D 1024, N 256, L 576, float32, one image) and
writes `speedup` and `memory_ratio` (authors' / ours, answering) and the same with a backward pass (`..._training`).
Times are paired in one process, in turns; memory is the peak of a process of its own above what it held before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from figures import status, write
from torch import Tensor
from torch.nn import functional

from stllava_eval.network.modeling import PrototypeExtractor

WIDTH, PROTOTYPES, TOKENS = 1024, 256, 576


def authors_form(layer: PrototypeExtractor, x: Tensor) -> Tensor:
    """What `layer` computes, by broadcasting to two (batch, N, L, D) tensors, as the authors' cluster.py does."""
    features, values = layer.feature(x), layer.value(x)
    centers = functional.adaptive_avg_pool1d(x.mT, layer.num_prototypes).mT
    pooled = functional.adaptive_avg_pool1d(features.mT, layer.num_prototypes).mT
    values = functional.normalize(values, dim=1)
    for _ in range(layer.iterations):
        centers = functional.normalize(layer.center(centers), dim=-1)
        centers = (centers @ values.mT).softmax(1) @ features
    cosine = functional.normalize(centers, dim=-1) @ functional.normalize(x, dim=-1).mT
    similarity = torch.sigmoid(layer.similarity_shift + layer.similarity_scale * cosine)
    mask = torch.zeros_like(similarity).scatter_(1, similarity.max(1, keepdim=True)[1], 1.0)
    given = similarity * mask
    shared = (features.unsqueeze(1) * given.unsqueeze(-1)).sum(2)
    prototypes = (shared + pooled) / (mask.sum(-1, keepdim=True) + 1)
    return x + (prototypes.unsqueeze(2) * given.unsqueeze(-1)).sum(1)


FORMS = {"ours": lambda layer, x: layer(x), "authors": authors_form}


def setting(seed: int = 0) -> tuple[PrototypeExtractor, Tensor]:
    """A new extractor and the correlated tokens of an image: a mean of its own, smooth parts, and noise."""
    torch.manual_seed(seed)
    layer = PrototypeExtractor(WIDTH, PROTOTYPES, 2)
    smooth = functional.interpolate(torch.randn(1, WIDTH, 6, 6), size=24, mode="bicubic").flatten(2).mT
    return layer, (0.3 * torch.randn(1, 1, WIDTH) + smooth + 0.3 * torch.randn(1, TOKENS, WIDTH)).contiguous()


def run_once(form: str, layer: PrototypeExtractor, x: Tensor, training: bool) -> None:
    if training:
        layer.zero_grad(set_to_none=False)
        FORMS[form](layer, x.requires_grad_()).square().sum().backward()
    else:
        with torch.inference_mode():
            FORMS[form](layer, x)


def measure_memory(form: str, training: bool) -> int:
    """Peak bytes above the start, in this process. Run it in a new one."""
    layer, x = setting()
    tiny = PrototypeExtractor(8, 4, 2)
    run_once(form, tiny, torch.randn(1, 9, 8), training)  # what every first call allocates
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)  # held once, not once an image (zeros would not be touched yet)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    run_once(form, layer, x, training)
    return status("VmHWM") - before


def memory_in_a_process(form: str, training: bool) -> int:
    command = [sys.executable, __file__, "--measure-memory", form, *(["--training"] if training else [])]
    # every large block comes from and goes back to the system, so that the peak is the peak of what is used
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def times(rounds: int, training: bool) -> dict[str, list[float]]:
    """CPU seconds of this process, form by form in turns."""
    layer, x = setting()
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(rounds + 1):
        for form in sorted(FORMS, reverse=turn % 2 == 0):
            start = time.process_time()
            run_once(form, layer, x, training)
            if turn:  # the first turn warms up
                found[form].append(time.process_time() - start)
    return found


def assignment(layer: PrototypeExtractor, x: Tensor) -> Tensor:
    """(L,) the prototype that each token is given to, in x's dtype or in float32 as `layer` says."""
    chosen: list[Tensor] = []
    original = Tensor.max

    def spy(self: Tensor, *given: object, **named: object) -> object:
        result = original(self, *given, **named)
        chosen.append(result[1])
        return result

    Tensor.max = spy  # type: ignore[method-assign,assignment]
    try:
        layer(x)
    finally:
        Tensor.max = original  # type: ignore[method-assign]
    return chosen[-1].flatten()


def agreement() -> dict[str, float]:
    """Share of tokens that are given to the prototype of float64, for what is held and computed in bfloat16."""
    layer, x = setting()
    rounded = x.bfloat16()
    exact = PrototypeExtractor(WIDTH, PROTOTYPES, 2).double()
    exact.load_state_dict(layer.state_dict())
    true = assignment(exact, rounded.double())  # of the tokens that a tower in bfloat16 hands over

    def share(weights: torch.dtype, in_float32: bool) -> float:
        other = PrototypeExtractor(WIDTH, PROTOTYPES, 2, in_float32).to(weights)
        other.load_state_dict(layer.state_dict())
        return (assignment(other, rounded) == true).float().mean().item()

    return {
        "all in bfloat16, as the authors trained": share(torch.bfloat16, False),
        "computed in float32 from bfloat16 weights, as ours": share(torch.bfloat16, True),
        "computed in float32 from float32 weights": share(torch.float32, True),
        "prototypes in use, float64": len(true.unique()) / PROTOTYPES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each form (default: 9)")
    parser.add_argument("--measure-memory", choices=tuple(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--training", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure_memory:
        print(measure_memory(given.measure_memory, given.training))
        return
    layer, x = setting()
    with torch.no_grad():
        difference = (layer.double()(x.double()) - authors_form(layer, x.double())).abs().max().item()
    result: dict[str, object] = {"format": 1, "worst_difference_float64": difference, "agreement": agreement()}
    for training in (False, True):
        found, suffix = times(given.rounds, training), "_training" if training else ""
        ratios = [theirs / ours for theirs, ours in zip(found["authors"], found["ours"], strict=True)]
        memory = {form: memory_in_a_process(form, training) for form in FORMS}
        result |= {
            f"speedup{suffix}": statistics.median(ratios),
            f"speedup_range{suffix}": [min(ratios), max(ratios)],
            f"cpu_seconds{suffix}": {form: statistics.median(values) for form, values in found.items()},
            f"memory_ratio{suffix}": memory["authors"] / memory["ours"],
            f"peak_bytes{suffix}": memory,
        }
    write(result, given.json)


if __name__ == "__main__":
    main()
