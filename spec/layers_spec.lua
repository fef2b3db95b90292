-- layernorm, embedding, cross entropy: values in every float dtype and layout, and ids that are not there

local helper = require "spec.helper"
local sa = helper.sa

local inf, nan, log = math.huge, 0 / 0, math.log
local tolerances = {f32 = 2e-6, f64 = 1e-13, f16 = 4e-3, bf16 = 3e-2}

describe("sa.layernorm", function()
  it("gives numbers by hand", function()
    local x = sa.tensor({{1, 3}, {5, 5}}, {dtype = "f64"})
    assert.tensor.near(x:layernorm(nil, nil, {epsilon = 0}):narrow(1, 1, 1), {{-1, 1}}, {atol = 1e-15})
    assert.tensor.same(x:layernorm(sa.tensor({2, 3}, {dtype = "f64"}), sa.tensor({10, 20}, {dtype = "f64"}),
      {epsilon = 3}), {{9, 21.5}, {10, 20}})
  end)

  for dtype, tolerance in pairs(tolerances) do
    it("does not lose the variance beside a large mean, nor depend on layout, in " .. dtype, function()
      local x = sa.randn({7, 300}, {seed = 1, dtype = dtype}) + (dtype == "f32" and 1000 or 0)
      local wide = x:to "f64"
      local centred = wide - wide:mean(2, {keep = true})
      local want = centred / ((centred * centred):mean(2, {keep = true}) + 1e-5):sqrt()
      local y = x:layernorm()
      assert.tensor.near(y, want, {atol = 4 * tolerance})
      assert.tensor.bitwise(x:transpose(1, 2):contiguous():transpose(1, 2):layernorm(), y)
      local weight, bias = sa.randn({300}, {seed = 2, dtype = dtype}), sa.randn({300}, {seed = 3, dtype = dtype})
      assert.tensor.near(x:layernorm(weight, bias), want * weight:to "f64" + bias:to "f64",
        {atol = 4 * tolerance, rtol = 2 * tolerance})
    end)
  end

  it("gives the same gradients on any thread count", function()
    local function gradients()
      local x = sa.randn({3000, 80}, {seed = 1, requires_grad = true})
      local weight = sa.randn({80}, {seed = 2, requires_grad = true})
      local bias = sa.randn({80}, {seed = 3, requires_grad = true})
      x:layernorm(weight, bias):backward(sa.randn({3000, 80}, {seed = 4}))
      return {x.grad, weight.grad, bias.grad}
    end
    local many = gradients()
    helper.with_threads(1, function()
      for k, one in ipairs(gradients()) do assert.tensor.bitwise(one, many[k]) end
    end)
  end)
end)

describe("sa.embedding", function()
  for dtype in pairs(tolerances) do
    it("gathers rows and adds their gradients up, in " .. dtype, function()
      local weights = sa.tensor({{1, 2}, {3, 4}, {5, 6}}, {dtype = dtype, requires_grad = true})
      for _, ids_dtype in ipairs {"i32", "i64"} do
        local ids = sa.tensor({{3, 1}, {3, 3}}, {dtype = ids_dtype})
        local y = sa.embedding(weights, ids)
        assert.tensor.same(y, {{{5, 6}, {1, 2}}, {{5, 6}, {5, 6}}})
        weights.grad = nil
        y:backward(sa.tensor({{{1, 2}, {4, 8}}, {{16, 32}, {64, 128}}}, {dtype = dtype}))
        assert.tensor.same(weights.grad, {{4, 8}, {0, 0}, {81, 162}})
      end
    end)
  end

  it("adds up half types in f32", function()
    local weights = sa.zeros({1, 1}, {dtype = "bf16", requires_grad = true})
    sa.embedding(weights, sa.ones({1000}, {dtype = "i32"})):backward(sa.ones({1000, 1}, {dtype = "bf16"}))
    assert.equal(1000, weights.grad:item()) -- bf16 would stop at 256
  end)

  it("names the place and the value of an id that is not there", function()
    local weights = sa.zeros {4, 2}
    for id, where in pairs {[0] = "0", [5] = "5", [-7] = "-7"} do
      local ids = sa.ones({2, 3}, {dtype = "i64"})
      ids:set(2, 3, id)
      local message = helper.message_of(sa.embedding, weights, ids)
      assert.equal("safeattn.embedding: ids: got " .. where .. " at [2,3], wanted 1 .. 4", message)
    end
  end)
end)

describe("sa.cross_entropy", function()
  for dtype, tolerance in pairs(tolerances) do
    it("is -log of the softmax at the id, in " .. dtype, function()
      local x = sa.randn({2, 5, 300}, {seed = 1, dtype = dtype})
      local ids = sa.tensor({{1, 2, 300, 4, 5}, {6, 7, 8, 9, 10}}, {dtype = "i32"})
      local wide = x:to "f64"
      local sums = wide:exp():sum(3):log()
      for _, t in ipairs {x, x:transpose(1, 3):contiguous():transpose(1, 3)} do
        local losses = sa.cross_entropy(t, ids, {reduction = "none"})
        for i = 1, 2 do
          for j = 1, 5 do
            local want = sums:get(i, j) - wide:get(i, j, ids:get(i, j))
            assert.near(want, losses:get(i, j), 10 * tolerance)
          end
        end
      end
    end)

    it("gives the gradient softmax - 1 at the id, in " .. dtype, function()
      local x = sa.tensor({{log(1), log(3)}, {-inf, 2}, {nan, inf}}, {dtype = dtype, requires_grad = true})
      sa.cross_entropy(x, sa.tensor({2, 2, 0}, {dtype = "i32"}), {ignore = 0, reduction = "sum"}):backward()
      assert.tensor.near(x.grad, {{0.25, -0.25}, {0, 0}, {0, 0}}, {atol = tolerance})
    end)
  end

  it("does not overflow", function()
    local x = sa.tensor {{1e30, -1e30}, {1e4, 1e4}}
    local ids = sa.tensor({1, 2}, {dtype = "i32"})
    assert.tensor.near(sa.cross_entropy(x, ids, {reduction = "none"}), {0, log(2)}, {atol = 1e-6})
    assert.equal(inf, sa.cross_entropy(sa.tensor {{0, -inf}}, sa.tensor({2}, {dtype = "i32"})):item())
  end)

  it("names the place and the value of an id that is not there, but not of one that is ignored", function()
    local x = sa.zeros {3, 4}
    local ids = sa.tensor({1, -1, 5}, {dtype = "i64"})
    assert.equal("safeattn.cross_entropy: ids: got 5 at [3], wanted 1 .. 4",
      helper.message_of(sa.cross_entropy, x, ids, {ignore = -1}))
    assert.equal("safeattn.cross_entropy: ids: got -1 at [2], wanted 1 .. 4",
      helper.message_of(sa.cross_entropy, x, ids))
  end)
end)
