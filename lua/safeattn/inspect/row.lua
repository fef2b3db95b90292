--- one query: its scores, weights and their gradients by the definition, in f64

local new_table = require "table.new"
local core = require "safeattn.core"
local Problem = require "safeattn.inspect.problem"
local reasons = require "safeattn.inspect.reasons"

local ffi, lib = core.ffi, core.lib

local M = {}

local doubles, integers = ffi.typeof "double[?]", ffi.typeof "int32_t[?]"
local INF = math.huge

-- Room for the lists of one row: element n (from 0) belongs to key[n], which counts from 0.
local function scratch_of(p)
  if not p.scratch then
    local n = math.max(p.S, 1)
    p.scratch = {key = integers(n), s = doubles(n), slope = doubles(n), p = doubles(n), keep = doubles(n),
      dp = doubles(n), ds = doubles(n), k_squares = doubles(n), v_squares = doubles(n)}
  end
  return p.scratch
end

local function list_keys(plan, b, h, i, S, key)
  local n = 0
  for j = 0, S - 1 do
    if lib.sa_plan_visible(plan, b - 1, h - 1, i - 1, j) then
      key[n] = j
      n = n + 1
    end
  end
  return n
end

-- to[n] = x . rows[key[n]], and squares[n] = rows[key[n]] . rows[key[n]], for which the row need not be read again. Two
-- sums each, so that an addition need not wait for the one before it.
local function dots(x, rows, step, width, key, count, to, squares)
  for n = 0, count - 1 do
    local row = rows + key[n] * step
    local s0, s1, r0, r1 = 0.0, 0.0, 0.0, 0.0
    for d = 0, width - 2, 2 do
      local a, b = row[d], row[d + 1]
      s0, r0 = s0 + x[d] * a, r0 + a * a
      s1, r1 = s1 + x[d + 1] * b, r1 + b * b
    end
    if width % 2 == 1 then
      local a = row[width - 1]
      s0, r0 = s0 + x[width - 1] * a, r0 + a * a
    end
    to[n], squares[n] = s0 + s1, r0 + r1
  end
end

-- The sum of factor[n] * rows[key[n]]. Four rows at a time: one at a time it spends half its time on storing the sum.
local function weighted_rows(factor, rows, step, width, key, count)
  local sum = doubles(math.max(width, 1))
  for n = 0, count - 4, 4 do
    local f0, f1, f2, f3 = factor[n], factor[n + 1], factor[n + 2], factor[n + 3]
    local a, b = rows + key[n] * step, rows + key[n + 1] * step
    local c, e = rows + key[n + 2] * step, rows + key[n + 3] * step
    for d = 0, width - 2, 2 do
      sum[d] = sum[d] + ((f0 * a[d] + f1 * b[d]) + (f2 * c[d] + f3 * e[d]))
      sum[d + 1] = sum[d + 1] + ((f0 * a[d + 1] + f1 * b[d + 1]) + (f2 * c[d + 1] + f3 * e[d + 1]))
    end
    if width % 2 == 1 then
      local d = width - 1
      sum[d] = sum[d] + ((f0 * a[d] + f1 * b[d]) + (f2 * c[d] + f3 * e[d]))
    end
  end
  for n = count - count % 4, count - 1 do
    local at, f = key[n] * step, factor[n]
    for d = 0, width - 1 do sum[d] = sum[d] + f * rows[at + d] end
  end
  return sum
end

local function score(p, b, h, i, w, count, q, head)
  local s, slope = w.s, w.slope
  dots(q, head.k, head.k_step, p.E, w.key, count, s, w.k_squares)
  for n = 0, count - 1 do s[n] = p.scale * s[n] end
  for n = 0, count - 1 do slope[n] = 1 end
  if p.softcap > 0 then
    for n = 0, count - 1 do
      local t = math.tanh(s[n] / p.softcap)
      s[n], slope[n] = p.softcap * t, 1 - t * t
    end
  end
  if p.bias then
    local row = Problem.row_of(p.bias, b, h, i)
    local bias = row:data()
    for n = 0, count - 1 do s[n] = s[n] + bias[w.key[n]] end
    row:free()
  end
  local alibi = Problem.element(p.options.alibi, h)
  if alibi then
    for n = 0, count - 1 do s[n] = s[n] - alibi * math.abs(w.key[n] - (i - 1) - p.diagonal) end
  end
end

-- Weights from scores; the LSE and the weight of the sink. NaN by inf - inf when all scores are -inf or one is +inf.
local function softmax(w, count, sink)
  local s, weight = w.s, w.p
  local max, sum = sink or -INF, 0
  for n = 0, count - 1 do
    if s[n] > max then max = s[n] end
  end
  for n = 0, count - 1 do
    weight[n] = math.exp(s[n] - max)
    sum = sum + weight[n]
  end
  local sink_weight = sink and math.exp(sink - max) or 0
  sum = sum + sink_weight
  for n = 0, count - 1 do weight[n] = weight[n] / sum end
  return max + math.log(sum), sink_weight / sum
end

-- Dropout: word `index` of the stream of `seed`, as src/random.h defines it.
local u64 = ffi.typeof "uint64_t"
local LOW = 0xffffffffULL
local function random_word(seed, index)
  local block = bit.rshift(index, 2)
  local x0, x1, x2, x3 = bit.band(block, LOW), bit.rshift(block, 32), 0ULL, 0ULL
  local key0, key1 = bit.band(seed, LOW), bit.rshift(seed, 32)
  for _ = 1, 10 do
    local a, b = x0 * 0xD2511F53ULL, x2 * 0xCD9E8D57ULL
    x0, x1, x2, x3 = bit.bxor(bit.rshift(b, 32), x1, key0), bit.band(b, LOW), bit.bxor(bit.rshift(a, 32), x3, key1),
      bit.band(a, LOW)
    key0, key1 = bit.band(key0 + 0x9E3779B9ULL, LOW), bit.band(key1 + 0xBB67AE85ULL, LOW)
  end
  local word = tonumber(bit.band(index, 3ULL))
  return tonumber(word == 0 and x0 or word == 1 and x1 or word == 2 and x2 or x3)
end

local function drop_out(p, b, h, i, w, count)
  if p.dropout == 0 then
    for n = 0, count - 1 do w.keep[n] = 1 end
    return
  end
  local threshold = math.min(math.ceil(p.dropout * 2 ^ 32), 2 ^ 32 - 1)
  local seed = u64(p.options.seed)
  local first = u64(((b - 1) * p.H + h - 1) * p.L + i - 1) * u64(p.S)
  for n = 0, count - 1 do
    w.keep[n] = random_word(seed, first + w.key[n]) < threshold and 0 or 1 / (1 - p.dropout)
  end
end

local function entropy(weight, count, sink_weight)
  local sum = sink_weight > 0 and sink_weight * math.log(sink_weight) or 0
  for n = 0, count - 1 do
    if weight[n] ~= 0 then sum = sum + weight[n] * math.log(weight[n]) end
  end
  return sum == 0 and 0 or -sum
end

-- dP and dS; `delta` is what softmax takes off every dP.
local function differentiate(p, b, h, i, w, count, out, head)
  local row = Problem.row_of(p.dout, b, h, i)
  local dout = row:data()
  local delta = 0
  for d = 0, p.Ev - 1 do delta = delta + dout[d] * out[d] end
  dots(dout, head.v, head.v_step, p.Ev, w.key, count, w.dp, w.v_squares)
  for n = 0, count - 1 do
    w.dp[n] = w.keep[n] == 0 and 0 or w.keep[n] * w.dp[n]
    w.ds[n] = w.p[n] * (w.dp[n] - delta)
  end
  row:free()
end

-- The output. A dropped key adds nothing, whatever its value is: only the kept ones are summed. A NaN row is one even
-- when there are none.
local function sum_of_values(p, w, count, head)
  if p.dropout == 0 then return weighted_rows(w.p, head.v, head.v_step, p.Ev, w.key, count) end
  local key, factor, kept = integers(count), doubles(count), 0
  for n = 0, count - 1 do
    if w.keep[n] ~= 0 then
      key[kept], factor[kept] = w.key[n], w.keep[n] * w.p[n]
      kept = kept + 1
    end
  end
  local out = weighted_rows(factor, head.v, head.v_step, p.Ev, key, kept)
  for d = 0, w.lse ~= w.lse and p.Ev - 1 or -1 do out[d] = w.lse end
  return out
end

--- Computes a row into the lists of `w`, which the next row overwrites.
-- @param p the problem
-- @param b batch, from 1
-- @param h head, from 1
-- @param i query, from 1
-- @param with_output also `out` (double[Ev]) and, when there is a dout, dp and ds
-- @return w; count of visible keys, lse, entropy and sink_weight
function M.compute(p, b, h, i, with_output)
  local w = scratch_of(p)
  local sink = Problem.element(p.options.sinks, h)
  local count = list_keys(p:plan(p.mask).c, b, h, i, p.S, w.key)
  w.count, w.sink_weight = count, 0
  if count == 0 then
    w.out = doubles(math.max(p.Ev, 1))
    w.lse, w.entropy = sink or -INF, 0
    w.sink_weight = sink and sink ~= -INF and 1 or 0
    return w
  end
  local head = p:head(b, h)
  local q = Problem.row_of(p.q, b, h, i)
  score(p, b, h, i, w, count, q:data(), head)
  q:free()
  w.lse, w.sink_weight = softmax(w, count, sink)
  w.entropy = entropy(w.p, count, w.sink_weight)
  if with_output then
    drop_out(p, b, h, i, w, count)
    w.out = sum_of_values(p, w, count, head)
    if p.dout then differentiate(p, b, h, i, w, count, w.out, head) end
  end
  return w
end

-- What a person is shown

-- So many of the largest contributions are listed.
local TOP = 8

-- How long the vectors are that factors make of rows with these squares.
local function lengths(squares, count, factors)
  local size = doubles(math.max(count, 1))
  for n = 0, count - 1 do size[n] = math.abs(factors[n]) * math.sqrt(squares[n]) end
  return size
end

-- The places (from 0) of the largest sizes, largest first; NaN is larger than any number.
local function largest(size, count)
  local places, low = {}, -1
  for n = 0, count - 1 do
    local x = size[n]
    if x ~= x then x = INF end
    if #places < TOP or x > low then
      local at = #places + 1
      while at > 1 do
        local y = size[places[at - 1]]
        if y ~= y or y >= x then break end
        at = at - 1
      end
      table.insert(places, at, n)
      places[TOP + 1] = nil
      low = size[places[#places]]
      if low ~= low then low = INF end
    end
  end
  return places
end

local function list_of(array, count, offset)
  local list = new_table(count, 0)
  for n = 1, count do list[n] = array[n - 1] + (offset or 0) end
  return list
end

local function contributions(key, size, count)
  local list = {}
  for rank, n in ipairs(largest(size, count)) do
    list[rank] = {j = key[n] + 1, n = n + 1, norm = size[n]}
  end
  return list
end

local Row = {}
Row.__index = Row

local function number_text(x)
  if x == nil then return "-" end
  if x ~= x then return "nan" end
  return string.format("%.5g", x)
end

local function norm_of(list)
  local sum = 0
  for _, x in ipairs(list) do sum = sum + x * x end
  return math.sqrt(sum)
end

local function shown_places(row)
  local places, seen = {}, {}
  for _, top in ipairs {row.top_out, row.top_dq or {}} do
    for _, entry in ipairs(top) do
      if not seen[entry.n] then
        seen[entry.n] = true
        places[#places + 1] = entry.n
      end
    end
  end
  table.sort(places)
  return places
end

Row.__describe = function(row)
  return string.format("row (%d,%d,%d) of an inspection", row.b, row.h, row.i)
end

function Row.__tostring(row)
  local head = string.format("query (%d,%d,%d) ", row.b, row.h, row.i)
  if row.dead then return head .. "is dead: it sees none of " .. row.of .. " keys; " .. row.reason end
  local lines = {head .. string.format("sees %d of %d keys; lse %s, entropy %s nats, |o| %s%s", row.count, row.of,
    number_text(row.lse), number_text(row.entropy), number_text(norm_of(row.out)),
    row.dq and ", |dq| " .. number_text(norm_of(row.dq)) or "")}
  local line = "%8s %11s %11s %11s %11s %11s %11s"
  lines[2] = line:format("key", "score", "weight", "dP", "dS", "to o", "to dq")
  local rest = row.count
  for _, n in ipairs(shown_places(row)) do
    lines[#lines + 1] = line:format(row.keys[n], number_text(row.scores[n]), number_text(row.weights[n]),
      number_text(row.dP and row.dP[n]), number_text(row.dS and row.dS[n]), number_text(row.to_out[n]),
      number_text(row.to_dq and row.to_dq[n]))
    rest = rest - 1
  end
  if rest > 0 then lines[#lines + 1] = string.format("%8s contribute less", rest .. " more") end
  return table.concat(lines, "\n")
end

local function add_gradient(row, p, w, head)
  if not p.dout then return end
  local count, dz = w.count, doubles(math.max(w.count, 1))
  row.dP, row.dS = list_of(w.dp, count), list_of(w.ds, count)
  for n = 0, count - 1 do dz[n] = p.scale * w.slope[n] * w.ds[n] end
  row.dq = list_of(weighted_rows(dz, head.k, head.k_step, p.E, w.key, count), p.E)
  local size = lengths(w.k_squares, count, dz)
  row.to_dq, row.top_dq = list_of(size, count), contributions(w.key, size, count)
end

--- One query. All lists run over the visible keys, in rising order.
-- @return b, h, i; `dead`, and then `reason` and `factors`; `count` visible keys `of` S; `keys`, `scores`, `weights`
-- (before dropout), with a dout `dP` and `dS`; `lse`, `entropy` (nats; with a sink, of keys and sink), `sink_weight`;
-- `out` and `dq` of this row; `to_out` and `to_dq`: how long the vector is that each key adds to o_i and dq_i; the
-- largest of them in `top_out` and `top_dq`, lists of {j, n, norm}, n the place in `keys`
function M.row(p, b, h, i)
  local w = M.compute(p, b, h, i, true)
  local count = w.count
  local row = setmetatable({b = b, h = h, i = i, dead = count == 0, count = count, of = p.S, lse = w.lse,
    entropy = w.entropy, sink_weight = w.sink_weight, keys = list_of(w.key, count, 1), scores = list_of(w.s, count),
    weights = list_of(w.p, count), out = list_of(w.out, p.Ev)}, Row)
  if row.dead then
    local why = reasons.of_row(p, b, h, i)
    row.reason, row.factors = why.reason, why.factors
    row.to_out, row.top_out = {}, {}
    if p.dout then row.dP, row.dS, row.to_dq, row.top_dq, row.dq = {}, {}, {}, {}, list_of(doubles(p.E + 1), p.E) end
    return row
  end
  local head = p:head(b, h)
  local kept = doubles(count)
  for n = 0, count - 1 do kept[n] = w.keep[n] == 0 and 0 or w.keep[n] * w.p[n] end
  if not p.dout then dots(doubles(p.Ev + 1), head.v, head.v_step, p.Ev, w.key, count, w.dp, w.v_squares) end
  local size = lengths(w.v_squares, count, kept)
  row.to_out, row.top_out = list_of(size, count), contributions(w.key, size, count)
  add_gradient(row, p, w, head)
  return row
end

return M
