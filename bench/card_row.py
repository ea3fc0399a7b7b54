"""`percard bench card`: the roofs of this machine, measured, as a row of a card table that `percard plan` takes.

    memory      a read and a copy larger than the last cache; the weights of a decode step, format by format
    products    bf16, fp16, fp32, int8 and fp8 at a few shapes, through every body there is: a roof is the best one seen
    noise       one thing against itself (A/A); memory size as the system says it

A row has the fields of `cards/cards.json`, and one more, `measured`, with what each figure came from. Nothing in it is from
a brochure: what was not measured is null.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats import affine
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from ..kernels.linear import linear, prepare
from ..kernels.op import Unsupported, native_isa
from . import card, clock, record, roof

Call = Callable[[], Any]
Say = Callable[[str], None]
# Rows x outputs x inputs of the products; a prompt's shapes on a CPU, what fills a card on a card.
SHAPES = {
    "cpu": ((512, 2048, 2048), (512, 4096, 4096), (2048, 2048, 2048)),
    "cuda": ((8192, 8192, 8192), (4096, 8192, 4096)),
}
DECODE = {"cpu": (8192, 4096), "cuda": (28672, 8192)}  # the weight that one row meets
_DECODE_BYTES = 2**30  # of copies that a decode goes through
_SPECS = {"bf16": ("w8a16", "w4a16-g128"), "int8": ("w8a8", "w4a8-g128")}
_SECONDS = 0.4  # for the best of a product on a CPU
_UNITS = {"bf16": "bf16_tflops", "int8": "int8_tops", "fp8": "fp8_tflops"}


@dataclass(frozen=True)
class Body:
    """One way to multiply; `kind` is the type whose rate it shows, `make(m, n, k, device)` gives the call."""

    kind: str
    name: str
    make: Callable[[int, int, int, torch.device], Call]


def bodies(device: torch.device) -> Iterator[Body]:
    """torch's products and ours, as far as this kind of device may have them."""
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        yield Body(kind, f"torch {kind}", _float(dtype))
    yield Body("int8", "torch._int_mm", _int8)
    if device.type == "cuda":
        yield Body("fp8", "torch._scaled_mm", _fp8)
    for kind, specs in _SPECS.items():
        for spec in specs:
            yield Body(kind, f"percard {spec}", _ours(spec))


@torch.inference_mode()
def measure(
    device: torch.device | None = None,
    *,
    id: str | None = None,
    command: str = "percard bench card",
    say: Say = lambda words: None,
    quick: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The row of this machine. `quick`: one shape and half the time a body; `now` is seconds, for tests a fake."""
    where = device or card.default_device()
    noisy = card.noise(where)
    say(card.describe(where))
    memory = {name: rate / 1e9 for name, rate in card.bandwidths(where).items()}
    say(f"memory: {memory['read']:.1f} GB/s read, {memory['copy']:.1f} GB/s copied, both ways")
    floor = roof.noise_floor(where)
    say(f"noise floor {floor:.1f} %" + "".join(f"; {words}" for words in noisy))
    shapes = SHAPES[where.type][: 1 if quick else None]
    seconds = _SECONDS / 2 if quick else _SECONDS
    found: dict[str, dict[str, dict[str, float]]] = {}
    absent: dict[str, str] = {}
    for body in bodies(where):
        try:
            rates = {"x".join(map(str, s)): _rate(body, s, where, seconds, now) for s in shapes}
        except (
            RuntimeError,
            NotImplementedError,
            AttributeError,
        ) as error:  # not in this torch, or not on this machine
            absent[body.name] = " ".join(str(error).split())[:120]
            say(f"{body.name}: absent ({absent[body.name]})")
            continue
        found.setdefault(body.kind, {})[body.name] = rates
        say(f"{body.name}: {max(rates.values()):.3g} T/s ({body.kind})")
    decode = dict(_decode(where, seconds, now, say))
    return _row(where, id, command, memory, floor, noisy, found, absent, decode)


def write(path: str | Path, row: Mapping[str, Any]) -> None:
    """Puts the row into a card table {"cards": [...]}, in place of one with its id; other rows stay."""
    target = Path(path)
    rows: list[Any] = []
    if target.exists():
        try:
            held = json.loads(target.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{target}: is there and not JSON ({error}); name another file with --out") from None
        if not isinstance(held, dict) or not isinstance(held.get("cards"), list):
            raise FormatError(f'{target}: is there and no card table {{"cards": [...]}}; name another file with --out')
        rows = [r for r in held["cards"] if r.get("id") != row["id"]]
    text = json.dumps({"cards": [*rows, row]}, indent=2, ensure_ascii=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(target)


def lines(row: Mapping[str, Any]) -> list[str]:
    """The row in words for a terminal."""
    seen = row["measured"]
    told = [f"{row['id']}   {row['name']}, {row['memory_gb']:.0f} GB"]
    told.append(
        f"memory      {seen['read_gbs']:.1f} GB/s read, {seen['copy_gbs']:.1f} GB/s copied   noise floor {seen['noise_floor_pct']:.1f} %"
    )
    for kind, bodies_of in seen["products"].items():
        name, shape, rate = best(bodies_of)
        others = ", ".join(f"{n} {max(r.values()):.3g}" for n, r in bodies_of.items() if n != name)
        told.append(f"{kind:11} {rate:.3g} T/s by {name} at {shape}" + (f"   ({others})" if others else ""))
    told.append("decode      " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in seen["decode_gbs"].items()))
    told += [f"absent      {name}: {why}" for name, why in seen["absent"].items()]
    return [*told, *(f"noisy       {words}" for words in seen["noisy"])]


def best(rates: Mapping[str, Mapping[str, float]]) -> tuple[str, str, float]:
    """(body, shape, rate) of the fastest in {body: {shape: rate}}."""
    return max(((b, s, rate) for b, shapes in rates.items() for s, rate in shapes.items()), key=lambda found: found[2])


def _row(
    where: torch.device,
    id: str | None,
    command: str,
    memory: Mapping[str, float],
    floor: float,
    noisy: list[str],
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    absent: Mapping[str, str],
    decode: Mapping[str, float],
) -> dict[str, Any]:
    machine, total = card.fingerprint(where), card.total_bytes(where)
    this, cpu = machine["card"], machine["cpu"]
    code = record.code_section(command)
    version = f"percard {code['percard'] or 'checkout'}" + (f" {code['git_sha'][:8]}" if code["git_sha"] else "")
    date = time.strftime("%Y-%m-%d", time.gmtime())
    units = {field: _digits(best(found[kind])[2]) if kind in found else None for kind, field in _UNITS.items()}
    name = this["name"] if this else f"{cpu['model']}, {cpu['threads']} threads"
    known = card.published_row(this["name"], this["mem_mib"]) if this else None
    return {
        "id": id or _id(where, this, cpu),
        "name": name,
        "device_names": [this["name"] if this else cpu["model"]],
        "arch": known["arch"] if known else "cpu" if not this else "unknown",
        "sm": this["sm"] if this else None,
        "memory_type": known["memory_type"] if known else "unknown" if this else "host",
        "memory_gb": _digits(total / 1e9),
        "memory_mib": total // 2**20,
        "bandwidth_gbs": _digits(max(*memory.values(), *decode.values())),
        "bf16_tflops": units["bf16_tflops"],
        "fp8_tflops": units["fp8_tflops"],
        "int8_tops": units["int8_tops"],
        "int4_tops": None,
        "tdp_w": None,
        "power_cap_w": None,
        "source": f"`{command}`, {date}, {version}, torch {torch.__version__}, python {machine['env']['python']}",
        "confidence": "measured",
        "unverified": [],
        "alternatives": {},
        "notes": "Measured roofs, the best body seen of each type; bandwidth is the best of read, copy and decode; 4-bit weights meet int8 or bf16 units, so int4 is null.",
        "measured": {
            "date": date,
            "read_gbs": _digits(memory["read"]),
            "copy_gbs": _digits(memory["copy"]),
            "noise_floor_pct": _digits(floor),
            "noisy": noisy,
            "threads": cpu["threads"],
            "isa": _isa() if not this else None,
            "torch_isa": cpu["torch_isa"],
            "torch": torch.__version__,
            "products": {
                k: {b: {s: _digits(r) for s, r in by.items()} for b, by in v.items()} for k, v in found.items()
            },
            "decode_gbs": {name: _digits(rate) for name, rate in decode.items()},
            "absent": dict(absent),
        },
    }


def _id(where: torch.device, this: Mapping[str, Any], cpu: Mapping[str, Any]) -> str:
    """cpu-intel-xeon-amx-int8-2t; h20-96-measured for a card of the table, else its name and gigabytes."""
    if where.type == "cuda":
        known = card.published_row(this["name"], this["mem_mib"])
        return f"{known['id'] if known else _slug(this['name']) + '-' + str(round(this['mem_mib'] / 1024))}-measured"
    return "-".join(filter(None, ("cpu", _slug(cpu["model"]), _slug(_isa() or ""), f"{cpu['threads']}t")))


def _isa() -> str | None:
    """What the C++ bodies run with here; None when they are not built."""
    try:
        return native_isa()
    except Unsupported:
        return None


def _slug(text: str) -> str:
    words = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _rate(
    body: Body, shape: tuple[int, int, int], where: torch.device, seconds: float, now: Callable[[], float]
) -> float:
    """1e12 operations per second of one product."""
    m, n, k = shape
    return 2 * m * n * k / _best([body.make(m, n, k, where)], where, seconds, now) / 1e12


def _decode(where: torch.device, seconds: float, now: Callable[[], float], say: Say) -> Iterator[tuple[str, float]]:
    """1e9 bytes of weight per second of one row, by format; cold copies in turn."""
    n, k = DECODE[where.type]
    random = torch.Generator(where).manual_seed(0)
    dense = (torch.randn(n, k, generator=random, device=where) / k**0.5).bfloat16()
    x = torch.randn(1, k, generator=random, device=where).bfloat16()

    def best_of(size: int, calls: Callable[[], Call]) -> float:
        cold = min(_DECODE_BYTES, max(size, 4 * card.last_level_cache(where)), card.free_bytes(where) // 4)
        turn = [calls() for _ in range(max(1, cold // size))]
        return size / _best(turn, where, seconds, now) / 1e9

    size = dense.numel() * 2
    rates = [best_of(size, lambda: _bound(F.linear, x, dense.clone()))]
    if where.type == "cpu":
        rates.append(best_of(size, lambda: _bound(torch.mv, dense.clone(), x[0])))
    yield "bf16", max(rates)
    for spec in (s for specs in _SPECS.values() for s in specs):
        try:
            ready = _weight(dense, spec, where)
            rate = best_of(ready.nbytes, lambda: _bound(linear, x, _copied(ready)))
        except Unsupported as error:
            say(f"decode of {spec}: absent ({error})")
            continue
        yield spec, rate


def _best(turn: list[Call], where: torch.device, seconds: float, now: Callable[[], float]) -> float:
    """Seconds per call of the best of several; on a card the best graph of calls in turn."""
    if where.type == "cuda":
        return min(clock.card_ab({"it": turn}, device=where, rounds=5)["it"].graph.samples)
    for call in turn[:2]:
        call()
    found, end, rounds = float("inf"), now() + seconds, 0
    while rounds < 3 or now() < end:
        start = now()
        for call in turn:
            call()
        found, rounds = min(found, (now() - start) / len(turn)), rounds + 1
        if rounds == 1 and found * len(turn) > 4 * seconds:
            break  # a body without units for its type: one call tells enough
    return found


def _bound(function: Callable[..., Any], *args: Any) -> Call:
    return lambda: function(*args)


def _normal(m: int, k: int, device: torch.device, seed: int) -> torch.Tensor:
    """Never zeros: they draw less power and run faster."""
    return torch.randn(m, k, generator=torch.Generator(device).manual_seed(seed), device=device)


def _float(dtype: torch.dtype) -> Callable[[int, int, int, torch.device], Call]:
    def make(m: int, n: int, k: int, device: torch.device) -> Call:
        return _bound(F.linear, _normal(m, k, device, 0).to(dtype), (_normal(n, k, device, 1) / k**0.5).to(dtype))

    return make


def _int8(m: int, n: int, k: int, device: torch.device) -> Call:
    a, b = ((40 * _normal(size, k, device, seed)).clamp(-127, 127).to(torch.int8) for seed, size in enumerate((m, n)))
    return _bound(torch._int_mm, a, b.t())


def _fp8(m: int, n: int, k: int, device: torch.device) -> Call:
    a, b = (_normal(size, k, device, seed).to(torch.float8_e4m3fn) for seed, size in enumerate((m, n)))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _ours(spec: str) -> Callable[[int, int, int, torch.device], Call]:
    """A linear of percard on bf16 rows; quantising them is inside."""

    def make(m: int, n: int, k: int, device: torch.device) -> Call:
        dense = (_normal(n, k, device, 1) / k**0.5).bfloat16()
        return _bound(linear, _normal(m, k, device, 0).bfloat16(), _weight(dense, spec, device))

    return make


def _weight(dense: torch.Tensor, spec: str, device: torch.device) -> QuantTensor:
    parsed = QuantSpec.parse(spec)
    return prepare(affine.quantize(dense, parsed, affine.scale_dtype_of(parsed, dense.dtype)), device)


def _copied(w: QuantTensor) -> QuantTensor:
    """The same weight in memory of its own."""
    zero = None if w.zero is None else w.zero.clone()
    return replace(w, data=w.data.clone(), scale=w.scale.clone(), zero=zero)
