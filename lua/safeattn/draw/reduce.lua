--- makes a picture, a grid of cells, of a matrix or of a mask; larger ones are reduced so that nothing odd disappears

local core = require "safeattn.core"

local ffi, lib = core.ffi, core.lib

local M = {}

-- What a cell holds, in rising order: of a tile of elements the cell gets the highest, so that one NaN among a million
-- numbers shows, and one number among masked pairs.
local MASKED, ZERO, NUMBER, NEGINF, POSINF, NAN = 0, 1, 2, 3, 4, 5
M.MASKED, M.ZERO, M.NUMBER, M.NEGINF, M.POSINF, M.NAN = MASKED, ZERO, NUMBER, NEGINF, POSINF, NAN
--- Their names, by number.
M.kinds = {[MASKED] = "masked", [ZERO] = "zero", [NUMBER] = "number", [NEGINF] = "neginf", [POSINF] = "posinf",
  [NAN] = "nan"}

local doubles, bytes = ffi.typeof "double[?]", ffi.typeof "uint8_t[?]"
local indices, wide_indices = ffi.typeof "int32_t[?]", ffi.typeof "int64_t[?]"

--- The first element (from 0) of a cell (from 0), when `size` elements are cut into `cells`.
local function first_of(cell, cells, size)
  return math.floor(cell * size / cells)
end
M.first_of = first_of

-- The cell of each element.
local function cells_of(cells, size)
  local cell = indices(math.max(size, 1))
  for c = 0, cells - 1 do
    for n = first_of(c, cells, size), first_of(c + 1, cells, size) - 1 do cell[n] = c end
  end
  return cell
end

local function new_picture(rows, columns, queries, keys)
  local cells = math.max(rows * columns, 1)
  return {rows = rows, columns = columns, queries = queries, keys = keys, value = doubles(cells), kind = bytes(cells),
    dead_rows = bytes(math.max(rows, 1)), dead_keys = bytes(math.max(columns, 1)), present = {}}
end

local INF = math.huge

local function kind_of(x)
  if x ~= x then return NAN end
  if x == 0 then return ZERO end
  if x == INF then return POSINF end
  if x == -INF then return NEGINF end
  return NUMBER
end

-- One row of the matrix into its row of cells. `visible` may be nil.
local function add_row(value, kind, cell, element, visible, keys)
  for j = 0, keys - 1 do
    if not visible or visible[j] then
      local x, c = element[j], cell[j]
      local found = kind_of(x)
      if found > kind[c] then
        kind[c], value[c] = found, x
      elseif found == NUMBER and kind[c] == NUMBER and math.abs(x) > math.abs(value[c]) then
        value[c] = x
      end
    end
  end
end

-- The kinds that occur, and the range of the numbers.
local function measure(picture)
  local low, high = INF, -INF
  for c = 0, picture.rows * picture.columns - 1 do
    local kind = picture.kind[c]
    picture.present[M.kinds[kind]] = true
    if kind == NUMBER then
      low, high = math.min(low, picture.value[c]), math.max(high, picture.value[c])
    end
  end
  if low > high then low, high = 0, 0 end
  picture.signed = low < 0
  if picture.signed then
    high = math.max(-low, high)
    low = -high
  end
  picture.low, picture.high = low, high
  return picture
end

-- Marks each cell in which an element is flagged.
local function mark(marks, flagged, cells, size)
  for c = 0, cells - 1 do
    for n = first_of(c, cells, size), first_of(c + 1, cells, size) - 1 do
      if flagged[n] then marks[c] = 1 end
    end
  end
end

local function any(marks, count)
  for n = 0, count - 1 do
    if marks[n] ~= 0 then return true end
  end
  return false
end

local function note_dead(picture)
  picture.present.dead_rows = any(picture.dead_rows, picture.rows)
  picture.present.dead_keys = any(picture.dead_keys, picture.columns)
end

-- The rows and keys of which no pair is visible.
local function mark_dead(picture, visible)
  local queries, keys = picture.queries, picture.keys
  local row_dead, key_dead = ffi.new("bool[?]", math.max(queries, 1), true), ffi.new("bool[?]", math.max(keys, 1), true)
  for i = 0, queries - 1 do
    local row = visible + i * keys
    for j = 0, keys - 1 do
      if row[j] then row_dead[i], key_dead[j] = false, false end
    end
  end
  mark(picture.dead_rows, row_dead, picture.rows, queries)
  mark(picture.dead_keys, key_dead, picture.columns, keys)
  note_dead(picture)
end

--- A picture of a matrix: each cell shows, of the elements of its tile, the highest kind, and of numbers the one of the
-- largest magnitude.
-- @param element double *, row-major [queries, keys]
-- @param visible bool *, likewise, or nil when no pair is masked
-- @param queries
-- @param keys
-- @param rows of the picture, at most queries
-- @param columns at most keys
function M.matrix(element, visible, queries, keys, rows, columns)
  local picture = new_picture(rows, columns, queries, keys)
  local cell = cells_of(columns, keys)
  for r = 0, rows - 1 do
    local value, kind = picture.value + r * columns, picture.kind + r * columns
    for i = first_of(r, rows, queries), first_of(r + 1, rows, queries) - 1 do
      add_row(value, kind, cell, element + i * keys, visible and visible + i * keys, keys)
    end
  end
  if visible then mark_dead(picture, visible) end
  picture.shows = "the value of largest magnitude"
  return measure(picture)
end

local function flags_of(fname, reader, plan)
  local flags = ffi.gc(ffi.new "sa_tensor", lib.sa_tensor_release)
  core.call(fname, reader, plan, flags)
  return flags
end

--- A picture of one plane of a compiled mask: each cell shows the fraction of its pairs that are visible.
-- @param fname for messages
-- @param plan
-- @param b batch, from 0
-- @param h head, from 0
-- @param rows of the picture, at most queries
-- @param columns at most keys
function M.plan(fname, plan, b, h, rows, columns)
  local counts = ffi.new "sa_plan_counts"
  lib.sa_plan_count(plan, counts)
  local queries, keys = tonumber(counts.queries), tonumber(counts.keys)
  local picture = new_picture(rows, columns, queries, keys)
  local visible = wide_indices(math.max(rows * columns, 1))
  if rows * columns > 0 then core.call(fname, lib.sa_plan_coverage, plan, b, h, rows, columns, visible) end
  for r = 0, rows - 1 do
    local height = first_of(r + 1, rows, queries) - first_of(r, rows, queries)
    for c = 0, columns - 1 do
      local pairs_seen = tonumber(visible[r * columns + c])
      local width = first_of(c + 1, columns, keys) - first_of(c, columns, keys)
      picture.value[r * columns + c] = pairs_seen / (height * width)
      picture.kind[r * columns + c] = pairs_seen > 0 and NUMBER or MASKED
    end
  end
  local plane = (counts.batch == 1 and 0 or b) * tonumber(counts.heads) + (counts.heads == 1 and 0 or h)
  local dead_rows = flags_of(fname, lib.sa_plan_dead_rows, plan)
  local dead_keys = flags_of(fname, lib.sa_plan_dead_keys, plan)
  mark(picture.dead_rows, ffi.cast("bool *", dead_rows.data) + plane * queries, rows, queries)
  mark(picture.dead_keys, ffi.cast("bool *", dead_keys.data) + plane * keys, columns, keys)
  lib.sa_tensor_release(dead_rows) lib.sa_tensor_release(dead_keys)
  note_dead(picture)
  measure(picture)
  picture.low, picture.high = 0, 1
  picture.shows = "the fraction of visible pairs"
  return picture
end

return M
