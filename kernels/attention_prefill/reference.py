"""The meaning of attention_prefill, in plain torch: kernels/attention.py has it, decode and prefill mean the same."""

from __future__ import annotations

from typing import Any

from .. import attention
from ..attention import Outputs
from .contract import parts


def run(*flat: Any) -> Outputs:
    """A sequence after another; scores of one take n * Hq * S fp32 numbers of memory."""
    return attention.reference(*parts(*flat))
