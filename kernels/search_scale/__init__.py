"""The scale of a group of weights that gives the least error after rounding, by trying 80 of them.

    s0 = absmax(w) / ((2^b - 1) / 2)                     (symmetric; asymmetric: (hi - lo) / (2^b - 1), 0 inside lo..hi)
    s(p) = round_to_storage(p * s0)                      p = 1.00, 0.99 .. 0.21
    code(p) = round_half_even(clamp(w / s(p) + z, qmin, qmax))
    scale[n, g] = s(p) of the p with the least  sum_k |(code(p) - z) * s(p) - w|^norm;  the larger p wins a tie

z is 0 when symmetric; otherwise it is found at p = 1 (formats/affine.py) and stays, since lo and s shrink together.
round_to_storage never goes below 2^-24 (fp16) or 2^-126; an s(p) that overflows is skipped. A group of zeros gets 1.
Offline only, so there is no Triton body. Source of the grid: IST-DASLab/gptq, quant.py (grid 100, maxshrink 0.8).
"""

from ..op import Op, cpu_body, reference_body
from . import contract, reference

search_scale = Op(
    "search_scale",
    contract,
    (
        cpu_body("search_scale", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
