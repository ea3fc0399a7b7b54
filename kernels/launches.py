"""What a launch of a kernel is called, and what decides about its machine code."""

from __future__ import annotations

from typing import Any

import torch


def describe(launch: Any) -> str:
    """Kernel, tile and flags of a launch: `matmul_w4a16 n128 m16 group128 asm warps4 stages4 bf16`."""
    short = {"BLOCK_N": "n", "BLOCK_M": "m", "BLOCK_K": "k", "num_warps": "warps", "num_stages": "stages"}
    words = [launch.kernel.__name__.removesuffix("_kernel")]
    for key, value in launch.options.items():
        if key in ("enable_fp_fusion", "maxnreg", "RASTER", "USE_ASM"):
            continue
        if isinstance(value, bool):
            words += [key.lower()] if value else []
        elif isinstance(value, int):
            words.append(f"{short.get(key, key.lower())}{value if value < 1 << 30 else 'row'}")
        else:
            words.append(value.name)
    dtypes = [str(a.dtype).removeprefix("torch.") for a in launch.args if isinstance(a, torch.Tensor)]
    return " ".join([*words, f"{dtypes[0]}>{dtypes[-1]}"])


def key(launch: Any) -> tuple:
    """What decides about the machine code: kernel, compile-time options, types, and which sizes divide by 16."""
    traits = [
        _trait(value, parameter.do_not_specialize)
        for parameter, value in zip(launch.kernel.params, launch.args, strict=False)
    ]
    return launch.kernel.__name__, tuple(launch.options.items()), tuple(traits)


def _trait(value: Any, any_number: bool = False) -> Any:
    """What Triton specialises a kernel on of an argument: a type, and of a whole number whether it is 1 or divides by 16."""
    if isinstance(value, tuple):
        return tuple(map(_trait, value))
    if any_number or not isinstance(value, int):
        return getattr(value, "dtype", type(value))
    return 1 if value == 1 else value % 16 == 0
