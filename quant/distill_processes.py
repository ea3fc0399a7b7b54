"""One process, or those that torchrun started: who this one is, and the few words they exchange. FSDP2 does the rest."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..formats.spec import FormatError
from ..kernels import device as devices

# The first process may read a large text while the others wait for it.
PATIENCE = datetime.timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """This process is `rank` of `world`, on `device`; `mesh` is None for one process alone."""

    rank: int
    world: int
    device: torch.device
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether it is this one that writes files and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.mesh is not None:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on every one of them."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def told(self, value: Any) -> Any:
        """What the first process has, on every one of them."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def in_turn(self) -> Iterator[int]:
        """One process after another goes through the body, so that only one of them holds a whole model."""
        for turn in range(self.world):
            if turn == self.rank:
                yield turn
            self.wait()


@contextmanager
def processes(where: str | None = None) -> Iterator[Processes]:
    """The processes of this run; `where`: cpu or cuda, by default the card when there is one.

    FormatError when cuda is asked for and there is none, or fewer cards than processes; ConnectionError when one of them died.
    """
    world, rank, local = (
        int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    kind = where or ("cuda" if devices.has_card() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise FormatError(f"--device {kind}: expected cpu or cuda")
    if kind == "cuda" and local >= (devices.cards() if devices.has_card() else 0):
        raise FormatError(
            f"--device cuda: process {local} of this machine finds {devices.cards() if devices.has_card() else 0} cards; "
            "start as many processes as there are cards, or take --device cpu"
        )
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(rank, world, device, init_device_mesh(kind, (world,)))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        said = ConnectionError("another process of this run ended; see what it said, and start all of them again")
        for note in getattr(error, "__notes__", []):
            said.add_note(note)
        raise said from error
    finally:
        dist.destroy_process_group()
