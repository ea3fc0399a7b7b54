"""GPTQ (arXiv 2210.17323): columns are rounded one after another, and the rest makes good for the error of each.

    H = 2 / tokens * sum x x^T + damp * (1 + 8 K / tokens) * mean(diag H) * I
    loss = tr(dW H dW^T)          dW = W - decoded; a dead column (no token reached it): H[i, i] = mean, W[:, i] = 0

The paper takes U = cholesky(inverse(H), upper) and adds err * U[i, i:] to what is not rounded yet. The same sums come
without any inverse (LDLQ, arXiv 2307.13304, which proves the two equal). Let F be the columns in the reverse of the
order in which they are rounded; then

    H[F, F] = R^T D R       R unit upper triangular, D diagonal        one Cholesky, K^3/3 flops instead of 4/3 K^3
    v[j]    = w[j] + sum over m > j of R[j, m] * (w[m] - value[m])     j = K-1 .. 0; w[m], value[m]: a column of W, [N]
    q[j]    = code(v[j]);  value[j] = (q[j] - zero) * scale

and the loss is sum_j D[j] |v[j] - value[j]|^2. No column is ever overwritten, so no error of fp32 builds up.

Few tokens say little about H, so damp grows where tokens are not many more than columns (tiny-qwen3, w4a16-g64, 256
tokens: KL .0134 with damp 0.01 alone, .0094 with a factor of 1 + 4 K / tokens, .0085 with 1 + 16 K / tokens; from 4096
tokens on no difference). In the mean a column counts for 100 median ones at most: a channel of massive activations
would else damp all others away (one channel 1000 times as large, 4096 tokens, inputs not seen: loss x 0.45).

scales "weighted": per group the p * absmax scale, p = 1, .98 .. .8, with the least sum of D[j] |error|^3. Squares and
smaller p lower the loss on the calibration text further, and the KL on a text not seen less: what is cut off hurts most
where the calibration text did not look (tiny-qwen3, 32k tokens, KL at w3a16-g64: absmax .0213, squares and p down to .4
.0204, squares .0189, cubes .0179; at w4a16-g128 .0051, .0048, .0046, .0045). p down to .4 counts where it costs a third
less: where a few channels carry inputs 50 times as large, the rest may be cut off.

    order "static": falling diag(H); groups and scales stay those of the original columns, found before the loop.
    order "none": as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...formats import affine
from ...formats.spec import FormatError, QuantSpec
from ...formats.tensor import QuantTensor
from ...kernels.search_scale import search_scale
from .records import Option, Rounded, Stats, signal_and_noise

ORDERS = ("static", "none")
SCALES = ("absmax", "mse", "weighted")
OPTIONS = {
    "damp": Option(float, 0.01, "added to diag(H), as a share of its mean; more when tokens are few", 0.0, 1.0),
    "order": Option(str, "static", "static: columns by falling diag(H), groups stay; none: as they stand"),
    "scales": Option(str, "weighted", "weighted (least error, by what it costs in H), mse (least error), or absmax"),
    "block": Option(int, 256, "columns per matmul", 1, 4096),
}
TRIES = 4  # damp, 10 damp, 100 damp, 1000 damp
_FP64 = 4096  # up to this size a CPU factors in fp64: seconds, and nothing to worry about
_FEW = 8  # of Factor.damp, see above
_OUTLIER = 100
_LEAF = 8  # columns between two small matmuls: less, and calls cost more than work; more, and threads start for nothing
_HALF_EVEN = 1.5 * 2.0**23  # x + this - this is x rounded half to even; torch.round starts threads for one column
_SHRINKS = [1 - i / 50 for i in range(11)]  # 1.0 .. 0.8, see above
_FAR = [0.75 - i / 20 for i in range(8)]  # .75 .. .4
_HANDICAP = 1.5  # by so much a far one has to be better
_CHUNK = 1 << 17


@dataclass(frozen=True, eq=False)
class Factor:
    """What all weights with one input share.

    order int64 [K]: the column that stands at each place; places are rounded from the last to the first. upper fp32
    [K, K] unit upper triangular and variance fp32 [K]: (H / mean + damp I)[order][:, order] = upper^T diag(variance)
    upper; None when no damp helped. mean: of diag(gram), live columns, outliers cut. damp: what was added, fallbacks
    and few tokens included. dead bool [K]: no token ever reached them.
    """

    order: torch.Tensor
    upper: torch.Tensor | None
    variance: torch.Tensor
    mean: float
    damp: float
    dead: torch.Tensor
    tokens: int
    fallbacks: tuple[str, ...] = ()


def serves(spec: QuantSpec) -> str | None:
    """None, or why GPTQ has no such spec."""
    return None if spec.float_format is None else f"gptq rounds to integers, {spec} is a float format"


def prepare(stats: Stats, *, damp: float = 0.01, order: str = "static", **_: Any) -> Factor:
    """Factors the gram of `stats`. FormatError when it holds NaN or Inf, ValueError for an unknown order."""
    if order not in ORDERS:
        raise ValueError(f"gptq: order is {order!r}, expected one of {', '.join(ORDERS)}")
    gram = stats.gram
    if gram.numel():
        low, high = torch.aminmax(gram)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise FormatError("gram of the calibration inputs holds NaN or Inf; an activation overflowed in the model")
    diagonal = gram.diagonal().clone()
    dead = diagonal <= 0
    places = torch.arange(gram.shape[0], device=gram.device)
    if stats.tokens == 0 or bool(dead.all()):
        why = "no token reached this input" if stats.tokens == 0 else "every input was zero"
        return Factor(places, None, diagonal, 0.0, damp, dead, stats.tokens, (f"{why}: rounded to nearest",))
    live = diagonal[~dead].double()
    mean = float(live.clamp(max=_OUTLIER * live.median()).mean())
    damp *= 1 + _FEW * live.numel() / stats.tokens
    if order == "static":
        places = torch.sort(diagonal, descending=True, stable=True).indices
    places = places.flip(0)
    fallbacks: list[str] = []
    share = damp
    for attempt in range(TRIES):
        share = damp if attempt == 0 else max(damp, 0.001) * 10**attempt
        upper, variance = _factor(gram, places, mean, share, dead)
        if upper is not None:
            return Factor(places, upper, variance, mean, share, dead, stats.tokens, tuple(fallbacks))
        step = "damp x 10" if attempt + 1 < TRIES else "rounded to nearest"
        fallbacks.append(f"no Cholesky factor at damp {share:g}: {step}")
    return Factor(places, None, diagonal, mean, share, dead, stats.tokens, tuple(fallbacks))


def _factor(
    gram: torch.Tensor, places: torch.Tensor, mean: float, damp: float, dead: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(R, D) of gram / mean + damp I in the order of `places`; R is None when it is not positive definite."""
    columns = gram.shape[0]
    small = columns <= _FP64 and gram.device.type == "cpu"
    h = torch.empty(columns, columns, dtype=torch.float64 if small else torch.float32, device=gram.device)
    step = max(1, (1 << 24) // columns)
    for start in range(0, columns, step):
        part = places[start : start + step]
        h[start : start + step] = gram.index_select(0, part).index_select(1, places)
    h /= mean
    diagonal = h.diagonal()
    diagonal[dead[places]] = 1.0
    diagonal += damp
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    lower = h.mT  # symmetric, so this is H once more, in the layout that LAPACK overwrites in place
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    root = diagonal.clone()
    # D is at least damp but for roundoff, so a factor with much less is noise; NaN fails the comparison too
    if int(info) != 0 or not bool((root.square() > 0.1 * damp).all()):
        return None, root
    h /= root.unsqueeze(1)
    return h.float(), root.square().float()


def gptq(
    weight: torch.Tensor,
    stats: Stats,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    bound: torch.Tensor | None = None,
    prepared: Factor | None = None,
    damp: float = 0.01,
    order: str = "static",
    scales: str = "weighted",
    block: int = 256,
) -> Rounded:
    """Rounds weight fp32 [N, K] for inputs with `stats`.

    bound fp32 [N, K/group]: the largest |w| that a group's scale has to cover; None = all. prepared: of the same stats,
    damp and order. FormatError for NaN or Inf in weight or gram, a group that does not divide K.
    Facts: signal, noise (records.py); loss fp64 [N], the mean square of each output's error on the calibration text,
    so that its sum is tr(dW gram dW^T) / tokens; damp; dead; fallbacks, in words.
    Rows stand alone but for roundoff in the matmuls.
    """
    if scales not in SCALES:
        raise ValueError(f"gptq: scales is {scales!r}, expected one of {', '.join(SCALES)}")
    factor = prepare(stats, damp=damp, order=order) if prepared is None else prepared
    if weight.ndim != 2 or weight.shape[1] != factor.order.numel():
        raise FormatError(f"a weight is {tuple(weight.shape)}, its inputs have {factor.order.numel()} channels")
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise FormatError("a weight holds NaN or Inf; repair the source, no codes can be found for it")
    facts: dict[str, Any] = {"damp": factor.damp, "dead": int(factor.dead.sum()), "fallbacks": list(factor.fallbacks)}
    shape = (weight.shape[0], weight.shape[1])
    if factor.upper is None:
        scale, zero = _scales(weight, spec, scale_dtype, bound, "mse", factor)
        tensor = affine.quantize(weight, spec, scale_dtype, scale, zero)
        facts["loss"] = loss_of(weight, tensor, stats)
    else:
        live = weight.masked_fill(factor.dead, 0.0) if facts["dead"] else weight
        scale, zero = _scales(live, spec, scale_dtype, bound, scales, factor)
        codes, cost = _round(live, scale, zero, spec, factor, max(1, block))
        facts["loss"] = cost * (factor.mean / factor.tokens)
        tensor = QuantTensor(codes, scale, zero, spec, "plain", shape)
    return Rounded(tensor, facts | signal_and_noise(weight, tensor.data, tensor.scale, tensor.zero, spec))


def correct(weight: torch.Tensor, shift: torch.Tensor, factor: Factor) -> torch.Tensor:
    """The weight that comes nearest to W x on inputs x' of a chain that is quantised already, fp32 [N, K].

    shift fp32 [K, K] = sum x x'^T - sum x' x'^T; factor: of sum x' x'^T. Least squares: W + W shift (G + damp)^-1, the
    first step of GPTAQ (arXiv 2504.02692): what the layers before have spoilt is made good where it can be.
    """
    if factor.upper is None:
        return weight
    x = (weight @ shift).index_select(1, factor.order)
    x = torch.linalg.solve_triangular(factor.upper, x, upper=True, left=False, unitriangular=True)
    x /= factor.variance * factor.mean
    x = torch.linalg.solve_triangular(factor.upper.T, x, upper=False, left=False, unitriangular=True)
    return weight + torch.empty_like(x).index_copy_(1, factor.order, x)


def loss_of(weight: torch.Tensor, tensor: QuantTensor, stats: Stats) -> torch.Tensor:
    """Mean square of each output's error on the calibration text, fp64 [N]; zeros without a text."""
    if stats.tokens == 0:
        return torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    error = affine.dequantize(tensor).sub_(weight)
    return (error @ stats.gram).mul_(error).sum(1, dtype=torch.float64) / stats.tokens


def _scales(
    weight: torch.Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    bound: torch.Tensor | None,
    scales: str,
    factor: Factor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero [N, K/group] of every group, in the original order of the columns."""
    covered = weight
    if bound is not None:
        grouped, bound = weight.reshape(*bound.shape, -1), bound.unsqueeze(2)
        covered = torch.minimum(torch.maximum(grouped, -bound), bound).reshape(weight.shape)
    costs = None
    if scales == "weighted":
        costs = torch.empty_like(factor.variance)
        costs[factor.order] = factor.variance  # column j adds D[j] |error|^2 to the loss, whatever follows
    if spec.act_bits == 8 and spec.group is not None:
        return affine.two_level_scales(covered, spec, scale_dtype, costs), None
    scale, zero = affine.find_scales(covered, spec, scale_dtype)
    if scales == "absmax":
        return scale, zero
    if costs is None:
        return search_scale(covered, spec, scale_dtype), zero
    for start in range(0, weight.shape[0], step := max(1, _CHUNK // max(1, weight.shape[1]))):
        part = slice(start, start + step)
        scale[part] = _shrink(weight[part], scale[part], None if zero is None else zero[part], spec, costs)
    return scale, zero


def _shrink(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec, costs: torch.Tensor
) -> torch.Tensor:
    """The p * scale [R, groups] with the least sum of costs[k] * |error[k]|^3 in its group; costs fp32 [K]."""
    rows, groups = scale.shape
    w, costs = weight.reshape(rows, groups, -1), costs.reshape(groups, -1)
    offset = None if zero is None else zero.unsqueeze(2).float()
    tiny = 2.0**-24 if scale.dtype == torch.float16 else 2.0**-126
    best, least = scale, torch.full((rows, groups), torch.inf, device=scale.device)
    trial = torch.empty_like(w)
    for p in (*_SHRINKS, *_FAR):
        stored = (scale.float() * p).to(scale.dtype).clamp_min_(tiny)
        step = stored.float().unsqueeze(2)
        torch.div(w, step, out=trial)
        if offset is not None:
            trial += offset
        trial.clamp_(spec.qmin, spec.qmax).add_(_HALF_EVEN).sub_(_HALF_EVEN)
        if offset is not None:
            trial -= offset
        trial.mul_(step).sub_(w).abs_()
        error = trial.square().mul_(trial).mul_(costs).sum(2)
        if p < _SHRINKS[-1]:
            error *= _HANDICAP
        better = error < least
        best, least = torch.where(better, stored, best), torch.where(better, error, least)
    return best


def _round(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    spec: QuantSpec,
    factor: Factor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K], and the diagonal of dW H dW^T, fp64 [N], with H = gram / mean.

    `error` starts as the weight and becomes w - value from its last row up: all that the loop reads and writes.
    """
    upper, order = factor.upper, factor.order
    assert upper is not None
    columns, rows = weight.shape[1], weight.shape[0]
    size = columns // scale.shape[1]
    error = weight.T.contiguous().index_select(0, order)  # [K, N]: a column of W is contiguous
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    steps = scale.T.to(torch.float32).contiguous()  # [K/group, N]
    zeros = None if zero is None else zero.T.to(torch.float32).contiguous()
    groups = (order // size).tolist()
    rounded = torch.empty(min(block, columns), rows, device=weight.device)
    loss = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    for stop in range(columns, 0, -block):
        start = max(0, stop - block)
        part = error[start:stop]
        pull = upper[start:stop, stop:] @ error[stop:]  # [block, N]: what the columns before have left to make good
        square = upper[start:stop, start:stop]
        _columns(part, pull, square, rounded, groups[start:stop], steps, zeros, spec)
        codes.index_copy_(0, order[start:stop], rounded[: stop - start].to(torch.int8))
        pull += part
        loss += factor.variance[start:stop] @ pull.square_()
        loss -= factor.damp * torch.linalg.vector_norm(part, dim=0).square_()
    return codes.T.contiguous(), loss.clamp_(min=0.0)


def _columns(
    error: torch.Tensor,
    pull: torch.Tensor,
    upper: torch.Tensor,
    rounded: torch.Tensor,
    groups: list[int],
    steps: torch.Tensor,
    zeros: torch.Tensor | None,
    spec: QuantSpec,
) -> None:
    """Rounds the columns of one block, last first. Halves the block until few are left, so most of it is matmul."""
    count = error.shape[0]
    if count > _LEAF:
        half = count // 2
        _columns(error[half:], pull[half:], upper[half:, half:], rounded[half:], groups[half:], steps, zeros, spec)
        pull[:half].addmm_(upper[:half, half:], error[half:])
        _columns(error[:half], pull[:half], upper[:half, :half], rounded[:half], groups[:half], steps, zeros, spec)
        return
    for j in range(count - 1, -1, -1):
        w, step, code = error[j], steps[groups[j]], rounded[j]
        torch.add(w, pull[j], out=code)
        code.div_(step)
        if zeros is None:
            code.clamp_(spec.qmin, spec.qmax).add_(_HALF_EVEN).sub_(_HALF_EVEN)
            w.addcmul_(code, step, value=-1)
        else:
            zero = zeros[groups[j]]
            code.add_(zero).clamp_(spec.qmin, spec.qmax).add_(_HALF_EVEN).sub_(_HALF_EVEN)
            w.addcmul_(code - zero, step, value=-1)
        pull[:j].addcmul_(upper[:j, j : j + 1], w)
