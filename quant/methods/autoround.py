"""AutoRound (arXiv 2309.05516), by the optional package auto_round: signed gradient descent learns, block by block, how
each weight is rounded and how far the range of each group reaches.

    code   q = clamp(round(w / s + v))      v in [-1/2, 1/2] is learned, one number a weight
    scale  s from the group's range, times factors in [0, 1] that are learned too
    loss   squared error of the block's output, windows drawn by a seed, through quantised blocks before it

All other methods see one weight; this one wants the model, whole and in memory (delegate.py brings it there). What the
package leaves in each linear (rounded weight, scale, zero) is taken apart into codes by our own codec, and a weight that
is not made of exactly these codes is refused. Its symmetric integers have scales of either sign, which containers do
not foresee; so they are asked for as "int_sym_gptq": scales above zero, 2^b levels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ...formats import affine
from ...formats.spec import FormatError, QuantSpec
from ...formats.tensor import QuantTensor
from .records import Option

PACKAGE = "auto_round"
REMEDY = "take w4a16, w3a16 or w8a16, such as w4a16-g128"
OPTIONS = {
    "iters": Option(int, 200, "steps of descent per block", 1, 100_000),
    "samples": Option(int, 128, "calibration windows that it learns from, at most", 1, 1 << 20),
    "batch": Option(int, 8, "windows per step", 1, 4096),
    "lr": Option(float, 0.0, "size of the first step; 0 = 1 / iters", 0.0, 1.0),
    "ranges": Option(bool, True, "learn the ranges of groups, not only the rounding"),
}
_KEPT = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}  # a linear that is left alone
_EXACT = 1e-3  # of a step: how far a rounded weight may be from code times scale


class _NoPadding:
    """Stands for a tokenizer. The package asks one for its padding only, and windows hold none."""

    pad_token = None
    pad_token_id = None


def missing() -> str | None:
    """None, or what to install. Imports nothing."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    return f"method autoround calls the package {PACKAGE}, which is not installed; pip install auto-round"


def version() -> str:
    """The installed package's; "unknown" when it does not say."""
    from importlib import metadata

    try:
        return metadata.version("auto-round")
    except metadata.PackageNotFoundError:
        return "unknown"


def serves(spec: QuantSpec) -> str | None:
    """None, or why AutoRound is not asked for such a spec."""
    if spec.float_format is not None:
        return f"autoround rounds to integers, {spec} is a float format"
    if spec.act_bits != 16:
        return f"autoround learns its rounding for 16-bit activations, {spec} rounds them to {spec.act_bits} bits"
    if spec.weight_bits == 8 and not spec.symmetric:
        return "autoround gives 8-bit weights without zero points only"
    return None


def memory(parameters: int, block: int, experts: int, windows: tuple[int, int, int], batch: int, inner: int) -> int:
    """Bytes that `autoround` takes at most, without Python and its libraries.

    parameters: of the model; block: weights of its largest block; experts: those of them in experts. windows: how many,
    tokens in each, hidden size. batch: windows per step; inner: numbers that a token's way through a block leaves behind.
    """
    count, length, hidden = windows
    model = 4 * parameters + 4 * experts  # fp32; the package copies a layer's experts into one matrix each
    learning = (
        4 * 10 * block
    )  # v, its gradient and best value, and what each step of the rounding keeps for its gradient
    streams = (
        4 * 4 * count * length * hidden
    )  # inputs of a block and outputs, of the quantised and of the source's chain
    return model + learning + streams + 4 * batch * length * inner


def autoround(
    model: nn.Module,
    ids: torch.Tensor,
    specs: Mapping[str, QuantSpec],
    *,
    scale_dtype: torch.dtype,
    left: Collection[str] = (),
    seed: int = 0,
    iters: int = 200,
    samples: int = 128,
    batch: int = 8,
    lr: float = 0.0,
    ranges: bool = True,
) -> Iterator[tuple[str, QuantTensor]]:
    """Rounds the linears of `model` that `specs` names, learning from windows ids int64 [n, T].

    model: of transformers, fp32, on a CPU; its weights are used up: each is dropped when its codes are handed out. left:
    other linears of its blocks. Gives (name, plain tensor) in the order of `specs`. FormatError when the package leaves a
    linear out or gives what no container holds; RuntimeError when it gives up.
    """
    for name, spec in specs.items():
        if (reason := serves(spec)) is not None:
            raise FormatError(f"{name}: {reason}; {REMEDY}")
    package = importlib.import_module(PACKAGE)
    # most linears have one spec, which becomes the rule; the others are exceptions by name
    rule = Counter(specs.values()).most_common(1)[0][0]
    exceptions = {name: _scheme(spec) for name, spec in specs.items() if spec != rule}
    exceptions |= {name: dict(_KEPT) for name in left}
    # copies, because the package marks the last token of every window in place
    windows = [
        {"input_ids": row[None].clone(), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for row in ids[:samples]
    ]
    with _undisturbed(), torch.enable_grad():
        try:
            made, _ = package.AutoRound(
                model,
                tokenizer=_NoPadding(),
                scheme=_scheme(rule),
                layer_config=exceptions,
                dataset=windows,
                nsamples=len(windows),
                seqlen=ids.shape[1],
                batch_size=min(batch, len(windows)),
                iters=iters,
                lr=lr or None,
                enable_minmax_tuning=ranges,
                scale_dtype=scale_dtype,
                seed=seed,
                device_map="cpu",
                amp=False,  # fp32: the codes of a weight that was rounded to 16 bits again could not be told for sure
                enable_torch_compile=False,
            ).quantize()
        except SystemExit as ending:
            raise RuntimeError(f"{PACKAGE} {version()} gave up ({ending}); it printed why") from None
    modules = dict(made.named_modules())
    for name, spec in specs.items():
        yield name, _taken(modules.get(name), name, spec, scale_dtype)


def _scheme(spec: QuantSpec) -> dict[str, Any]:
    """A spec in the package's words."""
    return {
        "bits": spec.weight_bits,
        "group_size": spec.group or -1,
        "sym": spec.symmetric,
        "data_type": "int_sym_gptq" if spec.symmetric else "int_asym",
        "act_bits": 16,
    }


def _taken(module: nn.Module | None, name: str, spec: QuantSpec, scale_dtype: torch.dtype) -> QuantTensor:
    """Codes, scale and zero of a linear that was rounded; its weight is dropped."""
    scale, weight = getattr(module, "scale", None), getattr(module, "weight", None)
    if not isinstance(scale, torch.Tensor) or not isinstance(weight, torch.Tensor):
        raise FormatError(
            f"{name}: {PACKAGE} {version()} left this linear at 16 bits; add it to ignore, or take another method"
        )
    rounded = weight.detach().to("cpu", torch.float32)
    rows, columns = rounded.shape
    found, expected = scale.numel(), rows * spec.groups(columns)
    if found != expected:
        raise FormatError(f"{name}: {PACKAGE} {version()} gave {found} scales, expected {expected} for {spec}")
    scale = scale.detach().to("cpu", scale_dtype).reshape(rows, -1).contiguous()
    if not bool((scale > 0).all()):
        raise FormatError(f"{name}: {PACKAGE} {version()} gave a scale that is not above zero; take another method")
    zero = _zero(getattr(module, "zp", None), name, spec, (rows, scale.shape[1]))
    codes = affine.encode(rounded, scale, zero, spec)
    off = affine.decode(codes, scale, zero, spec).sub_(rounded).abs_().reshape(rows, scale.shape[1], -1)
    if not bool((off <= _EXACT * scale.float().unsqueeze(2)).all()):  # NaN is caught here as well
        raise FormatError(f"{name}: {PACKAGE} {version()} gave weights that {spec} does not hold; take another method")
    assert module is not None
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return QuantTensor(codes, scale, zero, spec, "plain", (rows, columns))


def _zero(given: Any, name: str, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor | None:
    """Signed zero points int8 from the package's, which count from 0; None for a symmetric spec, whose zero is fixed."""
    zero = torch.as_tensor(0 if given is None else given).detach().to("cpu", torch.float32) + spec.qmin
    if spec.symmetric:
        if given is not None and bool((zero != 0).any()):
            raise FormatError(f"{name}: {PACKAGE} {version()} gave a zero point, {spec} has none; take another method")
        return None
    whole = bool((zero == zero.round()).all()) and bool(((zero >= spec.qmin) & (zero <= spec.qmax)).all())
    if given is None or zero.numel() != shape[0] * shape[1] or not whole:
        raise FormatError(f"{name}: {PACKAGE} {version()} gave no zero points that {spec} holds; take another method")
    return zero.to(torch.int8).reshape(shape).contiguous()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The package seeds every random source and changes how tensors print; afterwards all is as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_printoptions(profile="default")
