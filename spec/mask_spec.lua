-- masks in Lua: constructors, the algebra, what prints, what can be asked

local sa = require "safeattn"
local m = sa.mask

-- The visible pairs of a mask by asking the definition, as a nested table.
local function defined(sizes, visible)
  local planes = {}
  for b = 1, sizes.B or 1 do
    planes[b] = {}
    for h = 1, sizes.H or 1 do
      planes[b][h] = {}
      for i = 1, sizes.L do
        planes[b][h][i] = {}
        for j = 1, sizes.S do planes[b][h][i][j] = visible(i, j, b, h) end
      end
    end
  end
  return planes
end

local function assert_pairs(mask, sizes, visible)
  local dense = mask:dense(sizes)
  assert.same("bool", dense.dtype)
  local shape = dense.shape
  local expected = defined({B = shape[1], H = shape[2], L = shape[3], S = shape[4]}, visible)
  assert.same({sizes.L or shape[3], sizes.S or shape[4]}, {shape[3], shape[4]})
  assert.same(expected, dense:totable())
end

-- A mask that says its pairs by a table of strings, "x" for visible.
local function drawn(...)
  local rows = {...}
  local planes = defined({L = #rows, S = #rows[1]}, function(i, j) return rows[i]:sub(j, j) == "x" end)
  return m.dense(sa.tensor(planes[1][1]))
end

describe("a mask", function()
  it("says its pairs: causal, both ways", function()
    assert_pairs(m.causal(), {L = 5, S = 3}, function(i, j) return j <= i end)
    assert_pairs(m.causal("top-left"), {L = 3, S = 5}, function(i, j) return j <= i end)
    assert_pairs(m.causal("bottom-right"), {L = 3, S = 5}, function(i, j) return j - i <= 2 end)
    assert_pairs(m.causal("bottom-right"), {L = 5, S = 3}, function(i, j) return j - i <= -2 end)
  end)

  it("says its pairs: window, unbounded where nothing is given", function()
    assert_pairs(m.window(2, 1), {L = 7, S = 6}, function(i, j) return j - i >= -2 and j - i <= 1 end)
    assert_pairs(m.window(nil, 1), {L = 7, S = 6}, function(i, j) return j - i <= 1 end)
    assert_pairs(m.window(1, nil), {L = 7, S = 6}, function(i, j) return j - i >= -1 end)
    assert_pairs(m.window(), {L = 2, S = 3}, function() return true end)
    assert_pairs(m.window(1, 0, "bottom-right"), {L = 3, S = 6}, function(i, j) return j - i >= 2 and j - i <= 3 end)
    assert_pairs(m.window(1, 0, "top-left"), {L = 3, S = 6}, function(i, j) return j - i >= -1 and j - i <= 0 end)
  end)

  it("says its pairs: padding of keys, and of queries", function()
    local k, q = {3, 0, 4}, {4, 2, 1}
    assert_pairs(m.padding(k), {L = 4, S = 4}, function(_, j, b) return j <= k[b] end)
    assert_pairs(m.padding(k, q), {L = 4, S = 4}, function(i, j, b) return j <= k[b] and i <= q[b] end)
    assert_pairs(m.padding(2), {L = 2, S = 4, B = 3}, function(_, j) return j <= 2 end)
    assert_pairs(m.padding(sa.tensor(k, {dtype = "i32"}), sa.tensor(q, {dtype = "i64"})), {L = 4, S = 4},
      function(i, j, b) return j <= k[b] and i <= q[b] end)
  end)

  it("says its pairs: documents, one row of ids or one for each batch, of queries and keys apart", function()
    local ids = {7, 7, -1, 0, 7, 0}
    local function of(q, k)
      return function(i, j) return q[i] == k[j] and q[i] >= 0 end
    end
    assert_pairs(m.documents(ids), {}, of(ids, ids))
    assert_pairs(m.documents(sa.tensor(ids, {dtype = "i32"})), {}, of(ids, ids))
    assert_pairs(m.documents(sa.tensor(ids, {dtype = "i64"})), {L = 6, S = 6}, of(ids, ids))
    local batched = {{1, 1, 2}, {3, -4, 3}}
    assert_pairs(m.documents(batched), {}, function(i, j, b) return of(batched[b], batched[b])(i, j) end)
    local keys = {0, 0, 7, 9}
    assert_pairs(m.documents(ids, keys), {}, of(ids, keys))
    local big = {2 ^ 52, 2 ^ 52 + 1, 2 ^ 52}
    assert_pairs(m.documents(big), {}, of(big, big))
  end)

  it("says its pairs: prefix and global", function()
    assert_pairs(m.prefix(2), {L = 3, S = 4}, function(_, j) return j <= 2 end)
    local n = {1, 3}
    assert_pairs(m.prefix(n), {L = 3, S = 4}, function(_, j, b) return j <= n[b] end)
    assert_pairs(m.prefix(2 ^ 53) * m.causal(), {L = 3, S = 4}, function(i, j) return j <= i end)
    assert_pairs(m.prefix {5, 1}, {L = 3, S = 4}, function(_, j, b) return b == 1 or j <= 1 end)
    assert_pairs(m.global(1), {L = 3, S = 4}, function(i, j) return i <= 1 or j <= 1 end)
    assert_pairs(m.global(0), {L = 2, S = 2}, function() return false end)
  end)

  it("says its pairs: blocks, dense, additive, all and none", function()
    local keep = sa.tensor {{true, false}, {false, true}}
    assert_pairs(m.blocks(keep, 3), {L = 5, S = 4}, function(i, j) return (i <= 3) == (j <= 3) end)
    assert_pairs(drawn("x.x", "..x"), {}, function(i, j) return j == 3 or i + j == 2 end)
    local inf = math.huge
    local bias = sa.tensor {{0, -inf, -1e30}, {-1e9, 0 / 0, inf}}
    assert_pairs(m.additive(bias), {}, function(i, j) return not (i == 1 and j == 2) end)
    assert_pairs(m.additive(bias, {at_most = -1e9}), {}, function(i, j)
      return i == 1 and j == 1 or i == 2 and j > 1
    end)
    assert_pairs(m.all(), {L = 2, S = 2}, function() return true end)
    assert_pairs(m.none(), {L = 2, S = 2}, function() return false end)
  end)

  it("keeps what a tensor said when it was read", function()
    local visible = sa.tensor {{true, false}, {false, true}}
    local mask = m.dense(visible)
    visible:fill(false)
    assert_pairs(mask, {}, function(i, j) return i == j end)
  end)

  it("broadcasts a dense tensor, whatever its strides", function()
    local visible = sa.tensor {{{{true}, {false}, {true}}}, {{{false}, {true}, {true}}}}
    assert.same({2, 1, 3, 4}, m.dense(visible):dense{H = 5, S = 4}.shape)
    local transposed = visible:select(1, 1):select(1, 1):transpose(1, 2)
    assert_pairs(m.dense(transposed), {L = 2}, function(_, j) return j ~= 2 end)
  end)

  it("draws random pairs from the seed alone, alike for all batches and heads", function()
    local sizes = {B = 2, H = 3, L = 64, S = 64}
    local first, again = m.random(0.25, 7):dense(sizes), m.random(0.25, 7):dense(sizes)
    local other = m.random(0.25, 8):dense(sizes)
    assert.same({1, 1, 64, 64}, first.shape)
    assert.is_true(sa.equal(first, again))
    assert.is_false(sa.equal(first, other))
    local density = m.random(0.25, 7):density(sizes)
    assert.is_true(density > 0.2 and density < 0.3)
    sa.seed(3)
    local drawn_first, drawn_second = m.random(0.5):dense(sizes), m.random(0.5):dense(sizes)
    sa.seed(3)
    assert.is_true(sa.equal(drawn_first, m.random(0.5):dense(sizes)))
    assert.is_false(sa.equal(drawn_first, drawn_second))
  end)
end)

describe("the algebra of masks", function()
  local a = function(i, j) return (i + j) % 2 == 0 end
  local b = function(i, j) return j <= i end

  local function mask_a()
    return drawn("x.x.", ".x.x", "x.x.", ".x.x")
  end

  it("has and, or, not, and not", function()
    local x, y, sizes = mask_a(), m.causal(), {L = 4, S = 4}
    assert_pairs(x * y, sizes, function(i, j) return a(i, j) and b(i, j) end)
    assert_pairs(x + y, sizes, function(i, j) return a(i, j) or b(i, j) end)
    assert_pairs(-x, sizes, function(i, j) return not a(i, j) end)
    assert_pairs(x - y, sizes, function(i, j) return a(i, j) and not b(i, j) end)
    assert_pairs(-(x + y) + x * -y, sizes, function(i, j) return not b(i, j) end)
  end)

  it("leaves the operands as they are", function()
    local x, y, sizes = mask_a(), m.causal(), {L = 4, S = 4}
    local _ = x * y - x
    assert_pairs(x, sizes, a)
    assert_pairs(y, sizes, b)
  end)

  it("holds the operands: they may be collected", function()
    local both = mask_a() * m.causal()
    collectgarbage()
    collectgarbage()
    assert_pairs(both, {L = 4, S = 4}, function(i, j) return a(i, j) and b(i, j) end)
  end)

  it("mixes masks of Lua functions with the others", function()
    local odd = m.fn(function(_, h, i, j) return (i + j + h) % 2 == 1 end)
    local mixed = -(odd * m.causal()) - m.none()
    assert_pairs(mixed, {H = 2, L = 3, S = 3}, function(i, j, _, h) return not ((i + j + h) % 2 == 1 and j <= i) end)
  end)

  it("prints as the expression, with brackets where they are needed", function()
    local c, d, w = m.causal(), m.documents {0, 0}, m.window(256, 0)
    local printed = {
      [d * c] = "documents * causal", [c + d] = "causal + documents", [-c] = "-causal", [c - d] = "causal - documents",
      [(c + d) * w] = "(causal + documents) * window(256, 0)", [c * d + w] = "causal * documents + window(256, 0)",
      [c * (d * w)] = "causal * documents * window(256, 0)", [c + (d + w)] = "causal + documents + window(256, 0)",
      [c - (d - w)] = "causal - (documents - window(256, 0))", [c - d - w] = "causal - documents - window(256, 0)",
      [c + (d - w)] = "causal + (documents - window(256, 0))", [-(c * d)] = "-(causal * documents)",
      [-c * d] = "-causal * documents", [-(-c)] = "-(-causal)",
    }
    for mask, text in pairs(printed) do assert.equal(text, tostring(mask)) end
  end)

  it("prints parameters while they are short", function()
    local texts = {
      "causal", 'causal("bottom-right")', "window(nil, 3)", 'window(1, nil, "bottom-right")', "padding({3, 5})",
      "padding({3, 5}, {2, 4})", "padding", "prefix(4)", "prefix({1, 2})", "global(2)", "random(0.5, 7)", "all", "none",
      "fn", "dense", "additive", "blocks",
    }
    local flags = sa.full({2, 2}, true)
    local masks = {
      m.causal(), m.causal("bottom-right"), m.window(nil, 3), m.window(1, nil, "bottom-right"), m.padding {3, 5},
      m.padding({3, 5}, {2, 4}), m.padding {1, 2, 3, 4, 5, 6}, m.prefix(4), m.prefix {1, 2}, m.global(2),
      m.random(0.5, 7), m.all(), m.none(), m.fn(function() return true end), m.dense(flags),
      m.additive(sa.zeros {2, 2}), m.blocks(flags, 4),
    }
    for k, text in ipairs(texts) do assert.equal(text, tostring(masks[k])) end
  end)
end)

describe("what a mask is asked", function()
  it("density is the fraction of visible pairs", function()
    assert.equal(10 / 16, m.causal():density {L = 4, S = 4})
    assert.equal(0.25, m.padding {1, 3}:density {L = 1, S = 8})
    assert.equal(0, m.all():density {L = 0, S = 4})
  end)

  it("dead rows and dead keys are lists of positions when all planes are alike", function()
    local mask = m.causal("bottom-right")
    assert.same({1, 2}, mask:dead_rows {L = 4, S = 2})
    assert.same({}, mask:dead_keys {L = 4, S = 2})
    assert.same({1, 2}, mask:dead_rows {B = 3, H = 2, L = 4, S = 2})
    assert.same({3, 4}, m.causal():dead_keys {L = 2, S = 4})
    assert.same({1, 2, 3}, m.none():dead_rows {L = 3, S = 1})
    assert.same({1, 2}, m.all():dead_rows {L = 2, S = 0})
  end)

  it("dead rows and dead keys name batch and head when the mask depends on them", function()
    local mask = m.padding({0, 2}, {2, 1})
    assert.same({{1, 1, 1}, {1, 1, 2}, {2, 1, 2}}, mask:dead_rows {L = 2, S = 3})
    assert.same({{1, 1, 1}, {1, 1, 2}, {1, 1, 3}, {2, 1, 3}}, mask:dead_keys {H = 4, L = 2, S = 3})
    local heads = m.fn(function(_, h, i) return h ~= i end, {batch = false})
    assert.same({{1, 1, 1}, {1, 2, 2}}, heads:dead_rows {B = 5, H = 2, L = 2, S = 1})
  end)

  it("tiles counts tiles of 128 x 128", function()
    assert.same({empty = 3, partial = 3, full = 3, visited = 6}, m.causal():tiles {L = 384, S = 384})
    assert.same({empty = 1, partial = 0, full = 0, visited = 0}, m.none():tiles {L = 128, S = 128})
    -- the tails of a ragged sequence are checked
    assert.same({empty = 0, partial = 3, full = 1, visited = 4}, m.all():tiles {L = 129, S = 129})
  end)

  it("sizes that the mask fixes may be left out", function()
    assert.same({2, 1, 3, 5}, m.padding {1, 2}:dense {L = 3, S = 5}.shape)
    assert.same({1, 1, 3, 3}, (m.documents {1, 1, 2} * m.causal()):dense().shape)
    assert.same({1, 1, 3, 2}, m.documents({1, 1, 2}, {2, 1}):dense().shape)
    assert.same({2, 3, 4, 5}, m.dense(sa.full({2, 3, 4, 5}, true)):dense().shape)
  end)
end)
