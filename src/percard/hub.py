"""Where a checkpoint is: a folder, or a hub id that huggingface_hub has or fetches."""

from __future__ import annotations

import re
from pathlib import Path

from .formats.spec import FormatError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights that are not read, so that a hub download does not fetch them.
_NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "original/*",
    "onnx/*",
]


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
