"""The style of the report, after that of all pages and of galleries."""

from __future__ import annotations

REPORT_STYLE = """
:root { --s0: #0072B2; --s1: #D55E00; --s2: #009E73; --s3: #CC79A7; --s4: #000000; --s5: #56B4E9; --s6: #B87800; }
@media (prefers-color-scheme: dark) {
  :root { --s0: #4aa3e0; --s1: #f08548; --s2: #2cc79c; --s3: #e0a3c6; --s4: #ffffff; --s5: #9bd3f5; --s6: #f0b840; }
}
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); } .s3 { --own: var(--s3); }
.s4 { --own: var(--s4); } .s5 { --own: var(--s5); } .s6 { --own: var(--s6); } .faint { --own: var(--faint); }
.part { padding: 1rem 1.25rem; margin-bottom: 1.25rem; }
.part .row { box-shadow: none; padding: .5rem 0; margin: 0; border-radius: 0; }
.part p b { margin-right: .5rem; color: var(--edge); }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; }
h3 { margin: .5rem 0; font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th, td { overflow-wrap: normal; }
th { font-weight: 600; white-space: nowrap; }
td bdi { display: block; min-width: 7rem; max-width: 28rem; overflow-wrap: anywhere; }
td small { display: block; color: var(--faint); white-space: nowrap; }
.charts, .columns {
  display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
}
.columns > div, .charts > figure { min-width: 0; }
.chart, .map { margin: 0; }
figure.chart { max-width: 640px; }
figure.map { max-width: 860px; }
.chart svg, .map svg { display: block; width: 100%; height: auto; }
.chart figcaption, .map figcaption { font-size: 14px; }
svg text { font-size: 12.5px; fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke: var(--own); stroke-width: 2; }
svg .mark { fill: var(--own); stroke: var(--card); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .4rem; font-size: 13px; }
.legend span { display: inline-flex; gap: .4rem; align-items: center; min-width: 0; }
.legend svg { flex: none; display: inline-block; width: auto; height: 14px; }
.map path, .map circle { fill: var(--own); stroke: var(--card); stroke-width: .75; }
.map .hollow path { fill: var(--card); stroke: var(--own); stroke-width: 2; }
.map .faint circle { opacity: .55; }
.map .pt { outline: none; cursor: pointer; }
.map .reach { fill: transparent; stroke: none; }
.map .tip { display: none; font-size: 14px; }
.map .pt:hover .tip, .map .pt:focus .tip { display: block; }
.map .pt:hover path, .map .pt:hover circle:not(.reach) { stroke: var(--ink); stroke-width: 2; }
.map:hover .pt:focus:not(:hover) .tip { display: none; }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair { display: flex; gap: .5rem; padding: .5rem; border: 1px solid var(--line); border-radius: 8px; }
.pair figure { flex: 0 0 124px; }
.pair img { border: 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 12.5px; overflow-wrap: normal; }
"""
