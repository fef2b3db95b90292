-- memory: garbage is collected by its bytes, refusals are errors that leave everything as it was, nothing leaks

local sa = require "safeattn"
local core = require "safeattn.core"
local child = require "spec.child"

local ffi, lib = core.ffi, core.lib

local function collect()
  -- twice: finalisers run after the first
  collectgarbage()
  collectgarbage()
end

local function use()
  local counted = ffi.new "sa_memory_use"
  lib.sa_memory(counted)
  return {
    bytes = tonumber(counted.bytes), blocks = tonumber(counted.blocks), internal = tonumber(counted.internal_bytes),
  }
end

-- What children of this suite print of themselves, in KiB.
local process = [[
local function status(name)
  for line in io.lines "/proc/self/status" do
    local kib = line:match("^" .. name .. ":%s*(%d+) kB")
    if kib then return tonumber(kib) end
  end
end
local sa = require "safeattn"
]]

local MIB = 1024 -- KiB

describe("garbage", function()
  it("of 20,000 tensors of 16 MiB stays under 1 GiB", function()
    local peak = child.must_run(process .. [[
for k = 1, 20000 do
  local t = sa.empty {4 * 2 ^ 20}
  if k % 1000 == 0 then t:set(1, 1) end
end
print(status "VmHWM")
]])
    assert.is_true(tonumber(peak) < 1024 * MIB, peak)
  end)

  it("that was written to stays under 1 GiB too", function()
    local peak = child.must_run(process .. [[
for _ = 1, 300 do sa.zeros {4 * 2 ^ 20} end
print(status "VmHWM")
]])
    assert.is_true(tonumber(peak) < 1024 * MIB, peak)
  end)

  it("of tapes and masks is collected: cycles and all", function()
    local function round(n)
      local q = sa.randn({1, 2, 130 + n % 3, 16}, {seed = n, requires_grad = true})
      local ids = {}
      for i = 1, 130 + n % 3 do ids[i] = math.floor(i / (20 + n % 7)) end
      local mask = sa.mask.documents(ids) * sa.mask.causal()
      local out, more = sa.sdpa(q, q, q, {mask = mask, lse = true, weights = true})
      out:backward(out:detach())
      return more
    end
    round(1)
    collect()
    local before = use()
    for n = 1, 60 do round(n) end
    collect()
    assert.same(before, use())
  end)

  it("is told from what lives, however they mix: none is lost and none given back too early", function()
    collect()
    local before = use()
    local kept, n = {}, 0
    for round = 1, 12 do
      for k = 1, 150 do
        n = n + 1
        kept[n] = {sa.full({k}, n), bytes = 4 * k}
        if k % 10 == 0 then kept[n][1]:free() kept[n] = nil end
      end
      for k = 1, n do
        if kept[k] and (k * 7919 + round * 104729) % 5 < 2 then kept[k] = nil end
      end
      collect()
      local bytes, blocks = before.bytes, before.blocks
      for k = 1, n do
        local t = kept[k]
        if t then
          bytes, blocks = bytes + t.bytes, blocks + 1
          assert.same({k, k}, {t[1]:stats().min, t[1]:stats().max})
        end
      end
      assert.same({bytes, blocks}, {use().bytes, use().blocks})
    end
    for k = 1, n do kept[k] = nil end
    collect()
    assert.same(before, use())
  end)

  it("may be collected between any two instructions, as by the hook of a debugger", function()
    child.must_run([[
jit.off()
local sa = require "safeattn"
local function walk()
  local halves = sa.randn({9, 7}, {seed = 1, dtype = "bf16"}):totable()
  local turned = sa.randn({9, 7}, {seed = 1}):transpose(1, 2):totable()
  local plain = sa.randn({9, 7}, {seed = 1}):to("f64"):totable()
  local weights = sa.randn({4, 4}, {seed = 2, requires_grad = true})
  sa.sdpa(weights, weights, weights * 2, {causal = true}):sum():backward()
  return {halves, turned, plain, weights.grad:totable()}
end
local function same(a, b)
  if type(a) ~= "table" then return a == b end
  for n = 1, #a do
    if not same(a[n], b[n]) then return false end
  end
  return #a == #b
end
local want = walk()
debug.sethook(function() collectgarbage() end, "", 11)
for _ = 1, 2 do assert(same(walk(), want), "memory was lost while it was read") end
]], {environment = {MALLOC_PERTURB_ = "85"}})
  end)

  it("is given back at once by free, while views keep what they see", function()
    collect()
    local before = use()
    local t = sa.ones {1024, 1024}
    local row = t:select(1, 5)
    assert.equal(before.bytes + 4 * 2 ^ 20, use().bytes)
    t:free()
    assert.equal(before.bytes + 4 * 2 ^ 20, use().bytes)
    assert.equal(1024, row:sum():item())
    assert.has_error(function() return t:numel() end)
    row:free()
    collect()
    assert.equal(before.bytes, use().bytes)
  end)
end)

describe("attention", function()
  it("over 16384 queries and keys needs at most 64 MiB beyond inputs and outputs, forward and backward", function()
    local output = child.must_run(process .. [[
local core = require "safeattn.core"
local ffi, lib = core.ffi, core.lib
local shape = {1, 8, 16384, 64}
local inputs = {}
for k = 1, 4 do inputs[k] = sa.randn(shape, {seed = k}) end
local q, k, v, dout = unpack(inputs)
-- what is there once for all: threads, their stacks, compiled Lua
local part = q:narrow(3, 1, 256)
sa.forward(part, part, part, {causal = true}):backward(part)
collectgarbage()
collectgarbage()
lib.sa_memory_reset_peak()
local counted = ffi.new "sa_memory_use"
lib.sa_memory(counted)
local bytes, resident = tonumber(counted.bytes), status "VmRSS"
local run = sa.forward(q, k, v, {causal = true})
local g = run:backward(dout)
local outputs = 0
for _, t in ipairs {run.out, run.lse, g.dq, g.dk, g.dv} do outputs = outputs + t:numel() * 4 end
lib.sa_memory(counted)
assert(g.dq:stats().nan == 0 and g.dq:stats().norm > 0)
print(tonumber(counted.peak_bytes) - bytes - outputs, (status "VmHWM" - resident) * 1024 - outputs)
]])
    local counted, resident = output:match "(%-?%d+)%s+(%-?%d+)"
    assert.is_true(tonumber(counted) <= 64 * 2 ^ 20, counted)
    assert.is_true(tonumber(resident) <= 64 * 2 ^ 20, resident)
  end)
end)

describe("a refused allocation", function()
  it("beyond the machine is an error that names the size", function()
    local t = sa.ones {4, 4}
    for _, shape in ipairs {{2 ^ 48}, {2 ^ 25, 2 ^ 23}, {2 ^ 52, 2 ^ 52}, {2 ^ 53, 2 ^ 53, 2 ^ 53}} do
      local ok, message = pcall(sa.empty, shape)
      assert.is_false(ok)
      assert.matches("^spec/memory_spec.lua:%d+: safeattn%.empty: ", message)
      assert.matches("%d%d%d%d%d%d%d%d%d", message)
    end
    local _, message = pcall(sa.empty, {2 ^ 48})
    assert.matches("1125899906842624", message, 1, true)
    assert.is_true(sa.equal(t, sa.sdpa(t, t, t)))
  end)

  it("under a limit of the address space is an error, and the program goes on", function()
    local output = child.must_run(process .. [[
local small = sa.randn({1, 2, 64, 16}, {seed = 1})
local before = sa.sdpa(small, small, small)
for _ = 1, 3 do
  print(select(2, pcall(sa.zeros, {2 ^ 30})))
  local long = sa.zeros {1, 1, 20000, 8}
  print(select(2, pcall(sa.sdpa, long, long, long, {weights = true})))
  print(select(2, pcall(function() return sa.mask.dense(sa.full({1}, true):expand(70000, 70000)):dense() end)))
end
assert(sa.equal(before, sa.sdpa(small, small, small)))
local kept = {}
-- garbage that holds the memory is collected before an allocation fails for good
for k = 1, 40 do kept[k % 4] = sa.empty {32 * 2 ^ 20} end
print "went on"
]], {before = "ulimit -v 1500000"})
    local _, zeros = output:gsub("safeattn%.zeros: out of memory: 4294967296 bytes", "")
    local _, weights = output:gsub("safeattn%.sdpa: out of memory: 1600000000 bytes", "")
    local _, dense = output:gsub("safeattn%.mask:dense: out of memory: 4900000000 bytes", "")
    assert.same({3, 3, 3}, {zeros, weights, dense}, output)
    assert.matches("went on\n$", output)
  end)
end)

-- The n-th allocation of a call fails, and so does the first (or the `again`-th) of the second try that follows a
-- collection.
local function refusing(n, f, again)
  local collectgarbage = collectgarbage
  _G.collectgarbage = function(...)
    local result = collectgarbage(...)
    lib.sa_memory_fail(again or 1)
    return result
  end
  lib.sa_memory_fail(n)
  local ok, result = pcall(f)
  _G.collectgarbage = collectgarbage
  lib.sa_memory_fail(0)
  return ok, result
end

-- The bytes of all allocations of a call, as each says when it is refused.
local function allocated(f)
  local bytes, n = 0, 0
  while true do
    n = n + 1
    local ok, message = refusing(n, f, n)
    if ok then return bytes end
    bytes = bytes + assert(tonumber(message:match "out of memory: (%d+) bytes"), message)
  end
end

describe("scratch", function()
  local threads = sa.threads()
  after_each(function() sa.threads(threads) end)

  -- What a call of so many threads takes besides its outputs.
  local function scratch(count, f, outputs)
    sa.threads(count)
    local bytes = allocated(f)
    for _, t in pairs(outputs()) do bytes = bytes - t:numel() * lib.sa_dtype_size(core.dtypes[t.dtype]) end
    return tonumber(bytes)
  end

  local function padded(n, to) return math.ceil(n / to) * to end

  for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
    it("is at most 1 MiB a thread and 64 bytes a row, forward and backward, whatever the width: " .. dtype, function()
      local heads = 16
      for _, width in ipairs {8, 64, 65, 128, 161, 200, 255, 256} do
        local function random(seed, length) return sa.randn({1, heads, length, width}, {seed = seed, dtype = dtype}) end
        local function at_most(what, kernel, queries, keys, f, outputs)
          -- AMX has a copy of V, or of K, with the keys along its rows.
          local turned = kernel:find "amx" and 2 * heads * padded(keys, 128) * padded(width, 32) or 0
          local one, two = scratch(1, f, outputs), scratch(2, f, outputs)
          what = ("%s of width %d: %d and %d bytes"):format(what, width, one, two)
          local rest = 64 * heads * queries + 8192 + turned
          assert.is_true(one > 0 and one <= 2 ^ 20 + rest and two <= 2 * 2 ^ 20 + rest, what)
        end
        local q, k = random(1, 512), random(2, 128)
        local function forward() return sa.forward(q, k, k) end
        at_most("forward", forward().kernel, 512, 128, forward, function()
          local run = forward()
          return {run.out, run.lse}
        end)
        q, k = random(3, 64), random(4, 1024)
        local run = sa.forward(q, k, k)
        at_most("backward", run.kernel, 64, 1024, function() run:backward(q) end, function() return run:backward(q) end)
      end
    end)
  end

  it("of half types has dQ of a few heads, whose places are taken again: the same bits of any threads", function()
    local heads, m = 24, sa.mask
    local masks = {dense = m.window(2000, 2000), causal = m.causal(), window = m.window(100, 0)}
    for _, dtype in ipairs {"f16", "bf16"} do
      local function random(seed, length) return sa.randn({1, heads, length, 64}, {seed = seed, dtype = dtype}) end
      local q, k, v, dout = random(1, 1024), random(2, 640), random(3, 640), random(4, 1024)
      for name, mask in pairs(masks) do
        sa.threads(1)
        local run = sa.forward(q, k, v, {mask = mask})
        local first = run:backward(dout)
        for _, count in ipairs {2, 3, 5} do
          sa.threads(count)
          for of, gradient in pairs(run:backward(dout)) do
            assert.is_true(sa.equal(first[of], gradient), ("%s %s: %s of %d threads"):format(dtype, name, of, count))
          end
        end
      end
    end
  end)
end)

describe("an allocation that fails", function()
  -- What LuaJIT compiles or is about to may hold a mask as a constant until it compiles something else.
  setup(function()
    jit.off()
    jit.flush()
  end)
  teardown(function() jit.on() end)

  local m = sa.mask
  local function floats(seed, ...)
    return sa.randn({...}, {seed = seed})
  end

  local cases = {
    {"forward and backward with everything", function(backend)
      local q, k, v = floats(1, 2, 4, 150, 16), floats(2, 2, 2, 140, 16), floats(3, 2, 2, 140, 24)
      local bias, sinks, alibi = floats(4, 1, 4, 150, 140), floats(5, 4), floats(6, 4)
      local ids, keys = {}, {}
      for i = 1, 150 do ids[i] = math.floor(i / 50) end
      for j = 1, 140 do keys[j] = math.floor(j / 40) end
      local dout, dlse = floats(7, 2, 4, 150, 24), floats(8, 2, 4, 150)
      return function()
        local mask = m.documents(ids, keys) * m.padding({140, 100}) + m.fn(function(_, _, i, j) return i == j end)
        local run = sa.forward(q, k, v, {mask = mask, bias = bias, sinks = sinks, alibi = alibi, weights = true,
          causal = "bottom-right", window = {100, nil}, softcap = 20, dropout = 0.1, seed = 3, backend = backend})
        run:backward(dout, dlse)
      end
    end},
    {"strided inputs", function(backend)
      -- the last dim is strided, so rows have to be copied
      local q = floats(1, 16, 150, 2):permute(3, 2, 1)
      local dout = floats(2, 16, 150, 2):permute(3, 2, 1)
      return function() sa.forward(q, q, q, {backend = backend}):backward(dout) end
    end},
    {"one query over many keys", function(backend)
      local q, k = floats(1, 1, 2, 1, 32), floats(2, 1, 2, 5000, 32)
      return function() sa.forward(q, k, k, {backend = backend}):backward(q) end
    end},
    {"half types on the tape", function(backend)
      local q = sa.randn({1, 2, 140, 16}, {seed = 1, dtype = "bf16"})
      local visible = sa.full({140, 140}, true)
      return function()
        local leaf = q:clone()
        leaf.requires_grad = true
        local out, more = sa.sdpa(leaf, leaf, leaf, {mask = visible, lse = true, backend = backend})
        local both = sa.merge({out, out}, {more.lse, more.lse})
        both:backward(q)
        sa.softmax(leaf, {dim = 1}):backward(q)
      end
    end},
  }

  for _, case in ipairs(cases) do
    for _, backend in ipairs {"fused", "reference"} do
      it("is an error and leaks nothing: " .. case[1] .. ", " .. backend, function()
        local work = case[2](backend)
        work()
        collect()
        lib.sa_memory_fail(0)
        local before, n = use(), 0
        repeat
          n = n + 1
          local ok, message = refusing(n, work)
          if not ok then
            assert.is_string(message)
            assert.matches("safeattn%.[%w_.:()]+: out of memory: %d+ bytes", message)
          end
          collect()
          assert.same(before, use(), "after allocation " .. n)
        until ok
        assert.is_true(n > 5, "only " .. n .. " allocations")
      end)
    end
  end

  it("goes unnoticed when collecting garbage helps", function()
    local q = floats(1, 1, 2, 150, 16)
    local expected = sa.sdpa(q, q, q, {causal = true})
    for n = 1, 8 do
      lib.sa_memory_fail(n)
      assert.is_true(sa.equal(expected, sa.sdpa(q, q, q, {causal = true})))
    end
    lib.sa_memory_fail(0)
  end)

  it("leaves a given output as it was", function()
    local q, out = floats(1, 1, 2, 150, 16), sa.full({1, 2, 150, 16}, 5)
    local refused = 0
    for n = 1, 50 do
      local ok = refusing(n, function() sa.sdpa(q, q, q, {out = out, weights = true, mask = m.causal()}) end)
      if ok then break end
      refused = refused + 1
      assert.is_true(sa.equal(sa.full({1, 2, 150, 16}, 5), out))
    end
    assert.is_true(refused > 2)
    assert.is_false(sa.equal(sa.full({1, 2, 150, 16}, 5), out))
  end)
end)
