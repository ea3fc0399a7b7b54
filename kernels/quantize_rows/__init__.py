"""Row-wise dynamic INT8 of activations, the producer of all A8 inputs.

    scale[m] = absmax(x[m, :]) / 127     q[m, k] = round_half_even(x[m, k] * (127 / absmax(x[m, :])))     row_sum[m] = sum_k q[m, k]

Each division and product is fp32, rounded once, so codes and sums are the same bits in every body. A row of zeros (absmax
below 2^-100, so that 127 / absmax stays finite) gets scale 1 and codes 0. NaN or Inf anywhere in a row makes its scale NaN, so that the whole output row
of the matmul behind it is NaN and no other row is touched. -128 never appears.
Source of the convention: absmax / 127 per token, as in vLLM csrc/quantization/w8a8/int8/scaled_quant.cu.
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

quantize_rows = Op(
    "quantize_rows",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("quantize_rows", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
