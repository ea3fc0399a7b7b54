"""Pages of keys and values of any form back into rows that lie one after another, as attention over 16-bit tensors reads them.

    k[starts[b] + t, h] = k'(token t of sequence b) + mu[h]        v[starts[b] + t, h] = v'(token t of sequence b)

k', v' are what the bytes of the pages mean (formats/kvcache.py), t in 0 .. lengths[b] - 1. Rows that no token has are zero, so that
a sequence may be given more room than it fills. fp32 inside, rounded once, to the type asked for: every body gives the same bits.

A prompt over a quantised prefix is read this way: the prefix is unpacked once into a workspace that all layers share, then the
engine's own attention runs over it and the fresh tokens. The pattern is LMDeploy's flatten_kv_cache
(github.com/InternLM/lmdeploy, lmdeploy/pytorch/kernels/cuda/flatten_kv_cache.py).
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

gather_dequantize = Op(
    "gather_dequantize",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("gather_dequantize", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
