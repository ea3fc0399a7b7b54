"""The slot's training stage: Qwen3-0.6B's shapes with random weights learn from themselves, in 16 bits and quantisation-aware.

    1  a checkpoint of random weights, a tokenizer of as many words, a text of random words: nothing is downloaded
    2  `percard quantize` rounds it to the spec (round to nearest)
    3  `percard distill`, as a user calls it: the 16-bit model, scales alone, weights of the spec (--qad); seconds a step, tokens a second

Speed only: what random weights learn says nothing. Each run is a process of its own, so starting it is not in its figure.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops
from .engine.config import SHAPES
from .stage import Cell

SPEC = "w4a16-g64"
RUNS: dict[str, list[str]] = {"16 bits": [], "scales only": ["--scales-only"], "weights": ["--qad", SPEC]}
_TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def slot_cells(device: str, seed: int) -> list[Cell]:
    """The one cell of the stage: full size on a card, a tiny model to try the run on a CPU."""
    on_card = device == "cuda"
    sizes = {"steps": 20, "batch": 8, "seq_len": 512} if on_card else {"steps": 3, "batch": 2, "seq_len": 16}
    given = {"shape": "qwen3-0.6b", "changes": {} if on_card else _TINY, **sizes}
    identity = {"task": "qad", **given, "spec": SPEC, "source": ops.source_hash("distill_loss")}
    row = {"case": f"{given['shape']}{'' if on_card else ' cut'}", "spec": SPEC}
    arguments = {**given, "device": device, "seed": seed}
    seconds = 90.0 if on_card else 60.0
    return [Cell(f"{row['case']} {SPEC}", f"{__name__}:cell", arguments, seconds, identity, row, kind="qad")]


def cell(
    shape: str, changes: dict[str, Any], steps: int, batch: int, seq_len: int, device: str, seed: int
) -> Iterator[dict[str, Any]]:
    """A row per run. RuntimeError with the last words of a command that fails."""
    with tempfile.TemporaryDirectory(prefix="percard-qad-") as name:
        folder = Path(name)
        model, text = folder / "model", folder / "text.txt"
        write_model(model, shape, changes, seed)
        words = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        drawn = random.Random(seed)
        # Whitespace parts words, so a word is a token; a window more than the steps read.
        lines = (" ".join(f"w{drawn.randrange(words)}" for _ in range(seq_len)) for _ in range((steps + 1) * batch))
        text.write_text("\n".join(lines), encoding="utf-8")
        teacher = shutil.copytree(model, folder / "teacher", copy_function=os.link)  # itself, under another name
        _percard("quantize", model, "--spec", SPEC, "--out", folder / "quantised")
        common = ["--data", text, "--steps", steps, "--batch", batch, "--seq-len", seq_len, "--device", device]
        rows = []
        for run, flags in RUNS.items():
            out = folder / run.replace(" ", "-")
            student = folder / "quantised" if flags else model
            _percard("distill", student, "--teacher", teacher, *common, *flags, "--every", steps, "--out", out)
            done = json.loads((out / ("qad.json" if flags else "distill.json")).read_text(encoding="utf-8"))
            spent = done["run"]
            rows.append(
                {"run": run, "tokens_per_s": spent["tokens_per_s"], "seconds": spent["seconds"], "steps": steps}
            )
            rows[-1] |= {"batch": batch, "seq_len": seq_len, "divergence": done["curve"][-1]["divergence"]}
            if run != list(RUNS)[-1]:
                yield {**rows[-1], "part": run, "status": "ok", "words": f"{spent['tokens_per_s']:.0f} tok/s"}
        share = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
        said = f"{rows[-1]['tokens_per_s']:.0f} tok/s, {share:.2f} of the 16-bit run's"
        yield {**rows[-1], "status": "ok", "words": said}


def write_model(folder: Path, shape: str, changes: dict[str, Any], seed: int) -> None:
    """A model of a shape with random weights in bf16, as transformers starts one, and a tokenizer of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((SHAPES / f"{shape}.json").read_text(encoding="utf-8")) | changes
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(settings["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def _percard(*words: Any) -> None:
    """Runs `percard WORDS` in a process of its own, which ends with this one: it is of the same group."""
    command: Sequence[str] = [str(word) for word in words]
    package = (__package__ or "").partition(".")[0]
    quiet = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", package, *command, "--json"], capture_output=True, text=True, env=quiet, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-600:]
        raise RuntimeError(f"percard {shlex.join(command)} ended with {done.returncode}: {said}")
