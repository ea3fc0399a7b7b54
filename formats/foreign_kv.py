"""Caches of other engines as KVPages: views of their memory, nothing is copied and nothing is written.

    engine, its cache dtype             rows                                  words                       form
    vLLM int8_per_token_head            [blocks, 2, P, Hkv, D + 4] or         fp32 in the last four       int8
                                        [blocks, Hkv, P, 2 (D + 4)]           bytes of each row
    vLLM int4_per_token_head            the same with D / 2 + 4 bytes         the same, zero in the       int4 pairs mantissa
                                                                              mantissa's last four bits
    LMDeploy quant_policy 4             k, v [blocks, P, Hkv, D / 2]          [blocks, P, Hkv, 2]         int4 halves zero
    SGLang token pool                   k, v [tokens, Hkv, D], P = 1          none; one, or [tokens, Hkv] bf16; int8
    FlashInfer                          [pages, 2, P, Hkv, D] (NHD) or        none                        bf16
                                        [pages, 2, Hkv, P, D] (HND), or a pair

Layouts were read in these sources:

    vLLM        vllm/v1/attention/backends/triton_attn.py (get_kv_cache_shape, _ensure_scale_caches: five dimensions in older releases,
                four with "K | K scale | V | V scale" in newer ones) and vllm/v1/attention/ops/int4_per_token_head.py at 055e47c
    LMDeploy    0.16.0, lmdeploy/pytorch/engine/cache_engine.py and lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py at 1263d5c
    SGLang      python/sglang/srt/mem_cache/memory_pool.py (MHATokenToKVPool) at 000ccdb
    FlashInfer  docs/tutorials/kv_layout.rst at 01c897d

What a reader should know. vLLM's int4 holds K and V turned by a Hadamard transform of norm sqrt(D): queries are turned alike, the scale of
the softmax is divided by D, outputs are turned back and divided by D; rows come out as they lie, turned. It clears the four bits of
the zero before it multiplies by the scale, we do not: up to 15 in 2^23 of a number. Rows of vLLM lie D + 4 bytes apart, so nothing
is aligned to 16 bytes: `kvcache.unaligned` says so.

FormatError names what does not fit, and what no form of kvcache.py says: eight bits with a zero point (LMDeploy quant_policy 8), fp8,
TurboQuant.
"""

from __future__ import annotations

import torch

from .kvcache import KVPages, KVSpec, check_pages
from .spec import FormatError

INT8, INT4 = KVSpec.parse("int8"), KVSpec.parse("int4")
SCALE = 4  # bytes of an fp32


def vllm_pages(cache: torch.Tensor, kv_cache_dtype: str) -> KVPages:
    """The cache of one layer, int8 or uint8, as vLLM's `kv_cache_dtype` names it; the table is its block_table, int32 [B, blocks]."""
    bits = {"int8_per_token_head": 8, "int4_per_token_head": 4}.get(kv_cache_dtype)
    if bits is None:
        raise FormatError(
            f"vLLM: no form for kv_cache_dtype {kv_cache_dtype!r}; known: int8_per_token_head, int4_per_token_head"
        )
    kind = torch.int8 if bits == 8 else torch.uint8
    packed = cache.ndim == 4
    right = packed or (cache.ndim == 5 and cache.shape[1] == 2)
    width = cache.shape[-1] // 2 if packed else cache.shape[-1]
    if not right or cache.dtype != kind or width <= SCALE or width % SCALE or (packed and cache.shape[-1] % 2):
        data = "D" if bits == 8 else "D / 2"
        raise FormatError(
            f"vLLM: the cache is {cache.dtype} {tuple(cache.shape)}, expected {kind} [blocks, 2, P, Hkv, {data} + 4]"
            f" or [blocks, Hkv, P, 2 ({data} + 4)]"
        )
    steps = (*cache.stride()[:-1], cache.storage_offset())
    if cache.stride(-1) != 1 or any(step % SCALE for step in steps):
        raise FormatError(
            f"vLLM: the cache has strides {cache.stride()}, expected 1, and multiples of 4 for the others"
        )
    words = cache.view(torch.float32)
    if packed:
        halves = [(cache[..., i * width : (i + 1) * width], words[..., i * width // SCALE :]) for i in range(2)]
    else:
        halves = [(cache[:, i].transpose(1, 2), words[:, i].transpose(1, 2)) for i in range(2)]
    (k, k_words), (v, v_words) = (
        (rows[..., : width - SCALE], found[..., width // SCALE - 1 : width // SCALE]) for rows, found in halves
    )
    if bits == 8:
        return _checked("vLLM", KVPages(k, v, INT8, k_words, v_scales=v_words), k.shape[3])
    pages = KVPages(k, v, INT4, k_words, v_scales=v_words, nibbles="pairs", zeros="mantissa")
    return _checked("vLLM", pages, 2 * k.shape[3])


def lmdeploy_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales_zeros: torch.Tensor | None = None,
    v_scales_zeros: torch.Tensor | None = None,
    quant_policy: int = 0,
) -> KVPages:
    """k, v [blocks, P, Hkv, D or D / 2] and their words [blocks, P, Hkv, 2] of the model's type; the table is block_offsets as int32."""
    if quant_policy not in (0, 4):
        why = {8: "8 bits with a zero point; int8 pages are symmetric", 42: "TurboQuant's codebook"}
        raise FormatError(
            f"LMDeploy: quant_policy {quant_policy} is {why.get(quant_policy, 'fp8, or not known')}; known: 0, 4"
        )
    rows = k.transpose(1, 2), v.transpose(1, 2)
    if quant_policy == 0:
        return _checked("LMDeploy", KVPages(*rows), k.shape[3])
    if k_scales_zeros is None or v_scales_zeros is None:
        raise FormatError("LMDeploy: quant_policy 4 without k_scales_zeros and v_scales_zeros")
    words = k_scales_zeros.transpose(1, 2), v_scales_zeros.transpose(1, 2)
    return _checked("LMDeploy", KVPages(*rows, INT4, words[0], v_scales=words[1], zeros="zero"), 2 * k.shape[3])


def sglang_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
) -> KVPages:
    """k, v [tokens, Hkv, D] of a layer's pool, in a float type or int8 with scales: one, or [tokens, Hkv] fp16 | fp32.

    A page is one token: the table is kv_indices int32 with kv_indptr as table_starts, lengths are the differences of kv_indptr.
    """
    if k.ndim != 3 or v.ndim != 3:
        found = f"{tuple(k.shape)} and {tuple(v.shape)}"
        raise FormatError(f"SGLang: k and v are {found}, expected [tokens, Hkv, D]")
    rows = k.unsqueeze(2), v.unsqueeze(2)
    if k.is_floating_point() and k.element_size() > 1:
        if k_scale is not None or v_scale is not None:
            raise FormatError(f"SGLang: scales beside {k.dtype}, expected none: they belong to a cache of one byte")
        return _checked("SGLang", KVPages(*rows), k.shape[2])
    if k.dtype != torch.int8 or v.dtype != torch.int8:
        raise FormatError(f"SGLang: the pool is {k.dtype}, expected a float type of 16 bits, or int8; fp8 has no form")
    if k_scale is None or v_scale is None:
        raise FormatError("SGLang: int8 without k_scale and v_scale")
    words = [_word_of_tokens(name, s, k) for name, s in (("k_scale", k_scale), ("v_scale", v_scale))]
    return _checked("SGLang", KVPages(*rows, INT8, words[0], v_scales=words[1]), k.shape[2])


def _word_of_tokens(name: str, scale: torch.Tensor | float, k: torch.Tensor) -> torch.Tensor:
    """Scale words [tokens, Hkv, 1, 1] of a pool: one number stands for all with strides of 0."""
    if not isinstance(scale, torch.Tensor) or scale.numel() == 1:
        one = torch.as_tensor(scale, dtype=torch.float32, device=k.device).reshape(1, 1, 1, 1)
        return one.expand(*k.shape[:2], 1, 1)
    if scale.shape != k.shape[:2]:
        raise FormatError(f"SGLang: {name} has shape {tuple(scale.shape)}, expected one number or {tuple(k.shape[:2])}")
    return scale[:, :, None, None]


def flashinfer_pages(cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str = "NHD") -> KVPages:
    """A paged cache of one tensor or of a pair. The table is kv_page_indices with kv_indptr as table_starts; flashinfer_lengths."""
    if kv_layout not in ("NHD", "HND"):
        raise FormatError(f"FlashInfer: kv_layout is {kv_layout!r}, expected NHD or HND")
    if isinstance(cache, torch.Tensor):
        if cache.ndim != 5 or cache.shape[1] != 2:
            order = "P, Hkv" if kv_layout == "NHD" else "Hkv, P"
            raise FormatError(
                f"FlashInfer: the cache is {tuple(cache.shape)}, expected [pages, 2, {order}, D] or a pair"
            )
        cache = cache[:, 0], cache[:, 1]
    k, v = (t.transpose(1, 2) if kv_layout == "NHD" else t for t in cache)
    return _checked("FlashInfer", KVPages(k, v), k.shape[3])


def flashinfer_lengths(kv_indptr: torch.Tensor, last_page_len: torch.Tensor, page: int) -> torch.Tensor:
    """lengths int32 [B] of kv_indptr int32 [B + 1] and last_page_len int32 [B]; a sequence without pages has none."""
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return ((pages - 1) * page + last_page_len).where(pages > 0, torch.zeros_like(pages)).to(torch.int32)


def _checked(engine: str, pages: KVPages, size: int) -> KVPages:
    check_pages(engine, pages.k, pages.v, *pages.words, pages.mu, pages.form, size)
    return pages
