"""The page of a report: needs nothing from outside, no text lies over another, no red speed, every ratio with its batches."""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from percard.bench import (
    report_csv,
    report_folder,
    report_lines,
    report_plots,
    report_series,
    report_style,
    report_tables,
)
from percard.bench.record import Record, read
from percard.bench.report_lines import BASELINE, Side

from . import many_records as many

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def committed() -> list[Record]:
    return [r for path in sorted(RESULTS.glob("*.jsonl")) for r in read(path)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of models and linears, with plots."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    report_folder.write(folder, [*many.models(), *many.linears()], heading="a run")
    return folder


class Seen(HTMLParser):
    """Tags and attributes of a page; ids, and what refers to them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_the_page_asks_nobody_for_anything(page: Path) -> None:
    text = (page / "report.html").read_text()
    seen = Seen(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert seen.tags.count("svg") > 10
    assert not re.search(r"@import|@font-face|javascript:|https?://|//fonts", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", text))
    for name, value in seen.attributes:
        assert name not in ("src", "srcset", "data", "action", "background") and not name.startswith("on"), name
        assert name not in ("href", "xlink:href") or value.startswith("#"), value
    policy = next(value for name, value in seen.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_references_lead_somewhere(page: Path) -> None:
    text = (page / "report.html").read_text()
    ids = [value for name, value in Seen(text).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)


def test_colours_of_plots_follow_the_page(page: Path) -> None:
    text = (page / "report.html").read_text()
    body = text[text.index("<body") :]
    for color, name in report_style.variables().items():
        assert color not in body.lower(), f"{color} would stay as it is on a dark page"
        assert text.count(f"{name}:") >= 2, f"{name} has no value for light or for dark"
    assert "prefers-color-scheme:dark" in text and "@media print" in text and "max-width:640px" in text
    alone = (page / "plots" / "sizes.svg").read_text()
    ElementTree.fromstring(alone)
    assert "var(" not in alone and report_style.INK in alone and "#ffffff" in alone


def overlaps(figure) -> list[str]:
    """Pairs of texts of a figure that touch, and texts that stick out of it."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    unseen = set()  # labels of ticks beyond the ends of their axis are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        lo, hi = sorted(axis.get_view_interval())
        unseen |= {tick.label1 for tick in axis.get_major_ticks() if not lo <= tick.get_loc() <= hi}
    boxes = []
    for text in figure.findobj(Text):
        words = text.get_text().strip()
        if words and text.get_visible() and text not in unseen:
            box = text.get_window_extent(renderer)
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
            boxes.append((words, box, inside))
    found = [f"{words!r} sticks out" for words, _, inside in boxes if not inside]
    for (a, first, _), (b, second, _) in itertools.combinations(boxes, 2):
        if first.padded(-0.5).overlaps(second.padded(-0.5)):
            found.append(f"{a!r} over {b!r}")
    return found


@pytest.mark.parametrize("make", [many.everything, committed], ids=["many", "committed"])
def test_no_text_of_a_figure_lies_over_another(make) -> None:
    pytest.importorskip("matplotlib")
    drawings, _ = report_plots.figures(make())
    assert len(drawings) > 5
    faults = {}
    for drawing, width, figure in report_plots.drawn(drawings):
        if found := overlaps(figure):
            faults[f"{drawing.name} at {width} inches"] = found[:4]
        for axes in figure.axes:
            if axes.get_label() != "<colorbar>":
                assert axes.get_xlabel(), drawing.name
                assert axes.get_ylabel() or drawing.name.startswith(("rates", "heat")), drawing.name
    assert not faults, faults


def test_the_check_of_overlaps_sees_one() -> None:
    pytest.importorskip("matplotlib")
    figure, (axes,) = report_style.panels(3, 2)
    axes.text(0.5, 0.5, "one label")
    assert overlaps(figure) == []
    axes.text(0.52, 0.5, "another")
    assert overlaps(figure) == ["'one label' over 'another'"]


def test_red_gates_have_no_speed_anywhere() -> None:
    red = {
        (v.side.spec, v.side.cache)
        for g in report_lines.groups(many.models())
        for v in report_lines.verdicts(g)
        if v.quality["gate"] == "red"
    }
    assert red == {("w4a16-g128", "int4"), ("w4a8-g128", "int4")}
    # Even a file that holds what no Record may hold: figures beside a red gate.
    bad = next(r for r in many.models() if report_lines.gate(r) == "red")
    good = next(r for r in many.models() if report_lines.gate(r) == "green" and r.case == bad.case)
    object.__setattr__(bad, "tokens", good.tokens)
    object.__setattr__(bad, "latency_us", good.latency_us)
    (group,) = report_lines.groups([*many.models(), bad])
    wanted = Side(*next(iter({(bad.scheme["spec"], bad.scheme["kv_spec"])})))
    for kind in (report_series.pareto, report_series.rates, report_series.depths, report_series.prices):
        assert all(c.side != wanted for chart in kind(group) for c in chart.curves), kind
    (sizes,) = report_series.sizes(group)
    assert [c.points[0].red for c in sizes.curves if c.side == wanted] == [True]
    (table,) = report_tables.verdict(group)
    line = next(
        dict(zip(table.header, row, strict=True)) for row in table.rows if row[:2] == (wanted.spec, wanted.cache)
    )
    assert line["decode, tok/s"] == line["× FP16 at same batch"] == line["× FP16 at max fit"] == "no figure: gate red"


def test_a_ratio_never_stands_alone() -> None:
    for group in report_lines.groups(many.everything()):
        for table in report_tables.verdict(group):
            for row in table.rows:
                for name, words in zip(table.header, row, strict=True):
                    if "FP16" in name and re.match(r"[\d.]+×", words):
                        assert re.search(r"batch \d+ / \d+", words) and "–" in words, words
                        assert "bound" not in name or "TPOT ≤ 50 ms at p99" in words, words
    words = {w for g in report_lines.groups(many.models()) for v in report_lines.verdicts(g) for w in v.ratios.values()}
    assert "none: baseline does not fit" in words and "baseline" in words


def test_what_is_missing_says_why() -> None:
    (table,) = [report_tables.left_out(many.everything())]
    assert table is not None
    why = {row[0]: row[1] for row in table.rows}
    assert why["oom at load: batch 256 needs 118 GB of 96"] == "1" and why["gemlite: not installed"] == "36"
    (group,) = report_lines.groups(many.models(priced=False))
    (verdict,) = report_tables.verdict(group)
    assert "$/Mtok: not available: no price was given (--usd-hour)" in verdict.notes
    assert "$/Mtok" not in verdict.header and "J/token" in verdict.header
    _, without = report_plots.figures(many.models(priced=False))
    assert any(words.startswith("prices: no price was given") for words in without)


def test_money_and_energy_are_told_or_their_reason() -> None:
    row = many.models()[0]
    assert report_lines.energy_words([row]).endswith("(gpu board)")
    object.__setattr__(row, "energy", {"power_valid": False, "power_reason": "no_counter_is_readable"})
    assert report_lines.energy_words([row]) == "not available: no counter is readable"
    assert report_lines.money_words([row]).endswith("out")


def test_a_ladder_sets_score_against_cost_over_models() -> None:
    (group,) = report_lines.groups(many.ladder())
    assert group.title == "tickets.b8, ladder of models and specs; NVIDIA H20"
    (table,) = report_tables.verdict(group)
    assert [row[0] for row in table.rows][:2] == ["qwen3-0.6b bf16", "qwen3-0.6b w8a8"] and "task score" in table.header
    assert all(row[table.header.index("output, tok/s")] != "-" for row in table.rows)
    (chart,) = report_series.prices(group)
    assert chart.about == {"scored": True, "kind": "total"} and len(chart.curves) == 9
    assert [c.points[0].y for c in chart.curves if c.side.spec == "qwen3-8b bf16"] == [0.84]


def test_prices_of_one_kind_only() -> None:
    """A side without a price of prompt and answer together is not set beside those that have one."""
    rows = many.models()
    for r in rows:
        if r.scheme["kv_spec"] == "bf16" and r.money:
            r.money["usd_per_mtok"]["total"] = 1000.0
    (group,) = report_lines.groups(rows)
    (chart,) = report_series.prices(group)
    assert chart.about["kind"] == "out" and max(p.x for c in chart.curves for p in c.points) < 10


def test_break_even_is_read_between_two_measured_m() -> None:
    def points(*pairs: tuple[float, float]) -> list[report_series.Point]:
        return [report_series.Point(x, y, y, y) for x, y in pairs]

    at, words = report_series.crossing(points((1, 2.0), (64, 2.0), (256, 0.5)))
    assert at == pytest.approx(128) and words == "about 128 (between 64 and 256)"
    assert report_series.crossing(points((1, 2.0), (512, 1.5))) == (None, "above 512, the largest measured")
    assert report_series.crossing(points((1, 0.9), (512, 0.8)))[1] == "never ahead, from M = 1 to 512"
    (grid,) = report_series.grids(many.linears())
    assert grid.ridge["ridge"] == pytest.approx(37, abs=1) and report_series.STACK in grid.layers
    assert report_series.ridges(many.linears(card={"name": "another"})[0]) == {}


def test_every_section_is_in_the_table() -> None:
    records = [*many.everything(), *committed()]
    rows = list(csv.DictReader(io.StringIO(report_csv.text(records))))
    assert len(rows) == len(records)
    first = rows[0]
    assert first["scheme.spec"] == "bf16" and float(first["tokens.vs_fp16.same_batch.ratio"]) == pytest.approx(1)
    assert first["tokens.vs_fp16.same_bound.bound.tpot_ms"] == "50" and first["tokens.vs_fp16.same_batch.lo95"]
    assert not any("samples" in name for name in first)
    op = next(row for row in rows if row["level"] == "op" and row["scheme.spec"] == "w8a8")
    assert op["fastest_float.impl"] == "torch bfloat16" and float(op["fastest_float.ratio"]) > 1


def test_runs_of_other_machines_and_programs_are_not_mixed() -> None:
    elsewhere = [r.__class__(**{**vars(r), "card": {"name": "Another card"}}) for r in many.served()]
    found = report_lines.groups([*many.served(), *elsewhere, *many.served("vllm")])
    assert len(found) == 3 and len({g.title for g in found}) == 3
    assert any("measured by vllm" in g.title for g in found)


def test_old_files_and_both_instruction_sets_stand_apart() -> None:
    titles = [g.title for g in report_lines.groups(committed())]
    assert any("AVX2" in t for t in titles) and any("AVX512" in t for t in titles)
    tables = report_tables.all_of(committed())
    assert tables["verdict"] and tables["break_even"] and tables["rows"]
    for table in itertools.chain(*tables.values()):
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert len({line.count("|") for line in table.markdown().splitlines() if line.startswith("|")}) == 1


def test_a_row_of_a_later_run_that_failed_does_not_hide_a_figure() -> None:
    good = many.models()[0]
    bad = Record(
        cell_key=good.cell_key, level="model", case=good.case, status="failed", card=many.CARD, error={"message": "x"}
    )
    assert report_lines.latest([good, bad]) == [good] and report_lines.latest([bad, good]) == [good]


def test_one_row_or_none_with_a_figure_is_a_report_too(tmp_path: Path) -> None:
    failed = many.models()[-1]
    for records in ([failed], [many.models()[0]], [many.linears()[0]]):
        report_folder.write(tmp_path, records)
        assert "<h2>What this is of</h2>" in (tmp_path / "report.html").read_text()
    imported = Record(cell_key="k", level="serve", case="m.serve.x.b4", source="vllm", scheme={"spec": "bf16"},
                      shape={"batch": 4}, tokens={"tok_s": 100.0}, model={"id": "m"})  # fmt: skip
    report_folder.write(tmp_path, [imported])
    assert "measured by vllm" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_there_are_tables_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "old.svg").write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    files = report_folder.write(tmp_path, many.models(), say=said.append)
    assert said == ["No plots: matplotlib is not installed (pip install 'percard[bench]')."]
    assert {f.name for f in files} == {"report.html", "report.md", "table.csv", "records.jsonl"}
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_text().count("No plots: matplotlib is not installed") == 1
    assert "<svg" not in (tmp_path / "report.html").read_text() and not list((tmp_path / "plots").iterdir())


def test_words_from_records_are_not_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evil = "<script src=http://x.example/a.js></script>"
    row = many.models()[0]
    changes = {"model": row.model | {"id": evil}, "scheme": row.scheme | {"spec": evil}, "code": {"command": evil},
               "quality": row.quality | {"reasons": [evil], "gate": "green"}, "case": evil}  # fmt: skip
    report_folder.write(tmp_path, [Record(**{**vars(row), **changes})], heading=evil)
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_numbers_and_ticks() -> None:
    shown = [report_style.number(v) for v in (0.02, 5, 1000, 12_000, 3e6, 4.5e10, 2e12, 9999)]
    assert shown == ["0.02", "5", "1,000", "12k", "3M", "45G", "2T", "9,999"]
    assert [report_style.tokens(v) for v in (512, 1024, 32768, 1000)] == ["512", "1k", "32k", "1,000"]
    assert (
        report_lines.bound_words({"ttft_ms": 2000, "tpot_ms": 50, "quantile": 0.99})
        == "TTFT ≤ 2,000 ms, TPOT ≤ 50 ms at p99"
    )
    assert (
        report_style.Palette([Side(BASELINE, None), Side("w8a8", "int8")]).look(Side("w8a8", "int8"))["marker"] == "s"
    )
