"""Whole models on a CPU beside llama.cpp: `python -m percard.bench.llamacpp --out DIR`.

    ours      the engine at the shapes of Qwen3-0.6B, random weights, w4a8-g64 and w8a8, int8 head
    theirs    llama.cpp through llama-cpp-python, installed into an environment of its own, Q4_0 and Q8_0 files with
              random weights of the same shapes, head in Q8_0
    timed     prefill of a prompt, then greedy steps behind it: sides in turn (A B A B), same threads, one process each

The other side sleeps while one is timed, and half a second before. `--isa avx2` compares what both do without AVX-512 and AMX: it builds
llama.cpp without them and holds ours to `PERCARD_ISA=avx2`. The first run builds llama.cpp, which takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..formats.spec import QuantSpec
from . import card, clock
from .engine import Model, load, load_config
from .probe import probe

PACKAGES = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy")
PAIRS = {"w4a8-g64": "Q4_0", "w8a8": "Q8_0"}  # ours: theirs
# What the compiler may use of the CPU, by --isa; cmake flags of llama.cpp.
BUILDS = {
    "native": "-DGGML_NATIVE=ON",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON",
}
REST_S = 0.5  # before each sample
_SIDE = Path(__file__).with_name("llamacpp_side.py")
_SHAPES = Path(__file__).with_name("shapes")


class Absent(RuntimeError):
    """llama.cpp cannot be had or does not run here; the text says why."""


def install(folder: Path, isa: str, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has llama.cpp, made in `folder` if it is not there yet. Absent says why not."""
    python, stamp = folder / "bin" / "python", folder / "percard.json"
    wanted = {"packages": list(PACKAGES), "build": BUILDS[isa]}
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    say(f"building llama.cpp for {isa} in {folder} (once, some minutes)")
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *PACKAGES]
    done = subprocess.run(
        [*command, "--no-binary", "llama-cpp-python", "--no-cache-dir"],
        env=os.environ | {"CMAKE_ARGS": BUILDS[isa]},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Absent(f"pip could not build llama-cpp-python: {done.stderr.strip()[-400:]}")
    stamp.write_text(json.dumps(wanted))
    return python


class Side:
    """llama.cpp in its own process; each call is one JSON line there and one back."""

    def __init__(self, python: Path):
        self._process = subprocess.Popen(
            [str(python), "-P", str(_SIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, do: str, path: Path, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, "path": str(path), **more}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Absent(f"llama.cpp's process ended with {self._process.wait()} during {do!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise Absent(f"llama.cpp, {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


class Ours:
    """The engine with one spec: the dtype of each phase is the fastest of a probe of one layer."""

    def __init__(self, source: str, spec: str, prompt: int, new: int):
        parsed, config, where = QuantSpec.parse(spec), load_config(source), torch.device("cpu")
        floats = (torch.bfloat16, torch.float16)
        found = probe(config, parsed, floats, device=where, prompt=prompt, batch=1)
        self.dtypes = {phase: found.fastest(phase) for phase in ("prefill", "decode")}
        self.model = load(
            source, spec=parsed, dtype=self.dtypes["decode"], head="int8-row", max_len=prompt + new, device=where
        )
        self.models: dict[str, Model] = {p: self.model.with_dtype(d) for p, d in self.dtypes.items()}
        self.models = {phase: replace(model, mv=False) for phase, model in self.models.items()}
        self.caches = {p: m.new_cache(1, prompt + new) for p, m in self.models.items()}
        self.caches["decode"].fill_random()

    def prefill(self, tokens: Sequence[int]) -> None:
        self.caches["prefill"].rewind()
        self.models["prefill"].prefill(torch.tensor([list(tokens)]), self.caches["prefill"]).argmax(dim=-1)

    def decode(self, depth: int, new: int) -> None:
        cache, tokens = self.caches["decode"], torch.zeros(1, dtype=torch.int64)
        cache.rewind(depth)
        for _ in range(new):
            tokens = self.models["decode"].step(tokens, cache).argmax(dim=-1)


@torch.inference_mode()
def compare(
    shape: str, folder: Path, isa: str, *, prompt: int, new: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Times both sides; {"env", "cpu", "theirs", "plan", "rows"}. Absent when llama.cpp cannot be had."""
    python = install(folder / f"llama-cpp-{isa}", isa, say)
    side = Side(python)
    try:
        config = json.loads((_SHAPES / f"{shape}.json").read_text())
        threads, system, files = torch.get_num_threads(), {}, {}
        for kind in PAIRS.values():
            files[kind] = folder / f"{shape}-{kind}.gguf"
            if not files[kind].is_file():
                say(f"writing {files[kind].name}")
                side("write", files[kind], config=config, linears=kind, head="Q8_0", seed=0)
            system = side("load", files[kind], threads=threads, context=prompt + new)
        ours = {}
        for spec in PAIRS:
            say(f"loading {shape} as {spec}")
            ours[spec] = Ours(f"shape:{shape}", spec, prompt, new)
        calls: dict[str, dict[str, Callable[[], Any]]] = {"prefill": {}, "decode": {}}
        tokens = torch.randint(0, config["vocab_size"], (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        for spec, kind in PAIRS.items():
            calls["prefill"][spec] = partial(ours[spec].prefill, tokens)
            calls["prefill"][kind] = partial(side, "prefill", files[kind], tokens=tokens)
            calls["decode"][spec] = partial(ours[spec].decode, prompt, new)
            calls["decode"][kind] = partial(side, "decode", files[kind], depth=prompt, new=new)
        noisy, read = card.noise(torch.device("cpu")), card.read_bandwidth(torch.device("cpu"))
        times = {}
        for phase in calls:
            say(f"timing {phase}, {rounds} rounds of {len(calls[phase])}")
            # The other side's threads spin for a while after their work, on our cores.
            times[phase] = clock.ab(calls[phase], rounds=rounds, before=lambda name, turn: time.sleep(REST_S))
    finally:
        side.close()
    work = {"prefill": prompt, "decode": new}
    rows = []
    for phase in calls:
        for spec, kind in PAIRS.items():
            ratio = clock.ratio(times[phase][kind], times[phase][spec])
            for name, step_bytes in ((spec, ours[spec].model.step_bytes(1)), (kind, files[kind].stat().st_size)):
                rate = times[phase][name].rate(work[phase])
                row = {"phase": phase, "side": name, "tok_s": rate.median, "lo": rate.lo, "hi": rate.hi}
                row |= {"step_bytes": step_bytes, "samples_s": list(times[phase][name].samples)}
                if phase == "decode":
                    row["share_of_read"] = rate.median * step_bytes / read
                if name == spec:
                    row |= {"against": kind, "ratio": ratio.median, "ci95": [ratio.lo, ratio.hi]}
                    row["dtype"] = str(ours[spec].dtypes[phase]).removeprefix("torch.")
                    row["kernel"], row["isa"] = ours[spec].models[phase].kernel, ours[spec].model.isa
                rows.append(row)
    found = card.fingerprint(torch.device("cpu"))
    plan = {"shape": shape, "prompt": prompt, "new": new, "rounds": rounds, "isa": isa, "head": "int8 both sides"}
    found["cpu"] |= {"read_gbs": read / 1e9}
    return {**found, "noisy": noisy, "theirs": system, "plan": plan, "rows": rows}


def table(found: dict[str, Any]) -> Table:
    """What was measured, for a terminal."""
    plan, cpu = found["plan"], found["cpu"]
    title = f"{plan['shape']}, random weights, {cpu['threads']} threads, {cpu['model']}, {plan['isa']}"
    shown = Table(title=f"{title}, reads {cpu['read_gbs']:.1f} GB/s, llama-cpp-python {found['theirs']['version']}")
    for name in ("phase", "side", "tok/s", "spread", "share of read bandwidth", "ours / theirs", "95 %"):
        shown.add_column(name, justify="left" if name in ("phase", "side") else "right")
    for row in found["rows"]:
        share = f"{row['share_of_read']:.0%}" if "share_of_read" in row else ""
        ratio = f"{row['ratio']:.2f}x {row['against']}" if "ratio" in row else ""
        spread = f"{row['lo']:.1f} .. {row['hi']:.1f}"
        interval = f"{row['ci95'][0]:.2f} .. {row['ci95'][1]:.2f}" if "ci95" in row else ""
        shown.add_row(row["phase"], row["side"], f"{row['tok_s']:.1f}", spread, share, ratio, interval)
    return shown


def main(
    out: Annotated[Path, typer.Option(help="Folder for the environment, the GGUF files and llamacpp-ISA.json.")],
    shape: Annotated[str, typer.Option(help="A dense Qwen3 of bench/shapes.")] = "qwen3-0.6b",
    isa: Annotated[str, typer.Option(help="native, or avx2: both sides without AVX-512 and AMX.")] = "native",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill, and depth of the decode.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Decode steps of a sample.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B.")] = 7,
) -> None:
    """Times the engine beside llama.cpp on this CPU and prints tokens per second of both."""
    if isa not in BUILDS:
        raise typer.BadParameter(f"{isa} is not known; known: {', '.join(BUILDS)}", param_hint="--isa")
    if isa == "avx2" and os.environ.get("PERCARD_ISA") != "avx2":  # read once, when a process starts
        limits = {"PERCARD_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        limits["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
        raise typer.Exit(
            subprocess.run(
                [sys.executable, "-m", f"{__package__}.llamacpp", *sys.argv[1:]], env=os.environ | limits
            ).returncode
        )
    load_config(f"shape:{shape}")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        found = compare(shape, out, isa, prompt=prompt, new=new, rounds=rounds, say=console.log)
    except Absent as error:
        console.print(f"percard: {error}", style="red")
        raise typer.Exit(1) from None
    path = out / f"llamacpp-{isa}.json"
    path.with_suffix(".part").write_text(json.dumps(found, indent=1))
    path.with_suffix(".part").replace(path)
    console.print(table(found))
    console.print(f"written: {path}" + (f"; noisy: {'; '.join(found['noisy'])}" if found["noisy"] else ""))


if __name__ == "__main__":
    typer.run(main)
