"""A model folder's tokenizer as the bench uses it: text to ids, new ids to the text that they add, ids that end a text."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from ..formats.spec import FormatError


class Vocabulary:
    """The tokenizer.json of `folder`. FormatError when there is none."""

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer  # only who reads or writes text needs it

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FormatError(f"{path}: not there; text needs the model's tokenizer, copy it from the source")
        self._tokenizer = Tokenizer.from_file(str(path))

    def ids(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens (a BOS) that the tokenizer itself adds."""
        return self._tokenizer.encode(text).ids

    def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """What `new` ids add to the text of `ids`: decoded together and cut, since bytes or spaces may be joined across."""
        before, whole = self._tokenizer.decode(list(ids)), self._tokenizer.decode([*ids, *new])
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(list(new))

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """End-of-text ids of generation_config.json, which chat models extend beyond config.json's."""
        try:
            value = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(v for v in values if isinstance(v, int))
