-- the assertions of the suite themselves: they fail when they should, and say where

local helper = require "spec.helper"
local sa = require "safeattn"

local inf, nan = math.huge, 0 / 0

local function message_of(assertion, ...)
  local succeeded, problem = pcall(assertion, ...)
  assert.is_false(succeeded)
  return type(problem) == "table" and tostring(problem.message or problem[1] or problem) or tostring(problem)
end

describe("tensor.near", function()
  it("passes within the tolerance, and names the worst element beyond it", function()
    local got = sa.tensor({{1, 2}, {3, 4}}, {dtype = "f64"})
    assert.tensor.near(got, {{1, 2}, {3, 4.01}}, {atol = 0.02})
    assert.tensor.near(got, {{1, 2}, {3, 4.01}}, {rtol = 0.01})
    local text = helper.difference(got, {{1, 2.5}, {3, 5}}, {atol = 0.1})
    assert.equal("2 of 4 elements differ (atol 0.1, rtol 0); the worst at [2,2]: got 4, wanted 5", text)
    assert.matches("the worst at %[2,2%]: got 4, wanted 5", message_of(assert.tensor.near, got, {{1, 2.5}, {3, 5}}))
  end)

  it("wants infinities to be equal and shapes to agree", function()
    assert.tensor.near(sa.tensor {inf, -inf}, sa.tensor {inf, -inf})
    assert.truthy(helper.difference(sa.tensor {inf}, sa.tensor {-inf}, {atol = 1e300}))
    assert.truthy(helper.difference(sa.tensor {inf}, sa.tensor {1}, {rtol = 1e300}))
    assert.truthy(helper.difference(sa.tensor {1}, sa.tensor {{1}}))
  end)

  it("fails on NaN, negated too, unless the NaN is meant", function()
    local bad = sa.tensor {1, nan}
    assert.truthy(helper.difference(bad, bad, {atol = inf}))
    assert.matches("NaN", message_of(assert.tensor.near, bad, bad))
    assert.matches("NaN", message_of(assert.is_not.tensor.near, bad, sa.tensor {1, 2}))
    assert.tensor.near(bad, bad, {nonfinite = "same"})
    assert.tensor.same(bad, bad)
    assert.truthy(helper.difference(bad, {1, 2}, {nonfinite = "same", atol = inf}))
  end)
end)

describe("tensor.bitwise", function()
  it("tells -0 from 0 and dtypes apart, and takes a NaN for itself", function()
    assert.tensor.bitwise(sa.tensor {1, nan}, sa.tensor {1, nan})
    assert.equal("the bits differ first at [2]: got 0, wanted -0",
      helper.bit_difference(sa.tensor {1, 0}, sa.tensor {1, -0.0}))
    assert.truthy(helper.bit_difference(sa.tensor {1}, sa.tensor({1}, {dtype = "f64"})))
    assert.truthy(helper.bit_difference(sa.tensor {1}, sa.tensor {{1}}))
  end)
end)

describe("a poisoned output", function()
  it("is NaN until it is written, and notices what is written around it", function()
    for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
      local out, untouched = helper.poisoned({2, 3}, dtype)
      assert.equal(6, out:stats().nan)
      out:fill(1)
      local whole = untouched()
      local last = whole:numel() - 64
      whole:set(last + 1, 5)
      assert.matches("^byte %d+ behind the output was written$", helper.message_of(untouched))
      assert.equal(1, whole:get(last))
    end
    local _, untouched = helper.poisoned({4}, "i32")
    untouched():set(64, 0)
    assert.matches("before the output was written$", helper.message_of(untouched))
  end)
end)

describe("the tiers", function()
  it("are left as they were, after errors too", function()
    local before = sa.isa()
    assert.has_error(function() helper.each_isa(function() error "x" end) end)
    assert.equal(before, sa.isa())
    local threads = sa.threads()
    assert.has_error(function() helper.with_threads(1, function() error "x" end) end)
    assert.equal(threads, sa.threads())
  end)
end)
