"""INT4 weights times INT8 activations: codes widen to int8 in registers, sums are int32 within a group.

    y[m, n] = sx[m] * (sum_g s[n, g] * (sum_{k in g} xq[m, k] * q[n, k])) + bias[n]

q in -8..7; a body that stores u = q + 8 takes 8 * xsum back, where xsum[m] = sum_k xq[m, k] comes from quantize_rows.
Sums of a group are exact int32; over groups fp32, ascending; then sx, bias and one rounding to `out_dtype`. With one
group per row the sum is exact, so row m alone has the same bits as row m in any batch.

Two-level scales, s[n, g] = S[n] * m[n, g] with m = 1..16 (formats/affine.py; `percard quantize` makes no others for this op):

    y[m, n] = sx[m] * S[n] * (sum_k xq[m, k] * (q[n, k] * m[n, g])) + bias[n]

q * m lies in -128..112, so all of K is one int32 sum, exact again. A body takes this way when the packed weight says so
(formats/layout.py); other group scales are fp32 as above.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

matmul_w4a8 = Op(
    "matmul_w4a8",
    contract,
    (
        triton_body(f"{__name__}.gpu", "planes8_w4", contract.triton_takes),
        cpu_body("matmul_w4a8", "rows16_k4_w4", contract, contract.cpu_takes),
        reference_body(reference.run, "plain", contract.reference_takes),
    ),
)
