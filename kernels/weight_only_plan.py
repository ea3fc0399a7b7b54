"""What the Triton bodies of matmul_w4a16 and matmul_w8a16 do before a kernel starts: Config, candidates, launches.

Their kernels differ in how a word becomes codes; tiles, splits and the ways to apply a scale are the same (their gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import tuning
from .device import Card
from .tiles import FUSION, INTERPRETED, Launch, Product, add_slices_launch, chunks, registers
from .weight_only import out_like

CHUNK_MB = 32  # of a weight made whole: it stays in the L2 until the product has read it
INVARIANT_ROWS = 256  # rows of x that share the workspace of a split K when results must not depend on M
ROW = 1 << 30  # the kernels' GROUP for one scale per row: every k // ROW is group 0


@dataclass(frozen=True)
class Config:
    """Tile of y^T, pack blocks of 128 codes per step, parts of K, way C (scale_weight), raster, warps, stages.

    dequantize_mb above 0 is way D with chunks of so many MB; nothing else counts then.
    """

    block_n: int
    block_m: int
    pack_blocks: int
    split_k: int
    scale_weight: bool
    raster: int
    num_warps: int
    num_stages: int
    dequantize_mb: int = 0


class Kernels(NamedTuple):
    """An op's name, its two kernels, the codes of a packed word and compile-time flags that only it has."""

    op: str
    matmul: Any
    dequantize: Any
    codes_per_word: int
    flags: dict[str, Any]


def invariant(shape: tuning.Shape, card: Card) -> Config:
    """The one Config of a weight when a row's result must not depend on the other rows: nothing in it looks at M.

    Way A, exact, on tiles that are wide enough for a prompt and narrow enough for one token; K split for one token.
    """
    split = min(4, tuning.split_k(-(-shape.n // 128), -(-shape.k // 128), shape._replace(m=1), card))
    return Config(128, 64, 1, split, False, 8, 8, 3)


def why(config: Config, shape: tuning.Shape, card: Card) -> str:
    """The way of a Config in words, with the figures that the heuristic goes by: computed for an H200, not measured."""
    if config.dequantize_mb:
        share = 1 / (1 + 190 / (1 << tuning.bucket(shape.m)))
        return f"way D, chunks of {config.dequantize_mb} MB: computed {share:.2f} of bf16's rate"
    if config.scale_weight:
        return "way C, scaled weights: expected 0.75 to 0.85 of bf16's rate"
    programs = -(-shape.n // config.block_n) * -(-shape.m // config.block_m) * config.split_k
    return f"way A, exact weights: {programs} programs for {card.sms} SMs, {config.split_k} parts of K"


def candidates(
    shape: tuning.Shape, card: Card, heuristic: Callable[[tuning.Shape, Card], Config], codes_per_word: int
) -> list[Config]:
    """What a tuner tries beside the heuristic: splits, depths and steps up to 64 tokens; tiles and way D above."""
    base, m = heuristic(shape, card), shape.m
    blocks = -(-shape.k // 128)
    rounds = shape.dtype == torch.bfloat16 and m > 64
    if m <= 64:
        changes = [{"split_k": s, "num_stages": d} for s in (1, 2, 4, 8) for d in (3, 4, 5)]
        changes += [{"pack_blocks": b, "num_stages": d} for b in (1, 2) for d in (2, 3, 4)]
        changes += [{"block_n": n, "num_warps": w} for n, w in ((64, 4), (128, 8), (256, 8))]
        changes += [{"block_m": b, "num_warps": 4 if b <= 32 else 8} for b in (16, 32, 64)]
    else:
        fused = {"dequantize_mb": 0, "scale_weight": rounds}
        tiles = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (256, 64, 8), (256, 128, 8), (128, 256, 8))
        changes = [
            {**fused, "block_n": n, "block_m": b, "num_warps": w, "num_stages": d} for d in (3, 4) for n, b, w in tiles
        ]
        changes += [{**fused, "block_m": 64, "scale_weight": False}, {**fused, "raster": 4}]
        changes += [{"dequantize_mb": size} for size in (16, 32, 64)] if rounds else []

    def fits(c: Config) -> bool:
        if c.dequantize_mb:
            return True
        x_bytes, w_bytes = c.block_m * 256 * c.pack_blocks, c.block_n * 256 // codes_per_word * c.pack_blocks
        largest = 128 * 64 if card.sm >= 100 else 256 * 128
        whole = blocks % c.pack_blocks == 0 and (c.pack_blocks == 1 or shape.group >= 64)
        split = 4 * c.split_k <= max(4, blocks // c.pack_blocks)
        held = (x_bytes + w_bytes) * c.num_stages <= card.shared_bytes
        return held and whole and split and c.block_n * c.block_m <= largest

    return tuning.variants(base, changes, fits)


def plan(
    kernels: Kernels,
    config_for: Callable[[tuning.Shape, Card], Config],
    card: Card,
    flat: tuple[Any, ...],
    config: Config | None,
) -> tuple[torch.Tensor, list[Launch | Product]]:
    """The output, and the kernels that fill it, for the arguments of the schema."""
    x, w, word, _, bias, n, k, group = flat[:8]
    batch_invariant = len(flat) > 9 and flat[9]
    if config is None:
        config = (invariant if batch_invariant else config_for)(tuning.Shape(x.shape[0], n, k, group, x.dtype), card)
    y = out_like(*flat)
    return y, _launches(kernels, config, card, x, w, word, bias, y, group, batch_invariant)


def _launches(
    kernels: Kernels,
    config: Config,
    card: Card,
    x: torch.Tensor,
    w: torch.Tensor,
    word: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    group: int,
    batch_invariant: bool,
) -> list[Launch | Product]:
    """The kernels that fill y: one, or two for a split K, or two per chunk of way D.

    Memory beside the output: the parts of a split K, fp32 [split, M, N] (M <= 256 if batch_invariant), or one chunk of the
    weight, at most `dequantize_mb` MB.
    """
    (m, k), n, n_pad = x.shape, y.shape[1], w.shape[0]
    step, k_pad = 128 * config.pack_blocks, kernels.codes_per_word * w.shape[1]
    each, split = tuning.cut(-(-k // step), config.split_k)
    if k_pad % step:
        raise ValueError(
            f"{kernels.op}: a step is {step} codes, expected a divisor of the padded K = {k_pad}; pack_blocks=1 fits"
        )
    if group != k and group not in (32, 64) and group % 128:
        raise ValueError(f"{kernels.op}: group is {group}, expected 32, 64, a multiple of 128, or K = {k}")
    group = ROW if group == k else group
    if config.dequantize_mb:
        return _by_chunks(kernels, config.dequantize_mb, x, w, word, bias, y, group)
    has_bias = bias is not None and split == 1
    options = {
        "GROUP": group,
        **kernels.flags,
        "HAS_BIAS": has_bias,
        "EVEN_K": k % step == 0,
        "SCALE_WEIGHT": config.scale_weight,
        "USE_ASM": not INTERPRETED,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "PACK_BLOCKS": config.pack_blocks,
        "RASTER": config.raster,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FUSION,
        **registers(card),
    }
    rows = min(m, INVARIANT_ROWS) if batch_invariant and split > 1 else m
    space = x.new_empty(split * rows * n, dtype=torch.float32) if split > 1 else y
    found: list[Launch | Product] = []
    for first in range(0, m, rows):
        x_part, y_part = x[first : first + rows], y[first : first + rows]
        count = x_part.shape[0]
        out = y_part if split == 1 else space[: split * count * n].view(split, count, n)
        sizes = (count, n, k, n_pad, each, x.stride(0), w.stride(0), out.stride(-2))
        grid = (-(-n // config.block_n) * -(-count // config.block_m), split)
        args = (x_part, w, word, bias if has_bias else word, out, *sizes)
        found.append(Launch(kernels.matmul, grid, args, options, (config.block_n, step)))
        if split > 1:
            found.append(add_slices_launch(out, None, None, bias, y_part))
    return found


def _by_chunks(
    kernels: Kernels,
    megabytes: int,
    x: torch.Tensor,
    w: torch.Tensor,
    word: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    group: int,
) -> list[Launch | Product]:
    """Way D: chunk after chunk in the same memory, made whole by a kernel of ours and multiplied by torch."""
    n, n_pad, k, k_pad = y.shape[1], w.shape[0], x.shape[1], kernels.codes_per_word * w.shape[1]
    parts = chunks(n, k_pad, megabytes)
    chunk = x.new_empty((-(-(parts[0][1] - parts[0][0]) // 64) * 64, k_pad))
    options = {"GROUP": group, **kernels.flags, "USE_ASM": not INTERPRETED, "BLOCK_N": 64}
    found: list[Launch | Product] = []
    for first, last in parts:
        grid = (-(-(last - first) // 64), k_pad // 128)
        args = (w, word, chunk, first, n_pad, w.stride(0), chunk.stride(0))
        found.append(Launch(kernels.dequantize, grid, args, options | {"num_warps": 4, "enable_fp_fusion": FUSION}))
        part = None if bias is None else bias[first:last]
        found.append(Product(x, chunk[: last - first, :k], part, y[:, first:last]))
    return found
