"""RMSNorm with its residual and the INT8 of what comes out, in one pass: the producer of the qkv and gate_up inputs.

    r = x + residual                                         rounded to the type of x; x itself without a residual
    y = (r * (1 / sqrt(mean(r^2) + eps))) * weight           fp32, each step rounded once; y rounded to the type of x
    q, scale, row_sum = quantize_rows(y)                     r comes back as well, [0, K] without a residual

These are the roundings of `x += residual; quantize_rows(F.rms_norm(x, (K,), weight, eps))`, in this order. On a CPU
`reference` gives the very bits of the unfused reference. The other bodies add up the squares in an order of their own and
then take correctly rounded steps only: they agree with each other bit for bit where that sum has the same bits. From torch's
norm they may differ by a code where y lies on the border of two numbers; contract.tolerance says exactly where.
NaN and Inf poison their row, as in quantize_rows. Squares that overflow fp32 give a row of zeros, as torch's norm does.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

rmsnorm_quantize = Op(
    "rmsnorm_quantize",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("rmsnorm_quantize", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
