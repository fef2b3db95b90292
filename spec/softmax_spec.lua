-- sa.softmax: the three stances on dead rows, forward and backward, along any dim, in any float dtype

local sa = require("spec.helper").sa

local inf, nan, ln = math.huge, 0 / 0, math.log

-- Rows: plain, partly masked, dead, with a NaN, with +inf.
local function rows(dtype)
  return sa.tensor({{ln(1), ln(3)}, {-inf, 2}, {-inf, -inf}, {nan, 1}, {inf, 1}}, {dtype = dtype})
end

local dead_value = {zero = 0, ["nan"] = nan, uniform = 0.5}

describe("sa.softmax", function()
  for stance, value in pairs(dead_value) do
    for dtype, tolerance in pairs {f32 = 1e-7, f64 = 1e-15, f16 = 1e-3, bf16 = 4e-3} do
      it("gives a dead row " .. stance .. ", and others what they are, in " .. dtype, function()
        local y = sa.softmax(rows(dtype), {dead_rows = stance})
        assert.equal(dtype, y.dtype)
        assert.tensor.near(y, {{0.25, 0.75}, {0, 1}, {value, value}, {nan, nan}, {nan, nan}},
          {atol = tolerance, nonfinite = "same"})
      end)
    end

    it("gives the gradient of a dead row as " .. stance .. " has it", function()
      local x = sa.tensor({{ln(1), ln(3)}, {-inf, 2}, {-inf, -inf}}, {dtype = "f64", requires_grad = true})
      local dy = sa.tensor({{1, 3}, {nan, 5}, {1, 3}}, {dtype = "f64"})
      sa.softmax(x, {dead_rows = stance}):backward(dy)
      local of_dead = ({zero = {0, 0}, ["nan"] = {nan, nan}, uniform = {-0.5, 0.5}})[stance]
      -- 0.25 * (1 - 2.5), 0.75 * (3 - 2.5); a masked entry's gradient, even a NaN, goes nowhere
      assert.tensor.near(x.grad, {{-0.375, 0.375}, {0, 0}, of_dead}, {atol = 1e-15, nonfinite = "same"})
    end)
  end

  it("takes zero for the stance when none is given", function()
    assert.tensor.bitwise(sa.softmax(rows()), sa.softmax(rows(), {dead_rows = "zero"}))
    assert.tensor.same(sa.softmax(sa.full({2, 3}, -inf)), sa.zeros {2, 3})
  end)

  it("ignores the gradient that comes to a dead row", function()
    local x = sa.full({2, 3}, -inf)
    x.requires_grad = true
    sa.softmax(x):backward(sa.full({2, 3}, nan))
    assert.tensor.same(x.grad, sa.zeros {2, 3})
  end)

  it("runs along any dim, the last by default", function()
    local x = sa.randn({3, 4, 5}, {seed = 1})
    assert.tensor.bitwise(sa.softmax(x), sa.softmax(x, {dim = 3}))
    assert.tensor.bitwise(sa.softmax(x), sa.softmax(x, {dim = -1}))
    for dim = 1, 3 do
      local moved = sa.softmax(x:transpose(dim, 3):contiguous()):transpose(dim, 3)
      assert.tensor.near(sa.softmax(x, {dim = dim}), moved, {atol = 1e-6})
      assert.tensor.near(sa.sum(sa.softmax(x, {dim = dim - 4}), dim), sa.ones(sa.sum(x, dim).shape), {atol = 1e-6})
    end
    assert.tensor.bitwise(x:softmax(), sa.softmax(x))
  end)

  it("reads strided tensors", function()
    local x = sa.randn({6, 7}, {seed = 1})
    assert.tensor.near(sa.softmax(x:transpose(1, 2)), sa.softmax(x, {dim = 1}):transpose(1, 2), {atol = 1e-6})
    local row = sa.randn({1, 7}, {seed = 2})
    assert.tensor.near(sa.softmax(row:expand(6, 7)), sa.softmax(row):expand(6, 7), {atol = 1e-6})
  end)

  it("does not overflow", function()
    assert.tensor.near(sa.softmax(sa.tensor {1e30, 1e30, -1e30}), {0.5, 0.5, 0}, {})
    assert.tensor.near(sa.softmax(sa.tensor {-1e30, -1e30}), {0.5, 0.5}, {})
  end)

  it("matches finite differences along every dim", function()
    for dim = 1, 3 do
      local x = sa.randn({2, 3, 4}, {seed = 1, dtype = "f64", requires_grad = true})
      local weights = sa.randn({2, 3, 4}, {seed = 2, dtype = "f64"})
      local ok, report = sa.gradcheck(function(t) return sa.sum(sa.softmax(t, {dim = dim}) * weights) end, {x})
      assert.is_true(ok, tostring(report))
    end
  end)

  it("takes empty tensors", function()
    assert.same({0, 3}, sa.softmax(sa.zeros {0, 3}).shape)
    assert.same({3, 0}, sa.softmax(sa.zeros {3, 0}).shape)
  end)

  it("is what attention does to its scores", function()
    local q, k = sa.randn({1, 2, 6, 8}, {seed = 1}), sa.randn({1, 2, 9, 8}, {seed = 2})
    local visible = sa.mask.causal "bottom-right":dense {L = 6, S = 9}:to(q.device)
    local _, more = sa.sdpa(q, k, k, {mask = visible, weights = true})
    local scores = sa.matmul(q, k:transpose(3, 4)) / math.sqrt(8)
    assert.tensor.near(sa.softmax(sa.where(visible, scores, sa.full({1}, -inf))), more.weights, {atol = 1e-6})
  end)
end)
