import pytest
import torch

from qwench.errors import CheckpointError
from qwench.evaluation.lockstep import read_in_lockstep, relative_difference

IDS = torch.arange(12).view(3, 4)
BLOCKS, HIDDEN = 5, 6


class Doubling:
    """A trunk whose block i multiplies by 2, plus `drift` after block `late`."""

    def __init__(self, drift: float = 0.0, late: int = 0, poison: tuple[int, int] | None = None) -> None:
        self.drift, self.late, self.poison, self.calls = drift, late, poison, []

    def embed(self, ids):
        return (ids[..., None] + torch.arange(HIDDEN)).float() + 1

    def run_block(self, index, hidden):
        self.calls.append(index)
        hidden = hidden * 2
        if index >= self.late:
            hidden = hidden * (1 + self.drift)
        if self.poison and self.poison[0] == index:
            hidden[self.poison[1], 2, 1] = float("inf")
        return hidden

    def norm(self, hidden):
        return hidden / 32


def test_error_by_layer_and_normed_states():
    source, release = Doubling(), Doubling(drift=0.1, late=3)
    reading = read_in_lockstep(source, {"release": release}, IDS, BLOCKS)
    errors = reading.releases["release"].errors
    assert source.calls == release.calls == list(range(BLOCKS))
    assert errors[:3] == [0.0, 0.0, 0.0]
    assert errors[3:] == [pytest.approx(0.1, rel=1e-5), pytest.approx(0.21, rel=1e-5)]
    assert reading.source.errors == [] and reading.source.by_layer.shape == (BLOCKS, 0, HIDDEN)
    torch.testing.assert_close(reading.source.normed, source.embed(IDS))
    torch.testing.assert_close(reading.releases["release"].normed, source.embed(IDS) * 1.21)


def test_several_readings_of_a_release_walk_beside_one_source():
    """Each as if it were alone; the source goes through once."""
    source, with_them, without = Doubling(), Doubling(drift=0.1, late=4), Doubling(drift=0.3, late=2)
    both = read_in_lockstep(source, {"with": with_them, "without": without}, IDS, BLOCKS)
    assert source.calls == list(range(BLOCKS))
    for name, alone in (("with", Doubling(drift=0.1, late=4)), ("without", Doubling(drift=0.3, late=2))):
        expected = read_in_lockstep(Doubling(), {name: alone}, IDS, BLOCKS).releases[name]
        assert both.releases[name].errors == expected.errors and torch.equal(both.releases[name].normed, expected.normed)
    assert both.releases["with"].errors[3] == 0 and both.releases["without"].errors[3] > 0.3


def test_what_a_layer_adds_by_itself_is_measured_on_the_source_s_own_states():
    """Drift compounds in the states of a release; a layer that is given the source's adds its own drift alone. One row of four is taken: of three, the first."""
    release = Doubling(drift=0.1, late=2)
    read = read_in_lockstep(Doubling(), {"release": release}, IDS, BLOCKS).releases["release"]
    assert read.own == [0.0, 0.0, *[pytest.approx(0.1, rel=1e-5)] * 3]
    assert read.errors[2:] == [pytest.approx(1.1**n - 1, rel=1e-5) for n in (1, 2, 3)]
    assert read.normed.shape == (3, 4, HIDDEN), "the rows that were borrowed are not the release's"
    many = read_in_lockstep(Doubling(), {"release": Rowwise()}, torch.arange(68).view(17, 4), 1).releases["release"]
    assert many.own == [pytest.approx(0.25)] and many.errors[0] < 0.2, "rows 0, 4, 8, 12 and 16 of 17"


class Rowwise(Doubling):
    """Off by a quarter where the first token of a row is a multiple of 16."""

    def run_block(self, index, hidden):
        first = hidden[:, :1, :1] - 1
        return hidden * 2 * torch.where(first % 16 == 0, 1.25, 1.0)


def test_states_after_every_layer_at_the_positions_that_were_asked_for():
    """Counted row by row: position 5 is the second of the second row."""
    release = Doubling(drift=0.1, late=3)
    read = read_in_lockstep(Doubling(), {"release": release}, IDS, BLOCKS, positions=torch.tensor([0, 5, 11]))
    for side, last in ((read.source, 1.0), (read.releases["release"], 1.21)):
        assert side.by_layer.shape == (BLOCKS, 3, HIDDEN)
        torch.testing.assert_close(side.by_layer[-1], torch.stack([side.normed[0, 0], side.normed[1, 1], side.normed[2, 3]]))
        torch.testing.assert_close(side.by_layer[1, 2], release.embed(IDS)[2, 3] / 8)
        torch.testing.assert_close(side.by_layer[-1, 0], release.embed(IDS)[0, 0] * last)


@pytest.mark.parametrize("which", ["source", "release"])
def test_infinity_names_model_block_and_row(which):
    trunks = {"source": Doubling(), "release": Doubling(), which: Doubling(poison=(4, 1))}
    with pytest.raises(CheckpointError, match=rf"the {which}'s hidden states .* decoder layer 4: row 1, 1 of 24 values"):
        read_in_lockstep(trunks["source"], {"release": trunks["release"]}, IDS, BLOCKS)


def test_progress_after_every_block():
    seen = []
    read_in_lockstep(Doubling(), {"release": Doubling()}, IDS, BLOCKS, seen.append)
    assert [(p.block, p.blocks, p.rows) for p in seen] == [(i + 1, BLOCKS, 3) for i in range(BLOCKS)]
    assert seen[-1].seconds_left == 0 and all(p.tokens_per_second > 0 for p in seen)
    assert seen[-1].peak_rss > 50 * 2**20  # torch alone is larger


def test_relative_difference():
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_difference(reference + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference) == pytest.approx(0.2)
    assert relative_difference(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_difference(torch.ones(2, 2), torch.zeros(2, 2)) == float("inf")
