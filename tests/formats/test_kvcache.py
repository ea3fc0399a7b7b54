"""What a quantised row means: how far from the numbers it may be, what it keeps exactly, what it does at the ends of fp16.

Bounds: a code is rounded once, half a scale. The scale is an fp16 word, so the last code may fall short of the largest number by
2^-11 of it (half an ulp); the first and the last code of a row with an offset by half an ulp of the offset as well.
"""

from __future__ import annotations

import pytest
import torch

from percard.formats import kvcache
from percard.formats.kvcache import BF16, KVPages, KVSpec, quantize
from percard.formats.spec import FormatError

KINDS = [(8, False), (4, False), (4, True)]
SIZES = [16, 32, 48, 64, 80, 96, 128, 256]
BYTES = {"bf16": 512, "int8": 260, "k8v4": 200, "int4": 136, "k8v4-sym": 196, "int4-sym": 132}


def words_of(scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    return torch.stack([w for w in (scale, offset) if w is not None], -1)


def there_and_back(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    codes, scale, offset = quantize(x, bits, symmetric)
    return kvcache.dequantize(codes, words_of(scale, offset), bits, x.shape[-1], symmetric)


def half_ulp(words: torch.Tensor) -> torch.Tensor:
    """Half a step of fp16 at a number, fp32."""
    return torch.ldexp(torch.ones_like(words, dtype=torch.float32), torch.frexp(words.float())[1] - 12).clamp(
        min=2**-25
    )


@pytest.fixture
def random() -> torch.Generator:
    seed = torch.Generator().seed() % (1 << 20)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_there_and_back_within_half_a_step(bits: int, symmetric: bool, size: int, random: torch.Generator) -> None:
    # beyond +-65504 offsets saturate: a test of its own
    x = torch.randn(200, size, generator=random) * torch.logspace(-4, 2.5, 200)[:, None]
    x += 20 * torch.randn(200, 1, generator=random) * torch.logspace(-4, 2.5, 200)[:, None]
    codes, scale, offset = quantize(x, bits, symmetric)
    assert codes.shape == (200, kvcache.row_length(bits, size)) and scale.dtype == torch.float16
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8) and (offset is None) == (bits == 8 or symmetric)
    last = 127 if bits == 8 else 7 if symmetric else 15
    bound = 0.5 * scale.float() + last * half_ulp(scale)
    if offset is not None:
        bound = bound + 2 * half_ulp(offset)
    bound = bound[:, None] + 2.0**-21 * x.abs().amax(-1, keepdim=True)  # the arithmetic of fp32 itself
    assert ((there_and_back(x, bits, symmetric) - x).abs() <= bound).all()


@pytest.mark.parametrize("size", [16, 80, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_codes_of_a_scale_that_fp16_holds_come_back(
    bits: int, symmetric: bool, size: int, random: torch.Generator
) -> None:
    """Rows that are codes times a power of two, and reach the first and the last code, come back as they are."""
    last = 127 if bits == 8 else 7 if symmetric else 15
    first = 0 if bits == 4 and not symmetric else -last
    codes = torch.randint(first, last + 1, (50, size), generator=random).float()
    codes[:, 0], codes[:, 1] = last, first
    scale = 2.0 ** torch.randint(-8, 8, (50, 1), generator=random)
    assert torch.equal(there_and_back(codes * scale, bits, symmetric), codes * scale)


@pytest.mark.parametrize("size", SIZES)
def test_constant_rows_are_exact_with_an_offset(size: int, random: torch.Generator) -> None:
    x = (100 * torch.randn(40, 1, generator=random)).half().float().expand(40, size)
    codes, scale, offset = quantize(x, 4)
    assert not codes.any() and offset is not None and torch.equal(offset.float(), x[:, 0])
    assert torch.equal(scale, torch.full_like(scale, 1e-6))
    assert torch.equal(there_and_back(x, 4, False), x)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_rows_of_zeros(bits: int, symmetric: bool) -> None:
    x = torch.zeros(3, 64)
    x[1] = -0.0
    codes, scale, offset = quantize(x, bits, symmetric)
    assert (scale == torch.tensor(1e-6).half()).all() and not there_and_back(x, bits, symmetric).any()
    assert (codes == (0x88 if symmetric else 0)).all()
    assert offset is None or (offset.view(torch.int16) == 0).all(), "never -0"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_a_bad_number_shows_in_its_row_alone(bits: int, symmetric: bool, bad: float, random: torch.Generator) -> None:
    x = torch.randn(5, 3, 80, generator=random)
    clean = there_and_back(x, bits, symmetric)
    for at in (0, 39, 40, 79):
        x[2, 1, at] = bad
        codes, scale, offset = quantize(x, bits, symmetric)
        assert not codes[2, 1].any() and scale[2, 1].isnan() and (offset is None or offset[2, 1].isnan())
        back = there_and_back(x, bits, symmetric)
        assert back[2, 1].isnan().all()
        back[2, 1] = clean[2, 1]
        assert torch.equal(back, clean)
        x[2, 1, at] = 0.5
        clean[2, 1] = there_and_back(x, bits, symmetric)[2, 1]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("size", [6e4, 65504.0, 1e6, 1e30, 3.4028234663852886e38])
def test_magnitudes_beyond_fp16_saturate(bits: int, symmetric: bool, size: float) -> None:
    x = torch.linspace(-1, 1, 64)[None] * size
    codes, scale, offset = quantize(x, bits, symmetric)
    assert torch.isfinite(scale).all() and (offset is None or torch.isfinite(offset).all())
    if offset is not None:
        assert offset.item() == -min(size, 65504.0) or size < 65504
    back = there_and_back(x, bits, symmetric)
    assert torch.isfinite(back).all() and (back[:, 0] <= 0).all() and (back[:, -1] > 0).all()
    last = 127 if bits == 8 else 7 if symmetric else 15
    wide = size / last if bits == 8 or symmetric else 2 * size / 15
    assert scale.item() == torch.tensor(min(wide, 65504.0)).half().item()
    if bits == 8:
        assert codes.min() == -127 and codes.max() == 127, "-128 is no code"


@pytest.mark.parametrize("scale", [1e-12, 6e-8, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_tiny_rows_do_not_become_large(bits: int, symmetric: bool, scale: float, random: torch.Generator) -> None:
    x = scale * torch.randn(50, 64, generator=random)
    found = quantize(x, bits, symmetric)[1].float()
    assert (found >= 1e-6).all()
    last = 127 if bits == 8 else 7 if symmetric else 15
    bound = (
        0.5 * found + (last + 2) * 2.0**-25
    )  # half a step of fp16's smallest numbers, of the scale and of the offset
    assert ((there_and_back(x, bits, symmetric) - x).abs() <= bound[:, None]).all()


@pytest.mark.parametrize("size", SIZES)
def test_int8_never_holds_minus_128(size: int, random: torch.Generator) -> None:
    x = torch.randn(2000, size, generator=random) * torch.logspace(-8, 6, 2000)[:, None]
    assert quantize(x, 8)[0].min() >= -127
    assert quantize(x.half(), 8)[0].min() >= -127 and quantize(x.bfloat16(), 8)[0].min() >= -127


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_two_numbers_of_a_byte(symmetric: bool, size: int, random: torch.Generator) -> None:
    """Byte j = x[j] | x[j + D / 2] << 4, then zeros up to a multiple of 16 bytes."""
    x = torch.randn(20, size, generator=random)
    packed, scale, offset = quantize(x, 4, symmetric)
    assert packed.shape[1] % 16 == 0 and packed.shape[1] - size // 2 < 16 and not packed[:, size // 2 :].any()
    base = torch.zeros(20, 1) if offset is None else offset.float()[:, None]
    codes = ((x - base) / scale.float()[:, None]).round() + (8 if symmetric else 0)
    codes = codes.clamp(1 if symmetric else 0, 15).to(torch.uint8)
    for j in range(size // 2):
        assert torch.equal(packed[:, j], codes[:, j] | codes[:, j + size // 2] << 4)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_rows_do_not_see_each_other(bits: int, symmetric: bool, random: torch.Generator) -> None:
    x = torch.randn(4, 2, 3, 96, generator=random)
    whole = there_and_back(x, bits, symmetric)
    for at in ((0, 0, 0), (3, 1, 2), (2, 0, 1)):
        assert torch.equal(there_and_back(x[at], bits, symmetric), whole[at])


@pytest.mark.parametrize("zeros", ["offset", "zero", "mantissa"])
@pytest.mark.parametrize("nibbles", ["halves", "pairs"])
def test_other_engines_bytes(nibbles: str, zeros: str, random: torch.Generator) -> None:
    codes = torch.randint(0, 16, (7, 32), generator=random, dtype=torch.uint8)
    low, high = codes.chunk(2, -1) if nibbles == "halves" else (codes[:, 0::2], codes[:, 1::2])
    scale = torch.rand(7, 1, generator=random) + 0.1
    zero = torch.randint(0, 16, (7, 1), generator=random)
    words, want = torch.cat((scale, zero.float()), -1), scale * codes + zero
    if zeros == "zero":
        want = scale * (codes - zero.float())
    if zeros == "mantissa":
        words = ((scale.view(torch.int32) & ~15) | zero.int()).view(torch.float32)
        want = words * (codes - zero.float())
    assert torch.equal(kvcache.dequantize(low | high << 4, words, 4, 32, False, nibbles, zeros), want)


@pytest.mark.parametrize("spec", kvcache.SPECS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_per_token_are_what_is_allocated(spec: str, size: int) -> None:
    of = KVSpec.parse(spec)
    assert str(of) == spec
    for heads in (1, 2, 5):
        for page in (16, 64):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                pages = kvcache.new_pages(3, heads, size, dtype=dtype, page=page, spec=of)
                assert pages.nbytes == 3 * page * of.bytes_per_token(size, heads, dtype)
                held = [t for t in (pages.k, pages.v, pages.scales) if t is not None]
                assert sum(t.untyped_storage().nbytes() for t in held) == pages.nbytes
                assert kvcache.unaligned(pages.k, pages.v) is None
    if size == 128:
        assert of.bytes_per_token(128, 1) == BYTES[spec]


def test_a_32k_context_takes_what_was_said() -> None:
    """Qwen3-8B, 8 key heads of 128: 128 MiB a layer in bf16, 65 MiB in int8, 34 in int4."""
    for spec, most in BYTES.items():
        of = KVSpec.parse(spec)
        pages = kvcache.new_pages(kvcache.pages_of(32768), 8, 128, dtype=torch.bfloat16, device="meta", spec=of)
        assert pages.nbytes == 32768 * 8 * most


def test_words_of_keys_and_of_values() -> None:
    for spec in kvcache.SPECS[1:]:
        pages = kvcache.new_pages(1, 1, 32, dtype=torch.bfloat16, page=16, spec=KVSpec.parse(spec))
        assert pages.scales is not None
        pages.scales.copy_(torch.arange(pages.scales.shape[-1]))
        k, v = pages.words
        assert k is not None and v is not None
        assert k[0, 0, 0].tolist() == [0, 2][: k.shape[-1]] and v[0, 0, 0].tolist() == [1, 3][: v.shape[-1]]
    assert KVPages(torch.zeros(1, 1, 16, 32), torch.zeros(1, 1, 16, 32)).words == (None, None)


def test_specs_of_layers() -> None:
    int8 = KVSpec.parse("int8")
    assert kvcache.layer_specs(4, int8) == (BF16, int8, int8, int8)
    assert kvcache.layer_specs(4, int8, (0, -1)) == (BF16, int8, int8, BF16)
    assert kvcache.layer_specs(2, int8, ()) == (int8, int8)
    with pytest.raises(FormatError, match=r"layer 4 is to stay bf16, the model has layers 0 \.\. 3"):
        kvcache.layer_specs(4, int8, (4,))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"page": 48}, "a page holds 48 tokens, expected one of 16, 32, 64, 128"),
        ({"page": 8}, "a page holds 8 tokens, expected one of 16, 32, 64, 128"),
        ({"head_dim": 72}, "a head has 72 numbers, expected a multiple of 16"),
        ({"head_dim": 0}, "a head has 0 numbers"),
        ({"mu": torch.zeros(2, 32)}, r"mu is torch.float32 \(2, 32\), expected contiguous float32 \(2, 64\)"),
        ({"mu": torch.zeros(2, 64).half()}, "mu is torch.float16"),
        ({"spec": BF16, "mu": torch.zeros(2, 64)}, "mu with bf16 pages; keys that are not rounded need no offset"),
    ],
)
def test_pages_that_are_refused(how: dict, said: str) -> None:
    right = {"pages": 2, "heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "spec": KVSpec.parse("int4")}
    with pytest.raises(FormatError, match=said):
        kvcache.new_pages(**(right | how))  # type: ignore[arg-type]


def test_specs_that_are_not() -> None:
    with pytest.raises(FormatError, match="cache spec 'q3' is not one; known: bf16, int8, k8v4, int4"):
        KVSpec.parse("q3")
    with pytest.raises(FormatError, match="no cache of keys of 4 and values of 8 bits; known: bf16"):
        KVSpec(4, 8)
    with pytest.raises(FormatError, match="no cache of keys of 8 and values of 8 bits, symmetric"):
        KVSpec(8, 8, True)
    with pytest.raises(FormatError, match="expected nibbles halves or pairs, zeros offset, zero or mantissa"):
        kvcache.parse_form("int4 thirds offset")
