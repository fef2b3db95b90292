-- tensors: creation, fields, elements, casts, borrowed memory and lifetime

local helper = require "spec.helper"
local ffi = require "ffi"
local sa = helper.sa

local inf, nan = math.huge, 0 / 0
local dtypes = {"f32", "f64", "f16", "bf16", "bool", "i32", "i64"}
local floats = {"f32", "f64", "f16", "bf16"}

describe("creation", function()
  it("takes the shape and the values of nested tables", function()
    local t = sa.tensor {{1, 2, 3}, {4, 5, 6}}
    assert.same({2, 3}, t.shape)
    assert.equal("f32", t.dtype)
    assert.equal(t:to(helper.device), t)
    assert.same({{1, 2, 3}, {4, 5, 6}}, t:totable())
  end)

  it("makes a scalar of a bare number, and a bool tensor of booleans", function()
    assert.same({}, sa.tensor(5).shape)
    assert.equal(5, sa.tensor(5):item())
    assert.equal("bool", sa.tensor(true).dtype)
    assert.same({{true, false}, {false, true}}, sa.tensor({{true, false}, {false, true}}):totable())
  end)

  it("keeps the shape of empty tables", function()
    assert.same({0}, sa.tensor({}).shape)
    assert.same({2, 0}, sa.tensor({{}, {}}).shape)
    assert.same({{}, {}}, sa.tensor({{}, {}}):totable())
  end)

  it("fills tensors of every dtype", function()
    for _, dtype in ipairs(dtypes) do
      local options = {dtype = dtype}
      local zero, one = 0, 1
      if dtype == "bool" then zero, one = false, true end
      assert.same({{zero, zero}}, sa.zeros({1, 2}, options):totable())
      assert.same({one, one, one}, sa.ones({3}, options):totable())
      assert.equal(dtype, sa.empty({4}, options).dtype)
      assert.same({2, 3}, sa.empty({2, 3}, options).shape)
    end
    assert.same({2.5, 2.5}, sa.full({2}, 2.5):totable())
    assert.same({true}, sa.full({1}, true):totable())
    assert.equal("bool", sa.full({1}, true).dtype)
    assert.same({-3}, sa.full({1}, -3, {dtype = "i64"}):totable())
  end)

  it("counts from 0, or as it is told", function()
    assert.same({0, 1, 2, 3}, sa.arange(4):totable())
    assert.same({1, 2, 3}, sa.arange(3, {start = 1, dtype = "i32"}):totable())
    assert.same({5, 3, 1}, sa.arange(3, {start = 5, step = -2}):totable())
    assert.same({}, sa.arange(0):totable())
  end)

  it("draws the same numbers from the same seed, on any thread count, and others from another", function()
    for _, draw in ipairs {sa.rand, sa.randn} do
      local a = draw({1000}, {seed = 7})
      assert.tensor.bitwise(draw({10, 100}, {seed = 7}):view(1000), a)
      assert.is_false(sa.equal(draw({1000}, {seed = 8}), a))
      assert.is_false(sa.equal(draw({1000}), draw({1000})))
    end
  end)

  it("draws uniform numbers in [0, 1), and normal ones", function()
    local s = sa.rand({100000}, {seed = 1, dtype = "f64"}):stats()
    assert.is_true(s.min >= 0 and s.max < 1)
    assert.is_true(math.abs(s.mean - 0.5) < 0.005)
    local x = sa.randn({100000}, {seed = 1, dtype = "f64"})
    s = x:stats()
    assert.is_true(math.abs(s.mean) < 0.02 and math.abs(s.norm ^ 2 / s.count - 1) < 0.02)
    assert.is_true(math.abs(x:lt(1):to("f64"):mean():item() - 0.8413) < 0.005)
  end)

  it("draws the same sequence again after sa.seed", function()
    sa.seed(42)
    local a, b = sa.randn({10}), sa.randn({10})
    assert.is_false(sa.equal(a, b))
    sa.seed(42)
    assert.tensor.bitwise(sa.randn({10}), a)
    assert.tensor.bitwise(sa.randn({10}), b)
    assert.equal(42, sa.seed())
    sa.seed(0)
  end)

  it("marks what requires grad", function()
    assert.is_true(sa.zeros({2}, {requires_grad = true}).requires_grad)
    assert.is_false(sa.zeros({2}).requires_grad)
    assert.is_true(sa.tensor({1}, {dtype = "f64", requires_grad = true}).requires_grad)
  end)
end)

describe("fields", function()
  it("give a fresh shape every time", function()
    local t = sa.zeros {2, 3}
    t.shape[1] = 7
    assert.same({2, 3}, t.shape)
  end)

  it("give sizes and strides by dim, from either end", function()
    local t = sa.zeros {2, 3, 4}
    assert.equal(3, t:dim())
    assert.equal(4, t:size(3))
    assert.equal(2, t:size(-3))
    assert.same({2, 3, 4}, t:size())
    assert.equal(12, t:stride(1))
    assert.equal(1, t:stride(-1))
    assert.same({12, 4, 1}, t:stride())
    assert.equal(24, t:numel())
    assert.equal(1, sa.tensor(3):numel())
  end)

  it("take a gradient of the same kind", function()
    local t = sa.zeros {2}
    assert.is_nil(t.grad)
    t.grad = sa.ones {2}
    assert.same({1, 1}, t.grad:totable())
    t.grad = nil
    assert.is_nil(t.grad)
  end)

  it("that do not exist are errors, read or written, with a suggestion", function()
    local t = sa.zeros {2}
    assert.equal('safeattn.tensor: got unknown field or method "shpae", did you mean shape?',
      helper.message_of(function() return t.shpae end))
    assert.equal('safeattn.tensor: got an assignment to "grads", wanted one to grad or requires_grad',
      helper.message_of(function() t.grads = 1 end))
  end)
end)

describe("elements", function()
  it("are read and written in every dtype", function()
    for _, dtype in ipairs(dtypes) do
      local t = sa.zeros({2, 3}, {dtype = dtype})
      t:set(2, 3, dtype == "bool" and true or 1)
      local want = 1
      if dtype == "bool" then want = true end
      assert.equal(want, t:get(2, 3))
      assert.equal(dtype ~= "bool" and 0, t:get(1, 1) )
    end
  end)

  it("of i64 beyond 2^53 come as int64_t", function()
    local big = 9007199254740993LL
    local t = sa.tensor({big, 5}, {dtype = "i64"})
    assert.is_true(ffi.istype("int64_t", t:get(1)))
    assert.is_true(t:get(1) == big)
    assert.equal(5, t:get(2))
    assert.is_true(t:totable()[1] == big)
    t:set(2, big + 1)
    assert.is_true(t:get(2) == big + 1)
    t:fill(big)
    assert.is_true(t:get(2) == big)
    assert.equal(2 ^ 53, sa.tensor({2 ^ 53}, {dtype = "i64"}):get(1))
  end)

  it("of a tensor with one element are its item", function()
    assert.equal(3.5, sa.tensor({{3.5}}):item())
    assert.equal(true, sa.tensor({true}):item())
  end)

  it("are copied with casts and broadcasting", function()
    local t = sa.zeros({2, 3}, {dtype = "i32"})
    assert.equal(t, t:copy(sa.tensor {1.9, -2.9, nan}))
    assert.same({{1, -2, 0}, {1, -2, 0}}, t:totable())
  end)

  it("are filled through views", function()
    local t = sa.zeros {2, 3}
    t:transpose(1, 2):narrow(1, 2, 2):fill(7)
    assert.same({{0, 7, 7}, {0, 7, 7}}, t:totable())
  end)

  it("lie behind data(), typed", function()
    local types = {f32 = "float *", f64 = "double *", f16 = "uint16_t *", bf16 = "uint16_t *", bool = "bool *",
      i32 = "int32_t *", i64 = "int64_t *"}
    for dtype, ctype in pairs(types) do
      assert.is_true(ffi.istype(ctype, sa.ones({3}, {dtype = dtype}):data()))
    end
    local t = sa.tensor({1, 2, 3}, {device = "cpu"})
    assert.equal(3, t:data()[2])
    assert.equal(2, t:narrow(1, 2, 1):data()[0])
    assert.equal(0, tonumber(ffi.cast("uintptr_t", t:data())) % 64)
  end)
end)

describe("casts", function()
  it("give the tensor itself when nothing changes, else a new one", function()
    local t = sa.tensor {1.5, -2.5}
    assert.equal(t, t:to("f32"))
    assert.equal(t, t:to(helper.device))
    assert.equal(t, t:to {dtype = "f32", device = helper.device})
    assert.equal("f64", t:to("f64").dtype)
    assert.same({1, -2}, t:to("i32"):totable())
    assert.same({true, true}, t:to {dtype = "bool"}:totable())
  end)

  it("round to nearest, ties to even", function()
    -- f16 has 11 significant bits, bf16 has 8: 2049 and 257 lie half way
    assert.same({2048, 2052}, sa.tensor({2049, 2051}, {dtype = "f16"}):totable())
    assert.same({256, 260}, sa.tensor({257, 259}, {dtype = "bf16"}):totable())
    assert.same({inf, -inf}, sa.tensor({65520, -1e9}, {dtype = "f16"}):totable())
    -- one rounding, not two: just above half way in f64, half way in f32
    assert.same({258}, sa.tensor({257 + 2 ^ -40}, {dtype = "bf16"}):totable())
  end)

  it("carry NaN and infinities", function()
    for _, from in ipairs(floats) do
      for _, to in ipairs(floats) do
        local t = sa.tensor({nan, inf, -inf}, {dtype = from}):to(to):totable()
        assert.is_true(t[1] ~= t[1] and t[2] == inf and t[3] == -inf, from .. " to " .. to)
      end
    end
  end)
end)

describe("stats", function()
  it("count what is odd and measure what is finite", function()
    local s = sa.tensor({{3, nan, 0}, {inf, -4, -inf}}):stats()
    assert.same({min = -4, max = 3, mean = -1 / 3, norm = 5, nan = 1, posinf = 1, neginf = 1, zero = 1, count = 6}, s)
  end)
end)

describe("comparison", function()
  it("wants shape, dtype and values to agree", function()
    local a = sa.tensor {1, 2}
    assert.is_true(sa.equal(a, sa.tensor {1, 2}))
    assert.is_true(sa.equal(sa.tensor {0}, sa.tensor {-0.0}))
    assert.is_false(sa.equal(a, sa.tensor {1, 3}))
    assert.is_false(sa.equal(a, sa.tensor {{1, 2}}))
    assert.is_false(sa.equal(a, sa.tensor({1, 2}, {dtype = "f64"})))
    assert.is_false(sa.equal(sa.tensor {nan}, sa.tensor {nan}))
  end)

  it("allows a tolerance, never a NaN unless asked", function()
    local a = sa.tensor({1, nan, inf}, {dtype = "f64"})
    local b = sa.tensor({1.001, nan, inf}, {dtype = "f64"})
    assert.is_false(sa.allclose(a, b, {rtol = 0.01}))
    assert.is_true(sa.allclose(a, b, {rtol = 0.01, equal_nan = true}))
    assert.is_false(sa.allclose(a, b, {rtol = 1e-4, equal_nan = true}))
    assert.is_false(sa.allclose(sa.tensor {inf}, sa.tensor {-inf}, {atol = inf}))
  end)
end)

describe("borrowed memory", function()
  it("is read and written in place", function()
    local memory = ffi.new("float[6]", {1, 2, 3, 4, 5, 6})
    local t = sa.from_pointer(memory, {2, 3})
    assert.same({{1, 2, 3}, {4, 5, 6}}, t:totable())
    t:set(2, 1, 9)
    assert.equal(9, memory[3])
    assert.is_true(t:data() == ffi.cast("float *", memory))
  end)

  it("takes its dtype from the pointer, or as told", function()
    local want = {["double[2]"] = "f64", ["int32_t[2]"] = "i32", ["int64_t[2]"] = "i64", ["bool[2]"] = "bool"}
    for ctype, dtype in pairs(want) do assert.equal(dtype, sa.from_pointer(ffi.new(ctype), {2}).dtype) end
    local halves = ffi.new("uint16_t[1]", 0x3F80)
    assert.equal(1, sa.from_pointer(halves, {1}, {dtype = "bf16"}):item())
    assert.equal(1.875, sa.from_pointer(halves, {1}, {dtype = "f16"}):item())
    assert.equal("f32", sa.from_pointer(ffi.cast("const float *", ffi.new("float[1]")), {1}).dtype)
  end)

  it("may be strided", function()
    local memory = ffi.new("double[6]", {1, 2, 3, 4, 5, 6})
    assert.same({{1, 4}, {2, 5}, {3, 6}}, sa.from_pointer(memory, {3, 2}, {stride = {1, 3}}):totable())
  end)

  it("that is const is read, not written", function()
    local text = "\0\0\128\63"
    local t = sa.from_pointer(ffi.cast("const float *", text), {1})
    assert.equal(1, t:item())
    for _, change in ipairs {
      function() t:fill(0) end, function() t:view(1, 1):set(1, 1, 0) end, function() t:copy(sa.zeros {1}) end,
    } do
      assert.matches("^safeattn%.%w+: t: got a tensor on memory that was given as const", helper.message_of(change))
    end
    assert.equal("\0\0\128\63", text)
  end)

  it("lives as long as the tensor or a view of it", function()
    local died = false
    local function borrowed()
      local owner = ffi.gc(ffi.new("float[4]", {1, 2, 3, 4}), function() died = true end)
      return sa.from_pointer(ffi.cast("float *", owner), {2, 2}, {owner = owner})
    end
    local view = borrowed():transpose(1, 2)
    collectgarbage()
    collectgarbage()
    assert.is_false(died)
    assert.same({{1, 3}, {2, 4}}, view:totable())
    view = nil -- luacheck: ignore
    collectgarbage()
    collectgarbage()
    assert.is_true(died)
  end)
end)

describe("lifetime", function()
  local lib = require("safeattn.core").lib

  local function blocks_now()
    if helper.device ~= "cpu" then return sa.cuda.memory(helper.device).blocks end
    local use = ffi.new("sa_memory_use")
    lib.sa_memory(use)
    return tonumber(use.blocks)
  end

  local function blocks()
    collectgarbage()
    collectgarbage()
    return blocks_now()
  end

  it("ends with the last view", function()
    local before = blocks()
    local view = sa.zeros({10}):narrow(1, 2, 3)
    assert.equal(before + 1, blocks())
    assert.same({0, 0, 0}, view:totable())
    view = nil -- luacheck: ignore
    assert.equal(before, blocks())
  end)

  it("ends at once with free, unless a view holds the memory", function()
    local before = blocks()
    local t = sa.zeros {10}
    t:free()
    assert.equal(before, blocks_now())
    local base = sa.ones {10}
    local view = base:narrow(1, 1, 2)
    base:free()
    assert.same({1, 1}, view:totable())
  end)

  it("makes every later use of a freed tensor an error", function()
    local t = sa.zeros {2}
    t:free()
    for _, use in ipairs {
      function() return t:get(1) end, function() return t.shape end, function() return t + 1 end,
      function() t:free() end, function() t:fill(0) end, function() return sa.equal(t, t) end,
      function() return t:data() end, function() t.requires_grad = true end,
    } do
      assert.matches("^safeattn%.[%w_]+: %w+: got a tensor that was freed, wanted one that lives$",
        helper.message_of(use))
    end
    assert.equal("a tensor that was freed", tostring(t))
  end)

  it("does not outgrow its memory when garbage piles up", function()
    local peak, use = 0, ffi.new("sa_memory_use")
    for _ = 1, 2000 do
      sa.empty({4 * 2 ^ 20}):set(1, 1)
      lib.sa_memory(use)
      peak = math.max(peak, tonumber(use.bytes))
    end
    assert.is_true(peak < 600 * 2 ^ 20)
  end)

  it("survives a refused allocation, and names the size", function()
    local message = helper.message_of(sa.empty, {2 ^ 40, 2 ^ 10})
    assert.matches("^safeattn%.empty: .*4503599627370496 bytes", message)
    assert.matches("^safeattn%.empty: ", helper.message_of(sa.empty, {2 ^ 53, 2 ^ 53}))
    assert.same({1, 1}, sa.ones({2}):totable())
  end)

  it("is not read where a descriptor says more dims than there can be", function()
    local t = ffi.new("sa_tensor", {ndim = 9})
    for dim = 0, 7 do t.shape[dim], t.stride[dim] = 2, 2 end
    assert.equal(0, tonumber(lib.sa_tensor_numel(t)))
    assert.is_true(lib.sa_tensor_contiguous(t))
    local first, last = ffi.new "const char *[1]", ffi.new "const char *[1]"
    lib.sa_tensor_extent(t, first, last)
    assert.is_true(first[0] == last[0])
  end)

  it("collects garbage and tries again when memory is refused once", function()
    lib.sa_memory_fail(1)
    assert.same({1, 1}, sa.ones({2}):totable())
    lib.sa_memory_fail(0)
  end)
end)

describe("the host", function()
  it("is described", function()
    local info = sa.info()
    assert.equal("safeattn " .. info.version, sa._VERSION)
    assert.is_true(info.threads >= 1 and info.cores >= 1)
    assert.is_true(#info.isas >= 1)
    assert.equal("generic", info.isas[1])
    assert.equal("cpu", sa.devices()[1])
    if #sa.devices() == 1 then assert.is_string(select(2, sa.devices())) end
  end)

  it("lets threads and the instruction set be chosen", function()
    helper.with_threads(2, function() assert.equal(2, sa.threads()) end)
    helper.each_isa(function(isa) assert.equal(isa, sa.info().isa) end)
    assert.matches("^safeattn%.isa: ", helper.message_of(sa.isa, "mmx"))
  end)
end)
