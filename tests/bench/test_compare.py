"""Comparisons of two runs: which cells are one, what counts as slower, quality, what may not be compared, sources."""

from __future__ import annotations

import json
import subprocess

import pytest

from percard.bench import compare, compare_table, record, sources
from percard.bench.record import Record
from percard.formats.spec import FormatError

GREEN = {"gate": "green", "model": "tiny", "protocol": "512 tokens", "kl": 0.002, "top1": 0.98, "ppl_rel": 0.004}


def row(case: str = "m-1.5b.down.decode.b1", times=(100.0, 101.0, 99.0, 100.5, 99.5, 100.2, 99.8), **more) -> Record:
    parts = {
        "cell_key": "key of some code",
        "level": "op",
        "scheme": {"spec": "w8a8"},
        "body": {"impl": "cpu"},
        "cpu": {"model": "chip", "threads": 2, "noise_floor_pct": 1.0},
        "clock": {"mode": "wall", "l2": "cold", "power": "burst"},
        "latency_us": {"median": sorted(times)[len(times) // 2], "samples": list(times)},
    }
    return Record(case=case, **parts | more)


def scaled(record: Record, factor: float, **more) -> Record:
    times = [factor * t for t in record.latency_us["samples"]]
    return row(record.case, times, level=record.level, scheme=record.scheme, **more)


def only(base: Record, new: Record, **options) -> compare.Pair:
    (pair,) = compare.compare([base], [new], **options).pairs
    return pair


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.02, "same"), (1.1, "slower"), (1 / 1.1, "faster"), (1.031, "slower")]
)
def test_a_change_beyond_the_limit_is_called(factor, verdict):
    pair = only(row(), scaled(row(), factor))
    assert pair.verdict == verdict and pair.ratio == pytest.approx(factor)
    assert pair.ci95[0] <= factor <= pair.ci95[1]
    assert pair.regression == (verdict == "slower")


def test_the_limit_is_the_larger_of_fail_and_twice_the_noise():
    noisy = {"model": "chip", "threads": 2, "noise_floor_pct": 6.0}
    assert only(row(), scaled(row(), 1.1, cpu=noisy)).verdict == "same"
    assert only(row(cpu=noisy), scaled(row(), 1.1)).threshold == pytest.approx(0.12)
    assert only(row(), scaled(row(), 1.1), fail=0.15).verdict == "same"


def test_what_samples_do_not_prove_is_unproven():
    wide = row(times=(100.0, 160.0, 90.0, 150.0, 80.0, 130.0, 120.0))
    assert only(wide, scaled(wide, 1.1)).verdict == "unproven"
    assert only(row(times=(100.0,)), row(times=(200.0,))).verdict == "unproven"
    imported = [row(latency_us=None, tokens={"tok_s": rate}, source="vllm") for rate in (100.0, 50.0)]
    pair = only(*imported)
    assert (pair.verdict, pair.ratio, pair.p) == ("unproven", 2.0, None)


def test_of_many_cells_a_small_p_alone_is_not_enough():
    """One cell of 60 whose p is about 0.01 alone is called, among 59 that did not change it is not."""
    base, new = row(times=(100.0, 104.0, 97.0, 108.0, 101.0)), row(times=(110.0, 112.0, 108.0, 115.0, 109.0))
    alone = only(base, new)
    assert 0.001 < alone.p < 0.05 and alone.verdict == "slower"
    others = [row(f"m-1b.o.decode.b{i}") for i in range(59)]
    many = compare.compare([base, *others], [new, *others])
    assert many.pairs[0].verdict == "unproven" and many.exit_code == 0


def test_a_cell_is_what_is_measured_not_the_code_that_does_it():
    base = row(code={"git_sha": "a", "op_source_hash": "x"}, env={"torch": "2.12"})
    new = row(code={"git_sha": "b", "op_source_hash": "y"}, env={"torch": "2.13"}, run_id="later")
    assert compare.identity(base) == compare.identity(new)
    for change in (
        {"scheme": {"spec": "w4a16-g64"}},
        {"shape": {"M": 16}},
        {"body": {"impl": "triton"}},
        {"model": {"id": "m", "layers_run": 4}},
        {"scheme": {"spec": "w8a8", "kv_spec": "int8"}},
    ):
        assert compare.identity(row(**change)) != compare.identity(base)
    floats = [
        row(level="model", scheme={"spec": spec, "kv_spec": kv}) for spec, kv in (("fp16", "fp16"), ("bf16", None))
    ]
    assert compare.identity(floats[0]) == compare.identity(floats[1])


def test_the_last_row_of_a_cell_counts_and_a_cut_one_does_not():
    run = [row(times=(5.0, 6.0)), row(), row(status="cut", latency_us=None)]
    assert list(compare.latest(run).values()) == [run[1]]


def test_missing_new_failing_and_fixed():
    broken = {"latency_us": None, "status": "failed", "error": {"message": "no memory"}}
    base = [row("m.o.decode.b1"), row("m.o.decode.b2"), row("m.o.decode.b3", **broken), row("m.o.decode.b4", **broken)]
    new = [row("m.o.decode.b2", **broken), row("m.o.decode.b3"), row("m.o.decode.b4", **broken), row("m.o.decode.b5")]
    found = compare.compare(base, new)
    assert [pair.verdict for pair in found.pairs] == ["failing", "fixed", "unmeasured"]
    assert found.missing == ("m.o.decode.b1 w8a8",) and found.added == ("m.o.decode.b5 w8a8",)
    assert found.exit_code == 4
    assert any("no memory" in str(part) for part in compare_table.parts(["a", "b"], [found]))


def test_a_cell_of_the_same_name_says_what_differs():
    found = compare.compare([row(shape={"M": 1})], [row(shape={"M": 2})])
    assert "another shape: {'M': 1} and {'M': 2}" in found.missing[0]
    assert found.exit_code == 3  # nothing in common


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, None),
        ({"kl": 0.0026}, None),  # 10 % and 0.0005 may go
        ({"kl": 0.0030}, "kl 0.002 -> 0.003"),
        ({"top1": 0.974}, "top1 0.98 -> 0.974"),
        ({"ppl_rel": 0.0055}, "ppl_rel"),
        ({"gate": "red", "reasons": ["KL 0.5 is above 0.01"]}, "gate red: KL 0.5"),
        ({"task": {"score": 0.8}}, None),  # the base has no task
    ],
)
def test_quality_has_limits_of_its_own(change, worse):
    base = row(quality=GREEN)
    red = change.get("gate") == "red"
    new = row(times=(50.0, 51.0, 49.0), quality=GREEN | change, **({"latency_us": None} if red else {}))
    found = compare.compare([base], [new])
    (pair,) = found.pairs
    assert pair.verdict == ("red" if red else "faster")
    assert found.exit_code == (4 if worse else 0)
    assert worse in " ".join(pair.worse) if worse else not pair.worse
    words = " ".join(str(part) for part in compare_table.parts(["a", "b"], [found]))
    assert ("bought with quality" in words) == (bool(worse) and not red)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu": {"model": "chip", "threads": 4}}, "card: chip, 2 threads and chip, 4 threads"),
        ({"card": {"spec_id": "h20-96"}}, "card: chip, 2 threads and 1 x h20-96"),
        ({"env": {"driver": "570.1"}}, "driver: None and 570.1"),
        ({"clock": {"mode": "graph", "l2": "warm"}}, "clock mode: wall and graph"),
        ({"quality": GREEN}, "gate: none and tiny by 512 tokens"),
        ({"source": "vllm"}, "measured by: percard and vllm"),
    ],
)
def test_what_may_not_be_compared(change, words):
    found = compare.compare([row()], [row(**change)])
    assert any(words in reason for reason in found.apart) and found.exit_code == 3


def test_groups_are_geometric_means():
    base = [row(f"m-1.5b.{layer}.decode.b1", scheme={"spec": s}) for layer in ("o", "down") for s in ("w8a8", "w4a16")]
    new = [scaled(base[0], 2.0), base[1], scaled(base[2], 0.5), base[3]]
    for by, names in {
        "case": {"m-1.5b.o.decode.b1", "m-1.5b.down.decode.b1"},
        "op": {"linear w8a8", "linear w4a16"},
        "layer": {"o", "down"},
        "model": {"m-1.5b"},
    }.items():
        groups = {group.name: group for group in compare.compare(base, new, group=by).groups}
        assert set(groups) == names
        if by == "layer":
            assert groups["o"].ratio == pytest.approx(2**0.5) and groups["down"].ratio == pytest.approx(0.5**0.5)
        if by == "model":
            assert (
                groups["m-1.5b"].ratio == pytest.approx(1) and groups["m-1.5b"].ci95[0] <= 1 <= groups["m-1.5b"].ci95[1]
            )


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("3 %", 0.03), ("0.03", 0.03), ("0", 0.0)])
def test_shares(text, value):
    assert compare.share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["3", "-1%", "much", "nan", "120%"])
def test_what_is_no_share(text):
    with pytest.raises(ValueError, match=r"--fail .*expected a share"):
        compare.share(text)


def test_tables_fit_and_name_every_verdict(capsys):
    from percard import console

    long = "a-model-with-a-long-name-30b-a3b.gate_up_experts.prefill.t16384.g128.zipf"
    base = [row(), row(long, scheme={"spec": "w4a16-g128"}), row("m.o.decode.b9")]
    new = [scaled(base[0], 1.2), scaled(base[1], 0.7)]
    one = compare.compare(base, new)
    for part in compare_table.parts(["a" * 90, "b" * 90], [one]):
        console.show(part)
    for part in compare_table.parts(["base", "one", "c" * 90], [one, one]):
        console.show(part)
    out = capsys.readouterr().out
    assert all(len(line) <= 120 for line in out.splitlines() if not line.startswith(("-", "b", "c", "one")))
    assert "slower" in out and "faster" in out and "missing: m.o.decode.b9" in out and "1.200 slower" in out


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    for one in rows:
        record.append(path, one)


def test_files_and_folders_are_sources(tmp_path):
    write(tmp_path / "run" / "records.jsonl", [row()])
    write(tmp_path / "days" / "1.jsonl", [row()])
    write(tmp_path / "days" / "2.jsonl", [scaled(row(), 2.0)])
    assert list(sources.by_file(tmp_path / "run")) == [""] and len(sources.load(tmp_path / "run")) == 1
    assert (
        list(sources.by_file(tmp_path / "days")) == ["1.jsonl", "2.jsonl"] and len(sources.load(tmp_path / "days")) == 2
    )
    both = compare.compare(sources.by_file(tmp_path / "days"), sources.by_file(tmp_path / "days"))
    assert [pair.ratio for pair in both.pairs] == [1.0, 1.0]  # each file with its own
    late = compare.compare(sources.by_file(tmp_path / "run"), sources.by_file(tmp_path / "days"))
    assert [pair.ratio for pair in late.pairs] == [2.0]  # against one run the last row counts


def test_git_revisions_are_sources(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], cwd=tmp_path, check=True)

    git("init", "-q")
    write(tmp_path / "results" / "x.jsonl", [row()])
    git("add", ".")
    git("commit", "-qm", "one")
    write(tmp_path / "results" / "x.jsonl", [scaled(row(), 2.0)])
    monkeypatch.chdir(tmp_path)
    (pair,) = compare.compare(sources.by_file("HEAD:results/x.jsonl"), sources.by_file("results/x.jsonl")).pairs
    assert pair.verdict == "slower"
    assert list(sources.by_file("HEAD:results/")) == ["x.jsonl"]
    for wrong, words in (
        ("HEAD:results/y.jsonl", "nor in git"),
        ("nowhere:results/x.jsonl", "nor in git"),
        (":results", "no git revision"),
        ("--help:results", "no git revision"),
    ):
        with pytest.raises(FormatError, match=f"{words}.*; give a JSONL file"):
            sources.load(wrong)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for wrong, words in (("gone.jsonl", "not there"), ("empty.jsonl", "holds no record"), (".", "holds no record")):
        with pytest.raises(FormatError, match=f"{words}; give a JSONL file"):
            sources.load(tmp_path / wrong if wrong != "." else tmp_path)


def test_a_comparison_is_json(tmp_path):
    found = compare.compare([row()], [scaled(row(), 1.5)])
    line = json.loads(json.dumps(found.pairs[0].to_dict()))
    assert line["verdict"] == "slower" and line["ratio"] == pytest.approx(1.5) and line["base_us"] == 100.0
