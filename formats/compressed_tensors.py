"""The compressed-tensors codec: names, bytes and config of the files that vLLM, SGLang and transformers load.

    pack-quantized   weight_packed int32 [out, ceil(in*b/32)], weight_scale [out, in/g], weight_shape int64 [2],
                     weight_zero_point int32 [ceil(out*b/32), in/g] if asymmetric       w4a16 w8a16 w3a16 w4a8, any group
    int-quantized    weight int8 [out, in], weight_scale fp32 [out, 1]                  w8a8

Pure: no file is opened here. Source: https://github.com/vllm-project/compressed-tensors (0.19.0); see docs/formats.md.

W4A8 is written as pack-quantized. Left to itself, compressed-tensors puts such a layer into int-quantized, one code per
byte, and half of the memory is lost; we say the container in the group and at the top, which every reader honours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .affine import scale_dtype_of
from .pack import pack, unpack, word_count
from .spec import FormatError, QuantSpec
from .targets import check_fused, matches, patience, targets_of
from .tensor import QuantTensor

PACKED, INT = "pack-quantized", "int-quantized"
_READ = (PACKED, INT, "naive-quantized")
_NOT_READ = ("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "marlin-24",
             "sparse-24-bitmask", "sparse-bitmask")  # fmt: skip
_ARGS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_INT8_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _preset(bits: int, act: int = 16, symmetric: bool = True, channel: bool = False) -> dict[str, Any]:
    """The group that a preset name of compressed-tensors stands for."""
    place = {"strategy": "channel"} if channel else {"strategy": "group", "group_size": 128}
    group: dict[str, Any] = {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **place}}
    return group | ({"input_activations": _INT8_TOKENS} if act == 8 else {})


_PRESETS = {
    "W4A16": _preset(4), "W4A16_ASYM": _preset(4, symmetric=False), "W8A16": _preset(8), "W3A16": _preset(3),
    "W4A8": _preset(4, 8), "W8A8": _preset(8, 8, channel=True), "INT8": _preset(8, 8, channel=True),
}  # fmt: skip


# -- reading the config -------------------------------------------------------------------------------------------------


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config of a model's config.json (or that section itself); empty if there is none."""
    if "quant_method" in config and "model_type" not in config:
        return config
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(holder.get(key), Mapping):
                    return holder[key]
    return {}


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says compressed-tensors."""
    section = _section(config)
    method = section.get("quant_method")
    return method in ("compressed-tensors", "compressed_tensors") or (method is None and "config_groups" in section)


@dataclass(frozen=True)
class _Group:
    name: str
    targets: list[str]
    spec: QuantSpec | str  # the reason, where it is not one of ours: an error only if a module uses it


def _unknown(found: Mapping[str, Any], known: set[str], where: str) -> None:
    extra = sorted(set(found) - known)
    if extra:
        raise FormatError(
            f"quantization_config: {where} has the unknown key {extra[0]!r}, which no reader takes; remove it"
        )


def _spec_of(group: Mapping[str, Any], where: str) -> QuantSpec | str:
    """The spec that the arguments of one group mean, or why it is none of ours."""
    for key in ("weights", "input_activations", "output_activations"):
        args = group.get(key)
        if args is not None:
            if not isinstance(args, Mapping):
                raise FormatError(f"quantization_config: {where}: {key} is not an object")
            _unknown(args, _ARGS, f"{where}.{key}")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return "has no weights to quantise"
    form = group.get("format")
    if form is not None and form not in _READ:
        if form in _NOT_READ:
            return f"container {form} is not read here; read are {', '.join(_READ)}"
        raise FormatError(
            f"quantization_config: {where}: unknown format {form!r}; known: {', '.join(_READ + _NOT_READ)}"
        )
    if weights.get("type", "int") != "int":
        return f"weights of type {weights.get('type')} are not read here, only int"
    if weights.get("dynamic") or group.get("output_activations") is not None:
        return "weights that change at run time, or quantised outputs, are not read here"
    if weights.get("actorder") in ("group", "dynamic", True):
        return "actorder group: columns out of order; quantise the source again with actorder static or none"
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("tensor", "channel", "group"):
        return f"weights with strategy {strategy} are not read here; read are tensor, channel, group"
    if strategy == "group" and (type(size) is not int or size <= 0):
        raise FormatError(
            f"quantization_config: {where}: strategy group with group_size {size!r}, expected 32, 64 or 128"
        )
    act = 16
    if inputs is not None:
        if inputs.get("type", "int") != "int" or inputs.get("num_bits", 8) != 8:
            return f"activations of {inputs.get('num_bits', 8)} bits, type {inputs.get('type')}, are not run here, only int8"
        if inputs.get("strategy") not in (None, "token", "tensor"):
            return f"activations with strategy {inputs.get('strategy')} are not run here, only per token"
        act = 8
    symmetric, bits = weights.get("symmetric", True), weights.get("num_bits", 8)
    if type(bits) is not int:
        return f"num_bits is {bits!r}, expected a whole number"
    try:
        return QuantSpec(bits, act, size if strategy == "group" else None, symmetric is not False)
    except FormatError as error:
        return str(error)


def _groups(section: Mapping[str, Any]) -> list[_Group]:
    """All groups of a section. FormatError for what every reader refuses as well."""
    if section.get("transform_config"):
        raise FormatError(
            "quantization_config: transform_config (rotations at run time) is not run here; use a file without"
        )
    sparsity = section.get("sparsity_config")
    if sparsity and isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise FormatError(
            f"quantization_config: sparsity_config {sparsity.get('format')!r} is not read; use a dense file"
        )
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("quantization_config: has no config_groups; is the config complete?")
    top = section.get("format")
    if top is not None and top not in (*_READ, *_NOT_READ, "mixed-precision", "dense"):
        raise FormatError(f"quantization_config: unknown format {top!r}; known: {', '.join(_READ + _NOT_READ)}")
    found = []
    for name, value in groups.items():
        group = value
        if isinstance(value, list):  # a preset name with its targets
            if name.upper() not in _PRESETS:
                raise FormatError(f"quantization_config: unknown preset {name!r}; known: {', '.join(_PRESETS)}")
            group = {"targets": value, **_PRESETS[name.upper()]}
        if not isinstance(group, Mapping):
            raise FormatError(f"quantization_config: group {name!r} is not an object")
        _unknown(group, _GROUP, name)
        targets = group.get("targets")
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
            raise FormatError(f"quantization_config: group {name!r} has no targets; name modules, regexes or 'Linear'")
        form = group.get("format") or (top if top in _NOT_READ else None)
        found.append(_Group(name, targets, _spec_of({**group, "format": form}, name)))
    return found


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that are quantised, by the tensors they have: `weight_packed`, or `weight` with `weight_scale`."""
    found = dict.fromkeys(
        name.rpartition(".")[0] for name in names if name.endswith((".weight_packed", ".weight_scale"))
    )
    return list(found)


def specs(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, QuantSpec]:
    """Spec of every quantised module of a checkpoint: {module: spec}.

    config: config.json. names: all tensor names. Match order: exact name, regex, class name; `ignore` wins.
    """
    section = _section(config)
    groups = _groups(section)
    ignore = section.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(t, str) for t in ignore):
        raise FormatError("quantization_config: ignore is not a list of names")
    names = set(names)
    out: dict[str, QuantSpec] = {}
    for module in patience(sorted(modules_of(names))):
        if matches(module, ignore):
            raise FormatError(
                f"{module}: is in the ignore list of the config, but has quantised tensors; one of them is wrong"
            )
        group = next((g for kind in (0, 1, 2) for g in groups if matches(module, g.targets, kind)), None)
        if group is None:
            raise FormatError(
                f"{module}: has quantised tensors, but no group of the config names it; one of them is wrong"
            )
        if isinstance(group.spec, str):
            raise FormatError(f"{module}: group {group.name!r}: {group.spec}")
        out[module] = group.spec
    for group in groups:
        for target in group.targets:
            if f"{target}.weight" in names and target not in out and not matches(target, ignore):
                raise FormatError(
                    f"{target}: group {group.name!r} quantises it, but it has no weight_scale; fetch it again"
                )
    return out


# -- reading a module ---------------------------------------------------------------------------------------------------


def _old_unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Codes of files from before October 2025, where no code crosses a word: 32 // bits codes in each."""
    per = 32 // bits
    planes = [((words >> (bits * i)) & ((1 << bits) - 1)).to(torch.int8) for i in range(per)]
    return torch.stack(planes, dim=2).reshape(words.shape[0], -1)[:, :n] - (1 << (bits - 1))


def _codes(tensors: Mapping[str, torch.Tensor], spec: QuantSpec, shape: tuple[int, int], who: str) -> torch.Tensor:
    """int8 codes [out, in] from either container."""
    rows, columns = shape
    bits = spec.weight_bits
    if "weight_packed" in tensors:
        words = tensors["weight_packed"]
        dense, padded = word_count(columns, bits), -(-columns // (32 // bits))
        if (
            words.dtype != torch.int32
            or words.dim() != 2
            or words.shape[0] != rows
            or words.shape[1] not in (dense, padded)
        ):
            raise FormatError(
                f"{who}weight_packed is {words.dtype} {list(words.shape)}, expected int32 {[rows, dense]} for {spec} {list(shape)}"
            )
        if bits == 3:
            if columns % 32:
                raise FormatError(
                    f"{who}{bits}-bit rows of {columns} can be read in two ways; expected a multiple of 32"
                )
            if words.shape[1] == padded:
                return _old_unpack(words, bits, columns)
        return unpack(words, bits, columns)
    codes = tensors.get("weight")
    if codes is None:
        raise FormatError(f"{who}has neither weight_packed nor weight, found {sorted(tensors)}; fetch it again")
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape:
        raise FormatError(f"{who}weight is {codes.dtype} {list(codes.shape)}, expected int8 {list(shape)}")
    if bits < 8 and codes.numel():  # one 4-bit code per byte: the container that W4A8 gets by itself elsewhere
        lo, hi = (int(v) for v in torch.aminmax(codes))
        if lo < spec.qmin or hi > spec.qmax:
            raise FormatError(f"{who}weight has codes {lo}..{hi}, {spec} allows {spec.qmin}..{spec.qmax}")
    return codes


def _zero(
    zero: torch.Tensor | None, packed: bool, spec: QuantSpec, rows: int, groups: int, who: str
) -> torch.Tensor | None:
    """Signed zero points int8 [out, groups], or None for a symmetric spec."""
    if zero is None:
        if not spec.symmetric:
            raise FormatError(f"{who}{spec} is asymmetric, but weight_zero_point is missing; fetch it again")
        return None
    if packed and zero.dtype == torch.int32:
        expected = (word_count(rows, spec.weight_bits), groups)
        if tuple(zero.shape) != expected:
            raise FormatError(f"{who}weight_zero_point is {list(zero.shape)}, expected {list(expected)} for {spec}")
        signed = unpack(zero, spec.weight_bits, rows, dim=0)
    else:
        if zero.dtype != torch.int8 or zero.numel() not in (1, rows * groups):
            raise FormatError(
                f"{who}weight_zero_point is {zero.dtype} {list(zero.shape)}, expected int8 {[rows, groups]}"
            )
        signed = zero.reshape(-1, 1).expand(rows, groups) if zero.numel() == 1 else zero.reshape(rows, groups)
        signed = signed.contiguous()
    if not spec.symmetric:
        return signed
    if bool(torch.count_nonzero(signed)):
        raise FormatError(
            f"{who}{spec} is symmetric, but weight_zero_point is not neutral; the config or the file is wrong"
        )
    return None


def _check_order(g_idx: torch.Tensor, spec: QuantSpec, columns: int, groups: int, who: str) -> None:
    """Accept the index of old files only where it says nothing: -1, or column i in group i // size."""
    if g_idx.numel() != columns:
        raise FormatError(f"{who}weight_g_idx has {g_idx.numel()} entries, expected {columns}")
    flat = g_idx.reshape(-1).to(torch.int64)
    if bool((flat == -1).all()) or torch.equal(flat, torch.arange(columns) // (spec.group or max(1, columns))):
        return
    if bool(((flat < 0) | (flat >= groups)).any()):
        raise FormatError(
            f"{who}weight_g_idx reaches from {int(flat.min())} to {int(flat.max())}, there are {groups} groups"
        )
    raise FormatError(
        f"{who}columns are out of order (actorder group); quantise the source again with actorder static or none"
    )


def read(
    tensors: Mapping[str, torch.Tensor], spec: QuantSpec, shape: tuple[int, int] | None = None, module: str = ""
) -> QuantTensor:
    """A plain QuantTensor from the tensors of one module, {suffix: tensor}; lossless.

    shape: (out, in) if it is known, else it is read from `weight_shape` or `weight`. module: for messages only.
    FormatError for shapes, dtypes or values that do not fit together.
    """
    who = f"{module}: " if module else ""
    stated = tensors.get("weight_shape")
    if stated is not None:
        numbers = stated.reshape(-1)[:3].tolist()
        right = stated.dtype in (torch.int64, torch.int32) and len(numbers) == 2 and min(numbers) >= 0
        if not right or (shape is not None and tuple(numbers) != shape):
            expected = "two sizes" if shape is None else list(shape)
            raise FormatError(f"{who}weight_shape says {numbers}, expected {expected}")
        shape = (numbers[0], numbers[1])
    if shape is None:
        codes = tensors.get("weight")
        if codes is None or codes.dim() != 2:
            raise FormatError(
                f"{who}has no weight_shape and no 2-D weight; experts in one 3-D tensor are not read here"
            )
        shape = (codes.shape[0], codes.shape[1])
    rows, columns = shape
    try:
        groups = spec.groups(columns)
    except FormatError as error:
        raise FormatError(f"{who}{error}") from None
    scale = tensors.get("weight_scale")
    if scale is None:
        raise FormatError(f"{who}weight_scale is missing; fetch it again")
    if not scale.is_floating_point() or scale.dtype.itemsize < 2:
        raise FormatError(f"{who}weight_scale is {scale.dtype}, expected bfloat16, float16 or float32")
    if not bool(torch.isfinite(scale).all()):
        raise FormatError(f"{who}weight_scale holds NaN or Inf; the file is damaged, quantise the source again")
    if spec.group is None and tuple(scale.shape) in ((), (1,)):  # one scale for the whole weight
        scale = scale.reshape(1, 1).expand(rows, 1)
    if spec.group is None and tuple(scale.shape) == (rows,):
        scale = scale.reshape(rows, 1)
    if tuple(scale.shape) != (rows, groups):
        raise FormatError(
            f"{who}weight_scale is {list(scale.shape)}, expected {[rows, groups]} for {spec} {list(shape)}"
        )
    codes = _codes(tensors, spec, shape, who)
    scale = scale.contiguous()  # not before the codes have shown that there are so many rows
    if "weight_g_idx" in tensors:
        _check_order(tensors["weight_g_idx"], spec, columns, groups, who)
    zero = _zero(tensors.get("weight_zero_point"), "weight_packed" in tensors, spec, rows, groups, who)
    return QuantTensor(codes, scale, zero, spec, "plain", shape)


# -- writing ------------------------------------------------------------------------------------------------------------


def container(spec: QuantSpec) -> str:
    """The container that we write a spec into."""
    if spec.float_format is not None:
        raise FormatError(f"{spec} is not written by the integer codec")
    return INT if (spec.weight_bits, spec.act_bits) == (8, 8) else PACKED


def plan(
    shape: tuple[int, int], spec: QuantSpec, model_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor that `write` makes of a weight of true size `shape`, before there is one."""
    rows, columns = shape
    groups = spec.groups(columns)
    scale = (scale_dtype_of(spec, model_dtype), (rows, groups))
    if container(spec) == INT:
        return {"weight": (torch.int8, (rows, columns)), "weight_scale": scale}
    bits = spec.weight_bits
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (rows, word_count(columns, bits))),
        "weight_scale": scale,
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        out["weight_zero_point"] = (torch.int32, (word_count(rows, bits), groups))
    return out


def write(qt: QuantTensor, model_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of one module, {suffix: tensor}, that `read` gives back bit by bit.

    FormatError for a scale that is not finite and above zero, or that `model_dtype` would round: the codes were found for
    another scale then.
    """
    if qt.packing != "plain":
        raise FormatError(
            f"compressed-tensors writes packing plain, found {qt.packing}; use layout.repack(qt, 'plain')"
        )
    if not bool((torch.isfinite(qt.scale) & (qt.scale > 0)).all()):
        raise FormatError(f"{qt.spec}: a scale is not finite and above zero; it is not written")
    dtype = scale_dtype_of(qt.spec, model_dtype)
    scale = qt.scale.to(dtype)
    if not torch.equal(scale.to(torch.float64), qt.scale.to(torch.float64)):
        raise FormatError(
            f"{qt.spec}: scales of {qt.scale.dtype} would be rounded to {dtype}; quantize with scale_dtype={dtype}"
        )
    if container(qt.spec) == INT:
        return {"weight": qt.data.contiguous(), "weight_scale": scale.contiguous()}
    bits = qt.spec.weight_bits
    out = {
        "weight_packed": pack(qt.data, bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(qt.shape, dtype=torch.int64),
    }
    if qt.zero is not None:
        out["weight_zero_point"] = pack(qt.zero, bits, dim=0)
    return out


def _group_config(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    """One entry of config_groups; these keys and no others, since readers refuse unknown ones."""
    weights: dict[str, Any] = {"num_bits": spec.weight_bits, "type": "int", "symmetric": spec.symmetric}
    weights |= {"strategy": "channel"} if spec.group is None else {"strategy": "group", "group_size": spec.group}
    group: dict[str, Any] = {"targets": targets, "format": container(spec), "weights": {**weights, "dynamic": False}}
    if spec.act_bits == 8:
        group["input_activations"] = dict(_INT8_TOKENS)
    return group


def config(specs: Mapping[str, QuantSpec], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` for modules {name: spec} and the names that stay 16-bit.

    FormatError where modules that engines fuse (q k v; gate up; the experts of a layer) have different specs.
    """
    if not specs:
        raise FormatError("a quantization_config without a quantised module is not written")
    check_fused(specs, ignore)
    by_spec: dict[QuantSpec, list[str]] = {}
    for module, spec in specs.items():
        by_spec.setdefault(spec, []).append(module)
    order = sorted(by_spec, key=lambda spec: (-len(by_spec[spec]), str(spec)))
    containers = {container(spec) for spec in by_spec}
    groups = {f"group_{i}": _group_config(spec, targets_of(specs, spec)) for i, spec in enumerate(order)}
    return {
        "quant_method": "compressed-tensors",
        "format": containers.pop() if len(containers) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": groups,
    }
