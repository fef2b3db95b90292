-- views: the same memory seen otherwise, and what is put together of parts

local helper = require "spec.helper"
local sa = helper.sa

local function counted(...)
  local n = 1
  for _, size in ipairs {...} do n = n * size end
  return sa.arange(n, {start = 1}):view(...)
end

describe("a view", function()
  it("shares its memory", function()
    local t = sa.zeros {2, 3}
    for _, view in ipairs {t:view(6), t:transpose(1, 2), t:narrow(1, 2, 1), t:select(1, 2), t:expand(4, 2, 3),
      t:permute(2, 1), t:detach()} do
      t:set(2, 1, t:get(2, 1) + 1)
      assert.equal(t:get(2, 1), view:stats().max)
    end
  end)

  it("has another shape, with one count left open", function()
    local t = counted(2, 3, 4)
    assert.same({6, 4}, t:view(-1, 4).shape)
    assert.same({3, 8}, t:view({3, -1}).shape)
    assert.equal(13, t:view(6, 4):get(4, 1))
    assert.same({}, sa.ones({1, 1}):view({}).shape)
    assert.same({0, 5}, sa.ones({0}):view(0, 5).shape)
  end)

  it("of strided memory is given where the strides allow it", function()
    local t = counted(4, 6):narrow(2, 1, 4)
    assert.same({{{1, 2}, {3, 4}}, {{7, 8}, {9, 10}}, {{13, 14}, {15, 16}}, {{19, 20}, {21, 22}}},
      t:view(4, 2, 2):totable())
    assert.matches("^safeattn%.view: ", helper.message_of(t.view, t, 16))
    assert.same({16}, t:contiguous():view(16).shape)
  end)

  it("exchanges and reorders dims, counted from either end", function()
    local t = counted(2, 3, 4)
    local u = t:transpose(1, -1)
    assert.same({4, 3, 2}, u.shape)
    assert.same({1, 4, 12}, u:stride())
    assert.equal(t:get(2, 3, 4), u:get(4, 3, 2))
    local p = t:permute(3, 1, 2)
    assert.same({4, 2, 3}, p.shape)
    assert.equal(t:get(2, 1, 4), p:get(4, 2, 1))
    assert.tensor.bitwise(p, t:permute({-1, 1, 2}))
  end)

  it("narrows a dim and selects in one", function()
    local t = counted(3, 4)
    assert.same({{2, 3}, {6, 7}, {10, 11}}, t:narrow(2, 2, 2):totable())
    assert.same({0, 4}, t:narrow(1, 4, 0).shape)
    assert.same({5, 6, 7, 8}, t:select(1, 2):totable())
    assert.same({4, 8, 12}, t:select(-1, 4):totable())
  end)

  it("repeats without memory", function()
    local t = counted(3, 1)
    local wide = t:expand(2, 3, 4)
    assert.same({0, 1, 0}, wide:stride())
    assert.equal(3, wide:get(2, 3, 4))
    assert.same({3, 4}, t:expand(-1, 4).shape)
  end)

  it("knows whether it is contiguous", function()
    local t = counted(2, 3)
    assert.is_true(t:is_contiguous())
    assert.is_false(t:transpose(1, 2):is_contiguous())
    assert.equal(t, t:contiguous())
    local copy = t:transpose(1, 2):contiguous()
    assert.is_true(copy:is_contiguous())
    assert.same({{1, 4}, {2, 5}, {3, 6}}, copy:totable())
  end)
end)

describe("a clone", function()
  it("has memory of its own, contiguous", function()
    local t = counted(2, 3)
    local copy = t:transpose(1, 2):clone()
    t:fill(0)
    assert.is_true(copy:is_contiguous())
    assert.same({{1, 4}, {2, 5}, {3, 6}}, copy:totable())
  end)
end)

describe("cat and stack", function()
  it("put tensors behind each other", function()
    local a, b = counted(2, 2), sa.full({1, 2}, 9)
    assert.same({{1, 2}, {3, 4}, {9, 9}}, sa.cat({a, b}):totable())
    assert.same({{1, 2, 1, 3}, {3, 4, 2, 4}}, sa.cat({a, a:transpose(1, 2)}, -1):totable())
    assert.same({{1, 2}, {3, 4}}, sa.cat({a, sa.zeros {0, 2}}, 1):totable())
  end)

  it("put tensors beside each other along a new dim", function()
    local a, b = sa.tensor {1, 2}, sa.tensor {3, 4}
    assert.same({{1, 2}, {3, 4}}, sa.stack({a, b}):totable())
    assert.same({{1, 3}, {2, 4}}, sa.stack({a, b}, 2):totable())
    assert.same({{1, 3}, {2, 4}}, sa.stack({a, b}, -1):totable())
    assert.same({5, 6}, sa.stack({sa.tensor(5), sa.tensor(6)}):totable())
  end)
end)
