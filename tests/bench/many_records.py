"""Records as a long run leaves them: four specs over four caches at four loads, prices, energy, a red gate, rows that failed.

The figures follow a plain roofline, so that the plots look as real ones do; none of them was measured.
"""

from __future__ import annotations

from typing import Any

from percard.bench.record import Record

CARD = {"name": "NVIDIA H20", "spec_id": "h20-96", "mem_mib": 97871, "cards": 1, "noise_floor_pct": 0.8,
        "roof": {"copy_gbs": 3500.0, "bf16": 138.0, "int8": 270.0}}  # fmt: skip
CPU = {"model": "A processor", "threads": 2, "torch_isa": "AVX512", "read_gbs": 29.0, "noise_floor_pct": 1.2}
ENV = {"torch": "2.13.0", "triton": "3.9.0", "cuda": "13.0", "driver": "590.1", "python": "3.11.7", "os": "Linux"}
BITS = {"bf16": 16.0, "w8a8": 8.1, "w4a16-g128": 4.3, "w4a8-g128": 4.4, "w8a16": 8.1}
CACHES = {"bf16": 16.0, "int8": 8.5, "k8v4": 6.6, "int4": 4.6}
KL = {"bf16": 0.0, "w8a8": 0.0021, "w4a16-g128": 0.0094, "w4a8-g128": 0.0121, "w8a16": 0.0004}
CACHE_KL = {"bf16": 0.0, "int8": 0.0003, "k8v4": 0.0041, "int4": 0.0290}
BOUND = {"ttft_ms": 2000, "tpot_ms": 50, "quantile": 0.99}


def quality(spec: str, cache: str) -> dict[str, Any]:
    kl = KL[spec] + CACHE_KL[cache]
    red = kl > 0.038
    return {
        "gate": "red" if red else "none" if kl == 0 else "green", "model": "qwen3-8b", "kl": kl, "top1": 1 - 3.2 * kl**0.75,
        "ppl": 9.7 * (1 + kl), "protocol": "16384 tokens in 8 windows of 2048, stride 2048; reference in bfloat16",
        "reasons": [f"KL {kl:.4f} above 0.0380"] if red else [],
    }  # fmt: skip


def seconds(spec: str, cache: str, batch: int, depth: int) -> float:
    """A decode step of 8e9 weights over `depth` tokens of 147 kB each at 16 bits, at 2.8e12 bytes a second."""
    moved = 8e9 * BITS[spec] / 8 + batch * depth * 147456 * CACHES[cache] / 16
    rate = 100e12 if spec in ("bf16", "w4a16-g128", "w8a16") else 190e12
    return max(moved / 2.8e12, 2 * 8e9 * batch / rate) + 2e-4


def record(level: str, case: str, spec: str, cache: str, work: float, second: float, **changes: Any) -> Record:
    """A row whose `work` tokens took `second`, three samples around it."""
    samples = [1e6 * second * f for f in (0.985, 1.0, 1.03)]
    phase = "tok_s_in" if ".pp" in case else "tok_s"
    gate = quality(spec, cache)
    timed = gate["gate"] != "red"
    tokens = {phase: work / second, "tok_s_per_card": work / second} | changes.pop("tokens", {})
    latency = {"median": samples[1], "lo": samples[0], "hi": samples[2], "samples": samples}
    return Record(
        **{
            "cell_key": f"{level} {case} {spec} {cache} {changes.get('shape')}",
            "level": level,
            "case": case,
            "code": {
                "percard": "0.1.0",
                "git_sha": "0123456789abcdef",
                "command": f"percard bench {level} shape:qwen3-8b",
            },
            "env": ENV,
            "card": CARD,
            "model": {"id": "qwen3-8b", "weights": "real", "layers_run": 36, "layers": 36},
            "scheme": {"spec": spec, "kv_spec": cache, "head": "16bit"},
            "clock": {"rounds": 3},
            "latency_us": latency if timed else None,
            "tokens": tokens if timed else None,
            "memory": {
                "weights": int(8e9 * BITS[spec] / 8 + 1.2e9),
                "kv_bytes_per_token": int(147456 * CACHES[cache] / 16),
            },
            "quality": gate,
        }
        | changes
    )


def versus(spec: str, cache: str, batch: int, depth: int) -> dict[str, Any]:
    gain = seconds("bf16", "bf16", batch, depth) / seconds(spec, cache, batch, depth)
    one = {"ratio": gain, "ci95": [0.98 * gain, 1.01 * gain], "batch": batch, "batch_fp16": batch, "baseline_key": "x"}
    most = {**one, "ratio": 3.1 * gain, "ci95": [3.0 * gain, 3.2 * gain], "batch": 96, "batch_fp16": 24}
    if cache == "k8v4":
        most = {"ratio": None, "reason": "baseline_does_not_fit"}
    return {"same_batch": one, "same_bound": {**most, "bound": BOUND}, "max_fit": most}


def models(priced: bool = True) -> list[Record]:
    """Whole models: prefill, and decode at four batches and three depths."""
    out = []
    for spec in BITS:
        for cache in CACHES:
            for batch in (1, 4, 16, 64):
                for depth in (1024, 8192, 32768) if batch in (1, 16) else (1024,):
                    second = seconds(spec, cache, batch, depth)
                    usd = 1e6 * 2.5 / 3600 / (batch / second)
                    out.append(
                        record(
                            "model",
                            f"qwen3-8b.model.tg128.d{depth}.b{batch}",
                            spec,
                            cache,
                            batch,
                            second,
                            shape={"batch": batch, "isl": depth, "osl": 128, "kv_len": depth},
                            tokens={"vs_fp16": versus(spec, cache, batch, depth)},
                            money={"usd_per_card_hour": 2.5, "usd_per_mtok": {"out": usd, "in": usd / 9}}
                            if priced
                            else None,
                            energy={"j_per_out_token": 320 * second / batch, "power_valid": True, "scope": "gpu_board"},
                        )
                    )
            case = {"shape": {"batch": 1, "isl": 1024, "osl": 128, "kv_len": 1024}}
            case["tokens"] = {"vs_fp16": {"same_batch": versus(spec, cache, 1, 1024)["same_batch"]}}
            out.append(
                record(
                    "model", "qwen3-8b.model.pp1024.b1", spec, cache, 1024, 0.14 * (0.55 if "a8" in spec else 1), **case
                )
            )
    failed = {
        "status": "oom",
        "error": {"type": "OutOfMemoryError", "message": "batch 256 needs 118 GB of 96", "stage": "load"},
    }
    gone = {"tokens": {}, "latency_us": None, "shape": {"batch": 256, "kv_len": 1024}}
    return [*out, record("model", "qwen3-8b.model.tg128.d1024.b256", "bf16", "bf16", 1, 1.0, **gone, **failed)]


def served(source: str = "percard") -> list[Record]:
    """A load at four concurrencies."""
    out = []
    for spec in BITS:
        for cache in CACHES:
            for users in (1, 8, 32, 128):
                step = 1.25 * seconds(spec, cache, users, 2048)
                times = {
                    f"{n}_s": {"p50": t, "p90": 1.3 * t, "p99": 1.8 * t} for n, t in (("ttft", 0.2), ("tpot", step))
                }
                more = {
                    "tok_s_per_user": 1 / step,
                    "concurrency": users,
                    "goodput": users / step / 512,
                    "vs_fp16": versus(spec, cache, users, 2048),
                }
                shape = {
                    "batch": users,
                    "isl": 2048,
                    "osl": 512,
                    "load": {"mix": "chat", "seed": 0, "requests": 200},
                    "bound": BOUND,
                }
                case = f"qwen3-8b.serve.chat.b{users}"
                out.append(
                    record("serve", case, spec, cache, users, step, shape=shape, tokens=times | more, source=source)
                )
    return out


def linears(card: dict[str, Any] = CARD) -> list[Record]:
    """Linears of a layer at nine M against torch's floats, and an absent rival."""
    shapes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
    out = []
    for spec in ("w8a8", "w4a16-g128", "w4a8-g128"):
        for layer, (n, k) in shapes.items():
            for m in (1, 2, 4, 8, 16, 64, 256, 1024, 4096):
                moved, work = n * k * BITS[spec] / 8 + 2 * m * (n + k), 2.0 * m * n * k
                mine = max(moved / 3.0e12, work / (110e12 if "a16" in spec else 210e12)) * 1e6 + 1.5
                base = max((2 * n * k + 2 * m * (n + k)) / 3.1e12, work / 128e12) * 1e6 + 1.2
                gain = base / mine
                torch = {"impl": "torch bfloat16", "status": "ok", "median": base, "lo": 0.99 * base, "hi": 1.02 * base}
                gone = {"impl": "gemlite", "status": "absent", "reason": "not installed"}
                phase = f"decode.b{m}" if m <= 64 else f"prefill.t{m}"
                out.append(
                    record(
                        "op", f"qwen3-8b.{layer}.{phase}", spec, "bf16", 1, mine / 1e6,
                        shape={"M": m, "N": n, "K": k}, scheme={"spec": spec}, tokens={}, card=card, model={}, memory=None,
                        quality={"gate": "synthetic", "reasons": []}, roofline={"bytes": int(moved), "flops": int(work), "pct_of_roof": 80.0},
                        against=[{**torch, "ratio": gain, "ci95": [0.97 * gain, 1.03 * gain]}, gone],
                    )
                )  # fmt: skip
    return out


def attention() -> list[Record]:
    """Attention over caches at four lengths and two batches."""
    out = []
    for cache, bits in CACHES.items():
        for batch in (1, 8):
            for length in (1024, 8192, 32768, 131072):
                moved = batch * length * 2 * 8 * 128 * bits / 8
                mine, base = moved / 2.6e6 + 4, batch * length * 2 * 8 * 128 * 2 / 2.9e6 + 5
                torch = {"impl": "torch flash", "status": "ok", "median": base, "lo": 0.98 * base, "hi": 1.05 * base}
                out.append(
                    record(
                        "op", f"attention_decode.32-8-128.s{length}.b{batch}.n1.{cache}", "bf16", "bf16", 1, mine / 1e6,
                        shape={"G": 4, "H": 8, "D": 128, "S": length, "batch": batch}, tokens={}, model={},
                        scheme={"spec": cache, "kv_spec": cache}, quality={"gate": "synthetic", "reasons": []},
                        against=[{**torch, "ratio": base / mine, "ci95": [base / mine, base / mine]}],
                        roofline={"bytes": int(moved), "flops": int(4 * batch * length * 32 * 128)},
                    )
                )  # fmt: skip
    return out


def ladder() -> list[Record]:
    """Three models, two specs: score of a task against cost, all of one batch."""
    out = []
    for model, size, score in (("qwen3-0.6b", 0.6, 0.41), ("qwen3-4b", 4.0, 0.78), ("qwen3-8b", 8.0, 0.84)):
        for spec in ("bf16", "w8a8", "w4a16-g128"):
            second = size / 8 * seconds(spec, "bf16", 8, 512)
            task = {"name": "tickets", "score": score - 3 * KL[spec], "n": 200}
            usd = {"in": 0.01, "out": 1e6 * 2.5 / 3600 / (8 / second), "total": 0.7e6 * 2.5 / 3600 / (8 / second)}
            out.append(
                record(
                    "model", f"{model}.ladder.tickets.b8", spec, "bf16", 8, second, shape={"batch": 8, "isl": 300, "osl": 60},
                    model={"id": model, "weights": "real", "layers_run": 36, "layers": 36},
                    quality=quality(spec, "bf16") | {"task": task}, money={"usd_per_card_hour": 2.5, "usd_per_mtok": usd},
                    tokens={"vs_fp16": {"same_batch": versus(spec, "bf16", 8, 512)["same_batch"]}},
                )
            )  # fmt: skip
    return out


def everything() -> list[Record]:
    return [*models(), *served(), *linears(), *attention(), *ladder()]
