"""INT8 weights times INT8 activations, exact in int32, one scale per row of each.

    y[m, n] = (sum_k xq[m, k] * w[n, k]) * sx[m] * sw[n] + bias[n]

The sum is int32; then fp32, in the order written; then one rounding to `out_dtype`. Since int32 sums are exact, row m
alone has the same bits as row m in any batch, on every body and with any split of K.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

matmul_w8a8 = Op(
    "matmul_w8a8",
    contract,
    (
        triton_body(f"{__name__}.gpu", "rows8", contract.triton_takes),
        cpu_body("matmul_w8a8", "rows16_k4_w8", contract, contract.cpu_takes),
        reference_body(reference.run, "plain", contract.reference_takes),
    ),
)
