"""What type each key of a Record's sections has, for the reader: a file that was edited or written by another program is
refused in a line that names the key, instead of failing later inside a table. null is allowed everywhere.

Keys without an entry are free: they are written and printed, nothing counts with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_number, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a number": _number,
    "a list of numbers": _numbers,
    "a text": lambda value: isinstance(value, str),
    "a list of texts": _texts,
    "true or false": lambda value: isinstance(value, bool),
    "an object": lambda value: isinstance(value, Mapping),
}

_BY_KIND: dict[str, dict[str, str]] = {
    "a number": {
        "card": "mem_mib power_cap_w cards noise_floor_pct",
        "cpu": "sockets threads l2_bytes l3_bytes read_gbs noise_floor_pct",
        "model": "layers_run layers tp pp ep",
        "shape": "M N K G H D T S P batch isl osl kv_len",
        "scheme": "weight_bits act_bits kv_bits",
        "clock": "rounds calls_per_sample copies",
        "latency_us": "median lo hi iqr p10 p90",
        "tokens": "tok_s tok_s_in tok_s_per_card tok_s_per_user req_s goodput concurrency",
        "roofline": "bytes flops mbu mfu pct_of_roof pct_of_spec",
        "energy": "energy_j avg_power_w idle_power_w j_per_out_token",
        "money": "usd_per_card_hour",
        "memory": "weights kv kv_bytes_per_token activations graphs peak free_for_kv max_tokens max_concurrency load_s",
        "quality": "ppl ppl_rel kl top1 length_ratio tokens",
        "against": "median lo hi ratio",
    },
    "a list of numbers": {"latency_us": "samples ci95", "against": "ci95"},
    "a text": {
        "error": "type message stage",
        "code": "percard git_sha op_source_hash config_source command",
        "env": "driver cuda torch triton python os",
        "card": "spec_id name uuid",
        "cpu": "model governor torch_isa",
        "model": "id weights config_hash weights_hash",
        "scheme": "spec kv_spec head format",
        "body": "impl isa dtype baseline_dtype baseline_probe attention_body",
        "clock": "mode l2 power",
        "roofline": "bound",
        "energy": "scope power_reason",
        "quality": "gate model protocol gate_key",
        "against": "impl version status reason",
    },
    "a list of texts": {"cpu": "isa", "clock": "noisy", "scheme": "notes", "quality": "reasons"},
    "true or false": {"code": "dirty", "cpu": "virtual", "clock": "drift", "energy": "power_valid"},
    "an object": {
        "env": "rivals env_vars",
        "card": "roof",
        "shape": "load bound",
        "tokens": "ttft_s tpot_s itl_s e2e_s vs_fp16",
        "money": "usd_per_mtok",
        "quality": "task",
    },
}
TYPES: dict[str, dict[str, str]] = {}  # section -> key -> kind
for _kind, _sections in _BY_KIND.items():
    for _section, _keys in _sections.items():
        TYPES.setdefault(_section, {}).update(dict.fromkeys(_keys.split(), _kind))


def fault(name: str, section: Any) -> str | None:
    """What is wrong with the types in a section, in words, or None."""
    if section is None:
        return None
    if not isinstance(section, Mapping):
        return f"{name} is {_shown(section)}; expected an object"
    for key, kind in TYPES.get(name, {}).items():
        value = section.get(key)
        if value is not None and not KINDS[kind](value):
            return f"{name}.{key} is {_shown(value)}; expected {kind}"
    return None


def ratio_fault(tokens: Mapping[str, Any] | None) -> str | None:
    """The same for the ratios inside tokens.vs_fp16: objects with a ratio (a number or null) and its interval."""
    for name, ratio in ((tokens or {}).get("vs_fp16") or {}).items():
        where = f"tokens.vs_fp16.{name}"
        if ratio is None:
            continue
        if not isinstance(ratio, Mapping):
            return f"{where} is {_shown(ratio)}; expected an object"
        for key, kind in (("ratio", "a number"), ("ci95", "a list of numbers")):
            if ratio.get(key) is not None and not KINDS[kind](ratio[key]):
                return f"{where}.{key} is {_shown(ratio[key])}; expected {kind}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
