"""report.html: one file that needs nothing else, on paper, on a dark or a light screen, and on a phone.

No script, no font, no picture and no style sheet from outside; a content security policy in its head forbids the browser to
fetch any. Plots are inline SVG. Every figure is drawn twice, for a page and for a phone; a media query shows one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from . import report_style as style
from .report_style import Drawing
from .report_tables import Table

_CSS = """
:root{color-scheme:light dark;--page:#f4f5f7;--good:#00664d;--goodbg:#dff3ec;--redbg:#fbe3e1;--head:#eef0f3;LIGHT}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--good:#6fe0bd;--goodbg:#173b31;--redbg:#4a2220;--head:#272c33;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1248px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}h2{font-size:20px;margin:36px 0 10px}h3{font-size:15.5px;margin:0 0 8px}
p{margin:0 0 10px}.sub,.note,figcaption{color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:10px 0 0}a{color:inherit}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px;margin:0 0 16px;min-width:0}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}.facts code{font-size:13px}
.scroll{overflow-x:auto}
table.stack{font-size:12.5px}.stack th,.stack td{padding:6px 7px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
th{background:var(--head);font-weight:600;vertical-align:bottom}
th.l,td.l{text-align:left}tr:last-child td{border-bottom:0}
td:first-child{font-weight:600}
.small{display:block;color:var(--muted);font-size:11.5px;max-width:150px}.small.n{max-width:none}
.n{white-space:nowrap}
.gate{display:inline-block;padding:0 8px;border-radius:9px;font-weight:600;background:var(--head)}
.green{background:var(--goodbg);color:var(--good)}.red{background:var(--redbg);color:var(--red)}
ul{margin:10px 0 0;padding-left:20px;font-size:13px}
.plots{display:grid;grid-auto-flow:dense;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.plots figure{margin:0}.plots figure.whole{grid-column:1/-1}
figure svg{display:block;max-width:100%;height:auto;margin:0 auto}
figcaption{font-size:12.5px;margin-top:8px}
.phone{display:none}
details summary{cursor:pointer;font-weight:600}details[open] summary{margin-bottom:10px}
@media (max-width:1100px){.plots{grid-template-columns:1fr}}
@media (max-width:640px){
main{padding:16px 10px 48px}h1{font-size:21px}.card{padding:10px}
.facts{grid-template-columns:1fr}.facts dd{margin-bottom:6px}
.desk{display:none}.phone{display:block}
table.stack thead{display:none}table.stack tr{display:block;border-bottom:2px solid var(--grid);padding:8px 0}table.stack tr:last-child{border:0}
table.stack td{display:grid;grid-template-columns:44% 56%;text-align:left;border:0;padding:2px 0}
table.stack td::before{content:attr(data-name);color:var(--muted);font-weight:400;padding-right:10px}
table.stack td:first-child{font-size:15px}table.stack .small{max-width:none}
}
@media print{:root{--page:#fff;LIGHT--good:#00664d;--goodbg:#dff3ec;--redbg:#fbe3e1;--head:#eef0f3}
body{font-size:11px}main{max-width:none;padding:0}nav{display:none}.scroll{overflow:visible}table{font-size:9px}th,td{padding:3px 4px}
.small{font-size:8px}.n{white-space:normal}figure,tr{break-inside:avoid}.card{border:0;padding:0}}
"""


def page(
    heading: str,
    facts: Sequence[tuple[str, Sequence[str]]],
    tables: Mapping[str, Sequence[Table]],
    figures: Sequence[tuple[Drawing, str, str]],
    notes: Sequence[str],
    without: Sequence[str],
) -> str:
    """The whole file. `figures` are (drawing, svg for a page, svg for a phone) from report_style.svg."""
    sections: list[tuple[str, str, str]] = []

    def section(name: str, words: str, body: str) -> None:
        if body:
            sections.append((name, words, body))

    section("verdict", "Verdict", "".join(_card(t, stack=True) for t in tables["verdict"]))
    section("missing", "Not compared here", "".join(_card(t, named=False) for t in tables["missing"]))
    drawn = "".join(_figure(number, *figure) for number, figure in enumerate(figures))
    section("plots", "Plots", (f'<div class="plots">{drawn}</div>' if drawn else "") + _list(without, "Not drawn: "))
    section("break-even", "Break-even batch", "".join(_card(t) for t in tables["break_even"]))
    section("rows", "All rows", "".join(_card(t) for t in tables["rows"]))
    section("notes", "What a reader must know", f'<div class="card">{_list(notes)}</div>' if notes else "")
    links = "".join(f'<a href="#{name}">{escape(words)}</a>' for name, words, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{escape(words)}</h2>{text}</section>' for n, words, text in sections)
    css = _CSS.replace("LIGHT", style.css(False)).replace("DARK", style.css(True)).strip()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{css}</style></head><body><main>"
        f'<h1>{escape(heading)}</h1><p class="sub">Every figure is a median with its spread; every ratio names both batches. '
        f"Quality comes before speed: a red gate has no speed.</p><nav>{links}</nav>"
        f'<section id="about"><h2>What this is of</h2><div class="card"><dl class="facts">{_facts(facts)}</dl></div></section>'
        f"{body}</main></body></html>\n"
    )


def _facts(facts: Sequence[tuple[str, Sequence[str]]]) -> str:
    out = []
    for name, lines in facts:
        told = [f"<code>{escape(line)}</code>" if name == "command" else escape(line) for line in lines]
        out.append(f"<dt>{escape(name)}</dt><dd>{'<br>'.join(told)}</dd>")
    return "".join(out)


def _card(table: Table, *, stack: bool = False, named: bool = True) -> str:
    head = "".join(f'<th class="{"l" if i in table.left else ""}">{escape(h)}</th>' for i, h in enumerate(table.header))
    body = []
    for row in table.rows:
        cells = []
        for i, words in enumerate(row):
            name = f' data-name="{escape(table.header[i])}"' if stack else ""
            cells.append(
                f"<td{name}{' class=l' if i in table.left else ''}><div>{_cell(words, i == table.gate)}</div></td>"
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    drawn = f'<div class="scroll"><table{" class=stack" if stack else ""}><thead><tr>{head}</tr></thead><tbody>'
    drawn += f"{''.join(body)}</tbody></table></div>{_list(table.notes)}"
    if table.long and len(table.rows) > 24:
        return (
            f'<details class="card"><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>{drawn}</details>'
        )
    return f'<div class="card">{f"<h3>{escape(table.title)}</h3>" if named else ""}{drawn}</div>'


def _cell(words: str, is_gate: bool) -> str:
    """A gate as a badge; a figure with its spread and its batches below it, so that the figure is what one reads first."""
    if is_gate:
        return f'<span class="gate {words}">{escape(words)}</span>'
    first, bracket, rest = words.partition(" (")
    if bracket and first[:1].isdigit():
        spread, _, more = rest.partition(")")
        batch, _, bound = more.strip(", ").partition(", ")
        below = f'<span class="small n">({escape(spread)})</span>'
        below += "".join(
            f'<span class="small{kind}">{escape(w)}</span>' for w, kind in ((batch, " n"), (bound, "")) if w
        )
        return f'<span class="n">{escape(first)}</span>{below}'
    return escape(words)


def _figure(number: int, drawing: Drawing, wide: str, narrow: str) -> str:
    pictures = [
        f'<div class="{kind}">{style.inline(text, f"{kind[0]}{number}", drawing.title)}</div>'
        for kind, text in (("desk", wide), ("phone", narrow))
    ]
    whole = " whole" if drawing.whole else ""
    return f'<figure class="card{whole}">{"".join(pictures)}<figcaption>{escape(drawing.caption)}</figcaption></figure>'


def _list(lines: Sequence[str], before: str = "") -> str:
    return f'<ul class="note">{"".join(f"<li>{escape(before + line)}</li>" for line in lines)}</ul>' if lines else ""
