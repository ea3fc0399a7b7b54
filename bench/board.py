"""What a card's board says of itself: clocks, power, temperature, throttling. It is asked, never told.

NVML is read where the package nvidia-ml-py is there, else the text of `nvidia-smi`, else every value is None and
`source` says why. Units: MHz, watt, degrees Celsius.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean "slower than it could be" (NVML reference, nvml.h).
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}
_QUERY = "driver_version,vbios_version,ecc.mode.current,mig.mode.current,power.limit,power.default_limit,clocks.sm,clocks.mem"
_QUERY += ",clocks.max.sm,temperature.gpu,power.draw"
_SMI_NAMES = (
    "driver",
    "vbios",
    "ecc",
    "mig",
    "power_cap_w",
    "power_default_w",
    "sm",
    "mem",
    "sm_max",
    "temp_c",
    "power_w",
)


def state(uuid: str | None = None) -> dict[str, Any]:
    """The board now: driver, vbios, ecc, mig, power_cap_w, power_default_w, sm, mem, sm_max, temp_c, power_w, throttle, source.

    `uuid` is torch's, without "GPU-"; None = the first card. What the board does not say is None.
    """
    try:
        return _from_nvml(uuid)
    except Exception as error:  # not installed, no driver, not permitted: NVML has an error class for each
        why = f"NVML: {type(error).__name__}: {error}"
    try:
        return _from_smi(uuid)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = f"{why}; nvidia-smi: {type(error).__name__}"
    return {**dict.fromkeys(_SMI_NAMES), "throttle": [], "source": f"not available ({why})"}


def noisy(now: dict[str, Any]) -> list[str]:
    """Reasons in a board's state why times taken now may scatter."""
    found = []
    cap, default = now.get("power_cap_w"), now.get("power_default_w")
    if cap and default and cap < 0.99 * default:
        found.append(f"power limit {cap:.0f} W is below the default {default:.0f} W")
    if now.get("mig") in (1, "Enabled"):
        found.append("MIG is on: other instances share the card")
    found += [f"throttled at idle: {reason}" for reason in now.get("throttle") or () if reason != "power cap"]
    return found


class Watch:
    """Samples the board from a thread while something runs; `summary()` afterwards."""

    def __init__(
        self, uuid: str | None, every_s: float = 0.1, ask: Callable[..., dict[str, Any]] | None = None
    ) -> None:
        self._uuid, self._every = uuid, every_s
        self._ask = ask or _from_nvml
        self.samples: list[dict[str, Any]] = []
        self.reason = ""

    def summary(self) -> dict[str, Any]:
        """{clocks {sm, mem, sm_min, sm_max}, temp_c {start, max}, throttle [..], power_w}; {} when nothing was seen."""
        if not self.samples:
            return {}
        sm, mem, temp, power = (
            [s[name] for s in self.samples if s[name] is not None] for name in ("sm", "mem", "temp_c", "power_w")
        )
        return {
            "clocks": {
                "sm": sum(sm) / len(sm) if sm else None,
                "mem": max(mem, default=None),
                "sm_min": min(sm, default=None),
                "sm_max": max(sm, default=None),
            },
            "temp_c": {"start": temp[0] if temp else None, "max": max(temp, default=None)},
            "throttle": sorted({reason for s in self.samples for reason in s["throttle"]}),
            "power_w": sum(power) / len(power) if power else None,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[Watch]:
        """Samples until the block ends. NVML alone: starting nvidia-smi ten times a second would disturb the run."""
        done = threading.Event()

        def sample() -> None:
            while True:
                try:
                    self.samples.append(self._ask(self._uuid))
                except Exception as error:
                    self.reason = f"{type(error).__name__}: {error}"
                    return
                if done.wait(self._every):
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()


def energy_j(uuid: str | None = None) -> float:
    """Joules that the board has drawn since its driver was loaded. Raises what NVML raises when it does not say."""
    nvml = _nvml()
    return nvml.nvmlDeviceGetTotalEnergyConsumption(_handle(nvml, uuid)) / 1000


def power_w(uuid: str | None = None) -> float:
    """Watt of the board now; of boards that do not give the power of the moment, NVML's average of up to one second."""
    nvml = _nvml()
    handle = _handle(nvml, uuid)
    try:
        field = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn == 0 and field.value.uiVal:
            return field.value.uiVal / 1000
    except (nvml.NVMLError, AttributeError):  # an older card, or an older NVML
        pass
    return nvml.nvmlDeviceGetPowerUsage(handle) / 1000


@functools.cache
def _nvml() -> Any:
    """The NVML module, opened for the life of this process: opening it takes longer than a sample may."""
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml


def _handle(nvml: Any, uuid: str | None) -> Any:
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else nvml.nvmlDeviceGetHandleByIndex(0)


def _from_nvml(uuid: str | None) -> dict[str, Any]:
    nvml = _nvml()
    handle = _handle(nvml, uuid)

    def ask(name: str, *args: Any) -> Any:
        return _try(nvml, name, handle, *args)

    def watt(milliwatt: int | None) -> float | None:
        return None if milliwatt is None else milliwatt / 1000

    bits = ask("nvmlDeviceGetCurrentClocksEventReasons") or ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    ecc, mig = ask("nvmlDeviceGetEccMode"), ask("nvmlDeviceGetMigMode")
    return {
        "driver": _text(_try(nvml, "nvmlSystemGetDriverVersion")),
        "vbios": _text(ask("nvmlDeviceGetVbiosVersion")),
        "ecc": ecc[0] if ecc else None,
        "mig": mig[0] if mig else None,
        "power_cap_w": watt(ask("nvmlDeviceGetPowerManagementLimit")),
        "power_default_w": watt(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        "sm": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "mem": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "sm_max": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "temp_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": watt(ask("nvmlDeviceGetPowerUsage")),
        "throttle": [word for bit, word in REASONS.items() if bits & bit],
        "source": "nvml",
    }


def _try(nvml: Any, name: str, *args: Any) -> Any:
    """The answer, or None when this card, or this NVML, does not say."""
    try:
        return getattr(nvml, name)(*args)
    except (nvml.NVMLError, AttributeError):
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _from_smi(uuid: str | None) -> dict[str, Any]:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    if uuid:
        command.append(f"--id=GPU-{uuid}")
    text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text.strip() else []
    if len(values) != len(_SMI_NAMES):
        raise ValueError(f"{len(values)} values, expected {len(_SMI_NAMES)}")
    return {**{n: _number(v) for n, v in zip(_SMI_NAMES, values, strict=True)}, "throttle": [], "source": "nvidia-smi"}


def _number(text: str) -> float | str | None:
    if text.startswith("[") or text in ("N/A", ""):
        return None
    try:
        return float(text)
    except ValueError:
        return text
