-- the reference is the definition: hand-worked numbers, the definition once more in Lua, and finite differences

local sa = require "safeattn"
local cases = require "spec.attention_cases"

local m = sa.mask
local inf, nan, ln = math.huge, 0 / 0, math.log

local function f64(data)
  return sa.tensor(data, {dtype = "f64"})
end

local function near(got, want, message)
  local problem = cases.difference(got, f64(want), 1e-14, 1e-14, 0)
  assert.is_nil(problem, (message or "") .. " " .. tostring(problem))
end

local function reference(q, k, v, options)
  options = options or {}
  options.backend = "reference"
  options.scale = options.scale or 1
  return sa.forward(f64(q), f64(k), f64(v), options)
end

describe("the reference, by hand:", function()
  -- One query, two keys, scores 0 and ln 3: weights 1/4 and 3/4.
  local q, k, v = {{1}}, {{0}, {ln(3)}}, {{4}, {8}}

  it("weighs values by the softmax of the scores", function()
    local run = reference(q, k, v, {weights = true})
    near(run.out, {{7}})
    near(run.lse, {ln(4)})
    near(run.weights, {{0.25, 0.75}})
    local g = run:backward(f64 {{1}})
    near(g.dv, {{0.25}, {0.75}})
    near(g.dk, {{-0.75}, {0.75}})
    near(g.dq, {{0.75 * ln(3)}})
  end)

  it("sends the gradient of the LSE through the weights", function()
    local g = reference(q, k, v):backward(nil, f64 {2})
    near(g.dq, {{2 * 0.75 * ln(3)}})
    near(g.dk, {{0.5}, {1.5}})
    near(g.dv, {{0}, {0}})
  end)

  it("gives 0 and -inf to a row that sees nothing, and takes nothing from it", function()
    local run = reference({{1}, {nan}}, k, v, {mask = sa.tensor {{true, true}, {false, false}}, weights = true})
    near(run.out, {{7}, {0}})
    near(run.lse, {ln(4), -inf})
    near(run.weights, {{0.25, 0.75}, {0, 0}})
    local g = run:backward(f64 {{1}, {nan}}, f64 {0, nan})
    near(g.dq, {{0.75 * ln(3)}, {0}})
    near(g.dk, {{-0.75}, {0.75}})
    near(g.dv, {{0.25}, {0.75}})
  end)

  it("takes a bias of -inf for a mask, and no other", function()
    local bias = f64 {{-inf, 0, -inf}, {-inf, -inf, -inf}, {-1e300, -1e300, -inf}}
    local run = reference({{1}, {1}}, {{nan}, {2}, {nan}}, {{nan}, {3}, {inf}}, {bias = bias:narrow(1, 1, 2)})
    near(run.out, {{3}, {0}})
    near(run.lse, {2, -inf})
    local g = run:backward(f64 {{1}, {1}}, f64 {1, 1})
    near(g.dbias, {{0, 1, 0}, {0, 0, 0}})
    near(g.dv, {{0}, {1}, {0}})
    near(g.dk, {{0}, {1}, {0}})
    near(g.dq, {{2}, {0}})
    run = reference({{1}}, {{1}, {2}, {nan}}, {{4}, {6}, {nan}}, {bias = bias:narrow(1, 3, 1)})
    near(run.out, {{5}})
    near(run.lse, {-1e300})
  end)

  it("puts a sink into the denominator only", function()
    local run = reference({q}, {k}, {v}, {sinks = f64 {ln(4)}, weights = true})
    near(run.weights, {{{1 / 8, 3 / 8}}})
    near(run.out, {{{3.5}}})
    near(run.lse, {{ln(8)}})
    local g = run:backward(f64 {{{1}}}, f64 {{3}})
    near(g.dsinks, {0.5 * (3 - 3.5)})
    near(g.dv, {{{1 / 8}, {3 / 8}}})
  end)

  it("gives the sink to a row that sees nothing else", function()
    local mask = m.none()
    local run = reference({q, q}, {k, k}, {v, v}, {sinks = f64 {5, -inf}, mask = mask})
    near(run.out, {{{0}}, {{0}}})
    near(run.lse, {{5}, {-inf}})
    near(run:backward(f64 {{{nan}}, {{nan}}}, f64 {{2}, {3}}).dsinks, {2, 0})
    run = reference({q}, {k}, {v}, {sinks = f64 {nan}, mask = mask})
    near(run.out, {{{0}}})
    near(run.lse, {{nan}})
  end)

  it("gives NaN when all visible scores overflow to -inf, unless there is a sink", function()
    local run = reference({{1e200}}, {{-1e200}, {-1e200}}, v)
    near(run.out, {{nan}})
    near(run.lse, {nan})
    run = reference({{{1e200}}}, {{{-1e200}, {-1e200}}}, {v}, {sinks = f64 {1}})
    near(run.out, {{{0}}})
    near(run.lse, {{1}})
    run = reference({{{1e200}}}, {{{-1e200}, {-1e200}}}, {v}, {sinks = f64 {-inf}})
    near(run.out, {{{nan}}})
    near(run.lse, {{nan}})
  end)

  it("passes a visible NaN to the rows that see it", function()
    local mask = sa.tensor {{true, false}, {true, true}}
    local run = reference({{1}, {1}}, {{0}, {nan}}, {{4}, {8}}, {mask = mask})
    near(run.out, {{4}, {nan}})
    near(run.lse, {0, nan})
    run = reference({{1}, {1}}, {{0}, {0}}, {{4, 4}, {nan, 8}}, {mask = mask})
    near(run.out, {{4, 4}, {nan, 6}})
    near(run.lse, {0, ln(2)})
    local g = run:backward(f64 {{1, 1}, {1, 1}})
    near(g.dq, {{0}, {nan}})
    near(g.dv, {{1.5, 1.5}, {0.5, 0.5}})
  end)

  it("bends scores with a softcap", function()
    local run = reference(q, {{1000}, {0}}, v, {softcap = 2})
    near(run.lse, {ln(math.exp(2) + 1)})
    local g = run:backward(f64 {{1}})
    near(g.dk, {{0}, {(4 - 8) / (math.exp(1) + math.exp(-1)) ^ 2 * -1}})
  end)

  it("lowers scores by slope times distance", function()
    local run = reference({{{0}}}, {{{0}, {0}, {0}}}, {{{4}, {8}, {16}}}, {alibi = f64 {ln(2)}, weights = true})
    near(run.weights, {{{4 / 7, 2 / 7, 1 / 7}}})
    near(run.out, {{{48 / 7}}})
    local p, o = {4 / 7, 2 / 7, 1 / 7}, 48 / 7
    near(run:backward(f64 {{{1}}}).dalibi, {-(p[2] * (8 - o) + 2 * p[3] * (16 - o))})
    -- With bottom-right causality the last query stands at the last key.
    run = reference({{{0}}}, {{{0}, {0}, {0}}}, {{{4}, {8}, {16}}},
      {alibi = f64 {ln(2)}, weights = true, causal = "bottom-right"})
    near(run.weights, {{{1 / 7, 2 / 7, 4 / 7}}})
  end)

  it("drops the weights whose random word is below the threshold, after the softmax", function()
    local B, H, L, S, p, seed = 2, 3, 5, 7, 0.25, 42
    local uniform = sa.rand({B, H, L, S}, {seed = seed})
    local identity = sa.zeros({B, H, S, S}, {dtype = "f64"})
    for b = 1, B do
      for h = 1, H do
        for j = 1, S do identity:set(b, h, j, j, 1) end
      end
    end
    local zeros = sa.zeros({B, H, L, 1}, {dtype = "f64"})
    local run = sa.forward(zeros, sa.zeros({B, H, S, 1}, {dtype = "f64"}), identity,
      {dropout = p, seed = seed, weights = true, backend = "reference"})
    local dropped = 0
    for b = 1, B do
      for h = 1, H do
        for i = 1, L do
          for j = 1, S do
            local kept = uniform:get(b, h, i, j) >= p
            assert.near(kept and 1 / S / (1 - p) or 0, run.out:get(b, h, i, j), 1e-15)
            assert.near(1 / S, run.weights:get(b, h, i, j), 1e-15)
            dropped = dropped + (kept and 0 or 1)
          end
        end
      end
    end
    assert.is_true(dropped > 20 and dropped < 90)
  end)

  it("takes empty sizes", function()
    for _, backend in ipairs {"reference", "auto"} do
      local function run(B, H, Hkv, L, S, E, Ev)
        local r = sa.forward(sa.ones {B, H, L, E}, sa.ones {B, Hkv, S, E}, sa.ones {B, Hkv, S, Ev},
          {backend = backend, scale = E == 0 and 1 or nil})
        local g = r:backward(sa.ones {B, H, L, Ev}, sa.ones {B, H, L})
        assert.same({B, H, L, E}, g.dq.shape)
        assert.same({B, Hkv, S, E}, g.dk.shape)
        assert.same({B, Hkv, S, Ev}, g.dv.shape)
        return r, g
      end
      local r, g = run(1, 2, 1, 3, 0, 4, 5)
      assert.is_true(sa.equal(r.out, sa.zeros {1, 2, 3, 5}))
      assert.is_true(sa.equal(r.lse, sa.full({1, 2, 3}, -inf)))
      assert.is_true(sa.equal(g.dq, sa.zeros {1, 2, 3, 4}))
      r, g = run(1, 2, 1, 0, 3, 4, 5)
      assert.same({1, 2, 0, 5}, r.out.shape)
      assert.is_true(sa.equal(g.dk, sa.zeros {1, 1, 3, 4}))
      assert.is_true(sa.equal(g.dv, sa.zeros {1, 1, 3, 5}))
      run(0, 2, 1, 3, 3, 4, 5)
      _, g = run(2, 0, 1, 3, 3, 4, 5)
      assert.is_true(sa.equal(g.dv, sa.zeros {2, 1, 3, 5}))
      r, g = run(1, 2, 1, 3, 4, 0, 5)  -- without a width all scores are 0
      assert.is_true(sa.equal(r.out, sa.ones {1, 2, 3, 5}))
      assert.is_true(sa.allclose(g.dv, sa.full({1, 1, 4, 5}, 1.5)))
      r = run(1, 2, 1, 3, 4, 5, 0)
      assert.same({1, 2, 3, 0}, r.out.shape)
    end
    local r = sa.forward(sa.ones {2, 0}, sa.ones {3, 0}, sa.ones {3, 1})
    assert.is_true(sa.allclose(r.lse, sa.full({2}, ln(3))))
  end)
end)

-- The definition once more, pair by pair, from tensors [B,H,L,E]. visible(b, h, i, j) counts from 1.
local function define(q, k, v, visible, options)
  local B, H, L, E = unpack(q.shape)
  local S, Ev, group = k:size(3), v:size(4), H / k:size(2)
  local out, lse = sa.zeros({B, H, L, Ev}, {dtype = "f64"}), sa.zeros({B, H, L}, {dtype = "f64"})
  local scale, softcap, d = options.scale or 1 / math.sqrt(E), options.softcap or 0, options.d or 0
  for b = 1, B do
    for h = 1, H do
      local key_head = math.ceil(h / group)
      for i = 1, L do
        local total, weights = options.sinks and math.exp(options.sinks:get(h)) or 0, {}
        for j = 1, S do
          local bias = options.bias and options.bias:get(b, h, i, j) or 0
          if visible(b, h, i, j) and bias ~= -inf then
            local s = 0
            for e = 1, E do s = s + q:get(b, h, i, e) * k:get(b, key_head, j, e) end
            s = s * scale
            if softcap > 0 then s = softcap * math.tanh(s / softcap) end
            s = s + bias
            if options.alibi then s = s - options.alibi:get(h) * math.abs(j - i - d) end
            weights[j] = math.exp(s)
            total = total + weights[j]
          end
        end
        lse:set(b, h, i, ln(total))
        for e = 1, Ev do
          local sum = 0
          for j = 1, S do
            if weights[j] then sum = sum + weights[j] / total * v:get(b, key_head, j, e) end
          end
          out:set(b, h, i, e, sum)
        end
      end
    end
  end
  return out, lse
end

describe("the reference, beside the definition written in Lua:", function()
  local function compare(sizes, options, visible)
    local B, H, Hkv, L, S, E, Ev = unpack(sizes)
    local function random(shape, seed) return sa.randn(shape, {dtype = "f64", seed = seed}) end
    local q, k, v = random({B, H, L, E}, 1), random({B, Hkv, S, E}, 2), random({B, Hkv, S, Ev}, 3)
    if options.bias then options.bias = random({B, H, L, S}, 4) end
    if options.sinks then options.sinks = random({H}, 5) end
    if options.alibi then options.alibi = random({H}, 6) end
    local out, lse = define(q, k, v, visible, options)
    options.d, options.backend = nil, "reference"
    local run = sa.forward(q, k, v, options)
    assert.is_nil(cases.difference(run.out, out, 1e-12, 1e-12, 0))
    assert.is_nil(cases.difference(run.lse, lse, 1e-12, 1e-12, 0))
  end

  it("no mask", function()
    compare({2, 4, 2, 5, 7, 3, 4}, {}, function() return true end)
  end)
  it("causal, top-left", function()
    compare({1, 3, 1, 9, 6, 3, 4}, {causal = true}, function(_, _, i, j) return j <= i end)
    compare({1, 2, 2, 131, 140, 2, 1}, {causal = "top-left"}, function(_, _, i, j) return j <= i end)
  end)
  it("causal, bottom-right, with dead rows where L > S", function()
    compare({1, 2, 2, 9, 6, 3, 4}, {causal = "bottom-right"}, function(_, _, i, j) return j - i <= -3 end)
    compare({1, 2, 2, 3, 6, 3, 4}, {causal = "bottom-right", alibi = true, d = 3},
      function(_, _, i, j) return j - i <= 3 end)
  end)
  it("window", function()
    compare({1, 2, 2, 9, 6, 3, 4}, {window = {2, 1}}, function(_, _, i, j) return j - i >= -2 and j - i <= 1 end)
    compare({1, 2, 2, 5, 9, 3, 4}, {window = {1, 2}, causal = "bottom-right"},
      function(_, _, i, j) return j - i - 4 >= -1 and j - i - 4 <= 0 end)
    compare({1, 2, 2, 5, 9, 3, 4}, {window = {nil, 2}}, function(_, _, i, j) return j - i <= 2 end)
  end)
  it("a Lua mask, bias, sinks, ALiBi, softcap and scale together with causality and a window", function()
    local function chosen(b, h, i, j) return (b + h + i * j) % 3 ~= 0 end
    compare({2, 4, 1, 6, 7, 3, 2}, {
      mask = m.fn(chosen), bias = true, sinks = true, alibi = true, softcap = 0.7, scale = -1.3,
      causal = "bottom-right", window = {3, nil}, d = 1,
    }, function(b, h, i, j) return chosen(b, h, i, j) and j - i - 1 <= 0 and j - i - 1 >= -3 end)
  end)
  it("scale 0", function()
    compare({1, 1, 1, 3, 4, 5, 2}, {scale = 0, bias = true}, function() return true end)
  end)
end)

describe("the reference's gradients match finite differences:", function()
  local B, H, Hkv, L, S, E, Ev = 2, 4, 2, 3, 5, 3, 2

  -- The gradient of a mix of out and lse, with respect to all operands.
  local function check(options)
    local function random(shape, seed) return sa.randn(shape, {dtype = "f64", seed = seed, requires_grad = true}) end
    local inputs = {random({B, H, L, E}, 1), random({B, Hkv, S, E}, 2), random({B, Hkv, S, Ev}, 3)}
    local mix_out = sa.randn({B, H, L, Ev}, {dtype = "f64", seed = 7})
    local mix_lse = sa.randn({B, H, L}, {dtype = "f64", seed = 8})
    local at = {}
    for seed, name in ipairs {"bias", "sinks", "alibi"} do
      if options[name] then
        local shape = options[name] == true and {H} or options[name]
        inputs[#inputs + 1] = random(shape, 10 + seed)
        at[name] = #inputs
      end
    end
    local ok, report = sa.gradcheck(function(...)
      local given = {...}
      local opts = {backend = "reference", lse = true}
      for name, value in pairs(options) do opts[name] = value end
      for name, position in pairs(at) do opts[name] = given[position] end
      local out, more = sa.sdpa(given[1], given[2], given[3], opts)
      -- A dead row's LSE is -inf and has no gradient.
      local lse = sa.where(more.lse:lt(-1e300), sa.zeros({B, H, L}, {dtype = "f64"}), more.lse)
      return (out * mix_out):sum() + (lse * mix_lse):sum()
    end, inputs, {eps = 1e-5, atol = 1e-8, rtol = 1e-7})
    assert.is_true(ok, tostring(report))
  end

  local dims = {b = B, h = H, l = L, s = S}

  it("q, k, v and lse", function() check {} end)
  it("bias under every broadcast pattern", function()
    for _, pattern in ipairs {
      "bhls", "1hls", "b1ls", "bh1s", "bhl1", "11ls", "1h1s", "1hl1", "b11s", "b1l1", "bh11", "111s", "11l1", "1h11",
      "b111", "1111", "hls", "ls", "s", "1",
    } do
      local shape = {}
      for letter in pattern:gmatch(".") do shape[#shape + 1] = dims[letter] or 1 end
      check {bias = shape}
    end
  end)
  it("sinks", function() check {sinks = true} end)
  it("ALiBi slopes", function()
    check {alibi = true}
    check {alibi = true, causal = "bottom-right"}
  end)
  it("softcap", function() check {softcap = 0.8, bias = {L, S}} end)
  it("scale", function()
    check {scale = -0.9}
    check {scale = 0}
  end)
  it("causal, window, dead rows", function()
    check {causal = true}
    check {window = {1, 1}, causal = "bottom-right"}
    check {mask = m.fn(function(b, h, i, j) return i ~= 2 and (b + h + j) % 2 == 0 end)}
    check {mask = m.fn(function(b, h, i, j) return i ~= 2 and (b + h + j) % 2 == 0 end), sinks = true}
    check {mask = m.none()}
  end)
  it("dropout", function() check {dropout = 0.4, seed = 3, sinks = true} end)
  it("everything together", function()
    check {
      mask = m.random(0.8, 5), bias = {1, H, L, 1}, sinks = true, alibi = true, softcap = 1.1, scale = 0.7,
      dropout = 0.2, seed = 9, window = {3, 2},
    }
  end)
end)
