-- what the kernels are held to: the bars of bench/attention.lua, a line each
--
-- All bars are measured once. Of a bar's rounds, those beside which another guest was on the core (bench/sharing.lua
-- looks, and knows nothing of what is timed) are set aside, and the line says how many; when hardly any are left, all
-- are shown, and how many were shared. While there is time, four minutes in all, every bar that has too few rounds of
-- its own gets as many again, whatever it came to, up to three times as many in all; its last line has all of them.
local sa = require "safeattn"
local core = require "safeattn.core"
local calls = require "bench.calls"
local cases = require "bench.cases"
local clock = require "bench.clock"
local placing = require "bench.placing"
local sharing = require "bench.sharing"
local ffi, lib = core.ffi, core.lib

local slice, watched_turns, one_way, at_peak = cases.slice, cases.watched_turns, cases.one_way, cases.at_peak
local over, under = cases.over, cases.under
local most_seconds = 240 -- after which no bar is given more rounds

local bars = {}

-- The share of 64 x 64 tiles in which a mask shows some pair.
local function visible_tiles(mask, size)
  local dense = mask:dense {B = 1, H = 1, L = size, S = size}
  local data, seen = ffi.cast("uint8_t *", dense:data()), 0
  for row = 0, size - 1, 64 do
    for column = 0, size - 1, 64 do
      local any = 0
      for i = row, row + 63 do
        for j = column, column + 63 do any = any + data[i * size + j] end
      end
      if any > 0 then seen = seen + 1 end
    end
  end
  return seen / (size / 64) ^ 2
end

-- The lines, in order: {name =, limit =, least =, unit =, take =, values =, result =}. `take` takes some rounds
-- and returns what came of them (clock.compare), and what the name is to say besides; `values` is that of all rounds so
-- far. A bar is reached when their median is at most its limit, or at least when `least`.
local lines = {}

local function bar(name, limit, take, least, unit)
  lines[#lines + 1] = {name = name, limit = limit, take = take, least = least, unit = unit or "x",
    values = {shared = {}}}
end

local function add_rounds(line)
  local values, besides = line.take()
  for round, value in ipairs(values) do
    line.values[#line.values + 1] = value
    line.values.shared[#line.values] = values.shared[round]
  end
  line.besides = besides
  sa.threads(1)
  collectgarbage()
end

-- record(name) gives the table for a result, save() writes all of them.
local function print_bar(line, record, save)
  local kept, shared = clock.undisturbed(line.values, cases.enough_rounds)
  local spread, limit, unit = clock.spread(kept), line.limit, line.unit
  local reached = line.least and spread.median >= limit or not line.least and spread.median <= limit
  local aside = #line.values - spread.rounds
  local note = aside > 0 and (", %2d aside"):format(aside) or shared > 0 and (", %2d shared"):format(shared) or ""
  line.result = line.result or record(line.name)
  for key, value in pairs {value = spread.median, low = spread.low, high = spread.high, rounds = spread.rounds,
    aside = aside, shared = shared - aside, bar = limit, reached = reached} do line.result[key] = value end
  local scale = unit == "%" and 100 or 1
  local range = ("(%6.2f to %6.2f, %3d rounds%s)"):format(spread.low * scale, spread.high * scale, spread.rounds, note)
  print(("%-70s %7.2f %-2s %-43s %s %5.2f  %s"):format(line.name .. (line.besides or ""), spread.median * scale, unit,
    range, line.least and ">=" or "<=", limit * scale, reached and "reached" or "missed"))
  save()
end

-- Whether a line has the rounds of its own that are wanted, or three times as many of any.
local function is_settled(line)
  local alone = #line.values
  for _ in pairs(line.values.shared) do alone = alone - 1 end
  return alone >= cases.enough_rounds or line.passes == 3
end

-- When `most_seconds` are over, no bar is given more rounds.
local function measure_all(record, save)
  local start = clock.now()
  for pass = 1, 3 do
    if pass == 2 and not cases.quick then print "\nagain, with more rounds, those that were not alone on the core" end
    for _, line in ipairs(lines) do
      if pass > 1 and (cases.quick or clock.now() - start > most_seconds) then return end
      if not is_settled(line) then
        add_rounds(line)
        line.passes = pass
        print_bar(line, record, save)
      end
    end
  end
end

-- How near what `make` makes comes to so many flops of a core's peak, with an instruction set (nil: the best).
local function peak_bar(name, make, flops, dtype, limit, isa)
  bar(name .. ", of the peak", limit, function()
    if isa then assert(sa.isa(isa)) end
    local times = watched_turns(at_peak(flops, dtype), slice(make()))
    if isa then sa.isa "auto" end
    return clock.compare(times[2], times[1], under)
  end, true, "%")
end

local function peak_bars(name, dtype, width, forward_limit, backward_limit, isa)
  local product = cases.batch * cases.heads * cases.length ^ 2 * width
  local function one(way, flops, limit)
    peak_bar(("%s %s D%d"):format(name, way, width), function()
      return one_way({dtype = dtype, width = width}, way)
    end, flops, dtype, limit, isa)
  end
  one("forward", 4 * product, forward_limit)
  one("backward", 10 * product, backward_limit)
end

-- Forward and backward of a case over another; `share`: how much of the other's work it has.
local function ratio_bars(name, limit, case, base, share)
  for _, way in ipairs {"forward", "backward"} do
    bar(name .. ", " .. way, limit, function()
      local mine, other = one_way(case, way), one_way(base or {length = case.length}, way)
      local times = watched_turns(slice(other), slice(mine))
      return clock.compare(times[2], times[1], function(seconds, dense) return seconds / dense / (share or 1) end)
    end)
  end
end

local function mask_bars(name, mask, size)
  ratio_bars(("%s, N %d, over dense by visible tiles"):format(name, size), 1.15,
    {length = size, options = {mask = mask}}, nil, visible_tiles(mask, size))
end

-- What a second thread gives, over one on either core, since one of them may be another guest's too; and what it gives
-- the peak, since two cores may be halves of one. Of more than two, which ones the threads take is not known.
local function thread_bars(width)
  local pair = #placing.list() == 2 and placing.list()
  local function on_either(fn) -- the time of the mean of both speeds
    if not pair then return fn end
    local first, second = placing.on(pair[1], fn), placing.on(pair[2], fn)
    return function() return 2 / (1 / first() + 1 / second()) end
  end
  for _, way in ipairs {"forward", "backward"} do
    bar(("2 threads over 1%s, D%d %s"):format(pair and " on either core" or "", width, way), 1.9, function()
      local one, two = one_way({width = width}, way), one_way({width = width, threads = 2}, way)
      two() -- starts the pool's thread while that may be on either core, too
      local times = clock.turns({on_either(at_peak(1, "f32")), at_peak(1, "f32", 2), slice(two),
        on_either(slice(one))}, cases.enough_rounds, cases.enough_seconds, pair and sharing.anywhere or sharing.here)
      return clock.compare(times[4], times[3], over),
        (" (the peak: %.2f)"):format(clock.median(times[1]) / clock.median(times[2]))
    end, true)
  end
end

local function decoding_bar(dtype)
  local keys, cores = cases.quick and 8192 or 65536, tonumber(sa.info().cores)
  local bytes = 2 * 8 * keys * 128 * (dtype == "f32" and 4 or 2)
  local function random(of, seed) return sa.randn(of, {seed = seed, dtype = dtype}) end
  bar(("decoding, %s, 1 x %d, 32:8 heads, D128, %d threads"):format(dtype, keys, cores), 0.85, function()
    local q = random({1, 32, 1, 128}, 1)
    local k, v = random({1, 8, keys, 128}, 2), random({1, 8, keys, 128}, 3)
    sa.threads(cores)
    local times = watched_turns(function() return bytes / tonumber(lib.sa_measure_read()) end,
      slice(calls.forward(q, k, v), 0.1))
    return clock.compare(times[2], times[1], under), (": of %.1f GB/s"):format(bytes / clock.median(times[1]) * 1e-9)
  end, true, "%")
end

local function small_bar()
  peak_bar("[8,12,128,64] f32 forward + backward", function()
    return calls.both(calls.inputs {batch = 8, heads = 12, length = 128})
  end, 14 * 8 * 12 * 128 ^ 2 * 64, "f32", 0.65)
end

-- So many calls in a slice, whose times are large beside the clock's; and what makes microseconds a call of them.
local function often(count, fn)
  return slice(function() for _ = 1, count do fn() end end), function(seconds) return seconds / count * 1e6 end
end

local function call_bars()
  local count = cases.quick and 500 or 5000
  local q, k, v = calls.inputs {heads = 1, length = 4, width = 8}
  local function call_bar(way, limit, fn)
    bar("a call on [1,1,4,8], " .. way, limit, function()
      local calling, microseconds = often(count, fn)
      return clock.compare(watched_turns(calling)[1], nil, microseconds)
    end, false, "us")
  end
  call_bar("forward", 3, function() sa.forward(q, k, v) end)
  call_bar("forward + backward", 6, function() sa.forward(q, k, v):backward(q) end)
end

-- The least that the pool shares out. What two threads take for two heads, and one does not for one, is the pool's, and
-- what the memory of one core costs the other.
local function pool_bar()
  local count = cases.quick and 50 or 300
  local function heads_on_threads(n)
    local q, k, v = calls.inputs {heads = n, length = 64}
    local call = calls.with_threads(n, calls.forward(q, k, v))
    return often(count, function() call()() end)
  end
  bar("the pool, warm: 2 heads of 64 tokens on 2 threads less 1 on 1", 5, function()
    local two, microseconds = heads_on_threads(2)
    local times = watched_turns(heads_on_threads(1), two)
    return clock.compare(times[2], times[1], function(seconds, one) return microseconds(seconds - one) end)
  end, false, "us")
end

-- What the kernels are held to; the widths and lengths are fixed.
local function add_all()
  sa.threads(1)
  local m, heads, length = sa.mask, cases.heads, cases.length
  local avx512 = sa.info().isa == "avx512" or sa.info().isa == "amx"
  local forward64, forward128, backward = 0.84, 0.86, 0.86
  if not avx512 then forward64, forward128, backward = 0.8, 0.8, 0.8 end
  peak_bars("f32", "f32", 64, forward64, backward)
  peak_bars("f32", "f32", 128, forward128, backward)
  peak_bars("f64", "f64", 64, 0.78, 0.78)
  peak_bars("bf16", "bf16", 64, 0.75, 0.75)
  peak_bars("f16", "f16", 64, 0.75, 0.75)
  if avx512 then peak_bars("AVX2 tier, f32", "f32", 64, 0.8, 0.8, "avx2") end
  if tonumber(sa.info().cores) >= 2 then
    thread_bars(64)
    thread_bars(128)
    pool_bar()
  end
  ratio_bars("causal over dense", 0.56, {options = {causal = true}})
  mask_bars("window 512", m.window(512, 0), length)
  local ids, lengths = {}, {length + 37}
  for i = 1, length do ids[i] = math.floor((i - 1) * 8 / length) end
  mask_bars("8 documents, causal", m.documents(ids) * m.causal(), length)
  mask_bars("padding", m.padding(lengths), 2 * length)
  ratio_bars("random(0.5) over dense", 1.12, {options = {mask = m.random(0.5, 1)}})
  ratio_bars("finite bias [L,S] over dense", 1.25, {options = {bias = sa.randn({length, length}, {seed = 7})}})
  ratio_bars("dropout 0.1 over dense", 1.35, {options = {dropout = 0.1, seed = 10}})
  local middle = length / 2
  ratio_bars("NaN in a key row, causal, over clean", 2.2, {options = {causal = true},
    prepare = function(_, k, v) k:select(3, middle):fill(0 / 0) v:select(3, middle):fill(0 / 0) end},
    {options = {causal = true}})
  local slopes, steep = sa.full({heads}, 1e-3), sa.full({heads}, 8)
  ratio_bars("ALiBi far below underflow over mild", 1.05, {options = {alibi = steep}}, {options = {alibi = slopes}})
  local bias = sa.randn({length, length}, {seed = 7})
  local low = sa.where(sa.rand({length, length}, {seed = 8}):lt(0.5), bias, sa.full({length, length}, -1e4))
  ratio_bars("bias of -10000 for half the pairs over mild", 1.05, {options = {bias = low}}, {options = {bias = bias}})
  decoding_bar "f32"
  decoding_bar "bf16"
  small_bar()
  call_bars()
end

--- Measures all bars. record(name) gives the table that a bar's result is written to, save() writes all that there are.
function bars.measure(record, save)
  add_all()
  measure_all(record, save)
end

return bars
