"""`import percard` and `percard --help` are cheap, and touch neither CUDA nor Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_percard_loads_neither_torch_nor_triton() -> None:
    told = python("import percard, sys; print([m for m in ('torch', 'triton', 'numpy', 'rich') if m in sys.modules])")
    assert told == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["bench", "model", "--help"], ["--version"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = f"from percard import cli; import sys; code = cli.run({arguments!r}); print(code, 'torch' in sys.modules)"
    assert python(code).endswith("0 False")


def test_the_serving_path_loads_neither_triton_nor_quant_nor_bench_and_leaves_cuda_alone() -> None:
    code = (
        "import percard, sys\n"
        "linear = percard.linear\n"
        "import torch\n"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith(('percard.quant', 'percard.bench'))]\n"
        "print(bad, torch.cuda.is_initialized())"
    )
    assert python(code) == "[] False"


def test_a_quantised_linear_runs_on_a_cpu_without_triton() -> None:
    code = (
        "import torch, percard, sys\n"
        "from percard.formats import affine\n"
        "from percard.kernels.linear import prepare\n"
        "w = affine.quantize(torch.randn(64, 128), percard.QuantSpec.parse('w8a8'), torch.float32)\n"
        "y = percard.linear(torch.randn(3, 128), prepare(w, 'cpu'))\n"
        "print(tuple(y.shape), 'triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert python(code) == "(3, 64) False False"


def test_every_public_name_is_there() -> None:
    assert python("import percard; print([n for n in percard.__all__ if getattr(percard, n, None) is None])") == "[]"


def test_an_unknown_name_lists_the_known_ones() -> None:
    import percard

    with pytest.raises(AttributeError, match="quantize"):
        _ = percard.quantise
