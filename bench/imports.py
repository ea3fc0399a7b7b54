"""Results of other programs as Records, so that one report holds both: vLLM, SGLang, llama.cpp.

    vllm-serve    vllm bench serve --save-result [--save-detailed]      one JSON object, or one a line (--append-result)
    sglang        python -m sglang.bench_serving --output-file FILE     one JSON object a line
    llama-bench   llama-bench -o json | jsonl                           an array, or one object a line

Fields: vllm-project/vllm vllm/benchmarks/serve.py, sgl-project/sglang python/sglang/bench_serving.py, ggml-org/llama.cpp
tools/llama-bench. Milliseconds become seconds. What a file does not say stays null: quality above all.

TPOT here is (end - first token) / (tokens - 1). Both serving benches say the same of theirs; where a file's own end-to-end
times show that the first token was counted in, the row is refused, or converted when the caller asks for it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError
from . import card_table, clock, money, record
from .record import Record

Row = Mapping[str, Any]
QUANTILES = ("p50", "p90", "p99")
_FORMS = {
    "vllm-serve": "`vllm bench serve --save-result`",
    "sglang": "`python -m sglang.bench_serving --output-file`",
    "llama-bench": "`llama-bench -o json` or `-o jsonl`",
}
_MARKS = {"vllm-serve": "total_token_throughput", "sglang": "mean_e2e_latency_ms", "llama-bench": "avg_ns"}


@dataclass(frozen=True)
class Said:
    """What the user says of a file, since the file does not: None = nobody knows. `spec` and `kv` are percard's names where
    the scheme is one of them, else any words; `card` an id of cards.json; `mix` names the requests."""

    model: str | None = None
    spec: str | None = None
    kv: str | None = None
    card: str | None = None
    cards: int | None = None
    mix: str | None = None
    tpot_includes_first: bool = False
    usd_hour: float | None = None


def load(
    tool: str,
    path: str | Path,
    said: Said | None = None,
    *,
    say: Callable[[str], None] = lambda words: None,
    command: str = "",
) -> list[Record]:
    """The Records in a result file of `tool`; `say` hears what was left out. FormatError names the file, the row, the field."""
    if tool not in TOOLS:
        raise FormatError(f"no result files of {tool!r} are read; known: {', '.join(TOOLS)}")
    said, make = said or Said(), TOOLS[tool]
    shared = {"code": record.code_section(command)} | _card(said)
    found = []
    for number, row in enumerate(_objects(Path(path), tool), 1):
        reader = _Reader(row, f"{path}: row {number}", _FORMS[tool])
        sections = make(reader, said, say)
        if not sections:
            continue
        if unread := reader.unread():
            say(f"{reader.where}: not read: {', '.join(unread)}")
        parts = {name: sections.get(name) for name in ("source", "case", "shape", "scheme", "model", "card", "cpu")}
        key = record.cell_key(**parts, ts=sections.get("ts"))
        merged = {**shared, **sections, "card": {**sections.get("card", {}), **shared["card"]}}
        found.append(Record(cell_key=key, **merged))
    if not found:
        raise FormatError(f"{path}: holds nothing that can be imported; expected the file of {_FORMS[tool]}")
    return found


class _Reader:
    """One object of a file. Every field that is asked for counts as read."""

    def __init__(self, row: Row, where: str, form: str) -> None:
        self._row, self.where, self._form = row, where, form
        self._asked: set[str] = set()

    def number(self, key: str) -> float | None:
        """A finite number, or None where the file has none."""
        self._asked.add(key)
        value = self._row.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{self.where}: {key} is {value!r}; expected a number, as {self._form} writes it")
        return float(value) if math.isfinite(value) else None

    def needed(self, key: str) -> float:
        """A number that must be there and above 0."""
        value = self.number(key)
        if value is None or value <= 0:
            said = "missing" if key not in self._row else f"{self._row[key]!r}"
            raise FormatError(f"{self.where}: {key} is {said}; expected a number above 0, as {self._form} writes it")
        return value

    def text(self, *keys: str) -> str | None:
        """The first of these that is a text and not empty."""
        self._asked.update(keys)
        return next((self._row[key] for key in keys if isinstance(self._row.get(key), str) and self._row[key]), None)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; [] where there is none."""
        self._asked.add(key)
        value = self._row.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, int | float) for v in value):
            raise FormatError(f"{self.where}: {key} is no list of numbers; expected what {self._form} writes")
        return [float(v) for v in value]

    def any(self, key: str) -> Any:
        """Whatever stands there."""
        self._asked.add(key)
        return self._row.get(key)

    def ignore(self, *keys: str) -> None:
        """Fields that are known and say nothing that a Record holds."""
        self._asked.update(keys)

    def unread(self) -> list[str]:
        """Fields that nobody asked for."""
        return sorted(set(self._row) - self._asked)


def _objects(path: Path, tool: str) -> list[Row]:
    """The JSON objects of a file: one, an array of them, or one a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not text; expected the file of {_FORMS[tool]}") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = [_line(line, f"{path}:{n}", tool) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = found if isinstance(found, list) else [found]
    for number, row in enumerate(found, 1):
        if not isinstance(row, Mapping):
            raise FormatError(f"{path}: row {number} is no object; expected the file of {_FORMS[tool]}")
        if _MARKS[tool] not in row:
            other = next((name for name, mark in _MARKS.items() if mark in row), None)
            hint = f"; it looks like one of {other}" if other else ""
            raise FormatError(f"{path}: row {number} has no {_MARKS[tool]}; expected the file of {_FORMS[tool]}{hint}")
    return found


def _line(line: str, where: str, tool: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: not JSON; expected the file of {_FORMS[tool]}, whole") from None


def _vllm(row: _Reader, said: Said, say: Callable[[str], None]) -> dict[str, Any]:
    row.ignore("backend", "endpoint_type", "label", "tokenizer_id", "burstiness", "total_token_throughput", "date")
    row.ignore("errors", "generated_texts", "start_times", "queue_times", "max_output_tokens_per_s", "rtfx")
    row.ignore("max_concurrent_requests", *(f"std_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")))
    seconds = row.needed("duration")
    rate_in = row.needed("total_input_tokens") / seconds
    sections = _served(row, said, say, row.text("model_id"), said.mix or "vllm", "e2el", rate_in)
    sections["tokens"]["goodput"] = row.number("request_goodput")
    return sections | {"source": "vllm", "body": {"impl": "vllm"}} | _moment(row.text("date"))


def _sglang(row: _Reader, said: Said, say: Callable[[str], None]) -> dict[str, Any]:
    server = row.any("server_info")
    server = server if isinstance(server, Mapping) else {}
    row.ignore("tag", "backend", "sharegpt_output_len", "random_input_len", "random_output_len", "random_range_ratio")
    row.ignore(
        "total_input_text_tokens", "total_input_vision_tokens", "total_output_tokens_retokenized", "accept_length"
    )
    row.ignore("total_throughput", "max_output_tokens_per_s", "max_concurrent_requests", "concurrency", "p95_itl_ms")
    row.ignore("errors", "generated_texts", *(f"std_{n}_ms" for n in ("ttft", "tpot", "itl", "e2e_latency")))
    name = server.get("model_path")
    mix = said.mix or row.text("dataset_name") or "sglang"
    rate_in = row.needed("input_throughput")
    sections = _served(row, said, say, name if isinstance(name, str) else None, mix, "e2e_latency", rate_in)
    if isinstance(server.get("tp_size"), int):
        sections["model"]["tp"] = server["tp_size"]
    return sections | {"source": "sglang", "body": {"impl": "sglang"}}


def _served(
    row: _Reader, said: Said, say: Callable[[str], None], name: str | None, mix: str, e2e: str, rate_in: float
) -> dict[str, Any]:
    """What both serving benches write, under the same names but for the end-to-end time."""
    model = _model(said.model or name, row.where)
    done, seconds = row.needed("completed"), row.needed("duration")
    isl, osl = row.needed("total_input_tokens") / done, row.needed("total_output_tokens") / done
    if failed := row.number("failed"):
        say(f"{row.where}: {failed:g} requests failed; rates are those of the {done:g} that completed")
    most, asked = row.number("max_concurrency"), row.any("request_rate")
    rate = asked if isinstance(asked, int | float) and math.isfinite(asked) else "inf" if asked is not None else None
    load = {"mix": mix, "rate": rate, "seed": None, "requests": row.number("num_prompts") or done}
    times = {
        short: _times(row, word) for short, word in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", e2e))
    }
    times["tpot"] = _tpot(row, said, times, osl, e2e, say)
    rate_out = row.needed("output_throughput")
    per_token = (times["tpot"] or {}).get("p50")
    price = None
    if said.usd_hour is not None:
        price = money.section(said.usd_hour, cards=said.cards or 1)
        each = {
            "in": None,
            "out": None,
            "total": money.usd_per_mtok(said.usd_hour, rate_in + rate_out, said.cards or 1),
        }
        price = {**(price or {}), "usd_per_mtok": each}
    return {
        "level": "serve",
        "case": f"{_short(model)}.serve.{mix}.{f'b{most:g}' if most else f'rate{rate}'}",
        "seconds": seconds,
        "model": {"id": model, "weights": "real", "tp": None},
        "shape": {"batch": most, "isl": isl, "osl": osl, "load": load},
        "scheme": {"spec": said.spec, "kv_spec": said.kv},
        "clock": {"mode": "wall", "rounds": 1},
        "tokens": {
            "tok_s": rate_out,
            "tok_s_in": rate_in,
            "tok_s_per_card": rate_out / said.cards if said.cards else None,
            "tok_s_per_user": 1 / per_token if per_token else None,
            "req_s": row.number("request_throughput"),
            "concurrency": most,
            **{f"{short}_s": value for short, value in times.items()},
        },
        "money": price,
        "quality": {"gate": "none", "reasons": ["imported: quality was not measured beside this speed"]},
    }


def _times(row: _Reader, word: str) -> dict[str, float | None] | None:
    """{p50, p90, p99} in seconds of a time that the file has in milliseconds; None where it has none of them."""
    row.ignore(f"mean_{word}_ms")
    found = {name: row.number(f"{name}_{word}_ms") for name in QUANTILES}
    found["p50"] = row.number(f"median_{word}_ms") if found["p50"] is None else found["p50"]
    if all(value is None for value in found.values()):
        return None
    return {name: None if value is None else value / 1e3 for name, value in found.items()}


def _tpot(
    row: _Reader, said: Said, times: Mapping[str, Any], osl: float, e2e: str, say: Callable[[str], None]
) -> dict[str, float | None] | None:
    """TPOT without the first token: counted from single requests where the file has them, else as it stands, after a check
    of its definition against the end-to-end time."""
    counts, waits = row.numbers("output_lens"), row.any("itls")
    row.ignore("ttfts", "latencies", "input_lens")
    if isinstance(waits, list) and len(waits) == len(counts) and all(isinstance(w, list) for w in waits):
        exact = sorted(sum(w) / (n - 1) for w, n in zip(waits, counts, strict=True) if n > 1 and w)
        if exact:
            return {name: clock.quantile(exact, float(name[1:]) / 100) for name in QUANTILES}
    mean, first, end = (row.number(f"mean_{word}_ms") for word in ("tpot", "ttft", e2e))
    if times["tpot"] is None:
        return None
    if said.tpot_includes_first:
        median, start = times["tpot"]["p50"], (times["ttft"] or {}).get("p50")
        if median is None or start is None or osl <= 1:
            raise FormatError(
                f"{row.where}: TPOT cannot be converted without median_tpot_ms, median_ttft_ms and two tokens"
            )
        say(
            f"{row.where}: TPOT converted at the medians; p90 and p99 of a sum are not those of its parts and stay null"
        )
        return {"p50": max(0.0, (median * osl - start) / (osl - 1)), "p90": None, "p99": None}
    if mean is not None and first is not None and end is not None and osl > 1:
        without, with_first = (end - first) / (osl - 1), end / osl
        if abs(mean - with_first) < abs(mean - without) / 4 and abs(with_first - without) > 0.02 * without:
            raise FormatError(
                f"{row.where}: mean_tpot_ms {mean:.2f} counts the first token in (end-to-end / tokens is {with_first:.2f}, "
                f"without the first {without:.2f}); --tpot-includes-first converts it"
            )
    return times["tpot"]


def _llama(row: _Reader, said: Said, say: Callable[[str], None]) -> dict[str, Any]:
    row.ignore("avg_ns", "stddev_ns", "stddev_ts", "build_number", "n_batch", "n_ubatch", "model_n_params", "cpu_mask")
    row.ignore("cpu_strict", "poll", "n_cpu_moe", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices")
    row.ignore("tensor_split", "tensor_buft_overrides", "use_mmap", "use_direct_io", "embeddings", "no_op_offload")
    row.ignore("no_host", "repack", "fit_target", "fit_min_ctx", "load_mode", "moe_cache", "n_gen_warmup", "samples_ts")
    row.ignore("n_gpu_layers")
    prompt, new, depth = (int(row.number(key) or 0) for key in ("n_prompt", "n_gen", "n_depth"))
    if (prompt > 0) == (new > 0):
        say(f"{row.where}: {prompt} prompt and {new} new tokens: neither prefill nor decode alone, left out")
        return {}
    name = row.text("model_filename")
    model = _model(said.model or (Path(name).name.removesuffix(".gguf") if name else None), row.where)
    per_call = 1 if new else prompt  # a sample of a decode is one step, as in the records of bench model
    samples = [ns / 1e3 / (new or 1) for ns in row.numbers("samples_ns")]
    rate = per_call / statistics.median(samples) * 1e6 if samples else row.needed("avg_ts")
    row.ignore("avg_ts")
    kv = [{"f16": "fp16", "f32": "fp32"}.get(t, t) for t in (row.text("type_k"), row.text("type_v")) if t]
    size, count = row.number("model_size"), row.number("model_n_params")
    gpus = [gpu.strip() for gpu in (row.text("gpu_info") or "").split(",") if gpu.strip()]
    backends, commit = row.text("backends"), row.text("build_commit")
    on_cpu = not gpus or row.number("n_gpu_layers") == 0
    cards = said.cards or (None if on_cpu else len(gpus))
    threads, chip = row.number("n_threads"), row.text("cpu_info")
    phase = f"tg{new}.d{depth}" if new else f"pp{prompt}" + (f".d{depth}" if depth else "")
    latency = None
    if samples:
        taken = clock.Sample.of(samples)
        latency = {"median": taken.median, "lo": taken.lo, "hi": taken.hi, "iqr": taken.iqr, "samples": samples}
    return {
        "source": "llama-bench",
        "level": "model",
        "case": f"{_short(model)}.model.{phase}.b1",
        "model": {"id": model, "weights": "real"},
        "shape": {"batch": 1, "isl": prompt or depth, "osl": new, "kv_len": depth},
        "scheme": {
            "spec": said.spec,
            "kv_spec": said.kv or ("/".join(dict.fromkeys(kv)) or None),
            "weight_bits": round(8 * size / count, 3) if size and count else None,
            "format": row.text("model_type"),
        },
        "env": {"rivals": {"llama.cpp": commit}} if commit else {},
        "card": {} if on_cpu else {"name": gpus[0], "cards": cards},
        "cpu": {"model": chip, "threads": int(threads) if threads else None},
        "body": {"impl": f"llama.cpp {backends}" if backends else "llama.cpp"},
        "clock": {"mode": "wall", "rounds": len(samples) or None},
        "latency_us": latency,
        "tokens": {"tok_s" if new else "tok_s_in": rate, "tok_s_per_card": rate / cards if cards else None},
        "memory": {"weights": size},
        "quality": {"gate": "none", "reasons": ["imported: quality was not measured beside this speed"]},
    } | _moment(row.text("test_time"))


def _card(said: Said) -> dict[str, dict[str, Any]]:
    if said.card is None:
        return {"card": {"cards": said.cards} if said.cards else {}}
    found = card_table.find(said.card, card_table.cards())
    return {"card": {"spec_id": found.id, "name": found.name, "cards": said.cards or 1}}


def _model(name: str | None, where: str) -> str:
    if not name:
        raise FormatError(f"{where}: does not name the model; give --model ID")
    return name


def _short(model: str) -> str:
    """Qwen/Qwen3-8B -> qwen3-8b: the name that cases begin with."""
    return model.rstrip("/").rpartition("/")[2].lower()


def _moment(text: str | None) -> dict[str, str]:
    """When it ran, as ISO-8601: vLLM writes 20250424-115809 in the time of its machine, llama-bench UTC already."""
    if text and len(text) == 15 and text[8] == "-" and (text[:8] + text[9:]).isdigit():
        return {"ts": f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[9:11]}:{text[11:13]}:{text[13:]}"}
    return {"ts": text} if text else {}


TOOLS: dict[str, Callable[[_Reader, Said, Callable[[str], None]], dict[str, Any]]] = {
    "vllm-serve": _vllm,
    "sglang": _sglang,
    "llama-bench": _llama,
}


def append_new(out: str | Path, records: Sequence[Record]) -> int:
    """Appends the records whose cell is not in the file yet; how many those were."""
    path = Path(out)
    known = {row.cell_key for row in record.read(path)} if path.is_file() else set()
    fresh = [row for row in records if row.cell_key not in known]
    for row in fresh:
        record.append(path, row)
    return len(fresh)


def in_words(row: Record) -> str:
    """The figures of an imported row in a line, with what the file did not say."""
    tokens, parts = row.tokens or {}, []
    for key, words in (("tok_s", "tok/s out"), ("tok_s_in", "tok/s in"), ("tok_s_per_card", "tok/s per card")):
        if tokens.get(key) is not None:
            parts.append(f"{tokens[key]:.1f} {words}")
    for key, word in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "end to end")):
        found = tokens.get(key) or {}
        if any(value is not None for value in found.values()):
            shown = "/".join("-" if found.get(q) is None else f"{1e3 * found[q]:.1f}" for q in QUANTILES)
            parts.append(f"{word} {shown} ms (p50/p90/p99)")
    unsaid = [word for word, value in (("spec", row.scheme.get("spec")), ("card", row.card.get("name"))) if not value]
    on_cpu = unsaid[-1:] == ["card"] and row.cpu.get("model")
    missing = [word for word in unsaid if not (word == "card" and on_cpu)]
    return ", ".join(parts) + (f"; not stated: {', '.join(missing)}" if missing else "")
