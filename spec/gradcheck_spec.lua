-- gradcheck: passes what is right, catches what is wrong, and says where

local helper = require "spec.helper"
local sa = helper.sa
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

  -- Attention behind every kind of input, with the gradient of input `n` spoilt by wrong(gradient).
  local function attention(n, wrong, options)
    local extras = {"bias", "sinks", "alibi"}
    return function(...)
      local inputs, all = {...}, {mask = sa.mask.documents {1, 1, -1, 2, 2} * sa.mask.causal(), softcap = 5}
      for k, name in ipairs(extras) do all[name] = inputs[3 + k] end
      for name, value in pairs(options or {}) do all[name] = value end
      if n then
        local hook
        hook = inputs[n]:register_hook(function(g)
          hook:remove()
          local spoilt = g:clone()
          wrong(spoilt)
          return spoilt
        end)
      end
      return sa.sdpa(inputs[1], inputs[2], inputs[3], all)
    end
  end

  local function attention_inputs()
    return {random({1, 2, 5, 4}, 1), random({1, 1, 5, 4}, 2), random({1, 1, 5, 3}, 3), random({5, 5}, 4),
      random({2}, 5), random({2}, 6)}
  end

  it("leaves the back ends of who runs while fn has yielded", function()
    local q = sa.randn({4, 8}, {seed = 1})
    local function run(x)
      local got = sa.forward(x, x, x).backend
      return coroutine.yield(got) or sa.sdpa(x, x, x)
    end
    local check = coroutine.wrap(function() return sa.gradcheck(run, {q}, {against = "reference"}) end)
    local usual = sa.forward(q, q, q).backend
    assert.not_equal("reference", usual)
    local seen, got = {}, check()
    while type(got) == "string" do
      assert.equal(usual, sa.forward(q, q, q).backend)
      seen[got] = true
      got = check()
    end
    assert.is_true(got)
    assert.same({[usual] = true, reference = true}, seen)
  end)

  it("passes attention, by numbers and against the reference", function()
    assert.is_true((sa.gradcheck(attention(), attention_inputs())))
    for _, dtype in ipairs {"f32", "f64"} do
      local ok, report = sa.gradcheck(attention(), attention_inputs(), {against = "reference", dtype = dtype})
      assert.is_true(ok, tostring(report))
      assert.equal("reference", report.against)
    end
  end)

  it("catches a wrong gradient planted in each input, and says in which", function()
    local function spoil(g)
      local last = g.shape
      last[#last + 1] = g:get(unpack(last)) * 1.1 + 0.01
      g:set(unpack(last))
    end
    for n = 1, 6 do
      for _, against in ipairs {"numeric", "reference"} do
        local fn, clean = attention(n, spoil), attention()
        if against == "reference" then
          -- only the tape's own gradient is spoilt
          local calls = 0
          local spoilt = fn
          fn = function(...)
            calls = calls + 1
            return (calls == 1 and spoilt or clean)(...)
          end
        end
        local ok, report = sa.gradcheck(fn, attention_inputs(), {against = against})
        assert.is_false(ok)
        assert.equal(1, report.failed)
        assert.equal(n, report.worst.input)
        for i, input in ipairs(report.inputs) do assert.equal(i == n and 1 or 0, input.failed) end
        assert.same(attention_inputs()[n].shape, report.worst.index)
        assert.matches(against .. " ", tostring(report), 1, true)
      end
    end
  end)

  it("counts dead and live rows apart", function()
    local _, report = sa.gradcheck(attention(), attention_inputs())
    local q = report.inputs[1]
    assert.equal(8, q.dead.checked)
    assert.equal(32, q.live.checked)
    local ok, spoilt = sa.gradcheck(attention(1, function(g) g:set(1, 1, 3, 2, 0.5) end), attention_inputs())
    assert.is_false(ok)
    assert.equal(1, spoilt.inputs[1].dead.failed)
    assert.equal(0, spoilt.inputs[1].live.failed)
    assert.same({1, 1, 3, 2}, spoilt.inputs[1].dead.worst.index)
    assert.matches("input 1 f64[1,2,5,4]: live rows: 0 of 32 differ; dead rows: 1 of 8 differ; step 1e-06; worst "
      .. "[1,1,3,2]", (tostring(spoilt):gsub(" on cuda:%d", "")), 1, true)
  end)

  it("samples large inputs, alike for a seed", function()
    local x, seen = random({40, 50}, 1), {}
    local function fn(y) return sa.sum(y * y) end
    local _, report = sa.gradcheck(fn, {x}, {samples = 30, seed = 3})
    assert.equal(30, report.checked)
    assert.equal(2000, report.inputs[1].count)
    assert.matches("2000 elements, sampled", tostring(report), 1, true)
    for seed = 3, 4 do
      local _, other = sa.gradcheck(fn, {x}, {samples = 30, seed = seed})
      seen[seed] = table.concat(other.worst.index, ",")
    end
    assert.equal(table.concat(report.worst.index, ","), seen[3])
    assert.is_true(seen[3] ~= seen[4])
    local ok, all = sa.gradcheck(square(function(g, y) return g * y * 2.02 end), {x}, {samples = 200})
    assert.is_false(ok)
    assert.equal(200, all.checked)
  end)

  it("says which step it took, and computes in f32 on request", function()
    local seen
    local _, report = sa.gradcheck(function(y)
      seen = y.dtype
      return y * y
    end, {random({3}, 1)}, {dtype = "f32", atol = 1e-2, rtol = 1e-2})
    assert.equal("f32", seen)
    assert.is_true(math.abs(report.inputs[1].step - 1e-2) < 1e-6)
    _, report = sa.gradcheck(function(y) return y * y end, {random({3}, 1)}, {eps = 0.25})
    assert.is_true(math.abs(report.inputs[1].step - 0.25) < 1e-15)
  end)

  it("takes everything in one table", function()
    local ok, report = sa.gradcheck {attention(), attention_inputs(), against = "reference"}
    assert.is_true(ok)
    assert.equal("reference", report.against)
    assert.matches("against: got \"it\", wanted \"numeric\" or \"reference\"",
      helper.message_of(sa.gradcheck, {attention(), attention_inputs(), against = "it"}))
  end)

  it("leaves the back end to whoever calls next, after an error too", function()
    local sdpa = require "safeattn.sdpa"
    local calls = 0
    pcall(sa.gradcheck, function(y)
      calls = calls + 1
      if calls == 2 then error "x" end
      return y * y
    end, {random({3}, 1)}, {against = "reference"})
    assert.equal(2, calls)
    assert.is_nil(sdpa.backend)
  end)
end)
