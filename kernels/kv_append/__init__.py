"""Everything that happens to a fresh token before attention, in one call: norm, rotation, and its place in the cache.

    norm(x)[d]   = x[d] / sqrt(mean(x^2) + eps) * weight[d]                    by head; left out without a weight
    turn(x)[d]   = x[d] cos[d] - x[d + D/2] sin[d]             d < D/2         left out without positions
    turn(x)[d]   = x[d] cos[d - D/2] + x[d - D/2] sin[d - D/2]     else

    k_pages[page, h, row] = turn(norm(k[t, h]))     v_pages[page, h, row] = v[t, h]     slots[t] = page * P + row
    q_out[t, h]           = turn(norm(q[t, h]))

All of it is fp32 and rounded once: queries to their type, keys and values to what the pages hold. In quantised pages a row becomes
int8 or 4-bit codes under a scale word of its own, keys after `mu` was taken from them: formats/kvcache.py has the formulas, and
given the same fp32 row every body writes the same bytes. A row with NaN or Inf becomes zeros under a scale of NaN. A token whose
slot is below 0 is written nowhere; what a page held before is never read. Two tokens must not share a slot.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

kv_append = Op(
    "kv_append",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("kv_append", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
