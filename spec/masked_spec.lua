-- masked means masked: what stands behind the mask changes nothing, and what is visible reaches exactly who sees it

local sa = require "safeattn"
local cases = require "spec.attention_cases"

local m = sa.mask

local inf, nan = math.huge, 0 / 0
local dtypes = cases.dtypes
local wanted = cases.every(cases.fewer > 3 and 3 or 1)  -- coprime to the number of dtypes
local largest = {f32 = 3e38, f64 = 1e308, f16 = 65504, bf16 = 3e38}

-- The values of a tensor as f64, contiguous.
local function exact(t)
  return t:to("f64"):contiguous()
end

-- Runs a test with every dtype on every engine.
local function everywhere(test)
  for _, dtype in ipairs(dtypes) do
    for _, engine in ipairs(cases.engines) do
      cases.with(engine, function() test(dtype, engine) end)
    end
  end
end

-- Of a case: the visible pairs (bool [B,H,L,S]), how many keys each query sees (of [B,H,L]), and how many queries see
-- each key (of [B,Hkv,S]).
local function sight(c, o)
  local visible = cases.visible(c):clone()
  local seen, of_query, of_key = visible:data(), {}, {}
  local bias = o.bias and exact(o.bias)
  local bias_data = bias and bias:data()
  local group = c.heads / c.key_heads
  for row = 0, c.batch * c.heads * c.queries - 1 do
    local first_key = math.floor(math.floor(row / c.queries) / group) * c.keys
    of_query[row] = 0
    for j = 0, c.keys - 1 do
      local pair = row * c.keys + j
      if bias_data and bias_data[pair] == -inf then seen[pair] = false end
      local count = seen[pair] and 1 or 0
      of_query[row] = of_query[row] + count
      of_key[first_key + j] = (of_key[first_key + j] or 0) + count
    end
  end
  return visible, of_query, of_key
end

local function cloned(o)
  local copy = {}
  for name, t in pairs(o) do copy[name] = t:clone() end
  return copy
end

-- Writes x to every place that no visible pair reads: keys that nobody sees, rows that see nothing, masked biases.
-- Returns how many rows and keys, and how many biases.
local function poison_masked(c, o, x)
  local visible, of_query, of_key = sight(c, o)
  local rows, biases = 0, 0
  local function fill(t, row)
    t:view(-1, t:size(-1)):select(1, row + 1):fill(x)
    rows = rows + 1
  end
  for row = 0, c.batch * c.key_heads * c.keys - 1 do
    if of_key[row] == 0 then
      fill(o.k, row)
      fill(o.v, row)
    end
  end
  for row = 0, c.batch * c.heads * c.queries - 1 do
    if of_query[row] == 0 then
      fill(o.q, row)
      fill(o.dout, row)
      fill(o.dlse:view(-1, 1), row)
    end
  end
  if o.bias then
    local bias = exact(o.bias):clone()
    local data, seen = bias:data(), visible:data()
    for pair = 0, bias:numel() - 1 do
      -- Where the bias itself is the mask, it stays.
      if not seen[pair] and data[pair] ~= -inf then
        data[pair] = x
        biases = biases + 1
      end
    end
    o.bias = bias:to(o.bias.dtype)
  end
  return rows, biases
end

local function same_results(got, want, what)
  for _, name in ipairs(cases.results) do
    local problem = got[name] and cases.difference(got[name], want[name]:to("f64"), 0, 0, 0)
    if problem then error(what .. ": " .. name .. ": " .. problem, 0) end
  end
end

describe("what is behind the mask changes no value:", function()
  local contents = cases.turns({nan, inf, -inf, "largest"}, 1)
  for _, dtype in ipairs(dtypes) do
    for _, given in ipairs {
      {mask = "dead", queries = 70, keys = 140, width = 33, bias = "bhls", bias_values = "inf"},
      {mask = "padding_both", queries = 130, keys = 67, width = 16, bias = "bhls"},
      {mask = "bottom_right", queries = 150, keys = 70, width = 20, value_width = 40, bias = "bhls"},
      {mask = "none", queries = 10, keys = 20, width = 8},
      {mask = "single", queries = 9, keys = 200, width = 64, dropout = 0.3},
      {mask = "window", queries = 40, keys = 300, width = 16, softcap = 2, alibi = true, batch = 1},
      {mask = "dense_keys", queries = 2, keys = 2100, width = 16, batch = 1},
      {mask = "window_bottom_right", queries = 1, keys = 2100, width = 16, batch = 1, sinks = true},
      {mask = "dead", queries = 140, keys = 70, width = 256, batch = 1},
      {mask = "bottom_right", queries = 150, keys = 140, width = 192, value_width = 128, batch = 1},
    } do
      local run = wanted() and it or function() end
      run(("%s, mask %s, width %d"):format(dtype, given.mask, given.width), function()
        local c = {dtype = dtype, heads = 2, key_heads = 1}
        for name, value in pairs(given) do c[name] = value end
        c = cases.complete(c)
        local clean = cases.operands(c)
        poison_masked(c, clean, 0.5)
        local values = contents()
        for _, engine in ipairs(cases.engines) do
          local want = cases.run(c, clean, engine)
          for _, value in ipairs(values) do
            local x = value == "largest" and largest[dtype] or value
            local poisoned = cloned(clean)
            local rows, biases = poison_masked(c, poisoned, x)
            assert.is_true(rows > 0)
            assert.is_true(not c.bias or biases > 0)
            same_results(cases.run(c, poisoned, engine), want,
              string.format("%g behind the mask: %s", x, cases.line(c, engine)))
          end
        end
      end)
    end
  end
end)

-- Every value that the definition says does not change must be as it was before, on the engine too. Returns how many
-- the definition changes.
local function check_untouched(definition, results, what)
  local touched = 0
  for _, name in ipairs(cases.results) do
    if results.before[name] then
      local t = {}
      for n, result in ipairs {definition.before, definition.after, results.before, results.after} do
        t[n] = exact(result[name])
      end
      local a, b, g, h = t[1]:data(), t[2]:data(), t[3]:data(), t[4]:data()
      for k = 0, t[1]:numel() - 1 do
        if a[k] ~= b[k] then
          touched = touched + 1
        elseif g[k] ~= h[k] then
          error(string.format("%s: %s[%d] was %g, became %g", what, name, k, g[k], h[k]), 0)
        end
      end
    end
  end
  return touched
end

describe("what is visible reaches exactly who sees it:", function()
  local contents = cases.turns({nan, inf, -inf}, 1)
  for _, dtype in ipairs(dtypes) do
    for _, given in ipairs {
      {mask = "dense"}, {mask = "causal", softcap = 3}, {mask = "documents", dropout = 0.3},
      {mask = "blocks", queries = 30, keys = 1100}, {mask = "dense_keys", queries = 2, keys = 2100},
      {mask = "dense", width = 128, bias = false, alibi = false},
      {mask = "dense", width = 256, bias = false, alibi = false},
      {mask = "causal", width = 192, value_width = 128, bias = false, alibi = false},
    } do
      local run = wanted() and it or function() end
      run(("%s, mask %s, width %d"):format(dtype, given.mask, given.width or 20), function()
        local c = {
          dtype = dtype, heads = 2, key_heads = 1, queries = 100, keys = 140, width = 20, bias = "bhls", sinks = true,
          alibi = true, batch = 1,
        }
        for name, value in pairs(given) do c[name] = value end
        c = cases.complete(c)
        local clean = cases.operands(c)
        clean.sinks:fill(0.5)
        if c.alibi then clean.alibi:fill(0.01) end
        -- A visible pair, of a late tile of keys where there is one.
        local visible = cases.visible(c)
        local i, j = math.min(c.queries, 91), c.mask == "causal" and 80 or c.keys - 5
        while not visible:get(1, 2, i, j) do j = j - 1 end
        local definition, before = {before = cases.oracle(c, clean)}, {}
        for _, engine in ipairs(cases.engines) do before[engine] = cases.run(c, clean, engine) end

        local function reach(name, ...)
          for _, x in ipairs(contents()) do
            -- A bias or a sink of -inf is as good as none.
            if not (x == -inf and (name == "bias" or name == "sinks")) then
              local place = {...}
              place[#place + 1] = x
              local o = cloned(clean)
              o[name]:set(unpack(place))
              definition.after = cases.oracle(c, o)
              for _, engine in ipairs(cases.engines) do
                local results = {before = before[engine], after = cases.run(c, o, engine)}
                local what = string.format("%s(%s) = %g", name, table.concat({...}, ","), x)
                what = what .. ": " .. cases.line(c, engine)
                assert.is_true(check_untouched(definition, results, what) > 0)
                local problem = cases.compare(c, clean, engine, results.after, definition.after)
                if problem then error(what .. ": " .. problem, 0) end
              end
            end
          end
        end
        reach("k", 1, 1, j, 3)
        reach("v", 1, 1, j, 3)
        reach("q", 1, 2, i, 3)
        reach("dout", 1, 2, i, 3)
        if c.bias then reach("bias", 1, 2, i, j) end
        reach("dlse", 1, 2, i)
        reach("sinks", 2)
        if c.alibi then reach("alibi", 2) end
      end)
    end
  end

  it("Inf that meets Inf in a score: it has its sign, and is finite under a softcap", function()
    for _, dtype in ipairs(dtypes) do
      for _, mask in ipairs {"dense", "causal"} do
        local c = cases.complete {dtype = dtype, batch = 1, heads = 2, key_heads = 1, queries = 70, keys = 150,
          width = 24, mask = mask, softcap = 3}
        local clean = cases.operands(c)
        local o = cloned(clean)
        o.q:set(1, 1, 40, 5, inf)
        o.k:set(1, 1, 20, 5, -inf)
        o.k:set(1, 1, 33, 5, inf)
        local definition = cases.oracle(c, o)
        assert.equal(0, definition.out:stats().nan)
        for _, engine in ipairs(cases.engines) do
          local problem = cases.compare(c, clean, engine, cases.run(c, o, engine), definition)
          if problem then error(cases.line(c, engine) .. ": " .. problem, 0) end
        end
      end
    end
  end)

  it("visible scores that all overflow to -inf make a NaN row, not a dead one", function()
    for _, dtype in ipairs(dtypes) do
      local x = dtype == "f16" and 65504 or largest[dtype]
      for _, engine in ipairs(cases.engines) do
        -- In f16 no product of 16 leaves f32, so there the scale does it; the reference computes in f64.
        local overflows = dtype == "f64" or engine.backend == "fused"
        cases.with(engine, function()
          local of = {dtype = dtype, device = engine.device}
          local run = sa.forward(sa.full({2, 16}, x, of), sa.full({3, 16}, -x, of), sa.ones({3, 4}, of),
            {backend = engine.backend, scale = dtype == "f16" and 1e30 or 1})
          assert.equal(overflows and 8 or 0, run.out:stats().nan)
          assert.equal(overflows and 2 or 0, run.lse:stats().nan)
        end)
      end
    end
  end)

  it("nothing, where a bias masks all pairs, whatever stands there", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device}
      local x = sa.full({7, 8}, nan, of)
      local run = sa.forward(x, x, x, {backend = engine.backend, bias = sa.full({1}, -inf, of), softcap = 3,
        alibi = sa.ones({1}, of), sinks = sa.ones({1}, of)})
      for name, gradient in pairs(run:backward(x)) do
        assert.equal(gradient:numel(), gradient:stats().zero, name .. " " .. dtype .. " " .. run.kernel)
      end
    end)
  end)

  it("nothing, where a bias hides one key from all, however many queries there are", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device, seed = 1}
      for _, queries in ipairs {1, 18, 40, 130} do
        local q, k, v = sa.randn({queries, 8}, of), sa.randn({20, 8}, of), sa.randn({20, 8}, of)
        local bias = sa.zeros({1, 20}, {dtype = dtype, device = engine.device})
        bias:set(1, 3, -inf)
        k:select(1, 3):fill(nan)
        v:select(1, 3):fill(inf)
        local run = sa.forward(q, k, v, {backend = engine.backend, bias = bias})
        for name, gradient in pairs(run:backward(q)) do
          local what = name .. " " .. queries .. " " .. dtype .. " " .. run.kernel
          assert.equal(0, gradient:stats().nan, what)
          if name ~= "dq" then
            local key = name == "dbias" and gradient:select(2, 3) or gradient:select(1, 3)
            assert.equal(key:numel(), key:stats().zero, what)
          end
        end
      end
    end)
  end)

  it("an infinite key that all turn away from gives and gets 0, however many queries there are", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device, seed = 1}
      for _, queries in ipairs {1, 18, 40, 130} do
        local q, k, v = sa.randn({queries, 8}, of), sa.randn({20, 8}, of), sa.randn({20, 8}, of)
        q:narrow(2, 5, 1):fill(-1)
        k:set(3, 5, inf)
        local run = sa.forward(q, k, v, {backend = engine.backend})
        local gradients = run:backward(q)
        for _, name in ipairs {"dk", "dv"} do
          local what = name .. " " .. queries .. " " .. dtype .. " " .. run.kernel
          assert.equal(8, gradients[name]:select(1, 3):stats().zero, what)
          assert.equal(0, gradients[name]:stats().nan, what)
        end
      end
    end)
  end)

  it("an infinite value among a thousand keys reaches who sees it, and changes no bit elsewhere", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device, seed = 1}
      local q, k, v = sa.randn({70, 64}, of), sa.randn({1100, 64}, of), sa.randn({1100, 64}, of)
      local mask = sa.full({70, 1100}, true, {device = engine.device})
      for i = 1, 70, 2 do mask:set(i, 900, false) end
      local options = {backend = engine.backend, mask = mask}
      local want = exact(sa.forward(q, k, v, options).out:to {device = "cpu"}):clone()
      for i = 1, 70 do
        want:set(i, 3, -inf)
        if i % 2 == 0 then want:set(i, 7, inf) end
      end
      v:set(600, 3, -inf)
      v:set(900, 7, inf)
      local run = sa.forward(q, k, v, options)
      local problem = cases.difference(exact(run.out:to {device = "cpu"}), want, 0, 0, 0)
      if problem then error(dtype .. " " .. run.kernel .. ": " .. problem, 0) end
    end)
  end)

  it("no bit of rows beside those whose scores are huge", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device, seed = 1}
      local bias = sa.zeros({1, 60}, {dtype = dtype, device = engine.device})
      bias:set(1, 2, 2000)
      -- Rows 1 to 10 see keys 1 to 30, the others see the others.
      local ids = {}
      for n = 1, 60 do ids[n] = n > 30 and 1 or 0 end
      local mask = m.documents({0, 0, 0, 0, 0, 0, 0, 0, 0, 0, unpack(ids, 31, 55)}, ids)
      for _, width in ipairs {8, 64} do
        local q, k, v = sa.randn({35, width}, of), sa.randn({60, width}, of), sa.randn({60, width}, of)
        local function results()
          local run = sa.forward(q, k, v, {backend = engine.backend, bias = bias, mask = mask})
          local g = run:backward(q)
          return {out = run.out:narrow(1, 11, 25), lse = run.lse:narrow(1, 11, 25), dq = g.dq:narrow(1, 11, 25),
            dk = g.dk:narrow(1, 31, 30), dv = g.dv:narrow(1, 31, 30)}, run
        end
        local want, run = results()
        k:select(1, 5):fill(nan)
        for name, t in pairs(results()) do
          local problem = cases.difference(t, want[name]:to("f64"), 0, 0, 0)
          if problem then error(("%s %s, width %d: %s: %s"):format(dtype, run.kernel, width, name, problem), 0) end
        end
      end
    end)
  end)

  it("no bit of others, whatever the sizes that are left when all who see it are NaN", function()
    everywhere(function(dtype, engine)
      local of = {dtype = dtype, device = engine.device, seed = 1}
      local options = {backend = engine.backend, causal = "bottom-right"}
      -- Queries 1 to 38 see no key, 39 sees the first, 40 both.
      local q, k, v = sa.randn({2, 8, 40, 64}, of), sa.randn({2, 1, 2, 64}, of), sa.randn({2, 1, 2, 64}, of)
      local dout, dlse = sa.randn({2, 8, 40, 64}, of), sa.ones({2, 8, 40}, {device = engine.device})
      if dtype == "f64" then dlse = dlse:to "f64" end
      local function same(got, want, what)
        local problem = cases.difference(got, want:to "f64", 0, 0, 0)
        if problem then error(("%s %s: %s"):format(dtype, what, problem), 0) end
      end
      local run = sa.forward(q, k, v, options)
      local dq = run:backward(dout).dq
      local dv = v:clone()
      dv:select(3, 2):fill(nan)
      same(sa.forward(q, k, dv, options):backward(dout).dq:narrow(3, 1, 39), dq:narrow(3, 1, 39), "V, dQ")
      dv:fill(nan)
      same(sa.forward(q, k, dv, options).lse, run.lse, "V, LSE")
      -- Of dO, only the last query's is not 0.
      dout:narrow(3, 1, 39):fill(0)
      run = sa.forward(q, k, v, {backend = engine.backend})
      dq = run:backward(dout, dlse).dq
      dout:select(3, 40):fill(nan)
      same(run:backward(dout, dlse).dq:narrow(3, 1, 39), dq:narrow(3, 1, 39), "dO, dQ")
    end)
  end)

  it("a NaN row stays one where dropout keeps none of its weights", function()
    everywhere(function(dtype, engine)
      local q = sa.ones({40, 8}, {dtype = dtype, device = engine.device})
      local options = {backend = engine.backend, dropout = 0.5, seed = 1}
      local dropped = sa.forward(q, q:narrow(1, 1, 2), q:narrow(1, 1, 2), options).out:eq(0):sum():item()
      assert.is_true(dropped > 0 and dropped < 40 * 8)
      q:narrow(1, 1, 2):fill(nan)
      local v = sa.ones({2, 8}, {dtype = dtype, device = engine.device})
      assert.equal(40 * 8, sa.forward(q, q:narrow(1, 1, 2), v, options).out:stats().nan)
    end)
  end)

  it("a NaN in one head or batch stays there", function()
    for _, dtype in ipairs(dtypes) do
      local c = cases.complete {dtype = dtype, batch = 2, heads = 4, key_heads = 2, queries = 30, keys = 40}
      local o = cases.operands(c)
      for _, engine in ipairs(cases.engines) do
        local before = cases.run(c, o, engine)
        local poisoned = cloned(o)
        for _, name in ipairs {"k", "v"} do poisoned[name]:select(1, 1):select(1, 2):fill(nan) end
        local after = cases.run(c, poisoned, engine)
        for _, name in ipairs {"out", "lse", "dq", "dk", "dv"} do
          for b = 1, 2 do
            for h = 1, after[name]:size(2) do
              local hit = b == 1 and h > after[name]:size(2) / 2
              local part = after[name]:select(1, b):select(1, h)
              if hit then
                assert.equal(part:numel(), part:stats().nan)
              else
                assert.is_nil(cases.difference(part, before[name]:select(1, b):select(1, h):to("f64"), 0, 0, 0))
              end
            end
          end
        end
      end
    end
  end)
end)
