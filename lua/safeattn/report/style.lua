-- how the page of a report looks: dark or light as the reader has it, one column on a phone

return [[
:root { color-scheme: light dark; --paper: #fbfbfa; --ink: #1d1f24; --soft: #666b75; --line: #d9dbe0; --card: #fff;
  --accent: #1f62c9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #e6e7ea; --soft: #9aa0ab; --line: #33373f; --card: #1c1f25; --accent: #7db0ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); }
code, pre, table, output, .ticks { font-family: ui-monospace, monospace; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; max-height: 20rem; overflow: auto; }
main { display: grid; grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); gap: 1rem; margin-top: 1rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
.wide { grid-column: 1 / -1; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0; }
button, select, input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .6rem; min-height: 2.2rem; }
button { cursor: pointer; } input { width: 6rem; }
button[aria-pressed=true] { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#heads { display: flex; gap: .4rem; overflow-x: auto; padding: .2rem; }
#heads button { padding: .3rem; text-align: center; font-size: .8rem; flex: none; }
#heads canvas { display: block; width: 72px; height: 72px; margin-bottom: .15rem; }
canvas { image-rendering: pixelated; display: block; }
#frame { position: relative; margin: 1.4rem 0 0 3.2rem; cursor: crosshair; touch-action: pan-y; }
#picture { width: 100%; height: 100%; }
.ticks span { position: absolute; font-size: .7rem; color: var(--soft); white-space: nowrap; }
.ticks .key { top: -1.25rem; transform: translateX(-50%); }
.ticks .query { left: -.4rem; transform: translate(-100%, -50%); }
#across, #down { position: absolute; pointer-events: none; border: 1px solid var(--accent); min-width: 3px;
  min-height: 3px; }
#across { left: 0; width: 100%; border-width: 1px 0; } #down { top: 0; height: 100%; border-width: 0 1px; }
.dead { position: absolute; background: #eb2828; }
output { display: block; min-height: 2.9em; margin-top: .6rem; }
.legend { font-size: .8rem; } .legend span { white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }
.legend canvas { display: inline-block; width: 9rem; height: .8em; margin: 0 .5em; vertical-align: middle; }
#strip { width: 100%; height: 56px; margin: .5rem 0; }
.table { max-height: 24rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: .78rem; }
th, td { text-align: right; padding: .15rem .35rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--card); }
th button { padding: .1rem 0; min-height: 0; border: 0; background: none; font-weight: 600; }
td:first-child, th:first-child { text-align: left; }
tr[aria-selected=true] { background: color-mix(in srgb, var(--accent) 18%, transparent); }
@media (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); } body { padding: .6rem; font-size: 16px; } }
]]
