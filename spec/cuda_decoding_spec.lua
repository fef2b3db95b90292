-- few queries against many keys on a CUDA device: keys are split over warps and blocks, which come to the definition's
-- results, the same bits every time, and let nothing through from behind a mask

local child = require "spec.child"
local helper = require "spec.helper"
local sa = require "safeattn"
local m = sa.mask

local quick = os.getenv "SAFEATTN_QUICK"

-- Batch, heads, key heads, queries, keys: whole tiles and tails; an item a block, many blocks an item, blocks and warps
-- that end one item and begin the next, more items than blocks, items whose keys their blocks cannot share out equally;
-- up to 64 rows that share a key head, and more.
local sizes = {
  {1, 4, 1, 1, 2000}, {2, 8, 2, 1, 3000}, {3, 8, 8, 1, 333}, {2, 8, 2, 2, 1100}, {1, 8, 1, 5, 1280}, {3, 16, 4, 2, 129},
  {1, 33, 1, 1, 1500}, {30, 8, 8, 1, 1100}, {1, 2, 1, 1, 17}, {2, 6, 2, 7, 1030}, {1, 8, 2, 16, 1500},
  {1, 8, 2, 17, 1100}, {1, 16, 4, 1, 8200},
}
if quick then sizes = {sizes[2], sizes[5], sizes[6], {5, 4, 4, 1, 150}, {3, 2, 1, 9, 1025}} end

local shapes = {{"bf16", 128, 128}, {"f16", 64, 64}, {"bf16", 40, 104}, {"f16", 256, 200}, {"bf16", 20, 20},
  {"f32", 64, 64}, {"f64", 40, 40}}
if quick then shapes = {shapes[1], shapes[3], shapes[4]} end

local function inputs(shape, size)
  local batch, heads, key_heads, queries, keys = unpack(size)
  local function random(head_count, length, width, seed)
    return sa.randn({batch, head_count, length, width}, {seed = seed, dtype = shape[1], device = "cuda"})
  end
  return random(heads, queries, shape[2], 1), random(key_heads, keys, shape[2], 2), random(key_heads, keys, shape[3], 3)
end

-- Of every batch another number of keys, from none to all.
local function lengths(size)
  local all = {}
  for b = 1, size[1] do all[b] = math.floor(size[5] * (b - 1) / math.max(1, size[1] - 1)) end
  if size[1] == 1 then all[1] = math.floor(size[5] / 2) end
  return all
end

local options = {
  {},
  {causal = "bottom-right"},
  {causal = "bottom-right", window = {100, 0}},
  function(size) return {mask = m.padding(lengths(size))} end,
  function(size) return {mask = m.dense(sa.rand({1, 1, size[4], size[5]}, {seed = 9}):lt(0.4))} end,
  function(size)
    -- Not alike for all heads.
    return {mask = m.dense(sa.rand({size[1], size[2], size[4], size[5]}, {seed = 10}):lt(0.1))}
  end,
  {mask = m.none()},
  function(size, dtype)
    return {sinks = sa.randn({size[2]}, {seed = 5, dtype = dtype == "f64" and dtype or "f32", device = "cuda"})}
  end,
  {scale = 8},
}

local function given(make, size, dtype)
  if type(make) == "function" then return make(size, dtype) end
  local own = {}
  for name, value in pairs(make) do own[name] = value end
  return own
end

helper.describe_cuda("decoding on a CUDA device", function()
  for _, shape in ipairs(shapes) do
    describe(("in %s, widths %d and %d"):format(unpack(shape)), function()
      -- Scores beyond 100, by the scale of 8, leave f32 no more.
      local room = shape[1] == "f32" and 1e-4 or shape[1] == "f64" and 1e-12 or 2e-2
      local function near(a, b) assert.is_true(sa.allclose(a, b, {atol = room, rtol = room, equal_nan = true})) end

      it("is what the definition gives, with the same bits twice", function()
        for _, size in ipairs(sizes) do
          local q, k, v = inputs(shape, size)
          for _, make in ipairs(options) do
            local own = given(make, size, shape[1])
            local run, again = sa.forward(q, k, v, own), sa.forward(q, k, v, own)
            assert.tensor.bitwise(run.out, again.out)
            assert.tensor.bitwise(run.lse, again.lse)
            own.backend = "reference"
            local exact = sa.forward(q, k, v, own)
            near(run.out, exact.out)
            near(run.lse, exact.lse)
          end
        end
      end)

      it("lets nothing through from behind a mask, to the bit", function()
        for _, size in ipairs(sizes) do
          local q, k, v = inputs(shape, size)
          local own = {mask = m.padding(lengths(size))}
          local clean = sa.forward(q, k, v, own)
          for b, length in ipairs(lengths(size)) do
            if length < size[5] then
              k:narrow(1, b, 1):narrow(3, length + 1, size[5] - length):fill(0 / 0)
              v:narrow(1, b, 1):narrow(3, length + 1, size[5] - length):fill(1 / 0)
            end
          end
          local poisoned = sa.forward(q, k, v, own)
          assert.tensor.bitwise(clean.out, poisoned.out)
          assert.tensor.bitwise(clean.lse, poisoned.lse)
        end
      end)

      it("gives a visible NaN of V to the rows that see it", function()
        for _, size in ipairs(sizes) do
          local q, k, v = inputs(shape, size)
          local own = {mask = m.dense(sa.rand({size[1], 1, size[4], size[5]}, {seed = 11}):lt(0.5))}
          v:narrow(3, math.floor(size[5] / 2), 1):narrow(4, 7, 1):fill(0 / 0)
          local out = sa.forward(q, k, v, own).out
          own.backend = "reference"
          near(out, sa.forward(q, k, v, own).out)
        end
      end)
    end)
  end

  -- The emulator has four multiprocessors, unless told.
  it("adds the parts of many blocks", function()
    child.must_run([[
      local sa = require "safeattn"
      for _, width in ipairs {64, 128, 256} do
        local function random(heads, length, seed)
          return sa.randn({1, heads, length, width}, {seed = seed, dtype = "bf16", device = "cuda"})
        end
        local q, k, v = random(2, 1, 1), random(1, 2600, 2), random(1, 2600, 3)
        local run, exact = sa.forward(q, k, v), sa.forward(q, k, v, {backend = "reference"})
        assert(sa.allclose(run.out, exact.out, {atol = 2e-2, rtol = 2e-2}), "out at width " .. width)
        assert(sa.allclose(run.lse, exact.lse, {atol = 2e-2, rtol = 2e-2}), "lse at width " .. width)
      end
    ]], {environment = {SAFEATTN_EMULATED_PROCESSORS = 20}})
  end)

  it("on two streams at once gives the bits of one", function()
    local q, k, v = inputs(shapes[1], {1, 8, 2, 1, 3000})
    local wanted = sa.forward(q, k, v)
    sa.synchronize()
    local streams, outs = {sa.cuda.stream(), sa.cuda.stream()}, {}
    for n = 1, quick and 2 or 100 do
      streams[n % 2 + 1]:use(function() outs[n] = sa.forward(q, k, v).out end)
    end
    for _, stream in ipairs(streams) do stream:synchronize() end
    for _, out in ipairs(outs) do assert.tensor.bitwise(wanted.out, out) end
    for _, stream in ipairs(streams) do stream:release() end
  end)
end)
