"""Joules from a fake NVML and a fake powercap tree, reasons where there are none, and the price of a million tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from percard.bench import board, energy, money
from percard.bench.record import Record
from percard.formats.spec import FormatError

CPU, CARD = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


class NVMLError(Exception):
    pass


def _refuse(*args):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A card that draws 300 W by its counter and says 310 W when asked; tests take parts of it away."""
    made = SimpleNamespace(NVMLError=NVMLError, NVML_FI_DEV_POWER_INSTANT=186, clock=Clock(), watt=310.0)
    made.nvmlInit = lambda: None
    made.nvmlDeviceGetHandleByIndex = lambda index: "first"
    made.nvmlDeviceGetHandleByUUID = lambda name: name
    made.nvmlDeviceGetTotalEnergyConsumption = lambda handle: int(1e9 + 300_000 * made.clock.at)
    made.nvmlDeviceGetPowerUsage = lambda handle: 123_000

    def fields(handle, ids):
        assert ids == [186]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=int(1000 * made.watt)))]

    made.nvmlDeviceGetFieldValues = fields
    monkeypatch.setitem(sys.modules, "pynvml", made)
    board._nvml.cache_clear()
    yield made
    board._nvml.cache_clear()


@pytest.fixture
def powercap(tmp_path) -> Path:
    """Two packages and a domain inside one of them, as Linux shows them; counters start near where they wrap."""
    for name, what in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "dram")):
        folder = tmp_path / "powercap" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{what}\n")
        (folder / "energy_uj").write_text("90000000\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")
    return tmp_path / "powercap"


def test_the_counter_of_a_board(nvml):
    with energy.measured(CARD, uuid="abc", idle_w=70.0, now=nvml.clock) as meter:
        nvml.clock.at += 10.0
    found = meter.section(out_tokens=1500)
    assert found == {
        "energy_j": 3000.0,
        "avg_power_w": 300.0,
        "idle_power_w": 70.0,
        "j_per_out_token": 2.0,
        "scope": "gpu_board",
        "power_valid": True,
        "power_reason": None,
    }
    assert Record("k", "model", "c", energy=found).to_json()  # its keys are the schema's


def test_a_short_window_is_measured_and_not_valid(nvml):
    with energy.measured(CARD, now=nvml.clock) as meter:
        nvml.clock.at += 4.9
    found = meter.section()
    assert found["energy_j"] == pytest.approx(1470) and not found["power_valid"] and found["j_per_out_token"] is None
    assert found["power_reason"] == "a window of 4.9 s is shorter than 5 s"


def test_without_a_counter_power_is_integrated(nvml):
    nvml.nvmlDeviceGetTotalEnergyConsumption = _refuse
    found = energy.source(CARD)
    assert (found.words, found.joules) == ("NVML power, integrated", None)
    with energy.measured(CARD, found=found, now=nvml.clock) as meter:
        nvml.clock.at += 5.0
        nvml.watt = 290.0
        nvml.clock.at += 5.0
    # The trapezoids of whatever was read between 310 and 290 W lie between the two.
    assert 2900 <= meter.section()["energy_j"] <= 3100 and meter.valid
    nvml.nvmlDeviceGetFieldValues = _refuse
    assert board.power_w() == 123.0


def test_a_card_that_says_nothing(nvml):
    nvml.nvmlDeviceGetTotalEnergyConsumption = nvml.nvmlDeviceGetPowerUsage = nvml.nvmlDeviceGetFieldValues = _refuse
    with energy.measured(CARD, now=nvml.clock) as meter:
        nvml.clock.at += 10.0
    found = meter.section(100)
    assert found["energy_j"] is None and found["j_per_out_token"] is None and not found["power_valid"]
    assert "NVMLError: Not Supported" in found["power_reason"] and "nvidia-ml-py" in found["power_reason"]


def test_a_card_that_is_lost_or_a_counter_that_stands_still(nvml):
    with energy.measured(CARD, now=nvml.clock) as meter:
        nvml.clock.at += 10.0
        nvml.nvmlDeviceGetTotalEnergyConsumption = _refuse
    assert meter.section()["power_reason"] == "NVMLError: Not Supported" and meter.joules is None
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 5
    with energy.measured(CARD, now=nvml.clock) as meter:
        nvml.clock.at += 10.0
    assert meter.section()["power_reason"] == "NVML energy counter: the counter did not move" and meter.joules is None


def test_packages_of_a_cpu_are_summed_and_wrap_once(powercap):
    now = Clock()
    with energy.measured(CPU, powercap=powercap, now=now) as meter:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("20000000\n")  # 30 J later, past its end
        (powercap / "intel-rapl:1" / "energy_uj").write_text("95000000\n")
        (powercap / "intel-rapl:0:0" / "energy_uj").write_text("99000000\n")  # lies inside package 0
        now.at += 7.0
    found = meter.section(70)
    assert found["energy_j"] == pytest.approx(35.0) and found["avg_power_w"] == pytest.approx(5.0)
    assert found["scope"] == "cpu_package" and found["power_valid"] and found["j_per_out_token"] == pytest.approx(0.5)


def test_idle_power_comes_from_the_same_counter(powercap):
    def draw(seconds: float) -> None:
        (powercap / "intel-rapl:1" / "energy_uj").write_text("94000000\n")

    watt = energy.idle_power(energy.source(CPU, powercap=powercap), 0.5, sleep=draw)
    assert watt is not None and watt > 0


def test_a_cpu_without_a_counter_says_why(powercap, tmp_path):
    with energy.measured(CPU, powercap=tmp_path / "nowhere") as meter:
        pass
    assert meter.section()["power_reason"].startswith(f"no energy counter: {tmp_path}/nowhere names no CPU package")
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(energy.NoCounter, match=r"energy_uj: not readable \(No such file"):
        energy.source(CPU, powercap=powercap)
    assert energy.missing(CPU, "not asked for")["power_reason"] == "not asked for"


def test_an_error_of_the_work_is_not_swallowed(powercap):
    for tree in (powercap, powercap / "nowhere"):
        with pytest.raises(KeyError), energy.measured(CPU, powercap=tree):
            raise KeyError("work")


def test_a_million_tokens_cost_what_their_time_costs():
    assert money.usd_per_mtok(3.6, 1000.0) == pytest.approx(1.0)
    assert money.usd_per_mtok(3.6, 1000.0, cards=4) == pytest.approx(4.0)
    found = money.section(3.6, prefill_s=1.0, decode_s=9.0, tokens_in=4000, tokens_out=1000)
    assert found == {
        "usd_per_card_hour": 3.6,
        "usd_per_mtok": {"in": pytest.approx(0.25), "out": pytest.approx(9.0), "total": pytest.approx(2.0)},
    }
    assert money.section(None, prefill_s=1.0) is None
    half = money.section(3.6, decode_s=9.0, tokens_out=1000)["usd_per_mtok"]
    assert half == {"in": None, "out": pytest.approx(9.0), "total": None}
    for price in (0, -1, float("inf"), float("nan")):
        with pytest.raises(FormatError, match="--usd-hour"):
            money.section(price)
    with pytest.raises(ValueError, match="above 0"):
        money.usd_per_mtok(1.0, 0.0)
