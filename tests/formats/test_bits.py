from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from qwench.formats.bits import pack_nibbles, pack_rows, pack_words, unpack_nibbles, unpack_rows, unpack_words
from qwench.numerics.float4 import E2M1

GENERATOR = torch.Generator().manual_seed(0)


def test_low_nibble_is_the_even_column() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [7, 8, 0, 9]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F], [0x87, 0x90]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_fp4_codes_lie_as_the_library_packs_their_values() -> None:
    codes = torch.randint(0, 16, (33, 70), generator=GENERATOR, dtype=torch.uint8)
    values = torch.tensor([*E2M1, *(-m for m in E2M1)])[codes.long()]
    assert torch.equal(pack_nibbles(codes), pack_fp4_to_uint8(values))


def test_eight_nibbles_fill_a_word_lowest_first() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 7]], dtype=torch.int8)
    assert pack_words(codes, 4).tolist() == [[0x76543210, 15]]
    assert pack_words(codes[:, :5], 8).tolist() == [[0x7B7A7978, 0x7C]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 64), (3, 13), (7, 8), (1, 1), (600, 300)])
def test_words_equal_the_library_both_ways(bits: int, shape: tuple[int, int]) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, shape, generator=GENERATOR, dtype=torch.int8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_words(words, bits, shape[1]), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape)), codes)
    down = pack_rows(codes, bits)
    assert torch.equal(down, pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(unpack_rows(down, bits, shape[0]), codes)
