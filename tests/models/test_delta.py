"""A mixer read bit by bit, against the layer of transformers reading it as a whole."""

import pytest
import torch

from qwench.models import map_of
from qwench.models.delta import first_state, read_delta
from qwench.models.modules import Modules
from qwench.models.weights import read_block
from tests.support.memory import tiny_source


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def mixer(request):
    source = tiny_source(moe=request.param)
    map = map_of(source)
    layer = Modules(source.config, map).new_layer("linear_attention")
    weights = read_block(source, map.blocks[1], "model.language_model.layers.1.", torch.float32)
    layer.load_state_dict(weights, assign=True)
    return layer.linear_attn


def normed(length):
    return torch.randn(1, length, 128, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("every", [False, True])
@torch.no_grad()
def test_a_whole_sequence_equals_transformers(mixer, every):
    x = normed(71)  # more than a chunk
    found, kept = read_delta(mixer, x, first_state(mixer), every)
    assert torch.allclose(found, mixer(x), atol=2e-5)
    assert sorted(kept) == (list(range(1, 72)) if every else [71])


@pytest.mark.parametrize("cuts", [(1, 2), (13, 14, 18), (3, 3 + 64, 68)])
@torch.no_grad()
def test_bit_by_bit_equals_as_a_whole(mixer, cuts):
    """Stretches shorter and longer than the convolution's kernel and the rule's chunk."""
    x = normed(cuts[-1] + 3)
    expected, after = read_delta(mixer, x, first_state(mixer), True)
    state, parts = first_state(mixer), []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        part, kept = read_delta(mixer, x[:, start:stop], state, False)
        parts.append(part)
        state = kept[stop - start]
        assert torch.allclose(state.inputs, after[stop].inputs, atol=1e-5)
        assert torch.allclose(state.recurrent, after[stop].recurrent, atol=1e-4)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)


@torch.no_grad()
def test_reading_on_from_a_kept_state_forgets_what_came_after_it(mixer):
    x, other = normed(12), normed(5)
    _, kept = read_delta(mixer, x, first_state(mixer), True)
    before = kept[7].recurrent.clone(), kept[7].inputs.clone()
    found, _ = read_delta(mixer, other, kept[7], False)
    expected, _ = read_delta(mixer, torch.cat([x[:, :7], other], 1), first_state(mixer), True)
    assert torch.allclose(found, expected[:, 7:], atol=1e-4)
    assert torch.equal(kept[7].recurrent, before[0]) and torch.equal(kept[7].inputs, before[1])
