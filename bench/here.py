"""Cells that are measured in this process: what the rows of ops share about the machine, and how one becomes a Record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..kernels.op import native_isa
from . import card, record, roof
from .cells import Cell, Say
from .record import Record


def identity(where: torch.device) -> dict[str, Any]:
    """What of this machine makes a measurement another one: the card or CPU, what drives it, instruction sets in use."""
    isa = native_isa() if where.type == "cpu" else None
    return roof.identity(where.type) | {"isa": isa, "torch_isa": card.torch_isa()}


class Here:
    """This machine. Its roofs are measured when the first cell runs, so that a run that has all cells costs nothing."""

    def __init__(self, where: torch.device, say: Say, command: str = "") -> None:
        self.where, self._say = where, say
        self._sections = card.fingerprint(where)
        self._code = record.code_section(command)
        self._machine = identity(where)

    @functools.cached_property
    def roofs(self) -> dict[str, Any]:
        """What roof.measure gives."""
        found = next(roof.measure(self.where.type))
        self._say(found["words"])
        return found

    def cell(
        self,
        name: str,
        measure: Callable[..., Iterator[dict[str, Any]]],
        arguments: Mapping[str, Any],
        about: Mapping[str, Any],
        source_hash: str,
        seconds: float,
    ) -> Cell:
        """`measure(**arguments, device=, roof=)` yields one row (sections of a Record), `about` is what is known before.

        The key is of the machine, the sources of the ops, `about` and `arguments`.
        """
        key = record.cell_key(machine=self._machine, op_source_hash=source_hash, about=about, arguments=arguments)
        given = {**self._sections, **about, "code": {**self._code, "op_source_hash": source_hash}}

        def run() -> Iterator[Record]:
            shared = self.roofs
            limits = shared["card"].get("roof") or {"copy_gbs": shared["cpu"].get("read_gbs")}
            for row in measure(**arguments, device=self.where.type, roof=limits):
                row.pop("words", None)
                row["clock"] = {**row.get("clock", {}), "noisy": shared["noisy"]}
                row["card"] = {**shared["card"], **row.get("card", {})}
                yield Record(**{**given, "cell_key": key, "env": shared["env"], "cpu": shared["cpu"], **row})

        return Cell(name, (key,), seconds, run, given)
