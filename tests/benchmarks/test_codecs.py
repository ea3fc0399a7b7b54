"""Weights between what is on disk, what is computed with and floats: one linear of Qwen3-0.6B, 1024 x 3072."""

from __future__ import annotations

import pytest
import torch

from percard.formats import affine, compressed_tensors, layout
from percard.formats.spec import QuantSpec

N, K = 1024, 3072
SPECS = ("w8a8", "w4a16-g64")


def weight(spec: str):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    return w, affine.quantize(w, QuantSpec.parse(spec))


def same(a, b) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.scale, b.scale) and a.spec == b.spec


@pytest.fixture
def device():
    return torch.device("cpu")  # codecs run where files are read


@pytest.mark.bench
@pytest.mark.parametrize("spec", SPECS)
def test_write(timed, spec):
    _, q = weight(spec)
    assert same(compressed_tensors.read(compressed_tensors.write(q, torch.bfloat16), q.spec, (N, K)), q)
    timed(lambda: compressed_tensors.write(q, torch.bfloat16), f"codec.write.{N}x{K}", spec, q.nbytes, 0)


@pytest.mark.bench
@pytest.mark.parametrize("spec", SPECS)
def test_read(timed, spec):
    _, q = weight(spec)
    tensors = compressed_tensors.write(q, torch.bfloat16)
    assert same(compressed_tensors.read(tensors, q.spec, (N, K)), q)
    timed(lambda: compressed_tensors.read(tensors, q.spec, (N, K)), f"codec.read.{N}x{K}", spec, q.nbytes, 0)


@pytest.mark.bench
@pytest.mark.parametrize("spec", SPECS)
def test_quantize(timed, spec):
    w, q = weight(spec)
    assert float((affine.dequantize(q) - w.float()).norm() / w.float().norm()) < (0.02 if "w8" in spec else 0.2)
    timed(lambda: affine.quantize(w, q.spec), f"codec.quantize.{N}x{K}", spec, w.nbytes + q.nbytes, 0, rounds=5)


@pytest.mark.bench
def test_repack(timed):
    _, q = weight("w4a16-g64")
    packing = "rows16_k4_w4"
    assert same(layout.repack(layout.repack(q, packing), "plain"), q)
    timed(lambda: layout.repack(q, packing), f"codec.repack.{packing}.{N}x{K}", "w4a16-g64", 2 * q.nbytes, 0, rounds=5)
