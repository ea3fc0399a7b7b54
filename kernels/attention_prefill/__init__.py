"""Attention of many fresh tokens over a paged cache: prompts, chunks of prompts, causal, the fresh ones already in the pages.

    token i of n sees keys 0 .. S - n + i      n = q_starts[b + 1] - q_starts[b], S = lengths[b]

    s[t]  = scale * q . k[t]         lse = log sum_t e^s[t]         out = sum_t e^(s[t] - lse) v[t]

What it means over int8 and 4-bit pages, with windows, sinks and softcap, is said in kernels/attention.py. A token's result depends
on its own query and the pages alone: a prompt taken in chunks, over a prefix that is in the cache already, gives the same bits as
the whole at once (on a CPU, and with `deterministic` elsewhere). Products of queries and keys are int8 over pages of codes, one scale
for each query row (SageAttention, arXiv:2410.02367); blocks of keys with a running maximum are FlashAttention's (arXiv:2205.14135).
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

attention_prefill = Op(
    "attention_prefill",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes, contract.triton_yields),
        cpu_body("attention_prefill", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
