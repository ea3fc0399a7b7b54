"""The two sides of bench/llmcompressor.py as processes: llm-compressor in its own environment, percard as a command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from ..formats.checkpoint import Checkpoint, Writer
from . import card
from .engine.config import SHAPES

PACKAGES = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0")
SIDE = Path(__file__).with_name("llmcompressor_side.py")
_ROOT = Path(__file__).parents[1]  # of the package, as it was imported
_PACKAGE = __package__.partition(".")[0]
_SPEED_SPEC, _SPEED_WINDOWS, _SPEED_LEN = "w4a16-g128", 4, 2048  # 8,192 tokens


class Absent(RuntimeError):
    """A side cannot be had or failed; the text says why."""


def _environment() -> dict[str, str]:
    """For both sides: as many threads as this process has, and no network once all is installed."""
    threads = str(torch.get_num_threads())
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | quiet


def install(folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has llm-compressor, made in `folder` if it is not there yet. Absent says why not."""
    python, stamp = folder / "bin" / "python", folder / "percard.json"
    # The build of torch that runs here (a CPU build stays one); its bare version where the index has no such build.
    builds = list(
        dict.fromkeys(f"torch=={version}" for version in (torch.__version__, torch.__version__.split("+")[0]))
    )
    if python.is_file() and stamp.is_file() and json.loads(stamp.read_text()) == [*PACKAGES, builds[0]]:
        return python
    say(f"installing {', '.join((*PACKAGES, builds[0]))} into {folder} (once, some minutes)")
    venv.create(folder, with_pip=True, clear=True)
    failed = ""
    for build in builds:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *PACKAGES, build]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            stamp.write_text(json.dumps([*PACKAGES, builds[0]]))
            return python
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        failed = " ".join(errors)[-400:] or done.stderr.strip()[-400:]
    raise Absent(
        f"pip could not install llm-compressor: {failed or 'it said nothing'}; is a package index within reach?"
    )


class Side:
    """llm-compressor in its own process, started at the first call and again after a crash; one JSON line each way."""

    def __init__(self, python: Path):
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def _call(self, **command: Any) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [str(self._python), "-P", str(SIDE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=_environment(),
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Absent(f"llm-compressor's process ended with {self._process.wait()} during {command['do']!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Absent(answer["error"])
        return answer

    def version(self) -> dict[str, Any]:
        """Versions of its packages."""
        return self._call(do="version")

    def quantize(
        self, model: Path, out: Path, recipe: list[list[Any]], windows: Path | None, pin: bool
    ) -> dict[str, Any]:
        """Writes checkpoint `out`; {"seconds", "phases", "warnings"}."""
        paths = {"model": str(model.resolve()), "out": str(out.resolve())}
        given = None if windows is None else str(windows.resolve())
        return self._call(
            do="quantize", **paths, recipe=recipe, windows=given, threads=torch.get_num_threads(), pin=pin
        )

    def close(self) -> None:
        """Ends the process; with it goes all that it held."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(30)
            self._process = None


@cache
def our_source() -> str:
    """A digest of what decides our codes: the sources of quant, formats and kernels."""
    found = hashlib.sha256()
    for floor in ("formats", "kernels", "quant"):
        for path in sorted((_ROOT / floor).rglob("*")):
            if path.suffix in (".py", ".cpp"):
                found.update(path.read_bytes())
    return found.hexdigest()


def our_recipe(
    spec: str, methods: Sequence[Any], windows: Path | None, samples: int, seq_len: int, verify: str = "none"
) -> str:
    """YAML of a recipe for `percard quantize`."""
    tree: dict[str, Any] = {"stages": [{"quantize": {"spec": spec, "methods": list(methods)}}]}
    if windows is not None:
        calibration = {"source": str(windows.resolve()), "samples": samples, "seq_len": seq_len, "seed": 0}
        tree["calibration"] = calibration
    return yaml.safe_dump(tree | {"verify": {"level": verify}}, sort_keys=False)


def ours(
    model: Path, out: Path, spec: str, methods: Sequence[Any], windows: Path | None, samples: int, seq_len: int
) -> float:
    """Seconds of `percard quantize` as a command; Absent with its last words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(our_recipe(spec, methods, windows, samples, seq_len))
        command = [sys.executable, "-m", _PACKAGE, "quantize", str(model), "--recipe", str(recipe), "--out", str(out)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        seconds = time.perf_counter() - start
    if done.returncode:
        words = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-400:]
        raise Absent(f"percard quantize ended with {done.returncode}: {words}")
    return seconds


# -- throughput ----------------------------------------------------------------------------------------------------------


def write_layer(folder: Path) -> Path:
    """A Qwen3-8B of one layer and 4,096 words, random weights, if it is not in `folder` yet."""
    if (folder / "config.json").is_file():
        return folder
    config = json.loads((SHAPES / "qwen3-8b.json").read_text()) | {"num_hidden_layers": 1, "vocab_size": 4096}
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, vocab = config["num_attention_heads"] * head, config["num_key_value_heads"] * head, config["vocab_size"]
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    shapes |= {f"{layer}self_attn.{n}_proj.weight": (rows, hidden) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {f"{layer}self_attn.{n}_norm.weight": (head,) for n in "qk"}
    shapes |= {f"{layer}self_attn.o_proj.weight": (hidden, q), f"{layer}mlp.down_proj.weight": (hidden, ffn)}
    shapes |= {f"{layer}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
    shapes |= {f"{layer}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    random = torch.Generator().manual_seed(0)
    Writer.clean_unfinished(folder)
    with Writer(folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            if "norm" in name:
                tensor = torch.ones(shape)
            else:
                tensor = torch.randn(shape, generator=random).mul_(shape[1] ** -0.5)
            writer.add(name, tensor.to(torch.bfloat16))
        writer.finish(config)
    return folder


def throughput(folder: Path, *, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """GPTQ of one layer of Qwen3-8B on both sides, in turn, each a process of its own from start to the last byte.

    theirs_inner leaves out the start of its Python: loading, oneshot and saving only. Ratios are ours / theirs.
    """
    python = install(folder / "llm-compressor", say)
    model = write_layer(folder / "qwen3-8b-one-layer")
    vocab = int(Checkpoint.open(model).config["vocab_size"])
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (_SPEED_WINDOWS, _SPEED_LEN), generator=random).tolist()
    windows = folder / "throughput-windows.jsonl"
    windows.write_text("".join(json.dumps({"ids": window}) + "\n" for window in ids))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    recipe = [["GPTQModifier", {"scheme": {"weights": weights}, "ignore": ["lm_head"]}]]
    times: dict[str, list[float]] = {"theirs": [], "theirs_inner": [], "ours": []}
    versions: dict[str, Any] = {}
    for turn in range(rounds):
        out = folder / "throughput-out"
        shutil.rmtree(out, ignore_errors=True)
        side, start = Side(python), time.perf_counter()
        try:
            answer = side.quantize(model, out, recipe, windows, True)
            times["theirs"].append(time.perf_counter() - start)
            times["theirs_inner"].append(answer["seconds"])
            versions = versions or side.version()
        finally:
            side.close()
        say(f"round {turn + 1}: theirs {times['theirs'][-1]:.1f} s, {answer['seconds']:.1f} s of it its own work")
        shutil.rmtree(out, ignore_errors=True)
        times["ours"].append(ours(model, out, _SPEED_SPEC, ["gptq"], windows, _SPEED_WINDOWS, _SPEED_LEN))
        say(f"round {turn + 1}: ours {times['ours'][-1]:.1f} s")
        shutil.rmtree(out, ignore_errors=True)
    ratios = {n: [o / t for o, t in zip(times["ours"], times[n], strict=True)] for n in ("theirs", "theirs_inner")}
    lines = [f"{name:13s}{statistics.median(s):8.1f} s  ({min(s):.1f} .. {max(s):.1f})" for name, s in times.items()]
    for name, found in ratios.items():
        lines.append(f"ours / {name:13s}{statistics.median(found):6.3f}  ({min(found):.3f} .. {max(found):.3f})")
    said = {"spec": _SPEED_SPEC, "method": "gptq", "tokens": _SPEED_WINDOWS * _SPEED_LEN, "rounds": rounds}
    said |= {"shape": "qwen3-8b, one layer, vocabulary 4096", "threads": torch.get_num_threads()}
    env = card.fingerprint(torch.device("cpu")) | {"noisy": card.noise(torch.device("cpu"))}
    return {**env, "theirs": versions, "plan": said, "seconds": times, "ratios": ratios, "lines": lines}
