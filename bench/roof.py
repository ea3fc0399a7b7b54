"""What this machine reaches at best, measured at the start of a run: the roofs, and the noise floor (A against A).

A share of a measured roof says how good a kernel is; a share of a brochure's says how good the brochure is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from . import board, card, clock

_SIZE = 8192  # of the square products that make the roofs of a card
_CPU_SAMPLE_S = 0.03  # of a sample of the noise floor on a CPU, as of the ops


def identity(device: str) -> dict[str, Any]:
    """What must be equal for two measurements to be comparable, "uuid" of the very card, "arch" to compile for.

    RuntimeError with a remedy when there is no such device.
    """
    if device == "cuda" and card.default_device().type != "cuda":
        raise RuntimeError("torch sees no CUDA card; run on a machine with one, or try the run with --device cpu")
    found = card.fingerprint(torch.device(device))
    env, this = found["env"], found["card"]
    same = {"torch": env["torch"], "triton": env["triton"], "cuda": env["cuda"] if this else None}
    if this:
        same |= {"card": this["name"], "mem_mib": this["mem_mib"], "driver": env["driver"] or board.state()["driver"]}
    else:
        same |= {"cpu": found["cpu"]["model"], "threads": found["cpu"]["threads"]}
    return {"same": same, "uuid": this.get("uuid"), "arch": f"sm_{this['sm']}" if this else "sm_90"}


def measure(device: str) -> Iterator[dict[str, Any]]:
    """One row: the sections env, card and cpu of a Record with roofs, noise floor, and reasons for noise in "noisy"."""
    where = torch.device(device)
    found = card.fingerprint(where)
    noisy = card.noise(where)
    rate = card.read_bandwidth(where) / 1e9
    floor = noise_floor(where)
    words = f"{card.describe(where)}: {rate:.0f} GB/s, noise floor {floor:.1f} %"
    if where.type == "cuda":
        now = board.state(found["card"]["uuid"])
        noisy += board.noisy(now)
        roof = {"copy_gbs": rate, **rates(where)}
        found["card"] |= {name: now[name] for name in ("vbios", "ecc", "mig", "power_cap_w", "throttle")}
        found["card"] |= {"clocks": {"sm": now["sm"], "mem": now["mem"], "sm_max": now["sm_max"]}}
        found["card"] |= {"temp_c": {"start": now["temp_c"]}, "roof": roof, "noise_floor_pct": floor}
        found["env"]["driver"] = found["env"]["driver"] or now["driver"]
        words += ", " + ", ".join(
            f"{name} {value:.0f} T/s" for name, value in roof.items() if name != "copy_gbs" and value
        )
    else:
        found["cpu"] = {**found["cpu"], "read_gbs": rate, "noise_floor_pct": floor}
    yield {**found, "noisy": noisy, "words": words}


def rates(device: torch.device) -> dict[str, float | None]:
    """1e12 operations per second of the best product of 8192^3 seen, by type; None where this card has no such units."""
    found: dict[str, float | None] = {}
    random = torch.Generator(device).manual_seed(0)

    def normal() -> torch.Tensor:  # never zeros: they draw less power and run faster
        return torch.randn(_SIZE, _SIZE, generator=random, device=device)

    def bf16() -> Callable[[], Any]:
        a, b = normal().bfloat16(), normal().bfloat16()
        return lambda: F.linear(a, b)

    def int8() -> Callable[[], Any]:
        a, b = ((40 * normal()).clamp(-127, 127).to(torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())

    def fp8() -> Callable[[], Any]:
        a, b = (normal().to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    for name, make in (("bf16", bf16), ("int8", int8), ("fp8", fp8)):
        try:
            times = clock.card_ab({name: [make()]}, device=device, rounds=5)[name].graph
            found[name] = 2 * _SIZE**3 / min(times.samples) / 1e12
        except (RuntimeError, AttributeError):  # no such units on this card, or not in this torch
            found[name] = None
    return found


def float_rate(device: torch.device, seconds: float = 0.1) -> float:
    """1e12 operations per second of the best 16- or 32-bit float product seen: what a model's operations are a share of.

    bf16 of `rates` on a card. On a CPU the fastest of its float types at a prompt's shape, some tenths of a second in all.
    """
    if device.type == "cuda":
        return rates(device)["bf16"] or 0.0
    m, n, k = 512, 2048, 2048
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        F.linear(a, b)
        end = time.perf_counter() + seconds
        while True:
            begin = time.perf_counter()
            F.linear(a, b)
            best = max(best, 2 * m * n * k / (time.perf_counter() - begin) / 1e12)
            if time.perf_counter() > end:
                break
    return best


def noise_floor(device: torch.device) -> float:
    """Per cent by which one thing timed against itself may differ: the far end of the interval of its A/A ratio."""
    n, m = (4096, 16) if device.type == "cuda" else (512, 16)
    random = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(m, n, generator=random, device=device).to(dtype)
    nbytes = n * n * x.element_size()
    copies = min(64, clock.copies_for_cold_cache(nbytes, card.last_level_cache(device)))
    if device.type == "cuda":
        weights = [torch.randn(n, n, generator=random, device=device).to(dtype) for _ in range(copies)]
        turn = [lambda w=w: F.linear(x, w) for w in weights]
        times = {name: t.graph for name, t in clock.card_ab({"a": turn, "again": turn}, device=device).items()}
    else:
        w = torch.randn(n, n, generator=random)
        both = {"a": lambda: F.linear(x, w), "again": lambda: F.linear(x, w)}
        once = clock.ab(both, rounds=3, calls=5)["a"].median
        # Samples as long as those of the ops: a short one catches a neighbour whole, and would not be their noise.
        times = clock.ab(both, rounds=7, calls=max(20, min(2000, math.ceil(_CPU_SAMPLE_S / once))))
    ratio = clock.ratio(times["a"], times["again"])
    return 100 * max(abs(ratio.lo - 1), abs(ratio.hi - 1))
