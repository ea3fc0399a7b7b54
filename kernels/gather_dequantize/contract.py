"""gather_dequantize(pages, table, lengths, starts, total, dtype=None, keys=True, values=True, size=None, table_starts=None) -> (k, v).

B sequences of lengths[b] cached tokens; sequence b gets rows starts[b] .. starts[b + 1] - 1 of k, v [total, Hkv, D] of `dtype` bf16 |
fp16 | fp32, contiguous; [0, Hkv, D] for what is not asked for. pages: KVPages of any form, strides and page size that formats/kvcache.py
knows. table int32 [B, pages] (with table_starts int32 [B + 1]: its rows one after another), lengths int32 [B], starts int32 [B + 1],
rising. `total`: rows of the outputs, at least starts[B]; lengths lie on the device, so it has to be said. A sequence that is longer than
its room is cut off there. ValueError and FormatError name what does not fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...formats.kvcache import KVPages, check_pages, pages_as, parse_form
from ...formats.spec import FormatError
from ..attention import strides
from ..op import DTYPE_CODES, Cost, pointer
from ..weight import check_place

OP = "gather_dequantize"
SCHEMA = (
    "(Tensor lengths, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor? mu, Tensor table,"
    " Tensor? table_starts, Tensor starts, int total, int size, bool keys, bool values, ScalarType dtype, str form)"
    " -> (Tensor, Tensor)"
)
Maybe = torch.Tensor | None
Outputs = tuple[torch.Tensor, torch.Tensor]


class Gather(NamedTuple):
    """The flat arguments, in the order of SCHEMA. `size` is D, `form` that of KVPages."""

    lengths: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scales: Maybe
    v_scales: Maybe
    mu: Maybe
    table: torch.Tensor
    table_starts: Maybe
    starts: torch.Tensor
    total: int
    size: int
    keys: bool
    values: bool
    dtype: torch.dtype
    form: str

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def pages(self) -> KVPages:
        return pages_as(self.form, self.k_pages, self.v_pages, self.k_scales, self.v_scales, self.mu)


def unwrap(
    pages: KVPages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    total: int,
    dtype: torch.dtype | None = None,
    keys: bool = True,
    values: bool = True,
    size: int | None = None,
    table_starts: Maybe = None,
) -> Gather:
    """`dtype` None: that of 16-bit pages, else bf16. `size` None: as rows of 8 or 16 bits or mu say; 4-bit rows alone do not tell."""
    if size is None:
        size = _size_of(pages)
    if dtype is None:
        dtype = torch.bfloat16 if pages.spec.quantised else pages.k.dtype
    return Gather(
        lengths, pages.k, pages.v, *pages.words, pages.mu, table, table_starts, starts, total, size, keys, values,
        dtype, pages.form,
    )  # fmt: skip


def _size_of(pages: KVPages) -> int:
    """Numbers of a head, from the shapes of its pages."""
    if pages.mu is not None:
        return pages.mu.shape[-1]
    if pages.spec.k_bits > 4:
        return pages.k.shape[-1]
    row = pages.k.shape[-1]
    raise FormatError(f"{OP}: rows of {row} bytes hold heads of {2 * row - 16} or of {2 * row} numbers; say size=")


def check(*flat: Any) -> None:
    a = Gather(*flat)
    check_pages(OP, a.k_pages, a.v_pages, a.k_scales, a.v_scales, a.mu, a.form, a.size)
    if a.k_scales is not None and a.v_scales is not None and a.k_scales.dtype != a.v_scales.dtype:
        raise FormatError(f"{OP}: scales of k are {a.k_scales.dtype}, of v {a.v_scales.dtype}; expected one type")
    if a.dtype not in DTYPE_CODES or (a.k_pages.is_floating_point() and a.k_pages.dtype not in DTYPE_CODES):
        found = f"dtype {a.dtype} from pages of {a.k_pages.dtype}"
        raise ValueError(f"{OP}: {found}, expected bfloat16, float16 or float32")
    batch = a.batch if a.lengths.ndim == 1 else -1
    for name, t, shape in (
        ("lengths", a.lengths, (batch,)), ("starts", a.starts, (batch + 1,)), ("table_starts", a.table_starts, (batch + 1,)),
    ):  # fmt: skip
        if t is not None and (t.dtype != torch.int32 or t.shape != shape or not t.is_contiguous()):
            expected = "[B]" if batch < 0 else str(shape)
            raise ValueError(f"{OP}: {name} is {t.dtype} {tuple(t.shape)}, expected contiguous int32 {expected}")
    wide = a.table.ndim == (1 if a.table_starts is not None else 2)
    if a.table.dtype != torch.int32 or not wide or (a.table.ndim == 2 and a.table.shape[0] != batch):
        kind = f"int32 [{batch}, pages]" if a.table_starts is None else "int32 [n] with table_starts"
        raise ValueError(f"{OP}: table is {a.table.dtype} {tuple(a.table.shape)}, expected {kind}")
    if a.table.numel() and a.table.stride(-1) != 1:
        raise ValueError(f"{OP}: table has strides {a.table.stride()}, expected 1 for the last")
    if a.total < 0 or (batch == 0 and a.total):
        raise ValueError(f"{OP}: total is {a.total} for {batch} sequences, expected the rows of all of them")
    check_place(OP, a.lengths, k_pages=a.k_pages, v_pages=a.v_pages, k_scales=a.k_scales, v_scales=a.v_scales, mu=a.mu)
    check_place(OP, a.lengths, table=a.table, table_starts=a.table_starts, starts=a.starts)


def out_like(*flat: Any) -> Outputs:
    a = Gather(*flat)
    rows = (a.total if a.keys else 0), (a.total if a.values else 0)
    k, v = (torch.empty((n, a.k_pages.shape[1], a.size), dtype=a.dtype, device=a.lengths.device) for n in rows)
    return k, v


def cost(*flat: Any) -> Cost:
    """Of `total` tokens that are all there: looking at lengths would wait for the device."""
    a = Gather(*flat)
    spec, moved = parse_form(a.form).spec, 0
    for wanted, rows, words, bits in (
        (a.keys, a.k_pages, a.k_scales, spec.k_bits), (a.values, a.v_pages, a.v_scales, spec.v_bits),
    ):  # fmt: skip
        if wanted:
            moved += a.size // 2 if bits == 4 else a.size * rows.element_size()
            moved += 0 if words is None else words.shape[3] * words.element_size()
            moved += a.size * a.dtype.itemsize
    numbers = a.total * a.k_pages.shape[1]
    return Cost(flops=2 * numbers * a.size * (a.keys + a.values), bytes=numbers * moved)


def native(out: Outputs, *flat: Any) -> tuple[Any, ...]:
    """Addresses, sizes, strides, types and forms, each as one tuple."""
    a = Gather(*flat)
    form = parse_form(a.form)
    given = (a.k_pages, a.v_pages, a.k_scales, a.v_scales, a.mu, a.table, a.table_starts, a.lengths, a.starts)
    pointers = tuple(pointer(t) for t in (*given, out[0] if a.keys else None, out[1] if a.values else None))
    sizes = (a.k_pages.shape[1], a.size, a.k_pages.shape[2], a.batch, a.total)
    steps = (*a.k_pages.stride()[:3], *a.v_pages.stride()[:3], *strides(a.k_scales, 4), *strides(a.v_scales, 4))
    row = 0 if a.table_starts is not None else a.table.stride(0)
    types = (DTYPE_CODES.get(a.k_pages.dtype, 0), form.spec.k_bits, form.spec.v_bits)
    how = (int(form.spec.symmetric), int(form.nibbles == "pairs"), ("offset", "zero", "mantissa").index(form.zeros))
    word = 0 if a.k_scales is None else DTYPE_CODES[a.k_scales.dtype]
    return pointers, sizes, (*steps, row), (*types, *how, word, DTYPE_CODES[a.dtype])


def tolerance(want: Outputs, *flat: Any) -> Outputs:
    """None: the same products and sums in the same order, each rounded once."""
    return torch.zeros_like(want[0], dtype=torch.float32), torch.zeros_like(want[1], dtype=torch.float32)


def triton_takes(*flat: Any) -> str | None:
    return None


def cpu_takes(*flat: Any) -> str | None:
    return None
