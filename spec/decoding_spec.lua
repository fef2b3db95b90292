-- few queries against many keys: heads that read one key head go through the kernel together

local sa = require "safeattn"
local m = sa.mask

-- Rows of 64 are whole vectors on every ISA, also of halves; rows of 40 are not.
local function inputs(queries, keys, dtype, width)
  local function random(heads, length, seed)
    return sa.randn({2, heads, length, width or 40}, {seed = seed, dtype = dtype})
  end
  return random(8, queries, 1), random(2, keys, 2), random(2, keys, 3), random(8, queries, 4)
end

local function near(a, b, dtype)
  local room = dtype == "f32" and 2e-5 or dtype == "f64" and 1e-12 or 2e-2
  assert.is_true(sa.allclose(a, b, {atol = room, rtol = room, equal_nan = true}))
end

-- Whether the fused kernels give the definition's out and LSE.
local function agrees(q, k, v, options, dtype)
  local results = {}
  for _, backend in ipairs {"fused", "reference"} do
    options.backend = backend
    results[backend] = sa.forward(q, k, v, options)
  end
  near(results.fused.out, results.reference.out, dtype)
  near(results.fused.lse, results.reference.lse, dtype == "f64" and dtype or "f32")
end

local cases = {
  ["no mask"] = function() return {} end,
  ["bottom-right causality"] = function() return {causal = "bottom-right"} end,
  ["padding"] = function(_, keys) return {mask = m.padding {keys, 17}} end,
  ["a window"] = function() return {causal = "bottom-right", window = {100, 0}} end,
  ["dead rows"] = function(_, keys) return {mask = m.padding {0, keys}} end,
  ["a mask for each head"] = function(queries, keys)
    return {mask = m.dense(sa.rand({1, 8, queries, keys}, {seed = 9}):lt(0.5))}
  end,
  ["sinks"] = function() return {sinks = sa.randn({8}, {seed = 5})} end,
  ["softcap"] = function() return {softcap = 5} end,
  ["a bias"] = function(queries, keys) return {bias = sa.randn({8, queries, keys}, {seed = 6})} end,
  ["weights on request"] = function() return {weights = true} end,
}

describe("decoding", function()
  for _, isa in ipairs(sa.info().isas) do
    describe("on " .. isa, function()
      setup(function() assert(sa.isa(isa)) end)
      teardown(function() sa.isa "auto" end)

      for name, make in pairs(cases) do
        it("with " .. name .. " is what the definition gives", function()
          for _, dtype in ipairs {"f32", "f64", "bf16", "f16"} do
            for _, sizes in ipairs {{1, 3000, 40}, {1, 2000, 64}, {2, 333, 64}, {5, 130, 40}, {8, 64, 40}} do
              if dtype == "f32" or sizes[1] == 1 or sizes[3] == 64 then
                local q, k, v, dout = inputs(sizes[1], sizes[2], dtype, sizes[3])
                local options = make(sizes[1], sizes[2])
                if options.sinks and dtype == "f64" then options.sinks = options.sinks:to "f64" end
                if options.bias and dtype == "f64" then options.bias = options.bias:to "f64" end
                local run = sa.forward(q, k, v, options)
                options.backend = "reference"
                local exact = sa.forward(q, k, v, options)
                near(run.out, exact.out, dtype)
                near(run.lse, exact.lse, dtype == "f64" and dtype or "f32")
                if run.weights then near(run.weights, exact.weights, dtype) end
                if dtype == "f32" then
                  local g, h = run:backward(dout), exact:backward(dout)
                  for _, gradient in ipairs {"dq", "dk", "dv"} do near(g[gradient], h[gradient], dtype) end
                end
              end
            end
          end
        end)
      end

      for _, dtype in ipairs {"f32", "f64", "bf16", "f16"} do
        it("of infinite values of V gives them to their column alone: " .. dtype, function()
          local q, k, v = inputs(2, 1000, dtype, 64)
          v:narrow(3, 150, 1):narrow(4, 7, 1):fill(1 / 0)
          v:narrow(3, 700, 1):narrow(4, 10, 1):fill(-1 / 0)
          local out = sa.forward(q, k, v).out
          local exact = sa.forward(q, k, v, {backend = "reference"}).out
          assert.are.same({2 * 8 * 2, 2 * 8 * 2, 0}, {out:stats().posinf, out:stats().neginf, out:stats().nan})
          near(out, exact, dtype)
        end)

        it("takes any scale: " .. dtype, function()
          local q, k, v = inputs(1, 500, dtype, 64)
          for _, scale in ipairs {0, -0.3, 2 ^ -40, 0.05, 1, 1.5} do agrees(q, k, v, {scale = scale}, dtype) end
        end)

        it("keeps subnormal values of Q and K that make ordinary scores: " .. dtype, function()
          local q, k, v = inputs(1, 500, dtype, 64)
          local small, large = dtype == "f16" and 2 ^ -16 or 2 ^ -127, dtype == "f16" and 1 or 2 ^ 30
          local function times(x, factor) return (x:to "f64" * factor):to(dtype) end
          for _, factors in ipairs {{small, large}, {large, small}} do
            agrees(times(q, factors[1]), times(k, factors[2]), v, {scale = 0.125 / small / large}, dtype)
          end
        end)

        it("keeps subnormal values of V: " .. dtype, function()
          local q, k, v = inputs(1, 1000, dtype, 64)
          local tiny = dtype == "f16" and 2 ^ -10 or 2 ^ -127
          v = (v:to "f64" * tiny):to(dtype)
          local function enlarged(backend)
            return sa.forward(q, k, v, {backend = backend}).out:to "f64" * (1 / tiny)
          end
          near(enlarged "fused", enlarged "reference", dtype)
        end)

        for _, width in ipairs {40, 64} do
          it(("does not let a masked key's NaN through, to the bit: %s, width %d"):format(dtype, width), function()
            local q, k, v, dout = inputs(1, 3000, dtype, width)
            local options = {mask = m.padding {2500, 17}}
            local clean = sa.forward(q, k, v, options)
            local gradients = clean:backward(dout)
            k:narrow(3, 2501, 500):fill(0 / 0)
            v:narrow(3, 2501, 500):fill(1 / 0)
            local poisoned = sa.forward(q, k, v, options)
            local again = poisoned:backward(dout)
            assert.is_true(sa.equal(clean.out, poisoned.out))
            assert.is_true(sa.equal(clean.lse, poisoned.lse))
            for _, name in ipairs {"dq", "dk", "dv"} do assert.is_true(sa.equal(gradients[name], again[name])) end
          end)

          it(("gives a visible NaN of V to the rows that see it: %s, width %d"):format(dtype, width), function()
            local q, k, v = inputs(2, 300, dtype, width)
            local mask = m.dense(sa.rand({2, 300}, {seed = 11}):lt(0.5))
            v:narrow(3, 150, 1):narrow(4, 7, 1):fill(0 / 0)
            local out = sa.forward(q, k, v, {mask = mask}).out
            local exact = sa.forward(q, k, v, {mask = mask, backend = "reference"}).out
            assert.is_true(exact:stats().nan > 0 and exact:stats().nan < 2 * 8 * 2)
            near(out, exact, dtype)
          end)
        end
      end
    end)
  end
end)
