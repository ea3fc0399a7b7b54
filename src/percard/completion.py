"""A prompt goes on: `percard generate`, and the answers that the demo shows side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import engine
from .bench.vocabulary import Vocabulary
from .formats.spec import FormatError
from .hub import source

if TYPE_CHECKING:
    from .bench.engine import Model


@dataclass(frozen=True)
class Completion:
    """What a model added to `prompt`; `tokens` new ones in `seconds`, prefill included. `kv`: how the cache held them."""

    prompt: str
    text: str
    tokens: int
    seconds: float
    spec: str
    kv: str = "bf16"

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    kv: str | None = None,
) -> Completion:
    """`prompt` completed by the checkpoint in `path`, FP16 or quantised, over a cache of spec `kv`."""
    folder = source(path)
    model = engine.load(folder, kv=kv)
    return complete(model, folder, prompt, max_new=max_new, temperature=temperature, top_p=top_p, seed=seed)


def complete(model: Model, folder: Path, prompt: str, *, max_new: int = 64, **sampling: Any) -> Completion:
    """`prompt` completed by a loaded model, with the tokenizer of `folder`; `sampling` as in Model.generate."""
    words = Vocabulary(folder)
    ids = words.ids(prompt)
    if not ids:
        raise FormatError("--prompt is empty; give at least one character to go on from")
    room = model.max_len - len(ids)
    if room < 1:
        raise FormatError(f"--prompt has {len(ids)} tokens, this model takes {model.max_len}; shorten it")
    stop = {*model.config.eos, *words.stops}
    start = time.perf_counter()
    (new,) = model.generate([ids], min(max_new, room), stop=sorted(stop), **sampling)
    seconds = time.perf_counter() - start
    text = words.continuation(ids, new)
    spec = str(model.spec or str(model.dtype).removeprefix("torch."))
    return Completion(prompt, text, len(new), seconds, spec, model.kv.name)
