"""Writes task.jsonl: which word begins the next statement, and which goes on in it, in Python that the model never saw.

    python examples/tiny-qwen3/make_task.py

Questions come from heldout.txt, in its order: 160 with choices (the word that begins a line, after all that stands before),
and 40 to be answered exactly (what follows `for NAME`, `not`, `is` and the like on the same line).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIRST = ("return", "raise", "if", "for", "def", "try:", "else:", "self.")
CONTEXT = 240  # characters before the word


def main() -> None:
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    found: dict[str, list[dict[str, object]]] = {"choice": [], "exact": []}
    for match in re.finditer(r"^ +(?=([a-z]+[:.]?))", text, re.MULTILINE):
        if match[1] in FIRST and match.start() > CONTEXT:
            before = text[match.start() - CONTEXT : match.end()]
            choices = {"score": "choice", "choices": list(FIRST)}
            found["choice"].append({"prompt": before, "expected": match[1], **choices})
    for match in re.finditer(r"(?:\bfor \w+|\bis|\bimport \w+ as|\breturn|\bself)( \w+|\.\w+)", text):
        start = match.start(1)
        if start > CONTEXT and match[1] in (" in", " not", " None", " self", " True", " False", "._"):
            found["exact"].append({"prompt": text[start - CONTEXT : start], "expected": match[1].strip(), "max_new": 1})
    lines = []
    for kind, count in (("choice", 160), ("exact", 40)):
        step = len(found[kind]) / count  # evenly over the whole text
        lines += [found[kind][int(i * step)] for i in range(count)]
    (HERE / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
