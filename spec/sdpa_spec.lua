-- sa.sdpa: options and their defaults, ranks, layouts, what comes back, and gradients on the tape

local sa = require "safeattn"
local m = sa.mask

local function floats(seed, shape, options)
  options = options or {}
  options.seed = seed
  return sa.randn(shape, options)
end

local function leaf(seed, shape, dtype)
  return floats(seed, shape, {dtype = dtype, requires_grad = true})
end

local function inputs(dtype)
  local options = {dtype = dtype}
  return floats(1, {2, 4, 9, 8}, {dtype = options.dtype}), floats(2, {2, 2, 11, 8}, {dtype = options.dtype}),
    floats(3, {2, 2, 11, 6}, {dtype = options.dtype})
end

-- An option that is without effect would pass any comparison of two spellings of it.
local function assert_differ(a, b)
  assert.is_false(sa.equal(a, b))
end

describe("sa.sdpa", function()
  it("gives out, and a table that is empty unless something was asked for", function()
    local q, k, v = inputs()
    local out, more = sa.sdpa(q, k, v)
    assert.same({2, 4, 9, 6}, out.shape)
    assert.equal("f32", out.dtype)
    assert.is_nil(next(more))
    out, more = sa.sdpa(q, k, v, {lse = true, weights = true})
    assert.same({2, 4, 9}, more.lse.shape)
    assert.same({2, 4, 9, 11}, more.weights.shape)
    assert.tensor.near(sa.ones {2, 4, 9}, sa.sum(more.weights, -1), {atol = 1e-5})
    assert.tensor.near(out, sa.sdpa(q, k, v), {})
    assert.is_nil(select(2, sa.sdpa(q, k, v, {lse = false, weights = true})).lse)
  end)

  it("gives f64 an LSE of f64, the others one of f32", function()
    for dtype, of_lse in pairs {f32 = "f32", f64 = "f64", f16 = "f32", bf16 = "f32"} do
      local q, k, v = inputs(dtype)
      local out, more = sa.sdpa(q, k, v, {lse = true, weights = true})
      assert.same({dtype, of_lse, dtype}, {out.dtype, more.lse.dtype, more.weights.dtype})
    end
  end)

  it("takes ranks 2 and 3 for one batch and one head", function()
    local q, k, v = floats(1, {1, 3, 9, 8}), floats(2, {1, 3, 11, 8}), floats(3, {1, 3, 11, 6})
    local options = {causal = true, lse = true, weights = true, bias = floats(4, {9, 11})}
    local out, more = sa.sdpa(q, k, v, options)
    local function without_batch(t) return t:select(1, 1) end
    local out3, more3 = sa.sdpa(without_batch(q), without_batch(k), without_batch(v), options)
    assert.tensor.bitwise(out3, without_batch(out))
    assert.tensor.bitwise(more3.lse, without_batch(more.lse))
    assert.tensor.bitwise(more3.weights, without_batch(more.weights))
    local function first_head(t) return t:select(1, 1):select(1, 1) end
    local out2, more2 = sa.sdpa(first_head(q), first_head(k), first_head(v), options)
    assert.tensor.bitwise(out2, first_head(out))
    assert.tensor.bitwise(more2.lse, first_head(more.lse))
    assert.tensor.bitwise(more2.weights, first_head(more.weights))
  end)

  it("reads strided inputs and writes strided outputs", function()
    local q, k, v = inputs()
    local options = {causal = true, bias = floats(4, {4, 9, 11})}
    local expected = sa.sdpa(q, k, v, options)
    local function relaid(t, ...)
      -- the same values in another order in memory
      local dims = {...}
      local back = {}
      for place, dim in ipairs(dims) do back[dim] = place end
      return t:permute(unpack(dims)):contiguous():permute(unpack(back))
    end
    local rows = {relaid(q, 1, 3, 2, 4), relaid(k, 3, 1, 2, 4), relaid(v, 2, 1, 3, 4)}
    assert.tensor.bitwise(sa.sdpa(rows[1], rows[2], rows[3], options), expected)
    local columns = {relaid(q, 4, 3, 2, 1), relaid(k, 1, 2, 4, 3), relaid(v, 4, 1, 2, 3)}
    assert.tensor.bitwise(sa.sdpa(columns[1], columns[2], columns[3], options), expected)
    local out = relaid(sa.zeros {2, 4, 9, 6}, 4, 3, 1, 2)
    options.out = out
    options.bias = relaid(options.bias, 3, 2, 1)
    assert.is_true(rawequal(out, (sa.sdpa(q, k, v, options))))
    assert.tensor.bitwise(out, expected)
  end)

  it("reads expanded inputs", function()
    local q, k = floats(1, {1, 1, 1, 8}), floats(2, {1, 1, 11, 8})
    local out = sa.sdpa(q:expand(2, 4, 9, 8), k:expand(2, 4, 11, 8), k:expand(2, 4, 11, 8))
    assert.tensor.near(out, sa.sdpa(q, k, k):expand(2, 4, 9, 8), {atol = 1e-6})
  end)

  it("writes to the `out` it is given and gives that tensor back", function()
    local q, k, v = inputs()
    local expected = sa.sdpa(q, k, v, {causal = true})
    local out = sa.full({2, 4, 9, 6}, 0 / 0)
    assert.is_true(rawequal(out, (sa.sdpa(q, k, v, {causal = true, out = out}))))
    assert.tensor.bitwise(out, expected)
  end)

  it("shares key heads among query heads", function()
    local q, k, v = inputs()
    local function repeated(t)
      return t:view(2, 2, 1, 11, t:size(-1)):expand(2, 2, 2, 11, t:size(-1)):contiguous():view(2, 4, 11, t:size(-1))
    end
    assert.tensor.near(sa.sdpa(q, k, v), sa.sdpa(q, repeated(k), repeated(v)), {atol = 1e-6})
    local one_k, one_v = k:narrow(2, 1, 1), v:narrow(2, 1, 1)
    assert.tensor.near(sa.sdpa(q, one_k, one_v), sa.sdpa(q, one_k:expand(2, 4, 11, 8), one_v:expand(2, 4, 11, 6)),
      {atol = 1e-6})
  end)

  it("scales by 1/sqrt(E) unless told otherwise", function()
    local q, k, v = inputs()
    local out = sa.sdpa(q, k, v)
    assert.tensor.bitwise(sa.sdpa(q, k, v, {scale = 1 / math.sqrt(8)}), out)
    assert_differ(sa.sdpa(q, k, v, {scale = 1}), out)
    -- scale 0 makes every visible key alike
    assert.tensor.near(sa.sdpa(q, k, v, {scale = 0}):select(2, 1),
      sa.mean(v:select(2, 1), 2, {keep = true}):expand(2, 9, 6), {atol = 1e-6})
  end)

  it("aligns causality to the top left unless told otherwise", function()
    local q, k, v = inputs()
    local plain = sa.sdpa(q, k, v)
    local top, bottom = sa.sdpa(q, k, v, {causal = true}), sa.sdpa(q, k, v, {causal = "bottom-right"})
    assert.tensor.bitwise(sa.sdpa(q, k, v, {causal = "top-left"}), top)
    assert.tensor.bitwise(sa.sdpa(q, k, v, {mask = m.causal()}), top)
    assert.tensor.bitwise(sa.sdpa(q, k, v, {mask = m.causal "bottom-right"}), bottom)
    assert.tensor.bitwise(sa.sdpa(q, k, v, {causal = false}), plain)
    assert_differ(top, bottom)
    assert_differ(top, plain)
  end)

  it("bounds the window where a bound is given, along the diagonal in force", function()
    local q, k, v = inputs()
    local function windowed(options) return (sa.sdpa(q, k, v, options)) end
    assert.tensor.bitwise(windowed {window = {2, 1}}, windowed {mask = m.window(2, 1)})
    assert.tensor.bitwise(windowed {window = {nil, 1}}, windowed {mask = m.window(nil, 1)})
    assert.tensor.bitwise(windowed {window = {2, nil}}, windowed {mask = m.window(2)})
    assert.tensor.bitwise(windowed {window = {}}, windowed {})
    assert.tensor.bitwise(windowed {window = {3, 0}, causal = "bottom-right"},
      windowed {mask = m.window(3, 0, "bottom-right")})
    assert_differ(windowed {window = {2, 1}}, windowed {window = {2, 2}})
    assert_differ(windowed {window = {3, 0}, causal = true}, windowed {window = {3, 0}, causal = "bottom-right"})
  end)

  it("takes a bool tensor for a mask, true for visible", function()
    local q, k, v = inputs()
    local visible = floats(9, {2, 1, 9, 11}):gt(0)
    local out = sa.sdpa(q, k, v, {mask = visible})
    assert.tensor.bitwise(out, sa.sdpa(q, k, v, {mask = m.dense(visible)}))
    local expected = sa.sdpa(q, k, v, {bias = sa.where(visible, sa.zeros {1}, sa.full({1}, -math.huge))})
    assert.tensor.near(out, expected, {atol = 1e-6})
    assert_differ(out, (sa.sdpa(q, k, v)))
  end)

  it("allows what mask, causality, window and bias all allow", function()
    local q, k, v = inputs()
    local visible, bias = floats(9, {9, 11}):gt(-1), floats(10, {4, 1, 11})
    local minus_inf = sa.where(floats(11, {4, 1, 11}):gt(-1), sa.zeros {1}, sa.full({1}, -math.huge))
    local together = sa.sdpa(q, k, v,
      {mask = visible, causal = "bottom-right", window = {4, nil}, bias = bias + minus_inf})
    local all = m.dense(visible) * m.causal "bottom-right" * m.window(4, nil, "bottom-right") * m.additive(minus_inf)
    assert.tensor.near(together, sa.sdpa(q, k, v, {mask = all, bias = bias}), {atol = 1e-6})
  end)

  it("uses a mask again for other sizes, and a Lua function for each", function()
    local calls = 0
    local masks = {m.causal() + m.prefix(2), m.fn(function(_, _, i, j)
      calls = calls + 1
      return j <= i or j <= 2
    end, {batch = false, heads = false})}
    for _, size in ipairs {5, 130, 5, 3, 130} do
      local t = floats(1, {2, 2, size, 8})
      assert.tensor.bitwise(sa.sdpa(t, t, t, {mask = masks[1]}), sa.sdpa(t, t, t, {mask = masks[2]}))
    end
    assert.equal(5 * 5 + 3 * 3 + 130 * 130, calls)
    -- batches and heads come from q
    local seen = {}
    local q, k, v = inputs()
    sa.sdpa(q, k, v, {mask = m.fn(function(b, h, i, j)
      seen[b .. " " .. h .. " " .. i .. " " .. j] = true
      return true
    end)})
    assert.is_true(seen["2 4 9 11"] and not seen["3 1 1 1"] and not seen["1 5 1 1"] and not seen["1 1 10 1"])
  end)

  it("drops the same weights for the same seed, others for another", function()
    local q, k, v = inputs()
    local first = sa.sdpa(q, k, v, {dropout = 0.5, seed = 7})
    assert.tensor.bitwise(sa.sdpa(q, k, v, {dropout = 0.5, seed = 7}), first)
    assert_differ(sa.sdpa(q, k, v, {dropout = 0.5, seed = 8}), first)
    assert_differ(sa.sdpa(q, k, v, {dropout = 0.5}), sa.sdpa(q, k, v, {dropout = 0.5}))
    assert.tensor.bitwise(sa.sdpa(q, k, v, {dropout = 0, seed = 7}), sa.sdpa(q, k, v))
    sa.seed(5)
    local drawn = sa.sdpa(q, k, v, {dropout = 0.5})
    sa.seed(5)
    assert.tensor.bitwise(sa.sdpa(q, k, v, {dropout = 0.5}), drawn)
  end)

  it("serves both back ends, which agree", function()
    local q, k, v = inputs()
    local options = {causal = true, softcap = 3, sinks = floats(5, {4}), alibi = floats(6, {4}), backend = "fused"}
    local fused = sa.sdpa(q, k, v, options)
    options.backend = "reference"
    assert.tensor.near(fused, sa.sdpa(q, k, v, options), {atol = 1e-5})
    options.backend = "auto"
    assert.tensor.bitwise(sa.sdpa(q, k, v, options), fused)
  end)

  it("leaves its options and inputs as they were", function()
    local q, k, v = inputs()
    local options = {causal = true, window = {3, 0}, dropout = 0.1, mask = floats(9, {9, 11}):gt(-1)}
    local kept = {q:clone(), k:clone(), v:clone()}
    sa.sdpa(q, k, v, options)
    assert.same({3, 0}, options.window)
    local names = {}
    for name in pairs(options) do names[#names + 1] = name end
    table.sort(names)
    assert.same({"causal", "dropout", "mask", "window"}, names)
    for n, t in ipairs {q, k, v} do assert.tensor.bitwise(t, kept[n]) end
  end)
end)

describe("the gradient of sa.sdpa", function()
  local function all_leaves(dtype)
    return leaf(1, {2, 4, 9, 8}, dtype), leaf(2, {2, 2, 11, 8}, dtype), leaf(3, {2, 2, 11, 6}, dtype),
      leaf(4, {4, 1, 11}, dtype), leaf(5, {4}, dtype), leaf(6, {4}, dtype)
  end

  it("reaches q, k, v, bias, sinks and alibi, as run:backward gives it", function()
    local q, k, v, bias, sinks, alibi = all_leaves()
    local options = {mask = m.padding {11, 5}, causal = "bottom-right", bias = bias, sinks = sinks, alibi = alibi,
      softcap = 10, dropout = 0.2, seed = 3, lse = true}
    local out, more = sa.sdpa(q, k, v, options)
    local dout, dlse = floats(8, {2, 4, 9, 6}), floats(9, {2, 4, 9})
    sa.sum(out * dout + sa.sum(more.lse * dlse) / out:numel()):backward()
    local run = sa.forward(q, k, v, options)
    assert.tensor.bitwise(out:detach(), run.out)
    local g = run:backward(dout, dlse)
    for name, t in pairs {dq = q, dk = k, dv = v, dbias = bias, dsinks = sinks, dalibi = alibi} do
      assert.same(t.shape, g[name].shape)
      assert.tensor.near(t.grad, g[name], {atol = 1e-5, rtol = 1e-5})
    end
  end)

  it("matches finite differences, for all inputs and through the LSE", function()
    local q, k, v, bias, sinks, alibi = all_leaves "f64"
    local ok, report = sa.gradcheck(function(...)
      local q_, k_, v_, bias_, sinks_, alibi_ = ...
      local out, more = sa.sdpa(q_, k_, v_, {causal = true, bias = bias_, sinks = sinks_, alibi = alibi_, lse = true})
      return sa.sum(out * out) + sa.sum(more.lse * more.lse)
    end, {q, k, v, bias, sinks, alibi})
    assert.is_true(ok, tostring(report))
  end)

  it("goes only where it is wanted", function()
    local q, k, v = inputs()
    k.requires_grad = true
    local out = sa.sdpa(q, k, v)
    assert.is_true(out.requires_grad)
    sa.sum(out):backward()
    assert.is_nil(q.grad)
    assert.is_nil(v.grad)
    assert.same({2, 2, 11, 8}, k.grad.shape)
    local bias = leaf(4, {9, 11})
    k.requires_grad = false
    sa.sum((sa.sdpa(q, k, v, {bias = bias}))):backward()
    assert.same({9, 11}, bias.grad.shape)
  end)

  it("adds up over uses and calls", function()
    local q = leaf(1, {1, 2, 9, 8})
    local dout = floats(2, {1, 2, 9, 8})
    sa.sdpa(q, q, q):backward(dout)
    local g = sa.forward(q, q, q):backward(dout)
    assert.tensor.near(q.grad, g.dq + g.dk + g.dv, {atol = 1e-5})
    sa.sdpa(q, q, q):backward(dout)
    assert.tensor.near(q.grad, (g.dq + g.dk + g.dv) * 2, {atol = 1e-5})
  end)

  it("flows through the LSE alone", function()
    local q = leaf(1, {1, 2, 9, 8})
    local _, more = sa.sdpa(q, q, q, {lse = true})
    assert.is_true(more.lse.requires_grad)
    sa.sum(more.lse):backward()
    local g = sa.forward(q, q, q):backward(nil, sa.ones {1, 2, 9})
    assert.tensor.near(q.grad, g.dq + g.dk, {atol = 1e-5})
  end)

  it("is not recorded without need", function()
    local q = leaf(1, {1, 2, 9, 8})
    sa.no_grad(function()
      local out = sa.sdpa(q, q, q)
      assert.is_false(out.requires_grad)
    end)
    local plain = q:detach()
    assert.is_false(sa.sdpa(plain, plain, plain).requires_grad)
    assert.is_false(select(2, sa.sdpa(q, q, q, {weights = true})).weights.requires_grad)
  end)

  it("works with a given out, which then belongs to the tape", function()
    local q = leaf(1, {1, 2, 9, 8})
    local buffer = sa.empty {1, 2, 9, 8}
    local out = sa.sdpa(q, q, q, {out = buffer})
    assert.is_true(buffer.requires_grad)
    sa.sum(out):backward()
    local g = sa.forward(q, q, q):backward(sa.ones {1, 2, 9, 8})
    assert.tensor.near(q.grad, g.dq + g.dk + g.dv, {atol = 1e-5})
  end)

  it("survives the collection of everything else", function()
    local q = leaf(1, {1, 2, 140, 8})
    local out
    do
      local k, bias = floats(2, {1, 2, 130, 8}), floats(3, {140, 130})
      out = sa.sdpa(q, k, k, {bias = bias, mask = m.fn(function(_, _, i, j) return j <= i end) * m.prefix(100)})
    end
    for _ = 1, 3 do collectgarbage() end
    sa.sum(out):backward()
    assert.equal(0, q.grad:stats().nan)
    assert.is_true(q.grad:stats().norm > 0)
  end)

  it("is refused when something that it needs was changed or freed", function()
    local q, k = leaf(1, {1, 2, 9, 8}), floats(2, {1, 2, 9, 8})
    local out = sa.sdpa(q, k, k)
    k:fill(0)
    assert.has_error(function() sa.sum(out):backward() end)
    local again = floats(2, {1, 2, 9, 8})
    out = sa.sdpa(q, again, again)
    again:free()
    assert.has_error(function() sa.sum(out):backward() end)
  end)
end)
