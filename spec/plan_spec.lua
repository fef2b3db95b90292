-- the compiled mask: every field that kernels read, against the definition of the mask pair by pair

local sa = require "safeattn"
local core = require "safeattn.core"
local masks = require "spec.masks"

local ffi, lib = core.ffi, core.lib
local floor, max, random = math.floor, math.max, math.random
local check, compile, construct, try_plan = masks.check, masks.compile, masks.construct, masks.try_plan
local counts_of, internal_bytes, last_error = masks.counts_of, masks.internal_bytes, masks.last_error
local in_window, lengths, makers = masks.in_window, masks.lengths, masks.makers

-- The fields, as plan.h declares them. Declaring a struct twice is an error.
if not pcall(ffi.typeof, "sa_run") then
  local file = assert(io.open("src/plan.h"))
  local fields = file:read("*a"):match("\n(enum { SA_FULL.-)\nstatic inline")
  ffi.cdef(fields)
  file:close()
end

local TILE, FULL, EMPTY = tonumber(lib.SA_TILE), tonumber(lib.SA_FULL), "empty"

-- Checking a plan ----------------------------------------------------------------------------------------------------

-- What each tile of a row (or column) of tiles holds, from its list of runs: a pattern, FULL or EMPTY.
local function tiles_of(runs, start, index, tiles, patterns)
  local held = {}
  for tile = 0, tiles - 1 do held[tile] = EMPTY end
  local full, last, last_pattern = false, 0, nil
  for k = tonumber(start[index]), tonumber(start[index + 1]) - 1 do
    local first, count, pattern = runs[k].first, runs[k].count, runs[k].pattern
    if pattern == FULL and not full then full, last, last_pattern = true, 0, nil end
    assert((pattern == FULL) == full, "a partial run after a full one")
    assert(count > 0 and first >= last and first + count <= tiles, "runs overlap, are not in order or leave the row")
    assert(pattern >= FULL and pattern < patterns, "no such pattern")
    assert(not (first == last and pattern == last_pattern), "neighbours of one kind are not joined")
    for tile = first, first + count - 1 do
      assert(held[tile] == EMPTY, "a tile stands in two runs")
      held[tile] = pattern
    end
    last, last_pattern = first + count, pattern
  end
  return held
end

local bits_of_byte = {[0] = 0}
for byte = 1, 255 do bits_of_byte[byte] = bits_of_byte[floor(byte / 2)] + byte % 2 end

local function bits_of_patterns(plan)
  local bytes, sums = ffi.cast("const uint8_t *", plan.patterns), {}
  local size = ffi.sizeof "sa_pattern"
  for k = 0, tonumber(plan.pattern_count) - 1 do
    sums[k] = 0
    for n = k * size, (k + 1) * size - 1 do sums[k] = sums[k] + bits_of_byte[bytes[n]] end
  end
  return sums
end

local function is_set(words, n)
  return bit.band(bit.rshift(words[floor(n / 64)], n % 64), 1ULL) ~= 0
end

local function read(reader, plan)
  local out = ffi.gc(ffi.new "sa_tensor", lib.sa_tensor_release)
  check(lib["sa_plan_" .. reader](plan, out))
  return ffi.cast("const bool *", out.data), out
end

-- Pairs of one plane that the definition shows, per tile, row and column.
local function pairs_of(L, S, visible, b, h)
  local tiles, rows, columns = {}, {}, {}
  for i = 0, L - 1 do
    for j = 0, S - 1 do
      if visible(b, h, i, j) then
        local tile = floor(i / TILE) * 2 ^ 20 + floor(j / TILE)
        tiles[tile] = (tiles[tile] or 0) + 1
        rows[i], columns[j] = true, true
      end
    end
  end
  return tiles, rows, columns
end

local function check_dense(dense, plane, L, S, visible, b, h)
  for i = 0, L - 1 do
    for j = 0, S - 1 do
      if dense[(plane * L + i) * S + j] ~= visible(b, h, i, j) then
        error(string.format("batch %d, head %d, query %d, key %d: the plan says %s", b, h, i, j,
          tostring(not visible(b, h, i, j))))
      end
    end
  end
end

local function check_dead(words, shown, plane, positions, alive)
  local dead = 0
  words = words + plane * math.ceil(positions / 64)
  for n = 0, positions - 1 do
    assert(is_set(words, n) == not alive[n] and shown[plane * positions + n] == not alive[n], "a wrong dead bit")
    dead = dead + (alive[n] and 0 or 1)
  end
  for n = positions, math.ceil(positions / 64) * 64 - 1 do assert(not is_set(words, n), "a dead bit beyond the end") end
  return dead
end

-- Raises unless every field of the plan is what the definition visible(b, h, i, j) says.
local function check_plan(plan, sizes, visible)
  local B, H, L, S = unpack(sizes)
  local found, sum = counts_of(plan), {visible = 0, empty = 0, partial = 0, full = 0, dead_rows = 0, dead_keys = 0}
  assert((found.batch == 1 or found.batch == B) and (found.heads == 1 or found.heads == H))
  assert(found.queries == L and found.keys == S)
  local row_tiles, col_tiles = math.ceil(L / TILE), math.ceil(S / TILE)
  assert(plan.row_tiles == row_tiles and plan.col_tiles == col_tiles and plan.bytes > 0)
  assert(tonumber(ffi.cast("uintptr_t", plan.patterns)) % 64 == 0)
  local dense, dense_owner = read("dense", plan)
  local dead_rows, rows_owner = read("dead_rows", plan)
  local dead_keys, keys_owner = read("dead_keys", plan)
  local bits = bits_of_patterns(plan)

  local function check_plane(plane, b, h)
    local tiles, rows, columns = pairs_of(L, S, visible, b, h)
    sum.dead_rows = sum.dead_rows + check_dead(plan.dead_rows, dead_rows, plane, L, rows)
    sum.dead_keys = sum.dead_keys + check_dead(plan.dead_keys, dead_keys, plane, S, columns)
    local by_column, in_column = {}, {}
    for column = 0, col_tiles - 1 do
      by_column[column] = tiles_of(plan.col_runs, plan.col_start, plane * col_tiles + column, row_tiles, found.patterns)
      in_column[column] = 0
    end
    for row = 0, row_tiles - 1 do
      local held = tiles_of(plan.row_runs, plan.row_start, plane * row_tiles + row, col_tiles, found.patterns)
      local in_row = 0
      for column = 0, col_tiles - 1 do
        local tile, count = held[column], tiles[row * 2 ^ 20 + column] or 0
        assert(tile == by_column[column][row], "the lists of rows and columns disagree")
        assert((tile == EMPTY) == (count == 0) and (tile == FULL) == (count == TILE * TILE), "a tile of the wrong kind")
        -- with the pairs themselves checked, this says that no bit beyond the end is set
        assert(tile == EMPTY or tile == FULL or bits[tile] == count, "a pattern with too many bits")
        local kind = tile == EMPTY and "empty" or tile == FULL and "full" or "partial"
        sum[kind] = sum[kind] + 1
        in_row, in_column[column] = in_row + count, in_column[column] + count
      end
      assert(plan.row_visible[plane * row_tiles + row] == in_row, "visible pairs of a row of tiles")
      sum.visible = sum.visible + in_row
    end
    for column = 0, col_tiles - 1 do
      assert(plan.col_visible[plane * col_tiles + column] == in_column[column], "visible pairs of a column of tiles")
    end
  end

  -- without a batch there is still the plane that would serve all of them
  for b = 0, (found.batch == 1 and max(B, 1) or B) - 1 do
    for h = 0, (found.heads == 1 and max(H, 1) or H) - 1 do
      local plane = (found.batch == 1 and 0 or b) * found.heads + (found.heads == 1 and 0 or h)
      check_dense(dense, plane, L, S, visible, b, h)
      if (b == 0 or found.batch ~= 1) and (h == 0 or found.heads ~= 1) then check_plane(plane, b, h) end
      for _ = 1, L * S > 0 and 10 or 0 do
        local i, j = random(0, L - 1), random(0, S - 1)
        assert(lib.sa_plan_visible(plan, b, h, i, j) == visible(b, h, i, j))
      end
    end
  end
  for name, value in pairs(sum) do
    if value ~= found[name] then error(string.format("%s is %d, wanted %d", name, found[name], value)) end
  end
  return dense_owner, rows_owner, keys_owner
end

local corner_sizes = {0, 1, 2, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 300}

local function some_size()
  return corner_sizes[random(#corner_sizes)]
end

-- Runs a case that a seed makes; a failure names the seed.
local function with_seed(seed, run)
  math.randomseed(seed)
  local succeeded, problem = pcall(run)
  if not succeeded then error("seed " .. seed .. ": " .. tostring(problem), 0) end
end

describe("a compiled mask", function()
  for number, name in ipairs(masks.names) do
    it("says of every pair what the definition says: " .. name, function()
      for case, size in ipairs {{300, 300}, {128, 256}, {129, 127}, {1, 257}, {257, 1}, {1, 1}, {0, 5}, {5, 0}} do
        with_seed(1000 * number + case, function()
          local L, S = unpack(size)
          local mask, visible = makers[name](2, 2, L, S)
          check_plan(compile(mask, {2, 2, L, S}), {2, 2, L, S}, visible)
        end)
      end
    end)
  end

  it("says of every pair what the definition says: expressions, causality and windows, any size", function()
    for seed = 1, 60 do
      with_seed(seed, function()
        local B, H, L = random(0, 2), random(0, 2), some_size()
        local S = random(2) == 1 and L or some_size()
        local mask, visible = masks.some(random(0, 3), B, H, L, S)
        local causal = max(0, random(-1, 2))
        local left, right = random(-200, 200), random(-200, 200)
        local window = in_window(left, causal ~= 0 and 0 or right, causal, L, S)
        if causal ~= 0 and right < 0 then right = -1 end
        local plan = compile(mask, {B, H, L, S}, causal, left, right)
        check_plan(plan, {B, H, L, S}, function(...) return window(...) and visible(...) end)
      end)
    end
  end)

  it("without a mask is all pairs, causality and window", function()
    check_plan(compile(nil, {2, 2, 130, 257}), {2, 2, 130, 257}, function() return true end)
    local plan = compile(nil, {1, 1, 130, 257}, lib.SA_BOTTOM_RIGHT, 5, 3)
    check_plan(plan, {1, 1, 130, 257}, in_window(5, 0, lib.SA_BOTTOM_RIGHT, 130, 257))
  end)

  it("has one batch and one head when it does not depend on them", function()
    local padding = construct("padding", lengths {4, 7}, nil, 2)
    local per_head = construct("bits", 1, 3, 8, 8)
    local function planes(mask)
      local counts = counts_of(compile(mask, {2, 3, 8, 8}))
      return {counts.batch, counts.heads}
    end
    assert.same({1, 1}, planes(construct("causal", lib.SA_TOP_LEFT)))
    assert.same({2, 1}, planes(padding))
    assert.same({1, 3}, planes(per_head))
    assert.same({2, 3}, planes(construct("or", padding, per_head)))
    -- repeated by a stride of 0 it is still the same for all
    local repeated = sa.full({1, 1, 8, 8}, true, {dtype = "bool"}):expand(2, 3, 8, 8)
    assert.same({1, 1}, planes(construct("dense", repeated.handle)))
  end)

  it("keeps equal tiles once, and joins neighbours to one run", function()
    local n = 128 * 9
    local plan = compile(construct("causal", lib.SA_TOP_LEFT), {1, 1, n, n})
    assert.equal(1, counts_of(plan).patterns)
    assert.equal(2 * 9 - 1, tonumber(plan.row_start[9]))
    assert.equal(2 * 9 - 1, tonumber(plan.col_start[9]))
    -- one query, many keys: the tails of all tiles are alike
    local decoding = compile(nil, {1, 1, 1, 128 * 1000})
    assert.equal(1, tonumber(decoding.row_start[1]))
    assert.equal(1, counts_of(decoding).patterns)
  end)

  it("counts beyond 2^32", function()
    local n = 2 ^ 20
    local counts = counts_of(compile(construct("causal", lib.SA_TOP_LEFT), {2 ^ 40, 2 ^ 20, n, n}))
    assert.equal(n * (n + 1) / 2, counts.visible)
    assert.same({8192, 8192 * 8191 / 2, 8192 * 8191 / 2}, {counts.partial, counts.full, counts.empty})
    assert.is_true(counts.bytes <= 2 ^ 20)
  end)

  it("is small for long sequences", function()
    local n = 131072
    local causal = construct("causal", lib.SA_TOP_LEFT)
    local ids = sa.empty({n}, {dtype = "i32"})
    local id = 0
    math.randomseed(5)
    for i = 0, n - 1 do
      if random(131) == 1 then id = id + 1 end
      ids:data()[i] = id
    end
    assert.is_true(id > 900)
    local documents = construct("documents", nil, ids.handle)
    local before = internal_bytes()
    local plan = compile(causal, {1, 1, n, n})
    assert.is_true(counts_of(plan).bytes <= 2 * 2 ^ 20)
    assert.is_true(internal_bytes() - before <= 2 * 2 ^ 20)
    before = internal_bytes()
    local both = construct("and", documents, causal)
    local both_plan = compile(both, {1, 1, n, n})
    assert.is_true(counts_of(both_plan).bytes <= 8 * 2 ^ 20)
    assert.is_true(internal_bytes() - before <= 8 * 2 ^ 20)
    local visible, start = 0, 0
    for i = 0, n - 1 do
      if ids:data()[i] ~= ids:data()[start] then start = i end
      visible = visible + i - start + 1
    end
    assert.equal(visible, counts_of(both_plan).visible)
  end)
end)

describe("a mask", function()
  it("keeps what its constructor read", function()
    local sizes, k, q = {2, 1, 4, 4}, lengths {1, 2}, lengths {3, 4}
    local function check_snapshot(mask, spoil)
      local before = compile(mask, sizes)
      local known = {read("dense", before)}
      local n = counts_of(before).batch * 16
      local flags = ffi.string(known[1], n)
      spoil()
      local after = compile(construct("and", mask, construct "all"), sizes)
      local again = {read("dense", after)}
      assert.equal(flags, ffi.string(again[1], n))
    end
    check_snapshot(construct("padding", k, q, 2), function() k[0], k[1], q[0], q[1] = 4, 4, 4, 4 end)
    local counts = lengths {1, 3}
    check_snapshot(construct("prefix", counts, 2), function() counts[0], counts[1] = 4, 4 end)
    local ids, other_ids = sa.tensor({0, 1, 1, 0}, {dtype = "i64"}), sa.tensor({1, 1, 0, 2}, {dtype = "i32"})
    check_snapshot(construct("documents", other_ids.handle, ids.handle), function()
      ids:fill(1)
      other_ids:fill(1)
    end)
    local flags = sa.tensor {{true, false, true, false}}
    check_snapshot(construct("dense", flags.handle), function() flags:fill(true) end)
    local keep = sa.tensor {{true, false}, {false, true}}
    check_snapshot(construct("blocks", keep.handle, 2), function() keep:fill(true) end)
    local bias = sa.tensor {{0, -math.huge, 1, -math.huge}}
    check_snapshot(construct("additive", bias.handle, -math.huge), function() bias:fill(0) end)
  end)

  it("is masked by additive where the value is at most the bound or -inf, and shows NaN, in every dtype", function()
    local inf = math.huge
    local values, wanted = {0, -inf, -8, -7.5, 0 / 0, inf, -8.5, 1}, {}
    for _, case in ipairs {{-8, "x..xxx.x"}, {-inf, "x.xxxxxx"}, {inf, "....x..."}} do
      for n = 1, #values do wanted[n] = case[2]:sub(n, n) == "x" end
      for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
        local bias = sa.tensor(values, {dtype = dtype})
        local plan = compile(construct("additive", bias.handle, case[1]), {1, 1, 1, 8})
        check_plan(plan, {1, 1, 1, 8}, function(_, _, _, j) return wanted[j + 1] end)
        -- every second one
        plan = compile(construct("additive", bias:view(4, 2):select(2, 2).handle, case[1]), {1, 1, 1, 4})
        check_plan(plan, {1, 1, 1, 4}, function(_, _, _, j) return wanted[2 * j + 2] end)
      end
    end
  end)

  it("takes any byte but 0 of a bool tensor for true", function()
    local flags = sa.zeros({130}, {dtype = "bool"})
    local bytes = ffi.cast("uint8_t *", flags:data())
    for n = 0, 129 do bytes[n] = n % 3 == 0 and 0 or n end
    local plan = compile(construct("dense", flags.handle), {1, 1, 2, 130})
    check_plan(plan, {1, 1, 2, 130}, function(_, _, _, j) return j % 3 ~= 0 end)
  end)

  it("may be an expression deeper than any stack, and share its parts", function()
    collectgarbage()
    collectgarbage()
    local before = internal_bytes()
    local mask = construct("causal", lib.SA_TOP_LEFT)
    for _ = 1, 20001 do mask = construct("not", mask) end
    check_plan(compile(mask, {1, 1, 3, 4}), {1, 1, 3, 4}, function(_, _, i, j) return j > i end)
    mask = construct("causal", lib.SA_TOP_LEFT)
    for k = 1, 200 do mask = construct(k % 2 == 0 and "and" or "or", mask, mask) end
    check_plan(compile(mask, {1, 1, 3, 4}), {1, 1, 3, 4}, function(_, _, i, j) return j <= i end)
    mask = nil -- luacheck: ignore
    collectgarbage()
    collectgarbage()
    assert.equal(before, internal_bytes())
  end)

  it("gives the same plan again, and lets go of those not used for long", function()
    local mask = construct("padding", lengths {3, 5}, nil, 2)
    local first = compile(mask, {2, 1, 8, 8})
    assert.equal(first, compile(mask, {2, 1, 8, 8}))
    assert.equal(first, compile(mask, {2, 7, 8, 8}))
    assert.are_not.equal(first, compile(mask, {2, 1, 8, 8}, lib.SA_TOP_LEFT))
    assert.are_not.equal(first, compile(mask, {2, 1, 8, 8}, 0, 2, 2))
    assert.are_not.equal(first, compile(mask, {2, 1, 8, 9}))
    assert.is_nil((try_plan(mask, {3, 1, 8, 8})))
    assert.equal(compile(nil, {1, 1, 8, 8}, lib.SA_TOP_LEFT), compile(nil, {4, 2, 8, 8}, lib.SA_TOP_LEFT))
    local held
    for S = 10, 500 do
      compile(mask, {2, 1, 8, S})
      compile(nil, {2, 1, 8, S})
      if S == 50 or S == 500 then
        collectgarbage()
        collectgarbage()
        held = held or internal_bytes()
      end
    end
    assert.is_true(internal_bytes() <= held + 2 ^ 16)
  end)

  it("gives plans that outlive it", function()
    local plan = compile(construct("prefix", lengths {100}, 1), {1, 1, 200, 200})
    collectgarbage()
    collectgarbage()
    check_plan(plan, {1, 1, 200, 200}, function(_, _, _, j) return j < 100 end)
  end)

  it("leaves nothing behind when memory is refused, wherever that is", function()
    local ids = sa.arange(300, {dtype = "i64"})
    local flags = sa.full({300, 300}, true, {dtype = "bool"})
    local causal = construct("causal", lib.SA_TOP_LEFT)
    local random_causal = construct("and", construct("random", 0.5, 1), causal)
    local both = construct("or", random_causal, construct("dense", flags.handle))
    local made = ffi.new "sa_mask *[1]"
    local plans = ffi.new "const sa_plan *[1]"
    for name, call in pairs {
      documents = function() return lib.sa_mask_documents(made, ids.handle, ids.handle), made end,
      dense = function() return lib.sa_mask_dense(made, flags.handle), made end,
      padding = function() return lib.sa_mask_padding(made, lengths {1, 2, 3}, nil, 3), made end,
      bits = function() return lib.sa_mask_bits(made, 1, 1, 9, 9), made end,
      ["and"] = function() return lib.sa_mask_and(made, causal, both), made end,
      plan = function() return lib.sa_mask_plan(plans, both, 1, 9, -1, 1, 1, 300, 300), plans end,
    } do
      local failures = 0
      while true do
        local before = internal_bytes()
        made[0], plans[0] = nil, nil
        lib.sa_memory_fail(failures + 1)
        local status, out = call()
        lib.sa_memory_fail(0)
        if status == 0 then
          if out == made then lib.sa_mask_release(made[0]) else lib.sa_plan_release(plans[0]) end
          break
        end
        failures = failures + 1
        assert.equal(tonumber(lib.SA_NO_MEMORY), status)
        assert.matches("^sa_mask_" .. name .. ": .*bytes", last_error())
        assert.equal(before, internal_bytes())
        assert.is_true(out[0] == nil)
      end
      assert.is_true(failures > 0)
    end
  end)
end)
