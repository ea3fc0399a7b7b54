"""The block runner: a decoder, block by block, its weights onloaded from wherever `read` finds them. Nothing is traced.

transformers builds the model on `meta`, where it takes no memory. Every block is then replaced by a recorder that keeps
what it is called with and returns zeros: one ordinary forward call yields the first block's input, each block's own
arguments (masks, rotary tables) and whatever the parent adds between blocks. From then on

    x = x0;  for i: x = block_i(x + added_i, **arguments_i)

and only the block at work holds weights. A mixture's experts are ours (`Experts`), one matrix per expert under its name
on disk, so that no library's fused layout stands between a name and its weight. `check` compares the chain with the
model's own forward on a small random model of the same architecture.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..formats import affine
from ..formats.spec import FormatError
from ..formats.tensor import QuantTensor
from .recipe import RecipeError
from .walk import Map

Read = Callable[[str], torch.Tensor | QuantTensor]  # a tensor by its name on disk; a QuantTensor for a quantised weight
Watch = Callable[[torch.Tensor], None]


class Stop(Exception):
    """Raised by a watcher that has seen what it wanted: the rest of the block need not run."""


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as int8 rows show it: absmax / 127 per row, rounded half to even (kernels/quantize_rows), same dtype."""
    rows = x.float()
    scale = rows.abs().amax(dim=-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (rows / scale).round_().clamp_(-127, 127).mul_(scale).to(x.dtype)


class Slot(nn.Module):
    """A linear of a block: weight [N, K] and bias; whether its input becomes int8 rows first; who looks at that input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # plain tensors: nothing trains here
        self.rounds_input = False
        self.watch: Watch | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.watch is not None:
            self.watch(x)
        return F.linear(round_rows(x) if self.rounds_input else x, self.weight, self.bias)

    def put(self, weight: torch.Tensor | QuantTensor, dtype: torch.dtype) -> None:
        """Takes another weight; of a QuantTensor its values, and whether inputs are rounded."""
        if isinstance(weight, QuantTensor):
            self.rounds_input = weight.spec.act_bits == 8
            weight = affine.dequantize(weight, dtype)
        self.weight = weight.to(dtype)


class Experts(nn.Module):
    """The experts of a block: (hidden [T, H], expert index [T, k], weight [T, k]) -> [T, H], each token by its own."""

    def __init__(self, slots: Mapping[str, Slot], count: int) -> None:
        super().__init__()
        self.slots = dict(slots)  # "3.up_proj" -> Slot
        self.count = count
        self.watch: Watch | None = None  # sees the input of all tokens
        self.watch_output: Callable[[int, torch.Tensor, torch.Tensor], None] | None = (
            None  # (expert, [T, H], router's weight [T])
        )
        self.tokens = torch.zeros(count, dtype=torch.int64)  # how many each expert has met

    def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.watch is not None:
            self.watch(x)
        out = torch.zeros_like(x)
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=self.count)[: self.count]
        self.tokens += counts.cpu()
        start = 0
        for expert, count in enumerate(counts.tolist()):
            picked = order[start : start + count]
            start += count
            if count:
                token = picked // index.shape[1]
                y, share = self.one(expert, x[token]), weight.flatten()[picked]
                if self.watch_output is not None:
                    self.watch_output(expert, y, share)
                out.index_add_(0, token, (y * share[:, None]).to(out.dtype))
        return out

    def inner(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What an expert's last matrix reads, for rows x [T, H]: [T, ffn]."""
        return F.silu(self.slots[f"{expert}.gate_proj"](x)) * self.slots[f"{expert}.up_proj"](x)

    def one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's SwiGLU over rows x [T, H]."""
        return self.slots[f"{expert}.down_proj"](self.inner(expert, x))


class _Recorder(nn.Module):
    """Stands where a block was: keeps its input and arguments, returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor, dict[str, Any]] | None = None

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.seen = (hidden, arguments)
        return torch.zeros_like(hidden)


@dataclass(eq=False)
class Block:
    """A decoder block that holds its weights. `slots`: every linear of the checkpoint's block by its name on disk."""

    index: int
    prefix: str
    module: nn.Module
    slots: dict[str, Slot]
    experts: Experts | None
    dtype: torch.dtype

    @torch.no_grad()
    def forward(self, x: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]."""
        out = self.module(x, **arguments)
        return out[0] if isinstance(out, tuple) else out

    def put(self, name: str, weight: torch.Tensor | QuantTensor) -> None:
        """Another weight for the linear `name`, or another value of a norm or bias (a plain tensor)."""
        if name in self.slots:
            self.slots[name].put(weight, self.dtype)
            return
        assert isinstance(weight, torch.Tensor)
        owner, _, leaf = name.removeprefix(self.prefix).rpartition(".")
        if f"{self.prefix}{owner}" in self.slots:
            setattr(self.slots[f"{self.prefix}{owner}"], leaf, weight.to(self.dtype))
        else:
            module = self.module.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(weight.to(self.dtype), requires_grad=False))

    @contextlib.contextmanager
    def watching(self, watchers: Mapping[str, Watch]) -> Iterator[None]:
        """Lets `watchers` see the inputs of linears by name, "...mlp.experts" for that of all experts."""
        targets = {name: self._target(name) for name in watchers}
        try:
            for name, watch in watchers.items():
                targets[name].watch = watch
            yield
        finally:
            for target in targets.values():
                target.watch = None

    def _target(self, name: str) -> Slot | Experts:
        if self.experts is not None and name == f"{self.prefix}mlp.experts":
            return self.experts
        return self.slots[name]


class Frame:
    """What stands around the blocks of a model: embedding, masks and rotary tables, last norm and head.

    config: config.json. dtype: of the arithmetic. FormatError when transformers cannot build the architecture.
    """

    def __init__(self, config: Mapping[str, Any], found: Map, dtype: torch.dtype, where: str) -> None:
        self.found, self.dtype, self.where = found, dtype, where
        self.config = hf_config(config, where)
        self._model = on_meta(self.config, dtype)
        self._layers = list(self._model.model.layers)
        self._recorders = [_Recorder() for _ in self._layers]
        self._model.model.layers = nn.ModuleList(self._recorders)
        self._model.model.norm = nn.Identity()
        self._model.model.embed_tokens.padding_idx = None  # it matters for training only
        rotary = type(self._model.model.rotary_emb)
        self._model.model.rotary_emb = rotary(config=self.config)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def start(self, ids: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """(x0 [B, T, H], the arguments of every block) for ids int64 [B, T]; embedding [V, H].

        FormatError when the parent adds something between blocks, which no family here does.
        """
        self._model.model.embed_tokens.weight = nn.Parameter(embedding.to(self.dtype), requires_grad=False)
        try:
            self._model.model(input_ids=ids, use_cache=False)
        finally:
            self._model.model.embed_tokens.weight = nn.Parameter(
                torch.empty(embedding.shape, dtype=self.dtype, device="meta"), requires_grad=False
            )
        inputs, arguments = [], []
        for recorder in self._recorders:
            assert recorder.seen is not None
            inputs.append(recorder.seen[0])
            arguments.append(recorder.seen[1])
            recorder.seen = None
        for i, x in enumerate(inputs[1:], 1):
            if bool(x.any()):
                raise FormatError(f"{self.where}: the model adds something before block {i}; this family is not known")
        return inputs[0], arguments

    def arguments(self, batch: int, length: int) -> list[dict[str, Any]]:
        """The arguments of every block for `batch` sequences of `length` tokens without padding."""
        return self.start(torch.zeros(batch, length, dtype=torch.int64), torch.zeros(1, self.config.hidden_size))[1]

    def block(self, index: int, read: Read) -> Block:
        """Block `index` with weights from `read`, in the dtype of the arithmetic."""
        prefix = self.found.family.block.format(index)
        module = copy.deepcopy(self._layers[index])
        module.eval()
        mine = [x for x in self.found.linears if x.block == index]
        biases = self.found.others.keys()
        slots = {}
        for linear in mine:
            bias = read(f"{linear.name}.bias") if f"{linear.name}.bias" in biases else None
            slot = Slot(torch.empty(0), None if bias is None else _plain(bias).to(self.dtype))
            slot.put(read(linear.tensor), self.dtype)
            slots[linear.name] = slot
        experts = None
        path = f"{prefix}mlp.experts."
        if any(name.startswith(path) for name in slots):
            members = {name.removeprefix(path): slot for name, slot in slots.items() if name.startswith(path)}
            experts = Experts(members, len(members) // 3)
            module.mlp.experts = experts  # type: ignore[union-attr]
        for name, slot in slots.items():
            if not name.startswith(path):
                owner, _, leaf = name.removeprefix(prefix).rpartition(".")
                setattr(module.get_submodule(owner), leaf, slot)
        for name, _ in list(module.named_parameters()):
            _set_parameter(module, name, _plain(read(prefix + name)).to(self.dtype))
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                raise FormatError(f"{self.where}: {prefix}{name} has no weight on disk; this family is not known")
        return Block(index, prefix, module, slots, experts, self.dtype)

    @torch.no_grad()
    def normed(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """The last norm over x [..., H]."""
        weight = _plain(read("model.norm.weight")).float()
        rows = x.float()
        eps = float(self.config.rms_norm_eps)
        return F.rms_norm(rows, weight.shape, None, eps).to(x.dtype) * weight.to(x.dtype)

    @torch.no_grad()
    def head(self, read: Read) -> torch.Tensor:
        """The output head [V, H] in the dtype of the arithmetic: its own weight, or the embedding when tied."""
        name = "model.embed_tokens.weight" if self.found.tied else "lm_head.weight"
        weight = read(name)
        return affine.dequantize(weight, self.dtype) if isinstance(weight, QuantTensor) else weight.to(self.dtype)


def check(config: Mapping[str, Any], found: Map, where: str) -> None:
    """Runs a small random model of the same architecture both ways; FormatError when the chain differs from its forward.

    The small model keeps every switch of the config (biases, norms, rope type, sliding windows, which blocks hold
    experts) and shrinks sizes only.
    """
    small = _shrunk(config)
    hf = hf_config(small, where)
    generator = torch.Generator().manual_seed(0)
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa").eval().float()
    state = _disk_names(model)
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    from . import walk

    tiny = walk.survey(small, shapes, {name: t.dtype for name, t in state.items()}, f"{where} (shrunk)")
    frame = Frame(small, tiny, torch.float32, where)
    ids = torch.randint(0, int(small["vocab_size"]), (2, 24), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    x, arguments = frame.start(ids, state["model.embed_tokens.weight"])
    for i in range(len(frame)):
        x = frame.block(i, state.__getitem__).forward(x, arguments[i])
    found_logits = F.linear(frame.normed(x, state.__getitem__), frame.head(state.__getitem__))
    worst = float((found_logits - expected).abs().max())
    if not worst <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise FormatError(
            f"{where}: block by block this architecture gives other logits than its own forward (off by {worst:.2g}); "
            "calibrated methods cannot take it with this version of transformers; rtn and hqq can"
        )


def _plain(tensor: torch.Tensor | QuantTensor) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def hf_config(config: Mapping[str, Any], where: str) -> Any:
    """transformers' own config object; never code from the checkpoint."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise RecipeError(
            "methods that calibrate run the model's blocks through transformers, which is not installed; "
            "pip install 'percard[quant]', or take --method rtn or hqq"
        ) from None
    plain = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    try:
        return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{where}/config.json: transformers does not take it ({error})") from None


def on_meta(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture at sizes that run in a moment."""
    layers = min(4, int(config["num_hidden_layers"]))
    dense = [i for i in config.get("mlp_only_layers") or [] if i < layers]
    heads = int(config["num_attention_heads"])
    kv = int(config.get("num_key_value_heads") or heads)
    small = dict(config) | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kv == heads else 2,
        "vocab_size": 128,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if small.get(key) is not None:
            small[key] = 0
    if config.get("head_dim"):
        small["head_dim"] = 16
    if config.get("layer_types"):
        small["layer_types"] = list(config["layer_types"])[:layers]
    if config.get("max_window_layers") is not None:
        small["max_window_layers"] = min(int(config["max_window_layers"]), layers)
    if config.get("moe_intermediate_size"):
        key = "num_local_experts" if config.get("num_experts") is None else "num_experts"
        small |= {"moe_intermediate_size": 32, key: 8, "num_experts_per_tok": 2, "mlp_only_layers": dense}
    small.pop("quantization_config", None)
    return small


def _disk_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model in memory under the names that checkpoints have."""
    return disk_names(model.state_dict(), bool(getattr(model.config, "tie_word_embeddings", False)))


def disk_names(held: Mapping[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Tensors of transformers' modules under the names that checkpoints have: experts one by one, no head that is tied."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            path = name.removesuffix("gate_up_proj")
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                state |= {f"{path}{e}.gate_proj.weight": gate, f"{path}{e}.up_proj.weight": up}
        elif name.endswith("mlp.experts.down_proj"):
            path = name.removesuffix("down_proj")
            state |= {f"{path}{e}.down_proj.weight": one for e, one in enumerate(tensor)}
        elif name != "lm_head.weight" or not tied:
            state[name] = tensor
    return state
