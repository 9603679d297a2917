import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.errors import CheckpointError, UserError
from qwench.evaluation.acceptance import accepted, draft_tokens
from qwench.evaluation.decoding import Generated, generate
from qwench.evaluation.sampling import Sampling
from qwench.evaluation.speculation import SpeculationReport, StepCosts, speculate
from qwench.models import map_of
from qwench.models.decoder import Decoder
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.stream.rows import held_out_rows
from tests.support.memory import tiny_source
from tests.support.oracle import cycle_row, write_oracle


def report(rows, drafts=3, costs=StepCosts(0.010, 0.012, 0.001)):
    return SpeculationReport(drafts, Sampling(), 0, [[1]] * len(rows), rows, costs, 1.0)


def test_counts_and_shares_of_a_hand_made_report():
    found = report([Generated([0] * 9, [3, 0, 1]), Generated([0] * 5, [2])])
    assert (found.rounds, found.drafted, found.accepted, found.accepted_at) == (4, 12, 6, [3, 2, 1])
    assert found.acceptance == [0.75, 0.5, 0.25] and found.mean_length == 2.5
    assert found.speedup == pytest.approx(2.5 * 0.010 / (0.012 + 3 * 0.001))
    means = found.acceptance_means()
    assert [m.mean for m in means] == found.acceptance and found.length_mean().mean == 2.5
    # of 3 and 1 rounds: sums 2 and 1 at position 1, mean 0.75: residuals -0.25 and 0.25
    assert means[0].standard_error == pytest.approx((2 * 2 * 0.25**2) ** 0.5 / 4)


def test_a_row_of_one_token_has_no_rounds():
    found = report([Generated([4], []), Generated([5], [])])
    assert (found.rounds, found.accepted, found.acceptance, found.mean_length) == (0, 0, [0, 0, 0], 1)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_right_head_is_always_accepted_and_one_with_swapped_halves_hardly(moe, tmp_path):
    prompts = [cycle_row(19), cycle_row(7, start=400)]
    for swapped in (False, True):
        source = Checkpoint.open(write_oracle(tmp_path / str(swapped), moe, swap_halves=swapped))
        found = speculate(source, map_of(source), prompts, tokens=13, drafts=3, timing=0)
        for prompt, row in zip(prompts, found.rows, strict=True):
            assert [*prompt, *row.tokens] == cycle_row(len(prompt) + 13, start=5 if prompt[0] == prompts[0][0] else 400)
        if swapped:
            assert max(found.acceptance) < 0.1
        else:
            assert found.acceptance == [1, 1, 1] and found.mean_length == 4 and found.rounds == 6


def predicted(source, map, prompt, tokens, drafts):
    """How many drafts each round accepts, from the teacher-forced measure along the greedy text: where all drafts so far were right, a head that runs free and
    one that reads the text have read the same."""
    trunk, head = Trunk(source, map), MtpHead(source, map)
    text = torch.tensor([prompt + generate(Decoder(trunk).begin(), prompt, tokens + drafts)])
    hidden = trunk.forward(text)
    right = accepted(trunk.greedy(hidden), draft_tokens(trunk, head, hidden, text, drafts))[0].sum(-1).tolist()
    written, counts = 1, []
    while written < tokens:
        counts.append(right[len(prompt) + written - 2])  # the last position that the trunk has read
        written += 1 + counts[-1]
    return counts


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_demo_checkpoints_write_what_they_write_without_drafts(name):
    folder = checkpoint(name)
    source = Checkpoint.open(folder)
    map = map_of(source)
    prompts = held_out_rows(folder, documents=3, length=40).ids.tolist()
    seen = []
    found = speculate(
        source, map, prompts, tokens=24, drafts=2, timing=0, progress=lambda done, rows: seen.append((done, rows))
    )
    decoder = Decoder(Trunk(source, map))
    assert [row.tokens for row in found.rows] == [generate(decoder.begin(), prompt, 24) for prompt in prompts]
    counts = [predicted(source, map, prompt, 24, 2) for prompt in prompts]
    assert [row.accepted for row in found.rows] == counts, (
        "every round drafts what a head drafts that reads the written text as a whole"
    )
    assert found.prompts == prompts and seen == [(1, 3), (2, 3), (3, 3)]
    assert 0.4 < found.acceptance[0] < 1 and 0.2 < found.acceptance[1] < found.acceptance[0]
    assert min(found.costs.one, found.costs.window, found.costs.head) > 0 and found.costs.head < found.costs.window


def test_rows_draw_from_chances_of_their_own_and_the_seed_decides():
    source = tiny_source()
    map, prompts = map_of(source), [[5, 6, 7], [5, 6, 7]]
    first, again, other = (
        speculate(source, map, prompts, tokens=6, drafts=2, timing=0, temperature=2.0, seed=seed) for seed in (1, 1, 9)
    )
    rows = [[row.tokens for row in found.rows] for found in (first, again, other)]
    assert rows[0] == rows[1] != rows[2] and rows[0][0] != rows[0][1]
    assert first.sampling == Sampling(temperature=2.0) and first.seed == 1


def test_bounded_memory_writes_the_same():
    source = tiny_source(moe=True)
    map = map_of(source)
    found = [speculate(source, map, [[3, 4, 5]], tokens=5, drafts=2, timing=0, keep=keep).rows for keep in (2**30, 0)]
    assert found[0] == found[1]


def test_what_cannot_be_measured_is_refused():
    source = tiny_source(mtp=None)
    with pytest.raises(CheckpointError, match="no MTP head"):
        speculate(source, map_of(source), [[1]], tokens=3, drafts=2)
    source = tiny_source()
    with pytest.raises(UserError, match="top_p 2"):
        speculate(source, map_of(source), [[1]], tokens=3, drafts=2, top_p=2)
    source.values["model.language_model.layers.2.post_attention_layernorm.weight"] *= torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        speculate(source, map_of(source), [[1]], tokens=3, drafts=2)
