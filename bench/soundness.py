"""Does a side compute its model at all? A check before any timing, for what a gate on text does not pass through.

The gate reads whole windows of a text; what is timed are steps, over a cache, at a batch. So the same tokens go both ways
through each side: a whole prompt at once, and the last token as a step over the cache of those before it, at the batch that
will be timed. Synthetic weights have no text, and are held to their 16-bit twin as well, with a limit that noise of
quantisation is far from and unrelated figures do not reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .engine import Model

TOKENS = 9  # of the prompt, the last of them comes as a step
STEP = 0.9  # least cosine of the logits both ways; a cache of 4 bits is above it
# Least cosine of a synthetic side's logits with its 16-bit twin's. Unrelated vectors of V logits have a cosine within
# 5 / sqrt(V) of 0 (0.3 at 256 words); quantisation leaves more than 0.7 where its noise is below the signal.
TWIN = 0.3


@torch.inference_mode()
def faults(base: Model, model: Model, batch: int) -> list[str]:
    """What is wrong with `model` at `batch`, in words; [] = nothing found. `base` is the 16-bit side."""
    length = min(TOKENS, model.config.context - 1, model.max_len)
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(0, model.config.vocab, (1, length), generator=draw).to(model.device)
    whole = model.logits(ids)[0, -1]
    if not bool(torch.isfinite(whole).all()):
        return ["logits are NaN or Inf"]
    found = []
    cache = model.new_cache(batch, length)
    if length > 1:
        model.prefill(ids[:, :-1].expand(batch, -1).contiguous(), cache)
        stepped = model.step(ids[:, -1].expand(batch).contiguous(), cache)
        if not bool(torch.isfinite(stepped).all()):
            return [f"logits of a step at batch {batch} are NaN or Inf"]
        near = float(F.cosine_similarity(stepped.float(), whole.float()[None]).min())
        if near < STEP:
            found.append(
                f"a step at batch {batch} is not the same model as its prompt: cosine of the logits {near:.2f}"
            )
    if model is not base and model.synthetic:
        near = float(F.cosine_similarity(whole.float(), base.logits(ids)[0, -1].float(), dim=0))
        if near < TWIN:
            found.append(f"logits are unrelated to those of the 16-bit weights: cosine {near:.2f}")
    return found
