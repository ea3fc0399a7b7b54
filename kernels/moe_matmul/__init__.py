"""Matmuls of a mixture of experts: each token meets the weights of the experts that it was routed to.

    weights is None    up     h[t*topk + j] = silu(x[t] @ W[e, :I]^T) * (x[t] @ W[e, I:]^T)       e = ids[t, j], N = 2 I
    weights [T, topk]  down   y[t] = sum_j weights[t, j] * (h[t*topk + j] @ W[e]^T)               j ascending, in fp32

One op, two faces: `h = moe_matmul(x, w13, ids)`, then `y = moe_matmul(h, w2, ids, weights)`. An id outside of 0..E-1 (-1
for an expert of another machine) contributes exactly zero. Products are those of matmul_w4a16 (16-bit x) and of matmul_w8a8
(int8 rows and their scales `sx`, as quantize_rows makes them). Everything up to the result is fp32, rounded once.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

moe_matmul = Op(
    "moe_matmul",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("moe_matmul", None, contract, contract.cpu_takes),
        reference_body(reference.run, None, contract.reference_takes),
    ),
)
