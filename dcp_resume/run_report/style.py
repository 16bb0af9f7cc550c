"""The page's style: quiet, light or dark as the reader's system is, narrow or wide."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1f2328; --dim: #667079;
  --line: #e3e5e1; --blocked: #d97a2b; --behind: #3f7fb5; --proved: #8fb8d6; --sealed: #5f8f5a;
  --heat: 47, 111, 168; --warn: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --card: #1e2125; --ink: #e4e6e3;
  --dim: #98a1a9; --line: #33383d; --blocked: #e39a55; --behind: #5b9bd0; --proved: #35607f;
  --sealed: #7fb27a; --heat: 96, 165, 220; --warn: #e58570; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 2px 0 10px; color: var(--dim); overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 18px; margin-top: 16px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 18px 0 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
dt { color: var(--dim); font-size: 12.5px; }
dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: 12px; color: var(--dim); line-height: 1.35; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 620px; height: auto; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .ink { fill: var(--ink); }
.grid { stroke: var(--line); }
.restart { stroke: var(--dim); stroke-dasharray: 2 4; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--dim);
  margin-bottom: 6px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px;
  margin-right: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 8px; text-align: right; white-space: nowrap; }
th { font-weight: 400; color: var(--dim); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
th.text, td.text, .heat .note { text-align: left; }
.heat .note { color: var(--dim); padding-left: 12px; }
.heat td.cell { padding: 0; min-width: 12px; height: 22px; text-align: center;
  border: 1px solid var(--card); border-radius: 3px; font-size: 11.5px; }
.heat td.wide { min-width: 64px; padding: 0 6px; }
.heat td.worst { outline: 2px solid var(--blocked); outline-offset: -2px; }
.heat td.name { max-width: 360px; overflow: hidden; text-overflow: ellipsis; }
@media (max-width: 560px) { main { padding: 18px 10px 32px; } section { padding: 12px; }
  .heat td.name { max-width: 150px; } }
.goes td { color: var(--warn); }
ul { margin: 0; padding-left: 18px; color: var(--dim); }
"""
