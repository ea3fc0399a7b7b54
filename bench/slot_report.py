"""report.md, table.csv and report.html of a slot, written anew after every stage from the rows that are there; plots at its end.

Ratios are torch's bf16 over ours, so above 1 we are faster; each is of the same rounds. The stack of a model is the sum
of its four linears: one layer, weighted by time.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report_folder
from .folder import MANIFEST, archived, read_lines, replace, rows_of
from .record import Record

_OWN = ("report.md", "table.csv", "records.jsonl")  # what a slot's folder has in a form of its own
_LINEARS = ("qkv", "o", "gate_up", "down")
QAD = "qad.jsonl"
_COLUMNS = (
    "level", "case", "spec", "head", "impl", "M", "N", "K", "batch", "status", "gate", "median_us", "lo_us", "hi_us",
    "eager_us", "tok_s", "ratio", "ratio_lo", "ratio_hi", "baseline_us", "pct_of_roof", "mode", "l2", "card", "why",
)  # fmt: skip


def write(folder: Path) -> None:
    """Writes report.md, table.csv and report.html of the run in `folder`, with plots/ once it is no longer running."""
    rows = rows_of(folder)
    replace(folder / "report.md", markdown(folder, rows).encode())
    replace(folder / "table.csv", table_csv(rows).encode())
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    records = [Record.from_json(json.dumps(row), f"{folder}: {row['case']}") for row in rows]
    # Tables first, in a moment; plots take seconds that a running slot has better use for.
    page: dict[str, Any] = {"heading": f"Slot: {manifest['state']}", "keep": _OWN}
    report_folder.write(folder, records, plots=False, **page)
    if manifest["state"] != "running" and records:
        report_folder.write(folder, records, **page)


def markdown(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole report."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    parts = [_head(manifest, _side_rows(folder, "card.jsonl")), _stages(manifest)]
    parts += [_conformance(_side_rows(folder, "conformance.jsonl")), _compiled(_side_rows(folder, "inspect.jsonl"))]
    ops = [row for row in rows if row["level"] == "op"]
    linears = [row for row in ops if not _over_cache(row) and not _of_losses(row)]
    parts += [
        _stacks(linears),
        _ops(linears),
        _attention(ops),
        _losses(ops),
        _experts([row for row in rows if row["level"] == "layer"]),
    ]
    parts += [_models([row for row in rows if row["level"] == "model"]), _tuning(_side_rows(folder, "tuning.jsonl"))]
    parts.append(_trained(_side_rows(folder, QAD)))
    parts.append(_left_out(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def of_records(records: Sequence[Record]) -> str:
    """The op tables of records that are no slot's, for `percard bench ops`, `attention` and `distill`."""
    rows = [json.loads(record.to_json()) for record in records]
    linears = [row for row in rows if not _over_cache(row) and not _of_losses(row)]
    parts = (_stacks(linears), _ops(linears), _attention(rows), _losses(rows), _left_out(rows))
    return "\n\n".join(part for part in parts if part)


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Flat: a line per record, with its float baseline."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        base = _base(row) or {}
        shape, scheme, latency = (row.get(name) or {} for name in ("shape", "scheme", "latency_us"))
        tokens, versus = row.get("tokens") or {}, _versus(row)
        interval = versus.get("ci95") or base.get("ci95") or [None, None]
        writer.writerow(
            {
                "level": row["level"],
                "case": row["case"],
                "spec": scheme.get("spec"),
                "head": scheme.get("head"),
                "impl": (row.get("body") or {}).get("impl"),
                **{name: shape.get(name) for name in ("M", "N", "K", "batch")},
                "status": row["status"],
                "gate": (row.get("quality") or {}).get("gate"),
                **{f"{name}_us": latency.get(name) for name in ("median", "lo", "hi", "eager")},
                "tok_s": tokens.get("tok_s") or tokens.get("tok_s_in"),
                "ratio": versus.get("ratio") or base.get("ratio"),
                "ratio_lo": interval[0],
                "ratio_hi": interval[1],
                "baseline_us": base.get("median"),
                "pct_of_roof": (row.get("roofline") or {}).get("pct_of_roof"),
                **{name: (row.get("clock") or {}).get(name) for name in ("mode", "l2")},
                "card": (row.get("card") or {}).get("name"),
                "why": (row.get("error") or {}).get("message"),
            }
        )
    return out.getvalue()


def _side_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a stage's own file, from the file or from the archives; the last one per key."""
    lines = list(read_lines(folder / name))
    if not lines:
        for path in sorted(folder.glob("stage-*.tar.gz")):
            lines += archived(path, name)
    return list({row["cell_key"]: row for row in lines}.values())


def _head(manifest: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in manifest["machine"].items() if value is not None)
    calls = manifest["calls"]
    lines = [
        f"# Slot on {manifest['machine'].get('card') or manifest['machine'].get('cpu')}: {manifest['state']}",
        machine,
    ]
    lines.append(f"{len(calls)} call(s), the last of {calls[-1]['minutes']:g} minutes, begun {calls[-1]['started']}")
    code = manifest["about"].get("code") or {}
    lines.append(
        f"percard {code.get('percard')}, commit {code.get('git_sha')}{' with changes' if code.get('dirty') else ''}"
    )
    for row in measured:
        if row["status"] != "ok":
            lines.append(f"roofs: {_why(row)}")
            continue
        card, cpu = row.get("card") or {}, row.get("cpu") or {}
        roof = card.get("roof") or {"copy_gbs": cpu.get("read_gbs")}
        told = ", ".join(f"{name} {value:.0f}" for name, value in roof.items() if value)
        floor = card.get("noise_floor_pct", cpu.get("noise_floor_pct"))
        lines.append(f"roofs measured here (GB/s, 1e12/s): {told}; noise floor {_number(floor, 1)} %")
        lines += [f"noisy: {why}" for why in row.get("noisy") or ()]
        if len({r.get("card", {}).get("uuid") for r in measured}) > 1:
            lines.append(f"card uuid {card.get('uuid')}")
    if manifest.get("report_error"):
        lines.append(f"an earlier report could not be written: {manifest['report_error']}")
    return lines[0] + "\n\n" + "  \n".join(lines[1:])


def _stages(manifest: Mapping[str, Any]) -> str:
    body = [
        [
            s["name"],
            s["state"],
            _number(s["seconds"], 1),
            ", ".join(f"{n} {w}" for w, n in s["cells"].items() if n),
            s["note"],
        ]
        for s in sorted(manifest["stages"], key=lambda s: s["number"])
    ]
    return "## Stages\n\n" + _table(["stage", "state", "s", "cells", "note"], body)


def _conformance(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.get("op", ""), row.get("impl", "")), []).append(row)
    body = []
    for (op, impl), members in groups.items():
        red = [row for row in members if (row.get("quality") or {}).get("gate") == "red" or row["status"] == "failed"]
        words = [sum(row["status"] == word for row in members) for word in ("ok", "refused", "cut")]
        body.append([op, impl, *map(str, words), str(len(red)), _why(red[0]) if red else ""])
    head = ["op", "body", "agree", "refused", "cut", "red", "first red"]
    return "## Agreement with the reference\n\n" + _table(head, body)


def _compiled(rows: Sequence[Mapping[str, Any]]) -> str:
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return ""
    told = [line for row in done for line in row.get("faults") or ()]
    spills = sum(bool(row["spilled_bytes"]) for row in done)
    text = f"## Machine code\n\n{len(done)} kernels compiled, {spills} with spills, {len(told)} not as expected."
    return text + "".join(f"\n- {line}" for line in told[:20])


def _stacks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sum of the four linears of a model: bf16 time over ours, per spec and M; only where all four are there."""
    times: dict[tuple[str, str], dict[int, dict[str, tuple[float, float]]]] = {}
    for row in rows:
        base, parts = _base(row), row["case"].split(".")
        model, layer = ".".join(parts[:-3]), parts[-3] if len(parts) > 3 else ""
        if row["status"] == "ok" and base is not None and layer in _LINEARS:
            cell = times.setdefault((model, row["scheme"]["spec"]), {}).setdefault(row["shape"]["M"], {})
            cell[layer] = (base["median"], row["latency_us"]["median"])
    ms = sorted({m for by_m in times.values() for m in by_m})
    body = []
    for (model, spec), by_m in times.items():
        line = [model, spec]
        for m in ms:
            pairs = list(by_m.get(m, {}).values())
            whole = len(pairs) == len(_LINEARS)
            line.append(f"{sum(b for b, _ in pairs) / sum(t for _, t in pairs):.2f}" if whole else "")
        body.append(line)
    if not any(cell for line in body for cell in line[2:]):
        return ""
    title = "## Linears of a layer, time of torch's floats over ours (quantising activations included)\n\n"
    return title + _table(["model", "spec", *(f"M={m}" for m in ms)], body)


def _ops(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        if row["status"] != "ok":
            continue
        latency, base = row["latency_us"], _base(row)
        rivals = [r for r in row.get("against") or () if r["status"] == "ok" and r is not base]
        best = min((r for r in rivals if not r["impl"].startswith("torch ")), key=lambda r: r["median"], default=None)
        tuned = (row.get("code") or {}).get("config_source") == "tuned"
        body.append(
            [
                row["case"] + (" (tuned here)" if tuned else ""),
                row["scheme"]["spec"],
                _number(latency["median"], 1),
                f"{_number(latency['lo'], 1)}-{_number(latency['hi'], 1)}",
                _number(latency.get("eager"), 1),
                _number(base["median"] if base else None, 1),
                f"{base['ratio']:.2f} ({base['ci95'][0]:.2f}-{base['ci95'][1]:.2f})" if base else "",
                f"{best['impl']} {_number(best['median'], 1)}" if best else "",
                _number((row.get("roofline") or {}).get("pct_of_roof"), 0),
            ]
        )
    head = ["case", "spec", "us", "spread", "eager us", "float us", "x float (95 %)", "best rival, us", "% of roof"]
    return "## Linears, one by one\n\n" + _table(head, body) if body else ""


def _over_cache(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an op over a paged cache."""
    return bool((row.get("scheme") or {}).get("kv_spec")) and row["level"] == "op"


def _attention(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ops over a paged cache: time, fastest rival, bytes a second and of a token, how far the answer is from unquantised."""
    body = []
    for row in rows:
        if row["status"] != "ok" or not _over_cache(row):
            continue
        shape, latency, needed = row["shape"], row["latency_us"], row["roofline"]
        sides = [r for r in row.get("against") or () if r["status"] == "ok"]
        base = min(sides, key=lambda r: r["median"], default=None)
        heads = f"{shape['G'] * shape['H']}/{shape['H']}/{shape['D']}"
        cells = [row["case"].split(".")[0], heads, str(shape["S"]), str(shape["batch"]), row["scheme"]["kv_spec"]]
        cells += [_number(latency["median"], 1), f"{_number(latency['lo'], 1)}-{_number(latency['hi'], 1)}"]
        cells.append(f"{base['impl']} {_number(base['median'], 1)}" if base else "")
        cells.append(f"{base['ratio']:.2f} ({base['ci95'][0]:.2f}-{base['ci95'][1]:.2f})" if base else "")
        cells += [_number(needed["bytes"] / latency["median"] / 1e3, 1), _number(needed.get("pct_of_roof"), 0)]
        cells.append(_number(row["memory"]["kv_bytes_per_token"], 0))
        body.append([*cells, "; ".join(row["quality"]["reasons"][1:])])
    head = ["op", "heads", "context", "batch", "cache", "us", "spread", "fastest rival, us", "x rival (95 %)", "GB/s"]
    head += ["% of roof", "B/token", "answer"]
    return "## Over a paged cache\n\n" + _table(head, body) if body else ""


def _of_losses(row: Mapping[str, Any]) -> bool:
    """Whether a row is of distill_loss."""
    return row["level"] == "op" and row["case"].startswith("distill_loss.")


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Losses of distilling: time of loss and gradients, rivals of the same rounds, memory beside one [tokens, vocabulary] in fp32."""
    body = []
    for row in rows:
        if row["status"] != "ok" or not _of_losses(row):
            continue
        shape, latency, peak = row["shape"], row["latency_us"], (row.get("memory") or {}).get("peak")
        cells = [row["case"].split(".")[1], *(str(shape[n]) for n in ("M", "N", "K")), row["scheme"]["spec"]]
        cells += [
            _number(latency["median"] / 1e3, 1),
            f"{_number(latency['lo'] / 1e3, 1)}-{_number(latency['hi'] / 1e3, 1)}",
        ]
        sides = [r for r in row.get("against") or () if r["status"] == "ok"]
        cells.append(", ".join(f"{r['impl']} {r['ratio']:.2f} ({r['ci95'][0]:.2f}-{r['ci95'][1]:.2f})" for r in sides))
        share = None if peak is None else peak / (4 * shape["M"] * shape["N"])
        body.append([*cells, _number(None if peak is None else peak / 1e6, 0), _number(share, 3)])
    head = ["loss", "tokens", "vocabulary", "hidden", "type", "ms", "spread", "rivals' time over ours (95 %)"]
    head += ["extra peak MB", "of the logits"]
    return "## Losses of distilling, with both gradients\n\n" + _table(head, body) if body else ""


def _experts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Layers of experts: both matmuls, SwiGLU and the weighted sum in one time."""
    body = []
    for row in rows:
        base = _base(row)
        if row["status"] != "ok" or base is None:
            continue
        latency, touched = row["latency_us"], (row.get("model") or {}).get("experts_touched")
        cells = [row["case"], str(row["shape"]["M"]), _number(touched, 0), _number(latency["median"], 1)]
        cells += [f"{_number(latency['lo'], 1)}-{_number(latency['hi'], 1)}", _number(base["median"], 1)]
        cells.append(f"{base['ratio']:.2f} ({base['ci95'][0]:.2f}-{base['ci95'][1]:.2f})")
        body.append([*cells, _number((row.get("roofline") or {}).get("pct_of_roof"), 0)])
    head = ["case", "tokens", "experts touched", "us", "spread", "bf16 us", "x bf16 (95 %)", "% of roof"]
    return "## Layers of experts, routed at random\n\n" + _table(head, body) if body else ""


def _tuning(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the tuner came to; entries lie in tuned/, for people to merge."""
    body = []
    for row in rows:
        entry = row.get("entry")
        if entry is None:
            body.append([row["op"], row["case"], row.get("outcome") or row["status"], "", "", "", _why(row)])
            continue
        config = " ".join(f"{name}={value}" for name, value in entry["config"].items())
        figures = [_number(entry.get(name), 1) for name in ("us", "heuristic_us", "floor_us")]
        body.append([row["op"], row["case"], row["outcome"], *figures, config])
    head = ["op", "case", "came to", "us", "heuristic us", "bf16 us", "Config"]
    return "## Tuning: proposals in tuned/\n\n" + _table(head, body) if body else ""


def _trained(rows: Sequence[Mapping[str, Any]]) -> str:
    """Runs of `percard distill` over random weights: how fast they train."""
    body = []
    for row in rows:
        if row["status"] == "ok":
            step = row["seconds"] / row["steps"]
            size = f"{row['batch']} x {row['seq_len']}"
            body.append([row["case"], row["run"], size, _number(step, 2), _number(row["tokens_per_s"], 0)])
        else:
            body.append([row["case"], row["status"], "", "", _why(row)])
    head = ["model", "trained", "tokens of a step", "s a step", "tokens/s"]
    return "## Distilling, random weights: speed only\n\n" + _table(head, body) if body else ""


def _models(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        if row["status"] != "ok" or not row.get("tokens"):
            continue
        versus, tokens, model = _versus(row), row["tokens"], row["model"]
        rate = tokens.get("tok_s") or tokens.get("tok_s_in")
        layers = f"{model['layers_run']} of {model['layers']}"
        interval = versus.get("ci95") or [0.0, 0.0]
        ratio = f"{versus['ratio']:.2f} ({interval[0]:.2f}-{interval[1]:.2f})"
        batches = f"{versus['batch']} / {versus['batch_fp16']}"
        size = _number(row["memory"]["weights"] / 1e9, 2)
        gate, scheme = row["quality"]["gate"], row["scheme"]
        cache = scheme.get("kv_spec", "bf16")
        body.append(
            [row["case"], scheme["spec"], scheme["head"], cache, layers, batches, _number(rate, 0), ratio, size, gate]
        )
    if not body:
        return ""
    head = [
        "case",
        "spec",
        "head",
        "cache",
        "layers",
        "batch / float",
        "tok/s",
        "x float (95 %)",
        "weights GB",
        "quality",
    ]
    title = "## Model at true shapes, synthetic weights: speed only, quality not measured\n\n"
    return title + _table(head, body)


def _left_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """What has no figure, by reason."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            spec = (row.get("scheme") or {}).get("spec", "")
            reason = "cut: no time was left" if row["status"] == "cut" else f"{row['status']}: {_why(row)}"
            groups.setdefault(reason, []).append(f"{spec} {row['case']}".strip())
        for rival in row.get("against") or ():
            if rival["status"] != "ok":
                groups.setdefault(f"{rival['impl']}: {rival.get('reason', rival['status'])}", []).append(row["case"])
    lines = [f"- {reason} ({_few(cases)})" for reason, cases in groups.items()]
    return "## Not measured here\n\n" + "\n".join(lines) if lines else ""


def _base(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """torch's fastest float of the same rounds."""
    floats = [r for r in row.get("against") or () if r["status"] == "ok" and r["impl"].startswith("torch ")]
    return min(floats, key=lambda r: r["median"], default=None)


def _versus(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return ((row.get("tokens") or {}).get("vs_fp16") or {}).get("same_batch") or {}


def _why(row: Mapping[str, Any]) -> str:
    return (row.get("error") or {}).get("message", "")


def _few(names: Iterable[str]) -> str:
    held = sorted(set(names))
    return ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(c).replace("|", "/") for c in line) + " |" for line in body])
