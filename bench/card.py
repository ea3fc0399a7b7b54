"""Which machine this is, and how fast its memory really reads. The only place in bench/ that asks for a device.

`cards/cards.json` holds published figures of cards with their source; what is measured here wins over them.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels import device as kernels_device
from .clock import synchronize

_CARDS = Path(__file__).resolve().parent / "cards" / "cards.json"
_ENV_PREFIXES = ("PERCARD_", "CUDA_", "TRITON_", "OMP_", "ATEN_CPU_", "ONEDNN_", "MKL_")
_ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")


def default_device() -> torch.device:
    """The card when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def published() -> tuple[dict[str, Any], ...]:
    """The rows of cards.json."""
    return tuple(json.loads(_CARDS.read_text(encoding="utf-8"))["cards"])


def published_row(device_name: str, memory_mib: float) -> dict[str, Any] | None:
    """The row of a card by its exact name and its memory within 3 %, or None."""
    for row in published():
        if device_name in row["device_names"]:
            size = row["memory_mib"] or row["memory_gb"] * 1e9 / 2**20
            if abs(memory_mib / size - 1) <= 0.03:
                return row
    return None


def fingerprint(device: torch.device | None = None) -> dict[str, dict[str, Any]]:
    """{"env", "cpu", "card"} of a Record (bench/record.py); "card" is {} on a CPU."""
    device = device if device is not None else default_device()
    return {"env": _environment(), "cpu": cpu(), "card": _card(device) if device.type == "cuda" else {}}


def describe(device: torch.device | None = None) -> str:
    """The machine in one line of words."""
    device = device if device is not None else default_device()
    this = cpu()
    words = f"{this['model']}, {this['threads']} threads, torch {torch.__version__} ({this['torch_isa']})"
    if device.type == "cuda":
        found = _card(device)
        words = f"{found['name']} ({found['mem_mib']} MiB, sm_{found['sm']}), {words}"
    return words


@functools.cache
def cpu() -> dict[str, Any]:
    """The processor: model, isa flags that matter here, what torch uses of them, sockets, threads, caches in bytes."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "torch_isa": torch_isa(),
        "sockets": _sockets(),
        "threads": torch.get_num_threads(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual": "hypervisor" in flags,
        "l2_bytes": _cpu_cache(2),
        "l3_bytes": _cpu_cache(3),
    }


def torch_isa() -> str:
    """What torch's own CPU kernels and the library behind its matmul are allowed to use."""
    level = torch.backends.cpu.get_cpu_capability()
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{level}, ONEDNN_MAX_CPU_ISA={cap}" if cap else level


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache before memory: L2 of a card, L3 (or L2) of a CPU; 0 when the machine does not say."""
    if device.type == "cuda":
        return kernels_device.card(device.index or 0).l2_bytes
    this = cpu()
    return this["l3_bytes"] or this["l2_bytes"] or 0


def noise(device: torch.device) -> list[str]:
    """Reasons why times taken now may scatter, in words; [] = none seen."""
    found = []
    this = cpu()
    if device.type == "cpu":
        if this["virtual"]:
            found.append("virtual machine: neighbours share cache and memory")
        if this["governor"] not in (None, "performance"):
            found.append(f"governor {this['governor']}")
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > this["affinity"] * 1.25:
            found.append(f"load {load:.1f} on {this['affinity']} cores")
    else:
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device)
        if total - free - ours > 0.05 * total:
            found.append(f"{(total - free - ours) / 2**20:.0f} MiB of the card are used by someone else")
    return found


def read_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second of the best of several reads of a buffer larger than the cache (a copy, both ways, on a card).

    The buffer is at most a quarter of free memory; on a CPU whose L3 is larger, the figure says how fast that L3 is.
    """
    return _bandwidth(device, seconds, "copy" if device.type == "cuda" else "read")


def bandwidths(device: torch.device, seconds: float = 0.5) -> dict[str, float]:
    """Bytes per second that are only read, and that a copy moves, both ways: {"read", "copy"}."""
    return {kind: _bandwidth(device, seconds, kind) for kind in ("read", "copy")}


def _bandwidth(device: torch.device, seconds: float, kind: str) -> float:
    size = max(4 * last_level_cache(device), 2**28)
    size = min(size, 2**30 if device.type == "cpu" else 2**32, free_bytes(device) // 4)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    if kind == "copy":
        target = torch.empty_like(source)
        work, moved = (lambda: target.copy_(source)), 2 * source.numel() * 4
    else:
        # max has no carried sum to wait for, so it runs at the speed of the loads
        work, moved = (lambda: source.max()), source.numel() * 4
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return moved / best


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**31


def total_bytes(device: torch.device) -> int:
    """All memory of the card, or of this machine as far as the container may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = 2**31
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal"):
            found = int(line.split()[1]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max") or ""
    return min(found, int(limit)) if limit.isdecimal() else found


class Peak:
    """How many bytes more than at its start are held at the worst moment since; None where the system does not say.

    A card: what torch allocated. A CPU: pages of this process (Linux), so what malloc kept from before is not seen again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
            self._start = _status("VmRSS")
        except OSError:
            self._start = None

    def bytes(self) -> int | None:
        """The extra bytes so far."""
        if self._start is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self._start)


def _status(name: str) -> int | None:
    """A size in /proc/self/status, bytes."""
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _environment() -> dict[str, Any]:
    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "container": Path("/.dockerenv").exists() or "container" in os.environ,
        "rivals": {},
        "env_vars": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENV_PREFIXES)},
        "byteorder": sys.byteorder,
    }


def _card(device: torch.device) -> dict[str, Any]:
    props = torch.cuda.get_device_properties(device)
    mib = props.total_memory // 2**20
    row = published_row(props.name, mib)
    return {
        "spec_id": row["id"] if row else None,
        "name": props.name,
        "uuid": str(getattr(props, "uuid", "")) or None,
        "sm": props.major * 10 + props.minor,
        "mem_mib": mib,
        "cards": torch.cuda.device_count(),
    }


def _driver() -> str | None:
    found = _read("/proc/driver/nvidia/version")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Key and value of the first processor in /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if not line.strip() and found:
            break
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _sockets() -> int:
    text = _read("/proc/cpuinfo") or ""
    return len({line for line in text.splitlines() if line.startswith("physical id")}) or 1


def _cpu_cache(level: int) -> int | None:
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{folder}/level") == str(level) and _read(f"{folder}/type") != "Instruction":
            size = _read(f"{folder}/size") or ""
            units = {"K": 2**10, "M": 2**20, "G": 2**30}
            return int(size[:-1]) * units[size[-1]] if size[-1:] in units else int(size or 0)
    return None
