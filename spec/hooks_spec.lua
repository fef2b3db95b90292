-- hooks on tensors, and the operation that made the first non-finite gradient

local helper = require "spec.helper"
local sa = helper.sa
local autograd = require "safeattn.autograd"

local function leaf(values)
  local t = sa.tensor(values, {dtype = "f64"})
  t.requires_grad = true
  return t
end

describe("a hook", function()
  it("is shown the gradient of a leaf, and of a result", function()
    local x, seen = leaf {1, 2, 3}, {}
    local y = x * 3
    x:register_hook(function(g) seen.x = g end)
    y:register_hook(function(g) seen.y = g end)
    sa.sum(y * y):backward()
    assert.tensor.near(seen.y, {6, 12, 18})
    assert.tensor.near(seen.x, {18, 36, 54})
    assert.tensor.near(x.grad, {18, 36, 54})
  end)

  it("gets the whole gradient once, however often the tensor was used", function()
    local x, calls = leaf {2}, 0
    local y = x * 1
    y:register_hook(function(g)
      calls = calls + 1
      assert.equal(7, g:item())
    end)
    sa.sum(y * 3 + y * 4):backward()
    assert.equal(1, calls)
  end)

  it("may put another gradient in its place", function()
    local x = leaf {1, 2}
    local y = x * 3
    y:register_hook(function(g) return g * 10 end)
    x:register_hook(function(g) return g + 1 end)
    y:sum():backward()
    assert.tensor.near(x.grad, {31, 31})
  end)

  it("may give a tensor that it keeps: the tape does not write into it", function()
    local x, mine = leaf {1, 2}, sa.ones({2}, {dtype = "f64"})
    x:register_hook(function() return mine end)
    for _ = 1, 2 do sa.sum(x * 5):backward() end
    assert.tensor.near(x.grad, {2, 2})
    assert.tensor.near(mine, {1, 1})
  end)

  it("may keep what it was shown", function()
    local x, kept = leaf {1, 2}, nil
    local y = x * 3
    y:register_hook(function(g) kept = g end)
    for _ = 1, 2 do y:exp():sum():backward() end
    collectgarbage()
    assert.tensor.near(kept, y:detach():exp())
  end)

  it("runs after those before it, until it is removed", function()
    local x, order = leaf {1}, {}
    local first
    first = x:register_hook(function(g)
      order[#order + 1] = "first"
      first:remove()
      return g * 2
    end)
    local second = x:register_hook(function(g) order[#order + 1] = "second " .. g:item() end)
    sa.sum(x * 1):backward()
    sa.sum(x * 1):backward()
    second:remove()
    second:remove()
    sa.sum(x * 1):backward()
    assert.same({"first", "second 2", "second 1"}, order)
    assert.equal(4, x.grad:item())
  end)

  it("sees each output of an operation with several by itself", function()
    local q = sa.randn({1, 1, 4, 8}, {seed = 1, dtype = "f64", requires_grad = true})
    local seen = {}
    local out, more = sa.sdpa(q, q, q, {lse = true})
    out:register_hook(function() seen.out = true end)
    more.lse:register_hook(function(g) seen.lse = g:numel() end)
    more.lse:sum():backward()
    assert.is_nil(seen.out)
    assert.equal(4, seen.lse)
  end)

  it("refuses what it cannot be hung on, and what is no gradient", function()
    assert.matches("^safeattn%.register_hook: t: got f32%[2%], wanted one that requires grad",
      helper.message_of(function() sa.ones({2}):register_hook(print) end))
    assert.matches("^safeattn%.register_hook: fn: got 3, wanted a function",
      helper.message_of(function() leaf({1}):register_hook(3) end))
    local x = leaf {1, 2}
    x:register_hook(function() return sa.ones({3}) end)
    assert.matches("^safeattn%.register_hook: the hook gave f32%[3%], wanted nil or a gradient f64%[2%]",
      helper.message_of(function() sa.sum(x * 2):backward() end))
  end)
end)

describe("a hook that yields", function()
  it("leaves who runs meanwhile recording", function()
    local x = leaf {1, 2}
    x:register_hook(function() coroutine.yield((x * 2).requires_grad) end)
    local run = coroutine.wrap(function() return sa.sum(x * 3):backward() end)
    assert.is_false(run())
    assert.is_true((x * 2).requires_grad)
    run()
    assert.same({3, 3}, x.grad:totable())
  end)
end)

describe("detect_anomaly", function()
  local function broken(x)
    local y = x * 0
    local z = y:sqrt()
    return z:sum()
  end

  it("names the operation and where it was called forward", function()
    local x = leaf {1, 2}
    local message = helper.message_of(sa.detect_anomaly, function() broken(x):backward() end)
    assert.matches("^safeattn%.detect_anomaly: sqrt gave a non%-finite gradient of its input 1: f64%[2%] with 2 %+inf",
      message)
    assert.matches("it was called here:", message, 1, true)
    local place = message:match("it was called here:%s*stack traceback:%s*([^\n]*)")
    assert.matches("hooks_spec.lua:%d+: in function 'broken'", place)
    assert.matches("all that it kept of the forward is finite", message, 1, true)
  end)

  it("says what was not finite before", function()
    local x = leaf {1, 2}
    local bad = sa.tensor({1, 0 / 0}, {dtype = "f64"})
    local message = helper.message_of(sa.detect_anomaly, function() sa.sum(x * bad):backward() end)
    assert.matches("^safeattn%.detect_anomaly: mul gave", message)
    assert.matches("not all is finite: f64[2] with 1 NaN", message, 1, true)
  end)

  it("names the first one, not those that it spread to", function()
    local x = leaf {4}
    local y = x * 2
    local message = helper.message_of(sa.detect_anomaly, function()
      sa.sum((y - 8):sqrt():exp()):backward()
    end)
    assert.matches("sqrt gave", message, 1, true)
  end)

  it("tells that an operation was recorded before", function()
    local loss = broken(leaf {1})
    assert.matches("it was called before detect_anomaly", helper.message_of(sa.detect_anomaly, function()
      loss:backward()
    end), 1, true)
  end)

  it("is silent about what is finite, and gives back what the function gives", function()
    local x = leaf {1, 2}
    local a, b = sa.detect_anomaly(function(scale)
      local y = (x * scale):exp():sum()
      y:backward()
      return "done", scale
    end, 3)
    assert.equal("done", a)
    assert.equal(3, b)
    assert.is_true(x.grad ~= nil)
  end)

  it("does not watch what runs while its coroutine has yielded", function()
    local x = leaf {1}
    local run = coroutine.wrap(function()
      return sa.detect_anomaly(function()
        coroutine.yield("first")
        broken(x):backward()
      end)
    end)
    assert.equal("first", run())
    assert.is_false(autograd.observer)
    broken(x):backward()
    assert.matches("^safeattn.detect_anomaly: sqrt gave", helper.message_of(run))
    assert.is_false(autograd.observer)
  end)

  it("leaves nothing behind, after an error neither", function()
    local x = leaf {1}
    assert.is_false(autograd.observer)
    pcall(sa.detect_anomaly, function() broken(x):backward() end)
    assert.is_false(autograd.observer)
    pcall(sa.detect_anomaly, error, "x")
    assert.is_false(autograd.observer)
    local y = broken(x)
    y:backward()
    assert.equal(1, x.grad:stats().nan)
    assert.matches("wanted a function", helper.message_of(sa.detect_anomaly, 3), 1, true)
  end)
end)
