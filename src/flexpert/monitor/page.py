"""The frame of the report: one HTML file, styled for screen, phone, dark rooms and paper. Its parts come escaped."""

from html import escape

from flexpert.monitor.plots import COLORS

STYLE = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header p, .note, figcaption, .absent { color: var(--muted) }
h1 { font-size: 1rem; font-weight: 600; margin: 0 }
header p { margin: .15rem 0 0; max-width: 44rem }
h2 { font-size: 1.3rem; line-height: 1.3; font-weight: 600; margin: 0 0 .5rem }
h3 { font-size: 1rem; font-weight: 600; margin: 1.75rem 0 .5rem }
h4 { font-size: .875rem; font-weight: 600; margin: 0 0 .4rem }
section { margin-top: 2.5rem; padding-top: 2rem; border-top: 1px solid var(--rule) }
section > p, section > ul { max-width: 44rem }
section > ul { padding-left: 1.25rem } section > ul li + li { margin-top: .35rem }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .875rem }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
.headline { font-size: 1.45rem; line-height: 1.38; max-width: 48rem; margin: 0; text-wrap: pretty }
#result > h2 { font-size: .875rem; color: var(--muted); font-weight: 400 }
.headline + p { margin: .75rem 0 0; color: var(--muted) }
.note { font-size: .875rem; margin: .5rem 0 0; max-width: 44rem }
.absent { font-style: italic }
.gates.gates { list-style: none; margin: 0; padding: 0 } .gates.gates li { margin: 0 }
.gates li { display: grid; grid-template-columns: 9.5rem 1fr; gap: 0 1rem; padding: .5rem 0;
  border-top: 1px solid var(--rule) }
.gates b { font-weight: 600; white-space: nowrap }
.gates small { display: block; color: var(--muted); font-size: .875rem; font-variant-numeric: tabular-nums }
.good b { color: var(--good) } .bad b { color: var(--bad) } .open b { color: var(--muted) }
.missing { margin-top: 1.75rem; padding: .9rem 1.1rem; background: var(--tint); border-radius: 6px }
.missing h3 { margin: 0 } .missing ul { margin: .4rem 0 0; padding-left: 1.2rem }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.4 }
th, td { padding: .4rem 0 .4rem 1.25rem; text-align: right; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--rule) }
th { font-weight: 400; color: var(--muted); vertical-align: bottom; white-space: normal; line-height: 1.25 }
th:first-child, td:first-child { text-align: left; padding-left: .5rem }
th:last-child, td:last-child { padding-right: .5rem }
tbody tr:last-child td { border-bottom: 0 }
td strong { font-weight: 700 }
tr[data-row="model"] td { background: var(--tint) }
tr[data-row="model"] td:first-child { font-weight: 600 }
tr[data-row="dense"] td { color: var(--muted) }
#experts-table td, #experts-table th { text-align: left }
#experts-table td:nth-child(2) { white-space: normal; min-width: 8rem; overflow-wrap: anywhere }
code { font: .8125rem/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
#experts-table code { white-space: normal; overflow-wrap: anywhere; display: block; min-width: 16rem;
  font-size: .6875rem }
.name { white-space: nowrap }
.name i { display: inline-block; width: .55rem; height: .55rem; border-radius: 2px; margin-right: .4rem }
figure { margin: 0; min-width: 0; overflow-x: auto }
svg { display: block; height: auto; font-family: inherit; stroke-linejoin: round; stroke-linecap: butt }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.75rem 2rem;
  margin-top: 1.25rem }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 50% - .75rem), 1fr)); column-gap: 1.5rem }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem }
.maps figure { max-width: 100% }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; align-items: flex-start; margin-top: 1.25rem }
.pair > .scroll { flex: 0 1 auto; min-width: 0 }
.pair > .scroll + div { flex: 1 1 20rem; min-width: 0 }
.pair > div:last-child h3 { margin-top: 0 }
@media (max-width: 36rem) {
  body { padding: 1.5rem 1rem 3rem } .headline { font-size: 1.2rem }
  .gates li { grid-template-columns: 1fr }
  .scroll table td:first-child, .scroll table th:first-child { position: sticky; left: 0; background: var(--surface);
    white-space: normal; min-width: 6rem; max-width: 8rem }
  .scroll table tr[data-row="model"] td:first-child { background: var(--tint) }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt } nav { display: none }
  h2, h3, h4 { break-after: avoid } figure, tr, li, .pair > div { break-inside: avoid }
  .scroll { overflow: visible } table { font-size: 8pt } th, td { padding-left: .6rem; white-space: normal }
  .missing, tr, i { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""

#: Says to the browser what this module promises: nothing runs and nothing is fetched, whatever a file smuggled in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


#: Stands for a number that there is not.
DASH = "–"


def page(name: str, sections: list[tuple[str, str, str]], what: str = "Flexpert run") -> str:
    """The whole file.

    Args:
        name: of the run or runs; plain text.
        sections: (id, title, HTML), in order.
        what: the page is about.
    """
    light, dark = (";".join(f"--{role}:{pair[side]}" for role, pair in COLORS.items()) for side in (0, 1))
    # Paper is light whatever the screen is, so the dark colours are for the screen alone.
    on_dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    themes = f":root{{color-scheme:light dark;{light}}}\n{on_dark}"
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    bodies = "\n".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>\n{body}</section>' for key, title, body in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(name)} · {what}</title>
<style>
{themes}{STYLE}</style>
</head>
<body>
<header>
<h1>{what}: {escape(name)}</h1>
<p>Experts of one language model, each trained apart by the owner of its data, put together without that data, and
taken out again at will.</p>
<nav>{links}</nav>
</header>
{bodies}
</body>
</html>
"""


def table(head: list[str], rows: list[tuple[str, list[str]]], name: str) -> str:
    """A table from escaped cells.

    Args:
        head: first row.
        rows: (key of the row, cells).
        name: the table's id is `NAME-table`.
    """
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(
        f'<tr data-row="{escape(key)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for key, cells in rows
    )
    return f'<table id="{name}-table"><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def scroll(content: str) -> str:
    """A frame in which wide content scrolls, so that the page does not."""
    return f'<div class="scroll">{content}</div>'


def count(value: float, billion: str = "B") -> str:
    """1234567 → 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def size_of(num_bytes: int) -> str:
    """1234567 → 1.23 MB."""
    text = count(num_bytes, billion="G")
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"
