"""layout.py: every packing against its picture, code by code; inverse; padding that counts nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from percard.formats import layout
from percard.formats.affine import dequantize
from percard.formats.layout import PACKINGS, padded_shape, repack
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import QuantTensor

SPECS = {
    4: ["w4a16", "w4a16-asym", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128", "w4a8", "w4a8-g64"],
    8: ["w8a8", "w8a16", "w8a16-asym", "w8a16-g128"],
}
BITS = {"planes16_w4": 4, "planes16_w8": 8, "planes8_w4": 4, "rows8": 8, "rows16_k4_w4": 4, "rows16_k4_w8": 8}


def random_tensor(n: int, k: int, name: str, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> QuantTensor:
    """Random codes with both extremes, random scales, random zeros."""
    spec = QuantSpec.parse(name)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (n, k), generator=generator).to(torch.int8)
    if codes.numel() > 1:
        codes.view(-1)[0], codes.view(-1)[-1] = spec.qmin, spec.qmax
    scale = (torch.rand(n, spec.groups(k), generator=generator) + 0.01).to(scale_dtype)
    zero = None
    if not spec.symmetric:
        zero = torch.randint(spec.qmin, spec.qmax + 1, scale.shape, generator=generator).to(torch.int8)
    return QuantTensor(codes, scale, zero, spec, "plain", (n, k))


CASES = [(p, s) for p, bits in BITS.items() for s in SPECS[bits]]


@pytest.mark.parametrize(("packing", "name"), CASES)
@pytest.mark.parametrize("shape", [(1, 128), (3, 256), (16, 384), (63, 128), (64, 128), (65, 640), (130, 1280)])
def test_inverse(packing: str, name: str, shape: tuple[int, int]) -> None:
    qt = random_tensor(*shape, name, seed=shape[0])
    packed = repack(qt, packing)
    n, k = padded_shape(shape, packing)
    assert packed.packing == packing and packed.shape == shape and packed.data.is_contiguous()
    assert packed.data.numel() * packed.data.element_size() == n * k * qt.spec.weight_bits // 8
    assert packed.scale.dtype == (torch.int32 if layout.has_words(qt.spec, packing) else torch.float32)
    assert packed.scale.shape[1] == n
    back = repack(packed, "plain")
    assert torch.equal(back.data, qt.data) and torch.equal(back.scale, qt.scale.float())
    assert (back.zero is None) == (qt.zero is None) and (qt.zero is None or torch.equal(back.zero, qt.zero))
    assert torch.equal(dequantize(back), dequantize(qt))


ODD = [(p, s, k) for p, s in CASES if "-g" not in s for k in (1, 7, 127, 129, 257)]
ODD += [(p, s, k) for p, s in CASES if "-g32" in s for k in (32, 96, 160)]


@pytest.mark.parametrize(("packing", "name", "k"), ODD)
def test_inverse_for_odd_inputs(packing: str, name: str, k: int) -> None:
    qt = random_tensor(5, k, name, torch.float16 if packing.startswith("planes16") else torch.float32, seed=k)
    back = repack(repack(qt, packing), "plain")
    assert torch.equal(back.data, qt.data) and torch.equal(back.scale, qt.scale)


def test_steps_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of rows give the bytes of one step."""
    for packing, bits in BITS.items():
        qt = random_tensor(300, 256, "w4a16-asym" if bits == 4 else "w8a16-asym")
        whole = repack(qt, packing)
        monkeypatch.setattr(layout, "_CHUNK", 1)
        parts = repack(qt, packing)
        assert torch.equal(whole.data, parts.data)
        assert torch.equal(repack(parts, "plain").data, qt.data)
        monkeypatch.undo()


def code_at(packed: QuantTensor, n: int, k: int) -> int:
    """The signed code of (n, k), read from the packed bytes as the pictures say, without any code of layout.py."""
    data = packed.data
    block, inside = divmod(k, 128)
    if packed.packing == "planes16_w4":
        plane, j = divmod(inside, 32)
        return ((int(data[n, block * 32 + j]) >> (4 * plane)) & 15) - 8
    if packed.packing == "planes16_w8":
        plane, j = divmod(inside, 64)
        byte = (int(data[n, block * 64 + j]) >> (8 * plane)) & 255
        return byte - 256 if byte > 127 else byte
    if packed.packing == "planes8_w4":
        plane, j = divmod(inside, 64)
        return ((int(data[n, block * 64 + j]) >> (4 * plane)) & 15) - 8
    if packed.packing == "rows8":
        return int(data[n, k])
    (b, r), memory = divmod(n, 16), data.reshape(-1)
    if packed.packing == "rows16_k4_w4":
        line, rest = divmod(k, 8)
        nibble, j = divmod(rest, 4)
        lines = padded_shape(packed.shape, packed.packing)[1] // 8
        return ((int(memory[(b * lines + line) * 64 + 4 * r + j]) >> (4 * nibble)) & 15) - 8
    line, j = divmod(k, 4)
    lines = padded_shape(packed.shape, packed.packing)[1] // 4
    return int(memory[(b * lines + line) * 64 + 4 * r + j])


@pytest.mark.parametrize("packing", BITS)
def test_bytes_follow_the_picture(packing: str) -> None:
    name = "w4a16-asym" if BITS[packing] == 4 else "w8a16-asym"
    qt = random_tensor(18, 136, name)
    packed = repack(qt, packing)
    n, k = padded_shape(qt.shape, packing)
    assert qt.zero is not None
    for row in range(min(n, 20)):
        for column in range(k):
            found = code_at(packed, row, column)
            if row >= 18:
                assert found == 0, "a padded row holds code 0"
            elif column >= 136:
                assert found == qt.zero[row, 0], "a padded column holds the zero point"
            else:
                assert found == qt.data[row, column]


@pytest.mark.parametrize("packing", BITS)
def test_padding_counts_nothing(packing: str) -> None:
    """(code - zero) * scale over the padded size, by the picture, is zero outside of the true size."""
    qt = random_tensor(17, 160, "w4a16-g32-asym" if BITS[packing] == 4 else "w8a16-g32-asym")
    packed = repack(qt, packing)
    n, k = padded_shape(qt.shape, packing)
    words, bits = layout.has_words(qt.spec, packing), BITS[packing]
    scale, zero = layout.split_words(packed.scale, bits) if words else (packed.scale, packed.zero)
    assert zero is not None
    assert scale.shape == zero.shape == (k // 32, n)
    assert torch.count_nonzero(scale[5:]) == 0 and torch.count_nonzero(scale[:, 17:]) == 0
    assert torch.count_nonzero(zero[5:]) == 0 and torch.count_nonzero(zero[:, 17:]) == 0
    for row in (0, 16, 17, n - 1):
        for column in (0, 31, 32, 159, 160, k - 1):
            code = code_at(packed, row, column) - int(zero[column // 32, row])
            value = code * float(scale[column // 32, row])
            true = float(dequantize(qt)[row, column]) if row < 17 and column < 160 else 0.0
            assert value == pytest.approx(true, rel=1e-6, abs=0)
            assert row < 17 or code == 0


def test_scale_words() -> None:
    """Every positive bf16 and fp16 scale with every zero point comes back exactly; an fp32 scale to 2^-19."""
    bits = torch.arange(1, 0x7C00, dtype=torch.int32).to(torch.int16)
    for scale in (
        bits.view(torch.float16).float(),
        bits.view(torch.bfloat16).float(),
        -bits.view(torch.bfloat16).float(),
    ):
        zero = (torch.arange(scale.numel()) % 32 - 8).to(torch.int8)
        words = layout.scale_words(scale, zero)
        assert words.dtype == torch.int32 and torch.equal(words & 31, zero + 8)
        back, zero_back = layout.split_words(words)
        assert torch.equal(back, scale) and torch.equal(zero_back, zero)
        zero = (torch.arange(scale.numel()) % 256 - 128).to(torch.int8)
        words = layout.scale_words(scale, zero, 8)
        assert torch.equal(words & 255, zero.to(torch.int32) + 128)
        back, zero_back = layout.split_words(words, 8)
        assert torch.equal(back, scale) and torch.equal(zero_back, zero)
    fine = torch.rand(1000) * 3 + 1e-3
    assert float(((layout.split_words(layout.scale_words(fine, None))[0] - fine) / fine).abs().max()) <= 2.0**-19
    assert torch.equal(layout.split_words(layout.scale_words(fine, None))[1], torch.zeros(1000, dtype=torch.int8))
    wide = layout.split_words(layout.scale_words(fine, None, 8), 8)
    assert float(((wide[0] - fine) / fine).abs().max()) <= 2.0**-16 and not wide[1].any()
    with pytest.raises(FormatError, match="zero points reach from -9 to -9"):
        layout.scale_words(torch.ones(1), torch.tensor([-9], dtype=torch.int8))


@pytest.mark.parametrize(("n", "k", "group"), [(5, 96, 32), (70, 320, 64), (3, 512, 128)])
def test_two_level_scales(n: int, k: int, group: int) -> None:
    """S behind the rows of groups, m (or s, for C++) before it; only where somebody multiplies by m, and s comes back."""
    plain = random_tensor(n, k, f"w4a8-g{group}")
    m = torch.randint(1, 17, plain.scale.shape)
    m[:, 0], m[:, -1] = 16, 15
    s = torch.randint(8, 16, (n, 1)) * 2.0**-9
    two = replace(plain, scale=(s * m).to(torch.bfloat16))
    groups = padded_shape((n, k), "planes8_w4")[1] // group
    for packing in ("planes8_w4", "rows16_k4_w4"):
        packed = repack(two, packing)
        assert packed.scale.shape[0] == groups + 1 and packed.scale.dtype == torch.float32
        row = layout.row_scale(packed.scale, k, group)
        assert row is not None and torch.equal(row[:n], s[:, 0]) and (row[n:] == 1).all()
        before = packed.scale[: k // group, :n].t()
        assert torch.equal(before, m.float() if packing == "planes8_w4" else two.scale.float())
        assert torch.count_nonzero(packed.scale[k // group : -1]) == 0
        back = repack(packed, "plain")
        assert torch.equal(back.scale, two.scale.float()) and torch.equal(back.data, two.data)
        for other in (plain, replace(two, spec=QuantSpec.parse(f"w4a16-g{group}"))):
            usual = repack(other, packing)
            assert usual.scale.shape[0] == groups and layout.row_scale(usual.scale, k, group) is None
    assert repack(two, "planes16_w4").scale.shape[0] == groups
    tiny = replace(two, scale=two.scale.float() * 2.0**-100)
    assert repack(tiny, "planes8_w4").scale.shape[0] == groups, "bodies divide by S"
    one = random_tensor(n, group, f"w4a8-g{group}")
    assert layout.row_scale(repack(one, "planes8_w4").scale, group, group) is None


def test_golden_lines() -> None:
    """Bytes by hand: the code of (n, k) is (n + k) mod 16 - 8."""
    codes = ((torch.arange(16)[:, None] + torch.arange(128)[None, :]) % 16 - 8).to(torch.int8)
    qt = QuantTensor(codes, torch.ones(16, 1), None, QuantSpec.parse("w4a16"), "plain", (16, 128))
    assert [f"{v & 0xFFFF:04X}" for v in repack(qt, "planes16_w4").data[0, :3].tolist()] == ["0000", "1111", "2222"]
    assert repack(qt, "planes8_w4").data[1, :2].tolist() == [0x11, 0x22]
    line = repack(qt, "rows16_k4_w4").data[0, 0]
    assert line[:4].tolist() == [0x40, 0x51, 0x62, 0x73] and line[4:8].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert repack(qt, "rows16_k4_w4").data[0, 1, :4].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    q8 = QuantTensor(codes, torch.ones(16, 1), None, QuantSpec.parse("w8a8"), "plain", (16, 128))
    assert [f"{v & 0xFFFF:04X}" for v in repack(q8, "planes16_w8").data[0, :3].tolist()] == ["F8F8", "F9F9", "FAFA"]
    assert repack(q8, "rows16_k4_w8").data[0, 1, :8].tolist() == [-4, -3, -2, -1, -3, -2, -1, 0]


def test_repack_between_packings() -> None:
    qt = random_tensor(33, 256, "w4a8-g64")
    there = repack(repack(qt, "planes16_w4"), "rows16_k4_w4")
    assert torch.equal(there.data, repack(qt, "rows16_k4_w4").data)
    assert repack(there, "rows16_k4_w4") is there
    assert set(PACKINGS) == set(BITS)


def test_empty() -> None:
    for packing, bits in BITS.items():
        qt = random_tensor(0, 128, "w4a16" if bits == 4 else "w8a8")
        assert repack(repack(qt, packing), "plain").data.shape == (0, 128)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: repack(random_tensor(1, 128, "w8a8"), "planes16_w4"), "holds 4-bit integer codes, found w8a8.*rows8"),
        (lambda: repack(random_tensor(1, 128, "w3a16-g64"), "rows16_k4_w4"), "none: dequantize"),
        (lambda: repack(random_tensor(1, 128, "w4a16"), "marlin"), "unknown packing 'marlin'"),
        (lambda: layout.unpack_rows8(random_tensor(1, 128, "w8a8")), "packed as plain, expected rows8"),
        (lambda: layout.pack_rows8(repack(random_tensor(1, 128, "w8a8"), "rows8")), "packed as rows8, expected plain"),
        (lambda: dequantize(repack(random_tensor(1, 128, "w8a8"), "rows8")), "wants packing plain"),
    ],
)
def test_refuses(call, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        call()
