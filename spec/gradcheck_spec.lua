-- gradcheck: passes what is right, catches what is wrong, and says where

local helper = require "spec.helper"
local sa = require "safeattn"
local autograd = require "safeattn.autograd"

local function random(shape, seed, dtype)
  return sa.randn(shape, {dtype = dtype or "f64", seed = seed})
end

-- x * x with a gradient that is `wrong(g, x)`.
local function square(wrong)
  return function(x)
    local y = x:detach() * x:detach()
    autograd.record("square", {y}, {x}, function(g) return {wrong(g, x)} end)
    return y
  end
end

describe("gradcheck", function()
  it("passes a right gradient and reports what it saw", function()
    local ok, report = sa.gradcheck(square(function(g, x) return g * x * 2 end), {random({2, 3}, 1)})
    assert.is_true(ok)
    assert.is_true(report.ok)
    assert.equal(6, report.checked)
    assert.equal(0, report.failed)
    assert.is_true(report.worst.error < 1e-6)
    assert.matches("^gradcheck passed: 0 of 6 elements differ\nworst: input 1, element %[%d,%d%]: analytic ",
      tostring(report))
  end)

  it("catches one wrong element and names it", function()
    local ok, report = sa.gradcheck(function(a, x)
      return a:sum() + square(function(g, y)
        local right = g * y * 2
        right:set(2, 3, right:get(2, 3) * 1.01)
        return right
      end)(x):sum()
    end, {random({2}, 3), random({2, 3}, 1)})
    assert.is_false(ok)
    assert.equal(1, report.failed)
    assert.equal(8, report.checked)
    assert.equal(2, report.worst.input)
    assert.same({2, 3}, report.worst.index)
    assert.matches("^gradcheck FAILED: 1 of 8", tostring(report))
  end)

  it("catches a gradient that is missing, NaN or infinite", function()
    local x = random({3}, 1)
    assert.is_false((sa.gradcheck(square(function() return nil end), {x})))
    assert.is_false((sa.gradcheck(square(function(g) return g * (0 / 0) end), {x})))
    assert.is_false((sa.gradcheck(square(function(g) return g * math.huge end), {x})))
    assert.is_false((sa.gradcheck(function(y) return y:detach() * 2 end, {x})))
    assert.is_false((sa.gradcheck(function(y) return (y * 0):log() end, {x})))
  end)

  it("catches what a plain sum over the outputs would hide", function()
    assert.is_false((sa.gradcheck(function(y) return y:detach():softmax() end, {random({4}, 1)})))
  end)

  it("moves one element at a time", function()
    -- central differences of a square are exact, whatever the step
    assert.is_true((sa.gradcheck(function(y) return y:sum() * y:sum() end, {random({4}, 1)},
      {eps = 0.5, atol = 1e-12, rtol = 1e-12})))
  end)

  it("takes tolerances and the step", function()
    local slightly = square(function(g, x) return g * x * 2.02 end)
    local x = random({3}, 1)
    assert.is_false((sa.gradcheck(slightly, {x})))
    assert.is_true((sa.gradcheck(slightly, {x}, {rtol = 0.02})))
    assert.is_true((sa.gradcheck(function(y) return y * y * y end, {x}, {eps = 1e-4, atol = 1e-6, rtol = 0})))
    assert.is_false((sa.gradcheck(function(y) return y * y * y end, {x}, {eps = 0.5, atol = 1e-6, rtol = 0})))
  end)

  it("promotes floats and leaves its inputs as they were", function()
    local x = random({3}, 1, "f32")
    local before = x:clone()
    local seen
    assert.is_true((sa.gradcheck(function(y)
      seen = y.dtype
      return y:exp()
    end, {x})))
    assert.equal("f64", seen)
    assert.tensor.bitwise(x, before)
    assert.is_nil(x.grad)
  end)

  it("checks every float tensor that comes back, and only those", function()
    local x = random({3}, 1)
    assert.is_true((sa.gradcheck(function(y) return y * 2, {lse = y}, y:gt(0), y * y end, {x})))
    local ok = sa.gradcheck(function(y) return y * 2, square(function(g) return g end)(y) end, {x})
    assert.is_false(ok)
  end)

  it("tells when the function is not one", function()
    assert.matches("^safeattn%.gradcheck: fn: got a function that gives different results",
      helper.message_of(sa.gradcheck, function(y) return y * sa.rand({3}, {dtype = "f64"}) end, {random({3}, 1)}))
  end)
end)
