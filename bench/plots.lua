-- time against length and against density, drawn as docs/images/speed-length.svg and speed-density.svg
--
--   luajit bench/plots.lua [quick]
--
-- f32, B1 H8 D64, one thread; each point is the median of wall times, or of ratios to those of no mask, with which they
-- take turns. Rounds beside which another guest was on the core (bench/sharing.lua) are set aside and replaced.
local sa = require "safeattn"
local calls = require "bench.calls"
local clock = require "bench.clock"
local sharing = require "bench.sharing"

local quick = arg[1] == "quick"
sa.threads(1)

local rounds = quick and 3 or 7

local function turns(...)
  local slices = {...}
  for n, fn in ipairs(slices) do slices[n] = clock.slice(fn, quick and 0 or 5e-3) end
  return clock.turns(slices, rounds, quick and 0 or 0.5, sharing.here, 3)
end

local function median_of(times, ...)
  return clock.median((clock.undisturbed(clock.compare(times, ...), rounds)))
end

-- Milliseconds of forward and backward.
local function milliseconds(length, options)
  local q, k, v, dout = calls.inputs {length = length}
  local function typical(times)
    return median_of(times[1], nil, function(seconds) return seconds * 1e3 end)
  end
  local forward = typical(turns(calls.forward(q, k, v, options)))
  local backward = typical(turns(calls.backward(q, k, v, dout, options)))
  collectgarbage()
  return forward, backward
end

-- What forward and backward take over the same without a mask.
local function over_dense(length, options)
  local q, k, v, dout = calls.inputs {length = length}
  local function ratio(times)
    return median_of(times[2], times[1], function(masked, dense) return masked / dense end)
  end
  local forward = ratio(turns(calls.forward(q, k, v, {}), calls.forward(q, k, v, options)))
  local backward = ratio(turns(calls.backward(q, k, v, dout, {}), calls.backward(q, k, v, dout, options)))
  collectgarbage()
  return forward, backward
end

-- A chart of lines {name =, {x, y}, ...} with logarithmic or linear axes, as SVG. -----------------------------------

local WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 64, 48, 40, 190
local COLOURS = {"#0969da", "#cf222e", "#1a7f37", "#8250df"}

local function axis(from, to, low, high, logarithmic)
  local f = logarithmic and math.log or function(x) return x end
  return function(x) return low + (f(x) - f(from)) / (f(to) - f(from)) * (high - low) end
end

local function chart(options)
  local x = axis(options.x[1], options.x[#options.x], LEFT, WIDTH - RIGHT, options.logarithmic)
  local y = axis(options.y[1], options.y[#options.y], HEIGHT - BOTTOM, TOP, options.logarithmic)
  local parts = {}
  local function add(text, ...) parts[#parts + 1] = text:format(...) end
  add('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">', WIDTH,
    HEIGHT)
  add('<rect width="%d" height="%d" fill="#ffffff"/>', WIDTH, HEIGHT)
  add('<text x="%d" y="22" font-size="15" fill="#1f2328">%s</text>', LEFT, options.title)
  for _, value in ipairs(options.x) do
    add('<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#d1d9e0"/>', x(value), TOP, x(value), HEIGHT - BOTTOM)
    add('<text x="%.1f" y="%d" text-anchor="middle" fill="#59636e">%g</text>', x(value), HEIGHT - BOTTOM + 18, value)
  end
  for _, value in ipairs(options.y) do
    add('<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#d1d9e0"/>', LEFT, y(value), WIDTH - RIGHT, y(value))
    add('<text x="%d" y="%.1f" text-anchor="end" fill="#59636e">%g</text>', LEFT - 8, y(value) + 4, value)
  end
  add('<text x="%.1f" y="%d" text-anchor="middle" fill="#1f2328">%s</text>', (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8,
    options.x_name)
  for n, line in ipairs(options.lines) do
    local points, colour = {}, COLOURS[(n - 1) % #COLOURS + 1]
    for _, point in ipairs(line) do points[#points + 1] = ("%.1f,%.1f"):format(x(point[1]), y(point[2])) end
    add('<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>', table.concat(points, " "), colour,
      line.dashed and ' stroke-dasharray="5 4"' or "")
    add('<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s" stroke-width="2"%s/>', WIDTH - RIGHT + 12, TOP + 20 * n,
      WIDTH - RIGHT + 36, TOP + 20 * n, colour, line.dashed and ' stroke-dasharray="5 4"' or "")
    add('<text x="%d" y="%d" fill="#1f2328">%s</text>', WIDTH - RIGHT + 42, TOP + 20 * n + 4, line.name)
  end
  add "</svg>"
  local file = assert(io.open(options.file, "w"))
  file:write(table.concat(parts, "\n"), "\n")
  file:close()
  print("wrote " .. options.file)
end

-- Round numbers that enclose all the values of lines.
local function decades(lines)
  local low, high = math.huge, 0
  for _, line in ipairs(lines) do
    for _, point in ipairs(line) do low, high = math.min(low, point[2]), math.max(high, point[2]) end
  end
  local ticks, tick = {}, 10 ^ math.floor(math.log10(low))
  while tick < high do
    ticks[#ticks + 1] = tick
    tick = tick * 10
  end
  ticks[#ticks + 1] = tick
  return ticks
end

local function draw_lengths()
  local names = {"dense, forward", "dense, backward", "causal, forward", "causal, backward"}
  local lines, lengths = {}, {}
  for n, name in ipairs(names) do lines[n] = {name = name, dashed = n > 2} end
  for length = 128, quick and 512 or 4096 do
    if 2 ^ math.floor(math.log(length) / math.log(2) + 0.5) == length then
      lengths[#lengths + 1] = length
      for n, options in ipairs {{}, {causal = true}} do
        local forward, backward = milliseconds(length, options)
        table.insert(lines[2 * n - 1], {length, forward})
        table.insert(lines[2 * n], {length, backward})
      end
    end
  end
  chart {file = "docs/images/speed-length.svg", title = "milliseconds against length: f32, B1 H8 D64, one thread",
    x = lengths, y = decades(lines), logarithmic = true, x_name = "queries and keys", lines = lines}
end

-- Time over that of no mask, against the share of visible pairs.
local function draw_densities()
  local length, m = quick and 512 or 2048, sa.mask
  local names = {"blocks of 64, forward", "blocks of 64, backward", "random bits, forward", "random bits, backward"}
  local lines = {}
  for n, name in ipairs(names) do lines[n] = {name = name, dashed = n > 2} end
  for step = 0, 10, quick and 5 or 1 do
    local density = step / 10
    local blocks = sa.rand({length / 64, length / 64}, {seed = 5}):lt(density)
    for n, mask in ipairs {m.blocks(blocks, 64), m.random(density, 1)} do
      local forward, backward = over_dense(length, {mask = mask})
      table.insert(lines[2 * n - 1], {density, forward})
      table.insert(lines[2 * n], {density, backward})
    end
  end
  chart {file = "docs/images/speed-density.svg",
    title = ("time over dense, against density: f32, L=S=%d, D64"):format(length), x = {0, 0.2, 0.4, 0.6, 0.8, 1},
    y = {0, 0.2, 0.4, 0.6, 0.8, 1, 1.2}, x_name = "share of visible pairs", lines = lines}
end

draw_lengths()
draw_densities()
