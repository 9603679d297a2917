"""The two trained checkpoints that the package carries: our forward is transformers', our MTP head is the one that was trained."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.models import map_of
from qwench.models.modules import text_positions
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.models.weights import read_block, read_slot
from scripts.demo.network import Head


@pytest.mark.parametrize("which", ["dense", "moe"])
@torch.no_grad()
def test_streamed_logits_equal_transformers(which: Literal["dense", "moe"], record_property: Any) -> None:
    ids = torch.randint(0, 980, (2, 31), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint(which), dtype=torch.float32)(ids).logits
    with Checkpoint.open(checkpoint(which)) as source:
        trunk = Trunk(source, map_of(source))
        found = trunk.logits(trunk.forward(ids))
    difference = float((found - expected).abs().max())
    record_property("largest difference of a logit", difference)
    assert difference < 1e-4 * float(expected.std())


@pytest.mark.parametrize("which", ["dense", "moe"])
@torch.no_grad()
def test_the_head_is_the_one_that_was_trained(which: Literal["dense", "moe"]) -> None:
    ids = torch.randint(0, 980, (2, 19), generator=torch.Generator().manual_seed(2))
    with Checkpoint.open(checkpoint(which)) as source:
        map = map_of(source)
        trunk, head = Trunk(source, map), MtpHead(source, map)
        hidden, embedded = trunk.forward(ids), trunk.embed(ids)
        classes = moe if map.model_type == "qwen3_5_moe" else dense
        layer = getattr(classes, "Qwen3_5MoeDecoderLayer" if classes is moe else "Qwen3_5DecoderLayer")
        norm = getattr(classes, "Qwen3_5MoeRMSNorm" if classes is moe else "Qwen3_5RMSNorm")
        trained = Head(head.modules.layer("full_attention").self_attn.config, layer, norm)
        weights = {f"layers.0.{n}": w for n, w in read_block(source, map.mtp[0], "mtp.layers.0.", torch.float32).items()}
        weights |= {
            s.tensor.removeprefix("mtp."): read_slot(source, s, torch.float32) for s in map.others if s.role.startswith("mtp.")
        }
        trained.load_state_dict(weights)
        rope = trunk.modules.rope(text_positions(18), hidden)
        expected = trained(hidden[:, :-1], embedded[:, 1:], rope)
        assert torch.allclose(head.drafts(hidden, embedded, 1)[0], expected, atol=1e-4)
