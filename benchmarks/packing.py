"""What it brings to lay out weights and keys once: times of plain and packed products on one thread, float32.

`python benchmarks/packing.py --json FILE` compares a linear layer of 1024 x 2816 with `packing.PackedLinear` at several
numbers of rows, and attention from a few rows to prefixes of 612 keys (8 heads of 128) that are stacked with those that
are packed. Written are milliseconds of CPU time (the least of 12 calls) and the ratios plain / packed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from figures import write
from torch import nn

from stllava_eval.inference.keys import PackedPrefixes, Prefixes, StackedPrefixes
from stllava_eval.inference.packing import PackedLinear

REPEATS = 12
ROWS = (1, 4, 16, 48, 80, 128, 612)
# prefixes and rows of each: of SLAKE, PathVQA and VQA-RAD
ATTENTION = ((9, 11), (6, 17), (20, 2))
HEADS, KEYS, WIDTH = 8, 612, 128


def least(work: Callable[[], Any]) -> float:
    """Return the least CPU milliseconds of some calls, after one that warms up."""
    times = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return 1000 * min(times[1:])


def linears() -> dict[str, Any]:
    """Return plain and packed milliseconds, and their ratio, by number of rows."""
    plain = nn.Linear(1024, 2816, bias=False).requires_grad_(False)
    packed = PackedLinear(plain)
    figures = {}
    for rows in ROWS:
        x = torch.randn(rows, 1024)
        times = least(partial(plain, x)), least(partial(packed, x))
        figures[str(rows)] = {"plain_ms": times[0], "packed_ms": times[1], "ratio": times[0] / times[1]}
    return figures


def attention() -> dict[str, Any]:
    """Return the same of attention from running rows to their prefixes, by `prefixes x rows`."""
    figures = {}
    for prefixes, rows in ATTENTION:
        held: list[Prefixes] = [StackedPrefixes(), PackedPrefixes()]
        for slot in range(prefixes):
            layer = torch.randn(1, HEADS, KEYS, WIDTH), torch.randn(1, HEADS, KEYS, WIDTH)
            for way in held:
                way.put(slot, [layer], KEYS)
        queries = torch.randn(prefixes, rows, HEADS, 1, WIDTH)
        counts, lengths = [rows] * prefixes, [KEYS] * prefixes
        times = [least(partial(way.of_rows, 0, queries, counts, lengths, None)) for way in held]
        figures[f"{prefixes} x {rows}"] = {"stacked_ms": times[0], "packed_ms": times[1], "ratio": times[0] / times[1]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write({"format": 1, "linear": linears(), "attention": attention()}, given.json)


if __name__ == "__main__":
    main()
