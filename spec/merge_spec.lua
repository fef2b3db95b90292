-- sa.merge: attention over parts of the keys is put together to attention over all of them

local sa = require("spec.helper").sa

local inf, nan = math.huge, 0 / 0

local function floats(seed, shape, dtype)
  return sa.randn(shape, {seed = seed, dtype = dtype})
end

describe("sa.merge", function()
  it("weighs parts by their LSE: numbers by hand", function()
    local ln = math.log
    local out, lse = sa.merge({sa.tensor {{4}}, sa.tensor {{8}}}, {sa.tensor {ln(1)}, sa.tensor {ln(3)}})
    assert.tensor.near(out, {{7}}, {atol = 1e-6})
    assert.tensor.near(lse, {ln(4)}, {atol = 1e-6})
  end)

  for dtype, tolerance in pairs {f32 = 1e-6, f64 = 1e-14, bf16 = 0.02, f16 = 0.002} do
    it("gives attention over all keys from attention over parts, in " .. dtype, function()
      local q, k, v = floats(1, {2, 3, 9, 8}, dtype), floats(2, {2, 3, 14, 8}, dtype), floats(3, {2, 3, 14, 5}, dtype)
      local whole = sa.forward(q, k, v)
      local outs, lses = {}, {}
      for p, keys in ipairs {{1, 5}, {6, 1}, {7, 8}} do
        local run = sa.forward(q, k:narrow(3, unpack(keys)), v:narrow(3, unpack(keys)))
        outs[p], lses[p] = run.out, run.lse
      end
      local out, lse = sa.merge(outs, lses)
      assert.equal(dtype, out.dtype)
      assert.equal(whole.lse.dtype, lse.dtype)
      assert.tensor.near(out, whole.out, {atol = tolerance, rtol = tolerance})
      assert.tensor.near(lse, whole.lse, {atol = 1e-5, rtol = 1e-5})
    end)
  end

  it("does not read a part that saw nothing, whatever it holds", function()
    local out1, lse1 = floats(1, {3, 4}), floats(2, {3})
    local junk = sa.full({3, 4}, nan)
    local out, lse = sa.merge({junk, out1, sa.full({3, 4}, inf)}, {sa.full({3}, -inf), lse1, sa.full({3}, -inf)})
    assert.tensor.bitwise(out, (sa.merge({out1}, {lse1})))
    assert.tensor.near(out, out1, {atol = 1e-6})
    assert.tensor.near(lse, lse1, {atol = 1e-6})
    out, lse = sa.merge({junk, junk}, {sa.full({3}, -inf), sa.full({3}, -inf)})
    assert.tensor.same(out, sa.zeros {3, 4})
    assert.tensor.same(lse, sa.full({3}, -inf))
  end)

  it("keeps a NaN of a part that saw something in its rows", function()
    local out1 = sa.tensor {{nan, 1}, {2, 3}}
    local out = sa.merge({out1, sa.ones {2, 2}}, {sa.zeros {2}, sa.zeros {2}})
    assert.tensor.same(out, {{nan, 1}, {1.5, 2}})
  end)

  it("does not overflow, however large the LSE", function()
    local out, lse = sa.merge({sa.ones {2, 1}, sa.full({2, 1}, 3)}, {sa.tensor {1e4, -1e4}, sa.tensor {1e4, -1e4}})
    assert.tensor.near(out, {{2}, {2}}, {atol = 1e-5})
    assert.tensor.near(lse, {1e4 + math.log(2), -1e4 + math.log(2)}, {rtol = 1e-6})
  end)

  it("carries gradients to the parts, which give those of the whole", function()
    local function leaves()
      local q, k, v = floats(1, {1, 2, 7, 4}, "f64"), floats(2, {1, 2, 9, 4}, "f64"), floats(3, {1, 2, 9, 3}, "f64")
      for _, t in ipairs {q, k, v} do t.requires_grad = true end
      return q, k, v
    end
    local dout, dlse = floats(4, {1, 2, 7, 3}, "f64"), floats(5, {1, 2, 7}, "f64")
    -- bottom-right causality leaves rows of a part dead
    local visible = sa.mask.causal "bottom-right":dense {L = 7, S = 9}
    local q, k, v = leaves()
    local outs, lses = {}, {}
    for p, keys in ipairs {{1, 4}, {5, 5}} do
      local out, more = sa.sdpa(q, k:narrow(3, unpack(keys)), v:narrow(3, unpack(keys)),
        {mask = visible:narrow(4, unpack(keys)), lse = true})
      outs[p], lses[p] = out, more.lse
    end
    sa.sum(sa.merge(outs, lses) * dout):backward()
    local g = sa.forward(q, k, v, {mask = visible}):backward(dout)
    for name, t in pairs {dq = q, dk = k, dv = v} do assert.tensor.near(t.grad, g[name], {atol = 1e-12}) end

    for _, t in ipairs {q, k, v} do t.grad = nil end
    local out, lse = sa.merge(outs, lses)
    sa.sum(lse * dlse):backward()
    g = sa.forward(q, k, v, {mask = visible}):backward(nil, dlse)
    for name, t in pairs {dq = q, dk = k} do assert.tensor.near(t.grad, g[name], {atol = 1e-12}) end
    assert.equal(0, v.grad:stats().norm)
    assert.is_true(out.requires_grad)
  end)

  it("matches finite differences", function()
    local parts = {}
    for p = 1, 3 do
      parts[p], parts[3 + p] = floats(p, {2, 3}, "f64"), floats(10 + p, {2}, "f64")
    end
    for _, t in ipairs(parts) do t.requires_grad = true end
    local ok, report = sa.gradcheck(function(a, b, c, x, y, z)
      local out, lse = sa.merge({a, b, c}, {x, y, z})
      return sa.sum(out * out) + sa.sum(lse * lse)
    end, parts)
    assert.is_true(ok, tostring(report))
  end)
end)
