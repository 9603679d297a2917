"""The streamed forward against the model that transformers loads from the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError, UserError
from qwench.models import map_of
from qwench.models.run import Trunk
from tests.support.memory import tiny_source
from tests.support.tiny import write_tiny

LAYOUTS: list[dict[str, Any]] = [
    dict(moe=False, layout="conditional"),
    dict(moe=False, layout="causal", tied=True),
    dict(moe=True, layout="conditional", trunk_experts="fused"),
    dict(moe=True, layout="conditional", trunk_experts="single", shards=3),
    dict(moe=True, layout="causal", trunk_experts="single", mtp="fused"),
    dict(moe=True, layout="causal", trunk_experts="fused"),
]


def reference(folder: Path, conditional: bool, dtype: torch.dtype = torch.float32) -> Any:
    loader = AutoModelForImageTextToText if conditional else AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "-".join(str(v) for v in o.values()))
@torch.no_grad()
def test_forward_equals_transformers(options: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    folder = write_tiny(tmp_path / "m", **options)
    ids = torch.randint(10, 350, (3, 23), generator=torch.Generator().manual_seed(1))
    expected = reference(folder, options["layout"] == "conditional")(ids).logits
    with Checkpoint.open(folder) as source:
        trunk = Trunk(source, map_of(source))
        found = trunk.logits(trunk.forward(ids))
    difference = float((found - expected).abs().max() / expected.std())
    record_property("largest difference over the logits' deviation", difference)
    print(f"{options}: {difference:.1e} of the logits' deviation")
    assert difference < 1e-4


@torch.no_grad()
def test_image_positions_are_used(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=True)
    ids = torch.randint(10, 400, (2, 17), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(17).expand(3, 2, 17).clone()
    positions[1, :, 4:10] += torch.tensor([0, 0, 1, 1, 2, 2])
    positions[2, :, 4:10] += torch.tensor([0, 1, 0, 1, 0, 1])
    expected = reference(folder, True).model.language_model(input_ids=ids, position_ids=positions).last_hidden_state
    with Checkpoint.open(folder) as source:
        trunk = Trunk(source, map_of(source))
        found, text = trunk.forward(ids, positions), trunk.forward(ids)
    assert (found - expected).abs().max() < 1e-4
    assert (text - expected).abs().max() > 1e-2


@torch.no_grad()
def test_rows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(moe=True)
    trunk = Trunk(source, map_of(source))
    ids = torch.randint(10, 400, (5, 9), generator=torch.Generator().manual_seed(3))
    together = trunk.forward(ids)
    monkeypatch.setattr("qwench.models.run.POSITIONS", 18)
    assert torch.allclose(trunk.forward(ids), together, atol=1e-5)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@torch.no_grad()
def test_bfloat16_equals_transformers_in_bfloat16(moe: bool, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=moe)
    ids = torch.randint(10, 350, (2, 21), generator=torch.Generator().manual_seed(4))
    expected = reference(folder, True, torch.bfloat16)(ids).logits
    with Checkpoint.open(folder) as source:
        trunk = Trunk(source, map_of(source), torch.bfloat16)
        found = trunk.logits(trunk.forward(ids))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).abs().max() / expected.float().std() < 1e-2


def test_embedding_reads_only_rows_that_occur() -> None:
    source = tiny_source()
    trunk = Trunk(source, map_of(source))
    ids = torch.tensor([[350, 7, 9, 7], [200, 8, 351, 0]])
    name = "model.language_model.embed_tokens.weight"
    assert torch.equal(trunk.embed(ids), source.values[name].float()[ids])
    assert [part for read, part in source.reads if read == name] == [
        (slice(0, 1),),
        (slice(7, 10),),
        (slice(200, 201),),
        (slice(350, 352),),
    ]


def test_parts_of_the_vocabulary_are_the_logits() -> None:
    source = tiny_source()
    trunk = Trunk(source, map_of(source))
    hidden = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(5))
    whole = hidden @ source.values["lm_head.weight"].float().T
    parts = list(trunk.logit_parts(hidden, rows=100))
    assert [part for part, _ in parts] == [slice(0, 100), slice(100, 200), slice(200, 300), slice(300, 352)]
    assert torch.allclose(torch.cat([values for _, values in parts], -1), whole, atol=1e-5)
    assert torch.allclose(trunk.logits(hidden), whole, atol=1e-5)


def test_greedy_is_the_first_largest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source()
    head = source.values["lm_head.weight"]
    head[300] = head[11]  # a tie across parts of the vocabulary
    trunk = Trunk(source, map_of(source))
    hidden = torch.cat([torch.randn(6, 128, generator=torch.Generator().manual_seed(6)), 9 * head[11].float()[None]])
    monkeypatch.setattr("qwench.models.run.VOCABULARY_ROWS", 64)
    assert torch.equal(trunk.greedy(hidden), trunk.logits(hidden).argmax(-1))
    assert int(trunk.greedy(hidden)[-1]) == 11


def test_a_fused_expert_is_read_in_parts() -> None:
    source = tiny_source(moe=True)
    trunk = Trunk(source, map_of(source))
    trunk.run_block(0, torch.zeros(1, 3, 128))
    fused = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert [part for name, part in source.reads if name == fused][:3] == [
        (0, slice(0, 256)),
        (0, slice(256, 512)),
        (1, slice(0, 256)),
    ]


def test_float16_is_refused() -> None:
    source = tiny_source()
    with pytest.raises(UserError, match="float16 cannot hold"):
        Trunk(source, map_of(source), torch.float16)


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    source = tiny_source()
    with pytest.raises(CheckpointError, match="5 to 352, the embedding has 352 rows"):
        Trunk(source, map_of(source)).embed(torch.tensor([[5, 352]]))
