"""Attention of fresh tokens over a paged cache: 1 to 16 of each sequence, causal, the fresh ones already in the pages.

    token i of n sees keys 0 .. S - n + i          S = lengths[b], page and row of key t from formats/kvcache.py

    s[t]  = scale * q . k[t]         lse = log sum_t e^s[t]         out = sum_t e^(s[t] - lse) v[t]

Over pages of int8 or 4 bits q is rounded to int8 by row and K is multiplied as it lies, in whole numbers; kernels/attention.py says
what they mean, and what a window, sinks, softcap, an offset of keys and unequal numbers of tokens do.

A sequence is always cut into chunks; what each found is joined by its logarithm of sums. The G = Hq / Hkv query heads of one
key head, times n tokens, are the rows of one tile, so a page is read once for all. How many chunks there are follows from
sizes alone. Sums are fp32 and `out` is rounded once; a sequence of length 0 gives zeros and an lse of -infinity. NaN or Inf in
K or V shows in its own sequence.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

attention_decode = Op(
    "attention_decode",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("attention_decode", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
