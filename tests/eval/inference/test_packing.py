import weakref

import pytest
import torch
from torch import nn

from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.packing import PackedLinear, pack_linears


class Scaled(nn.Linear):
    """Computes something else than a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.up, self.down = nn.Linear(24, 70), nn.Linear(70, 24, bias=False)
        self.scaled = Scaled(24, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.scaled(self.down(self.up(self.embedding(ids)).relu())))


@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_a_packed_network_says_the_same(rows):
    network = Network()
    ids = torch.arange(rows)[None] % 40
    with torch.inference_mode():
        expected = network(ids)
        assert pack_linears(network) == 2
        torch.testing.assert_close(network(ids), expected, rtol=1e-4, atol=1e-5)


def test_tied_weights_and_subclasses_keep_theirs_and_a_second_call_changes_nothing():
    network = Network()
    pack_linears(network)
    assert type(network.up) is type(network.down) is PackedLinear
    assert type(network.scaled) is Scaled
    assert network.head.weight is network.embedding.weight
    assert pack_linears(network) == 0
    assert (network.up.weight.shape, network.up.weight.dtype) == ((70, 24), torch.float32)
    with pytest.raises(NotImplementedError, match="meta"):
        network.up.weight.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(dtype):
    assert pack_linears(Network().to(dtype)) == 0


def test_a_release_without_the_product_or_with_another_one_leaves_all_layers(monkeypatch):
    from stllava_eval.inference import packing

    monkeypatch.setattr(packing, "_product", lambda x, *_: torch.zeros(3, 70))
    assert pack_linears(Network()) == 0


def test_a_model_in_training_keeps_its_weights(checkpoint):
    policy = Answerer(str(checkpoint)).model
    assert any(isinstance(module, PackedLinear) for module in policy.modules())
    from stllava_eval.network.checkpoint import open_checkpoint

    policy = open_checkpoint(str(checkpoint)).model(torch.device("cpu"), torch.float32)
    answering = Answerer(str(checkpoint), model=policy).model
    assert not any(isinstance(module, PackedLinear) for module in answering.modules())


def test_a_weight_is_freed_as_soon_as_it_is_packed(monkeypatch):
    """Otherwise a network would need twice its memory for a while."""
    from stllava_eval.inference import packing

    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    weights = [weakref.ref(layer) for layer in network]
    there: list[int] = []
    packed = packing._packed
    monkeypatch.setattr(
        packing, "_packed", lambda weight: there.append(sum(ref() is not None for ref in weights)) or packed(weight)
    )
    assert pack_linears(network) == 5
    assert there[-5:] == [5, 4, 3, 2, 1]
