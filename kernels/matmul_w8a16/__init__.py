"""INT8 weights times 16-bit (or fp32) activations: half of the bytes of bf16, for decoding where 4 bits are too few.

    y[m, n] = sum_g s[n, g] * (sum_{k in g} (q[n, k] - z[n, g]) * x[m, k]) + bias[n]

q and z in -128..127. Groups of 32, 64, 128 or a whole row share a scale and, if asymmetric, an integer zero point. Sums in
fp32, one rounding to the type of x. Where a body applies the scale (to the sum of a group or to the weight) is its own
affair; code minus zero point is exact in every body.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

matmul_w8a16 = Op(
    "matmul_w8a16",
    contract,
    (
        triton_body(f"{__name__}.gpu", "planes16_w8", contract.triton_takes),
        cpu_body("matmul_w8a16", "rows16_k4_w8", contract, contract.cpu_takes),
        reference_body(reference.run, "plain", contract.reference_takes),
    ),
)
