"""Valid checkpoint folders and recipes for the fuzz target, and how they are changed: bytes, values, names, files, links."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from percard.formats import affine
from percard.formats import compressed_tensors as ct
from percard.formats.checkpoint import MARKER, Writer
from percard.formats.kv_layers import KVLayers
from percard.formats.kvcache import KVSpec
from percard.formats.spec import QuantSpec

Files = dict[str, bytes]


# -- what is changed -------------------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 40,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 0,
    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"},
}  # fmt: skip
RECIPE = """model: somewhere/else
serve: {engine: vllm==0.33.0, sm: 90, tp: 2}
stages:
  - quantize:
      spec: w4a16-g64
      methods: [{rtn: {search: false, norm: 2}}]
      layers: {'re:.*\\.layers\\.(0|35)\\..*': w8a16}
      ignore: [lm_head, 're:.*gate$']
verify: {level: bytes}
output: {dir: ./out, to: compressed-tensors, card: true}
"""
SPECS = {"q_proj": "w4a16-g32-asym", "k_proj": "w8a8", "v_proj": "w3a16-g64", "o_proj": "w8a16-g32"}


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a one-block model."""
    random_ = torch.Generator().manual_seed(0)
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    block = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    shapes |= {f"{block}self_attn.{n}_proj.weight": (rows, h) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {f"{block}self_attn.o_proj.weight": (h, q), f"{block}mlp.down_proj.weight": (h, f)}
    shapes |= {f"{block}mlp.{n}_proj.weight": (f, h) for n in ("gate", "up")}
    shapes |= {f"{block}self_attn.{n}_norm.weight": (d,) for n in "qk"}
    shapes |= {f"{block}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (h,)}
    return {n: torch.randn(s, generator=random_).to(torch.bfloat16) for n, s in shapes.items()}


def _folder(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Files:
    """Writes a checkpoint with traps beside it; all its files."""
    plan = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with Writer(path, plan, max_shard=sum(t.nbytes for t in tensors.values()) / 1.6) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(config)
    (path / "modeling_evil.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    (path / "tokenizer.json").write_text('{"model": {}}')
    for name in ("pytorch_model.bin", "old.pt", "optimizer.pkl"):
        (path / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


class Bomb:
    """Unpickled, it ends the process with a code that the test knows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def corpus(work: Path) -> dict[str, tuple[Path, Files]]:
    """The valid folders that are changed: 16-bit, quantised, a calibrated cache, and an output that was not finished."""
    plain = _weights(CONFIG)
    packed: dict[str, torch.Tensor] = {}
    specs: dict[str, QuantSpec] = {}
    for name, tensor in plain.items():
        module, leaf = name.rpartition(".")[0], name.split(".")[-2]
        if leaf in SPECS:
            specs[module] = QuantSpec.parse(SPECS[leaf])
            written = ct.write(
                affine.quantize(tensor, specs[module], ct.scale_dtype_of(specs[module], torch.bfloat16)), torch.bfloat16
            )
            packed |= {f"{module}.{suffix}": part for suffix, part in written.items()}
        else:
            packed[name] = tensor
    groups = {
        f"group_{i}": ct.config({module: spec}, [])["config_groups"]["group_0"] | {"targets": [rf"re:.*{module[-6:]}$"]}
        for i, (module, spec) in enumerate(specs.items())
    }
    section = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["re:.*embed.*"]}
    quantized = CONFIG | {"quantization_config": section | {"config_groups": groups}}
    half = work / "half"
    half.mkdir(parents=True)
    (half / MARKER).write_text(json.dumps({"made_folder": False, "files": ["model.safetensors", "deep/x.json"]}))
    (half / "model.safetensors.tmp").write_bytes(b"x")
    (half / "mine.txt").write_text("not of percard")
    cache = work / "cache"
    cache.mkdir()
    (cache / "config.json").write_text(json.dumps(CONFIG))
    offsets = (torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), None, torch.zeros(2, 16), None)
    names = ("int4", "bf16", "k8v4", "int8")
    KVLayers(tuple(map(KVSpec.parse, names)), offsets, 2, 16, {"text": "t.txt", "kl": 0.001}).save(cache)
    return {
        "cache": (cache, {file.name: file.read_bytes() for file in sorted(cache.iterdir())}),
        "plain": (work / "plain", _folder(work / "plain", plain, CONFIG)),
        "quantized": (work / "quantized", _folder(work / "quantized", packed, quantized)),
        "half": (half, {file.name: file.read_bytes() for file in sorted(half.iterdir())}),
    }


# -- how it is changed -----------------------------------------------------------------------------------------------------

TOKENS = [
    b'"dtype"', b'"F32"', b"[", b"]", b"{", b"}", b":", b",", b"0", b"-1", b"1e9", b"1e999", b"9" * 40, b"9" * 5000, b"null",
    b"true", b'"w"', b'"\\ud800"', b"\x00", b"\xff", b"NaN", b"-Infinity", b'"data_offsets"', b"[" * 3000, b'{"a":' * 3000,
    b'"../x"', b"..", b"/", b"*a", b"&a ", b"!!python/object/apply:os.system ", b"<<: ", b"re:", b"(a+)+$", b"- ", b"\n", b"\t",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.0, 4.0, 8.0, 0.5, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000, -(2**63),
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "x" * 100_000, "\ud800", "\0", "é" * 300, "../../escaped", "/etc/passwd",
    "a/../../escaped", "..", ".", "C:\\x.safetensors", "~/x", "model.safetensors", "config.json", "con", [], {}, [[]], [0], [1, 2, 3],
    [2**62, 2**62], [True], ["x"], [None], {"x": 1}, {"": {}}, "F8_E8M0", "C64", "BOOL", "I64", "F33", "Linear", "re:(", "re:.*",
    "re:(a|a)*$", "re:(.*)*x", "re:(([a-z_.0-9])+)+!", "re:" + ".*" * 30 + "x", "re:" + "a?" * 40, "re:" + "(.|.)" * 40 + "!",
    "re:(?=(.+)+!)", "re:(.+)\\1+!", "re:" + "(" * 200, "re:[[", "re:a{1,999999999}", "group", "tensor", "channel", "float", "int",
    "int8", "bf16", "k8v4-sym", "layers.0.mu", "layers.1.mu", "pack-quantized", "int-quantized", "marlin-24", "sparse-24-bitmask",
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three small changes, most of them in the first 2,000 bytes, where the meaning is."""
    for _ in range(rng.randint(1, 3)):
        head = min(2000, len(data))
        at = rng.randrange(head if rng.random() < 0.8 else len(data)) if data else 0
        kind = rng.randrange(8)
        if kind == 0 and data:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.randint(1, 12) :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + data[at : at + 30] + data[at:]
        elif kind == 5:
            data += bytes(rng.randrange(1, 20))
        elif kind == 6:  # the length of a safetensors header
            lengths = (
                0,
                1,
                2,
                8,
                len(data),
                max(0, len(data) - 8),
                10**8,
                10**8 + 1,
                2**31,
                2**32,
                2**63 - 1,
                2**63,
                2**64 - 1,
            )
            data = struct.pack("<Q", rng.choice(lengths)) + data[8:]
        else:  # a digit becomes another one: lies about sizes and offsets
            digits = [i for i, c in enumerate(data[:head]) if 48 <= c < 58]
            if digits:
                i = rng.choice(digits)
                data = data[:i] + bytes([rng.randrange(48, 58)]) + data[i + 1 :]
    return data


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _value(rng: random.Random) -> Any:
    """One of VALUES, a copy of its own: it is changed later."""
    return copy.deepcopy(rng.choice(VALUES))


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, doubled, renamed, swapped, wrapped or grown."""
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return _value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind < 5:
            holder[key] = _value(rng)
        elif kind == 5:
            del holder[key]
        elif kind == 6:
            other, at = rng.choice(places)
            if key in holder if isinstance(holder, dict) else key < len(holder):
                value = json.loads(json.dumps(holder[key]))
                if isinstance(other, list) or at in other:
                    other[at if not isinstance(other, list) else min(at, len(other) - 1)] = value
        elif kind == 7 and isinstance(holder, dict):
            new = rng.choice([v for v in VALUES if isinstance(v, str)] + ["weight_scale", "ignore", "targets", "dtype"])
            holder[new] = holder.pop(key)
        elif kind == 8:
            value = holder[key]
            holder[key] = rng.choice([[value], {"x": value}, [value] * 100, {str(i): value for i in range(50)}])
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice(
                [holder[key] + 1, holder[key] - 1, holder[key] * 2**40, -holder[key], holder[key] // 2]
            )
        else:
            holder[key] = _value(rng)
    return tree


def print_tree(tree: Any, rng: random.Random) -> bytes:
    """JSON text; now and then with a name twice, very deep, or with other spacing."""
    text = json.dumps(tree, indent=rng.choice([None, None, 1]), ensure_ascii=rng.random() < 0.9).encode(
        "utf-8", "surrogatepass"
    )
    trick = rng.randrange(12)
    if trick == 0 and text.startswith(b"{") and len(text) > 2:
        return b'{"__metadata__": {"format": "pt"}, "a": 1, "a": 2, ' + text[1:]
    if trick == 1:
        depth = rng.choice([50, 2000, 200_000])
        return b'{"a": ' + b"[" * depth + b"]" * depth + b", " + text[1:]
    if trick == 2:
        return b"\xef\xbb\xbf" + text
    return text


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the header as a tree, keeping the data behind it, or one number inside the data."""
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.15:
        at = rng.randrange(8 + length, len(data) - 8) if len(data) - 16 > length else 0
        number = struct.pack("<q", rng.choice([0, -1, 10**12, 2**62, 2**63 - 1, 3, 64]))
        if rng.random() < 0.7:  # where an int64 lies: weight_shape
            header = json.loads(data[8 : 8 + length])
            shapes = [e["data_offsets"][0] for e in header.values() if e.get("dtype") == "I64"]
            at = 8 + length + rng.choice(shapes) + rng.choice([0, 8]) if shapes else at
        return data[:at] + number + data[at + 8 :]
    text = print_tree(mutate_tree(json.loads(data[8 : 8 + length]), rng), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_file(path: Path, data: bytes, rng: random.Random, outside: Path) -> str:
    """Changes one file of a folder in place; what was done to it."""
    kind = rng.random()
    if kind < 0.06:
        path.unlink()
        target = rng.choice(
            [outside / "secret.json", outside, path, Path("/dev/zero"), Path("/dev/stdin"), Path("/proc/self/mem")]
        )
        target = rng.choice([target, Path("../outside/secret.json"), Path("gone")])
        path.symlink_to(target)
        return f"a link to {target}"
    if kind < 0.08:
        path.unlink()
        os.mkfifo(path)
        return "a pipe"
    if kind < 0.10:
        path.unlink()
        path.mkdir()
        return "a folder"
    if kind < 0.12:
        path.unlink()
        return "gone"
    structured = path.suffix in (".json", ".safetensors") or path.name == MARKER
    if structured and rng.random() < 0.6:
        safetensors = path.suffix == ".safetensors"
        path.write_bytes(
            mutate_safetensors(data, rng) if safetensors else print_tree(mutate_tree(json.loads(data), rng), rng)
        )
        return "other values"
    path.write_bytes(mutate_bytes(data, rng))
    return "other bytes"
