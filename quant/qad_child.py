"""The quantised student of `percard distill --qad`: what it starts from, the model that trains, the checkpoint that is written.

A student that is quantised already starts from its own codes and scales; of a 16-bit one GPTQ makes them first. Trained are the
linears of the decoder blocks: their weights (codes move), their scales, or both. All else, embeddings, norms, biases, a head,
stays as it is, byte by byte, unless it is to be trained as well: then it is rounded to its 16 bits at the end. Names, dtypes and
shapes of every tensor stay: the child opens wherever its start does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..formats import affine, compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from ..formats.writer import Writer
from . import blocks, preflight, quantize, report, walk
from .pair import read_module, specs_of
from .progress import Callback
from .qad import FakeLinear, whole
from .recipe import Recipe
from .report import Report

if TYPE_CHECKING:
    from .distill_plan import Wish

START = "start"  # in the work folder: GPTQ's checkpoint of a 16-bit student


@dataclass(frozen=True, eq=False)
class Qad:
    """What is trained how. specs: of every module that is quantised; trained: those of them in the decoder blocks.

    student: as it was given; recipe: what quantises it first where it is 16-bit, else None. words: where the codes come from.
    """

    spec: QuantSpec
    specs: Mapping[str, QuantSpec]
    found: walk.Map
    trained: tuple[walk.Linear, ...]
    student: Checkpoint
    recipe: Recipe | None
    weights: bool
    scales: bool
    rest: bool
    words: str

    @property
    def counts(self) -> tuple[int, int, int]:
        """Weights of the trained linears, their scales, all other parameters."""
        inside = {x.name: x.shape[0] * x.shape[1] for x in self.trained}
        scales = sum(x.shape[0] * self.specs[x.name].groups(x.shape[1]) for x in self.trained)
        others = sum(torch.Size(shape).numel() for shape in self.found.others.values())
        others += sum(x.shape[0] * x.shape[1] for x in self.found.linears if x.name not in inside)
        return sum(inside.values()), scales, others

    @property
    def memory(self) -> int:
        """Bytes: 16 of what is trained (value, gradient, two moments in fp32), codes, scales, fp32 of the rest."""
        weights, scales, others = self.counts
        return (
            weights * (16 if self.weights else 1)
            + scales * (20 if self.scales else 4)
            + (16 if self.rest else 4) * others
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        weights, scales, _ = self.counts
        train = [name for name, on in (("weights", self.weights), ("scales", self.scales), ("rest", self.rest)) if on]
        counts = {"modules": len(self.trained), "weights": weights, "scales": scales}
        return {"spec": str(self.spec), "train": train, "start": self.words, **counts}


def opened(folder: Path, wish: Wish) -> Qad:
    """What training the codes or scales of this student would be. FormatError for what cannot be, Refused by the quantiser."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: the student is not there; give its folder")
    source = Checkpoint.open(folder)
    wanted = None if wish.qad is None else QuantSpec.parse(wish.qad)
    recipe = None
    if any(source.config.get(key) is not None for key in ("quantization_config", "compression_config")):
        if wish.calibration is not None:
            raise FormatError(
                f"--calibration: {folder} has its codes already; leave it out, or give the 16-bit student"
            )
        specs = specs_of(source)
        found = _map(source, specs)
        spec = max(dict.fromkeys(specs.values()), key=list(specs.values()).count)
        if wanted is not None and wanted != spec:
            raise FormatError(f"--qad {wanted}: {folder} is {spec}; say --qad {spec}, or give the 16-bit student")
        words = f"the codes of {folder.name}"
    else:
        if wanted is None:
            raise FormatError(
                f"{folder}: is 16-bit and has no scales yet; say which it will have, as in --qad w4a16-g64"
            )
        spec, text = wanted, wish.calibration or wish.data
        recipe = Recipe.from_flags(
            spec=str(spec),
            method="gptq",
            calibration=text,
            samples=wish.samples,
            seq_len=wish.seq_len,
            verify="none",
        )
        plan = preflight.check(folder, recipe)
        if plan.refusals:
            raise preflight.Refused(plan)
        specs, found = dict(plan.assignment.specs), plan.found
        words = f"GPTQ over {Path(text).name if text else 'the built-in texts, which are for smoke tests'}"
    experts = next((name for name in specs if ".experts." in name), None)
    if experts is not None:
        raise FormatError(
            f"{folder}: {experts} is an expert; mixtures of experts do not train with --qad; quantise after"
        )
    trained = tuple(x for x in found.linears if x.name in specs and x.block is not None)
    if not trained:
        raise FormatError(
            f"{folder}: no linear of a block is quantised, so nothing would be trained; quantise them first"
        )
    weights, scales = not wish.scales_only, wish.scales_only or wish.learn_scales
    return Qad(spec, specs, found, trained, source, recipe, weights, scales, wish.train_rest, words)


def _map(made: Checkpoint, specs: Mapping[str, QuantSpec]) -> walk.Map:
    """What a quantised checkpoint would be with 16-bit weights. FormatError where percard would have written it otherwise."""
    shapes = {name: tuple(info.shape) for name, info in made.tensors.items()}
    dtypes = {name: info.dtype for name, info in made.tensors.items()}
    kind = next((d for n, d in dtypes.items() if n.endswith("norm.weight")), torch.bfloat16)
    for module, spec in specs.items():
        stated = f"{module}.weight_shape"
        size = made.read(stated).tolist() if stated in shapes else list(shapes.get(f"{module}.weight", ()))
        if len(size) != 2:
            raise FormatError(f"{made.path}: {module} has the shape {size}, expected two sizes; quantise it again")
        for suffix, (dtype, shape) in compressed_tensors.plan((size[0], size[1]), spec, kind).items():
            name = f"{module}.{suffix}"
            if shapes.pop(name, None) != shape or dtypes.pop(name) != dtype:
                raise FormatError(
                    f"{made.path}: {name} is not {dtype} {list(shape)}, as percard quantize writes it; quantise the source with it"
                )
        shapes[f"{module}.weight"], dtypes[f"{module}.weight"] = (size[0], size[1]), kind
    config = {k: v for k, v in made.config.items() if k not in ("quantization_config", "compression_config")}
    return walk.survey(config, shapes, dtypes, str(made.path))


def begin(qad: Qad, work: Path, progress: Callback | None) -> None:
    """Quantises a 16-bit student, once; goes on with what a killed run left of it."""
    if qad.recipe is not None and not (work / START / "config.json").is_file():
        quantize.run(qad.student.path, work / START, qad.recipe, progress=progress)


def start_of(qad: Qad, work: Path) -> Checkpoint:
    """The quantised checkpoint that training starts from; `begin` has been here."""
    return qad.student if qad.recipe is None else Checkpoint.open(work / START)


def load(qad: Qad, made: Checkpoint) -> Any:
    """transformers' own model with a FakeLinear for everything that is trained; all other parameters frozen, in fp32.

    It is built without memory and gets tensor after tensor.
    """
    model = blocks.on_meta(blocks.hf_config(made.config, str(made.path)), torch.float32)
    for linear in qad.trained:
        old = model.get_submodule(linear.name)
        bias = made.read(f"{linear.name}.bias") if isinstance(old, nn.Linear) and old.bias is not None else None
        near = qad.student.read(linear.tensor) if qad.recipe is not None and qad.weights else None
        tensor = read(qad, made, linear)
        new = FakeLinear(tensor, bias, train_weights=qad.weights, train_scales=qad.scales, near=near)
        owner, _, leaf = linear.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    heads = {x.tensor: x for x in qad.found.linears if x.name in qad.specs and x.block is None}
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = (
                affine.dequantize(read(qad, made, heads[name])) if name in heads else walk.finite(made, name).float()
            )
            owner, _, leaf = name.rpartition(".")
            trained = qad.rest and name not in heads
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trained))
    for module in model.modules():
        if qad.rest and isinstance(module, FakeLinear) and module.bias is not None:
            module.bias.requires_grad_(True)
    if qad.found.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise FormatError(f"{made.path}: {name} has no tensor on the disk; this family is not known")
    return model


def read(qad: Qad, made: Checkpoint, linear: walk.Linear) -> QuantTensor:
    """Codes and scales of one module."""
    return read_module(made, linear.name, linear.shape, qad.specs[linear.name], qad.found.dtype)


def write(qad: Qad, made: Checkpoint, model: Any, out: Path | None) -> None:
    """The checkpoint: what was trained as it is now, all else as it was. Every process calls it, the first one has `out`."""
    plan = {name: (info.dtype, tuple(info.shape)) for name, info in made.tensors.items()}
    with contextlib.ExitStack() as stack:
        writer = None if out is None else stack.enter_context(Writer(out, plan, resume=()))
        left = dict.fromkeys(plan)
        for linear in qad.trained:
            tensor = model.get_submodule(linear.name).tensor()
            if writer is None:
                continue
            for suffix, part in compressed_tensors.write(tensor, qad.found.dtype).items():
                writer.add(f"{linear.name}.{suffix}", part)
                del left[f"{linear.name}.{suffix}"]
        rest = {name: p for name, p in model.named_parameters() if p.requires_grad and name in left}
        for name, parameter in rest.items():
            tensor_16 = whole(parameter).to("cpu", plan[name][0])
            if writer is not None:
                writer.add(name, tensor_16)
                del left[name]
        if writer is not None:
            for name in left:
                if qad.rest and qad.found.tied and name == walk.HEAD:  # stored twice
                    writer.add(name, whole(rest[walk.EMBEDDING]).to("cpu", plan[name][0]))
                else:
                    writer.add_raw(name, made.raw(name))
            writer.copy_side_files(made)
            writer.finish(made.config)


def trained_rest(qad: Qad) -> tuple[str, ...]:
    """Names of the 16-bit tensors that are trained as well."""
    heads = {x.name for x in qad.found.linears if x.name in qad.specs and x.block is None}
    others = [x.tensor for x in qad.found.linears if x.name not in qad.specs and x.name not in heads]
    return tuple(sorted([*qad.found.others, *others])) if qad.rest else ()


def reported(folder: Path) -> Report | None:
    """report.json of a quantised checkpoint; None without one of ours."""
    path = folder / report.REPORT_NAME
    try:
        return Report.load(path) if path.is_file() else None
    except FormatError:
        return None
