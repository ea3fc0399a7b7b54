"""The meaning of gather_dequantize, in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from ...formats.kvcache import check_values, read, table_row
from ...formats.spec import FormatError
from .contract import OP, Gather, Outputs, out_like


def run(*flat: Any) -> Outputs:
    a = Gather(*flat)
    check_values(a.pages, table=a.table, lengths=a.lengths, table_starts=a.table_starts)
    starts, page = a.starts.tolist(), a.k_pages.shape[2]
    if starts[0] < 0 or starts[-1] > a.total or sorted(starts) != starts:
        raise FormatError(f"{OP}: starts are {starts}, expected rising rows within 0 .. {a.total}")
    outputs = out_like(*flat)
    for out in outputs:
        out.zero_()
    for b, length in enumerate(a.lengths.tolist()):
        if length > starts[b + 1] - starts[b]:
            raise FormatError(f"{OP}: sequence {b} has {length} tokens and room for {starts[b + 1] - starts[b]}")
        at = torch.arange(length, device=a.lengths.device)
        mine = table_row(a.table, b, a.table_starts)
        found = read(a.pages, mine[at // page].long(), at % page, a.size)
        for out, rows, mu in zip(outputs, found, (a.mu, None), strict=True):
            if len(out):
                out[starts[b] : starts[b] + length] = rows if mu is None else rows + mu
    return outputs
