"""Which token an id stands for: the tokenizer.json of two folders compared token by token, not byte by byte.

Heads are padded to round sizes over the same tokens (Qwen2.5 has 151,936 or 152,064 rows for about 151.7 k tokens), and files of
one tokenizer differ in layout; so what counts is the string of each id up to the last one that has any.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..formats.spec import FormatError
from .sources import one_line

FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Words:
    """tokens[id] = its string, None for an id inside that no token has. `len` is the true vocabulary, without padding."""

    path: Path
    tokens: tuple[str | None, ...]

    @classmethod
    def of(cls, folder: str | Path) -> Words:
        """Of the tokenizer in a model folder; FormatError when there is none."""
        from tokenizers import Tokenizer

        path = Path(folder) / FILE
        if not path.is_file():
            raise FormatError(f"{path}: not there; it says which ids are tokens, copy it from the model's page")
        try:
            found = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{path}: not a tokenizer ({one_line(error)}); take the model's own") from None
        if not found:
            raise FormatError(f"{path}: a tokenizer without tokens; take the model's own")
        tokens: list[str | None] = [None] * (1 + max(found.values()))
        for token, index in found.items():
            tokens[index] = token
        return cls(path, tuple(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sha256(self) -> str:
        """Over id and string of every token."""
        digest = hashlib.sha256()
        for index, token in enumerate(self.tokens):
            if token is not None:
                data = token.encode("utf-8", "surrogatepass")
                digest.update(f"{index} {len(data)} ".encode() + data)
        return digest.hexdigest()

    def must_agree(self, other: Words) -> None:
        """FormatError that names the first id, up to the shorter of both, which means another token there."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                raise FormatError(
                    f"{other.path}: id {index} is {theirs!r}, in {self.path} it is {mine!r}; "
                    "teacher and student need one tokenizer"
                )
