"""Divergence of a student's logits from a teacher's, row by row, each row of logits overwritten by its own gradient.

    a = z_s / T   b = z_t / T   q = softmax(a)   p = softmax(b)   over ids below `vocab`; the others have no mass

    fkl     D = sum p log(p / q)                                          dD/da = q - p
    rkl     D = sum q log(q / p)                                          dD/da = q (r - sum q r),  r = log(q / p)
    jsd     D = beta KL(p, m) + (1 - beta) KL(q, m)                       dD/da = q (r - sum q r),  r = (1 - beta) log(q / m)
            m = beta p + (1 - beta) q
    topk    KL over k kept ids and one bucket for all others              dD/da = q - p;  others  q (1 - p_rest / q_rest)

    loss[i] = weight[i] (T^2 D, cross-entropy of labels[i] at T = 1)        z_s[i] = d (loss[i, 0] + hard * loss[i, 1]) / d z_s[i]

A row of weight 0 counts nothing whatever it holds. A logit that is not finite makes its own row NaN and no other. fp32 inside.
kernels/distill.py puts the two products with the heads around it, so that the logits of a batch are never there at once: the way of
Liger-Kernel (github.com/linkedin/Liger-Kernel, chunked_loss/fused_linear_distillation.py). The generalised JSD is that of GKD (arXiv
2306.13649).
"""

from ..op import Op, cpu_body, reference_body, triton_body
from . import contract, reference

distill_loss = Op(
    "distill_loss",
    contract,
    (
        triton_body(f"{__name__}.gpu", None, contract.triton_takes),
        cpu_body("distill_loss", None, contract, contract.cpu_takes),
        reference_body(reference.run, None),
    ),
)
