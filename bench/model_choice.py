"""What `bench model --quick` and `--full` time: under two minutes, or everything there is to say about a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError
from . import card

EXAMPLE = Path("examples/tiny-qwen3")


@dataclass
class Choice:
    """Arguments of bench.model.run: `plan` are fields of a Plan."""

    source: str
    specs: list[str] = field(default_factory=list)
    text: Path | None = None
    plan: dict[str, Any] = field(default_factory=dict)


def of(size: str | None, source: str | None) -> Choice:
    """The choice of "quick", "full" or None for `source`, None = the quick one's own. FormatError when neither names one."""
    on_card = card.default_device().type == "cuda"
    if size == "quick":
        return _quick(source, on_card)
    if source is None:
        raise FormatError("no model was named; expected DIR or shape:NAME, or --quick")
    if size is None:
        return Choice(source)
    specs = ["w8a8", "w8a16", "w4a16-g128", "w4a8-g128"]
    ladder = (1, 4, 16, 64, 256) if on_card else (1, 4, 16)
    plan = {"batches": ladder, "kv": ("bf16", "int8", "k8v4", "int4"), "rounds": 7}
    return Choice(source, specs, plan=plan)


def _quick(source: str | None, on_card: bool) -> Choice:
    """A card: Qwen3-8B's shape, 8 layers. A CPU: the small trained model of the checkout, through its gate."""
    plan: dict[str, Any] = {"energy": False, "rounds": 3}
    if on_card:
        plan |= {"batches": (1, 16, 64)}
        if source is None:
            plan["layers"] = 8
        return Choice(source or "shape:qwen3-8b", ["w8a8", "w4a16-g128"], plan=plan)
    plan |= {"batches": (1, 4), "prompt": 128, "new": 16}
    if source is None and not (EXAMPLE / "config.json").is_file():
        raise FormatError(
            f"{EXAMPLE}: no checkpoint there; run --quick in a checkout of percard, or name DIR or shape:NAME"
        )
    return Choice(source or str(EXAMPLE), ["w8a8", "w4a16-g64"], EXAMPLE / "heldout.txt", plan)
