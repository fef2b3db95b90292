-- how fast attention is on this machine: a table, and the same as JSON in build/bench.json
--
--   luajit bench/attention.lua [quick] [section ...]
--
-- Sections: bars shapes masks extras dtypes tiers calls plans; all of them unless some are named. `quick` takes short
-- sequences and few repetitions: a glance, not a measurement. Data are random, every case is warmed up, times are
-- medians of wall time. Processors wander, so whatever is compared takes turns: a share of the peak, or a time over
-- another, is that of one turn and of the other's turns before and after it, and what is shown is the median of all
-- rounds, for a bar with the quartiles. Flops are those of the dense product, 4 B H L S D forward and 10 B H L S D
-- backward, whatever a mask leaves out.
--
-- All bars are measured once. Of a bar's rounds, those beside which another guest was on the core (bench/sharing.lua
-- looks, and knows nothing of what is timed) are set aside, and the line says how many; when hardly any are left, all
-- are shown, and how many were shared. While there is time, four minutes in all, every bar that has too few rounds of
-- its own gets as many again, whatever it came to, up to three times as many in all; its last line has all of them.
local sa = require "safeattn"
local core = require "safeattn.core"
local calls = require "bench.calls"
local clock = require "bench.clock"
local placing = require "bench.placing"
local json = require "bench.json"
local sharing = require "bench.sharing"
local ffi, lib = core.ffi, core.lib

local known_sections = {"bars", "shapes", "masks", "extras", "dtypes", "tiers", "calls", "plans"}
local chosen, quick = {}, false
for _, word in ipairs(arg) do
  if word == "quick" then
    quick = true
  else
    local known = false
    for _, name in ipairs(known_sections) do known = known or name == word end
    if not known then
      io.stderr:write("bench: no section called ", word, "; there are ", table.concat(known_sections, " "), "\n")
      os.exit(2)
    end
    chosen[word], chosen[1] = true, true
  end
end

local batch, heads, length = 1, 8, quick and 512 or 2048
local slice_seconds, enough_rounds, enough_seconds = quick and 0 or 5e-3, quick and 3 or 9, quick and 0.1 or 1
local most_seconds = 240 -- after which no bar is given more rounds

local function slice(fn, seconds) return clock.slice(fn, quick and 0 or seconds or slice_seconds) end

local function turns(...) return clock.turns({...}, enough_rounds, enough_seconds) end

-- The same for bars: rounds beside which the core was shared are noted.
local function watched_turns(...) return clock.turns({...}, enough_rounds, enough_seconds, sharing.here) end

-- The median in seconds of one thing that takes no turns with another.
local function measure(fn) return clock.spread(turns(slice(fn))[1]).median end

local function peak(dtype) -- GFLOP/s of the threads in force; the half types are computed in f32
  return tonumber(lib.sa_measure_peak(dtype == "f64" and lib.SA_F64 or lib.SA_F32)) * 1e-9
end

local function over(seconds, other) return seconds / other end
local function under(seconds, other) return other / seconds end

-- The seconds that threads at their peak would take for so many flops, as they were for some 20 ms: whatever keeps the
-- processor from a case keeps it from these as well.
local function at_peak(flops, dtype, threads)
  return function()
    sa.threads(threads or 1)
    local start, looks, sum = clock.now(), 0, 0
    repeat
      sum, looks = sum + 1e-9 / peak(dtype), looks + 1
    until clock.now() - start >= (quick and 5e-3 or 20e-3)
    return flops * sum / looks
  end
end

-- Results -------------------------------------------------------------------------------------------------------------

io.stdout:setvbuf "line" -- a run that is cut has written what it has
sa.threads(1)
local path = "build/bench.json"
local results = {} -- in order: {section =, name =, ...}
local info = sa.info()
local run = {version = sa._VERSION, isa = info.isa, cores = tonumber(info.cores), quick = quick, batch = batch,
  heads = heads, length = length, f32_peak_gflops = 0, f64_peak_gflops = 0, results = results}
for _ = 1, 20 do
  run.f32_peak_gflops = math.max(run.f32_peak_gflops, peak "f32")
  run.f64_peak_gflops = math.max(run.f64_peak_gflops, peak "f64")
end

local function record(section, name, values)
  values.section, values.name = section, name
  results[#results + 1] = values
  return values
end

local function title(text, columns) io.write("\n", text, "\n", columns or "", columns and "\n" or "") end

-- Attention -----------------------------------------------------------------------------------------------------------

local columns = ("%-34s %9s %7s %6s %7s   %9s %7s %6s %7s"):format("", "fwd ms", "GF/s", "peak", "dense", "bwd ms",
  "GF/s", "peak", "dense")

local function inputs(case)
  return calls.inputs {length = case.length or length, width = case.width, key_heads = case.key_heads,
    dtype = case.dtype}
end

-- What is timed of a case {width =, key_heads =, dtype =, threads =, prepare =, options =}, "forward" or "backward".
local function one_way(case, way)
  local q, k, v, dout = inputs(case)
  if case.prepare then case.prepare(q, k, v) end
  local threads = case.threads or 1
  sa.threads(threads)
  if way == "forward" then return calls.with_threads(threads, calls.forward(q, k, v, case.options)) end
  return calls.with_threads(threads, calls.backward(q, k, v, dout, case.options))
end

local function both_ways(case) return {forward = one_way(case, "forward"), backward = one_way(case, "backward")} end

-- Measures forward and backward, taking turns with the peak and with the case `base`, and prints a line.
local function attention(section, name, case, base)
  local threads, dtype = case.threads or 1, case.dtype or "f32"
  local mine, other = both_ways(case), base and both_ways(base)
  local result = record(section, name, {threads = threads, dtype = dtype})
  local halves = {}
  for n, way in ipairs {"forward", "backward"} do
    local flops = (way == "forward" and 4 or 10) * batch * heads * length ^ 2 * (case.width or 64)
    local ideal, here = at_peak(flops, dtype, threads), slice(mine[way])
    local times = other and turns(ideal, slice(other[way]), here) or turns(ideal, here)
    local taken = times[#times]
    local share, seconds = clock.spread(clock.compare(taken, times[1], under)), clock.median(taken)
    local dense = other and clock.spread(clock.compare(taken, times[2], over)) or {low = 1, median = 1, high = 1}
    result[way .. "_ms"], result[way .. "_gflops"] = seconds * 1e3, 1e-9 * flops / seconds
    result[way .. "_peak_gflops"] = 1e-9 * flops / clock.median(times[1])
    result[way .. "_of_peak"], result[way .. "_of_peak_quartiles"] = share.median, {share.low, share.high}
    result[way .. "_of_dense"], result[way .. "_of_dense_quartiles"] = dense.median, {dense.low, dense.high}
    result[way .. "_rounds"] = share.rounds
    halves[n] = ("%9.2f %7.1f %5.0f%% %7.2f"):format(seconds * 1e3, 1e-9 * flops / seconds, 100 * share.median,
      dense.median)
  end
  print(("%-34s %s   %s"):format(name, halves[1], halves[2]))
  sa.threads(1)
  collectgarbage()
end

local sections = {}

local function thread_counts()
  local counts, cores = {1}, tonumber(sa.info().cores) or 1
  if cores >= 2 then counts[2] = 2 end
  if cores > 2 then counts[3] = cores end
  return counts
end

function sections.shapes()
  title(("fused f32, B%d H%d L=S=%d"):format(batch, heads, length), columns)
  for _, width in ipairs {64, 128} do
    local single = {width = width}
    for _, threads in ipairs(thread_counts()) do
      local name = ("D%d, %d thread%s"):format(width, threads, threads == 1 and "" or "s")
      attention("shapes", name, {width = width, threads = threads}, threads > 1 and single)
    end
    for _, threads in ipairs(thread_counts()) do
      local name = ("D%d causal, %d thread%s"):format(width, threads, threads == 1 and "" or "s")
      attention("shapes", name, {width = width, threads = threads, options = {causal = true}}, single)
    end
  end
end

function sections.masks()
  title(("masks, f32 D64, 1 thread, L=S=%d"):format(length), columns)
  local m, ids = sa.mask, {}
  for i = 1, length do ids[i] = math.floor((i - 1) * 16 / length) end
  attention("masks", "none", {})
  for _, case in ipairs {
    {"causal", m.causal()},
    {"causal, bottom-right", m.causal "bottom-right"},
    {"window(256, 0)", m.window(256, 0)},
    {"padding to half", m.padding {length / 2}},
    {"padding of keys and queries", m.padding({length / 2}, {length / 2})},
    {"16 documents * causal", m.documents(ids) * m.causal()},
    {"prefix + causal", m.prefix(length / 4) + m.causal()},
    {"random(0.5)", m.random(0.5, 1)},
    {"blocks of 64, half of them", m.blocks(sa.rand({length / 64, length / 64}, {seed = 5}):lt(0.5), 64)},
    {"dense bool, a tenth visible", m.dense(sa.rand({length, length}, {seed = 6}):lt(0.1))},
  } do
    attention("masks", case[1], {options = {mask = case[2]}}, {})
  end
  attention("masks", "causal, NaN in a masked key", {options = {mask = m.causal() * m.padding {length - 1}},
    prepare = function(_, k, v) k:select(3, length):fill(0 / 0) v:select(3, length):fill(0 / 0) end}, {})
end

function sections.extras()
  title(("extras, f32 D64, 1 thread, L=S=%d"):format(length), columns)
  attention("extras", "none", {})
  for _, case in ipairs {
    {"bias [L,S]", {bias = sa.randn({length, length}, {seed = 7})}},
    {"bias [H,L,S]", {bias = sa.randn({heads, length, length}, {seed = 7})}},
    {"alibi", {alibi = sa.rand({heads}, {seed = 8})}},
    {"softcap 30", {softcap = 30}},
    {"sinks", {sinks = sa.randn({heads}, {seed = 9})}},
    {"dropout 0.1", {dropout = 0.1, seed = 10}},
  } do
    attention("extras", case[1], {options = case[2]}, {})
  end
  attention("extras", "2 key heads", {key_heads = 2}, {})
end

function sections.dtypes()
  title(("dtypes, D64, 1 thread, L=S=%d; the halves are computed in f32, or bf16 by AMX"):format(length), columns)
  attention("dtypes", "f32", {})
  for _, dtype in ipairs {"bf16", "f16", "f64"} do attention("dtypes", dtype, {dtype = dtype}, {}) end
end

function sections.tiers()
  title(("instruction sets, f32 D64, 1 thread, L=S=%d; peak is that of the set"):format(length), columns)
  for _, isa in ipairs(sa.info().isas) do
    assert(sa.isa(isa))
    attention("tiers", isa, {})
  end
  sa.isa "auto"
end

-- Small things --------------------------------------------------------------------------------------------------------

function sections.calls()
  title("one call, [1,1,4,8] f32")
  sa.threads(1)
  local q, k, v = sa.randn({1, 1, 4, 8}, {seed = 1}), sa.randn({1, 1, 4, 8}, {seed = 2}),
    sa.randn({1, 1, 4, 8}, {seed = 3})
  local mask, count = sa.mask.causal(), quick and 2000 or 5000
  for _, case in ipairs {{"sa.forward", {}}, {"sa.forward, mask", {mask = mask}}} do
    local seconds = measure(function() for _ = 1, count do sa.forward(q, k, v, case[2]) end end) / count
    record("calls", case[1], {microseconds = seconds * 1e6})
    print(("%-34s %9.2f us"):format(case[1], seconds * 1e6))
  end
end

-- What a mask costs to make and to compile, and what the compiled plan holds.
function sections.plans()
  title("masks: made and compiled", ("%-44s %9s %9s"):format("", "ms", "KiB"))
  local m, use = sa.mask, ffi.new "sa_memory_use"
  local function internal_bytes()
    lib.sa_memory(use)
    return tonumber(use.internal_bytes)
  end
  local long, square, small = 131072, quick and 2048 or 8192, quick and 512 or 2048
  local ids = sa.zeros({long}, {dtype = "i32"})
  for i = 0, long - 1 do ids:data()[i] = math.floor(i * 1000 / long) end
  local dense = sa.rand({square, square}, {seed = 1}):lt(0.5)
  for _, case in ipairs {
    {"causal", long, function() return m.causal() end},
    {"window(4096, 0)", long, function() return m.window(4096, 0) end},
    {"1000 documents * causal", long, function() return m.documents(ids) * m.causal() end},
    {"dense bool", square, function() return m.dense(dense) end},
    {"fn", small, function() return m.fn(function(_, _, i, j) return j <= i and (i + j) % 3 ~= 0 end,
      {batch = false, heads = false}) end},
  } do
    local name, size, make = case[1], case[2], case[3]
    local function compile()
      case.mask = make()
      case.mask:density {B = 1, H = 1, L = size, S = size}
    end
    collectgarbage()
    local before = internal_bytes()
    compile()
    local bytes = internal_bytes() - before
    local seconds = measure(function()
      compile()
      return function() case.mask = nil collectgarbage() end
    end)
    name = ("%s, %d x %d"):format(name, size, size)
    record("plans", name, {milliseconds = seconds * 1e3, kibibytes = bytes / 1024})
    print(("%-44s %9.2f %9.0f"):format(name, seconds * 1e3, bytes / 1024))
  end
end

-- Bars ----------------------------------------------------------------------------------------------------------------

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

local function print_bar(line)
  local kept, shared = clock.undisturbed(line.values, enough_rounds)
  local spread, limit, unit = clock.spread(kept), line.limit, line.unit
  local reached = line.least and spread.median >= limit or not line.least and spread.median <= limit
  local aside = #line.values - spread.rounds
  local note = aside > 0 and (", %2d aside"):format(aside) or shared > 0 and (", %2d shared"):format(shared) or ""
  line.result = line.result or record("bars", line.name, {})
  for key, value in pairs {value = spread.median, low = spread.low, high = spread.high, rounds = spread.rounds,
    aside = aside, shared = shared - aside, bar = limit, reached = reached} do line.result[key] = value end
  local scale = unit == "%" and 100 or 1
  local range = ("(%6.2f to %6.2f, %3d rounds%s)"):format(spread.low * scale, spread.high * scale, spread.rounds, note)
  print(("%-70s %7.2f %-2s %-43s %s %5.2f  %s"):format(line.name .. (line.besides or ""), spread.median * scale, unit,
    range, line.least and ">=" or "<=", limit * scale, reached and "reached" or "missed"))
  json.write(path, run)
end

-- Whether a line has the rounds of its own that are wanted, or three times as many of any.
local function is_settled(line)
  local alone = #line.values
  for _ in pairs(line.values.shared) do alone = alone - 1 end
  return alone >= enough_rounds or line.passes == 3
end

local function measure_bars()
  local start = clock.now()
  for pass = 1, 3 do
    if pass == 2 and not quick then print "\nagain, with more rounds, those that were not alone on the core" end
    for _, line in ipairs(lines) do
      if pass > 1 and (quick or clock.now() - start > most_seconds) then return end
      if not is_settled(line) then
        add_rounds(line)
        line.passes = pass
        print_bar(line)
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
  local product = batch * heads * length ^ 2 * width
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
        on_either(slice(one))}, enough_rounds, enough_seconds, pair and sharing.anywhere or sharing.here)
      return clock.compare(times[4], times[3], over),
        (" (the peak: %.2f)"):format(clock.median(times[1]) / clock.median(times[2]))
    end, true)
  end
end

local function decoding_bar(dtype)
  local keys, cores = quick and 8192 or 65536, tonumber(sa.info().cores)
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
  local count = quick and 500 or 5000
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
  local count = quick and 50 or 300
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
function sections.bars()
  title(("bars, B1 H8 L=S=%d f32 D64, 1 thread, unless said"):format(length))
  sa.threads(1)
  local m = sa.mask
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
  measure_bars()
end

-- The run -------------------------------------------------------------------------------------------------------------

print(("%s, %s, %d cores; fused multiply-add peak of one core: f32 %.0f GFLOP/s, f64 %.0f GFLOP/s"):format(
  sa._VERSION, info.isa, info.cores, run.f32_peak_gflops, run.f64_peak_gflops))
for _, name in ipairs(known_sections) do
  if not chosen[1] or chosen[name] then sections[name]() end
end
json.save(path, run)
