"""Prefixes stacked and packed: both attend as a plain softmax over the same keys does."""

import pytest
import torch

from stllava_eval.inference.keys import PackedPrefixes, Part, StackedPrefixes

HEADS, SHARE, WIDTH = 2, 3, 16
LENGTHS = [37, 5, 612]


def attention(part: Part) -> torch.Tensor:
    return part.summed / part.total


@pytest.fixture(params=[StackedPrefixes, PackedPrefixes])
def prefixes(request):
    return request.param()


def filled(prefixes, lengths=LENGTHS):
    """The keys and values, (1, heads, length, width), of two layers of each prefix."""
    torch.manual_seed(0)
    held = []
    for slot, length in enumerate(lengths):
        layers = [tuple(torch.randn(1, HEADS, length, WIDTH) for _ in range(2)) for _ in range(2)]
        prefixes.put(slot, layers, max(lengths[: slot + 1]))
        held.append(layers)
    return held


def plain(queries, keys, values, far=None):
    """(queries, heads, share, width) queries, one at a time."""
    scores = torch.einsum("qhsd,hkd->qhsk", queries.double(), keys[0].double())
    if far is not None:
        scores = scores.masked_fill(far[:, None, None, :], float("-inf"))
    return torch.einsum("qhsk,hkd->qhsd", scores.softmax(-1), values[0].double()).float()


@pytest.mark.parametrize("windowed", [False, True])
def test_rows_attend_to_the_prefix_that_they_have(prefixes, windowed):
    held, rows = filled(prefixes), [2, 0, 3]
    queries = torch.randn(3, 3, HEADS, SHARE, WIDTH)
    far = torch.rand(3, 1, 3, 1, max(LENGTHS)) < 0.4 if windowed else None
    if windowed:
        far[..., 0] = False
    part = prefixes.of_rows(1, queries, rows, LENGTHS, far)
    for slot, (count, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        hidden = far[slot, 0, :count, 0, :length] if windowed else None
        expected = plain(queries[slot, :count], *held[slot][1], hidden)
        torch.testing.assert_close(attention(part)[slot, :count], expected, rtol=1e-4, atol=1e-5)


def test_new_tokens_attend_and_a_prefix_moves_into_a_gap(prefixes):
    held = filled(prefixes)
    queries = torch.randn(1, 20, HEADS, SHARE, WIDTH)
    part = prefixes.of_tokens(0, 1, queries, LENGTHS[1], None)
    torch.testing.assert_close(attention(part)[0], plain(queries[0], *held[1][0]), rtol=1e-4, atol=1e-5)
    prefixes.move(2, 0, LENGTHS[2])
    part = prefixes.of_tokens(0, 0, queries, LENGTHS[2], None)
    torch.testing.assert_close(attention(part)[0], plain(queries[0], *held[2][0]), rtol=1e-4, atol=1e-5)
    prefixes.move(1, 1, LENGTHS[1])  # the last one leaves
    layers = [tuple(torch.randn(1, HEADS, 9, WIDTH) for _ in range(2)) for _ in range(2)]
    prefixes.put(1, layers, LENGTHS[2])
    part = prefixes.of_rows(1, queries[:, :2].expand(2, 2, HEADS, SHARE, WIDTH), [2, 2], [LENGTHS[2], 9], None)
    torch.testing.assert_close(attention(part)[1], plain(queries[0, :2], *layers[1]), rtol=1e-4, atol=1e-5)


def test_a_window_that_hides_a_whole_prefix_gives_numbers_that_weigh_nothing(prefixes):
    filled(prefixes)
    queries = torch.randn(3, 1, HEADS, SHARE, WIDTH)
    part = prefixes.of_rows(0, queries, [1, 1, 1], LENGTHS, torch.ones(3, 1, 1, 1, max(LENGTHS), dtype=torch.bool))
    assert torch.isfinite(part.summed).all()
    assert (part.highest == torch.finfo(torch.float32).min).all()
