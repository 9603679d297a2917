"""Reading bit by bit, with forgetting, against the forward that starts over each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.decoder import Decoder
from qwench.models.run import Trunk
from tests.models.test_run import LAYOUTS
from tests.support.memory import MemorySource, tiny_source

IDS = torch.randint(10, 350, (1, 30), generator=torch.Generator().manual_seed(1))


def source_of(options: dict[str, Any]) -> MemorySource:
    return tiny_source(**{k: v for k, v in options.items() if k != "shards"})


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_bit_by_bit_equals_the_whole(options: dict[str, Any]) -> None:
    """A prompt, single tokens, stretches that are kept in part, and a stretch that is forgotten as a whole."""
    source, row = source_of(options), IDS[0].tolist()
    trunk = Trunk(source, map_of(source))
    expected = trunk.forward(IDS)[0]
    decoder = Decoder(trunk)
    reading, found = decoder.begin(), []
    found.append(reading.read(row[:11]))
    found.append(reading.read(row[11:12]))
    found.append(reading.read([*row[12:14], 7, 8, 9], keep=True)[:2])  # 7, 8, 9 are wrong drafts
    reading.rewind(14)
    found.append(reading.read(row[14:15]))
    reading.read([5, 6], keep=True)
    reading.rewind(15)
    found.append(reading.read(row[15:19], keep=True))
    found.append(reading.read(row[19:]))
    assert reading.length == 30
    difference = (torch.cat(found) - expected).abs().max() / expected.std()
    assert difference < 1e-4
    assert torch.allclose(reading.logits(expected[-2:]), trunk.logits(expected[-2:]), atol=1e-4)


def test_sequences_of_one_decoder_know_nothing_of_each_other() -> None:
    source = tiny_source(moe=True)
    decoder, row = Decoder(Trunk(source, map_of(source))), IDS[0].tolist()
    one, other = decoder.begin(), decoder.begin()
    one.read(row[:5])
    other.read(row[20:])
    assert torch.allclose(one.read(row[5:9])[-1], Trunk(source, map_of(source)).forward(IDS[:, :9])[0, -1], atol=1e-4)


def test_weights_beyond_the_limit_are_read_again_and_change_nothing() -> None:
    source, row = tiny_source(), IDS[0].tolist()
    map = map_of(source)
    whole = Decoder(Trunk(source, map))
    expected = whole.begin().read(row)
    block = sum(source.values[s.tensor].numel() for s in map.blocks[0].slots) * 4
    head = source.values["lm_head.weight"].numel() * 4
    bounded = Decoder(Trunk(source, map), keep=head + 2 * block + 100)
    reading, read = bounded.begin(), list[set[str]]()
    bounded.logits(expected[:1])
    for token in row:
        source.reads.clear()
        state = reading.read([token])
        read.append({name.split(".")[3] for name, _ in source.reads if ".layers." in name})
    assert torch.allclose(state[0], expected[-1], atol=1e-4)
    assert bounded.kept_bytes == head + 2 * block
    assert read[0] == {"0", "1", "2", "3"} and all(again == {"2", "3"} for again in read[1:])
    bounded.free()
    assert bounded.kept_bytes == 0


def test_a_decoder_that_may_keep_nothing_still_decodes() -> None:
    source = tiny_source(tied=True)
    nothing, all_of_it = (Decoder(Trunk(source, map_of(source)), keep) for keep in (0, 2**30))
    states = [decoder.begin().read([3, 4, 5]) for decoder in (nothing, all_of_it)]
    assert torch.equal(*states)
    assert torch.allclose(nothing.logits(states[0]), all_of_it.logits(states[0]), atol=1e-5) and nothing.kept_bytes == 0


def test_bfloat16_stays_near_the_whole() -> None:
    source = tiny_source(moe=True)
    trunk = Trunk(source, map_of(source), torch.bfloat16)
    expected, reading = trunk.forward(IDS)[0].float(), Decoder(trunk).begin()
    found = torch.cat([reading.read(IDS[0, :9].tolist()), reading.read(IDS[0, 9:].tolist(), keep=True)])
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_token_outside_of_the_vocabulary_is_the_users() -> None:
    source = tiny_source()
    with pytest.raises(CheckpointError, match="the embedding has 352 rows"):
        Decoder(Trunk(source, map_of(source))).begin().read([1, 352])
