-- attention on CUDA devices: random configurations, sizes beyond 32 bits, two runs, beside the definition in f64

local helper = require "spec.helper"
local sa = require "safeattn"
local cases = require "spec.attention_cases"

local engines = {{backend = "fused", device = "cuda"}}
local dtypes = {"f32", "f64", "f16", "bf16"}

local function one_of(uniform, list)
  return list[math.floor(uniform() * #list) + 1]
end

-- A configuration drawn from a seed.
local function draw(seed)
  local uniform = cases.generator(seed)
  local function chance(p) return uniform() < p end
  local dtype = one_of(uniform, dtypes)
  local key_heads, group = one_of(uniform, {1, 2, 3}), one_of(uniform, {1, 1, 2, 4})
  local lengths = {1, 2, 7, 33, 63, 64, 65, 127, 128, 129, 190, 257, 300}
  local widths = {8, 16, 24, 33, 40, 64, 64, 80, 96, 128, 128, 160, 192, 256}
  local width = one_of(uniform, widths)
  local c = {
    dtype = dtype, seed = seed % 1000 + 1, batch = one_of(uniform, {1, 2, 3}), key_heads = key_heads,
    heads = key_heads * group, queries = one_of(uniform, lengths), keys = one_of(uniform, lengths), width = width,
    value_width = chance(0.3) and one_of(uniform, widths) or width, layout = one_of(uniform, cases.layouts),
    values = one_of(uniform, {"normal", "normal", "spread", "heavy", "ties"}),
    mask = chance(0.6) and one_of(uniform, cases.masks) or nil,
    causal = chance(0.3) and one_of(uniform, {"top-left", "bottom-right"}) or nil,
    window = chance(0.2) and {math.floor(uniform() * 100), math.floor(uniform() * 30)} or nil,
    softcap = chance(0.15) and 3 or nil, dropout = chance(0.15) and 0.2 or nil, weights = chance(0.2),
    sinks = chance(0.2), alibi = chance(0.2), dlse = chance(0.5),
  }
  if chance(0.35) then
    c.bias = one_of(uniform, {"bhls", "1hls", "b1ls", "ls", "b11s", "1s"})
    c.bias_values = one_of(uniform, {"normal", "inf"})
    c.extras_dtype = dtype ~= "f64" and chance(0.5) and "f32" or nil
  end
  return c
end

helper.describe_cuda("attention on a CUDA device", function()
  local first = tonumber(os.getenv "SAFEATTN_SEED") or os.time() % 1000000
  local count = os.getenv "SAFEATTN_QUICK" and 20 or 200

  it(string.format("%d random configurations from SAFEATTN_SEED=%d on", count, first), function()
    local problems = {}
    for n = 0, count - 1 do
      local ok, problem = pcall(cases.check, draw(first + n), engines)
      if not ok then problems[#problems + 1] = string.format("seed %d: %s", first + n, tostring(problem)) end
    end
    if #problems > 0 then
      error(string.format("%d of %d configurations are wrong:\n%s", #problems, count,
        table.concat(problems, "\n", 1, math.min(#problems, 10))), 0)
    end
  end)

  it("gives the same bits twice", function()
    for n = 1, 12 do
      local c = cases.complete(draw(7000 + n))
      local o = cases.operands(c)
      local one, two = cases.run(c, o, engines[1]), cases.run(c, o, engines[1])
      for name, t in pairs(one) do assert.tensor.bitwise(two[name], t) end
    end
  end)

  -- Hopper's forward does a block's first items with such scores twice, and looks at the maxima of those that follow,
  -- and of all in the next launches.
  it("gives all heads the same bits where scores jump by more than an exponent holds", function()
    local heads = os.getenv "SAFEATTN_QUICK" and 12 or 600
    for n, factors in ipairs {{1, 1, 100}, {1, 61, 121}, {1, 32, 1}, {100, 1, 1}} do
      for _, width in ipairs {64, 128} do
        local q = sa.randn({1, 1, 256, width}, {seed = n, dtype = "bf16", device = "cuda"})
        local k, v = sa.randn({1, 1, 384, width}, {seed = 10 + n}), sa.randn({1, 1, 384, width}, {seed = 20 + n})
        for tile, factor in ipairs(factors) do
          local part = k:narrow(3, tile * 128 - 127, 128)
          part:copy(part * factor)
        end
        k, v = k:to {dtype = "bf16", device = "cuda"}, v:to {dtype = "bf16", device = "cuda"}
        local all = {q:expand(1, heads, 256, width), k:expand(1, heads, 384, width), v:expand(1, heads, 384, width)}
        local run, again = sa.forward(unpack(all)), sa.forward(unpack(all))
        assert.tensor.bitwise(again.out, run.out)
        assert.tensor.bitwise(again.lse, run.lse)
        local wanted = sa.forward(q, k, v, {backend = "reference"})
        assert.tensor.near(run.out:narrow(2, 1, 1), wanted.out, {atol = 0.01, rtol = 0.01})
        assert.tensor.near(run.lse:narrow(2, 1, 1), wanted.lse, {atol = 1e-3, rtol = 1e-5})
        assert.tensor.bitwise(run.out:narrow(2, 1, 1):expand(1, heads, 256, width):contiguous(), run.out)
        assert.tensor.bitwise(run.lse:narrow(2, 1, 1):expand(1, heads, 256):contiguous(), run.lse)
        -- The same rows beside some that see a NaN.
        local options = {mask = sa.mask.causal "bottom-right"}
        local function rows(values, from, number)
          return sa.forward(q:expand(1, heads, 256, width), k:expand(1, heads, 384, width),
            values:expand(1, heads, 384, width), options).out:narrow(3, from, number):contiguous()
        end
        local poisoned = v:clone()
        poisoned:narrow(3, 380, 1):fill(0 / 0)
        assert.tensor.bitwise(rows(v, 1, 251), rows(poisoned, 1, 251))
        assert.equal(heads * 5 * width, rows(poisoned, 252, 5):stats().nan)
      end
    end
  end)

  local shapes = cases.turns({{"bf16", 128}, {"f16", 64}, {"bf16", 40}}, 1)

  -- Whole tiles, their edges and their tails; biases that are read two keys at once and one by one.
  for n, options in ipairs {
    {bias = "ls"}, {bias = "1hls", extras_dtype = "f32", causal = "bottom-right"}, {bias = "bhls", bias_values = "inf"},
    {bias = "b11s", bias_values = "inf", extras_dtype = "f32"}, {bias = "1hls", bias_values = "inf", mask = "random"},
    {bias = "b1l1"}, {bias = "ls", keys = 257}, {bias = "bh1s"}, {bias = "b11s", mask = "random", batch = 2},
    {bias = "bhl1", causal = "top-left"}, {bias = "1s", mask = "dead", keys = 300, dlse = true}, {bias = "b111"},
    {bias = "b1ls", key_heads = 1, batch = 3, values = "heavy", queries = 390},
    {bias = "ls", bias_values = "lowest", extras_dtype = "f32", sinks = true},
    {bias = "bhls", keys = 131, extras_dtype = "f32", bias_values = "lowest"},
    {bias = "ls", softcap = 3, alibi = true, dropout = 0.1, sinks = true, causal = "top-left", key_heads = 1},
    {bias = "bhls", bias_values = "inf", softcap = 3, alibi = true, dropout = 0.1, sinks = true, values = "heavy"},
    {softcap = 3}, {softcap = 30, values = "spread"}, {softcap = 300, values = "spread", mask = "dead"},
    {alibi = true}, {alibi = true, causal = "bottom-right", queries = 129},
    {dropout = 0.2}, {dropout = 0.2, keys = 129}, {dropout = 0.3, keys = 250, mask = "random"},
    {softcap = 2, scale = -0.5}, {alibi = true, scale = -0.5},
    {bias = "ls", bias_values = "highest", extras_dtype = "f32", sinks = "huge", seed = 15},
  } do
    local names = {}
    for name, value in pairs(options) do names[#names + 1] = name .. " " .. tostring(value) end
    table.sort(names)
    it("with " .. table.concat(names, ", "), function()
      for _, shape in ipairs(shapes()) do
        local c = {dtype = shape[1], width = shape[2], seed = n, heads = 2, queries = 200, keys = 256}
        for name, value in pairs(options) do c[name] = value end
        cases.check(c, engines)
      end
    end)
  end

  -- Their columns of keys are shared out, a job for each head, on Hopper.
  it("of heads that are grouped and long", function()
    for _, shape in ipairs {{64, 4, 1}, {128, 6, 2}} do
      local c = {dtype = "bf16", width = shape[1], heads = shape[2], key_heads = shape[3], seed = 5, queries = 1050,
        keys = 200}
      for _, causal in ipairs {false, "bottom-right"} do
        c.causal = causal or nil
        cases.check(c, engines)
      end
    end
  end)

  -- Columns of keys that get shorter are begun with the longest on Hopper, every second one first, and go past a row of
  -- all heads of a group before the next; of few columns each of some of the heads.
  local many = cases.fewer == 1
  it("of heads that are grouped and causal", function()
    for _, shape in ipairs {{many and 8 or 1, 4, many and 4 or 1, 1000}, {1, 8, 1, 500}} do
      local batch, group, key_heads, length = unpack(shape)
      cases.check({dtype = "f16", width = 128, batch = batch, heads = group * key_heads, key_heads = key_heads,
        queries = length, keys = length, causal = "top-left", seed = 7}, engines)
    end
  end)

  -- The long columns are begun with the longest on Hopper, each with its last rows.
  local function shrinking(rows)
    local seen = sa.zeros({rows, 2}, {dtype = "bool"})
    for row = 1, rows do
      seen:set(row, 1, true)
      seen:set(row, 2, row <= rows / 4)
    end
    return sa.mask.blocks(seen, 128)
  end
  for name, c in pairs {
    ["of heads that are grouped and long"] = {heads = 4, width = 64, queries = 1050, keys = 200,
      mask = sa.mask.padding({150}, {1000})},
    ["of so many queries that columns of keys are shared out"] = {heads = 1, width = 128, queries = 2100, keys = 250,
      mask = sa.mask.padding({200}, {2050})},
    ["of heads that are grouped and see columns of keys that get shorter"] = {heads = many and 256 or 8,
      key_heads = many and 128 or 4, width = 128, queries = 2040, keys = 250,
      mask = shrinking(16) * sa.mask.padding({200}, {1990})},
    -- Hopper begins with columns of long heads and of short ones.
    ["of a padded batch"] = {batch = 4, heads = many and 16 or 1, key_heads = many and 16 or 1, width = 128,
      queries = 512, keys = 512, mask = sa.mask.padding({460, 440, 120, 100}, {450, 462, 128, 100})},
    -- Split before, but for the tiles that nobody sees.
    ["of f32 and a padded batch"] = {dtype = "f32", batch = 2, heads = 2, key_heads = 1, width = 64, queries = 700,
      keys = 700, mask = sa.mask.padding({650, 400}, {650, 400})},
    ["of long columns of keys that get shorter"] = {heads = 1, width = 128, queries = 4090, keys = 250,
      mask = shrinking(32) * sa.mask.padding({200}, {4040})},
  } do
    it(name .. ", with NaN behind the mask, gives the bits of a clean run", function()
      local function attend(dirt, backend)
        local function operand(heads, length, seed)
          local t = sa.randn({c.batch or 1, heads, length, c.width},
            {seed = seed, dtype = c.dtype or "bf16", device = "cuda"})
          t:narrow(3, length - 49, 50):fill(dirt)
          return t
        end
        local q, k = operand(c.heads, c.queries, 1), operand(c.key_heads or 1, c.keys, 2)
        local v = operand(c.key_heads or 1, c.keys, 3)
        local run = sa.forward(q, k, v, {mask = c.mask, backend = backend})
        local gradients = run:backward(operand(c.heads, c.queries, 4))
        return {dq = gradients.dq, dk = gradients.dk, dv = gradients.dv}
      end
      local clean, truth = attend(1), attend(1, "reference")
      for gradient, t in pairs(clean) do
        local scale = truth[gradient]:stats()
        assert.tensor.near(truth[gradient], t, {atol = 0.02 * math.max(scale.max, -scale.min), rtol = 0.02})
      end
      for gradient, t in pairs(attend(0 / 0)) do assert.tensor.bitwise(clean[gradient], t) end
    end)
  end

  -- Of the norm, dS rounded costs bf16 1.66e-3, and the gradient itself as much: 2.35e-3 together. P rounded before
  -- dS is made of it would make that 2.9e-3.
  it("of 16 bits and width 128 makes dS of weights that were not rounded", function()
    for dtype, most in pairs {bf16 = 2.6e-3, f16 = 2.6e-3 / 8} do
      local rounded, exact = {}, {}
      for n = 1, 4 do
        local x = sa.randn({1, 2, 512, 128}, {seed = n, dtype = dtype})
        rounded[n], exact[n] = x:to "cuda", x:to "f64"
      end
      local got = sa.forward(rounded[1], rounded[2], rounded[3]):backward(rounded[4])
      local want = sa.forward(exact[1], exact[2], exact[3]):backward(exact[4])
      for name, gradient in pairs(want) do
        local off = (got[name]:to "cpu":to "f64" - gradient):stats().norm / gradient:stats().norm
        assert(off <= most, ("%s of %s: off by %.3g of its norm"):format(name, dtype, off))
      end
    end
  end)

  -- With one key dV is the sum of dO. Through one accumulator it is off by 2.5e-15.
  it("of f64 sums gradients tile by tile", function()
    local queries, width = 16384, 32
    local equal = sa.zeros({1, width}, {dtype = "f64", device = "cuda"})
    local dout = sa.rand({queries, width}, {seed = 1, dtype = "f64"})
    local run = sa.forward(equal:expand(queries, width), equal, equal)
    local dv = run:backward(dout:to "cuda").dv:to "cpu"
    local squares = 0
    for column = 1, width do
      local sum, lost = 0, 0
      for query = 1, queries do
        local x = dout:get(query, column) - lost
        local more = sum + x
        sum, lost = more, more - sum - x
      end
      squares = squares + (dv:get(1, column) / sum - 1) ^ 2
    end
    local off = math.sqrt(squares / width)
    assert(off <= 1.6e-15, ("off by %.3g"):format(off))
  end)

  -- 64 tiles of a column of keys are found at once.
  it("of few keys and so many queries that a column of tiles is found in parts", function()
    cases.check({dtype = "bf16", width = 64, batch = 1, heads = 1, key_heads = 1, queries = 8300, keys = 70,
      seed = 6, mask = "dead"}, engines)
  end)

  it("says which kernels served a call", function()
    local function kernel(options, width)
      local q = sa.randn({1, 2, 160, width or 64}, {seed = 1, dtype = "bf16", device = "cuda"})
      return sa.forward(q, q, q, options).kernel
    end
    local fastest = sa.info().cuda:find("capability 9.0", 1, true) and os.getenv "SAFEATTN_CUDA_KERNELS" ~= "portable"
    local bias = sa.zeros({160, 160}, {dtype = "bf16", device = "cuda"})
    for _, options in ipairs {{}, {softcap = 3}, {bias = bias}, {dropout = 0.1, seed = 1}} do
      assert.equal(fastest and "hopper-bf16-64" or "portable-bf16", kernel(options))
    end
    assert.equal("portable-bf16", kernel({weights = true}))
  end)

  -- Products of f32 are made of parts that have scales: each row its own, whatever else is in its tile.
  it("keeps f32's digits in rows of any size", function()
    local length, each = 72, 9
    for _, width in ipairs {24, 128, 200} do
      local o, ids = {}, {}
      for n, name in ipairs {"q", "k", "v", "dout"} do
        o[name] = sa.randn({1, 1, length, width}, {seed = n, dtype = "f32"})
      end
      for row = 1, length do
        ids[row] = math.floor((row - 1) / each)
        local size = 2 ^ (11 * (ids[row] - 4))
        for name, factor in pairs {q = size, k = 1 / size, v = size * size, dout = 1 / size} do
          local line = o[name]:select(3, row)
          line:copy(line * factor)
        end
      end
      local options = {mask = sa.mask.documents(sa.tensor(ids, {dtype = "i32"}))}
      local function attend(q, k, v, dout, backend)
        options.backend = backend
        local run = sa.forward(q, k, v, options)
        local g = run:backward(dout)
        return {out = run.out, dq = g.dq, dk = g.dk, dv = g.dv}
      end
      local placed, exact = cases.place(o, engines[1]), {}
      for name, t in pairs(o) do exact[name] = t:to "f64" end
      local got = attend(placed.q, placed.k, placed.v, placed.dout, "fused")
      local want = attend(exact.q, exact.k, exact.v, exact.dout, "reference")
      for row = 1, length, each do
        for name, t in pairs(want) do
          assert.is_nil(cases.difference(got[name]:narrow(3, row, each), t:narrow(3, row, each), 0,
            name == "out" and 3e-6 or 5e-6, 0))
        end
      end
    end
  end)

  -- A careful launch looks at 32 blocks of each of its own in one go where a block is a warp, as here.
  it("does carefully what came out not finite, however many blocks there are", function()
    local heads, length, width = os.getenv "SAFEATTN_QUICK" and 20 or 600, 80, 200
    local o = {}
    for n, name in ipairs {"q", "k", "v", "dout"} do
      o[name] = sa.randn({1, heads, length, width}, {seed = n, dtype = "f64", device = "cuda"})
    end
    local function attend()
      local run = sa.forward(o.q, o.k, o.v, {mask = sa.mask.padding {70}})
      local g = run:backward(o.dout)
      return {out = run.out, lse = run.lse, dq = g.dq, dk = g.dk, dv = g.dv}
    end
    local clean = attend()
    for _, head in ipairs {1, 2, heads - 1, heads} do
      o.k:set(1, head, 75, 3, 0 / 0)
      o.v:set(1, head, 75, width, 1 / 0)
    end
    for name, t in pairs(attend()) do assert.tensor.bitwise(t, clean[name], name) end
  end)

  -- Rows that many blocks load are split once, before; what is not finite is split as it is loaded.
  for _, c in ipairs {
    {width = 64, dlse = true}, {width = 100, values = "heavy", sinks = true},
    {width = 200, key_heads = 1},
    {width = 128, bias = "ls", bias_values = "inf", dropout = 0.1, softcap = 3, alibi = true},
  } do
    it("of f32 whose rows are split before, width " .. c.width, function()
      c.dtype, c.batch, c.heads, c.key_heads = "f32", 1, 4, c.key_heads or 2
      c.queries, c.keys, c.seed = 470, 530, 8
      cases.check(c, engines)
    end)
  end

  if not os.getenv "SAFEATTN_QUICK" then
    it("of f32 gives the heads of a batch, split some after the others, the bits that they have alone", function()
      local function operand(heads, seed)
        return sa.randn({9, heads, 1024, 64}, {seed = seed, dtype = "f32", device = "cuda"})
      end
      local q, k, v, dout = operand(16, 1), operand(8, 2), operand(8, 3), operand(16, 4)
      local all = sa.forward(q, k, v, {causal = true}):backward(dout)
      for batch = 1, 9, 3 do
        local function of(t) return t:narrow(1, batch, 3) end
        local alone = sa.forward(of(q), of(k), of(v), {causal = true}):backward(of(dout))
        for _, name in ipairs {"dq", "dk", "dv"} do assert.tensor.bitwise(of(all[name]), alone[name]) end
      end
    end)

    -- Blocks that add to dQ wait for those whose turn is before theirs, of however many the device has room for.
    it("gives the same gradients ten thousand times, whatever else the device has to do", function()
      local uniform = cases.generator(1)
      local runs = {}
      for n, c in ipairs {
        {64, 4, 4, 500, {causal = true}}, {128, 4, 2, 700, {mask = sa.mask.random(0.5, 1)}},
        {128, 6, 6, 600, {mask = sa.mask.padding({430}, {500})}}, {96, 4, 1, 300, {window = {100, 0}}},
        {128, 2, 2, 900, {softcap = 20, causal = "bottom-right"}}, {192, 2, 2, 400, {causal = true}},
        {256, 2, 2, 300, {}}, {128, 2, 2, 4100, {causal = true}}, {128, 16, 8, 4100, {causal = true}},
        {128, 8, 1, 1000, {causal = true}}, {128, 8, 2, 2100, {}},
      } do
        local width, heads, key_heads, length, options = unpack(c)
        local function half(of, seed)
          return sa.randn({1, of, length, width}, {seed = seed, dtype = "bf16", device = "cuda"})
        end
        local run, dout = sa.forward(half(heads, 1), half(key_heads, 2), half(key_heads, 3), options), half(heads, 4)
        runs[n] = {name = run.kernel .. " " .. n, gradients = function() return run:backward(dout) end}
        runs[n].wanted = runs[n].gradients()
      end
      local factor = sa.randn({2000, 2000}, {seed = 1, device = "cuda"})
      sa.synchronize()
      local beside = sa.cuda.stream()
      for round = 1, 10000 do
        for _ = 1, math.floor(uniform() * 4) do
          local other, part = one_of(uniform, runs), factor:narrow(1, 1, math.floor(uniform() * 2000) + 1)
          beside:use(uniform() < 0.5 and other.gradients or function() return part:matmul(factor) end)
        end
        local one = one_of(uniform, runs)
        local got = one.gradients()
        for name, t in pairs(one.wanted) do
          assert(sa.equal(t, got[name]), ("round %d: %s of %s differs"):format(round, name, one.name))
        end
      end
      beside:release()
    end)

    it("of 65537 batches of 2 heads", function()
      cases.check({dtype = "bf16", queries = 2, keys = 3, batch = 65537, heads = 2, key_heads = 1, width = 8,
        bias = "b1ls"}, engines)
    end)

    it("where L S exceeds 2^32, by a plan", function()
      local length, rows, keys = 65537, 90, 400
      for _, dtype in ipairs {"bf16", "f32"} do
        local function operand(seed)
          return sa.randn({1, 1, length, 64}, {seed = seed, dtype = dtype, device = "cuda"})
        end
        local q, k, v, dout = operand(1), operand(2), operand(3), operand(4)
        local run = sa.forward(q, k, v, {mask = sa.mask.window(300, 5)})
        local g = run:backward(dout)
        -- The last rows, whose pairs lie beyond 2^32, by the definition.
        local function last(t, n)
          return t:narrow(3, length - n + 1, n):to {dtype = "f64", device = "cpu"}
        end
        local exact = sa.forward(last(q, rows), last(k, keys), last(v, keys),
          {mask = sa.mask.window(300, 5, "bottom-right"), backend = "reference"})
        local tolerance = dtype == "f32" and 1e-5 or 2e-2
        assert.tensor.near(last(run.out, rows), exact.out, {atol = tolerance})
        assert.tensor.near(last(g.dq, rows), exact:backward(last(dout, rows)).dq, {atol = tolerance})
        assert.equal(0, run.out:stats().nan + g.dk:stats().nan + g.dv:stats().nan)
        if dtype == "bf16" then
          -- The same mask as 4 GiB of bools on the device.
          local place = sa.arange(length, {device = "cuda"})
          local apart = place:view(1, length) - place:view(length, 1)
          local visible = sa.where(apart:le(5), apart:ge(-300), sa.full({}, false, {device = "cuda"}))
          apart:free()
          assert.tensor.bitwise(sa.forward(q, k, v, {mask = visible}).out, run.out)
        end
      end
    end)
  end
end)
