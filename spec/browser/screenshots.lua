-- makes docs/images anew: LUA_PATH="lua/?.lua;lua/?/init.lua;;" luajit spec/browser/screenshots.lua

local sa = require "safeattn"
local chromium = require "spec.browser.chromium"
local m = sa.mask

-- Three documents with a gap between the first two, causal, in which tokens of twenty kinds look for their like; one
-- value is NaN.
local H, L, E = 8, 160, 32
local ids = {}
for n = 1, L do ids[n] = n <= 52 and 1 or n <= 58 and -1 or n <= 118 and 2 or 3 end
local kinds, copies = sa.randn({1, 1, 20, E}, {seed = 11}), {}
for n = 1, L / 20 do copies[n] = kinds end
local base = sa.cat(copies, 3):expand(1, H, L, E)
local q, k = base + sa.randn({1, H, L, E}, {seed = 12}) * 0.8, base + sa.randn({1, H, L, E}, {seed = 13}) * 0.8
local v, dout = sa.randn({1, H, L, E}, {seed = 14}), sa.randn({1, H, L, E}, {seed = 15})
v:set(1, 3, 77, 5, 0 / 0)
local slopes = {}
for h = 1, H do slopes[h] = 2 ^ -h end
local look = sa.inspect(q, k, v, {mask = m.documents(ids) * m.causal(), alibi = sa.tensor(slopes), scale = 0.1}, dout)

local page = os.tmpname() .. ".html"
assert(look:report(page, {title = "Layer 2 after 400 steps"}))
local images = "docs/images/"
chromium.screenshot(page, "h=5&i=112&j=96&show=weights", images .. "report.png", 1180, 930)
chromium.screenshot(page, "h=3&i=84&j=77&show=dS", images .. "report-dark.png", 1180, 930,
  "--blink-settings=preferredColorScheme=0")
os.remove(page)
