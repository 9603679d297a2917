"""A GGUF file read back under the checkpoint's names: the same values, the same network, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.formats.gguf_source import GgufSource
from qwench.models import map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.numerics.ggml import decode, encode
from tests.support.gguf_files import make_gguf
from tests.support.oracle import write_runnable


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("source") / "m", moe=request.param)


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def test_every_value_comes_back(folder: Path, tmp_path: Path) -> None:
    source, found = Checkpoint.open(folder), GgufSource(make_gguf(folder, tmp_path / "m.gguf"), config(folder))
    assert found.tensors.keys() == {n for n in source.tensors if "visual" not in n}
    for name, entry in found.tensors.items():
        expected = source.read(name).float()
        value = found.read(name)
        assert value.shape == entry.shape == expected.shape
        if "norm" in name or "A_log" in name:
            torch.testing.assert_close(value, expected, rtol=0, atol=5e-7)
        else:
            assert torch.equal(value, expected), name


def test_parts(folder: Path, tmp_path: Path) -> None:
    found = GgufSource(make_gguf(folder, tmp_path / "m.gguf", file_type="Q4_0"), config(folder))
    for name, entry in found.tensors.items():
        if len(entry.shape) > 1 and entry.shape[0] > 2:
            whole = found.read(name)
            assert torch.equal(found.read(name, (slice(1, 3),)), whole[1:3])
            assert torch.equal(found.read(name, (1, slice(0, 1))), whole[1, :1])
            assert torch.equal(found.read(name, (-1,)), whole[-1])


def test_a_few_rows_of_the_embedding_are_decoded_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = GgufSource(make_gguf(folder, tmp_path / "m.gguf", file_type="Q8_0"), config(folder))
    sizes, dequantize = [], gguf.dequantize

    def counting(data: Any, kind: Any) -> Any:
        sizes.append(data.size)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", counting)
    name = "model.language_model.embed_tokens.weight"
    part = found.read(name, (slice(7, 9),))
    assert sizes == [2 * 128 // 32 * 34]
    assert torch.equal(part, found.read(name)[7:9])


def test_quantized_values_are_those_of_the_type(folder: Path, tmp_path: Path) -> None:
    found = GgufSource(make_gguf(folder, tmp_path / "m.gguf", file_type="Q5_0"), config(folder))
    name = "model.language_model.layers.3.self_attn.o_proj.weight"
    weight = Checkpoint.open(folder).read(name).float()
    assert torch.equal(found.read(name), decode("Q5_0", encode("Q5_0", weight), weight.shape[1]))
    assert found.types["blk.3.attn_output.weight"] == "Q5_0"


def test_the_network_runs(folder: Path, tmp_path: Path) -> None:
    source, ids = Checkpoint.open(folder), torch.arange(5, 29)[None]
    found = GgufSource(make_gguf(folder, tmp_path / "m.gguf", file_type="F32"), config(folder))
    ours, theirs = Trunk(source, map_of(source)), Trunk(found, found.map)
    hidden = ours.forward(ids)
    torch.testing.assert_close(theirs.forward(ids), hidden, rtol=1e-4, atol=1e-4)
    head, other = MtpHead(source, ours.map), MtpHead(found, found.map)
    expected = head.drafts(hidden, ours.embed(ids), 2)
    for left, right in zip(other.drafts(hidden, ours.embed(ids), 2), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_without_a_head(folder: Path, tmp_path: Path) -> None:
    found = GgufSource(make_gguf(folder, tmp_path / "m.gguf", content="trunk"), config(folder))
    assert not found.map.has_mtp and not any(n.startswith("mtp.") for n in found.tensors)
    with pytest.raises(CheckpointError, match=r"holds nothing of mtp\.fc\.weight"):
        found.read("mtp.fc.weight")


def test_of_another_network(folder: Path, tmp_path: Path) -> None:
    path, other = make_gguf(folder, tmp_path / "m.gguf"), config(folder)
    other["text_config"]["vocab_size"] = 1600
    with pytest.raises(CheckpointError, match=r"output.weight is \[1504, 128\], config.json says \[1600, 128\]"):
        GgufSource(path, other)
    with pytest.raises(CheckpointError, match=r"lacks blk\.0\."):
        GgufSource(make_gguf(folder, tmp_path / "h.gguf", content="mtp"), config(folder))


def test_no_gguf_and_half_a_gguf(folder: Path, tmp_path: Path) -> None:
    path = make_gguf(folder, tmp_path / "m.gguf")
    data = path.read_bytes()
    for broken in (b"", b"GGUF", data[:100], data[:-3000], b"x" * 4000):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
            GgufSource(path, config(folder))
