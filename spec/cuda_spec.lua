-- CUDA devices: memory, copies, streams, masks that lie there, and what is said when something is missing

local helper = require "spec.helper"
local child = require "spec.child"
local sa = require "safeattn"
local core = require "safeattn.core"

local ffi, lib = core.ffi, core.lib
local nan = 0 / 0
local dtypes = {"f32", "f64", "f16", "bf16", "bool", "i32", "i64"}
local on = {device = "cuda"}

describe("without a CUDA device", function()
  -- Whatever there is, a library that cannot be opened stands for it.
  local absent = {environment = {SAFEATTN_CUDA_LIB = "/nowhere/cuda.so"}}

  it("whatever asks for one gives nil and what sa.devices says is missing", function()
    local output = child.must_run([[
local ffi = require "ffi"
local sa = require "safeattn"
local devices, why = sa.devices()
assert(#devices == 1 and devices[1] == "cpu")
print(why)
print(sa.info().cuda)
local on, memory = {device = "cuda"}, ffi.new "float[2]"
for name, make in pairs {
  empty = function() return sa.empty({2}, on) end, zeros = function() return sa.zeros({2}, on) end,
  ones = function() return sa.ones({2}, on) end, full = function() return sa.full({2}, true, on) end,
  rand = function() return sa.rand({2}, on) end,
  randn = function() return sa.randn({2}, {device = "cuda", seed = 1, requires_grad = true}) end,
  arange = function() return sa.arange(2, on) end, tensor = function() return sa.tensor({{1, 2}}, on) end,
  from_pointer = function() return sa.from_pointer(memory, {2}, on) end,
  to = function() return sa.ones({2}):to "cuda" end,
  to_both = function() return sa.ones({2}):to {dtype = "f64", device = "cuda"} end,
  memory = sa.cuda.memory, empty_cache = sa.cuda.empty_cache, stream = sa.cuda.stream,
  adopted = function() return sa.cuda.stream {pointer = ffi.cast("void *", memory)} end,
  synchronize = function() return sa.synchronize "cuda" end,
} do
  local made, missing = make()
  assert(made == nil and missing == why, name)
end
print(select(2, sa.ones({2}):to "cuda:1"))
assert(sa.synchronize() and sa.synchronize "cpu")
print(sa.ones({3}):sum():item())
]], absent)
    local missing = "the CUDA part cannot be loaded: /nowhere/cuda.so: cannot open shared object file[^\n]*\n"
    assert.matches("^there is no cuda:0: " .. missing .. "none: " .. missing .. "there is no cuda:1: " .. missing
      .. "3\n$", output)
  end)

  it("sa.info says all of it, however long", function()
    local path = "/nowhere" .. ("/of a long name"):rep(40) .. "/cuda.so"
    local output = child.must_run("print(require 'safeattn'.info().cuda)", {environment = {SAFEATTN_CUDA_LIB = path}})
    assert.matches("^none: the CUDA part cannot be loaded: " .. path .. ": cannot open shared object file[^\n]*\n$",
      output)
  end)

  it("what is wrong in any case raises", function()
    local output = child.must_run([[
local sa = require "safeattn"
for _, mistake in ipairs {
  function() sa.zeros({2}, {device = "cuda:x"}) end, function() sa.zeros({-1}, {device = "cuda"}) end,
  function() sa.full({2}, "1", {device = "cuda"}) end, function() sa.tensor({{1}, {2, 3}}, {device = "cuda"}) end,
  function() sa.rand({2}, {device = "cuda", dtype = "i32"}) end, function() sa.ones({2}):to {device = 7} end,
  function() sa.from_pointer(3, {2}, {device = "cuda"}) end, function() sa.synchronize "cuda:" end,
  function() sa.cuda.memory "cpu" end, function() sa.cuda.empty_cache(1) end,
  function() sa.cuda.stream {pointer = 1} end,
} do
  local succeeded, message = pcall(mistake)
  print(succeeded, (message:gsub("^.-:%d+: ", "")))
end
]], absent)
    local _, times = output:gsub("false\tsafeattn%.[%w_.]+: %w+: got [^\n]+, wanted [^\n]+\n", "")
    assert.equal(11, times, output)
  end)

  it("attention on tensors that say they lie there ends with the code of a missing device", function()
    local output = child.must_run([[
local core = require "safeattn.core"
local ffi, lib = core.ffi, core.lib
local data, t = ffi.new "float[12]", ffi.new "sa_tensor[3]"
for k = 0, 2 do
  assert(lib.sa_tensor_borrow(t[k], data + 4 * k, lib.SA_F32, lib.SA_CPU, 2, ffi.new("int64_t[2]", 2), nil) == 0)
  t[k].device = lib.SA_CUDA
end
local a = ffi.new "sa_attention"
lib.sa_attention_init(a)
a.q, a.k, a.v, a.out = t, t + 1, t + 1, t + 2
print(lib.sa_forward(a) == lib.SA_NO_DEVICE, ffi.string(lib.sa_last_error()))
]], absent)
    assert.matches("^true\tsa_forward: there is no cuda:0: the CUDA part cannot be loaded", output)
  end)

  it("a library that is no CUDA part is refused", function()
    local output = child.must_run('print(select(2, require("safeattn").devices()))',
      {environment = {SAFEATTN_CUDA_LIB = "libm.so.6"}})
    assert.matches("libm.so.6 is no CUDA part of safeattn", output)
  end)
end)

-- Tensors of every dtype with all that is odd in it.
local function sample(dtype, shape)
  local t = sa.randn(shape, {seed = 3}) * 300
  t:view(-1):narrow(1, 1, 4):copy(sa.tensor {nan, math.huge, -math.huge, 0})
  return t:to(dtype)
end

-- The same elements, NaN with NaN.
local function same(got, want)
  assert.equal(want.dtype, got.dtype)
  assert.tensor.same(got:to("cpu"), want:to("cpu"))
end

helper.describe_cuda("CUDA tensors", function()
  it("are made, read, written and printed there", function()
    for _, dtype in ipairs(dtypes) do
      local t = sa.full({2, 3}, 1, {dtype = dtype, device = "cuda"})
      assert.equal("cuda:0", t.device)
      assert.same(sa.full({2, 3}, 1, {dtype = dtype}):totable(), t:totable())
      t:set(2, 3, 0)
      local zero, one = 0, 1
      if dtype == "bool" then zero, one = false, true end
      assert.same({one, zero}, {t:get(2, 2), t:get(2, 3)})
    end
    assert.equal(7, sa.full({}, 7, on):item())
    local t = sa.tensor({{1, 2}, {3, 4}}, on)
    assert.matches("^f32%[2,2%] cuda:0 contiguous\nmin 1  max 4 .*1    2\n.*3    4", tostring(t))
    assert.same({}, sa.zeros({0, 3}, on):totable())
  end)

  it("are copied both ways and within, from and to every dtype and any strides", function()
    for _, from in ipairs(dtypes) do
      for _, to in ipairs(dtypes) do
        local t = sample(from, {5, 6, 7})
        local there = t:to("cuda")
        same(there, t)
        same(there:to(to), t:to(to))
        same(there:permute(3, 1, 2):to(to), t:permute(3, 1, 2):to(to))
        same(there:narrow(2, 2, 3):to {dtype = to, device = "cpu"}, t:narrow(2, 2, 3):to(to))
        same(t:transpose(1, 3):to {dtype = to, device = "cuda"}, t:transpose(1, 3):to(to))
        same(sa.zeros({7, 5, 6}, {dtype = to}):permute(2, 3, 1):copy(there), t:to(to))
        same(sa.zeros({7, 5, 6}, {dtype = to, device = "cuda"}):permute(2, 3, 1):copy(t), t:to(to))
      end
    end
  end)

  it("are copied from one device to another", function()
    if not sa.devices()[3] then return pending("there is one device") end
    local t = sample("bf16", {5, 6, 7})
    local there = t:to("cuda:1")
    assert.equal("cuda:1", there.device)
    same(there:transpose(1, 2):to("cuda:0"), t:transpose(1, 2))
    same(sa.zeros({7, 6, 5}, {device = "cuda:1"}):transpose(1, 3):copy(t:to("cuda:0")), t:to("f32"))
    -- not helper.message_of, which leaves out the device that all else is on
    local _, message = pcall(function() return there + t:to("cuda:0") end)
    assert.matches("b: got a tensor on cuda:0, wanted cuda:1 like a", message, 1, true)
  end)

  it("are there on the other device before they change or go on their own", function()
    if not sa.devices()[3] then return pending("there is one device") end
    local count = sa.info().cuda:find("Emulated", 1, true) and 2 ^ 12 or 2 ^ 26
    local t = sa.full({count}, 1, {device = "cuda:0"})
    local there = t:to("cuda:1")
    t:fill(2)
    assert.equal(1, there:max():item())
    local again = t:to("cuda:1")
    t:free()
    sa.full({count}, 3, {device = "cuda:0"})
    assert.same({2, 2}, {again:min():item(), again:max():item()})
  end)

  it("go with tensors on the same device only", function()
    local here, elsewhere = sa.ones({2, 3}, {device = "cuda"}), sa.full({3}, true)
    local _, message = pcall(here.masked_fill, here, elsewhere, 1)
    assert.matches("mask: got bool[3] on cpu, wanted a bool tensor that broadcasts to f32[2,3] on cuda:0", message, 1,
      true)
    _, message = pcall(sa.add, here, sa.ones {3})
    assert.matches("b: got a tensor on cpu, wanted cuda:0 like a", message, 1, true)
    for _, mistake in ipairs {
      function() sa.cat {here, sa.ones {2, 3}} end, function() sa.stack {here, sa.ones {2, 3}} end,
      function() here.grad = sa.ones {2, 3} end,
      function() sa.inspect(here, here, here, {}, sa.ones {2, 3}) end,
      function()
        local leaf = here:clone()
        leaf.requires_grad = true
        leaf:backward(sa.ones {2, 3})
      end,
    } do
      _, message = pcall(mistake)
      assert.matches("got f32%[2,3%] on cpu, wanted .*f32%[2,3%] on cuda:0", message)
    end
  end)

  it("on another device than the current one are attended to there", function()
    if not sa.devices()[3] then return pending("there is one device") end
    local shape, options = {1, 2, 70, 64}, {mask = sa.mask.random(0.5, 1)}
    for _, dtype in ipairs {"f32", "bf16"} do
      local function results(device)
        local function operand(seed) return sa.randn(shape, {seed = seed, dtype = dtype}):to(device) end
        local run = sa.forward(operand(1), operand(2), operand(3), options)
        local g = run:backward(operand(4))
        return {run.out, run.lse, g.dq, g.dk, g.dv}
      end
      local here, there, again = results "cuda:0", results "cuda:1", results "cuda:0"
      for n, t in ipairs(here) do
        assert.equal("cuda:1", there[n].device)
        same(there[n], t)
        same(again[n], t)
      end
    end
  end)

  it("stay on their device in arithmetic, and say when another does not", function()
    local a, b = sa.ones({3}, on), sa.ones {3}
    assert.equal("cuda:0", (a + a * 2).device)
    assert.matches("on cpu, wanted cuda:0", helper.message_of(function() return a + b end))
  end)

  it("of foreign memory are that memory", function()
    local owner = sa.zeros({6}, on)
    local t = sa.from_pointer(owner:data(), {3, 2}, {device = "cuda", stride = {2, 1}, owner = owner})
    t:select(2, 1):fill(5)
    assert.same({5, 0, 5, 0, 5, 0}, owner:totable())
  end)

  it("draw the numbers of the CPU", function()
    for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
      local function drawn(draw, device)
        return draw({3, 100001}, {seed = 0x123456789abcdef0ULL, dtype = dtype, device = device})
      end
      assert.tensor.bitwise(drawn(sa.rand, "cuda"):to("cpu"), drawn(sa.rand, "cpu"))
      assert.tensor.bitwise(drawn(sa.randn, "cuda"):to("cpu"), drawn(sa.randn, "cpu"))
    end
  end)

  it("have the statistics of the CPU", function()
    for _, dtype in ipairs(dtypes) do
      local t = sample(dtype, {70, 90})
      local got, want = t:to("cuda"):stats(), t:stats()
      for name, value in pairs(want) do
        local size = name == "mean" and math.max(want.max, -want.min) or math.abs(value)
        assert.is_true(math.abs(got[name] - value) <= 1e-12 * size, dtype .. " " .. name)
      end
    end
    local t = sa.full({3}, 1e200, {dtype = "f64", device = "cuda"})
    assert.equal(math.sqrt(3) * 1e200, t:stats().norm)
    assert.is_true(sa.equal(t, t:clone()))
    assert.is_false(sa.equal(t, t * 2))
    assert.is_true(sa.allclose(t, t * (1 + 1e-7)))
  end)
end)

helper.describe_cuda("the memory of a CUDA device", function()
  local function collect()
    collectgarbage()
    collectgarbage()
  end

  it("is counted, kept when released, and given back", function()
    collect()
    sa.cuda.empty_cache()
    local before = sa.cuda.memory()
    assert.equal(0, before.cached)
    local t = sa.empty({2 ^ 20}, on)
    local pointer = tostring(t:data())
    local with = sa.cuda.memory()
    assert.equal(4 * 2 ^ 20, with.bytes - before.bytes)
    assert.equal(1, with.blocks - before.blocks)
    assert.is_true(with.peak >= with.bytes and with.total >= with.free)
    t:free()
    assert.equal(4 * 2 ^ 20, sa.cuda.memory().cached)
    t = sa.empty({2 ^ 20}, on)
    assert.equal(pointer, tostring(t:data()))
    t:free()
    sa.cuda.empty_cache()
    assert.equal(0, sa.cuda.memory().cached)
  end)

  it("that is refused is an error with CUDA's text, after which all goes on", function()
    local message = helper.message_of(sa.zeros, {2 ^ 44}, on)
    assert.matches("safeattn%.zeros: out of memory: 70368744177664 bytes were refused by cuda:0: out of memory",
      message)
    assert.equal(3, sa.ones({3}, on):sum():item())
    assert.equal(3, sa.ones({3}):sum():item())
  end)

  it("that garbage holds is collected before more is refused", function()
    if sa.info().cuda:find("Emulated", 1, true) then return pending("the emulator's memory is the host's") end
    collect()
    sa.cuda.empty_cache()
    local count = math.floor(sa.cuda.memory().free * 0.6 / 4)
    for _ = 1, 3 do sa.empty({count}, on) end
    -- What was released but is kept for tensors of other sizes makes room too.
    sa.empty({count}, on):free()
    sa.empty({math.floor(count * 1.3)}, on):free()
    sa.cuda.empty_cache()
  end)

  it("of a device that is not there are nil and what there is", function()
    local made, missing = sa.zeros({1}, {device = "cuda:63"})
    assert.is_nil(made)
    assert.equal("there is no cuda:63, only " .. sa.info().cuda, missing)
  end)
end)

helper.describe_cuda("streams", function()
  it("are made, used and released; memory goes from one to the other in safety", function()
    local stream = sa.cuda.stream()
    local sum = stream:use(function()
      local t = sa.ones({1000}, on)
      return (t + t):sum()
    end)
    stream:synchronize()
    assert.equal(2000, sum:item())
    for n = 1, 50 do
      local t = sa.full({10000}, n, on)
      local other = stream:use(function() return sa.full({10000}, -n, on) end)
      t:free()
      stream:synchronize()
      assert.equal(-n, other:get(10000))
    end
    assert.has_error(function() stream:use(function() error("inside") end) end)
    assert.equal("safeattn.stream:use: fn: got 3, wanted a function", helper.message_of(stream.use, stream, 3))
    stream:release()
    assert.matches("was released", helper.message_of(stream.synchronize, stream))
  end)

  it("are left while their coroutine has yielded", function()
    local stream = sa.cuda.stream()
    local function current()
      local slot = ffi.new("void *[1]")
      assert.equal(0, lib.sa_cuda_stream(lib.SA_CUDA, slot))
      return slot[0]
    end
    local usual = current()
    local run = coroutine.wrap(function()
      return stream:use(function()
        coroutine.yield(current())
        return current()
      end)
    end)
    assert.is_true(run() == stream.pointer)
    assert.is_true(current() == usual)
    assert.is_true(run() == stream.pointer)
    assert.is_true(current() == usual)
    local interrupted = coroutine.wrap(function() stream:use(coroutine.yield) end)
    interrupted()
    stream:release()
    assert.matches("^safeattn.stream:use: stream: got one that was released", helper.message_of(interrupted))
    assert.is_true(current() == usual)
  end)

  it("of others are adopted by their pointer", function()
    local made = sa.cuda.stream()
    local adopted = sa.cuda.stream {pointer = made.pointer}
    assert.equal(6, adopted:use(function() return sa.full({2}, 3, on):sum():item() end))
    adopted:synchronize()
    assert.equal(6, made:use(function() return sa.full({2}, 3, on):sum():item() end))
    made:release()
    assert.matches("pointer: got 5, wanted a cudaStream_t", helper.message_of(sa.cuda.stream, {pointer = 5}))
  end)

  it("are waited for", function()
    sa.synchronize()
    sa.synchronize("cuda")
  end)
end)

helper.describe_cuda("masks of CUDA tensors", function()
  it("are packed there to the bits of the CPU", function()
    local sizes = {B = 3, H = 2, L = 140, S = 208}
    for _, shape in ipairs {{3, 2, 140, 208}, {3, 1, 140, 208}, {140, 208}, {1, 1, 1, 208}, {2, 140, 1}} do
      local visible = sa.rand(shape, {seed = 4}):lt(0.5)
      local function dense(t) return sa.mask.dense(t):dense(sizes) end
      assert.is_true(sa.equal(dense(visible:to("cuda")), dense(visible)))
      local rank = #shape
      local turned = visible:transpose(rank - 1, rank):contiguous():transpose(rank - 1, rank)
      assert.is_true(sa.equal(dense(turned:to("cuda")), dense(visible)))
      local function additive(t) return sa.mask.additive(t, {at_most = -0.5}):dense(sizes) end
      for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
        local bias = sa.randn(shape, {seed = 5, dtype = dtype})
        bias:view(-1):set(1, nan)
        assert.is_true(sa.equal(additive(bias:to("cuda")), additive(bias)))
      end
    end
  end)

  it("take ids of documents and blocks from there", function()
    local ids = sa.tensor({1, 1, 2, -1, 3, 3}, {dtype = "i32"})
    local keep = sa.rand({2, 3}, {seed = 1}):lt(0.5)
    for _, make in ipairs {
      function(place) return sa.mask.documents(ids:to(place)):dense {B = 1, H = 1, L = 6, S = 6} end,
      function(place) return sa.mask.blocks(keep:to(place), 2):dense {B = 1, H = 1, L = 4, S = 6} end,
    } do assert.is_true(sa.equal(make("cuda"), make("cpu"))) end
  end)
end)

helper.describe_cuda("the examples", function()
  local command = "DEVICE=cuda LUA_PATH='lua/?.lua;lua/?/init.lua;;' luajit examples/"

  local examples = {"tour.lua", "three_stances.lua"}
  if not os.getenv "SAFEATTN_QUICK" then table.insert(examples, "train_lines.lua 2 examples/text.txt") end

  for _, example in ipairs(examples) do
    it("run there: " .. example, function()
      child.must_command(command .. example)
    end)
  end
end)
