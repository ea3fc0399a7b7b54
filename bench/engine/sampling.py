"""Which token comes next: greedy, or temperature and top-p with one seeded stream of numbers per sequence."""

from __future__ import annotations

import torch


class Sampler:
    """`sampler(logits [B, V]) -> tokens int64 [B]`. Temperature 0 is greedy.

    Every sequence draws from its own generator, so what a prompt becomes does not depend on its neighbours in the
    batch: sequence b uses `seed + b`.
    """

    def __init__(self, batch: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(seed + b) for b in range(batch)]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])
        return sample(logits, draws.to(logits.device), self.temperature, self.top_p)


def sample(logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Tokens int64 [B] at the quantiles `draws` float64 [B] of softmax(logits / temperature) cut to its top-p part.

    The top-p part is the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751); it always holds the most likely one.
    """
    probabilities, order = torch.softmax(logits.double() / temperature, dim=-1).sort(dim=-1, descending=True)
    summed = probabilities.cumsum(dim=-1)
    kept = summed - probabilities < top_p
    kept[:, 0] = True
    summed = probabilities.masked_fill(~kept, 0.0).cumsum(dim=-1)
    place = torch.searchsorted(summed, draws[:, None] * summed[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # a draw that rounds up to the whole sum still lands in the kept part
    return order.gather(-1, place.minimum(last)).squeeze(-1)
