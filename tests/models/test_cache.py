import pytest
import torch

from qwench.models.cache import FIRST_ROOM, DeltaState, DeltaStates, KeyValues, causal_mask


def drawn(positions, seed):
    return torch.randn(1, 3, positions, 5, generator=torch.Generator().manual_seed(seed))


def test_keys_and_values_come_back_in_order_beyond_the_first_room():
    memory, keys, values = KeyValues(), drawn(3 * FIRST_ROOM, 1), drawn(3 * FIRST_ROOM, 2)
    for start, stop in ((0, 7), (7, 8), (8, FIRST_ROOM + 1), (FIRST_ROOM + 1, 3 * FIRST_ROOM)):
        held = memory.update(keys[:, :, start:stop], values[:, :, start:stop])
        assert memory.length == stop and torch.equal(held[0], keys[:, :, :stop]) and torch.equal(held[1], values[:, :, :stop])


def test_what_is_read_after_a_rewind_takes_the_place_of_what_was_forgotten():
    memory, keys, values, other = KeyValues(), drawn(9, 1), drawn(9, 2), drawn(2, 3)
    memory.update(keys, values)
    memory.rewind(4)
    held = memory.update(other, other)
    assert torch.equal(held[0], torch.cat([keys[:, :, :4], other], 2))
    assert torch.equal(held[1], torch.cat([values[:, :, :4], other], 2))
    with pytest.raises(AssertionError):
        memory.rewind(7)


def state(number):
    return DeltaState(torch.full((1, 2, 3), float(number)), torch.full((1, 2, 4, 5), float(number)))


def number(states):
    return float(states.current.inputs[0, 0, 0])


def test_states_of_the_last_stretch_can_be_gone_back_to_and_no_others():
    states = DeltaStates(state(0))
    states.advance(5, {5: state(5)})
    assert states.length == 5 and number(states) == 5
    states.advance(3, {n: state(5 + n) for n in (1, 2, 3)})
    states.rewind(7)
    assert states.length == 7 and number(states) == 7
    states.rewind(5)  # before the stretch
    assert number(states) == 5
    with pytest.raises(AssertionError, match="after 6 positions was not kept"):
        states.rewind(6)  # forgotten
    states.advance(2, {2: state(70)})
    assert states.length == 7 and number(states) == 70
    with pytest.raises(AssertionError, match="after 5 positions"):
        states.rewind(5)


def test_each_query_reads_up_to_itself():
    assert causal_mask(1, 9) is None and causal_mask(9, 9) is None  # attention's own rule
    assert causal_mask(3, 5)[0, 0].tolist() == [[True] * n + [False] * (5 - n) for n in (3, 4, 5)]
