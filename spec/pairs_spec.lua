-- bf16 on processors that multiply pairs of it: whatever they lose is not lost to attention

local sa = require "safeattn"
local m = sa.mask

local function inputs(width, tiny)
  local all = {}
  for n = 1, 4 do
    all[n] = (sa.randn({2, 2, 150, width}, {seed = n, dtype = "f64"}) * (tiny and tiny[n] or 1)):to "bf16"
  end
  return unpack(all)
end

local function both(options, dout, q, k, v)
  local results = {}
  for _, backend in ipairs {"fused", "reference"} do
    local own = {backend = backend}
    for name, value in pairs(options) do own[name] = value end
    local run = sa.forward(q, k, v, own)
    local gradients = run:backward(dout)
    results[#results + 1] = {out = run.out, lse = run.lse, dq = gradients.dq, dk = gradients.dk, dv = gradients.dv}
  end
  return results[1], results[2]
end

-- Within a hundredth of the largest, or a step of bf16's subnormal numbers, whatever size that is.
local function near(got, exact)
  for name, truth in pairs(exact) do
    local wide = truth:to "f64"
    local size = wide:abs():max():item()
    assert.is_true(size > 0, name .. " is 0")
    local room = math.max(name == "lse" and 1e-5 or 1e-2, 2 ^ -133 / size)
    assert.is_true(sa.allclose(got[name]:to "f64" * (1 / size), wide * (1 / size), {atol = room, rtol = room}), name)
  end
end

describe("bf16", function()
  for _, isa in ipairs(sa.info().isas) do
    describe("on " .. isa, function()
      setup(function() assert(sa.isa(isa)) end)
      teardown(function() sa.isa "auto" end)

      it("takes any scale, forward and backward", function()
        local q, k, v, dout = inputs(64)
        for _, scale in ipairs {-0.3, 2 ^ -31, 0.05, 1, 1.5} do
          near(both({scale = scale}, dout, q, k, v))
          near(both({scale = scale, softcap = 5}, dout, q, k, v))
        end
      end)

      it("takes any width", function()
        for _, width in ipairs {1, 2, 6, 33, 34, 96} do
          local q, k, v, dout = inputs(width)
          near(both({mask = m.window(20, 3)}, dout, q, k, v))
        end
      end)

      it("takes rows that begin anywhere, as it takes their copies", function()
        local function odd(x, seed)
          local room = sa.randn({2, 2, 150, 66 + seed % 2 * 2 + 1}, {seed = seed, dtype = "bf16"})
          local view = room:narrow(4, 2, 64)
          view:copy(x)
          return view
        end
        local q, k, v, dout = inputs(64)
        for _, causal in ipairs {false, true} do
          local _, exact = both({causal = causal}, dout, q, k, v)
          near(both({causal = causal}, odd(dout, 8), odd(q, 5), odd(k, 6), odd(v, 7)), exact)
        end
      end)

      -- Products of pairs take subnormal numbers for 0; what is beside such a factor here makes up for it.
      local small, large = 2 ^ -127, 2 ^ 30
      for name, tiny in pairs {
        ["dO"] = {1, 1, 1, small}, ["V"] = {1, 1, small, 1}, ["V beside large dO"] = {1, 1, small, large},
        ["dO beside large V"] = {1, 1, large, small},
      } do
        it("keeps the gradients of a subnormal " .. name, function()
          local q, k, v, dout = inputs(64, tiny)
          near(both({}, dout, q, k, v))
          near(both({mask = m.causal()}, dout, q, k, v))
        end)
      end

      it("has gradients of 0 where dO is 0", function()
        local q, k, v, dout = inputs(64, {1, 1, 1, 0})
        local got = both({}, dout, q, k, v)
        for _, name in ipairs {"dq", "dk", "dv"} do assert.equal(0, got[name]:abs():max():item()) end
      end)

      it("keeps what a masked key has from others, whatever size it is, to the bit", function()
        local q, k, v, dout = inputs(64)
        local mask = m.padding {100, 130}
        local clean = both({mask = mask}, dout, q, k, v)
        for _, content in ipairs {2 ^ -130, 0 / 0, 1 / 0, 0, 2 ^ 127} do
          k:narrow(3, 131, 20):fill(content)
          v:narrow(3, 131, 20):fill(content)
          local again = both({mask = mask}, dout, q, k, v)
          for name, value in pairs(clean) do assert.is_true(sa.equal(value, again[name]), name) end
        end
      end)
    end)
  end
end)
