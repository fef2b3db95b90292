-- random numbers: the published Philox stream, the same on every layout, size, back end and thread count

local helper = require "spec.helper"
local bit = require "bit"
local ffi = require "ffi"
local core = require "safeattn.core"
local sa = helper.sa

local uint64 = ffi.typeof("uint64_t")

-- Philox4x32-10 a second time, written from the paper: the words 4 * block .. 4 * block + 3 of a seed.
local function philox(seed, block)
  local low = 0xffffffffULL
  seed, block = uint64(seed), uint64(block)
  local x = {bit.band(block, low), bit.rshift(block, 32), 0ULL, 0ULL}
  local key = {bit.band(seed, low), bit.rshift(seed, 32)}
  for _ = 1, 10 do
    local p, q = x[1] * 0xD2511F53ULL, x[3] * 0xCD9E8D57ULL
    x = {
      bit.bxor(bit.rshift(q, 32), x[2], key[1]), bit.band(q, low),
      bit.bxor(bit.rshift(p, 32), x[4], key[2]), bit.band(p, low),
    }
    key = {bit.band(key[1] + 0x9E3779B9ULL, low), bit.band(key[2] + 0xBB67AE85ULL, low)}
  end
  return {tonumber(x[1]), tonumber(x[2]), tonumber(x[3]), tonumber(x[4])}
end

-- Word `index`, counted from 0, of a seed's stream.
local function word(seed, index)
  return philox(seed, math.floor(index / 4))[index % 4 + 1]
end

local seeds = {0, 1, 42, 2 ^ 53, 0xffffffffffffffffULL, 0x123456789abcdef0ULL}

-- The known answer of the authors' own test vectors, for counter 0 and key 0.
local known = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}

describe("the stream", function()
  it("starts, for seed 0, with the known answer of Philox4x32-10", function()
    assert.same(known, philox(0, 0))
    local drawn = sa.rand({4}, {seed = 0}):totable()
    for i = 1, 4 do assert.equal(math.floor(known[i] / 256) * 2 ^ -24, drawn[i]) end
  end)

  it("is the upper 24 bits of word i for element i of f32, for any seed of 64 bits", function()
    for _, seed in ipairs(seeds) do
      local wanted = {}
      for i = 0, 1099 do wanted[i + 1] = math.floor(word(seed, i) / 256) * 2 ^ -24 end
      assert.same(wanted, sa.rand({1100}, {seed = seed}):totable())
    end
  end)

  it("is 53 bits of words 2i and 2i+1 for element i of f64", function()
    for _, seed in ipairs(seeds) do
      local wanted = {}
      for i = 0, 699 do
        local high, low = math.floor(word(seed, 2 * i) / 32), math.floor(word(seed, 2 * i + 1) / 64)
        wanted[i + 1] = (high * 2 ^ 26 + low) * 2 ^ -53
      end
      assert.same(wanted, sa.rand({700}, {seed = seed, dtype = "f64"}):totable())
    end
  end)

  it("is rounded for f16 and bf16, and never up to 1", function()
    for dtype, most in pairs {f16 = 1 - 2 ^ -11, bf16 = 1 - 2 ^ -8} do
      local drawn = sa.rand({2 ^ 16}, {seed = 5, dtype = dtype})
      local rounded = sa.rand({2 ^ 16}, {seed = 5}):to(dtype)
      assert.equal(most, drawn:stats().max)
      assert.equal(1, rounded:stats().max) -- so the limit was put to the test
      local limited = rounded:totable()
      for i, value in ipairs(limited) do limited[i] = math.min(value, most) end
      assert.same(limited, drawn:totable())
    end
  end)

  it("makes normal numbers by Box and Muller's rule, in every dtype from the same words", function()
    for _, seed in ipairs(seeds) do
      local drawn = sa.randn({600}, {seed = seed, dtype = "f64"})
      local wanted = {}
      for i = 0, 599 do
        local a, b = word(seed, i - i % 2), word(seed, i - i % 2 + 1)
        local radius, angle = math.sqrt(-2 * math.log((a + 1) * 2 ^ -32)), 2 * math.pi * b * 2 ^ -32
        wanted[i + 1] = radius * (i % 2 == 0 and math.cos(angle) or math.sin(angle))
      end
      -- an angle of up to 2 pi has an error of up to 4.5e-16, which the absolute part allows for
      assert.tensor.near(drawn, sa.tensor(wanted, {dtype = "f64"}), {atol = 4e-15, rtol = 1e-15})
      for _, dtype in ipairs {"f32", "f16", "bf16"} do
        assert.tensor.bitwise(sa.randn({600}, {seed = seed, dtype = dtype}), drawn:to(dtype))
      end
    end
  end)
end)

describe("a draw", function()
  it("depends on seed and index alone: a longer tensor begins like a shorter one", function()
    for _, draw in ipairs {sa.rand, sa.randn} do
      for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
        local long = draw({3001}, {seed = 9, dtype = dtype})
        for _, n in ipairs {0, 1, 2, 3, 5, 255, 256, 257, 511, 512, 513, 1025} do
          assert.tensor.bitwise(draw({n}, {seed = 9, dtype = dtype}), long:narrow(1, 1, n):contiguous())
        end
      end
    end
  end)

  it("fills a view in the view's row-major order and touches nothing beside it", function()
    for _, name in ipairs {"sa_rand", "sa_randn"} do
      for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
        local wanted = sa[name:sub(4)]({37, 5, 29}, {seed = 11, dtype = dtype})
        local block = sa.full({31, 7, 40}, -9, {dtype = dtype})
        local view = block:narrow(1, 2, 29):narrow(2, 2, 5):narrow(3, 3, 37):permute(3, 2, 1)
        assert.equal(0, core.lib[name](view.handle, 11))
        assert.tensor.bitwise(view:contiguous(), wanted)
        view:fill(-9)
        assert.tensor.bitwise(block, sa.full({31, 7, 40}, -9, {dtype = dtype}))
      end
    end
  end)

  it("is the same on any number of threads and every ISA", function()
    local wanted = sa.randn({100, 100}, {seed = 3})
    for _, threads in ipairs {1, 2, 3} do
      helper.with_threads(threads, function() assert.tensor.bitwise(sa.randn({100, 100}, {seed = 3}), wanted) end)
    end
    helper.each_isa(function() assert.tensor.bitwise(sa.randn({100, 100}, {seed = 3}), wanted) end)
  end)

  it("has the moments of its distribution", function()
    for _, dtype in ipairs {"f32", "f64"} do
      local n = 2 ^ 18
      local uniform, normal = sa.rand({n}, {seed = 1, dtype = dtype}), sa.randn({n}, {seed = 2, dtype = dtype})
      -- six standard errors
      assert.near(0.5, uniform:stats().mean, 6 * math.sqrt(1 / 12 / n))
      assert.near(0, normal:stats().mean, 6 / math.sqrt(n))
      assert.near(1, normal:stats().norm ^ 2 / n, 6 * math.sqrt(2 / n))
      local fourth = (normal * normal * normal * normal):mean():item()
      assert.near(3, fourth, 6 * math.sqrt(96 / n))
      -- neighbours, which share their words, do not go together
      local even, odd = normal:view(n / 2, 2):select(2, 1), normal:view(n / 2, 2):select(2, 2)
      assert.near(0, (even * odd):mean():item(), 6 / math.sqrt(n / 2))
    end
  end)

  it("refuses integers and bools", function()
    for _, dtype in ipairs {"i32", "i64", "bool"} do
      for _, name in ipairs {"rand", "randn"} do
        local message = helper.message_of(sa[name], {2}, {dtype = dtype})
        assert.equal("safeattn." .. name .. ": dtype: got " .. dtype .. ", wanted f32, f64, f16 or bf16", message)
        local t = sa.zeros({2}, {dtype = dtype})
        assert.equal(tonumber(core.lib.SA_INVALID), core.lib["sa_" .. name](t.handle, 1))
        assert.equal("sa_" .. name .. ": t: got " .. dtype .. ", wanted f32, f64, f16 or bf16",
          ffi.string(core.lib.sa_last_error()))
      end
    end
  end)
end)

describe("sa.seed", function()
  it("restarts the sequence of draws without a seed, of which no two are equal", function()
    local before = sa.seed()
    sa.seed(77)
    local a, b = sa.rand({50}), sa.rand({50})
    sa.seed(77)
    assert.tensor.bitwise(sa.rand({50}), a)
    assert.tensor.bitwise(sa.rand({50}), b)
    assert.is_false(sa.equal(a, b))
    sa.seed(before)
  end)
end)

describe("dropout", function()
  -- Equal scores and v the identity: out[b,h,i,j] is 1/S divided by what is kept on average, or 0.
  it("drops weight i of [B,H,L,S] when word i is below probability * 2^32, on every back end", function()
    for _, sizes in ipairs {{2, 3, 5, 16}, {1, 2, 7, 13}, {1, 1, 150, 140}} do
      local B, H, L, S = unpack(sizes)
      local q, k = sa.zeros({B, H, L, 4}), sa.zeros({B, H, S, 4})
      local v = sa.zeros({S, S})
      for j = 1, S do v:set(j, j, 1) end
      v = v:view(1, 1, S, S):expand(B, H, S, S)
      for _, probability in ipairs {0.1, 0.5, 0.9} do
        local wanted = sa.zeros({B * H * L * S}, {device = "cpu"})
        local array = wanted:data()
        for i = 0, B * H * L * S - 1 do
          if word(13, i) >= probability * 2 ^ 32 then array[i] = 1 / S / (1 - probability) end
        end
        for _, backend in ipairs {"reference", "fused"} do
          local run = sa.forward(q, k, v, {dropout = probability, seed = 13, backend = backend})
          assert.equal(backend, run.backend)
          assert.tensor.near(run.out, wanted:view(B, H, L, S), {rtol = 1e-6})
        end
      end
    end
  end)
end)
