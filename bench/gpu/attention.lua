-- how fast attention is on a GPU: a table, and the same as JSON in build/bench-gpu.json, which peers.py reads
--
--   luajit bench/gpu/attention.lua [quick] [section ...]
--
-- Sections: dense short masked widths f32 decoding extras calls plans; all of them unless some are named. Data are
-- random and every case is warmed up. Times are medians by CUDA events around one call, all its launches included:
-- "burst", after a pause of 0.2 s, and "sustained", back to back for half a second (the chip is then limited by power).
-- `quick` measures bursts only. Flops count visible pairs: 2 (E + Ev) each forward, 2 (3 E + 2 Ev) backward. With
-- SAFEATTN_CUDA_KERNELS=portable the file is build/bench-gpu-portable.json, another of the peers.
local sa = require "safeattn"
local clock = require "bench.clock"
local json = require "bench.json"
local placing = require "bench.placing"
local ffi = require "ffi"
local m = sa.mask
local now, median = clock.now, clock.median

ffi.cdef [[
typedef struct bench_event *bench_event;
int cuEventCreate(bench_event *event, unsigned flags);
int cuEventRecord(bench_event event, void *stream);
int cuEventSynchronize(bench_event event);
int cuEventElapsedTime(float *milliseconds, bench_event start, bench_event end);
int usleep(unsigned microseconds);
]]

if #sa.devices() < 2 then
  io.stderr:write("bench: no GPU: ", tostring(sa.info().cuda), "\n")
  os.exit(2)
end

local sections, order, chosen, quick = {}, {}, {}, false
local function section(name, run) sections[name], order[#order + 1] = run, name end

-- Clocks --------------------------------------------------------------------------------------------------------------

local driver = ffi.load "libcuda.so.1"

local function event()
  local handle = ffi.new "bench_event[1]"
  assert(driver.cuEventCreate(handle, 0) == 0, "cuEventCreate failed")
  return handle[0]
end

-- fn's time on the device in microseconds: {burst =, sustained =}. fn may return a function that cleans up.
local events = {}
local function measure(fn)
  local function once(n)
    events[n] = events[n] or {event(), event()}
    driver.cuEventRecord(events[n][1], nil) -- in the default stream, like all the library does unless told
    local clean = fn()
    driver.cuEventRecord(events[n][2], nil)
    if clean then clean() end
  end
  local elapsed = ffi.new "float[1]"
  local function read(n)
    driver.cuEventSynchronize(events[n][2])
    assert(driver.cuEventElapsedTime(elapsed, events[n][1], events[n][2]) == 0, "cuEventElapsedTime failed")
    return elapsed[0] * 1e3
  end
  once(1) sa.synchronize()
  ffi.C.usleep(200000)
  local times = {}
  for n = 1, 3 do once(n) end
  sa.synchronize()
  for n = 1, 11 do once(n) times[n] = read(n) end
  local result = {burst = median(times)}
  if quick then return result end
  local count = math.max(10, math.min(400, math.ceil(5e5 / result.burst)))
  times = {}
  for n = 1, count do once(n) end
  sa.synchronize()
  for n = 1, count do times[n] = read(n) end
  result.sustained = median(times, math.floor(count / 2) + 1)
  return result
end

-- Results -------------------------------------------------------------------------------------------------------------

local results = {}

-- Masks, by the names that peers.py knows too.
local function lengths(batch, length)
  local all = {}
  for b = 1, batch do all[b] = math.floor(length / 8 + (length - length / 8) * (b - 1) / math.max(1, batch - 1)) end
  return all
end

local function document_ids(length)
  local ids = {}
  for i = 1, length do ids[i] = math.floor((i - 1) * 8 / length) end
  return ids
end

local masks = {
  full = function() return nil end,
  causal = function() return m.causal() end,
  window = function() return m.window(511, 0) end,
  documents = function(c) return m.documents(document_ids(c.queries)) * m.causal() end,
  padding = function(c) return m.padding(lengths(c.batch, c.keys), lengths(c.batch, c.queries)) end,
  random = function(c)
    return m.random(0.5, 1) * m.dense(sa.rand({c.queries, 1}, {seed = 2}):lt(0.9))
  end,
}

local function round(x) return math.floor(x * 100 + 0.5) / 100 end

-- Measures one case; `c` names shapes, dtype, mask and options.
local function attention(c)
  c.key_heads, c.queries, c.keys = c.key_heads or c.heads, c.queries or c.length, c.keys or c.length
  c.dtype, c.mask, c.value_width = c.dtype or "bf16", c.mask or "full", c.value_width or c.width
  local function random(heads, length, width, seed)
    return sa.randn({c.batch, heads, length, width}, {seed = seed, dtype = c.dtype, device = "cuda"})
  end
  local q, k = random(c.heads, c.queries, c.width, 1), random(c.key_heads, c.keys, c.width, 2)
  local v, dout = random(c.key_heads, c.keys, c.value_width, 3), random(c.heads, c.queries, c.value_width, 4)
  local mask, options = masks[c.mask](c), {}
  for name, value in pairs(c.options or {}) do options[name] = type(value) == "function" and value(c) or value end
  options.mask = mask
  local visible = mask and mask:density {B = c.batch, H = c.heads, L = c.queries, S = c.keys} or 1
  local run = sa.forward(q, k, v, options)
  c.kernel = run.kernel
  c.forward = measure(function()
    local again = sa.forward(q, k, v, options)
    return function() again.out:free() again.lse:free() end
  end)
  if not c.forward_only then
    c.backward = measure(function()
      local gradients = run:backward(dout)
      return function() for _, gradient in pairs(gradients) do gradient:free() end end
    end)
    c.backward_kernel = run.kernel
  end
  local pairs_seen = c.batch * c.heads * c.queries * c.keys * visible
  c.visible, c.options = visible, nil
  c.forward_flops = 2 * pairs_seen * (c.width + c.value_width)
  c.backward_flops = 2 * pairs_seen * (3 * c.width + 2 * c.value_width)
  c.bytes = c.batch * c.key_heads * c.keys * (c.width + c.value_width) * (c.dtype == "f32" and 4 or 2)
  results[#results + 1] = c
  local function half(t, flops)
    if not t then return "" end
    local sustained = t.sustained or t.burst
    return ("%9.1f %6.1f  %9.1f %6.1f"):format(t.burst, flops / t.burst * 1e-6, sustained, flops / sustained * 1e-6)
  end
  print(("%-46s %s | %s  %s"):format(c.name, half(c.forward, c.forward_flops), half(c.backward, c.backward_flops),
    c.kernel))
  q:free() k:free() v:free() dout:free() run.out:free() run.lse:free()
  collectgarbage() collectgarbage()
end

local function title(text)
  print(("\n%-46s %s | %s"):format(text, "fwd burst us  TF/s  sustained TF/s", "bwd burst us  TF/s  sustained TF/s"))
end

-- Sections ------------------------------------------------------------------------------------------------------------

local function full_and_causal(c)
  for _, mask in ipairs {"full", "causal"} do
    local case = {mask = mask}
    for key, value in pairs(c) do case[key] = value end
    case.name = c.name .. " " .. mask
    attention(case)
  end
end

local function lengths_and_masks(all)
  for _, width in ipairs {128, 64} do
    for _, length in ipairs(all) do
      full_and_causal {name = ("bf16 D%d N%d"):format(width, length), batch = 16384 / length, heads = 2048 / width,
        length = length, width = width}
    end
  end
end

section("dense", function()
  title "dense, 16384 tokens, 2048 columns of all heads"
  lengths_and_masks {8192, 16384}
  attention {name = "f16 D128 N8192 full", batch = 2, heads = 16, length = 8192, width = 128, dtype = "f16"}
end)

section("short", function()
  title "the same, short"
  lengths_and_masks {512, 2048}
end)

section("masked", function()
  title "masks, B4 H16 N4096"
  for _, case in ipairs {{"bf16", 128}, {"bf16", 64}, {"f16", 128}} do
    for _, mask in ipairs {"random", "padding", "window", "documents"} do
      attention {name = ("%s D%d %s"):format(case[1], case[2], mask), batch = 4, heads = 16, length = 4096,
        dtype = case[1], width = case[2], mask = mask}
    end
  end
end)

section("widths", function()
  title "other widths and grouped heads, 16384 tokens or 8192"
  for _, width in ipairs {96, 192, 256} do
    full_and_causal {name = ("bf16 D%d N8192"):format(width), batch = 2, heads = 8, length = 8192, width = width}
  end
  full_and_causal {name = "bf16 192/128 N8192", batch = 2, heads = 8, length = 8192, width = 192, value_width = 128}
  for _, length in ipairs {2048, 8192} do
    full_and_causal {name = ("bf16 D128 N%d, 32:8 heads"):format(length), batch = 8192 / length, heads = 32,
      key_heads = 8, length = length, width = 128}
  end
end)

section("f32", function()
  title "f32, real accuracy"
  for _, width in ipairs {64, 128} do
    attention {name = ("f32 D%d N2048 full"):format(width), batch = 8, heads = 2048 / width, length = 2048,
      width = width, dtype = "f32"}
  end
  for _, mask in ipairs {"random", "padding", "window", "documents"} do
    attention {name = "f32 D128 N4096 " .. mask, batch = 4, heads = 16, length = 4096, width = 128, dtype = "f32",
      mask = mask}
  end
end)

section("decoding", function()
  print(("\n%-46s %9s %6s"):format("one query, bf16, heads 32:8, D128", "us", "TB/s"))
  for _, case in ipairs {{1, 8192}, {16, 8192}, {1, 131072}, {4, 131072}} do
    local c = {name = ("decoding B%d, %d keys"):format(case[1], case[2]), batch = case[1], heads = 32, key_heads = 8,
      queries = 1, keys = case[2], width = 128, forward_only = true}
    attention(c)
    print(("%-46s %9.1f %6.2f"):format("", c.forward.burst, c.bytes / c.forward.burst * 1e-6))
  end
end)

section("extras", function()
  title "options, B4 H16 N4096 D128 bf16"
  local function cuda(shape, seed, dtype)
    return sa.randn(shape, {seed = seed, dtype = dtype or "bf16", device = "cuda"})
  end
  for _, case in ipairs {
    {"none", {}},
    {"bias [L,S] bf16", {bias = function(c) return cuda({c.queries, c.keys}, 5) end}},
    {"bias [H,L,S] f32", {bias = function(c) return cuda({c.heads, c.queries, c.keys}, 5, "f32") end}},
    {"softcap 30", {softcap = 30}},
    {"alibi", {alibi = function(c) return cuda({c.heads}, 6) end}},
    {"sinks", {sinks = function(c) return cuda({c.heads}, 7) end}},
    {"dropout 0.1", {dropout = 0.1, seed = 8}},
    {"any order of sums", {deterministic = false}},
  } do
    attention {name = case[1], batch = 4, heads = 16, length = 4096, width = 128, options = case[2]}
  end
end)

-- Microseconds of the host's time a call takes, `count` of them in a row.
local function per_call(count, fn)
  local times = {}
  for round_number = 1, 20 do
    local start = now()
    for _ = 1, count do fn() end
    times[round_number] = (now() - start) / count * 1e6
    sa.synchronize()
    collectgarbage()
  end
  return median(times)
end

-- The same on the core that is quickest: one that shares its units with another guest's work takes 1.4 times as long.
local function per_quick_call(count, fn)
  local least = math.huge
  for _, core in ipairs(placing.list()) do
    least = math.min(least, placing.on(core, function() return per_call(count, fn) end)())
  end
  return least
end

section("calls", function()
  print "\nthe host's side of a call on [1,8,64,64] bf16, microseconds, on the quickest core"
  local function tensor(seed)
    return sa.randn({1, 8, 64, 64}, {seed = seed, dtype = "bf16", device = "cuda"})
  end
  local q, k, v, dout = tensor(1), tensor(2), tensor(3), tensor(4)
  local forward = per_quick_call(200, function()
    local run = sa.forward(q, k, v)
    run.out:free() run.lse:free()
  end)
  local both = per_quick_call(200, function()
    local run = sa.forward(q, k, v)
    for _, gradient in pairs(run:backward(dout)) do gradient:free() end
    run.out:free() run.lse:free()
  end)
  print(("forward %.1f, forward and backward %.1f"):format(forward, both))
  results[#results + 1] = {name = "calls", forward_us = round(forward), both_us = round(both)}
end)

section("plans", function()
  print "\nplans at N 16384: made and uploaded by the first call, found by the next; what finding one adds to a call"
  local q = sa.randn({4, 1, 16384, 64}, {seed = 1, dtype = "bf16", device = "cuda"})
  local short = sa.randn({4, 1, 64, 64}, {seed = 1, dtype = "bf16", device = "cuda"}) -- the device keeps pace
  sa.forward(q, q, q, {mask = m.causal() * m.padding {16384, 16384, 16384, 16384}})
  local function call(mask)
    local start = now()
    local run = sa.forward(q, q, q, {mask = mask})
    local time = now() - start
    sa.synchronize()
    run.out:free() run.lse:free()
    return time * 1e6
  end
  local function host(options)
    return per_call(200, function()
      local run = sa.forward(short, short, short, options)
      run.out:free() run.lse:free()
    end)
  end
  host {}
  for _, name in ipairs {"causal", "window", "padding", "documents"} do
    local mask = masks[name] {batch = 4, queries = 16384, keys = 16384}
    sa.synchronize()
    local first, again = call(mask), call(mask)
    local added = host {mask = masks[name] {batch = 4, queries = 64, keys = 64}} - host {}
    print(("%-12s first call %8.1f us, next %8.1f us; %6.2f us"):format(name, first, again, added))
    results[#results + 1] = {name = "plan " .. name, first_us = round(first), next_us = round(again),
      added_us = round(added)}
  end
end)

-- The run -------------------------------------------------------------------------------------------------------------

for _, word in ipairs(arg) do
  if word == "quick" then
    quick = true
  elseif sections[word] then
    chosen[word], chosen[1] = true, true
  else
    io.stderr:write("bench: no section called ", word, "; there are ", table.concat(order, " "), "\n")
    os.exit(2)
  end
end

sa.zeros({1}, {device = "cuda"}) -- makes the device's context current for the events
print(("safeattn %s; %s"):format(sa._VERSION, sa.info().cuda))
for _, name in ipairs(order) do
  if not chosen[1] or chosen[name] then sections[name]() end
end

local portable = os.getenv "SAFEATTN_CUDA_KERNELS" == "portable"
json.save(portable and "build/bench-gpu-portable.json" or "build/bench-gpu.json",
  {version = sa._VERSION, device = sa.info().cuda, quick = quick, results = results})
