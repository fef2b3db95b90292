-- a suite to copy: what to check of a layer that masks, with busted and safeattn.assertions

local sa = require "safeattn"
require "safeattn.assertions"

-- The code under test: causal attention within documents. Query 4 belongs to no document, and nobody sees its key.
local mask = sa.mask.documents {1, 1, 2, -1, 2} * sa.mask.causal()

local function layer(q, k, v)
  return (sa.sdpa(q, k, v, {mask = mask}))
end

local function inputs(dtype)
  local list = {}
  for n = 1, 3 do list[n] = sa.randn({1, 2, 5, 4}, {seed = n, dtype = dtype}) end
  return list
end

describe("the layer", function()
  it("keeps shape and dtype", function()
    local q, k, v = unpack(inputs "bf16")
    local out = layer(q, k, v)
    assert.tensor.shape(out, {1, 2, 5, 4})
    assert.tensor.dtype(out, "bf16")
    assert.tensor.finite(out)
  end)

  it("gives 0 to a query without keys", function()
    assert.tensor.zero(layer(unpack(inputs "f32")):narrow(3, 4, 1))
  end)

  it("copies the only value that a query sees", function()
    local q, k, v = unpack(inputs "f32")
    assert.tensor.near(layer(q, k, v):narrow(3, 1, 1), v:narrow(3, 1, 1), {rtol = 1e-6})
  end)

  it("gives the same bits twice", function()
    assert.tensor.bitwise(layer(unpack(inputs "f32")), layer(unpack(inputs "f32")))
  end)

  it("has the right gradients", function()
    assert.gradients(layer, inputs "f64")
  end)

  it("lets nothing through the mask", function()
    assert.masked_safe(layer, inputs "f32", mask)
  end)
end)
