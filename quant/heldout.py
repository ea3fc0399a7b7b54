"""The held-out text that a model is judged on: read as the bench's gate reads it, and never the calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.spec import FormatError
from . import sources
from . import text as texts

SAME = 0.25  # share of a text from which on it is called the calibration text itself
_NOTED = 0.05  # and from which on the report says so; less happens by chance: licences, blank lines


@dataclass(frozen=True, eq=False)
class HeldOut:
    """ids int64 [n] of a file, its name, the sha256 of its bytes; `pieces`: windows of `window` tokens, no overlap."""

    ids: torch.Tensor
    window: int
    name: str
    sha256: str

    @property
    def pieces(self) -> list[torch.Tensor]:
        """The last one may be shorter; one token alone has nothing to score and is left out."""
        return [piece for piece in self.ids.split(self.window) if len(piece) > 1]


def read(path: str | Path, model_dir: Path, vocabulary: int, window: int, tokens: int | None = None) -> HeldOut:
    """The first `tokens` ids of a text file or a *.jsonl (text.py says what lines hold); None = all.

    FormatError for a file that cannot be read, for ids that the model does not know, for fewer than 2 tokens.
    """
    try:
        source = sources.open_source(str(path))
    except FormatError as error:
        raise FormatError(str(error).replace("calibration file", "held-out text")) from None
    encoder, tally = texts.Encoder(model_dir, vocabulary), texts.Tally()
    for document in source.documents():
        tally.add(encoder.encode(document, tally), document.more)
        if tokens is not None and tally.total >= tokens:
            break
    ids: Any = tally.cut(tally.total if tokens is None else tokens) if tally.parts else []
    if len(ids) < 2:
        raise FormatError(f"{path}: {len(ids)} tokens; at least 2 are needed to score one, give a longer text")
    return HeldOut(torch.as_tensor(ids, dtype=torch.int64), window, Path(path).name, str(source.digest()["sha256"]))


def compare(
    text: HeldOut, calibration: Mapping[str, Any], ids: torch.Tensor | None, model_dir: Path
) -> tuple[str, str]:
    """(flag, warning), each "" when there is nothing to say: whether the text was calibrated on.

    calibration: what the report says about it, empty = nothing was. ids: its windows [n, T]; None = they are read again
    from where the report says they came from, if that is still there.
    """
    if not calibration:
        return "", ""
    if calibration.get("sha256") == text.sha256:
        return _flag(text, "its sha256 is that of the calibration file"), ""
    if ids is None:
        ids = _again(calibration, model_dir)
        if ids is None:
            return "", (
                f"{text.name}: whether parts of it were calibrated on could not be seen, only that it is another file: "
                f"{calibration.get('source')} is not here any more"
            )
    share = texts.overlap(text.ids, ids)
    if share >= SAME:
        return _flag(text, f"{share:.0%} of it occur in the calibration windows"), ""
    if share >= _NOTED:
        return "", f"{text.name}: {share:.0%} of it occur in the calibration windows; the figures flatter by that much"
    return "", ""


def _flag(text: HeldOut, why: str) -> str:
    return f"{text.name}: the text is the calibration text ({why}); give one that was not calibrated on"


def _again(calibration: Mapping[str, Any], model_dir: Path) -> torch.Tensor | None:
    """The calibration windows, read again; None when the text is gone or is another one now."""
    try:
        source = str(calibration["source"])
        wanted = texts.Calibration(
            None if source == "built-in" else source,
            int(calibration["windows_used"]),
            int(calibration["window"]),
            int(calibration["seed"]),
        )
        if source.startswith("hf:"):
            return None
        found = texts.windows(wanted, model_dir, 1 << 62, None)
    except (FormatError, KeyError, TypeError, ValueError):
        return None
    return found.ids if found.facts["sha256"] == calibration.get("sha256") else None
