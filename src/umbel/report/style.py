"""The page's style sheet: light, printable, one column on a phone."""

CSS = """\
:root { color-scheme: light; --ink: #1f2933; --faint: #52606d; --line: #dfe3e8; --wash: #f6f8fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 {
  font-size: clamp(1.5rem, 1.1rem + 1.6vw, 2.1rem); line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.015em;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .35rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.kicker {
  color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .06em; text-transform: uppercase;
  margin: 0 0 .4rem;
}
.lead { font-size: 1.15rem; line-height: 1.5; }
.note, figcaption, caption { color: var(--faint); font-size: .88rem; line-height: 1.5; }
.alert { border-left: 3px solid #d55e00; background: #fdf3ec; padding: .5rem .9rem; border-radius: 0 6px 6px 0; }
.facts {
  display: flex; flex-wrap: wrap; gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 1.5rem 0 0;
}
.facts div { flex: 1 1 8rem; background: #fff; padding: .55rem .8rem; }
.facts dt { color: var(--faint); font-size: .78rem; }
.facts dd { margin: 0; font-weight: 600; font-size: .95rem; line-height: 1.35; overflow-wrap: anywhere; }
.scroll {
  overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .9rem 0 .5rem;
  -webkit-overflow-scrolling: touch;
}
.scroll.tall { max-height: 26rem; overflow-y: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .48rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--faint); font-weight: 600; font-size: .78rem; background: var(--wash); vertical-align: bottom; }
thead .group { border-bottom: 0; padding-bottom: 0; }
th.group { text-align: center; }
th.group span { display: block; border-bottom: 1px solid #c3cad2; padding-bottom: .25rem; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; }
th:first-child, .text { text-align: left; }
td.text { white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }
tr.baseline > * { background: var(--wash); color: var(--faint); }
tr.first-baseline > * { border-top: 2px solid var(--line); }
td.best { font-weight: 700; color: var(--ink); }
td small, th small { display: block; color: var(--faint); font-weight: 400; font-size: .78rem; line-height: 1.2; }
.swatch {
  display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; margin-right: .5rem;
  vertical-align: -.03rem;
}
figure { margin: 1rem 0 0; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2.5rem;
  align-items: start;
}
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1rem 1.25rem;
  align-items: start;
}
.panels h3 { margin: .25rem 0; }
.scale { max-width: 30rem; }
figcaption { margin: .5rem 0 0; max-width: 46rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
svg image { image-rendering: pixelated; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--faint); padding: 0;
  margin: .5rem 0; list-style: none;
}
details { border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; background: #fff; }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 600; font-size: .95rem; }
details > :not(summary) { margin: .3rem .9rem .9rem; }
details h3 { font-size: .85rem; }
pre {
  background: var(--wash); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--faint); font-size: .82rem; }
@media (max-width: 480px) { main { padding: 1.5rem 1rem 2rem; } th, td { padding: .45rem .55rem; } }
@media print {
  main { max-width: none; padding: 0; } body { font-size: 11pt; }
  figure, .facts, .scroll, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll, .scroll.tall { overflow: visible; max-height: none; } table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
