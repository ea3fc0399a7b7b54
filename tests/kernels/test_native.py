"""The C++ module: all instruction sets give scalar's bits, each holds its own instructions only, one pool of threads."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from percard.formats import layout
from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels import device, op
from percard.kernels.matmul_w4a8 import matmul_w4a8
from percard.kernels.matmul_w4a16 import matmul_w4a16
from percard.kernels.matmul_w8a8 import matmul_w8a8
from percard.kernels.matmul_w8a16 import matmul_w8a16
from percard.kernels.quantize_rows import quantize_rows
from percard.kernels.search_scale import search_scale

WIDE = [isa for isa in device.ISAS if isa != "scalar"]
SHAPES = (  # M, N, K: each side of the tokens that a kernel holds, of 16 rows, of a step, of a tile
    (1, 1, 1), (1, 16, 128), (2, 33, 200), (3, 15, 7), (4, 17, 64), (5, 31, 65), (6, 48, 96), (11, 129, 31),
    (12, 16, 320), (13, 40, 257), (16, 64, 512), (17, 130, 1152), (31, 80, 63), (33, 34, 1000), (64, 16, 2112), (97, 144, 130),
)  # fmt: skip


@pytest.fixture(params=WIDE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set above scalar, in force; skipped where this CPU has it not."""
    try:
        native = op.native()
    except op.Unsupported as error:
        pytest.skip(str(error))
    if request.param not in native.isas():
        pytest.skip(f"this CPU has no {request.param}; it has {', '.join(native.isas())}")
    before = native.isa()
    native.force_isa(request.param)
    yield request.param
    native.force_isa(before)


def both(isa: str, run: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
    """`run` gives the same bits with scalar and with `isa`, NaN included."""
    found, native = run(), op.native()
    native.force_isa("scalar")
    wanted = run()
    native.force_isa(isa)
    for a, b in zip(found, wanted, strict=True) if isinstance(found, tuple) else ((found, wanted),):
        bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
        assert torch.equal(a.view(bits), b.view(bits))


def weight(spec: str, n: int, k: int, random: torch.Generator) -> QuantTensor:
    """Random codes over the whole range, scales over 12 decades, packed for the C++ bodies."""
    parsed = QuantSpec.parse(spec)
    codes = torch.randint(parsed.qmin, parsed.qmax + 1, (n, k), generator=random).to(torch.int8)
    codes[0] = parsed.qmin
    codes[-1, ::2] = parsed.qmax
    scale = 10.0 ** (torch.rand(n, parsed.groups(k), generator=random) * 12 - 8)
    zero = None
    if not parsed.symmetric:
        zero = torch.randint(parsed.qmin, parsed.qmax + 1, scale.shape, generator=random).to(torch.int8)
    plain = QuantTensor(codes, scale, zero, parsed, "plain", (n, k))
    return layout.repack(plain, f"rows16_k4_w{parsed.weight_bits}")


def rows(m: int, k: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 rows with the extremes, -128 too, their scales (one NaN, one tiny) and sums."""
    xq = torch.randint(-128, 128, (m, k), generator=random).to(torch.int8)
    xq[0] = -128
    xq[-1, ::3] = 127
    sx = torch.rand(m, generator=random) + 1e-3
    sx[m // 2] = torch.nan
    sx[m // 3] = 1e-30
    return xq, sx, xq.sum(1, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_have_scalars_bits(isa: str, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for m, _, k in SHAPES:
        x = torch.randn(m, k, generator=random) * 10.0 ** (torch.rand(m, 1, generator=random) * 8 - 4)
        x = x.to(dtype)
        x[0] = torch.finfo(dtype).max
        x[m // 2] = 0
        x[m // 3, k // 2] = torch.nan
        x[m // 4] = 1e-38
        both(isa, lambda x=x: quantize_rows(x, impl="cpu"))


@pytest.mark.parametrize("spec", ["w8a8", "w4a8", "w4a8-g32", "w4a8-g64", "w4a8-g128"])
def test_integer_matmuls_have_scalars_bits(isa: str, spec: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    group = QuantSpec.parse(spec).group or 1
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for i, (m, n, k) in enumerate(SHAPES):
        k = -(-k // group) * group
        w, (xq, sx, xsum) = weight(spec, n, k, random), rows(m, k, random)
        bias = torch.randn(n, generator=random) if i % 2 else None
        if spec == "w8a8":
            both(isa, lambda: matmul_w8a8(xq, sx, w, bias, dtypes[i % 3], impl="cpu"))
        else:
            both(isa, lambda: matmul_w4a8(xq, sx, xsum, w, bias, dtypes[i % 3], impl="cpu"))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_two_level_matmuls_have_scalars_bits(isa: str, group: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for m, n, k in SHAPES:
        k = (-(-k // group) + 1) * group
        w, (xq, sx, xsum) = layout.repack(weight(f"w4a8-g{group}", n, k, random), "plain"), rows(m, k, random)
        times = torch.randint(1, 17, w.scale.shape, generator=random)
        times[:, 0], times[:, -1] = 16, 15
        row = torch.randint(8, 16, (n, 1), generator=random) * 2.0 ** torch.randint(-30, 5, (n, 1), generator=random)
        w = layout.repack(replace(w, scale=row * times), "rows16_k4_w4")
        assert layout.row_scale(w.scale, k, group) is not None
        both(isa, lambda w=w, xq=xq, sx=sx, xsum=xsum: matmul_w4a8(xq, sx, xsum, w, None, torch.float32, impl="cpu"))


@pytest.mark.parametrize("m", [1, 20])
def test_the_longest_sums_do_not_overflow(isa: str, m: int) -> None:
    k = 132104
    codes = torch.full((3, k), -128, dtype=torch.int8)
    plain = QuantTensor(codes, torch.ones(3, 1), None, QuantSpec.parse("w8a8"), "plain", (3, k))
    xq = torch.full((m, k), 127, dtype=torch.int8)
    y = matmul_w8a8(xq, torch.ones(m), layout.repack(plain, "rows16_k4_w8"), None, torch.float32, impl="cpu")
    assert torch.equal(y, torch.full((m, 3), -127.0 * 128 * k))


@pytest.mark.parametrize("spec", ["w8a8", "w4a16-g128", "w4a16-g32-asym", "w3a16-g64"])
def test_searched_scales_have_scalars_bits(isa: str, spec: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 384, generator=random)
    w[1] = 0
    w[2, 7] = 1e4
    w[3] *= 1e-30
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for norm in (2.0, 2.4):
            both(isa, lambda d=dtype, p=norm: search_scale(w, QuantSpec.parse(spec), d, p, impl="cpu"))


@pytest.mark.parametrize("spec", ["w4a16", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128", "w8a16", "w8a16-g32-asym"])
def test_a_row_of_floats_does_not_depend_on_its_neighbours(isa: str, spec: str, seed: int) -> None:
    """Tiles of tokens are filled up with zeros; nothing of them, and no NaN of another row, may reach a result."""
    random = torch.Generator().manual_seed(seed)
    matmul = matmul_w8a16 if spec.startswith("w8") else matmul_w4a16
    for m, n, k in ((7, 33, 256), (16, 64, 128), (35, 48, 640)):
        x, w = torch.randn(m, k, generator=random).bfloat16(), weight(spec, n, k, random)
        clean = matmul(x, w, None, impl="cpu")
        dirty = x.clone()
        dirty[m // 2] = torch.nan
        dirty[0] = torch.inf
        found = matmul(dirty, w, None, impl="cpu")
        assert not bool(torch.isfinite(found[m // 2]).any()) and not bool(torch.isfinite(found[0]).any())
        rest = [i for i in range(m) if i not in (0, m // 2)]
        assert torch.equal(found[rest], clean[rest])


def test_nothing_is_written_past_the_output(isa: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    native = op.native()
    for m, n, k in ((1, 17, 64), (5, 3, 40), (19, 45, 136)):
        w, (xq, sx, _) = weight("w8a8", n, k, random), rows(m, k, random)
        buffer = torch.full((m * n + 64,), 7.0)
        pointers = [t.data_ptr() for t in (xq, sx, w.data, w.scale)]
        native.matmul_w8a8(*pointers, 0, buffer.data_ptr(), m, n, k, k, 0)
        assert bool((buffer[m * n :] == 7.0).all())
        q, x = torch.full((m * k + 64,), 7, dtype=torch.int8), torch.randn(m, k, generator=random)
        scale, sums = torch.empty(m), torch.empty(m, dtype=torch.int32)
        outs = [t.data_ptr() for t in (q, scale, sums)]
        native.quantize_rows(x.data_ptr(), *outs, m, k, k, 0)
        assert bool((q[m * k :] == 7).all())


@pytest.mark.parametrize("spec", ["w8a8", "w4a8-g64", "w4a16-g64", "w8a16-g64-asym"])
def test_threads_do_not_change_a_bit(spec: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    w = weight(spec, 1000, 512, random)
    x = torch.randn(40, 512, generator=random).bfloat16()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if "a16" in spec:
            found.append((matmul_w8a16 if spec.startswith("w8") else matmul_w4a16)(x, w, None, impl="cpu"))
            continue
        xq, sx, xsum = quantize_rows(x, impl="cpu")
        found.append(matmul_w8a8(xq, sx, w, impl="cpu") if spec == "w8a8" else matmul_w4a8(xq, sx, xsum, w, impl="cpu"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_isas_are_refused_with_a_reason() -> None:
    native = op.native()
    with pytest.raises(ValueError, match="unknown; choose one of scalar, avx2"):
        native.force_isa("avx1024")
    missing = [isa for isa in device.ISAS if isa not in native.isas()]
    for isa in missing:
        with pytest.raises(ValueError, match=f"this CPU has no {isa}"):
            native.force_isa(isa)
    assert native.isas()[0] == "scalar" and native.isa() in native.isas()


def test_groups_that_no_line_ends_at_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        op.native().matmul_w4a8(0, 0, 0, 0, 0, 0, 0, 16, 64, 12, 64, 0, 0)


THREADS = """
import sys
import torch
from percard.kernels import op
native = op.native()
torch.set_num_threads(3)
assert native.threads() == 3, native.threads()
torch.set_num_threads(1)
assert native.threads() == 1, native.threads()
from percard.formats import affine, layout
from percard.formats.spec import QuantSpec
from percard.kernels.matmul_w4a16 import matmul_w4a16
torch.set_num_threads(2)
w = layout.repack(affine.quantize(torch.randn(4096, 512), QuantSpec.parse("w4a16-g64")), "rows16_k4_w4")
matmul_w4a16(torch.randn(64, 512).bfloat16(), w, None, impl="cpu")
torch.mm(torch.randn(500, 500), torch.randn(500, 500))
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sorted(m for m in maps if any(name in m for name in ("libgomp", "libiomp5", "libomp.", "libomp-"))))
print(len(list(__import__("pathlib").Path("/proc/self/task").iterdir())))
print(native.isa())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here; the test reads it")
def test_torch_and_the_module_share_one_pool_of_threads() -> None:
    """One OpenMP runtime in the process; with two threads torch's work and ours wake one helper, not two."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    runtimes, tasks, _ = done.stdout.strip().splitlines()
    assert len(ast.literal_eval(runtimes)) == 1, runtimes
    before = subprocess.run(
        [sys.executable, "-c", THREADS.replace("matmul_w4a16(torch", "(lambda *a, **k: 0)(torch")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert tasks == before.stdout.strip().splitlines()[1], "our work started threads that torch's work alone does not"


def test_the_environment_lowers_the_isa() -> None:
    code = "from percard.kernels import op; print(op.native().isa())"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PERCARD_ISA": "scalar"}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "scalar", done.stderr[-2000:]


# What the machine code holds: read from the symbols and the disassembly of the module, for every ISA, whatever CPU is here.

EVEX = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])")
NAMESPACE = re.compile(r"7percard\d+(scalar|avx2|avx_vnni|avx512_vnni|amx_int8)")


@cache
def machine_code() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """namespace of the ISA ("" for the rest) -> function -> (mnemonic, operands) of the compiled module."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed (apt install binutils)")
    path = op.native().__file__
    assert path is not None
    if "x86-64" not in subprocess.run([objdump, "-f", path], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the module is not built for x86-64")
    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    here: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.endswith(">:"):
            name = line.split("<", 1)[1][:-2]
            owner = NAMESPACE.search(name)
            here = found[owner.group(1) if owner else ""][name]
        elif "\t" in line:
            words = line.split("\t", 1)[1].replace("{vex}", "").replace("{evex}", "").split(None, 1)
            if words:
                here.append((words[0], words[1] if len(words) > 1 else ""))
    if not found["avx2"]:
        pytest.skip("the module was stripped of its symbols; build it without stripping")
    return found


@pytest.mark.parametrize(
    "isa, function, mnemonic, operand",
    [
        ("avx2", "4w4a8", "vpmaddubsw", "%ymm"),
        ("avx2", "4w8a8", "vpmaddwd", "%ymm"),
        ("avx2", "5w4a16", "vfmadd", "%ymm"),
        ("avx2", "5w8a16", "vfmadd", "%ymm"),
        ("avx_vnni", "4w4a8", "vpdpbusd", "%ymm"),
        ("avx_vnni", "4w8a8", "vpdpbusd", "%ymm"),
        ("avx512_vnni", "4w4a8", "vpdpbusd", "%zmm"),
        ("avx512_vnni", "4w8a8", "vpdpbusd", "%zmm"),
        ("avx512_vnni", "5w4a16", "vfmadd", "%zmm"),
        ("avx512_vnni", "5w8a16", "vfmadd", "%zmm"),
        ("amx_int8", "matmul_w4a8", "tdpbssd", "%tmm"),
        ("amx_int8", "4w8a8", "tdpbssd", "%tmm"),
        ("amx_int8", "matmul_w4a16", "tdpbf16ps", "%tmm"),
    ],
)
def test_each_isa_multiplies_with_its_own_instruction(isa: str, function: str, mnemonic: str, operand: str) -> None:
    ours = machine_code()[isa]
    wanted = ("add_groups",) if function.startswith("matmul") else (function,)
    names = [n for n in ours if any(w in n for w in wanted)]
    assert any(m.startswith(mnemonic) and operand in o for n in names for m, o in ours[n]), (isa, mnemonic, names[:5])


def test_no_instruction_stands_where_a_smaller_cpu_would_meet_it() -> None:
    """AVX-512 and AMX in their own namespaces only, VEX nowhere outside of the ISAs: no inline function of the standard
    library was compiled for a large CPU and kept for all."""
    code = machine_code()
    for isa in ("avx2", "avx_vnni"):
        wrong = {
            n
            for n, body in code[isa].items()
            if any(EVEX.search(o) or (m.startswith("t") and "%tmm" in o) for m, o in body)
        }
        assert not wrong, f"AVX-512 or AMX in {isa}: {sorted(wrong)[:3]}"
    assert not any(m == "vpdpbusd" for body in code["avx2"].values() for m, _ in body)
    assert not any("%tmm" in o for body in code["avx512_vnni"].values() for _, o in body)
    for isa in ("scalar", ""):
        wrong = {n for n, body in code[isa].items() if any(re.search(r"%[yz]mm|%tmm", o) for _, o in body)}
        assert not wrong, f"wide registers outside of an ISA: {sorted(wrong)[:3]}"
        vex = {n for n, body in code[isa].items() if any(m.startswith("v") and "%xmm" in o for m, o in body)}
        assert not vex, f"AVX outside of an ISA: {sorted(vex)[:3]}"
