"""What bench/recovery.py runs: arms, each a few commands of percard with every setting written out, and what is asked of them.

    prune      two blocks, or a quarter of the MLP's channels, by score and at random, by seed
    distil     a child with three quarters of the parameters learns from its teacher, live, captured or by hard labels

Words in braces become paths: {model} the source and teacher, {data} its training text, {prompts} beginnings of other documents,
{out} the folder that the arm writes, {work}/NAME that of another arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
SCORED_ON = "--calibration {model}/calibration.txt --samples 32 --seq-len 256"
SERVABLE = "--group 64 --tp 1"
# Size, flag of its score, ways to choose: the score that is meant, others, chance.
CASES = {
    "layers": ("--layers 6", "depth", ("bi", "loss", "random")),
    "ffn": ("--ffn 576", "width", ("activation", "random")),
}
STEPS = 150
# One epoch at most: {data} holds more than 150 x 8 windows of 256 tokens. One teacher, one start, one order of windows.
TRAINING = "--batch 8 --lr 5e-4 --decay 0.01 --seed 0 --no-checkpointing --dtype fp32 --device cpu --every 25"

CE_BACK, KL_BACK, AHEAD, OF_LIVE = 0.70, 0.65, 0.10, 0.90  # shares of what was lost; KL ahead of hard labels
MEAN, RANK = (
    0.5,
    0.25,
)  # KL by score over that at random; share of all choices of blocks that may be better than the score's
ERRORS = 10  # standard errors of the cross-entropy that pruning has to lose before a share of it means something
SECONDS = 20 * 60  # of the arm that distils from a live teacher


@dataclass(frozen=True)
class Arm:
    """Commands without their `percard`. start: the arm whose folder it begins with, so what it lost and won back can be said.

    needs: arms whose folders the commands read. scored: whether {out} is a model. drop: instead of commands, so many blocks of the
    source are left out in every possible way, and each is scored. weight: rough share of the time.
    """

    name: str
    kind: str
    words: str
    commands: tuple[str, ...]
    start: str = ""
    needs: tuple[str, ...] = ()
    scored: bool = True
    drop: int = 0
    weight: float = 1.0


def prune_arms() -> list[Arm]:
    """Both sizes, by score and at random, over the seeds of the windows or of the choice."""
    found = []
    for case, (size, axis, ways) in CASES.items():
        for way in ways:
            for seed in SEEDS:
                command = (
                    f"prune {{model}} {size} {SERVABLE} --{axis}-score {way} {SCORED_ON} --seed {seed} --out {{out}}"
                )
                words = f"{size.removeprefix('--')} by {way}, seed {seed}"
                found.append(Arm(f"{case}-{way}-{seed}", "prune", words, (command,)))
    return [*found, Arm("choices", "choices", "every choice of two blocks to drop", (), scored=False, drop=2, weight=6)]


def distil_arms(steps: int = STEPS) -> list[Arm]:
    """The children, the capture and the completions, and what is trained from them."""

    def trained(name: str, words: str, flags: str, start: str = "child", *needs: str) -> Arm:
        command = f"distill {{work}}/{start} {flags} {TRAINING} --steps {steps} --out {{out}}"
        return Arm(name, "distil", words, (command,), start, (start, *needs), weight=steps / 7)

    pruned = f"prune {{model}} %s {SERVABLE} {SCORED_ON} --seed 0 --out {{out}}"
    live = "--teacher {model} --data {data} --seq-len 256"
    captured, said = "--teacher {work}/captured", "--teacher {work}/written"
    return [
        Arm("child", "child", "ffn 448 of 768", (pruned % "--target-params 0.75",)),
        Arm("deep", "child", "6 of 8 blocks", (pruned % "--layers 6",)),
        trained("fkl", "forward KL, live teacher", f"{live} --loss fkl"),
        trained("hard", "hard labels alone, a control", f"{live} --loss none --hard 1"),
        Arm(
            "captured", "capture", "top-64 of the training text",
            ("capture {model} --data {data} --top-k 64 --seq-len 256 --out {out}",), scored=False, weight=8,
        ),
        Arm(
            "written", "capture", "completions of 64 prompts, four each, with their top-64",
            ("capture {model} --generate {prompts} --n 4 --max-new 128 --temperature 1 --top-k 64 --seed 0 --out {out}",),
            scored=False, weight=8,
        ),
        trained("topk", "captured top-64, no teacher", f"{captured} --loss topk", "child", "captured"),
        trained("both", "captured top-64 and completions", f"{captured} {said} --loss topk", "child", "captured", "written"),
        trained("sampled", "completions as hard labels", f"{said} --loss none --hard 1", "child", "written"),
        trained("depth", "forward KL, live teacher", f"{live} --loss fkl", "deep"),
    ]  # fmt: skip


def all_arms(steps: int = STEPS) -> list[Arm]:
    """In the order in which they run and stand in a table."""
    return [*prune_arms(), *distil_arms(steps)]


def checks(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{"name", "words", "value", "limit", "held"} of everything that is asked and whose arms are there."""
    found: list[dict[str, Any]] = []

    def ask(name: str, words: str, value: float, limit: float, most: bool = False) -> None:
        held = value <= limit if most else value >= limit
        found.append({"name": name, "words": words, "value": value, "limit": limit, "held": bool(held)})

    for case, (_, _, (score, *_)) in CASES.items():
        ours, chance = (
            [arms[n]["kl"] for s in SEEDS if (n := f"{case}-{way}-{s}") in arms] for way in (score, "random")
        )
        if len(ours) == len(chance) == len(SEEDS):
            share, edge = sum(ours) / sum(chance), max(ours) / min(chance)
            ask(
                f"prune.{case}.mean",
                f"{case}: mean KL by {score} over that at random, three seeds each",
                share,
                MEAN,
                most=True,
            )
            ask(f"prune.{case}.worst", f"{case}: worst KL by {score} over the best at random", edge, 1.0, most=True)
    if {"choices", "layers-bi-0"} <= set(arms):
        every, blocks = arms["choices"]["choices"], arms["layers-bi-0"]["prune"]["kept_layers"]
        chosen = every[",".join(str(i) for i in blocks)]
        share = sum(kl < chosen for kl in every.values()) / len(every)
        ask(
            "prune.layers.rank",
            f"layers: share of all {len(every)} choices that are better than that of bi",
            share,
            RANK,
            most=True,
        )
    for child in ("child", "deep"):
        if child in arms:
            lost = arms[child]["ce_lost"] / arms[child]["ce_lost_error"]
            ask(f"lost.{child}", f"{child}: cross-entropy lost by pruning, in standard errors", lost, ERRORS)
    for name, words in (("fkl", "a quarter of the parameters"), ("depth", "two blocks")):
        if name in arms:
            ask(
                f"{name}.ce", f"{words}: share of the lost cross-entropy that came back", arms[name]["ce_back"], CE_BACK
            )
            ask(f"{name}.kl", f"{words}: share of the lost KL that came back", arms[name]["kl_back"], KL_BACK)
    if {"fkl", "hard"} <= set(arms):
        ahead = arms["fkl"]["kl_back"] - arms["hard"]["kl_back"]
        ask("fkl.ahead", "forward KL ahead of hard labels, share of the lost KL", ahead, AHEAD)
    if {"fkl", "topk"} <= set(arms):
        share = arms["topk"]["kl_back"] / arms["fkl"]["kl_back"]
        ask("topk.of_live", "captured top-64: KL recovery as a share of the live teacher's", share, OF_LIVE)
    if {"fkl", "both"} <= set(arms):
        share = arms["both"]["kl_back"] / arms["fkl"]["kl_back"]
        ask("both.of_live", "captured top-64 and completions: the same share", share, OF_LIVE)
    if "fkl" in arms and not arms["fkl"]["resumed"]:  # else they are those of its last piece alone
        ask("fkl.seconds", "seconds of distilling from a live teacher", arms["fkl"]["seconds"], SECONDS, most=True)
    return found
