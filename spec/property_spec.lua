-- what must hold between calls of attention, whatever the numbers

local sa = require "safeattn"
local cases = require "spec.attention_cases"

local device = require("spec.helper").device

local m = sa.mask
local dtypes = cases.turns(cases.dtypes, math.min(2, #cases.dtypes))
local quick = cases.fewer > 1

-- Rounding of the dtype a few times over.
local rounding = {f32 = 4e-6, f64 = 1e-13, f16 = 3e-3, bf16 = 2e-2}

local function near(dtype, got, want)
  assert.is_nil(cases.difference(got, want:to("f64"), rounding[dtype], rounding[dtype], 0))
end

-- Whether two results agree in every value, NaN with NaN.
local function same(got, want)
  assert.is_nil(cases.difference(got, want:to("f64"), 0, 0, 0))
end

local function same_results(got, want)
  for _, name in ipairs(cases.results) do
    assert.equal(want[name] ~= nil, got[name] ~= nil, name)
    if want[name] then same(got[name], want[name]) end
  end
end

local function each_engine(test)
  for _, dtype in ipairs(dtypes()) do
    for _, engine in ipairs(cases.engines) do
      local ok, problem = pcall(test, dtype, engine)
      if not ok then error(("%s %s %s: %s"):format(engine.backend, engine.isa or "", dtype, tostring(problem)), 0) end
    end
  end
end

-- Rows of dim 3 in another order.
local function reordered(t, order)
  local result = sa.empty(t.shape, {dtype = t.dtype, device = t.device})
  for n, from in ipairs(order) do result:narrow(3, n, 1):copy(t:narrow(3, from, 1)) end
  return result
end

describe("attention:", function()
  it("keys and mask in another order change nothing beyond rounding", function()
    local order, uniform = {}, cases.generator(5)
    for j = 1, 150 do table.insert(order, math.floor(uniform() * j) + 1, j) end
    local visible = sa.rand({2, 4, 80, 150}, {seed = 4}):lt(0.4)
    local moved = sa.empty(visible.shape, {dtype = "bool"})
    for n, from in ipairs(order) do moved:narrow(4, n, 1):copy(visible:narrow(4, from, 1)) end
    each_engine(function(dtype, engine)
      local c = cases.complete {dtype = dtype, queries = 80, keys = 150, width = 24}
      local o = cases.place(cases.operands(c), engine)
      local function attend(k, v, mask)
        return cases.with(engine, function()
          local run = sa.forward(o.q, k, v, {mask = mask, backend = engine.backend})
          return {run = run, g = run:backward(o.dout, o.dlse)}
        end)
      end
      local whole, other = attend(o.k, o.v, visible), attend(reordered(o.k, order), reordered(o.v, order), moved)
      near(dtype, other.run.out, whole.run.out)
      near(dtype, other.run.lse, whole.run.lse)
      near(dtype, other.g.dq, whole.g.dq)
      near(dtype, other.g.dk, reordered(whole.g.dk, order))
      near(dtype, other.g.dv, reordered(whole.g.dv, order))
    end)
  end)

  it("parts of the keys, merged by their LSE, give the whole", function()
    each_engine(function(dtype, engine)
      local c = cases.complete {dtype = dtype, queries = 80, keys = 150, width = 24}
      local o = cases.place(cases.operands(c), engine)
      local function part(mask, first, count)
        return cases.with(engine, function()
          return sa.forward(o.q, o.k:narrow(3, first, count), o.v:narrow(3, first, count),
            {mask = mask, backend = engine.backend})
        end)
      end
      local visible = m.random(0.02, 8):dense {B = 1, H = 1, L = 80, S = 150}  -- some rows are dead in one part or both
      local whole = part(visible, 1, 150)
      local parts = {}
      for n, range in ipairs {{1, 64}, {65, 1}, {66, 85}} do
        parts[n] = part(visible:narrow(4, range[1], range[2]), range[1], range[2])
      end
      local out, lse = sa.merge({parts[1].out, parts[2].out, parts[3].out}, {parts[1].lse, parts[2].lse, parts[3].lse})
      near(dtype, out, whole.out)
      near(dtype, lse, whole.lse)
      assert.is_true(whole.lse:stats().neginf > 0)
    end)
  end)

  it("two runs, and any number of threads, agree to the bit", function()
    local threads_of_runs = device ~= "cpu" and {1, 1} -- a GPU has none of them
      or quick and {1, 1, 3} or {1, 1, 2, 3, 7}
    local length = quick and 200 or 300
    each_engine(function(dtype, engine)
      for _, given in ipairs {
        {queries = length, keys = length - 40, batch = 1, mask = "causal", bias = "1s", sinks = true, alibi = true},
        {queries = 1, keys = 7 * length, width = 64, batch = 1, heads = 2},
        {queries = length - 100, keys = length - 100, heads = 3, key_heads = 1, batch = 1, dropout = 0.2,
          bias = "bhls"},
      } do
        local c = {dtype = dtype}
        for name, value in pairs(given) do c[name] = value end
        c = cases.complete(c)
        local o = cases.place(cases.operands(c), engine)
        local first
        for _, threads in ipairs(threads_of_runs) do
          local results = cases.run(c, o, {backend = engine.backend, isa = engine.isa, device = engine.device,
          threads = threads})
          first = first or results
          same_results(results, first)
        end
      end
    end)
  end)

  it("a gradient is the same whichever others are wanted", function()
    each_engine(function(dtype, engine)
      local c = cases.complete {
        dtype = dtype, queries = 140, keys = 131, bias = "1hls", sinks = true, alibi = true, mask = "dead",
        dropout = 0.1,
      }
      local o = cases.place(cases.operands(c), engine)
      local options = cases.options(c, o)
      options.backend = engine.backend
      cases.with(engine, function()
        local all = sa.forward(o.q, o.k, o.v, options):backward(o.dout)
        for _, name in ipairs {"q", "k", "v", "bias", "sinks", "alibi"} do
          o[name].requires_grad = true
          sa.sdpa(o.q, o.k, o.v, options):backward(o.dout)
          same(o[name].grad, all["d" .. name])
          o[name].grad, o[name].requires_grad = nil, false
        end
      end)
    end)
  end)

  it("a mask, the same mask as bools, and as a bias of -inf say the same", function()
    each_engine(function(dtype, engine)
      local c = cases.complete {dtype = dtype, queries = 140, keys = 131}
      local o = cases.place(cases.operands(c), engine)
      for _, mask in ipairs {m.causal("bottom-right"), m.window(9, 30), m.random(0.1, 3), m.prefix(5) - m.causal()} do
        local dense = mask:dense {B = 1, H = 1, L = 140, S = 131}
        local bias = cases.place(sa.where(dense, sa.zeros(dense.shape, {dtype = dtype}),
          sa.full(dense.shape, -math.huge, {dtype = dtype})), engine)
        local results = {}
        for n, options in ipairs {{mask = mask}, {mask = dense}, {bias = bias}} do
          options.backend = engine.backend
          results[n] = cases.with(engine, function()
            local run = sa.forward(o.q, o.k, o.v, options)
            local g = run:backward(o.dout, o.dlse)
            return {out = run.out, lse = run.lse, dq = g.dq, dk = g.dk, dv = g.dv}
          end)
        end
        same_results(results[2], results[1])
        for name, result in pairs(results[1]) do near(dtype, results[3][name], result) end
      end
    end)
  end)

  it("the three stances of softmax agree on live rows, and with the weights of attention", function()
    each_engine(function(dtype, engine)
      local q = sa.randn({1, 1, 70, 8}, {dtype = dtype, seed = 1, device = engine.device})
      local k = sa.randn({1, 1, 90, 8}, {dtype = dtype, seed = 2, device = engine.device})
      local mask = m.random(0.03, 2)
      local dense = cases.place(mask:dense {B = 1, H = 1, L = 70, S = 90}, engine)
      local weights = cases.with(engine, function()
        return sa.forward(q, k, k, {mask = mask, scale = 1, weights = true, backend = engine.backend}).weights
      end)
      local scores = sa.matmul(q:to("f64"), k:to("f64"):transpose(3, 4))
      scores = sa.where(dense, scores, sa.full(scores.shape, -math.huge, {dtype = "f64", device = engine.device}))
      local zero = sa.softmax(scores)
      near(dtype, weights, zero)
      local dead = 0
      for i = 1, 70 do
        if dense:select(3, i):stats().zero == 90 then
          dead = dead + 1
        else
          for _, stance in ipairs {"nan", "uniform"} do
            same(sa.softmax(scores, {dead_rows = stance}):narrow(3, i, 1), zero:narrow(3, i, 1))
          end
        end
      end
      assert.is_true(dead > 0)
    end)
  end)

  it("gradients of the fused kernels match finite differences", function()
    for _, engine in ipairs(cases.fused) do
      cases.with(engine, function()
        local function random(shape, seed)
          return sa.randn(shape, {dtype = "f64", seed = seed, requires_grad = true, device = engine.device})
        end
        local inputs = {random({1, 2, 5, 3}, 1), random({1, 1, 7, 3}, 2), random({1, 1, 7, 2}, 3), random({5, 1}, 4),
          random({2}, 5), random({2}, 6)}
        local mix = sa.randn({1, 2, 5}, {dtype = "f64", seed = 7, device = engine.device})
        local ok, report = sa.gradcheck(function(q, k, v, bias, sinks, alibi)
          local out, more = sa.sdpa(q, k, v, {
            backend = "fused", bias = bias, sinks = sinks, alibi = alibi, softcap = 1.5, mask = m.random(0.8, 5),
            window = {3, 5}, dropout = 0.2, seed = 3, lse = true,
          })
          return out:sum() + (more.lse * mix):sum()
        end, inputs, {eps = 1e-5, atol = 1e-8, rtol = 1e-7})
        assert.is_true(ok, tostring(report))
      end)
    end
  end)
end)
