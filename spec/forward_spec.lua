-- sa.forward: attention without a tape, and run:backward

local helper = require "spec.helper"
local sa = helper.sa
local m = sa.mask

local function floats(seed, shape)
  return sa.randn(shape, {seed = seed})
end

local function inputs()
  return floats(1, {2, 4, 9, 8}), floats(2, {2, 2, 11, 8}), floats(3, {2, 2, 11, 6})
end

describe("sa.forward", function()
  it("gives out and lse, weights when asked for, and says what served", function()
    local q, k, v = inputs()
    local run = sa.forward(q, k, v)
    assert.same({2, 4, 9, 6}, run.out.shape)
    assert.same({2, 4, 9}, run.lse.shape)
    assert.is_nil(run.weights)
    assert.equal("fused", run.backend)
    assert.matches(helper.device == "cpu" and "^fused%-f32%-%w+$" or "^portable%-f32$", run.kernel)
    run = sa.forward(q, k, v, {weights = true, backend = "reference"})
    assert.same({2, 4, 9, 11}, run.weights.shape)
    assert.equal("reference", run.backend)
    assert.matches("reference", run.kernel, 1, true)
  end)

  it("says when heads are too wide for the fused kernels, and refuses when they were asked for", function()
    local wide = floats(1, {1, 1, 3, 300})
    assert.equal("reference", sa.forward(wide, wide, wide).backend)
    local ok, message = pcall(sa.forward, wide, wide, wide, {backend = "fused"})
    assert.is_false(ok)
    assert.matches("safeattn.forward: backend: .*256.*300", message)
  end)

  it("takes every softcap: the largest changes nothing, the smallest makes all scores alike", function()
    for _, dtype in ipairs {"f32", "f64", "bf16"} do
      local q, k, v = inputs()
      q, k, v = q:to(dtype), k:to(dtype), v:to(dtype)
      q:select(3, 2):fill(0)
      local dout = sa.randn({2, 4, 9, 6}, {seed = 4}):to(dtype)
      local near = {atol = dtype == "bf16" and 2e-2 or 1e-5}
      local plain = sa.forward(q, k, v)
      local want = plain:backward(dout)
      for _, softcap in ipairs {2e38, 3e38, 1e39, 1e300} do
        local run = sa.forward(q, k, v, {softcap = softcap})
        local got = run:backward(dout)
        assert.tensor.near(run.out, plain.out, near)
        assert.tensor.near(run.lse, plain.lse, {atol = 1e-5})
        for _, name in ipairs {"dq", "dk", "dv"} do assert.tensor.near(got[name], want[name], near) end
      end
      local level = sa.forward(q * 0, k, v)
      for _, softcap in ipairs {1e-310, 1e-300, 1e-46, 1e-39, 1e-30} do
        local run = sa.forward(q, k, v, {softcap = softcap})
        assert.tensor.near(run.out, level.out, near)
        assert.tensor.near(run.lse, level.lse, {atol = 1e-5})
        assert.equal(0, run:backward(dout).dv:stats().nan)
      end
    end
  end)

  it("takes every finite scale: the reference serves what is beyond the fused kernels, which refuse it", function()
    for dtype, power in pairs {f32 = 100, bf16 = 100, f64 = 510} do
      local q, k, v = inputs()
      q, k, v = q:to(dtype), k:to(dtype), v:to(dtype)
      local dout = sa.randn({2, 4, 9, 6}, {seed = 4}):to(dtype)
      local plain = sa.forward(q, k, v, {scale = 1, backend = "reference"})
      local want = plain:backward(dout)
      for _, sign in ipairs {1, -1} do
        -- q and k times or over a power of two, and the scale makes up for it: all are exact.
        local by = 2 ^ (sign * power / (sign == 1 and 2 or 1))
        local far_q, far_k, scale = q * by, k * by, by ^ -2
        local run = sa.forward(far_q, far_k, v, {scale = scale})
        local got = run:backward(dout)
        assert.equal(sign == -1 and "reference" or "fused", run.backend)
        if run.backend == "reference" then
          assert.tensor.bitwise(run.out, plain.out)
          assert.tensor.bitwise(run.lse, plain.lse)
          assert.tensor.bitwise(got.dq * by, want.dq)
          assert.tensor.bitwise(got.dk * by, want.dk)
          assert.tensor.bitwise(got.dv, want.dv)
        end
        assert.tensor.near(run.out, plain.out, {atol = dtype == "bf16" and 2e-2 or 1e-5})
      end
      local level = sa.forward(q * 0, k, v, {backend = "reference"})
      for _, scale in ipairs {1e-300, 1e39, -3e38, 1.7e308} do
        local run = sa.forward(q * 0, k, v, {scale = scale})
        assert.tensor.near(run.out, level.out, {atol = dtype == "bf16" and 2e-2 or 1e-5})
        assert.equal(0, run:backward(dout).dk:stats().nan)
      end
      local ok, message = pcall(sa.forward, q, k, v, {scale = 1.5e305, backend = "fused"})
      assert.is_false(ok)
      assert.matches("safeattn.forward: backend: got fused, whose kernels take scales of " .. dtype
        .. " .* for 1%.5e%+305; wanted auto or reference$", message)
    end
  end)

  it("gives a live row an LSE that is a number, also where f32 has none so low or so high", function()
    local on = {device = helper.device}
    local q, k, v = sa.zeros({1, 4}, on), sa.zeros({2, 4}, on), sa.tensor({{1}, {2}}, on)
    local second = sa.tensor({{0, 1}}, on):to "bool"
    for _, sign in ipairs {-1, 1} do
      local bias, alibi = sa.full({1, 2}, sign * 3e38, on), sa.full({1}, -sign * 2e38, on)
      local run = sa.forward(q, k, v, {mask = second, bias = bias, alibi = alibi, backend = "reference"})
      local greatest = (2 - 2 ^ -23) * 2 ^ 127
      assert.equal(2, run.out:item())
      assert.equal(sign * greatest, run.lse:item())
      local g = run:backward(sa.ones({1, 1}, on), sa.full({1}, 3, on))
      assert.same({{0, 3}}, g.dbias:totable())
      -- Merged with a part that saw nothing, it is all there is; with another part, all or nothing.
      local nothing = sa.forward(q, k, v, {mask = m.none()})
      assert.equal(2, sa.merge({run.out, nothing.out}, {run.lse, nothing.lse}):item())
      local plain = sa.forward(q, k, v, {mask = -m.dense(second)})
      assert.equal(sign == 1 and 2 or 1, sa.merge({run.out, plain.out}, {run.lse, plain.lse}):item())
    end
  end)

  it("records nothing", function()
    local q, k, v = inputs()
    q.requires_grad = true
    local run = sa.forward(q, k, v)
    assert.is_false(run.out.requires_grad)
    assert.is_false(run.lse.requires_grad)
    run:backward(floats(4, {2, 4, 9, 6}))
    assert.is_nil(q.grad)
  end)

  it("gives what sa.sdpa gives", function()
    local q, k, v = inputs()
    local options = {mask = m.padding {11, 4}, bias = floats(4, {9, 11}), causal = true, lse = true, weights = true}
    local run = sa.forward(q, k, v, options)
    local out, more = sa.sdpa(q, k, v, options)
    assert.tensor.bitwise(run.out, out)
    assert.tensor.bitwise(run.lse, more.lse)
    assert.tensor.bitwise(run.weights, more.weights)
  end)
end)

describe("run:backward", function()
  it("gives a gradient for everything that was given, and no more", function()
    local q, k, v = inputs()
    local dout = floats(4, {2, 4, 9, 6})
    local g = sa.forward(q, k, v):backward(dout)
    assert.same({q.shape, k.shape, v.shape}, {g.dq.shape, g.dk.shape, g.dv.shape})
    assert.is_true(g.dbias == nil and g.dsinks == nil and g.dalibi == nil)
    local bias, sinks, alibi = floats(5, {4, 9, 1}), floats(6, {4}), floats(7, {4})
    g = sa.forward(q, k, v, {bias = bias, sinks = sinks, alibi = alibi}):backward(dout)
    assert.same({bias.shape, sinks.shape, alibi.shape}, {g.dbias.shape, g.dsinks.shape, g.dalibi.shape})
  end)

  it("may be called again, with other gradients; they add up", function()
    local q, k, v = inputs()
    local run = sa.forward(q, k, v, {causal = true, bias = floats(5, {9, 11})})
    local dout, dlse = floats(4, {2, 4, 9, 6}), floats(6, {2, 4, 9})
    local first, of_lse, both = run:backward(dout), run:backward(nil, dlse), run:backward(dout, dlse)
    for _, name in ipairs {"dq", "dk", "dv", "dbias"} do
      assert.tensor.near(first[name] + of_lse[name], both[name], {atol = 1e-5})
      assert.tensor.bitwise(run:backward(dout)[name], first[name])
    end
  end)

  it("keeps what it needs while everything else is collected", function()
    local function made()
      local q, k, v = inputs()
      local ids = {}
      for i = 1, 9 do ids[i] = i % 2 end
      local keys = {}
      for j = 1, 11 do keys[j] = j % 3 end
      return sa.forward(q, k, v, {mask = m.documents(ids, keys) + m.fn(function(_, _, i, j) return i == j end),
        bias = floats(5, {9, 11}), sinks = floats(6, {4}), alibi = floats(7, {4})})
    end
    local dout = floats(4, {2, 4, 9, 6})
    local expected = made():backward(dout)
    local run = made()
    for n = 1, 5 do
      collectgarbage()
      floats(n, {2, 4, 9, 8}):fill(1e30)
    end
    local g = run:backward(dout)
    for name, t in pairs(expected) do assert.tensor.bitwise(g[name], t) end
  end)

  it("takes gradients of any strides", function()
    local q, k, v = inputs()
    local run = sa.forward(q, k, v)
    local dout = floats(4, {2, 4, 9, 6})
    local expected = run:backward(dout)
    local relaid = dout:permute(4, 3, 2, 1):contiguous():permute(4, 3, 2, 1)
    assert.tensor.bitwise(run:backward(relaid).dq, expected.dq)
    local ones = run:backward(sa.ones {2, 4, 9, 6})
    assert.tensor.bitwise(run:backward(sa.ones({}):expand(2, 4, 9, 6)).dk, ones.dk)
  end)

  it("gives empty gradients, and zeros where nothing looked, for empty inputs", function()
    for _, sizes in ipairs {{0, 2, 3, 4}, {2, 0, 3, 4}, {2, 2, 0, 4}, {2, 2, 3, 0}, {0, 0, 0, 0}} do
      local B, H, L, S = unpack(sizes)
      local q, k, v = floats(1, {B, H, L, 8}), floats(2, {B, H, S, 8}), floats(3, {B, H, S, 6})
      local run = sa.forward(q, k, v, {weights = true})
      assert.same({{B, H, L, 6}, {B, H, L}, {B, H, L, S}}, {run.out.shape, run.lse.shape, run.weights.shape})
      assert.equal(B * H * L * 6, run.out:stats().zero)
      assert.equal(B * H * L, run.lse:stats().neginf)
      local g = run:backward(sa.ones {B, H, L, 6}, sa.ones {B, H, L})
      for name, t in pairs {dq = q, dk = k, dv = v} do
        assert.same(t.shape, g[name].shape)
        assert.equal(t:numel(), g[name]:stats().zero)
      end
    end
  end)
end)
