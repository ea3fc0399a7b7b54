"""The verbs that need more than one floor: quantise and verify with a text, generate, bench, demo.

`quant` and `bench` do not know each other; they meet at the checkpoint, and here. Everything in this file may be called
from Python as well: `percard.quantize(src, dst, "w4a16-g128")`, `percard.verify(dst, src, text=...)`, `percard.load(dir)`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .bench import engine, quality
from .console import DONE, GATE_RED
from .formats.spec import FormatError
from .quant import preflight as preflight_module
from .quant import quantize as quantize_module
from .quant import verify as verify_module
from .quant.progress import Callback
from .quant.recipe import Recipe, RecipeError
from .quant.report import Report, human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.engine import Model

load = engine.load
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights that are not read, so that a hub download does not fetch them.
_NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*", "onnx/*"]


def source(name: str | Path) -> Path:
    """The folder that `name` means: a path, or a hub id that huggingface_hub has or fetches.

    FormatError says in one line how to get it when it is neither here nor to be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FormatError(f"{name}: is a file; give the folder that holds config.json and the safetensors files")
    text = str(name)
    if not _HUB_ID.fullmatch(text):
        raise FormatError(f"{name}: no such folder; give a checkpoint folder, or a hub id such as Qwen/Qwen3-8B")
    by_hand = f"on a machine with network `hf download {text} --local-dir {text.split('/')[1]}`, then give that folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FormatError(
            f"{text}: no such folder here, and huggingface_hub, which would fetch it, is not installed; "
            f"pip install huggingface_hub, or {by_hand}"
        ) from None
    try:
        return Path(snapshot_download(text, ignore_patterns=_NOT_FETCHED, etag_timeout=10))
    except Exception as error:  # the hub client has many ways to fail; each means: not to be had
        why = " ".join(str(error).split())[:160]
        raise FormatError(
            f"{text}: no such folder here, and the hub did not give it ({type(error).__name__}: {why}); {by_hand}"
        ) from None


def recipe(
    spec: str | None = None,
    *,
    method: str = "rtn",
    calibration: str | Path | None = None,
    file: str | Path | None = None,
) -> Recipe:
    """The Recipe that flags or a file mean. RecipeError when both or neither say the spec."""
    if file is not None:
        if spec is not None:
            raise RecipeError(f"--spec {spec} and --recipe {file} both say what to do; keep one")
        return Recipe.load(file)
    if spec is None:
        raise RecipeError("--spec is missing; say one, such as w4a16-g128 or w8a8 (there is no default), or --recipe FILE")
    return Recipe.from_flags(spec=spec, method=method, calibration=calibration)


def preflight(src: str | Path, plan: Recipe, dst: Path | None = None) -> preflight_module.Preflight:
    """What quantising `src` by `plan` would do and need, from config and headers alone."""
    return preflight_module.check(source(src), plan, dst)


def quantize(
    src: str | Path,
    dst: str | Path,
    spec: str | None = None,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Callback | None = None,
) -> Report:
    """Checkpoint `src` (folder or hub id) to `dst` in `spec`, or as a Recipe says. FormatError, RecipeError for bad input."""
    plan = recipe if recipe is not None else Recipe.from_flags(spec=spec or "")
    return quantize_module.run(source(src), Path(dst), plan, force=force, progress=progress)


@dataclass(frozen=True)
class Verdict:
    """`report` of the bytes and weights; with a text also `quality` and its `gate` with reasons, else None and "none"."""

    report: Report
    quality: quality.Quality | None = None
    gate: str = "none"
    reasons: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return GATE_RED if "red" in (self.report.status, self.gate) else DONE

    def to_dict(self) -> dict[str, Any]:
        tree = self.report.to_dict()
        if self.quality is not None:
            tree["quality"] = {"gate": self.gate, "reasons": list(self.reasons), **asdict(self.quality)}
            tree["status"] = "red" if self.exit_code else "green"
        return tree

    def show(self) -> list[RenderableType]:
        lines = show_report(self.report)
        if self.quality is not None:
            q = self.quality
            lines.append(f"KL {q.kl:.5f}   top-1 {q.top1:.2%}   perplexity {q.perplexity:.3f} (source {q.perplexity_reference:.3f})")
            lines.append(q.protocol)
            lines.append(_verdict("gate", self.gate, "; ".join(self.reasons)))
        return lines


def verify(
    dst: str | Path,
    src: str | Path,
    *,
    level: str = "weights",
    text: str | Path | None = None,
    progress: Callback | None = None,
) -> Verdict:
    """Re-opens `dst` and compares it with `src`; with a UTF-8 `text` also KL and top-1 through the engine."""
    origin = source(src)
    report = verify_module.verify(Path(dst), origin, level=level, progress=progress)
    if text is None:
        return Verdict(report)
    ids = quality.read_ids(text, origin)
    reference, model = load(origin), load(dst)
    if model.spec is None:
        raise FormatError(f"{dst}: holds 16-bit weights, nothing to gate; give what `percard quantize` wrote")
    measured = quality.compare(reference, model, ids)
    word, reasons = quality.gate(measured, model.spec, quality.is_small(reference))
    return Verdict(report, measured, word, tuple(reasons))


def show_report(report: Report) -> list[RenderableType]:
    """A verb's Report in a few lines: what came out, how near it is, what to look at."""
    specs: dict[str, list[float]] = {}
    for module in report.modules:
        specs.setdefault(module.spec, []).extend([] if module.sqnr is None else [module.sqnr])
    lines: list[RenderableType] = []
    for spec, found in specs.items():
        count = sum(1 for m in report.modules if m.spec == spec)
        near = f"SQNR {min(found):.1f} dB at worst, {sorted(found)[len(found) // 2]:.1f} dB median" if found else ""
        lines.append(f"{count} modules in {spec}   {near}")
    before, after = report.bytes.get("source"), report.bytes.get("output")
    if before and after:
        lines.append(f"{human(before)} -> {human(after)} ({after / before:.0%}), {sum(report.seconds.values()):.1f} s")
    lines += [Text(text, "red") for text in (*report.failures, *report.flags)]
    lines += [Text(text, "yellow") for text in report.warnings]
    lines.append(_verdict(f"{report.output}: checked ({report.level}),", report.status))
    return lines


def _verdict(subject: str, word: str, why: str = "") -> Text:
    style = f"bold {word}" if word in ("green", "red") else "bold"
    return Text.assemble(subject, " ", (word, style), f" ({why})" if why else "")


@dataclass(frozen=True)
class Completion:
    """What a model added to `prompt`; `tokens` new ones in `seconds`, prefill included."""

    prompt: str
    text: str
    tokens: int
    seconds: float
    spec: str

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
) -> Completion:
    """`prompt` completed by the checkpoint in `path`, FP16 or quantised."""
    folder = source(path)
    return complete(load(folder), folder, prompt, max_new=max_new, temperature=temperature, top_p=top_p, seed=seed)


def complete(model: Model, folder: Path, prompt: str, *, max_new: int = 64, **sampling: Any) -> Completion:
    """`prompt` completed by a loaded model, with the tokenizer of `folder`; `sampling` as in Model.generate."""
    from tokenizers import Tokenizer

    vocabulary = folder / "tokenizer.json"
    if not vocabulary.is_file():
        raise FormatError(f"{vocabulary}: not there; text needs the model's tokenizer, copy it from the source")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise FormatError("--prompt is empty; give at least one character to go on from")
    room = model.max_len - len(ids)
    if room < 1:
        raise FormatError(f"--prompt has {len(ids)} tokens, this model takes {model.max_len}; shorten it")
    stop = {*model.config.eos, *_stop_ids(folder)}
    start = time.perf_counter()
    (new,) = model.generate([ids], min(max_new, room), stop=sorted(stop), **sampling)
    seconds = time.perf_counter() - start
    # Decoded with the prompt and cut, because a tokenizer may join bytes or spaces across the border.
    before, whole = tokenizer.decode(ids), tokenizer.decode(ids + new)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)
    return Completion(prompt, text, len(new), seconds, str(model.spec or str(model.dtype).removeprefix("torch.")))


def _stop_ids(folder: Path) -> Sequence[int]:
    """End-of-text ids of generation_config.json, which chat models extend beyond config.json's."""
    try:
        value = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return ()
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int)]
