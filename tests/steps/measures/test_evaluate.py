import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError, PlanError, TextError
from qwench.evaluation.speculation import speculate
from qwench.formats import adapter
from qwench.models import map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.steps.measures.evaluate import differing_tokens, evaluate
from qwench.stream.rows import Rows, ids_sha256
from tests.support.tiny import write_tiny

ROWS, LENGTH = 3, 19


def rows(count=ROWS, length=LENGTH, vocabulary=352):
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(2))
    return Rows(ids, tuple(range(count)), tuple("abcdefg"[:count]), "random ids", "ab" * 32, ids_sha256(ids))


def changed_copy(source, folder, change):
    """A copy of a one-file checkpoint with `change` applied to each (name, tensor)."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {n: change(n, t).contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def noisy(part):
    generator = torch.Generator().manual_seed(7)

    def change(name, tensor):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.1
        return (tensor.float() + noise).to(tensor.dtype) if part in name and tensor.dim() == 2 else tensor

    return change


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("source") / "m", vision=False)


@pytest.fixture(scope="module")
def release(source, tmp_path_factory):
    return changed_copy(source, tmp_path_factory.mktemp("release") / "r", noisy("layers.2.mlp"))


def test_a_checkpoint_against_itself_is_exactly_zero(source):
    seen = []
    found = evaluate(source, source, rows(), seen.append)
    assert found.divergence.mean.mean == 0.0 and found.divergence.max == 0.0 and found.hidden_error_by_layer == [0.0] * 4
    assert {layer.mean for layer in found.divergence_by_layer.by_layer} == {0.0} and found.without_corrections is None
    assert found.top1_agreement.mean == 1.0 and found.perplexity_source == found.perplexity_release
    assert found.acceptance_source == found.acceptance_release and len(found.acceptance_source.by_position) == 3
    assert (found.documents, found.length, found.tokens) == (ROWS, LENGTH, ROWS * (LENGTH - 1))
    assert found.compute_dtype == "float32" and found.ids_sha256 == rows().ids_sha256 and found.text == "random ids"
    assert [p.block for p in seen] == [1, 2, 3, 4]


def test_numbers_equal_those_of_whole_logits(source, release):
    """The same measures, written out over whole [rows, length, vocabulary] logits in float64."""
    found = evaluate(release, source, rows())
    ids = rows().ids
    logits = []
    for folder in (source, release):
        checkpoint = Checkpoint.open(folder)
        trunk = Trunk(checkpoint, map_of(checkpoint))
        logits.append(trunk.logits(trunk.forward(ids)).double())
    log_p, log_q = (torch.log_softmax(values[:, :-1], -1) for values in logits)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert found.divergence.mean.mean == pytest.approx(float(divergence.mean()), rel=1e-4) and float(divergence.mean()) > 1e-5
    assert found.divergence.mean.standard_error == pytest.approx(float(divergence.mean(1).std()) / ROWS**0.5, rel=1e-3)
    assert found.divergence.max == pytest.approx(float(divergence.max()), rel=1e-3)
    loss = -log_q.gather(-1, ids[:, 1:, None]).mean()
    assert found.perplexity_release.mean == pytest.approx(float(loss.exp()), rel=1e-5)
    increase = (log_p - log_q).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)
    assert found.loss_increase.mean == pytest.approx(float(increase.mean()), rel=1e-3)
    assert found.loss_increase.standard_error == pytest.approx(float(increase.std()) / ROWS**0.5, rel=1e-3)
    assert found.top1_agreement.mean == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert sum(found.divergence.histogram_counts) == found.tokens


def test_error_begins_at_the_changed_layer_which_alone_adds_any(source, release):
    found = evaluate(release, source, rows())
    error, own = found.hidden_error_by_layer, found.own_error_by_layer
    assert error[:2] == [0.0, 0.0] and error[2] > 1e-3 and error[3] > 1e-4
    assert own[2] > 1e-3 and [own[0], own[1], own[3]] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_divergence_by_layer_begins_at_the_changed_layer_and_ends_with_the_divergence(source, release):
    """Fewer tokens than positions are asked for: all are read, so the last layer's mean is that of all tokens."""
    found = evaluate(release, source, rows())
    by_layer = found.divergence_by_layer
    assert by_layer.positions == found.tokens == ROWS * (LENGTH - 1)
    means = [layer.mean for layer in by_layer.by_layer]
    assert means[:2] == [0.0, 0.0] and min(means[2:]) > 1e-6
    assert means[3] == pytest.approx(found.divergence.mean.mean, rel=1e-3)
    assert by_layer.by_layer[3].standard_error == pytest.approx(found.divergence.mean.standard_error, rel=1e-3)


@pytest.fixture(scope="module")
def corrected(source, release, tmp_path_factory):
    """The release with corrections of rank 24 for the MLP of layer 2, and the same with them added to its weights."""
    place = tmp_path_factory.mktemp("corrected")
    folder, stored = changed_copy(release, place / "c", lambda name, tensor: tensor), load_file(release / "model.safetensors")
    original = load_file(source / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in stored if "layers.2.mlp" in name]
    factors = {}
    for module in modules:
        difference = original[f"{module}.weight"].float() - stored[f"{module}.weight"].float()
        left, size, right = torch.linalg.svd(difference, full_matrices=False)
        factors[module] = ((size[:24, None] * right[:24]).contiguous(), left[:, :24].contiguous())
    (folder / adapter.FOLDER).mkdir()
    shapes = {module: tuple(stored[f"{module}.weight"].shape) for module in modules}
    config = adapter.adapter_config(shapes, 24, "base")
    (folder / adapter.FOLDER / adapter.CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    packed = {name: tensor for module in modules for name, tensor in adapter.pack(module, factors[module]).items()}
    save_file(packed, folder / adapter.FOLDER / adapter.WEIGHTS_NAME, metadata={"format": "pt"})

    def merged(name, tensor):
        right, left = factors.get(name.removesuffix(".weight"), (None, None))
        return tensor if right is None else tensor.float() + left @ right

    return folder, changed_copy(release, place / "merged", merged)


def test_corrections_are_measured_with_and_without_in_one_pass(source, release, corrected, quick):
    folder, merged = corrected
    seen = []
    found = evaluate(folder, source, rows(length=70), seen.append, speculate=3)
    assert found.corrections == 3 and [p.block for p in seen] == [1, 2, 3, 4]
    alone = [evaluate(place, source, rows(length=70), speculate=3) for place in (merged, release)]
    assert alone[0].divergence.mean.mean < 0.8 * alone[1].divergence.mean.mean, "the corrections bring it nearer"
    for both, one in zip((found, found.without_corrections), alone, strict=True):
        assert both.divergence.mean.mean == pytest.approx(one.divergence.mean.mean, rel=1e-4)
        assert both.hidden_error_by_layer == pytest.approx(one.hidden_error_by_layer, rel=1e-4)
        layers = [[layer.mean for layer in side.divergence_by_layer.by_layer] for side in (both, one)]
        assert layers[0] == pytest.approx(layers[1], rel=1e-3, abs=1e-9)
        assert both.perplexity_release.mean == pytest.approx(one.perplexity_release.mean, rel=1e-6)
        assert both.acceptance_release == one.acceptance_release and both.top1_agreement == one.top1_agreement
        assert (both.speculation_release.drafted, both.speculation_release.accepted) == (
            one.speculation_release.drafted,
            one.speculation_release.accepted,
        )
    assert alone[1].without_corrections is None and alone[1].corrections == 0
    assert found.perplexity_source == alone[0].perplexity_source and found.acceptance_source == alone[0].acceptance_source


def test_acceptance_equals_a_literal_count(source, tmp_path):
    """Row by row and position by position, from the head's and the trunk's own logits; an lm_head that only ever says one of three tokens,
    so that random drafts are sometimes accepted."""

    def few(name, tensor):
        return torch.cat([tensor[:2], torch.zeros_like(tensor[2:])]) if name == "lm_head.weight" else tensor

    folder = changed_copy(source, tmp_path / "few", few)
    found = evaluate(folder, source, rows()).acceptance_release
    checkpoint = Checkpoint.open(folder)
    trunk, head = Trunk(checkpoint, map_of(checkpoint)), MtpHead(checkpoint, map_of(checkpoint))
    hidden, ids = trunk.forward(rows().ids), rows().ids
    choice = trunk.logits(hidden).argmax(-1)
    drafts = [trunk.logits(step).argmax(-1) for step in head.drafts(hidden, trunk.embed(ids), 3)]
    counts = [0, 0, 0]
    for row in range(ROWS):
        for t in range(LENGTH - 3):
            for k in (1, 2, 3):
                if drafts[k - 1][row, t] != choice[row, t + k]:
                    break
                counts[k - 1] += 1
    assert ROWS * (LENGTH - 3) > counts[0] > counts[1] > counts[2] > 0
    assert [p.mean for p in found.by_position] == pytest.approx([c / (ROWS * (LENGTH - 3)) for c in counts])


@pytest.fixture
def quick(monkeypatch):
    """Costs of steps measured a few times only."""
    monkeypatch.setattr("qwench.steps.measures.speculation.speculate", partial(speculate, timing=0))


def test_speculation_is_measured_where_it_is_asked_for(source, release, quick):
    assert evaluate(release, source, rows()).speculation_source is None
    found = evaluate(release, source, rows(length=70), speculate=5)
    for side in (found.speculation_source, found.speculation_release):
        assert (side.drafts, side.prompts, side.prompt_length, side.tokens, side.temperature) == (2, ROWS, 64, 5, 0)
        assert side.prompts_sha256 == ids_sha256(rows(length=70).ids[:, :64]) != found.ids_sha256
        assert side.drafted == 2 * side.rounds and side.by_position[0].mean + side.by_position[1].mean == pytest.approx(
            side.accepted / side.rounds
        )
        assert (
            side.mean_length.mean == pytest.approx(1 + side.accepted / side.rounds)
            and side.speedup > 0
            and side.unsteadiness >= 1
        )
    assert found.speculation_release.rounds == ROWS * 4, "a random head is refused: a round for each token after the first"


def test_mtp_missing_in_the_release_is_fine(source, tmp_path, quick):
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["mtp_num_hidden_layers"] = 0
    tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if not n.startswith("mtp.")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = evaluate(tmp_path, source, rows(), speculate=2)
    assert found.speculation_release is None and found.speculation_source is not None
    assert found.acceptance_release is None and found.acceptance_source is not None and found.divergence.max == 0.0


def test_different_vocabularies_and_depths_are_refused_at_once(source, tmp_path):
    other = write_tiny(tmp_path / "moe", moe=True, vision=False)
    with pytest.raises(PlanError, match="the source has 352 tokens in its vocabulary, the release 416"):
        evaluate(other, source, rows())


def test_infinite_weights_name_the_layer(source, tmp_path):
    def poison(name, tensor):
        return torch.full_like(tensor, float("inf")) if name.endswith("layers.1.post_attention_layernorm.weight") else tensor

    broken = changed_copy(source, tmp_path / "broken", poison)
    with pytest.raises(CheckpointError, match="release's hidden states are not finite after decoder layer 1: row 0"):
        evaluate(broken, source, rows())


@pytest.mark.parametrize(("count", "length", "message"), [(1, 19, "no standard error"), (2, 3, "too short for 3 drafts")])
def test_rows_that_cannot_be_measured_are_refused_before_work(source, count, length, message):
    with pytest.raises(TextError, match=message):
        evaluate(source, source, rows(count, length), lambda p: pytest.fail("worked"))


def save_words(folder, words):
    folder.mkdir()
    bpe = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    return folder


def test_tokenizers_are_compared_id_by_id(tmp_path):
    first = save_words(tmp_path / "a", ["no", "red", "green", "blue"])
    swapped = save_words(tmp_path / "b", ["no", "green", "red", "blue", "new"])
    (tmp_path / "empty").mkdir()
    assert differing_tokens(first, first) == 0 and differing_tokens(first, tmp_path / "empty") == 0
    assert differing_tokens(first, swapped) == 3
