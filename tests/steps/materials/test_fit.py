"""How a graft fits: distances against sums written out, and tokenizers against their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qwench.checkpoint.hub import Located
from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.recipe import Graft
from qwench.result import Distance
from qwench.steps.materials import fit
from qwench.steps.materials.fit import distance, graft_facts
from tests.support.memory import tiny_source
from tests.support.tiny import write_tiny

EMBED = "model.language_model.embed_tokens.weight"


def test_a_distance_is_relative_to_the_donors_matrix() -> None:
    trunk, donor = tiny_source(seed=1), tiny_source(seed=1)
    assert distance(trunk, donor, "embed") == Distance(relative_rms=0.0, rows=352, of_rows=352)
    trunk.values[EMBED] = trunk.values[EMBED].float() * 1.25
    found = distance(trunk, donor, "embed")
    assert found is not None
    assert found.relative_rms == pytest.approx(0.25, rel=1e-6)
    ours, theirs = trunk.values["lm_head.weight"].double(), donor.values["lm_head.weight"].double() * 2
    donor.values["lm_head.weight"] = theirs.float()
    head = distance(trunk, donor, "head")
    assert head is not None
    assert head.relative_rms == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-6)


def test_a_large_matrix_is_sampled_evenly_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fit, "SAMPLED_ROWS", 27)
    trunk, donor = tiny_source(seed=1), tiny_source(seed=1)
    trunk.values[EMBED] = trunk.values[EMBED].clone()
    trunk.values[EMBED][351] += 3
    found = distance(trunk, donor, "embed")
    assert found is not None and (found.rows, found.of_rows) == (27, 352)
    rows = torch.linspace(0, 351, 27).long()
    ours, theirs = trunk.values[EMBED].double()[rows], donor.values[EMBED].double()[rows]
    assert found.relative_rms == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-6)
    assert found.relative_rms > 0


def test_rows_that_only_one_side_has_are_left_out() -> None:
    trunk, donor = tiny_source(seed=1), tiny_source(seed=1)
    trunk.config["text_config"]["vocab_size"] = 360
    trunk.values[EMBED] = torch.cat([trunk.values[EMBED], torch.ones(8, 128, dtype=torch.bfloat16)])
    assert distance(trunk, donor, "embed") == Distance(relative_rms=0.0, rows=352, of_rows=352)


def test_what_is_not_at_hand_has_no_distance() -> None:
    trunk, donor = tiny_source(), tiny_source()
    del donor.values[EMBED]
    assert distance(trunk, donor, "embed") is None
    assert distance(tiny_source(tied=True), trunk, "head") is None


def facts_of(trunk: Path, donor: Path) -> fit.GraftFacts:
    return graft_facts(Checkpoint.open(trunk), Checkpoint.open(donor), Located(donor, "org/base", "abc"), Graft())


def test_tokenizers_are_held_against_each_other_token_by_token(tmp_path: Path) -> None:
    trunk, donor = write_tiny(tmp_path / "trunk", mtp=None), write_tiny(tmp_path / "donor")
    for folder in (trunk, donor):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoint("dense") / name, folder)
    same = facts_of(trunk, donor)
    assert (same.differing_tokens, same.differing_ids) == (0, [])
    assert same.vocabulary_sha256 is not None and len(set(same.vocabulary_sha256)) == 1
    data = json.loads((donor / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, other = (next(t for t, i in vocabulary.items() if i == number) for number in (301, 302))
    vocabulary[one], vocabulary[other] = 302, 301
    (donor / "tokenizer.json").write_text(json.dumps(data))
    changed = facts_of(trunk, donor)
    assert (changed.differing_tokens, changed.differing_ids) == (2, [301, 302])
    assert changed.vocabulary_sha256 is not None and len(set(changed.vocabulary_sha256)) == 2
    assert any("2 tokens have another id" in note for note in changed.notes)
    assert (changed.donor, changed.revision, changed.tensors) == ("org/base", "abc", 15)


def test_missing_tokenizers_are_said_to_be_missing(tmp_path: Path) -> None:
    facts = facts_of(write_tiny(tmp_path / "trunk", mtp=None), write_tiny(tmp_path / "donor"))
    assert facts.differing_tokens is None
    assert "the tokenizers were not compared: the source's is not at hand" in facts.notes
