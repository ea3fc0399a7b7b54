"""The methods that find codes for a weight: one visible table of pure functions on tensors.

Two kinds; a recipe holds any number of transforms and exactly one rounding per module:
- transform: the same function with other weights, `f(group, stats, spec, **options) -> Transform`;
- rounding: `f(weight fp32 [N, K], stats, spec, *, scale_dtype, **options) -> Rounded`.
A method opens no file, knows no module and asks for no device. The codes it finds are the codes on disk.
"""

from __future__ import annotations

from . import autoround as _autoround
from . import awq as _awq
from . import gptq as _gptq
from . import hqq as _hqq
from . import rotate as _rotate
from . import rtn as _rtn
from . import smoothquant as _smoothquant
from .records import Method, Option, Rounded

METHODS: dict[str, Method] = {
    "rtn": Method("rtn", "rounding", _rtn.rtn, _rtn.OPTIONS, by_rows=True, calibrated=False, serves=_rtn.serves),
    "hqq": Method("hqq", "rounding", _hqq.hqq, _hqq.OPTIONS, by_rows=True, calibrated=False, serves=_hqq.serves),
    "gptq": Method(
        "gptq",
        "rounding",
        _gptq.gptq,
        _gptq.OPTIONS,
        by_rows=False,
        calibrated=True,
        serves=_gptq.serves,
        prepare=_gptq.prepare,
        correct=_gptq.correct,
    ),
    "awq": Method("awq", "transform", _awq.awq, _awq.OPTIONS, by_rows=False, calibrated=True, serves=_awq.serves),
    "smoothquant": Method(
        "smoothquant",
        "transform",
        _smoothquant.smoothquant,
        _smoothquant.OPTIONS,
        by_rows=False,
        calibrated=True,
        serves=_smoothquant.serves,
    ),
    "rotate": Method(
        "rotate", "transform", _rotate.plan, _rotate.OPTIONS, by_rows=False, calibrated=False, serves=_rotate.serves
    ),
    "autoround": Method(
        "autoround",
        "rounding",
        _autoround.autoround,
        _autoround.OPTIONS,
        by_rows=False,
        calibrated=True,
        serves=_autoround.serves,
        remedy=_autoround.REMEDY,
        whole=True,
    ),
}

__all__ = ["METHODS", "Method", "Option", "Rounded"]
