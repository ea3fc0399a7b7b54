"""The Triton bodies' Configs: pure, the same in a bucket, within the card. Nothing is compiled and no card is asked."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from percard.kernels import tuning
from percard.kernels.inspection import ARCHS
from percard.kernels.shapes import LAYERS
from percard.kernels.tuning import Shape

OPS = ("quantize_rows", "matmul_w8a8", "matmul_w4a16", "matmul_w8a16", "matmul_w4a8")
MATMULS = OPS[1:]
GROUPS: dict[str, tuple] = dict.fromkeys(MATMULS, (None, 32, 64, 128))
GROUPS |= {"matmul_w8a8": (None,), "matmul_w4a8": (None, 32, 64, 128, -32, -64, -128)}  # below 0: two-level scales
SIZES = [size for layers in LAYERS.values() for size in layers.values()] + [(1, 1), (37, 53), (64, 128), (131, 1031)]
BATCHES = (1, 2, 3, 4, 7, 16, 17, 31, 33, 64, 65, 100, 128, 129, 1000, 4096, 16384)


def gpu(op: str) -> ModuleType:
    return importlib.import_module(f"percard.kernels.{op}.gpu")


@pytest.mark.parametrize("op", MATMULS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_config_is_one_that_the_kernel_can_run(op: str, arch: str) -> None:
    card, module = ARCHS[arch], gpu(op)
    for (n, k), m, group in ((s, m, g) for s in SIZES for m in BATCHES for g in GROUPS[op]):
        for dtype in (torch.bfloat16, torch.float16):
            c = module.config_for(Shape(m, n, k, group or k, dtype), card)
            assert {c.block_n, c.block_m} <= {16, 32, 64, 128, 256} and c.num_warps in (4, 8)
            assert c.block_n % 64 == 0, "wgmma takes 64 rows"
            assert c.block_m >= min(m, 16) and c.num_stages >= 2
            steps = -(-k // 128)
            assert 1 <= c.split_k <= max(1, steps // 4)
            assert c.split_k == 1 or c.split_k * m <= k / 64, "partial sums weigh more than they save"
            if arch == "sm_100" and op != "matmul_w8a8":
                assert c.block_n * c.block_m <= 128 * 64, "larger tiles are a bare trap in Triton 3.6"
            if op.endswith("a16") and c.scale_weight:
                assert dtype == torch.bfloat16 and m > 64, "way C overflows in fp16, and rounds"


@pytest.mark.parametrize("op", MATMULS)
def test_small_problems_fill_the_card(op: str) -> None:
    """Qwen3-8B's square layer for one token: between 0.9 and 2 programs per SM, by splitting K."""
    for arch, card in ARCHS.items():
        c = gpu(op).config_for(Shape(1, 4096, 4096, 4096, torch.bfloat16), card)
        programs = -(-4096 // c.block_n) * c.split_k
        assert 0.9 * card.sms <= programs <= 2 * card.sms, f"{arch}: {programs} programs"


@pytest.mark.parametrize("op", (*OPS, "rmsnorm_quantize", "silu_mul_quantize"))
def test_one_config_per_bucket(op: str) -> None:
    """A Config is chosen for the largest M of its bucket, never by the nearest M."""
    card = ARCHS["sm_90"]
    for m in BATCHES:
        shape = Shape(m, 4096, 4096, 128, torch.bfloat16)
        top = Shape(1 << tuning.bucket(m), 4096, 4096, 128, torch.bfloat16)
        assert gpu(op).config_for(shape, card) == gpu(op).config_for(top, card) == gpu(op).heuristic(top, card)


def test_buckets() -> None:
    assert [tuning.bucket(m) for m in (0, 1, 2, 3, 4, 5, 8, 9, 16, 17)] == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5]
    assert tuning.in_bucket(Shape(17, 1, 2, 3, torch.float16)) == Shape(32, 1, 2, 3, torch.float16)


def test_split_k_stops_where_it_says() -> None:
    card = ARCHS["sm_90"]  # 132 SMs

    def split(tiles: int, k: int, m: int = 1) -> int:
        return tuning.split_k(tiles, k // 128, Shape(m, 0, k, k, torch.float16), card)

    assert split(32, 4096) == 4  # 128 programs of 132
    assert split(119, 4096) == 1  # nine tenths of the card already
    assert split(1, 4096) == 8  # at least 4 steps each
    assert split(1, 65536) == 16  # never more than 16
    assert split(1, 4096, m=16) == 4  # M * split <= K / 64
    assert split(1, 4096, m=64) == 1
    assert split(1, 100) == 1


@pytest.mark.parametrize(
    ("steps", "wanted", "each", "parts"), [(32, 4, 8, 4), (10, 4, 3, 4), (5, 4, 2, 3), (1, 1, 1, 1)]
)
def test_parts_of_k_have_no_empty_one(steps: int, wanted: int, each: int, parts: int) -> None:
    assert tuning.cut(steps, wanted) == (each, parts)
    assert each * (parts - 1) < steps <= each * parts


def test_tuned_entries_win_and_hold_for_their_card_triton_and_bucket_only(tmp_path: Path) -> None:
    module, card = gpu("matmul_w4a8"), ARCHS["sm_90"]
    config = {"block_n": 64, "block_m": 16, "split_k": 2, "raster": 4, "num_warps": 4, "num_stages": 6}
    entry = {"card": card.name, "triton": "3.9", "m_bucket": 4, "n": 4096, "k": 4096, "group": 128, "dtype": "bfloat16"}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"schema": 1, "entries": [{**entry, "config": config}]}))
    table = tuning.load(file, "3.9.1")
    shape = Shape(9, 4096, 4096, 128, torch.bfloat16)

    def chosen(shape: Shape, arch: str = "sm_90", table: tuning.Table = table) -> object:
        return tuning.choose(table, shape, ARCHS[arch], module.Config, module.heuristic)

    assert chosen(shape) == module.Config(**config) == chosen(shape._replace(m=16))
    others = (shape._replace(m=17), shape._replace(m=8), shape._replace(group=64), shape._replace(dtype=torch.float16))
    assert all(chosen(s) == module.heuristic(tuning.in_bucket(s), card) for s in others)
    assert chosen(shape, "sm_100") != module.Config(**config)
    assert tuning.load(file, "3.6.0") == {}
    file.write_text('{"schema": 2, "entries": []}')
    with pytest.raises(ValueError, match="schema is 2, expected 1"):
        tuning.load(file, "3.9.0")


@pytest.mark.parametrize("op", (*OPS, "rmsnorm_quantize", "silu_mul_quantize"))
def test_tuned_json_can_be_read(op: str) -> None:
    module = gpu(op)
    file = Path(module.__file__ or "").with_name("tuned.json")
    entries = json.loads(file.read_text())["entries"]
    for release in {e["triton"] for e in entries} | {"3.9"}:
        for fields in tuning.load(file, f"{release}.0").values():
            assert module.Config(**fields)
