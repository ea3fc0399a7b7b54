"""llm-compressor's side of bench/llmcompressor.py: a script that runs in the rival's own environment and knows nothing of percard.

Commands come as JSON lines on stdin, one answer per line on stdout:

    {"do": "version"}                                                        -> {"llmcompressor": "0.14.0.1", ...}
    {"do": "quantize", "model": DIR, "out": DIR, "recipe": [["GPTQModifier", {...}], ...],
     "windows": F.jsonl or null, "threads": n, "pin": true}                   -> {"seconds": s, "phases": {...}, "warnings": [...]}

A modifier's `scheme` becomes the one config group of all Linear modules. `windows` holds lines {"ids": [...]}, all of one length;
they are given as tokens, in their order, so that both sides see the same. Everything else is llm-compressor's default:
the model in its own dtype, batches of one window, the sequential pipeline (one calibrating and one propagating pass per
block). `pin` false leaves out the one call that ends its AWQ on a machine without a card, `IntermediatesCache.pin_memory`, which
changes no number.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def modifiers(recipe: list[list[Any]]) -> list[Any]:
    """The modifier objects of a recipe: [class name, arguments] each."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    known = {c.__name__: c for c in (GPTQModifier, QuantizationModifier, AWQModifier, SmoothQuantModifier)}
    out = []
    for name, arguments in recipe:
        arguments = dict(arguments)
        scheme = arguments.pop("scheme", None)
        if scheme is not None:
            sides = {side: QuantizationArgs(**given) for side, given in scheme.items()}
            arguments["config_groups"] = {"group_0": QuantizationScheme(targets=["Linear"], **sides)}
        out.append(known[name](**arguments))
    return out


def quantize(
    model: str, out: str, recipe: list[list[Any]], windows: str | None, threads: int, pin: bool
) -> dict[str, Any]:
    """Runs oneshot and saves; seconds of loading, of oneshot itself, and of saving."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    if not pin:
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    warnings: list[str] = []
    seen = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    more: dict[str, Any] = {}
    if windows is not None:
        ids = [json.loads(line)["ids"] for line in Path(windows).read_text().splitlines()]
        more["dataset"] = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})
        more |= {"num_calibration_samples": len(ids), "max_seq_length": len(ids[0])}
        more["shuffle_calibration_samples"] = False
    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    begun = time.perf_counter()
    try:
        oneshot(model=loaded, recipe=modifiers(recipe), **more)
        done = time.perf_counter()
        loaded.save_pretrained(out, save_compressed=True)
    finally:
        logger.remove(seen)
    end = time.perf_counter()
    phases = {"load": begun - start, "oneshot": done - begun, "save": end - done}
    return {"seconds": end - start, "phases": phases, "warnings": list(dict.fromkeys(warnings))[:20]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints does not belong among the answers
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("do")
        try:
            if what == "version":
                answer: dict[str, Any] = {name: version(name) for name in PACKAGES}
                answer["python"] = platform.python_version()
            else:
                answer = quantize(**command)
        except Exception as error:  # the other side makes a row of it
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {text} ({Path(frame.filename).name}, in {frame.name})"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
