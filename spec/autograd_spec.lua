-- the tape: values, gradients and what happens when it is misused

local helper = require "spec.helper"
local sa = helper.sa
local autograd = require "safeattn.autograd"

local function leaf(data)
  return sa.tensor(data, {dtype = "f64", requires_grad = true})
end

local function random(shape, seed)
  return sa.randn(shape, {dtype = "f64", seed = seed})
end

-- Numbers away from 0, where abs, relu and log are smooth.
local function positive(shape, seed)
  return sa.rand(shape, {dtype = "f64", seed = seed}) + 0.5
end

-- name -> {function, inputs}: every operation that has a gradient
local operations = {
  ["add"] = {function(a, b) return a + b end, {random({2, 3}, 1), random({2, 3}, 2)}},
  ["sum, of a sum that keeps dims, beside another use"] = {
    function(a) return sa.sum(a, 1) * sa.sum(sa.sum(a, 2, {keep = true})) end, {random({3, 4}, 1)}},
  ["add, broadcast"] = {function(a, b) return a + b end, {random({2, 1, 3}, 1), random({4, 1}, 2)}},
  ["add a number"] = {function(a) return 2 + a + 3 end, {random({3}, 1)}},
  ["sub"] = {function(a, b) return a - b end, {random({2, 3}, 1), random({3}, 2)}},
  ["sub from a number"] = {function(a) return 2 - a end, {random({3}, 1)}},
  ["mul"] = {function(a, b) return a * b end, {random({2, 3}, 1), random({2, 1}, 2)}},
  ["mul with itself"] = {function(a) return a * a * 3 end, {random({2, 3}, 1)}},
  ["div"] = {function(a, b) return a / b end, {random({2, 3}, 1), positive({3}, 2)}},
  ["div by a number"] = {function(a) return a / 3 end, {random({3}, 1)}},
  ["div a number"] = {function(a) return 3 / a end, {positive({3}, 1)}},
  ["neg"] = {function(a) return -a end, {random({3}, 1)}},
  ["exp"] = {function(a) return a:exp() end, {random({2, 3}, 1)}},
  ["log"] = {function(a) return a:log() end, {positive({2, 3}, 1)}},
  ["sqrt"] = {function(a) return a:sqrt() end, {positive({2, 3}, 1)}},
  ["tanh"] = {function(a) return a:tanh() end, {random({2, 3}, 1)}},
  ["relu"] = {function(a) return a:relu() end, {random({2, 3}, 1)}},
  ["gelu"] = {function(a) return a:gelu() end, {random({2, 3}, 1)}},
  ["abs"] = {function(a) return a:abs() end, {random({2, 3}, 1)}},
  ["view"] = {function(a) return a:view(3, 2) * random({3, 2}, 9) end, {random({2, 3}, 1)}},
  ["view of a transposed"] = {function(a) return a:transpose(1, 2):contiguous():view(6) end, {random({2, 3}, 1)}},
  ["transpose"] = {function(a) return a:transpose(1, 3) end, {random({2, 3, 2}, 1)}},
  ["permute"] = {function(a) return a:permute(3, 1, 2) end, {random({2, 3, 2}, 1)}},
  ["narrow"] = {function(a) return a:narrow(2, 2, 2) end, {random({2, 4}, 1)}},
  ["select"] = {function(a) return a:select(2, 3) end, {random({2, 4}, 1)}},
  ["expand"] = {function(a) return a:expand(2, 3, 4) end, {random({3, 1}, 1)}},
  ["clone"] = {function(a) return a:clone() end, {random({3}, 1)}},
  ["cat"] = {function(a, b) return sa.cat({a, b, a}, 2) end, {random({2, 3}, 1), random({2, 1}, 2)}},
  ["stack"] = {function(a, b) return sa.stack({a, b}, 2) end, {random({2, 3}, 1), random({2, 3}, 2)}},
  ["sum"] = {function(a) return a:sum() end, {random({2, 3}, 1)}},
  ["sum over a dim"] = {function(a) return a:sum(2) end, {random({2, 3, 2}, 1)}},
  ["sum over dims, kept"] = {function(a) return a:sum({1, -1}, {keep = true}) end, {random({2, 3, 2}, 1)}},
  ["mean"] = {function(a) return a:mean() end, {random({2, 3}, 1)}},
  ["mean over a dim"] = {function(a) return a:mean(1) end, {random({2, 3}, 1)}},
  ["max"] = {function(a) return a:max() end, {random({2, 3}, 1)}},
  ["max over a dim"] = {function(a) return a:max(1) end, {random({2, 3}, 1)}},
  ["min over a dim, kept"] = {function(a) return a:min(2, {keep = true}) end, {random({2, 3}, 1)}},
  ["matmul"] = {function(a, b) return a:matmul(b) end, {random({2, 3}, 1), random({3, 4}, 2)}},
  ["matmul, batches"] = {sa.matmul, {random({2, 2, 3}, 1), random({2, 3, 2}, 2)}},
  ["matmul, broadcast"] = {sa.matmul, {random({2, 1, 2, 3}, 1), random({3, 3, 2}, 2)}},
  ["matmul, one matrix"] = {sa.matmul, {random({2, 2, 3}, 1), random({3, 2}, 2)}},
  ["matmul, transposed"] = {function(a, b) return a:transpose(1, 2):matmul(b) end,
    {random({3, 2}, 1), random({3, 4}, 2)}},
  ["softmax"] = {function(a) return a:softmax() end, {random({2, 3}, 1)}},
  ["layernorm"] = {sa.layernorm, {random({2, 4}, 1), random({4}, 2), random({4}, 3)}},
  ["layernorm, plain"] = {function(x) return sa.layernorm(x, nil, nil, {epsilon = 1e-3}) end, {random({2, 4}, 1)}},
  ["embedding"] = {sa.embedding, {random({4, 3}, 1), sa.tensor({{1, 4, 1}, {2, 2, 2}}, {dtype = "i32"})}},
  ["cross_entropy"] = {sa.cross_entropy, {random({3, 4}, 1), sa.tensor({2, 4, 1}, {dtype = "i64"})}},
  ["cross_entropy, some ignored"] = {
    function(x, ids) return sa.cross_entropy(x, ids, {ignore = 0, reduction = "sum"}) end,
    {random({2, 2, 4}, 1), sa.tensor({{2, 0}, {1, 0}}, {dtype = "i32"})}},
  ["cross_entropy, row by row"] = {
    function(x, ids) return sa.cross_entropy(x, ids, {reduction = "none"}) end,
    {random({3, 4}, 1), sa.tensor({2, 4, 1}, {dtype = "i32"})}},
  ["where"] = {function(a, b) return sa.where(sa.tensor {{true, false, true}}, a, b) end,
    {random({2, 3}, 1), random({2, 1}, 2)}},
  ["where, a number"] = {function(a) return sa.where(sa.tensor {true, false, true}, 2, a) end, {random({2, 3}, 1)}},
  ["masked_fill"] = {function(a) return a:masked_fill(sa.tensor {true, false, true}, -3) * a end, {random({2, 3}, 1)}},
  ["to and back"] = {function(a) return (a * 2):to("f64") end, {random({3}, 1)}},
}

describe("the gradient of", function()
  for name, case in pairs(operations) do
    it(name .. " is what differences say", function()
      local ok, report = sa.gradcheck(case[1], case[2])
      assert.is_true(ok, tostring(report))
      assert.is_true(report.checked > 0)
    end)
  end
end)

describe("empty tensors", function()
  it("go through forward and backward", function()
    for name, case in pairs {
      add = {function(a) return a + sa.ones({3}, {dtype = "f64"}) end, {0, 3}},
      exp = {function(a) return a:exp() end, {0, 3}},
      sum = {function(a) return a:sum() end, {0, 3}},
      sum_over_nothing = {function(a) return a:sum(1) end, {0, 3}},
      mean = {function(a) return a:mean(2) end, {0, 3}},
      cat = {function(a) return sa.cat {a, a} end, {0, 3}},
      no_rows = {function(a) return a:matmul(sa.ones({3, 2}, {dtype = "f64"})) end, {0, 3}},
      no_sum = {function(a) return a:matmul(sa.ones({0, 2}, {dtype = "f64"})) end, {3, 0}},
      no_sum_right = {function(b) return sa.ones({2, 3, 0}, {dtype = "f64"}):matmul(b) end, {0, 2}},
      narrow = {function(a) return a:narrow(2, 4, 0) end, {2, 3}},
      softmax = {function(a) return a:softmax() end, {2, 0}},
      layernorm = {function(a) return a:layernorm() end, {0, 3}},
    } do
      local x = sa.ones(case[2], {dtype = "f64", requires_grad = true})
      local y = case[1](x)
      y:backward(sa.ones(y.shape, {dtype = "f64"}))
      assert.same(case[2], x.grad.shape, name)
      assert.same(0, x.grad:stats().nan, name)
    end
  end)
end)

describe("values", function()
  it("follow the operators, with numbers on either side", function()
    local a, b = sa.tensor {1, 2, 4}, sa.tensor {2, 2, 2}
    assert.same({3, 4, 6}, (a + b):totable())
    assert.same({-1, 0, 2}, (a - b):totable())
    assert.same({2, 4, 8}, (a * b):totable())
    assert.same({0.5, 1, 2}, (a / b):totable())
    assert.same({-1, -2, -4}, (-a):totable())
    assert.same({4, 2, 1}, (4 / a):totable())
    assert.same({3, 2, 0}, (4 - a):totable())
    assert.same({{2, 3}, {3, 4}}, (sa.tensor {1, 2} + sa.tensor {{1}, {2}}):totable())
  end)

  it("of comparisons are bool", function()
    local a, b = sa.tensor {1, 2, 3}, sa.tensor {2, 2, 2}
    assert.same({true, false, false}, a:lt(b):totable())
    assert.same({true, true, false}, a:le(2):totable())
    assert.same({false, false, true}, a:gt(b):totable())
    assert.same({false, true, true}, sa.ge(a, 2):totable())
    assert.same({false, true, false}, a:eq(b):totable())
    assert.same({true, false, true}, a:ne(b):totable())
    assert.same({false, false, true}, sa.lt(2, a):totable())
    assert.equal("bool", a:lt(b).dtype)
    assert.same({false, true}, sa.tensor({0 / 0, 1}):eq(sa.tensor({0 / 0, 1})):totable())
  end)

  it("of reductions", function()
    local a = sa.tensor {{1, 5, 3}, {4, 2, 6}}
    assert.equal(21, a:sum():item())
    assert.same({5, 7, 9}, a:sum(1):totable())
    assert.same({{9}, {12}}, a:sum(2, {keep = true}):totable())
    assert.equal(3.5, a:mean():item())
    assert.same({5, 6}, a:max(2):totable())
    assert.equal(1, a:min():item())
    assert.same({2, 3}, a:argmax(2):totable())
    assert.same({{2, 1, 2}}, a:argmax(1, {keep = true}):totable())
    assert.equal(6, a:argmax():item())
    assert.equal("i64", a:argmax(1).dtype)
    assert.equal(1, sa.tensor({2, 2, 2}):argmax(1):item())
    assert.is_true((function(x) return x ~= x end)(sa.tensor({1, 0 / 0, 3}):max():item()))
  end)

  it("of an empty cross entropy are 0", function()
    local x = leaf {{1, 2}, {3, 4}}
    local loss = sa.cross_entropy(x, sa.zeros({2}, {dtype = "i32"}), {ignore = 0})
    assert.equal(0, loss:item())
    loss:backward()
    assert.same({{0, 0}, {0, 0}}, x.grad:totable())
  end)

  it("of cross entropy are means over what counts", function()
    local x = sa.zeros({3, 4}, {dtype = "f64"})
    local ids = sa.tensor({1, 0, 4}, {dtype = "i32"})
    assert.tensor.near(sa.cross_entropy(x, ids, {ignore = 0}), math.log(4), {atol = 1e-15})
    assert.tensor.near(sa.cross_entropy(x, ids, {ignore = 0, reduction = "none"}), {math.log(4), 0, math.log(4)},
      {atol = 1e-15})
  end)

  it("of masked_fill do not depend on what is masked", function()
    local x = sa.tensor({0 / 0, 1}, {requires_grad = true})
    local y = x:masked_fill(sa.tensor {true, false}, 0)
    assert.same({0, 1}, y:totable())
    y:sum():backward()
    assert.same({0, 1}, x.grad:totable())
  end)
end)

describe("max", function()
  it("shares the gradient among equals", function()
    local x = leaf {{1, 3, 3}, {5, 2, 5}}
    x:max(2):sum():backward()
    assert.same({{0, 0.5, 0.5}, {0.5, 0, 0.5}}, x.grad:totable())
  end)
end)

describe("backward", function()
  it("adds up over uses and over calls", function()
    local x = leaf {1, 2}
    local y = (x * x + x):sum()
    y:backward()
    assert.same({3, 5}, x.grad:totable())
    y:backward()
    assert.same({6, 10}, x.grad:totable())
    x.grad = nil
    y:backward()
    assert.same({3, 5}, x.grad:totable())
  end)

  it("takes the gradient of what has several elements", function()
    local x = leaf {1, 2}
    local y = x * 3
    y:backward(sa.tensor({1, 10}, {dtype = "f64"}))
    assert.same({3, 30}, x.grad:totable())
  end)

  it("reaches leaves that share a gradient without tying them together", function()
    local a, b = leaf {1, 2}, leaf {3, 4}
    local seed = sa.ones({2}, {dtype = "f64"});
    (a + b):backward(seed)
    a.grad:fill(7)
    assert.same({1, 1}, b.grad:totable())
    assert.same({1, 1}, seed:totable())
    b:backward(seed)
    assert.same({2, 2}, b.grad:totable())
    b.grad:fill(0)
    assert.same({1, 1}, seed:totable())
  end)

  it("never hands out the gradient that it was given", function()
    local x, seed = leaf {{1, 2}, {3, 4}}, sa.ones({4}, {dtype = "f64"})
    x:view(4):backward(seed)
    x.grad:fill(7)
    assert.same({1, 1, 1, 1}, seed:totable())
  end)

  it("copies a gradient that an operation gives to two inputs, or strided", function()
    local a, b = leaf {{1, 2}, {3, 4}}, leaf {{5, 6}, {7, 8}}
    local y = sa.no_grad(function() return a + b end)
    autograd.record("test", {y}, {a, b}, function(g)
      local fresh = g * 2
      return {fresh, fresh:view(2, 2)}
    end)
    y:sum():backward()
    a.grad:fill(0)
    assert.same({{2, 2}, {2, 2}}, b.grad:totable())
    local c = leaf {{1, 2}, {3, 4}}
    local z = sa.no_grad(function() return c * 2 end)
    autograd.record("test", {z}, {c}, function(g) return {(g * 2):transpose(1, 2)} end)
    z:backward(sa.tensor({{1, 2}, {3, 4}}, {dtype = "f64"}))
    assert.is_true(c.grad:is_contiguous())
    assert.same({{2, 6}, {4, 8}}, c.grad:totable())
  end)

  it("adds to the gradient that is there, in place", function()
    local x = leaf {1, 2}
    x:sum():backward()
    local grad = x.grad
    x:sum():backward()
    assert.equal(grad, x.grad)
    assert.same({2, 2}, grad:totable())
  end)

  it("gives zeros outside a part, whatever the memory held before", function()
    for _, part in ipairs {
      function(x) return x:narrow(1, 1, 10) end, function(x) return x:select(1, 3) end,
      function(x) return x:narrow(1, 1, 0) end,
    } do
      local x = sa.zeros({1000}, {dtype = "f64", requires_grad = true})
      local y = part(x):sum()
      collectgarbage()
      for _ = 1, 4 do sa.full({1000}, 0 / 0, {dtype = "f64"}):free() end
      y:backward()
      assert.equal(0, x.grad:stats().nan)
    end
  end)

  it("gives contiguous gradients of the leaf's shape and dtype", function()
    local x = sa.randn({2, 3}, {requires_grad = true})
    x:transpose(1, 2):to("f64"):sum():backward()
    assert.same({2, 3}, x.grad.shape)
    assert.equal("f32", x.grad.dtype)
    assert.is_true(x.grad:is_contiguous())
  end)

  it("walks long chains", function()
    local x = leaf {1}
    local y = x
    for _ = 1, 20000 do y = y + 1 end
    y:backward()
    assert.same({1}, x.grad:totable())
  end)

  it("visits each operation once where paths join", function()
    local x = leaf {1}
    local y = x
    for _ = 1, 60 do y = y + y end -- 2^60 paths
    y:backward()
    assert.same({2 ^ 60}, x.grad:totable())
  end)

  it("leaves alone what does not require grad", function()
    local x, c = leaf {2}, sa.tensor({3}, {dtype = "f64"})
    local y = x * c
    y:backward()
    assert.is_nil(c.grad)
    assert.is_nil(y.grad)
    assert.is_false((c * c).requires_grad)
  end)

  it("stops at detach", function()
    local x = leaf {2}
    local y = x * x:detach()
    y:backward()
    assert.same({2}, x.grad:totable())
    assert.is_false(x:detach().requires_grad)
  end)

  it("gives gradients on their way back at once, without a collection", function()
    local ffi, lib = require "ffi", require("safeattn.core").lib
    local use = ffi.new("sa_memory_use")
    local x = sa.zeros({2 ^ 17}, {dtype = "f64", requires_grad = true}) -- 1 MiB
    local y = x
    for k = 1, 20 do y = k % 2 == 0 and y:tanh() or y:exp() * y end
    y = y:sum()
    collectgarbage()
    collectgarbage("stop")
    lib.sa_memory(use)
    local before = tonumber(use.bytes)
    lib.sa_memory_reset_peak()
    y:backward()
    collectgarbage("restart")
    lib.sa_memory(use)
    assert.is_true(tonumber(use.peak_bytes) - before <= 6 * 2 ^ 20)
    assert.is_true(tonumber(use.bytes) - before < 2 * 2 ^ 20)
  end)

  it("lets go of what it recorded", function()
    local ffi, lib = require "ffi", require("safeattn.core").lib
    local function bytes()
      collectgarbage()
      collectgarbage()
      local use = ffi.new("sa_memory_use")
      lib.sa_memory(use)
      return tonumber(use.bytes + lib.sa_device_bytes())
    end
    local x = sa.zeros({2 ^ 18}, {requires_grad = true})
    local before = bytes()
    do
      local y = x
      for _ = 1, 10 do y = y:exp() end
      assert.is_true(bytes() > before + 9 * 2 ^ 20)
    end
    assert.equal(before, bytes())
    -- sums keep no operand: only the last is alive
    local y = x
    for _ = 1, 10 do y = y + 1 end
    assert.is_true(bytes() <= before + 2 * 2 ^ 20)
    y:sum():backward()
  end)
end)

describe("no_grad", function()
  it("ends where its coroutine yields, and goes on with it", function()
    local x = leaf {1, 2}
    local function steps()
      return sa.no_grad(function(...)
        local first = coroutine.yield((x * 2).requires_grad, ...)
        return (x * 2).requires_grad, coroutine.yield(first)
      end, "given")
    end
    local run = coroutine.create(steps)
    assert.same({true, false, "given"}, {coroutine.resume(run)})
    assert.is_true((x * 2).requires_grad)
    sa.no_grad(function() assert.same({true, "a"}, {coroutine.resume(run, "a")}) end)
    assert.is_true((x * 2).requires_grad)
    assert.same({true, false, "b"}, {coroutine.resume(run, "b")})
    assert.is_true((x * 2).requires_grad)
    assert.equal("dead", coroutine.status(run))
  end)

  it("records nothing, passes arguments and results, and ends on errors", function()
    local x = leaf {2}
    local y, three = sa.no_grad(function(a, b) return a * b, 3 end, x, 5)
    assert.is_false(y.requires_grad)
    assert.same({10}, y:totable())
    assert.equal(3, three)
    local problem = {}
    local ok, came = pcall(sa.no_grad, function() error(problem) end)
    assert.is_false(ok)
    assert.equal(problem, came)
    assert.is_true((x * 2).requires_grad)
    sa.no_grad(function()
      sa.no_grad(function() end)
      assert.is_false((x * 2).requires_grad)
    end)
  end)
end)

describe("changes in place", function()
  it("of a leaf that requires grad are for no_grad", function()
    local x = leaf {1, 2}
    for _, change in ipairs {
      function() x:fill(0) end, function() x:set(1, 0) end, function() x:copy(sa.zeros {2}) end,
    } do
      assert.matches("^safeattn%.%w+: t: got a tensor that requires grad, wanted one that does not",
        helper.message_of(change))
    end
    sa.no_grad(function() x:fill(3) end)
    assert.same({3, 3}, x:totable())
  end)

  it("of a result are for no_grad", function()
    local y = leaf {1, 2} * 2
    assert.matches("^safeattn%.fill: t: got the result of a recorded mul", helper.message_of(y.fill, y, 0))
  end)

  it("of what backward still needs make it raise", function()
    local x = leaf {1, 2}
    local y = (x * x):sum()
    sa.no_grad(function() x:view(2, 1):fill(3) end)
    assert.equal("safeattn.backward: f64[2], which mul needs for its gradient, was changed in place after it was"
      .. " recorded", helper.message_of(y.backward, y))
  end)

  it("that fail change nothing", function()
    local weights, ids = leaf {{1, 2}, {3, 4}}, sa.tensor({2}, {dtype = "i32"})
    local y = sa.embedding(weights, ids):sum()
    assert.is_false(pcall(ids.copy, ids, sa.ones {3}))
    assert.is_false(pcall(ids.fill, ids, 0.5))
    assert.is_false(pcall(ids.set, ids, 1, 0.5))
    y:backward()
    assert.same({{0, 0}, {1, 1}}, weights.grad:totable())
  end)

  it("of what it does not need are fine", function()
    local x = leaf {1, 2}
    local y = (x + 1):sum()
    sa.no_grad(function() x:fill(3) end)
    y:backward()
    assert.same({1, 1}, x.grad:totable())
  end)

  it("tell when what it needs was freed", function()
    local x, c = leaf {1, 2}, sa.ones({2}, {dtype = "f64"})
    local y = (x * c):sum()
    c:free()
    assert.equal("safeattn.backward: a tensor that mul needs for its gradient was freed",
      helper.message_of(y.backward, y))
  end)
end)

describe("errors", function()
  it("of backward say what is wrong", function()
    local x = leaf {1, 2}
    local y = x * 2
    assert.equal("safeattn.backward: gradient: got none, wanted f64[2], as t has more than one element",
      helper.message_of(y.backward, y))
    assert.equal("safeattn.backward: gradient: got f32[2], wanted f64[2]",
      helper.message_of(y.backward, y, sa.ones {2}))
    local plain = sa.ones {1}
    assert.matches("^safeattn%.backward: t: got f32%[1%], wanted one that requires grad",
      helper.message_of(plain.backward, plain))
  end)

  it("stand at the caller's line", function()
    local here = debug.getinfo(1, "l").currentline
    local _, message = pcall(function()
      return sa.zeros {2} + sa.zeros {3}
    end)
    assert.matches("autograd_spec%.lua:" .. here + 2 .. ": safeattn%.add: ", message)
    _, message = pcall(function()
      local x = sa.zeros {2}
      x:view(7)
    end)
    assert.matches("autograd_spec%.lua:" .. here + 7 .. ": safeattn%.view: ", message)
  end)
end)
