"""Student and teacher as modules: transformers' own models, the loss inside the student's forward, FSDP2 around blocks.

The loss is a part of the student's forward because the head's weight is whole only there when FSDP2 splits it. Never code from a
checkpoint: transformers knows the family, or the plan has refused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..formats.spec import FormatError
from .distill_losses import Dense, Objective, Target, TopK, distill_objective, hidden_loss
from .distill_processes import Processes


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows ids int64 [B, T]; counted bool [B, T]: whether position t, which predicts token t + 1, is trained on.

    kept: the teacher's top-k of each position as [B * T, k] and [B * T], where a capture stands in for the teacher.
    """

    ids: torch.Tensor
    counted: torch.Tensor
    kept: TopK | None = None

    def rows(self, index: slice) -> Batch:
        """Some of the windows."""
        length = self.ids.shape[1]
        flat = slice(*(None if n is None else n * length for n in (index.start, index.stop)))
        return Batch(self.ids[index], self.counted[index], None if self.kept is None else self.kept.rows(flat))

    def to(self, device: torch.device) -> Batch:
        kept = self.kept
        if kept is not None:
            kept = TopK(kept.ids.to(device), kept.logp.to(device), kept.log_rest.to(device))
        return Batch(self.ids.to(device), self.counted.to(device), kept)


@dataclass(frozen=True)
class Hidden:
    """A loss on hidden states: kind mse or cosine, pairs (block of the student, block of the teacher), its weight."""

    kind: str
    pairs: tuple[tuple[int, int], ...]
    weight: float = 1.0


class _Listener:
    """Keeps the outputs of listed blocks of one forward pass; deaf when activations are computed again for backward."""

    def __init__(self, layers: nn.ModuleList, blocks: Sequence[int]) -> None:
        self.heard: dict[int, torch.Tensor] | None = None
        self.blocks = tuple(blocks)
        for block in sorted(set(self.blocks)):
            layers[block].register_forward_hook(lambda m, x, y, block=block: self._hear(block, y))

    def _hear(self, block: int, y: Any) -> None:
        if self.heard is not None:
            self.heard[block] = y[0] if isinstance(y, tuple) else y

    def take(self) -> list[torch.Tensor]:
        """What was heard, in the order of `blocks`; deaf from now on."""
        heard, self.heard = self.heard or {}, None
        return [heard[block] for block in self.blocks]


class Teacher(nn.Module):
    """ids -> (hidden states [B, T, H] before the head, outputs of listed blocks); no gradients."""

    def __init__(self, model: Any, blocks: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.eval().requires_grad_(False), dtype
        self.listener = _Listener(layers_of(model), blocks)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self.listener.heard = {}
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return x, self.listener.take()

    @property
    def head(self) -> torch.Tensor:
        """[V, H]; whole after a forward, whether FSDP2 splits it or not."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight


class Student(nn.Module):
    """A batch and what the teacher says about it -> (loss [], parts fp32 [3]: divergence, cross-entropy, hidden)."""

    def __init__(
        self, model: Any, objective: Objective, hidden: Hidden | None, vocab: int, dtype: torch.dtype, wide: int
    ) -> None:
        """wide: channels of the teacher; where the student has others, each listed block gets a projection in fp32."""
        super().__init__()
        self.model, self.objective, self.hidden, self.vocab, self.dtype = model, objective, hidden, vocab, dtype
        pairs = hidden.pairs if hidden is not None else ()
        self.listener = _Listener(layers_of(model), [ours for ours, _ in pairs])
        narrow = int(model.config.hidden_size)
        self.projections = nn.ModuleList()
        if narrow != wide:
            generator = torch.Generator().manual_seed(0)
            for _ in pairs:
                projection = nn.Linear(narrow, wide, bias=False)
                with torch.no_grad():
                    projection.weight.normal_(0.0, narrow**-0.5, generator=generator)
                self.projections.append(projection)

    def forward(
        self, batch: Batch, target: Target, theirs: Sequence[torch.Tensor], total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """total: counted positions of the whole batch, over all processes and parts."""
        self.listener.heard = {} if self.hidden is not None else None
        ids, counted = batch.ids, batch.counted
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)  # the last one is never counted
            loss, parts = distill_objective(
                x.flatten(0, 1),
                self.model.get_output_embeddings().weight,
                target,
                labels.flatten(),
                counted.flatten(),
                self.objective,
                vocab=self.vocab,
                total=total,
                dtype=self.dtype,
            )
        off = loss.new_zeros(())
        if self.hidden is not None:
            ours = self.listener.take()
            if len(self.projections):
                ours = [p(h.float()) for p, h in zip(self.projections, ours, strict=True)]
            off = hidden_loss(self.hidden.kind, ours, theirs, counted, total)
            loss = loss + self.hidden.weight * off
        return loss, torch.cat([parts, off.detach()[None]])


def target_of(batch: Batch, teacher: Teacher | None) -> tuple[Target, list[torch.Tensor]]:
    """What the loss compares with, and the teacher's hidden states: from a capture, from a teacher, or nothing."""
    if batch.kept is not None:
        return batch.kept, []
    if teacher is None:
        return None, []
    x, heard = teacher(batch.ids)
    return Dense(x.flatten(0, 1), teacher.head), heard


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder blocks."""
    found: nn.ModuleList = model.base_model.layers
    return found


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A checkpoint as transformers loads it, on the CPU. FormatError when a weight is not in the files, or no number."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise FormatError("distilling runs models through transformers: pip install 'percard[quant]'") from None
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # what a verb says about its progress it says itself
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    model, found = loaded
    if found["missing_keys"]:
        raise FormatError(f"{folder}: transformers finds no weight for {sorted(found['missing_keys'])[0]}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FormatError(f"{folder}: tensor {name} holds NaN or Inf; repair the source or download it again")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise FormatError(f"{folder}: the head has a bias, which no loss here knows")
    return model


def spread(module: Student | Teacher, group: Processes, dtype: torch.dtype) -> None:
    """Moves a module to its device; with several processes each block, and the rest, become FSDP2 groups of their own.

    Parameters stay in their dtype (fp32 of the student), are gathered in `dtype` and reduced in fp32.
    """
    if group.mesh is None:
        module.to(group.device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers_of(module.model):
        fully_shard(layer, mesh=group.mesh, mp_policy=policy)
    # Not resharded after forward: the head is read again behind it.
    fully_shard(module, mesh=group.mesh, mp_policy=policy, reshard_after_forward=False)
    module.to(group.device)  # buffers
