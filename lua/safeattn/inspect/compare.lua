--- the same inputs by other ways: the fused kernel against the reference, and the three stances on dead rows

local sdpa = require "safeattn.sdpa"
local operations = require "safeattn.operations"
local create = require "safeattn.create"
local contents = require "safeattn.contents"
local views = require "safeattn.views"
local Problem = require "safeattn.inspect.problem"
local matrices = require "safeattn.inspect.matrices"

local M = {}

local INF = math.huge

-- Differences

-- Of each dtype the bits of its mantissa and the exponent of its least normal number.
local precision = {f32 = {23, -126}, f64 = {52, -1022}, f16 = {10, -14}, bf16 = {7, -126}}

-- The distance of x from the next number of its dtype.
local function ulp_of(x, dtype)
  local bits, least = unpack(precision[dtype])
  local _, exponent = math.frexp(math.abs(x))
  return 2 ^ (math.max(exponent - 1, least) - bits)
end

-- The largest difference of two tensors, where it is, and what stands there; the same in ulps of their dtype. NaN
-- agrees with NaN, and infinities with themselves; what is finite in one alone is infinitely far.
local function difference(name, a, b)
  local left, right, shape, dtype = Problem.wide(a), Problem.wide(b), a.shape, a.dtype
  local x, y = left:data(), right:data()
  local most, most_at, ulps, ulps_at, differing = 0, 0, 0, 0, 0
  for n = 0, left:numel() - 1 do
    local u, v = x[n], y[n]
    if not (u == v or u ~= u and v ~= v) then
      differing = differing + 1
      local apart = math.abs(u - v)
      if apart ~= apart then apart = INF end
      if apart > most then most, most_at = apart, n end
      local steps = apart == INF and INF or apart / ulp_of(math.max(math.abs(u), math.abs(v)), dtype)
      if steps > ulps then ulps, ulps_at = steps, n end
    end
  end
  local found = {tensor = name, dtype = dtype, count = left:numel(), differing = differing,
    absolute = {difference = most, index = contents.index_of(most_at, shape),
      fused = differing > 0 and x[most_at] or nil, reference = differing > 0 and y[most_at] or nil},
    ulps = {difference = ulps, index = contents.index_of(ulps_at, shape),
      fused = differing > 0 and x[ulps_at] or nil, reference = differing > 0 and y[ulps_at] or nil}}
  left:free() right:free()
  return found
end

local function run(p, backend)
  local options = {}
  for name, value in pairs(p.options) do options[name] = value end
  options.backend = backend
  local forward = sdpa.forward(p.given.q, p.given.k, p.given.v, options)
  local results = {out = forward.out, lse = forward.lse}
  if p.given.dout then
    for name, gradient in pairs(forward:backward(p.given.dout)) do results[name] = gradient end
  end
  return results, forward.kernel
end

local names = {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "dalibi"}

local function fused_against_reference(p)
  local fused, kernel = run(p, "fused")
  local reference = run(p, "reference")
  local list = {}
  for _, name in ipairs(names) do
    if fused[name] then list[#list + 1] = difference(name, fused[name], reference[name]) end
  end
  return list, kernel
end

-- Stances

local stances = {"zero", "nan", "uniform"}

-- Rows of one head: as many at a time as keep a matrix of scores below this many numbers.
local MOST = 2 ^ 22

-- What rows of one head give under a stance: weights, out and the gradient of the scores.
local function by_stance(scores, v, dout, stance)
  local x = scores:detach()
  x.requires_grad = dout ~= nil
  local weights = sdpa.softmax(x, {dead_rows = stance})
  local out = operations.matmul(weights, v)
  if dout then out:backward(dout) end
  return {weights = weights:detach(), out = out:detach(), dscores = x.grad}
end

-- A sink is one more key, with a value of zeros.
local function with_sink(scores, v, sink)
  if not sink then return scores, v end
  local column = create.full({scores:size(1), 1}, sink, {dtype = "f64"})
  return views.cat({scores, column}, 2), views.cat({v, create.zeros({1, v:size(2)}, {dtype = "f64"})}, 1)
end

local compared = {"weights", "out", "dscores"}

local function count_dead(at, line)
  local s = line:stats()
  at.dead_nan, at.dead_nonzero = at.dead_nan + s.nan, at.dead_nonzero + s.count - s.zero
end

-- A masked NaN of V reaches every stance alike: all of them multiply by it.
local function count_live(at, line, zero)
  local x, y = line:data(), zero:data()
  for n = 0, line:numel() - 1 do
    local apart = math.abs(x[n] - y[n])
    if not (x[n] == y[n] or x[n] ~= x[n] and y[n] ~= y[n]) then
      at.live_difference = math.max(at.live_difference, apart == apart and apart or INF)
    end
  end
end

local function add_rows(found, results, is_dead)
  for _, name in ipairs(compared) do
    for _, stance in ipairs(stances) do
      local t, zero = results[stance][name], results.zero[name]
      if t then
        local at = found[stance][name] or {dead_nan = 0, dead_nonzero = 0, live_difference = 0}
        found[stance][name] = at
        for place = 1, t:size(1) do
          if is_dead(place) then
            count_dead(at, t:select(1, place))
          else
            count_live(at, t:select(1, place), zero:select(1, place))
          end
        end
      end
    end
  end
end

-- The stances over rows first .. last of a head.
local function compare_rows(p, found, b, h, v, first, last)
  local scores, values = with_sink(matrices.scores(p, b, h, {rows = {first, last}}), v,
    Problem.element(p.options.sinks, h))
  local dout = p.dout and Problem.wide(p.dout:select(1, b):select(1, h):narrow(1, first, last - first + 1))
  local results = {}
  for _, stance in ipairs(stances) do results[stance] = by_stance(scores, values, dout, stance) end
  add_rows(found, results, function(place) return not p:is_live(b, h, first + place - 1) end)
end

local function three_stances(p)
  local found = {zero = {}, ["nan"] = {}, uniform = {}}
  local step = math.max(1, math.floor(MOST / math.max(p.S, 1)))
  for b = 1, p.B do
    for h = 1, p.H do
      local v = Problem.wide(p.v:select(1, b):select(1, p:key_head(h)))
      for first = 1, p.S > 0 and p.L or 0, step do
        compare_rows(p, found, b, h, v, first, math.min(first + step - 1, p.L))
      end
    end
  end
  return found
end

-- Text

local Comparison = {}
Comparison.__index = Comparison
Comparison.__describe = function() return "a comparison of back ends and stances" end

local function place_text(at)
  return string.format("%.3g at [%s]: %.9g, %.9g", at.difference, table.concat(at.index, ","), at.fused, at.reference)
end

function Comparison.__tostring(comparison)
  local lines = {comparison.kernel .. " against reference"}
  for _, d in ipairs(comparison.backends) do
    lines[#lines + 1] = d.differing == 0 and string.format("  %-7s the same in all %d elements", d.tensor, d.count)
      or string.format("  %-7s %d of %d differ; most %s; most ulps of %s %s", d.tensor, d.differing, d.count,
        place_text(d.absolute), d.dtype, place_text(d.ulps))
  end
  lines[#lines + 1] = "stances: NaN and non-zero elements in dead rows, largest difference from zero's in live rows"
  for _, stance in ipairs(stances) do
    for _, name in ipairs(compared) do
      local at = comparison.stances[stance][name]
      if at then
        lines[#lines + 1] = string.format("  %-7s %-7s nan %d  non-zero %d  live %.3g", stance, name, at.dead_nan,
          at.dead_nonzero, at.live_difference)
      end
    end
  end
  return table.concat(lines, "\n")
end

--- Runs the same inputs by the fused kernel and by the reference, and under the three stances on dead rows (in f64,
-- from the scores on, without dropout).
-- @return `kernel`; `backends`, a list of {tensor, dtype, count, differing, absolute, ulps}, the last two {difference,
-- index, fused, reference}; `stances`, which has for "zero", "nan" and "uniform", and in each for "weights", "out" and
-- (with a dout) "dscores": dead_nan, dead_nonzero, live_difference. Prints as a table
function M.compare(p)
  local backends, kernel = fused_against_reference(p)
  return setmetatable({kernel = kernel, backends = backends, stances = three_stances(p)}, Comparison)
end

return M
