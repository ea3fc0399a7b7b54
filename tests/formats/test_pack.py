"""pack.py: golden words, the bit stream against plain Python, round trips over random and extreme codes."""

from __future__ import annotations

import pytest
import torch

from percard.formats.pack import pack, unpack, word_count
from percard.formats.spec import FormatError


def words_of(rows: list[list[str]]) -> torch.Tensor:
    """Hex words as int32."""
    numbers = [[int(word, 16) for word in row] for row in rows]
    return torch.tensor([[n - (1 << 32) if n >= 1 << 31 else n for n in row] for row in numbers], dtype=torch.int32)


def signed(codes: list[int], bits: int) -> torch.Tensor:
    """Unsigned codes of one row as signed int8 [1, n]."""
    return torch.tensor([[u - (1 << (bits - 1)) for u in codes]], dtype=torch.int8)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        pytest.param(4, list(range(1, 9)), ["87654321"], id="G1"),
        pytest.param(8, [0, 127, 128, 255], ["FF807F00"], id="G6"),
        pytest.param(4, list(range(1, 12)), ["87654321", "00000BA9"], id="G7"),
        pytest.param(3, [*range(8), 1, 2, 3], ["D1FAC688", "00000000"], id="G8-dense"),
        pytest.param(3, list(range(8)) * 4, ["88FAC688", "C688FAC6", "FAC688FA"], id="G9"),
    ],
)
def test_golden_words(bits: int, codes: list[int], words: list[str]) -> None:
    q = signed(codes, bits)
    assert torch.equal(pack(q, bits), words_of([words]))
    assert torch.equal(unpack(words_of([words]), bits, len(codes)), q)


def test_golden_zero_points_along_rows() -> None:
    """G4: zero points are packed along the output rows."""
    z = torch.tensor([[r - 8, 7 - r] for r in range(10)], dtype=torch.int8)
    words = words_of([["76543210", "89ABCDEF"], ["00000098", "00000067"]])
    assert torch.equal(pack(z, 4, dim=0), words)
    assert pack(z, 4, dim=0).is_contiguous()
    assert torch.equal(unpack(words, 4, 10, dim=0), z)


def stream_words(row: list[int], bits: int) -> list[int]:
    """The rule in plain Python: one long integer, cut every 32 bits."""
    number = sum((q + (1 << (bits - 1))) << (i * bits) for i, q in enumerate(row))
    return [(number >> (32 * w)) & 0xFFFFFFFF for w in range(word_count(len(row), bits))]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 8, 11, 31, 32, 33, 64, 97])
def test_stream_and_inverse(bits: int, n: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + n)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (5, n), generator=generator).to(torch.int8)
    q[0] = -half
    q[1] = half - 1
    words = pack(q, bits)
    assert words.shape == (5, word_count(n, bits))
    assert [[w & 0xFFFFFFFF for w in row] for row in words.tolist()] == [stream_words(row, bits) for row in q.tolist()]
    assert torch.equal(unpack(words, bits, n), q)
    assert torch.equal(unpack(pack(q, bits, dim=0), bits, 5, dim=0), q)


def test_every_code_and_strides() -> None:
    for bits in (3, 4, 8):
        half = 1 << (bits - 1)
        q = torch.arange(-half, half, dtype=torch.int16).to(torch.int8).repeat(3, 2)
        assert torch.equal(unpack(pack(q[:, ::2], bits), bits, q[:, ::2].shape[1]), q[:, ::2])
        assert torch.equal(unpack(pack(q.t(), bits).t().contiguous().t(), bits, 3), q.t())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_single_rows_and_columns(bits: int) -> None:
    """Transposed single rows and columns call themselves contiguous, with strides that a view of bytes refuses."""
    q = torch.randint(-4, 4, (24, 1), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert torch.equal(unpack(pack(q, bits, dim=0), bits, 24, dim=0), q)
    assert torch.equal(pack(q.t(), bits), pack(q.t().clone(), bits))
    words = pack(q, bits)
    assert torch.equal(unpack(words.t().clone().t(), bits, 1), q)
    assert torch.equal(unpack(words.t().t().contiguous(), bits, 1), q)


def test_empty() -> None:
    for bits in (3, 4, 8):
        assert pack(torch.empty(0, 16, dtype=torch.int8), bits).shape == (0, word_count(16, bits))
        assert unpack(torch.empty(0, word_count(16, bits), dtype=torch.int32), bits, 16).shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack(torch.tensor([[8]], dtype=torch.int8), 4), "reach from 8 to 8"),
        (lambda: pack(torch.tensor([[-5]], dtype=torch.int8), 3), "3 bits hold -4..3"),
        (lambda: pack(torch.zeros(1, 4), 4), "int8 codes"),
        (lambda: pack(torch.zeros(1, 4, dtype=torch.int8), 9), "2 to 8 bits"),
        (lambda: unpack(torch.zeros(1, 2, dtype=torch.int32), 4, 8), "2 words along dim 1, expected 1"),
        (lambda: unpack(torch.zeros(1, 2), 4, 16), "int32 words"),
    ],
)
def test_refuses(call, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        call()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_single_group_packs_along_rows(bits):
    codes = torch.arange(-8, 8, dtype=torch.int8)[
        :, None
    ]  # [16, 1]: its transpose is a row with the stride of a column
    assert torch.equal(unpack(pack(codes, bits, 0), bits, 16, 0), codes)
