-- how fast attention is on this machine: a table, and the same as JSON in build/bench.json
--
--   luajit bench/attention.lua [quick] [section ...]
--
-- Sections: bars shapes masks extras dtypes tiers calls plans; all of them unless some are named. `quick` takes short
-- sequences and few repetitions: a glance, not a measurement. Data are random, every case is warmed up, times are
-- medians of wall time. Flops are those of the dense product, 4 B H L S D forward and 10 B H L S D backward, whatever
-- a mask leaves out.
local sa = require "safeattn"
local core = require "safeattn.core"
local clock = require "bench.clock"
local json = require "bench.json"
local ffi, lib = core.ffi, core.lib
local now = clock.now

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
local enough_seconds, enough_runs = quick and 0.1 or 1, quick and 3 or 7

-- The median of fn's wall time in seconds, after a warm-up, and the shortest. fn may return a function that cleans up,
-- off the clock.
local function measure(fn)
  local function once()
    local start = now()
    local clean = fn()
    local seconds = now() - start
    if clean then clean() end
    return seconds
  end
  local total, times = once(), {}
  repeat
    times[#times + 1] = once()
    total = total + times[#times]
  until #times >= enough_runs and total >= enough_seconds
  table.sort(times)
  return times[math.floor((#times + 1) / 2)], times[1]
end

local function peak(dtype) -- GFLOP/s of one core; the half types are computed in f32
  return tonumber(lib.sa_measure_peak(dtype == "f64" and lib.SA_F64 or lib.SA_F32)) * 1e-9
end

-- Results -------------------------------------------------------------------------------------------------------------

local results = {} -- in order: {section =, name =, ...}

local function record(section, name, values)
  values.section, values.name = section, name
  results[#results + 1] = values
  return values
end

local function title(text, columns) io.write("\n", text, "\n", columns or "", columns and "\n" or "") end

-- Attention -----------------------------------------------------------------------------------------------------------

local columns = ("%-34s %9s %7s %6s %7s   %9s %7s %6s %7s"):format("", "fwd ms", "GF/s", "peak", "dense", "bwd ms",
  "GF/s", "peak", "dense")

local function inputs(options)
  local shape = {batch, heads, options.length or length, options.width or 64}
  local key_shape = {batch, options.key_heads or heads, shape[3], shape[4]}
  local function random(of, seed) return sa.randn(of, {seed = seed, dtype = options.dtype or "f32"}) end
  return random(shape, 1), random(key_shape, 2), random(key_shape, 3), random(shape, 4)
end

-- Measures forward and backward and prints a line. `base` is the result that the ratio columns compare with.
local function attention(section, name, case, options, base)
  local threads, dtype = case.threads or 1, case.dtype or "f32"
  sa.threads(threads)
  local q, k, v, dout = inputs(case)
  if case.prepare then case.prepare(q, k, v) end
  local flops = batch * heads * q:size(3) ^ 2 * q:size(4)
  -- The clock wanders, so each time is compared with the peaks just before and after it.
  local before = peak(dtype)
  local forward, forward_best = measure(function()
    local run = sa.forward(q, k, v, options)
    return function() run.out:free() run.lse:free() end
  end)
  local between = peak(dtype)
  local run = sa.forward(q, k, v, options)
  local backward, backward_best = measure(function()
    local gradients = run:backward(dout)
    return function() for _, gradient in pairs(gradients) do gradient:free() end end
  end)
  local forward_top, backward_top = threads * (before + between) / 2, threads * (between + peak(dtype)) / 2
  local result = record(section, name, {
    threads = threads, dtype = dtype, forward_peak_gflops = forward_top, backward_peak_gflops = backward_top,
    forward_ms = forward * 1e3, forward_best_ms = forward_best * 1e3, forward_gflops = 4e-9 * flops / forward,
    forward_of_peak = 4e-9 * flops / forward / forward_top,
    backward_ms = backward * 1e3, backward_best_ms = backward_best * 1e3, backward_gflops = 10e-9 * flops / backward,
    backward_of_peak = 10e-9 * flops / backward / backward_top,
  })
  base = base or result
  result.forward_of_dense = result.forward_ms / base.forward_ms
  result.backward_of_dense = result.backward_ms / base.backward_ms
  local function half(way)
    return ("%9.2f %7.1f %5.0f%% %7.2f"):format(result[way .. "_ms"], result[way .. "_gflops"],
      100 * result[way .. "_of_peak"], result[way .. "_of_dense"])
  end
  print(("%-34s %s   %s"):format(name, half "forward", half "backward"))
  collectgarbage()
  return result
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
    local single
    for _, threads in ipairs(thread_counts()) do
      local name = ("D%d, %d thread%s"):format(width, threads, threads == 1 and "" or "s")
      local result = attention("shapes", name, {width = width, threads = threads}, {}, single)
      single = single or result
    end
    for _, threads in ipairs(thread_counts()) do
      local name = ("D%d causal, %d thread%s"):format(width, threads, threads == 1 and "" or "s")
      attention("shapes", name, {width = width, threads = threads}, {causal = true}, single)
    end
  end
end

function sections.masks()
  title(("masks, f32 D64, 1 thread, L=S=%d"):format(length), columns)
  local m, ids = sa.mask, {}
  for i = 1, length do ids[i] = math.floor((i - 1) * 16 / length) end
  local dense = attention("masks", "none", {}, {})
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
    attention("masks", case[1], {}, {mask = case[2]}, dense)
  end
  attention("masks", "causal, NaN in a masked key",
    {prepare = function(_, k, v) k:select(3, length):fill(0 / 0) v:select(3, length):fill(0 / 0) end},
    {mask = m.causal() * m.padding {length - 1}}, dense)
end

function sections.extras()
  title(("extras, f32 D64, 1 thread, L=S=%d"):format(length), columns)
  local dense = attention("extras", "none", {}, {})
  attention("extras", "bias [L,S]", {}, {bias = sa.randn({length, length}, {seed = 7})}, dense)
  attention("extras", "bias [H,L,S]", {}, {bias = sa.randn({heads, length, length}, {seed = 7})}, dense)
  attention("extras", "alibi", {}, {alibi = sa.rand({heads}, {seed = 8})}, dense)
  attention("extras", "softcap 30", {}, {softcap = 30}, dense)
  attention("extras", "sinks", {}, {sinks = sa.randn({heads}, {seed = 9})}, dense)
  attention("extras", "dropout 0.1", {}, {dropout = 0.1, seed = 10}, dense)
  attention("extras", "2 key heads", {key_heads = 2}, {}, dense)
end

function sections.dtypes()
  title(("dtypes, D64, 1 thread, L=S=%d; the halves are computed in f32, or bf16 by AMX"):format(length), columns)
  local single = attention("dtypes", "f32", {}, {})
  attention("dtypes", "bf16", {dtype = "bf16"}, {}, single)
  attention("dtypes", "f16", {dtype = "f16"}, {}, single)
  attention("dtypes", "f64", {dtype = "f64"}, {}, single)
end

function sections.tiers()
  title(("instruction sets, f32 D64, 1 thread, L=S=%d; peak is that of the set"):format(length), columns)
  for _, isa in ipairs(sa.info().isas) do
    assert(sa.isa(isa))
    attention("tiers", isa, {}, {})
  end
  sa.isa "auto"
end

-- Small things --------------------------------------------------------------------------------------------------------

function sections.calls()
  title("one call, [1,1,4,8] f32")
  sa.threads(1)
  local q, k, v = sa.randn({1, 1, 4, 8}, {seed = 1}), sa.randn({1, 1, 4, 8}, {seed = 2}),
    sa.randn({1, 1, 4, 8}, {seed = 3})
  local mask, calls = sa.mask.causal(), quick and 2000 or 20000
  for _, case in ipairs {{"sa.forward", {}}, {"sa.forward, mask", {mask = mask}}} do
    local seconds = measure(function() for _ = 1, calls do sa.forward(q, k, v, case[2]) end end) / calls
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

-- Medians of several functions' wall times, run in turn so that what the machine does besides meets all alike.
local function in_turn(...)
  local functions, times, total = {...}, {}, 0
  for n, fn in ipairs(functions) do
    times[n] = {}
    local clean = fn()
    if clean then clean() end
  end
  repeat
    for n, fn in ipairs(functions) do
      local start = now()
      local clean = fn()
      times[n][#times[n] + 1] = now() - start
      total = total + times[n][#times[n]]
      if clean then clean() end
    end
  until #times[1] >= enough_runs and total >= enough_seconds
  local medians = {}
  for n, list in ipairs(times) do
    table.sort(list)
    medians[n] = list[math.floor((#list + 1) / 2)]
  end
  return unpack(medians)
end

local function forward_of(q, k, v, options)
  return function()
    local run = sa.forward(q, k, v, options)
    return function() run.out:free() run.lse:free() end
  end
end

local function backward_of(q, k, v, dout, options)
  local run = sa.forward(q, k, v, options)
  return function()
    local gradients = run:backward(dout)
    return function() for _, gradient in pairs(gradients) do gradient:free() end end
  end
end

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

-- One line: what was measured, and whether it reaches its bar (a value at most that, or at least when `least`).
local function bar(name, value, limit, least, unit)
  local reached = least and value >= limit or not least and value <= limit
  record("bars", name, {value = value, bar = limit, reached = reached})
  local scale = unit == "%" and 100 or 1
  print(("%-66s %8.2f %-3s %s %7.2f   %s"):format(name, value * scale, unit or "x", least and ">=" or "<=",
    limit * scale, reached and "reached" or "missed"))
end

local function peak_bars(name, dtype, width, forward_limit, backward_limit)
  local q, k, v, dout = inputs {dtype = dtype, width = width}
  local flops = batch * heads * length ^ 2 * width
  for _, way in ipairs {{"forward", 4, forward_limit, forward_of(q, k, v, {})},
    {"backward", 10, backward_limit, backward_of(q, k, v, dout, {})}} do
    local peaks = {peak(dtype)}
    local seconds = in_turn(function()
      local clean = way[4]()
      return function()
        if clean then clean() end
        peaks[#peaks + 1] = peak(dtype)
      end
    end)
    table.sort(peaks)
    bar(("%s %s D%d, of the peak"):format(name, way[1], width),
      way[2] * 1e-9 * flops / seconds / peaks[math.floor((#peaks + 1) / 2)], way[3], true, "%")
  end
end

-- Forward and backward with options, over the same without (or with `base`).
local function ratio_bars(name, limit, options, change)
  change = change or {}
  local q, k, v, dout = inputs(change)
  local base, divisor = change.base or {}, change.divisor or 1
  local changed = {q, k, v}
  if change.prepare then
    changed = {q:clone(), k:clone(), v:clone()}
    change.prepare(unpack(changed))
  end
  local dense, masked = in_turn(forward_of(q, k, v, base), forward_of(changed[1], changed[2], changed[3], options))
  bar(name .. ", forward", masked / dense / divisor, limit)
  dense, masked = in_turn(backward_of(q, k, v, dout, base),
    backward_of(changed[1], changed[2], changed[3], dout, options))
  bar(name .. ", backward", masked / dense / divisor, limit)
  collectgarbage()
end

local function mask_bars(name, mask, size)
  ratio_bars(("%s, N %d, over dense by visible tiles"):format(name, size), 1.15, {mask = mask},
    {length = size, divisor = visible_tiles(mask, size)})
end

local function thread_bars(width)
  local q, k, v, dout = inputs {width = width}
  local function with(threads, fn)
    return function()
      sa.threads(threads)
      return fn()
    end
  end
  for way, fn in pairs {forward = forward_of(q, k, v, {}), backward = backward_of(q, k, v, dout, {})} do
    local one, two = in_turn(with(1, fn), with(2, fn))
    bar(("2 threads over 1, D%d %s"):format(width, way), one / two, 1.9, true)
  end
  sa.threads(1)
end

local function decoding_bars(dtype)
  local keys, cores = quick and 8192 or 65536, tonumber(sa.info().cores)
  local function random(of, seed) return sa.randn(of, {seed = seed, dtype = dtype}) end
  local q = random({1, 32, 1, 128}, 1)
  local k, v = random({1, 8, keys, 128}, 2), random({1, 8, keys, 128}, 3)
  local bytes = 2 * 8 * keys * 128 * (dtype == "f32" and 4 or 2)
  sa.threads(cores)
  local before = tonumber(lib.sa_measure_read())
  local seconds = in_turn(forward_of(q, k, v, {}))
  local read = math.max(before, tonumber(lib.sa_measure_read()))
  sa.threads(1)
  bar(("decoding, %s, 1 x %d, GQA 32:8, D128, %d threads: of %.1f GB/s"):format(dtype, keys, cores, read * 1e-9),
    bytes / seconds / read, 0.85, true, "%")
  collectgarbage()
end

local function small_bars()
  local shape = {8, 12, 128, 64}
  local q, k, v, dout = sa.randn(shape, {seed = 1}), sa.randn(shape, {seed = 2}), sa.randn(shape, {seed = 3}),
    sa.randn(shape, {seed = 4})
  local top = peak "f32"
  local seconds = in_turn(function()
    local run = sa.forward(q, k, v)
    local gradients = run:backward(dout)
    return function()
      run.out:free() run.lse:free()
      for _, gradient in pairs(gradients) do gradient:free() end
    end
  end)
  bar("[8,12,128,64] f32 forward + backward, of the peak", 14e-9 * 8 * 12 * 128 ^ 2 * 64 / seconds /
    ((top + peak "f32") / 2), 0.65, true, "%")
end

local function call_bars()
  local q, k, v = sa.randn({1, 1, 4, 8}, {seed = 1}), sa.randn({1, 1, 4, 8}, {seed = 2}),
    sa.randn({1, 1, 4, 8}, {seed = 3})
  local calls = quick and 2000 or 20000
  local forward, both = in_turn(function() for _ = 1, calls do sa.forward(q, k, v) end end,
    function() for _ = 1, calls do sa.forward(q, k, v):backward(q) end end)
  bar("a call on [1,1,4,8], forward", forward / calls * 1e6, 3, false, "us")
  bar("a call on [1,1,4,8], forward + backward", both / calls * 1e6, 6, false, "us")
  -- Two workers on what one does in some 100 us: what the second does not take off is the pool's.
  local x = sa.randn({1, 2, 128, 64}, {seed = 1})
  local function many(threads)
    return function()
      sa.threads(threads)
      for _ = 1, calls / 100 do sa.forward(x, x, x) end
    end
  end
  local one, two = in_turn(many(1), many(2))
  sa.threads(1)
  bar("the pool, warm: 2 threads' time less half of 1 thread's", (two - one / 2) / (calls / 100) * 1e6, 5, false, "us")
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
  if avx512 then
    assert(sa.isa "avx2")
    peak_bars("AVX2 tier, f32", "f32", 64, 0.8, 0.8)
    sa.isa "auto"
  end
  if tonumber(sa.info().cores) >= 2 then thread_bars(64) thread_bars(128) end
  ratio_bars("causal over dense", 0.56, {causal = true})
  mask_bars("window 512", m.window(512, 0), length)
  local ids, lengths = {}, {length + 37}
  for i = 1, length do ids[i] = math.floor((i - 1) * 8 / length) end
  mask_bars("8 documents, causal", m.documents(ids) * m.causal(), length)
  mask_bars("padding", m.padding(lengths), 2 * length)
  ratio_bars("random(0.5) over dense", 1.12, {mask = m.random(0.5, 1)})
  ratio_bars("finite bias [L,S] over dense", 1.25, {bias = sa.randn({length, length}, {seed = 7})})
  ratio_bars("dropout 0.1 over dense", 1.35, {dropout = 0.1, seed = 10})
  local middle = length / 2
  ratio_bars("NaN in a key row, causal, over clean", 2.2, {causal = true}, {base = {causal = true},
    prepare = function(_, k, v) k:select(3, middle):fill(0 / 0) v:select(3, middle):fill(0 / 0) end})
  local slopes, steep = sa.full({heads}, 1e-3), sa.full({heads}, 8)
  ratio_bars("ALiBi far below underflow over mild", 1.05, {alibi = steep}, {base = {alibi = slopes}})
  local bias = sa.randn({length, length}, {seed = 7})
  local low = sa.where(sa.rand({length, length}, {seed = 8}):lt(0.5), bias, sa.full({length, length}, -1e4))
  ratio_bars("bias of -10000 for half the pairs over mild", 1.05, {bias = low}, {base = {bias = bias}})
  decoding_bars "f32"
  decoding_bars "bf16"
  small_bars()
  call_bars()
end

-- The run -------------------------------------------------------------------------------------------------------------

local info = sa.info()
local f32, f64 = peak "f32", peak "f64"
print(("%s, %s, %d cores; fused multiply-add peak of one core: f32 %.0f GFLOP/s, f64 %.0f GFLOP/s"):format(
  sa._VERSION, info.isa, info.cores, f32, f64))
for _, name in ipairs(known_sections) do
  if not chosen[1] or chosen[name] then sections[name]() end
end

json.save("build/bench.json", {version = sa._VERSION, isa = info.isa, cores = tonumber(info.cores), quick = quick,
  batch = batch, heads = heads, length = length, f32_peak_gflops = f32, f64_peak_gflops = f64, results = results})
