"""The style sheet of a comparison's report."""

from __future__ import annotations

STYLE = """
:root { --paper: #ffffff; --panel: #f5f6f8; --ink: #1c2128; --soft: #59636e; --grid: #d5d9df;
  --accent: #1f6f9f; --good: #1f6f9f; --bad: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --panel: #1d2229; --ink: #e4e8ed; --soft: #9aa4b0; --grid: #3a414b;
    --accent: #6db7e4; --good: #6db7e4; --bad: #f0a24b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .4em; }
h2 { font-size: 1.3rem; margin: 0 0 .8em; padding-bottom: .3em;
  border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 0 0 .5em; }
section { margin-top: 56px; }
.lead { color: var(--soft); font-size: 1.05rem; max-width: 68ch; margin: 0 0 24px; }
.caption, figcaption { color: var(--soft); font-size: .875rem; max-width: 85ch; }
figure { margin: 24px 0 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
figcaption { margin-top: 8px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.tile { background: var(--panel); border-radius: 8px; padding: 14px 18px; }
.tile ul { list-style: none; margin: 4px 0 0; padding: 0; font-size: .875rem; }
.tile li { margin-top: 6px; }
.tile b { display: block; font-size: 1.4rem; line-height: 1.3; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .875rem; }
a { color: var(--accent); }
ul.caption { padding-left: 20px; margin: 14px 0 0; }
#data ul { padding-left: 20px; margin: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 28px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
table caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { padding: 6px 5px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 400; }
tr.difference th, tr.difference td { color: var(--accent); background: var(--panel); }
:not(.difference) + tr.difference th, :not(.difference) + tr.difference td {
  border-top: 2px solid var(--grid); }
.strip { display: flex; gap: 4px; margin-bottom: 5px; }
.strip img { width: 44px; height: 44px; object-fit: contain; image-rendering: pixelated;
  display: block; }
.strip > * { border: 2px solid transparent; border-radius: 4px; padding: 1px; }
.strip .query { width: 50px; height: 50px; margin-right: 8px; }
.strip .same { border: 2px solid var(--good); }
.strip .other { border: 2px dashed var(--bad); }
.key { padding: 0 5px; border-radius: 4px; }
.key.same { border: 2px solid var(--good); }
.key.other { border: 2px dashed var(--bad); }
.finding { background: var(--panel); border-left: 4px solid var(--accent);
  border-radius: 0 8px 8px 0; padding: 14px 18px; margin-bottom: 14px; }
.finding p { margin: 0 0 6px; }
.finding h3::first-letter { text-transform: uppercase; }
.finding ul { margin: 0 0 6px; padding-left: 20px; font-size: .875rem; }
details { border-bottom: 1px solid var(--grid); padding: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: 8px; padding: 14px 18px; overflow-x: auto;
  font-size: .8125rem; line-height: 1.5; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid-page; } }
"""
