-- what masks cost on one core: making one, compiling it the first time, finding it again; and how large the plan is
--
--   LUA_PATH="lua/?.lua;lua/?/init.lua;;" luajit bench/plan.lua
--
-- Times are of the processor, the best of some runs. Goals are for making and compiling together.
local core = require "safeattn.core"
local sa = require "safeattn"
local clock = require "bench.clock"
local ffi, lib = core.ffi, core.lib

local function milliseconds() return clock.spent() * 1e3 end

local function check(status)
  if status ~= 0 then error(ffi.string(lib.sa_last_error()), 2) end
end

local function construct(name, ...)
  local out = ffi.new "sa_mask *[1]"
  check(lib["sa_mask_" .. name](out, ...))
  return ffi.gc(out[0], lib.sa_mask_release)
end

local function compile(mask, L, S)
  local out = ffi.new "const sa_plan *[1]"
  check(lib.sa_mask_plan(out, mask, 0, -1, -1, 1, 1, L, S))
  return ffi.gc(out[0], lib.sa_plan_release)
end

-- What is measured ----------------------------------------------------------------------------------------------------

local function causal() return construct("causal", lib.SA_TOP_LEFT) end

-- Ids of n positions, a new document where starts(i) says so.
local function ids(n, starts)
  local t = sa.empty({n}, {dtype = "i64"})
  local id = 0
  for i = 0, n - 1 do
    if starts(i) then id = id + 1 end
    t:data()[i] = id
  end
  return t
end

math.randomseed(1)
local even = ids(131072, function(i) return i % 131 == 0 end)
local uneven = ids(131072, function() return math.random(131) == 1 end)
local short = ids(16384, function() return math.random(131) == 1 end)
local unsorted = sa.empty({16384}, {dtype = "i64"})
for i = 0, 16383 do unsorted:data()[i] = math.random(1000) end
local square = {L = 8192, S = 8192}
local flags = sa.mask.random(0.5, 1):dense(square):view(8192, 8192)
local lower = sa.mask.causal():dense(square):view(8192, 8192)
local bias = sa.zeros {8192, 8192}
for i = 0, 8191 do
  for j = i + 1, 8191 do bias:data()[i * 8192 + j] = -math.huge end
end

local function documents(t) return construct("documents", nil, t.handle) end

-- name, length, how it is made, goal in ms, goal in KiB
local cases = {
  {"causal", 131072, causal, 100, 2048},
  {"causal", 1048576, causal},
  {"documents of 131 x causal", 131072, function() return construct("and", documents(even), causal()) end, 200, 8192},
  {"uneven documents x causal", 131072, function() return construct("and", documents(uneven), causal()) end, 200, 8192},
  {"global + window", 131072, function()
    return construct("or", construct("global", 10), construct("window", 256, 256, lib.SA_NO_CAUSAL))
  end},
  {"causal", 16384, causal, 1},
  {"window(1000, 1000)", 16384, function() return construct("window", 1000, 1000, lib.SA_NO_CAUSAL) end, 1},
  {"padding", 16384, function() return construct("padding", ffi.new("int64_t[1]", 11000), nil, 1) end, 1},
  {"prefix + causal", 16384, function()
    return construct("or", construct("prefix", ffi.new("int64_t[1]", 777), 1), causal())
  end, 1},
  {"uneven documents", 16384, function() return documents(short) end, 1},
  {"unsorted documents", 16384, function() return documents(unsorted) end},
  {"dense, half of all pairs", 8192, function() return construct("dense", flags.handle) end, 60},
  {"dense, transposed", 8192, function() return construct("dense", flags:transpose(1, 2).handle) end},
  {"dense, causal", 8192, function() return construct("dense", lower.handle) end, 60},
  {"additive f32, causal", 8192, function() return construct("additive", bias.handle, -math.huge) end},
  {"random(0.5)", 8192, function() return construct("random", 0.5, 1) end},
}

-- The measurement -----------------------------------------------------------------------------------------------------

local RUNS = 7

local function measure(length, make)
  local making, compiling, plan = math.huge, math.huge, nil
  for _ = 1, RUNS do
    collectgarbage()
    collectgarbage()
    local start = milliseconds()
    local mask = make()
    local made = milliseconds()
    plan = compile(mask, length, length)
    making, compiling = math.min(making, made - start), math.min(compiling, milliseconds() - made)
  end
  local counts = ffi.new "sa_plan_counts"
  lib.sa_plan_count(plan, counts)
  return making, compiling, counts
end

local missed = 0
local line = "%-28s %8s %9s %11s %9s %9s  %s"
print(line:format("mask", "L = S", "made, ms", "compiled", "KiB", "patterns", "goal"))
for _, case in ipairs(cases) do
  local name, length, make, most_ms, most_kib = unpack(case, 1, 5)
  local making, compiling, counts = measure(length, make)
  local kib = tonumber(counts.bytes) / 1024
  local goal = ""
  if most_ms then
    local met = making + compiling <= most_ms and kib <= (most_kib or math.huge)
    goal = ("%d ms%s: %s"):format(most_ms, most_kib and (", %d KiB"):format(most_kib) or "", met and "met" or "missed")
    missed = missed + (met and 0 or 1)
  end
  print(line:format(name, length, ("%.3f"):format(making), ("%.3f"):format(compiling), ("%.0f"):format(kib),
    tonumber(counts.patterns), goal))
end

local TIMES = 1000000
local out, mask = ffi.new "const sa_plan *[1]", causal()
for _, case in ipairs {{"with its mask", mask}, {"without a mask", nil}} do
  local start = milliseconds()
  for _ = 1, TIMES do
    check(lib.sa_mask_plan(out, case[2], 0, -1, -1, 1, 1, 512, 512))
    lib.sa_plan_release(out[0])
  end
  print(("a plan found again %s: %.0f ns"):format(case[1], (milliseconds() - start) * 1e6 / TIMES))
end
os.exit(missed == 0 and 0 or 1)
