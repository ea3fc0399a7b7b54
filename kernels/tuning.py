"""How a Triton body finds its Config: given > the user's tuned file > the packaged tuned.json > the op's pure heuristic.

Nothing times itself at a request: `percard tune` does, when asked (tuner.py is its loop, the clock stands here). A tuned
entry holds for one card, one release of Triton, one version of the op, the exact weight and one bucket of M, never for
"the nearest M": bucket b is 2^(b-1) < M <= 2^b.

    tuned.json   {"schema": 1, "entries": [
                   {"card": "NVIDIA H200", "triton": "3.9", "op_version": 1, "m_bucket": 4, "n": 4096, "k": 4096, "group": 128,
                    "dtype": "bfloat16", "config": {"block_n": 128, ...}, "us": 9.1, "heuristic_us": 9.8, ...}, ...]}

The packaged file lies in the op's folder. The user's is <op>.json in $PERCARD_TUNED, or else in ~/.cache/percard/tuned, since
a wheel is often installed where nobody may write; its entries win.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .device import Card

SCHEMA = 1
MOST_CANDIDATES = 24  # Configs of one problem beside the heuristic's: what a tuner compiles and times
Config = TypeVar("Config")
Table = dict[tuple, dict[str, Any]]
Turns = Mapping[str, Sequence[Callable[[], Any]]]  # name -> the same call on different copies of its weight


class Shape(NamedTuple):
    """One problem as a heuristic sees it. `group` is the codes that share a scale, K or more for one scale per row."""

    m: int
    n: int
    k: int
    group: int
    dtype: torch.dtype


# ---- looking up ------------------------------------------------------------------------------------------------------


def bucket(m: int) -> int:
    """Number of the bucket that M falls into: 0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8 ..."""
    return max(m - 1, 0).bit_length()


def in_bucket(shape: Any) -> Any:
    """The largest problem of the bucket: what a heuristic answers for, so that a Config holds for all of the bucket."""
    return shape._replace(m=1 << bucket(shape.m))


def release(triton_version: str) -> str:
    """ "3.9" of "3.9.0": machine code, and so a choice, may change from release to release."""
    return ".".join(triton_version.split(".")[:2])


def user_folder() -> Path:
    """Where `percard tune` writes unless told otherwise, and what is read after the packaged files."""
    return Path(os.environ.get("PERCARD_TUNED") or Path.home() / ".cache" / "percard" / "tuned").expanduser()


def user_file(packaged: Path) -> Path:
    """The user's own file beside an op's packaged tuned.json: named after the op's folder."""
    return user_folder() / f"{packaged.parent.name}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """All entries of a tuned file; none when there is no such file. ValueError when it is of another schema."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    if file.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: schema is {file.get('schema')!r}, expected {SCHEMA}; tune again")
    return file["entries"]


def entries(
    path: Path, triton_version: str, op_version: int = 1, names: Sequence[str] = Shape._fields
) -> dict[tuple, dict[str, Any]]:
    """Entries that hold for this Triton and this version of the op, by (card, bucket, fields of the shape but M).

    The packaged file `path` first, then the user's, which wins. Entries of another op version are left out with one
    warning per file; a file of the user's that cannot be read is left out too: a cache must not stop a server.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for file in (path, user_file(path)):
        try:
            held = [e for e in read(file) if e["triton"] == release(triton_version)]
        except (ValueError, KeyError, TypeError, OSError) as error:
            if file == path:
                raise
            warnings.warn(f"{file} is left out: {error}; remove it and run percard tune again", stacklevel=2)
            continue
        old = sum(e.get("op_version", 1) != op_version for e in held)
        if old:
            what = f"{file.parent.name}/{file.name}: {old} entries are of another version of the op than {op_version}"
            warnings.warn(f"{what}, they are ignored; run percard tune again", stacklevel=2)
        held = [e for e in held if e.get("op_version", 1) == op_version]
        found |= {(e["card"], e["m_bucket"], *(e[name] for name in names[1:])): e for e in held}
    return found


def load(path: Path, triton_version: str, op_version: int = 1, names: Sequence[str] = Shape._fields) -> Table:
    """As `entries`, the fields of the Config alone."""
    return {key: e["config"] for key, e in entries(path, triton_version, op_version, names).items()}


table = functools.cache(load)  # read once in a process: what is tuned meanwhile counts in the next one


def finder(
    path: Path,
    triton_version: str,
    op_version: int,
    make: type[Config],
    heuristic: Callable[[Any, Card], Config],
    names: Sequence[str] = Shape._fields,
) -> Callable[[Any, Card], Config]:
    """An op's `config_for(shape, card)`: the Config tuned for this card and Triton, or the heuristic's; remembered."""

    @functools.lru_cache(maxsize=4096)
    def config_for(shape: Any, card: Card) -> Config:
        return choose(table(path, triton_version, op_version, names), shape, card, make, heuristic)

    return config_for


def key(shape: Any, card: Card) -> tuple:
    """What a table is asked with: (card, bucket, the shape's fields but M)."""
    return card.name, bucket(shape.m), *(plain(value) for value in shape[1:])


def plain(value: Any) -> Any:
    """A field of a shape as JSON holds it."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def choose(
    table: Table, shape: Any, card: Card, make: type[Config], heuristic: Callable[[Any, Card], Config]
) -> Config:
    """The measured Config of this problem, or what the heuristic says for its bucket."""
    fields = table.get(key(shape, card))
    known = {f.name for f in fields_of(make)}  # type: ignore[arg-type]
    if fields is None or not set(fields) <= known:  # an entry with fields that are gone counts as none
        return heuristic(in_bucket(shape), card)
    return make(**fields)


# ---- what heuristics and lists of candidates are made of -------------------------------------------------------------


def split_k(tiles: int, steps: int, shape: Shape, card: Card) -> int:
    """Into how many parts K is cut so that a small problem fills the card: 1, 2, 4, 8 or 16.

    The smallest number that gives nine programs for ten SMs, with at least 4 steps each, and with M * split <= K / 64:
    the partial sums stay under a quarter of the bytes of a 4-bit weight.
    """
    most = min(steps // 4, shape.k // (64 * shape.m), 16)
    split = 1
    while 2 * split <= most and 10 * tiles * split < 9 * card.sms:
        split *= 2
    return split


def cut(steps: int, split: int) -> tuple[int, int]:
    """(steps of each part, parts that have any) of a loop of `steps` cut into at most `split` parts."""
    each = -(-steps // split)
    return each, -(-steps // each)


def variants(base: Config, changes: Iterable[Mapping[str, Any]], fits: Callable[[Config], bool]) -> list[Config]:
    """Distinct Configs that differ from `base` by one of `changes` each and fit, at most MOST_CANDIDATES, in order."""
    made: list[Config] = []
    for change in changes:
        other = replace(base, **change)  # type: ignore[type-var]
        if other != base and other not in made and fits(other):
            made.append(other)
    return made[:MOST_CANDIDATES]


# ---- writing ---------------------------------------------------------------------------------------------------------


def store(path: Path, entry: Mapping[str, Any]) -> None:
    """Puts an entry into a tuned file, in place of one with its key. A reader sees the old file or the new one."""
    measured = ("op_version", "config", "way", "us", "floor_us", "heuristic_us", "noise_pct", "candidates", "rejected")

    def identity(e: Mapping[str, Any]) -> tuple:
        return tuple(sorted((name, str(value)) for name, value in e.items() if name not in measured))

    kept = [e for e in read(path) if identity(e) != identity(entry)]
    lines = [json.dumps(e) for e in sorted([*kept, dict(entry)], key=identity)]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(f'{{"schema": {SCHEMA}, "entries": [\n' + ",\n".join(lines) + "\n]}\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# ---- the clock of a card ---------------------------------------------------------------------------------------------


def copies_for_cold_cache(nbytes: int, cache_bytes: int, most: int = 256) -> int:
    """How many copies of `nbytes` each hold four times the cache: read in turn, none is still in it at its turn."""
    return min(most, max(1, -(-4 * cache_bytes // max(1, nbytes))))


class CardClock:
    """Times calls inside CUDA graphs, in turn (A B A B): launch cost is out, the L2 is cold when the copies suffice."""

    def __init__(self, where: torch.device, work_s: float = 0.002, gap_s: float = 0.002):
        self.where, self.work_s, self.gap_s = where, work_s, gap_s

    def __call__(self, turns: Turns, rounds: int) -> dict[str, list[float]]:
        """Seconds per call, one number per round and name."""
        stream = torch.cuda.Stream(self.where)
        # One pool for all graphs: they run one after another and nobody reads their outputs.
        self._pool = torch.cuda.graph_pool_handle()
        graphs, calls = {}, {}
        try:
            for name, turn in turns.items():
                graphs[name], calls[name] = self._captured(turn, stream)
            times: dict[str, list[float]] = {name: [] for name in turns}
            for _ in range(rounds):
                for name, graph in graphs.items():
                    times[name].append(self._replay(graph) / calls[name])
                    time.sleep(self.gap_s)  # a pause, so that the card does not run into its power limit
            return times
        finally:
            for graph in graphs.values():
                graph.reset()

    def _captured(self, turn: Sequence[Callable[[], Any]], stream: Any) -> tuple[Any, int]:
        """A graph of whole turns that holds `work_s` of work, and the number of calls in it."""
        graph, calls = self._capture(turn, stream, 1)
        each = min(self._replay(graph) for _ in range(3))
        repeat = min(64, round(self.work_s / max(each, 1e-7)))
        if repeat > 1:
            graph.reset()
            graph, calls = self._capture(turn, stream, repeat)
        self._replay(graph)
        return graph, calls

    def _capture(self, turn: Sequence[Callable[[], Any]], stream: Any, repeat: int) -> tuple[Any, int]:
        stream.wait_stream(torch.cuda.current_stream(self.where))
        with torch.cuda.stream(stream):  # compiles, and makes library workspaces, before the capture
            turn[0]()
        torch.cuda.synchronize(self.where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, pool=self._pool):
            for _ in range(repeat):
                for call in turn:
                    call()
        torch.cuda.synchronize(self.where)
        return graph, repeat * len(turn)

    def _replay(self, graph: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def faster(base: Sequence[float], again: Sequence[float], other: Sequence[float]) -> tuple[bool, float, float]:
    """(is `other` faster by more than noise, how many times faster, the noise), from times of the same rounds.

    `again` is the base timed a second time in each round. Better by 2 % and by twice what the base differs from itself, and
    in all rounds but one in eight.
    """
    noise = abs(statistics.median(base) / statistics.median(again) - 1)
    ratios = [b / o for b, o in zip(base, other, strict=True)]
    gain = statistics.median(ratios)
    won = sum(r > 1 for r in ratios) >= len(ratios) - len(ratios) // 8
    return won and gain > 1 + max(0.02, 2 * noise), gain, noise
