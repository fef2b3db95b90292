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
local sa = require "safeattn"
local core = require "safeattn.core"
local bars = require "bench.bars"
local cases = require "bench.cases"
local clock = require "bench.clock"
local json = require "bench.json"
local ffi, lib = core.ffi, core.lib

local known_sections = {"bars", "shapes", "masks", "extras", "dtypes", "tiers", "calls", "plans"}
local chosen = {}
for _, word in ipairs(arg) do
  if word == "quick" then
    cases.hurry()
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

local quick, batch, heads, length = cases.quick, cases.batch, cases.heads, cases.length
local measure, peak, slice, turns = cases.measure, cases.peak, cases.slice, cases.turns

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

-- Measures forward and backward, taking turns with the peak and with the case `base`, and prints a line.
local function attention(section, name, case, base)
  local threads, dtype = case.threads or 1, case.dtype or "f32"
  local result = record(section, name, {threads = threads, dtype = dtype})
  local halves = {}
  for n, way in ipairs {"forward", "backward"} do
    local flops = (way == "forward" and 4 or 10) * batch * heads * length ^ 2 * (case.width or 64)
    local ideal, here = cases.at_peak(flops, dtype, threads), slice(cases.one_way(case, way))
    local times = base and turns(ideal, slice(cases.one_way(base, way)), here) or turns(ideal, here)
    local taken = times[#times]
    local share, seconds = clock.spread(clock.compare(taken, times[1], cases.under)), clock.median(taken)
    local dense = base and clock.spread(clock.compare(taken, times[2], cases.over)) or {low = 1, median = 1, high = 1}
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

--- What the kernels are held to: bench/bars.lua.
function sections.bars()
  title(("bars, B1 H8 L=S=%d f32 D64, 1 thread, unless said"):format(length))
  bars.measure(function(name) return record("bars", name, {}) end, function() json.write(path, run) end)
end

-- The run -------------------------------------------------------------------------------------------------------------

print(("%s, %s, %d cores; fused multiply-add peak of one core: f32 %.0f GFLOP/s, f64 %.0f GFLOP/s"):format(
  sa._VERSION, info.isa, info.cores, run.f32_peak_gflops, run.f64_peak_gflops))
for _, name in ipairs(known_sections) do
  if not chosen[1] or chosen[name] then sections[name]() end
end
json.save(path, run)
