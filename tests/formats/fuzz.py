"""The fuzz target: whatever a checkpoint folder or a recipe holds, reading it ends in a valid result or in a plain refusal.

    python tests/formats/fuzz.py --count 10000 --seed 7 --work DIR        one JSON line at the end; exit 1 with findings

Each case changes a valid folder (a byte, a number, a name, a link, a pipe ...), then opens it, reads all tensors, parses
configs, reads the calibration of a cache, now and then quantises it, and puts it back. A finding is anything but FormatError, RecipeError, OSError and what
`quantize.run` documents: another exception, more than `LIMIT_S` of processor time, more than `LIMIT_BYTES` of memory on
top, a file written outside of the work folder's output, a pickle that is opened, a module of the checkpoint that is
imported, a process or a connection that is started, a message of several lines. Run by test_fuzz.py in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from percard.bench.engine.config import parse_config
from percard.formats import affine
from percard.formats import compressed_tensors as ct
from percard.formats.checkpoint import MARKER, Checkpoint, Writer
from percard.formats.header import read_json
from percard.formats.kv_layers import LAYERS, OFFSETS, KVLayers
from percard.formats.spec import FormatError
from percard.quant import preflight, quantize
from percard.quant.recipe import Recipe, RecipeError

sys.path.insert(0, str(Path(__file__).parent))  # run as a script or imported by a test
from mutations import RECIPE, Files, corpus, mutate_bytes, mutate_file

LIMIT_S = 10.0  # processor time of one case
LIMIT_BYTES = 1 << 30  # address space above what the imports took
FINE = (FormatError, RecipeError, OSError, preflight.Refused)


class Hang(BaseException):
    """A case took too long."""


class Touched(BaseException):
    """A case did what no input may make it do."""


# -- what is done with it ------------------------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    """Opens a folder, reads every tensor, decodes every quantised module, parses the config as the engine does."""
    found = Checkpoint.open(folder)
    for name in found.names:
        tensor, info = found.read(name), found.info(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
        assert sum(len(piece) for piece in found.raw(name, 1 << 16)) == info.nbytes
        if info.shape and info.shape[0]:
            assert found.read_rows(name, 0, 1).shape[0] == 1
    assert all(path.is_relative_to(folder) for path in found.side_files)
    if ct.claims(found.config):
        for module, spec in ct.specs(found.config, found.names).items():
            parts = {n[len(module) + 1 :]: found.read(n) for n in found.names if n.startswith(module + ".")}
            value = affine.dequantize(ct.read(parts, spec, module=module))
            assert value.dim() == 2
    parse_config(found.config, "fuzzed", str(folder / "config.json"))


def convert(folder: Path, out: Path) -> None:
    """The whole verb: dry run, quantise, write."""
    recipe = Recipe.from_flags(spec="w4a16-g32", options={"search": False}, verify="bytes")
    preflight.check(folder, recipe, out)
    quantize.run(folder, out, recipe)
    assert not (out / MARKER).exists()
    read_json(out / "config.json")


def read_cache(folder: Path, rng: random.Random) -> None:
    """Reads the calibration of a cache, now and then with offsets that a hand has changed together with their hash."""
    said, offsets = folder / LAYERS, folder / OFFSETS
    if (
        rng.random() < 0.7
        and offsets.is_file()
        and not offsets.is_symlink()
        and not said.is_symlink()
        and said.is_file()
    ):
        held = rb'(?<="offsets_sha256": ")\w{64}'
        now = hashlib.sha256(offsets.read_bytes()).hexdigest().encode()
        said.write_bytes(re.sub(held, now, said.read_bytes()))
    found = KVLayers.load(folder, **rng.choice([{}, {"kv_heads": 2, "head_dim": 16}, {"layers": 4}]))
    for spec, mu in zip(found.specs, found.mu, strict=True):
        assert mu is None or (spec.quantised and mu.shape == (found.kv_heads, found.head_dim) and mu.isfinite().all())
    assert found.bytes_per_token() > 0 and found.name


def clean(folder: Path) -> None:
    """Cleans up after a run that never was ours."""
    Writer.clean_unfinished(folder)
    assert (folder / "mine.txt").read_text() == "not of percard"


# -- the guard -------------------------------------------------------------------------------------------------------------


class Guard:
    """Watches what the interpreter is asked to do, while `on`: writes only under `allowed`, no pickle, no code, no process."""

    def __init__(self, allowed: list[Path]):
        self.on, self.allowed = False, [os.path.realpath(path) for path in allowed]
        sys.addaudithook(self._see)
        torch.load = self._no_load  # type: ignore[assignment]

    @staticmethod
    def _no_load(*args: Any, **options: Any) -> Any:
        raise Touched(f"torch.load of {args[:1]}")

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (
            "pickle.find_class",
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
        ):
            self.on = False
            raise Touched(f"{event} {args!r:.200}")
        if event == "import" and "evil" in str(args[0]):
            raise Touched(f"import of {args[0]}")
        if event == "open" and isinstance(args[0], (str, bytes)):
            mode, flags = args[1], args[2]
            writes = (
                any(c in mode for c in "wax+")
                if isinstance(mode, str)
                else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            self._place(event, args[0]) if writes else None
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            self._place(event, args[0], args[-1])
        elif event in ("os.truncate", "os.chmod", "shutil.rmtree"):
            self._place(event, args[0])
        elif event in ("os.rename", "os.link"):
            self._place(event, args[0], args[2])
            self._place(event, args[1], args[3])
        elif event == "os.symlink":
            self._place(event, args[1], args[2])

    def _place(self, event: str, path: Any, folder_fd: int = -1) -> None:
        if folder_fd >= 0 and isinstance(path, str):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder_fd}"), path)
        real = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        if isinstance(path, int) or real.startswith(("/dev", "/proc")) or "__pycache__" in str(path):
            return
        if not any(real == a or real.startswith(a + os.sep) for a in self.allowed):
            self.on = False
            raise Touched(f"{event} outside of the output: {path!r:.200}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        def late(number: int, frame: Any) -> None:
            raise Hang(f"more than {LIMIT_S} s of processor time")

        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        self.on = True
        try:
            yield
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)


# -- the loop --------------------------------------------------------------------------------------------------------------


def restore(folder: Path, files: Files) -> None:
    """Puts a folder back as it was."""
    for path in folder.iterdir():
        if path.name not in files or path.is_symlink() or not path.is_file():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, data in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def fuzz(work: Path, count: int, seed: int, say: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Runs `count` cases; {"cases", "accepted", "refused", "by": {kind: n}, "findings": [text]}."""
    outside, out = work / "outside", work / "results" / "out"
    outside.mkdir(parents=True)
    out.parent.mkdir()
    os.fsync = lambda fd: None  # no power will be cut here, and it is most of the time of a case
    (outside / "secret.json").write_text('{"secret": 1}')
    folders = corpus(work / "in")
    guard = Guard([work / "results", work / "in" / "half", work / "in" / "cache"])
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))
    found: Counter[str] = Counter()
    findings: list[str] = []
    for case in range(count):
        rng = random.Random(seed * 1_000_003 + case)
        which = rng.choices(["plain", "quantized", "recipe", "half", "cache"], [36, 36, 13, 5, 10])[0]
        what, action = "", which
        if which == "recipe":
            text = mutate_bytes(RECIPE.encode(), rng).decode(
                "utf-8", rng.choice(["replace", "ignore", "surrogateescape"])
            )
            call: Callable[[], Any] = lambda text=text: Recipe.parse(text)  # noqa: E731
            what = repr(text[:300])
        else:
            folder, files = folders[which]
            names = [n for n in files if n.endswith((".safetensors", ".json"))] if which != "half" else [MARKER]
            name = rng.choice(names + [n for n in files if n != "mine.txt" and rng.random() < 0.05])
            what = f"{name}: {mutate_file(folder / name, files[name], rng, outside)}"
            if which == "half":
                call = lambda folder=folder: clean(folder)  # noqa: E731
            elif which == "cache":
                call = lambda folder=folder, rng=rng: read_cache(folder, rng)  # noqa: E731
            elif which == "plain" and rng.random() < 0.05:
                action = "quantize"
                shutil.rmtree(out, ignore_errors=True)
                call = lambda folder=folder: convert(folder, out)  # noqa: E731
            else:
                call = lambda folder=folder: read_all(folder)  # noqa: E731
        problem = None
        try:
            with guard.watching():
                call()
            found[f"{action} accepted"] += 1
        except FINE as error:
            found[f"{action} refused"] += 1
            if isinstance(error, FormatError) and ("\n" in str(error) or len(str(error)) > 4000):
                problem = f"a message of {len(str(error))} characters or of several lines: {str(error)[:200]!r}"
        except BaseException as error:  # all else is a finding, the end of the process as well
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-3:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(last))
            problem = f"{type(error).__name__}: {str(error)[:200]} ({where})"
        if {path.name: path.read_bytes() for path in outside.iterdir()} != before or (work / "escaped").exists():
            problem = "a file outside of the output was changed"
        if problem is not None:
            findings.append(f"case {case} of seed {seed}, {action}, {what[:300]}: {problem}")
            say(findings[-1])
        if which != "recipe":
            restore(*folders[which])
        if case % 1000 == 999:
            say(f"{case + 1} cases, {len(findings)} findings")
    totals = {word: sum(n for key, n in found.items() if key.endswith(word)) for word in ("accepted", "refused")}
    return {"cases": count, "seed": seed, **totals, "by": dict(found), "findings": findings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = fuzz(args.work.resolve(), args.count, args.seed, lambda words: print(words, file=sys.stderr, flush=True))
    print(json.dumps(found))
    sys.exit(bool(found["findings"]))


if __name__ == "__main__":
    main()
