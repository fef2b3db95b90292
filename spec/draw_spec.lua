-- pictures in the terminal: what every cell says, reductions that lose nothing, colours, and bad arguments

local sa = require "safeattn"
local helper = require "spec.helper"
local child = require "spec.child"
local m = sa.mask

-- The lines of a picture.
local function lines_of(text)
  local lines = {}
  for line in text:gmatch "([^\n]*)\n" do lines[#lines + 1] = line end
  return lines
end

-- The text without its colours.
local function plain(text)
  return (text:gsub("\27%[[%d;]*m", ""))
end

-- What is drawn in the rows of a picture without colours, without ticks.
local function cells_of(text, rows)
  local lines, cells = lines_of(text), {}
  local margin = #lines[2]:match "^ +"
  for r = 1, rows do cells[r] = lines[2 + r]:sub(margin + 1) end
  return cells
end

local function show(mask, options)
  options.to, options.colours = "string", options.colours or "none"
  return mask:show(options)
end

local function heat(t, options)
  options = options or {}
  options.to, options.colours = "string", options.colours or "none"
  return t:heat(options)
end

describe("mask:show", function()
  it("draws each pair, dead rows and dead keys, ticks and a legend", function()
    local text = show(m.documents {1, 1, -1, 2, 2} * m.causal(), {L = 5, S = 5})
    assert.equal([[
documents * causal  L=5 S=5  24% visible  1 dead row
  1
1 #....
  ##...
  .....x
  ...#.
5 ...##
    x
# all pairs visible, 1-9 a part of them
. masked  x right: dead row  x below: dead key
]], text)
  end)

  it("shows of every mask what its dense form has", function()
    local masks = {m.causal "bottom-right", m.window(3, 1), m.padding {9, 4}, m.random(0.3, 5), -m.causal(),
      m.prefix(3) + m.causal(), m.global(2), m.none(), m.all(),
      m.fn(function(b, h, i, j) return (i * j + b + h) % 3 == 0 end)}
    for _, mask in ipairs(masks) do
      local dense = mask:dense{B = 2, H = 2, L = 14, S = 17}
      for b = 1, dense:size(1) do
        for h = 1, dense:size(2) do
          local cells = cells_of(show(mask, {B = 2, H = 2, L = 14, S = 17, b = b, h = h}), 14)
          for i = 1, 14 do
            for j = 1, 17 do
              assert.equal(dense:get(b, h, i, j) and "#" or ".", cells[i]:sub(j, j), tostring(mask))
            end
            assert.equal(not cells[i]:sub(1, 17):find "#", cells[i]:sub(18) == "x")
          end
        end
      end
    end
  end)

  it("counts the visible pairs of every cell when it reduces, across tiles of the plan and odd sizes", function()
    local draw = require "safeattn.draw.reduce"
    local core = require "safeattn.core"
    local expression = require "safeattn.mask_expression"
    for _, mask in ipairs {m.causal(), m.random(0.4, 3), m.window(70, 3), m.causal() - m.padding {200}} do
      local L, S, rows, columns = 301, 263, 23, 37
      local cell = core.ffi.new "const sa_plan *[1]"
      assert.equal(0, core.lib.sa_mask_plan(cell, expression.nodes(mask, "test", 1, 1, L, S), 0, -1, -1, 1, 1, L, S))
      local picture = draw.plan("test", cell[0], 0, 0, rows, columns)
      local dense = mask:dense{L = L, S = S}:data()
      for r = 0, rows - 1 do
        for c = 0, columns - 1 do
          local seen, count = 0, 0
          for i = math.floor(r * L / rows), math.floor((r + 1) * L / rows) - 1 do
            for j = math.floor(c * S / columns), math.floor((c + 1) * S / columns) - 1 do
              count = count + 1
              if dense[i * S + j] then seen = seen + 1 end
            end
          end
          assert.equal(seen / count, picture.value[r * columns + c])
          assert.equal(seen > 0, picture.kind[r * columns + c] == draw.NUMBER)
        end
      end
      core.lib.sa_plan_release(cell[0])
    end
  end)

  it("has its counts from C, which checks every argument", function()
    local core = require "safeattn.core"
    local expression = require "safeattn.mask_expression"
    local ffi, lib = core.ffi, core.lib
    local cell, mask = ffi.new "const sa_plan *[1]", m.random(0.5, 1)
    assert.equal(0, lib.sa_mask_plan(cell, expression.nodes(mask, "test", 2, 3, 4, 5), 0, -1, -1, 2, 3, 4, 5))
    local plan, counts = cell[0], ffi.new "int64_t[20]"
    local function message(...)
      assert.equal(lib.SA_INVALID, ffi.cast("sa_status", lib.sa_plan_coverage(...)))
      return ffi.string(lib.sa_last_error())
    end
    assert.equal("sa_plan_coverage: plan: got NULL, wanted a plan", message(nil, 0, 0, 1, 1, counts))
    assert.equal("sa_plan_coverage: visible: got NULL, wanted a place for the counts", message(plan, 0, 0, 1, 1, nil))
    for _, size in ipairs {{0, 1}, {5, 1}, {1, 0}, {1, 6}, {-1, 1}} do
      assert.equal(string.format("sa_plan_coverage: rows, columns: got %d, %d, wanted 1 to 4 and 1 to 5", unpack(size)),
        message(plan, 0, 0, size[1], size[2], counts))
    end
    assert.matches("batch: got %-1", message(plan, -1, 0, 1, 1, counts))
    assert.matches("head: got %-1", message(plan, 0, -1, 1, 1, counts))
    assert.equal(0, lib.sa_plan_coverage(plan, 1, 2, 4, 5, counts)) -- the mask is alike for all batches and heads
    lib.sa_plan_release(plan)
  end)

  it("never loses a dead row or a dead key in a reduction", function()
    local ids = {}
    for n = 1, 5000 do ids[n] = n == 1234 and -1 or 1 end
    for _, colours in ipairs {"none", "256", "true"} do
      local text = plain(show(m.documents(ids), {colours = colours, width = 60, height = 30}))
      local marked = 0
      for _, line in ipairs(lines_of(text)) do
        if line:match "[x×]$" and not line:find "dead" then marked = marked + 1 end
      end
      assert.equal(2, marked) -- the line of the row, and the one below for the key
      assert.matches("right: dead row", text, 1, true)
      assert.matches("below: dead key", text, 1, true)
    end
  end)

  it("draws from the plan: a mask of 2^34 pairs", function()
    local text = show(m.causal(), {L = 131072, S = 131072, width = 40, height = 24})
    assert.matches("causal  L=131072 S=131072  50% visible", text, 1, true)
    local cells = cells_of(text, 16)
    assert.equal(31, #cells[1])
    for r, row in ipairs(cells) do
      for c = 1, #row do
        local below, above = (r - 1) / #cells >= c / #row, r / #cells <= (c - 1) / #row
        local got = row:sub(c, c)
        assert.equal(below and "#" or above and "." or "partly", got:match "^[1-9]$" and "partly" or got)
      end
    end
  end)

  it("draws a mask of nothing", function()
    assert.equal("all  L=0 S=3  0% visible\n(empty)\n", show(m.all(), {L = 0, S = 3}))
    assert.equal("all  L=3 S=0  0% visible  3 dead rows\n(empty)\n", show(m.all(), {L = 3, S = 0}))
  end)

  it("prints unless it is asked for the text", function()
    assert.equal("causal  L=2 S=2  75% visible\n  1\n1 #.\n  ##\n# all pairs visible, 1-9 a part of them\n. masked\n",
      child.must_run "io.write(tostring(require('safeattn').mask.causal():show{L=2,S=2} or ''))")
  end)

  it("says what is wrong with its arguments", function()
    local mask = m.causal()
    local function message(options) return helper.message_of(mask.show, mask, options) end
    assert.equal("safeattn.mask:show: L: got nil, wanted the number of queries, which this mask does not fix",
      message())
    assert.equal('safeattn.mask:show: to: got 3, wanted "string" (or nothing, to print)',
      message {L = 1, S = 1, to = 3})
    assert.equal('safeattn.mask:show: colours: got "red", wanted "true", "256" or "none"',
      message {L = 1, S = 1, colours = "red"})
    assert.equal('safeattn.mask:show: map: got "jet", wanted diverging, grey or sequential',
      message {L = 1, S = 1, map = "jet"})
    assert.equal("safeattn.mask:show: b: got 3, wanted an integer from 1 to 2", message {L = 1, S = 1, B = 2, b = 3})
    assert.equal("safeattn.mask:show: width: got 3, wanted an integer from 16 to 10000",
      message {L = 1, S = 1, width = 3})
    assert.matches("got unknown option widht, .*did you mean width%?", message {L = 1, S = 1, widht = 30})
  end)
end)

describe("tensor:heat", function()
  it("tells NaN, infinities and exact zeros from numbers, and signs apart", function()
    local t = sa.tensor {{1, 0, -1, 0 / 0}, {math.huge, -math.huge, 1e-30, -0.5}}
    assert.equal([[
f32[2,4]  min -1  max 1  #nan 1  #inf 2
  1
1 90iN
  ^v1e
1-9: up to 1, a-i: down to -1
0 exact zero  N NaN  ^ +Inf  v -Inf
]], heat(t))
  end)

  it("uses the whole range for values of one sign", function()
    assert.same({"159"}, cells_of(heat(sa.tensor {{10, 15, 20}}), 1))
  end)

  it("draws the matrix that indices choose, the first by default, and a vector as a row", function()
    local t = sa.arange(24):view(2, 3, 2, 2)
    assert.matches("^f32%[2,3,2,2%]%[2,3,:,:%]  min 20  max 23\n", heat(t, {2, 3}))
    assert.matches("[1,1,:,:]", heat(t), 1, true)
    assert.matches("[2,1,:,:]", heat(t, {2}), 1, true)
    assert.same({"159"}, cells_of(heat(sa.tensor {10, 15, 20}), 1))
    assert.same({"90", "99"}, cells_of(heat(sa.tensor {{true, false}, {true, true}}), 2))
  end)

  it("reads views and every dtype, and leaves the tape alone", function()
    local t = sa.tensor({{1, 2}, {3, 4}}, {requires_grad = true})
    assert.same({"16", "39"}, cells_of(heat(t:transpose(1, 2)), 2))
    for _, dtype in ipairs {"f64", "f16", "bf16", "i32", "i64"} do
      assert.same({"13", "69"}, cells_of(heat(t:detach():to(dtype)), 2))
    end
  end)

  it("never loses a single odd element in a reduction", function()
    for _, odd in ipairs {{0 / 0, "N"}, {math.huge, "^"}, {-math.huge, "v"}, {1e6, "9"}, {-1e6, "i"}} do
      local t = sa.full({900, 700}, 0.001)
      t:set(613, 457, odd[1])
      local found = {}
      for r, row in ipairs(cells_of(heat(t, {width = 50, height = 30}), 20)) do
        for c = 1, #row do
          if row:sub(c, c) == odd[2] then found[#found + 1] = {r, c, #row} end
        end
      end
      assert.equal(1, #found)
      assert.equal(math.floor((457 - 1) / 700 * found[1][3]) + 1, found[1][2])
    end
  end)

  it("draws the same cells in colour, two rows to a line", function()
    local t = sa.tensor {{1, 0 / 0, 0, 1}, {1, 1, 0, -1}, {1, 1, 1, math.huge}}
    local lines = lines_of(plain(heat(t, {colours = "true"})))
    assert.equal("1 ▀N0▀", (lines[3]:gsub("1  ", "1 ▀", 1)))
    assert.equal("  ▀▀▀▲", lines[4])
    local text = heat(t, {colours = "true"})
    assert.matches("48;2;255;0;255mN", text, 1, true)
    assert.not_matches("[34]8;2;", heat(t, {colours = "256"}))
    assert.matches("48;5;201mN", heat(t, {colours = "256"}), 1, true)
  end)

  it("says what is wrong with its arguments", function()
    local t = sa.ones {2, 3, 4}
    local function message(options) return helper.message_of(t.heat, t, options) end
    assert.equal("safeattn.heat: index 1: got 3, wanted an integer from 1 to 2", message {3})
    assert.equal("safeattn.heat: indices: got 2, wanted at most 1: the last two dims of f32[2,3,4] are drawn",
      message {1, 1})
    assert.equal("safeattn.heat: options: got 3, wanted a table", message(3))
    assert.equal("safeattn.heat: t: got f32[], wanted a tensor with dims",
      helper.message_of(t.heat, sa.tensor(1)))
    assert.equal("safeattn.heat: t: got nil, wanted a tensor", helper.message_of(t.heat))
    assert.equal('safeattn.heat: file: got true, wanted the name of a file', message {file = true})
  end)
end)

describe("look:heat", function()
  local function look(dout)
    local function random(seed) return sa.randn({1, 2, 5, 4}, {seed = seed}) end
    return sa.inspect(random(1), random(2), random(3), {mask = m.documents {1, 1, -1, 2, 2} * m.causal()},
      dout and random(4))
  end

  it("tells what is masked from what is zero", function()
    local text = look(true):heat{what = "dscores", h = 2, to = "string"}
    local cells = cells_of(text, 5)
    assert.equal("weights  b=1 h=1  L=5 S=5", lines_of(look():heat{to = "string"})[1])
    assert.equal("dscores  b=1 h=2  L=5 S=5", lines_of(text)[1])
    assert.equal("0....", cells[1]) -- one key: its weight is 1 and its gradient 0
    assert.equal(".....x", cells[3])
    assert.matches("^[1-9a-i][1-9a-i]%.%.%.$", cells[2])
    assert.matches("masked  0 exact zero  x right: dead row  x below: dead key", text, 1, true)
  end)

  it("says what is wrong with its arguments", function()
    local one = look()
    assert.equal('safeattn.inspect():heat: what: got "wieghts", wanted dscores, scores or weights',
      helper.message_of(one.heat, one, {what = "wieghts"}))
    assert.equal("safeattn.inspect():heat: h: got 3, wanted an integer from 1 to 2",
      helper.message_of(one.heat, one, {h = 3}))
    assert.matches("dout: got nil", helper.message_of(one.heat, one, {what = "dscores"}), 1, true)
  end)
end)

describe("the terminal", function()
  -- What depth() says in an environment, when standard output is a terminal (util-linux has `script`) or not.
  local function depth(environment, tty)
    local variables = {TERM = false, COLORTERM = false, NO_COLOR = false}
    for name, value in pairs(environment) do variables[name] = value end
    local program = [[
local depth = require("safeattn.draw.terminal").depth()
io.stderr:write("depth ", depth, "\n")]]
    if not tty then return child.must_run(program, {environment = variables}):match "depth (%w+)" end
    local path = os.tmpname()
    local file = assert(io.open(path, "w"))
    file:write(program)
    file:close()
    local set = {}
    for name, value in pairs(variables) do set[#set + 1] = value and name .. "=" .. value or "-u " .. name end
    table.sort(set)
    local output = child.command(string.format("env %s LUA_PATH='lua/?.lua;lua/?/init.lua;;' script -qec 'luajit %s'"
      .. " /dev/null </dev/null", table.concat(set, " "), path))
    os.remove(path)
    return output:match "depth (%w+)"
  end

  it("gets the colours that it says it has", function()
    assert.equal("true", depth({TERM = "xterm-256color", COLORTERM = "truecolor"}, true))
    assert.equal("true", depth({TERM = "xterm", COLORTERM = "24bit"}, true))
    assert.equal("256", depth({TERM = "xterm-256color"}, true))
    assert.equal("none", depth({TERM = "vt100"}, true))
    assert.equal("none", depth({}, true))
  end)

  it("gets none when it wants none", function()
    assert.equal("none", depth({TERM = "xterm-256color", COLORTERM = "truecolor", NO_COLOR = "1"}, true))
    assert.equal("none", depth({TERM = "dumb", COLORTERM = "truecolor"}, true))
    assert.equal("none", depth({TERM = "xterm-256color", COLORTERM = "truecolor"}, false))
  end)
end)

describe("a colour map", function()
  local colours = require "safeattn.draw.colours"

  -- Lightness in OKLab.
  local function lightness(rgb)
    local function linear(x)
      x = x / 255
      return x <= 0.04045 and x / 12.92 or ((x + 0.055) / 1.055) ^ 2.4
    end
    local r, g, b = linear(rgb[1]), linear(rgb[2]), linear(rgb[3])
    local l = 0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b
    local a = 0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b
    local s = 0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b
    return 0.2104542553 * l ^ (1 / 3) + 0.7936177850 * a ^ (1 / 3) - 0.0040720468 * s ^ (1 / 3)
  end

  it("rises evenly in lightness, so that it can be read without seeing hues", function()
    for _, name in ipairs {"sequential", "grey"} do
      local map = colours.map("test", name)
      local step = (lightness(map[256]) - lightness(map[1])) / 255
      for n = 1, 241, 16 do
        assert.is_true(math.abs(lightness(map[n + 15]) - lightness(map[n]) - 15 * step) < 0.2 * 15 * step + 0.004)
      end
    end
  end)

  it("diverges alike on both sides of the lightest colour", function()
    local map = colours.map("test", "diverging")
    for n = 1, 128 do
      assert.is_true(math.abs(lightness(map[n]) - lightness(map[257 - n])) < 0.006)
      if n > 1 then assert.is_true(lightness(map[n]) >= lightness(map[n - 1]) - 0.004) end
      if n < 100 then assert.is_true(map[n][3] > map[n][1] and map[257 - n][1] > map[257 - n][3]) end
    end
  end)
end)
