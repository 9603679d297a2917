"""The order of value heads against a list written by hand and against what llama.cpp does with it; the other transforms."""

from __future__ import annotations

import torch

from qwench.formats.gguf_transforms import Frame, NegativeExponential, PlusOne, Squeeze, TileHeads


def test_heads_of_two_keys_and_six_values_by_hand() -> None:
    tile = TileHeads(keys=2, values=6, width=2, start=3)
    grouped = torch.tensor([[-1], [-2], [-3], [0], [1], [10], [11], [20], [21], [30], [31], [40], [41], [50], [51]])
    tiled = [-1, -2, -3, 0, 1, 30, 31, 10, 11, 40, 41, 20, 21, 50, 51]
    assert tile.apply(grouped).flatten().tolist() == tiled


def test_a_tiled_head_meets_the_key_that_its_group_had() -> None:
    keys, values = 3, 12
    key_of_grouped = torch.arange(keys).repeat_interleave(values // keys)  # transformers: repeat_interleave
    tiled = TileHeads(keys, values, 1).apply(key_of_grouped)
    assert torch.equal(tiled, torch.arange(keys).repeat(values // keys))  # llama.cpp: ggml_repeat


def test_columns_and_rows_cancel_in_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, out = torch.randn(2 * 3 * 5, 7, generator=generator), torch.randn(11, 2 * 3 * 5, generator=generator)
    by_rows, by_columns = TileHeads(2, 6, 5), TileHeads(2, 6, 5, dimension=-1)
    assert not by_rows.by_rows and by_columns.by_rows
    torch.testing.assert_close(by_columns.apply(out) @ by_rows.apply(rows), out @ rows)
    assert not torch.equal(by_rows.apply(rows), rows)


def test_as_many_values_as_keys_stay_in_place() -> None:
    assert TileHeads(4, 4, 3, start=2).order().tolist() == list(range(14))


def test_the_others() -> None:
    assert PlusOne().apply(torch.tensor([-0.25, 0.5])).tolist() == [0.75, 1.5]
    torch.testing.assert_close(NegativeExponential().apply(torch.tensor([2.0]).log()), torch.tensor([-2.0]))
    convolution = torch.arange(15.0).reshape(5, 1, 3)
    assert torch.equal(Squeeze().apply(convolution), convolution[:, 0])
    patches = torch.arange(2.0 * 3 * 2 * 4 * 5).reshape(2, 3, 2, 4, 5)
    for frame in (0, 1):
        assert torch.equal(Frame(frame).apply(patches), patches[:, :, frame])
