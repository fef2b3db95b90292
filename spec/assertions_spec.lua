-- the assertions for users' suites: each passes and fails as it should, negated too, and says where

local sa = require "safeattn"
require "safeattn.assertions"
local child = require "spec.child"

local inf, nan = math.huge, 0 / 0

-- Calls an assertion that must raise, and gives its message.
local function message_of(assertion, ...)
  local succeeded, problem = pcall(assertion, ...)
  assert.is_false(succeeded, "the assertion passed")
  return type(problem) == "table" and tostring(problem.message or problem) or tostring(problem)
end

local function fails(pattern, assertion, ...)
  assert.matches(pattern, message_of(assertion, ...), 1, true)
end

describe("assert.tensor.near", function()
  local t = sa.tensor({{1, 2}, {3, 4}}, {dtype = "f64"})

  it("passes within the tolerance and names the worst element beyond it", function()
    assert.tensor.near(t, {{1, 2}, {3, 4.01}}, {atol = 0.02})
    assert.tensor.near(t, {{1, 2}, {3, 4.01}}, {rtol = 0.01})
    assert.tensor.near(t:to("bf16"), t)
    assert.tensor.near(sa.tensor {inf, -inf}, {inf, -inf})
    fails("2 of 4 elements differ (atol 0.1, rtol 0); the worst at [2,2]: got 4, wanted 5", assert.tensor.near, t,
      {{1, 2.5}, {3, 5}}, {atol = 0.1})
    fails("has not the shape of", assert.tensor.near, t, {1, 2, 3, 4})
  end)

  it("passes negated only when elements differ", function()
    assert.is_not.tensor.near(t, {{1, 2}, {3, 5}}, {atol = 0.5})
    fails("holds, and should not", assert.is_not.tensor.near, t, t)
    fails("different shapes", assert.is_not.tensor.near, t, {1, 2, 3, 4})
  end)

  it("never passes on a NaN, negated or not, unless it is meant", function()
    local bad = sa.tensor {1, nan}
    for _, assertion in ipairs {assert.tensor.near, assert.is_not.tensor.near, assert.tensor.equal,
      assert.is_not.tensor.equal} do
      fails("got: holds a NaN", assertion, bad, {1, 2})
      fails("want: holds a NaN", assertion, {1, 2}, bad)
      fails("holds a NaN", assertion, bad, bad)
      fails("got: holds a NaN", assertion, nan, 1)
    end
    assert.tensor.near(bad, bad, {nonfinite = "same"})
    assert.tensor.equal(bad, bad, {nonfinite = "same"})
    assert.is_not.tensor.near(bad, {1, 2}, {nonfinite = "same", atol = inf})
  end)

  it("says what is wrong with its arguments", function()
    fails("assert.tensor.near: got: got nil, wanted a tensor, nested tables or a number", assert.tensor.near, nil, t)
    fails("want: got \"x\"", assert.tensor.near, t, "x")
    fails("want: got a table", assert.tensor.near, t, {{1}, {2, 3}})
    fails('unknown option "tol", wanted atol, nonfinite or rtol', assert.tensor.near, t, t, {tol = 1})
    fails("atol: got nan, wanted a number of at least 0", assert.tensor.near, t, t, {atol = nan})
    fails("options: got 3, wanted a table", assert.tensor.near, t, t, 3)
  end)
end)

describe("assert.tensor.equal", function()
  it("compares values in one dtype", function()
    assert.tensor.equal(sa.tensor {0, 1}, sa.tensor {-0.0, 1})
    assert.tensor.equal(sa.tensor {true, false}, {true, false})
    assert.is_not.tensor.equal(sa.tensor {1}, sa.tensor({1}, {dtype = "f64"}))
    fails("wanted f64[1]", assert.tensor.equal, sa.tensor {1}, sa.tensor({1}, {dtype = "f64"}))
    fails("the worst at [2]: got 1, wanted 2", assert.tensor.equal, sa.tensor {0, 1}, {0, 2})
  end)
end)

describe("assert.tensor.bitwise", function()
  it("tells -0 from 0 and dtypes apart, and takes a NaN for itself", function()
    assert.tensor.bitwise(sa.tensor {1, nan}, sa.tensor {1, nan})
    assert.is_not.tensor.bitwise(sa.tensor {1}, sa.tensor({1}, {dtype = "f64"}))
    fails("the bits differ first at [2]: got 0, wanted -0", assert.tensor.bitwise, sa.tensor {1, 0},
      sa.tensor {1, -0.0})
    fails("want: got 1, wanted a tensor", assert.tensor.bitwise, sa.tensor {1}, 1)
  end)
end)

describe("assert.tensor.finite, zero, shape and dtype", function()
  it("pass and fail", function()
    local t = sa.tensor {{0, 1}, {2, inf}}
    assert.tensor.finite(sa.tensor {1, 2})
    assert.is_not.tensor.finite(sa.tensor {1, nan})
    fails("0 NaN, 1 Inf, 0 -Inf; the first: f32[2,2] at [2,2] is inf, wanted a finite number", assert.tensor.finite, t)
    assert.tensor.zero(sa.zeros {2, 2})
    assert.tensor.zero(sa.tensor {-0.0})
    assert.tensor.zero(sa.tensor {false})
    assert.tensor.zero(sa.zeros {0})
    assert.is_not.tensor.zero(t)
    fails("f32[2,2] at [1,2] is 1, wanted 0", assert.tensor.zero, t)
    fails("holds a NaN", assert.is_not.tensor.zero, sa.tensor {nan})
    fails("at [1] is nan, wanted 0", assert.tensor.zero, sa.tensor {nan})
    assert.tensor.shape(t, {2, 2})
    assert.is_not.tensor.shape(t, {4})
    fails("got f32[2,2], wanted the shape [2,3]", assert.tensor.shape, t, {2, 3})
    assert.tensor.dtype(t, "f32")
    assert.is_not.tensor.dtype(t, "f64")
    fails("got f32[2,2], wanted f64", assert.tensor.dtype, t, "f64")
    fails('name: got "f63"', assert.is_not.tensor.dtype, t, "f63")
    fails("t: got nil, wanted a tensor", assert.tensor.finite, nil)
  end)

  it("print tensors in the messages of others", function()
    fails("f32[2] cpu contiguous", assert.equal, sa.tensor {1, 2}, sa.tensor {1, 3})
  end)
end)

describe("assert.gradients", function()
  local function wrong(x)
    return x:detach():exp() + x -- the gradient of the first part is missing
  end

  it("passes right gradients, and shows where wrong ones are", function()
    local x = sa.randn({2, 3}, {seed = 1})
    assert.gradients(function(y) return y:exp() + y end, {x})
    assert.is_not.gradients(wrong, {x})
    fails("gradcheck FAILED", assert.gradients, wrong, {x})
    fails("safeattn.gradcheck: fn: got nil", assert.gradients, nil, {x})
  end)

  it("does not pass on a NaN by negation", function()
    local x = sa.tensor {-1, 2}
    fails("gradcheck FAILED", assert.gradients, function(y) return y:log() end, {x})
    fails("is not finite, so that is_not says nothing", assert.is_not.gradients, function(y) return y:log() end, {x})
  end)
end)

describe("assert.masked_safe", function()
  local mask = sa.mask.documents {1, 1, 2, -1, 2, 2} * sa.mask.causal()

  local function inputs(heads, dtype)
    return {sa.randn({2, 4, 6, 8}, {seed = 1, dtype = dtype}), sa.randn({2, heads, 6, 8}, {seed = 2, dtype = dtype}),
      sa.randn({2, heads, 6, 8}, {seed = 3, dtype = dtype})}
  end

  it("passes what is safe", function()
    for _, backend in ipairs {"fused", "reference"} do
      local function fn(q, k, v, bias) return (sa.sdpa(q, k, v, {mask = mask, bias = bias, backend = backend})) end
      assert.masked_safe(fn, inputs(4, "f32"), mask)
      assert.masked_safe(fn, inputs(2, "bf16"), mask)
      local list = inputs(1, "f64")
      list[4] = sa.randn({1, 4, 6, 6}, {seed = 4, dtype = "f64"})
      assert.masked_safe(fn, list, mask)
    end
    assert.masked_safe(function(q, k, v) return sa.forward(q, k, v, {mask = mask}).out end, inputs(4), mask)
    assert.masked_safe(function(q, k, v) return (sa.sdpa(q, k, v, {causal = true})) end,
      {sa.rand {4, 3}, sa.rand {6, 3}, sa.rand {6, 3}}, sa.mask.causal())
  end)

  -- The usual way: a large negative number in place of the mask, which NaN and Inf get through.
  local function additive(q, k, v)
    local scores = q:matmul(k:transpose(3, 4)) + sa.where(mask:dense {B = 2, H = 4, L = 6, S = 6}, sa.zeros {1}, -1e9)
    return sa.softmax(scores, {dim = -1}):matmul(v)
  end

  it("finds what is not", function()
    fails("NaN behind the mask (dead rows, dead keys) has an influence on the output: the bits differ first at [",
      assert.masked_safe, additive, inputs(4), mask)
    assert.is_not.masked_safe(additive, inputs(4), mask)
  end)

  it("finds a single key that is read where it is hidden", function()
    local causal = sa.mask.causal()
    local function early(q, k, v) return (sa.sdpa(q, k, v, {mask = sa.mask.window(nil, 1)})) end
    fails("NaN in key 2 of batch 1, key head 1, which the mask hides there, has an influence on the output",
      assert.masked_safe, early, {sa.rand {1, 1, 5, 4}, sa.rand {1, 1, 5, 4}, sa.rand {1, 1, 5, 4}}, causal)
  end)

  it("finds a gradient that is not safe behind an output that is", function()
    local function leaky(q, k, v)
      return (sa.sdpa(q, k, v, {mask = mask})) + (v * 0):detach():sum() * 0 + (v:sum() - v:detach():sum()) * q:sum()
    end
    assert.is_not.masked_safe(leaky, inputs(4), mask)
  end)

  it("says what is wrong with its arguments", function()
    local list = inputs(4)
    fails("fn: got nil, wanted a function", assert.masked_safe, nil, list, mask)
    fails("inputs: got nil, wanted a list", assert.is_not.masked_safe, additive, nil, mask)
    fails("inputs[2]: got nil, wanted a float tensor", assert.masked_safe, additive, {list[1]}, mask)
    fails("mask: got nil, wanted a mask", assert.is_not.masked_safe, additive, list)
    fails("wanted a tensor first", assert.masked_safe, function() end, list, mask)
    local function random(q, k, v) return (sa.sdpa(q, k, v, {mask = mask, dropout = 0.5})) end
    fails("different results for the same inputs", assert.is_not.masked_safe, random, list, mask)
  end)
end)

describe("the example suite", function()
  it("passes as it stands", function()
    local output, status = child.command("busted --helper=spec/helper.lua -o TAP examples/spec/attention_spec.lua")
    assert.equal(0, status, output)
    assert.equal(6, select(2, output:gsub("\nok %d", "")) + (output:find("^ok %d") and 1 or 0), output)
  end)
end)
