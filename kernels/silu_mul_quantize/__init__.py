"""SwiGLU's product and the INT8 of it, in one pass: the producer of the down input.

    s = silu(x[:, :I])   y = s * x[:, I:]                    silu(g) = g / (1 + e^-g) in fp32; s and y rounded to the type of x
    q, scale, row_sum = quantize_rows(y)

These are the roundings of `quantize_rows(F.silu(gate).mul_(up))` with gate and up the halves of x. `reference` gives the
very bits of the unfused reference. The C++ bodies and the Triton body compute one and the same polynomial in single
operations, so they agree with each other on every code; from torch's exponential they may differ where s lies on the
border of two numbers, and contract.tolerance says exactly where. NaN and Inf poison their row, as in quantize_rows.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

silu_mul_quantize = Op(
    "silu_mul_quantize",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("silu_mul_quantize", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
