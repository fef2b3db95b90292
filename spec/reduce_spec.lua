-- reductions: sums, means, extremes over any dims of any layout, the order of sums, and what NaN and emptiness do

local helper = require "spec.helper"
local sa = helper.sa

local inf, nan = math.huge, 0 / 0

-- The definition over a [a,b,c] tensor: fn(accumulated, x) folds the elements whose dim is reduced.
local function folded(x, reduced, start, fn)
  x = x:to("cpu") -- an element at a time
  local shape = {}
  for d = 1, 3 do shape[d] = reduced[d] and 1 or x:size(d) end
  local out = sa.full(shape, start, {dtype = "f64", device = "cpu"})
  for i = 1, x:size(1) do
    for j = 1, x:size(2) do
      for k = 1, x:size(3) do
        local index = {reduced[1] and 1 or i, reduced[2] and 1 or j, reduced[3] and 1 or k}
        local before = out:get(unpack(index))
        index[4] = fn(before, x:get(i, j, k))
        out:set(unpack(index))
      end
    end
  end
  return out:to(helper.device)
end

local function larger(a, x) return (x > a or x ~= x) and x or a end
local function smaller(a, x) return (x < a or x ~= x) and x or a end

local layouts = {
  contiguous = function(x) return x end,
  transposed = function(x) return x:transpose(1, 3):contiguous():transpose(1, 3) end,
  apart = function(x) return sa.full({x:size(2), x:size(1), x:size(3), 2}, nan, {dtype = x.dtype}):select(4, 1)
    :transpose(1, 2):copy(x) end,
}

describe("reductions", function()
  for dtype, tolerance in pairs {f32 = 1e-6, f64 = 1e-14, f16 = 1e-3, bf16 = 8e-3} do
    it("run over every choice of dims, in every layout, in " .. dtype, function()
      local x = sa.randn({3, 33, 20}, {seed = 1, dtype = dtype})
      x:set(2, 5, 7, nan)
      x:set(1, 1, 1, inf)
      for layout, of in pairs(layouts) do
        for choice = 0, 7 do
          local reduced, dims = {choice % 2 == 1, choice % 4 > 1, choice > 3}, {}
          local count = 1
          for d = 1, 3 do
            if reduced[d] then
              table.insert(dims, d)
              count = count * x:size(d)
            end
          end
          local sum = folded(x, reduced, 0, function(a, v) return a + v end)
          local options = {rtol = tolerance, atol = 20 * tolerance, nonfinite = "same"}
          local y = of(x)
          assert.tensor.near(y:sum(dims, {keep = true}), sum, options)
          assert.tensor.near(y:mean(dims, {keep = true}), sum / count, options)
          assert.tensor.same(y:max(dims, {keep = true}), folded(x, reduced, -inf, larger), layout)
          assert.tensor.same(y:min(dims, {keep = true}), folded(x, reduced, inf, smaller), layout)
          assert.same(3 - #dims, y:sum(dims):dim())
        end
      end
    end)

    it("find the first of the greatest, NaN before all, in " .. dtype, function()
      local x = sa.tensor({{1, 3, 3}, {-inf, -inf, -inf}, {2, nan, nan}, {inf, 1, nan}}, {dtype = dtype})
      for _, t in ipairs {x, x:transpose(1, 2):contiguous():transpose(1, 2)} do
        assert.same({2, 1, 2, 3}, t:argmax(2):totable())
        assert.same({4, 3, 3}, t:argmax(1):totable())
      end
    end)
  end

  it("add up in f64: what f32 would lose is there", function()
    local x = sa.ones {3000, 1000}
    x:set(1, 1, 2 ^ 24) -- in f32, adding 1 to it changes nothing
    assert.equal(2 ^ 24 + 3000000, x:sum():item()) -- one less, rounded to even
    assert.tensor.same(sa.tensor {2 ^ 30, 1, -2 ^ 30}:sum(), sa.tensor(1))
    assert.tensor.same(sa.full({70000}, 1, {dtype = "f16"}):mean(), sa.tensor(1))
  end)

  it("give the same bits on any thread count", function()
    local x = sa.randn({40, 300, 200}, {seed = 1})
    local function results()
      return {x:sum(), x:sum(1), x:sum(2), x:sum(3), x:sum {1, 3}, x:max(2), x:mean {1, 2}}
    end
    local many = results()
    helper.with_threads(1, function()
      for k, one in ipairs(results()) do assert.tensor.bitwise(one, many[k]) end
    end)
  end)

  it("count and add integers exactly", function()
    local big = sa.tensor({1, 1}, {dtype = "i64"})
    big:set(1, 2LL ^ 53 + 1)
    assert.equal(2LL ^ 53 + 2, big:sum():get())
    assert.equal(2LL ^ 53 + 1, big:max():get())
    local b = sa.tensor {{true, false}, {true, true}}
    assert.equal("i64", b:sum().dtype)
    assert.same({2, 1}, b:sum(1):totable())
    assert.same({false, true}, b:min(2):totable())
    assert.same({2, 1}, sa.tensor({{1, 5}, {7, 2}}, {dtype = "i32"}):argmax(2):totable())
  end)

  it("of nothing are 0, NaN, or an error", function()
    local none = sa.zeros {2, 0}
    assert.tensor.same(none:sum(2), {0, 0})
    assert.tensor.same(none:mean(2), {nan, nan})
    assert.same({0}, none:max(1).shape)
    assert.same({0}, none:argmax(1).shape)
    for _, name in ipairs {"max", "min", "argmax"} do
      local says = "safeattn." .. name .. ": x: got f32[2,0] with nothing to choose from, wanted something in every"
        .. " dim that is reduced"
      assert.equal(says, helper.message_of(none[name], none, 2))
    end
  end)

  it("take expanded tensors", function()
    local x = sa.tensor {1, 2, 3}:expand(1000, 3)
    assert.tensor.same(x:sum(1), {1000, 2000, 3000})
    assert.tensor.same(x:transpose(1, 2):sum(1), sa.full({1000}, 6))
    assert.equal(6000, x:sum():item())
  end)
end)
