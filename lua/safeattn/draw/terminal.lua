--- pictures as text: half blocks in 24-bit or 256 colours, or characters alone where there are no colours

local core = require "safeattn.core"
local colours = require "safeattn.draw.colours"
local reduce = require "safeattn.draw.reduce"

local ffi = core.ffi

local M = {}

-- What the terminal can do

local declared = pcall(ffi.cdef, [[
int isatty(int);
int ioctl(int, unsigned long, ...);
typedef struct safeattn_window_size { uint16_t rows, columns, width, height; } safeattn_window_size;
]])

local STDOUT, TIOCGWINSZ = 1, 0x5413

local function variable(name)
  local value = os.getenv(name)
  return value ~= "" and value or nil
end

--- How many colours standard output shows: "true", "256" or "none". NO_COLOR and TERM=dumb want none, and so does what
-- is no terminal.
function M.depth()
  local term = variable "TERM"
  if variable "NO_COLOR" or term == "dumb" or not term then return "none" end
  if not declared or ffi.C.isatty(STDOUT) == 0 then return "none" end
  local claim = variable "COLORTERM"
  if claim == "truecolor" or claim == "24bit" then return "true" end
  return term:find("256color", 1, true) and "256" or "none"
end

--- Columns and lines of the terminal; 80 and 40 when there is none.
function M.size()
  if declared and jit.os == "Linux" and ffi.C.isatty(STDOUT) ~= 0 then
    local window = ffi.new "safeattn_window_size"
    if ffi.C.ioctl(STDOUT, TIOCGWINSZ, window) == 0 and window.columns > 0 and window.rows > 0 then
      return window.columns, window.rows
    end
  end
  return tonumber(variable "COLUMNS") or 80, 40
end

-- Layout

-- Lines around the cells: title, ticks, dead keys, scale, legend.
local FRAME = 6

--- How many cells of a matrix fit: rows and columns of the picture.
-- @param queries of the matrix
-- @param keys
-- @param depth a result of depth()
-- @param width of the text, in characters
-- @param height in lines
function M.grid(queries, keys, depth, width, height)
  local columns = math.max(8, width - #tostring(queries) - 3)
  local lines = math.max(4, height - FRAME)
  if depth == "none" and queries <= lines and keys <= columns then return queries, keys end
  -- A half block is about as high as it is wide, a character twice as high.
  local zoom = math.max(1, keys / columns, queries / (2 * lines))
  local rows = math.ceil(queries / zoom / (depth == "none" and 2 or 1))
  return math.min(rows, queries), math.min(math.ceil(keys / zoom), keys)
end

-- Ticks stand so many characters, and lines, apart.
local TICK, LINE_TICK = 10, 4

local function column_ticks(picture, margin)
  local parts, at = {string.rep(" ", margin)}, 0
  for c = 0, picture.columns - 1, TICK do
    local label = tostring(reduce.first_of(c, picture.columns, picture.keys) + 1)
    if c == 0 or c + #label <= picture.columns then
      parts[#parts + 1] = string.rep(" ", c - at) .. label
      at = c + #label
    end
  end
  return table.concat(parts)
end

local function row_tick(picture, line, row, margin)
  local label = line % LINE_TICK == 0 and tostring(reduce.first_of(row, picture.rows, picture.queries) + 1) or ""
  return string.rep(" ", margin - 1 - #label) .. label .. " "
end

-- Colours

-- The nearest of the 6 x 6 x 6 colours, and of the greys when the colour is one.
local function of_256(rgb)
  local r, g, b = unpack(rgb)
  if math.max(r, g, b) - math.min(r, g, b) < 10 then
    return 232 + math.max(0, math.min(23, math.floor((r - 8) / 10 + 0.5)))
  end
  local function level(x) return x < 48 and 0 or x < 115 and 1 or math.floor((x - 35) / 40) end
  return 16 + 36 * level(r) + 6 * level(g) + level(b)
end

local function sgr(depth, ground, rgb)
  if not rgb then return ground == "fore" and "39" or "49" end
  local lead = ground == "fore" and "38" or "48"
  if depth == "256" then return lead .. ";5;" .. of_256(rgb) end
  return string.format("%s;2;%d;%d;%d", lead, rgb[1], rgb[2], rgb[3])
end

--- How far up the map a value stands, 0 to 1.
local function position(picture, x)
  if picture.high == picture.low then return picture.signed and 0.5 or 1 end
  return math.max(0, math.min(1, (x - picture.low) / (picture.high - picture.low)))
end

--- The colour of a cell.
function M.colour(picture, map, cell)
  local kind = picture.kind[cell]
  if kind ~= reduce.NUMBER then return colours.special[reduce.kinds[kind]] end
  return map[1 + math.floor(position(picture, picture.value[cell]) * (colours.STEPS - 1) + 0.5)]
end

-- A line of characters, with the colours changed only where they change.
local function painter(depth)
  local parts, fore_now, back_now = {}, nil, nil
  local self = {}
  function self.put(text, fore, back)
    local f, b = sgr(depth, "fore", fore), sgr(depth, "back", back)
    local changes = {}
    if f ~= fore_now then changes[1] = f end
    if b ~= back_now then changes[#changes + 1] = b end
    if #changes > 0 then parts[#parts + 1] = "\27[" .. table.concat(changes, ";") .. "m" end
    fore_now, back_now = f, b
    parts[#parts + 1] = text
  end
  function self.line()
    local text = table.concat(parts)
    return #parts > 0 and text .. "\27[0m" or text
  end
  return self
end

local WHITE, BLACK, DIM = {255, 255, 255}, {0, 0, 0}, {96, 96, 100}

-- What stands over a colour, so that the odd kinds can be told apart without it.
local glyphs = {
  [reduce.NAN] = {"N", WHITE}, [reduce.POSINF] = {"▲", BLACK}, [reduce.NEGINF] = {"▼", BLACK},
  [reduce.MASKED] = {"·", DIM}, [reduce.ZERO] = {"0", {168, 168, 172}},
}

-- The character of two cells, one above the other; `below` is nil under the last row.
local function put_cells(paint, picture, map, above, below)
  local kind = picture.kind[above]
  local other = below and picture.kind[below] or kind
  local worst, worst_cell = kind, above
  if below and other > kind then worst, worst_cell = other, below end
  local glyph = glyphs[worst]
  if worst > reduce.NUMBER or (glyph and kind == other) then
    paint.put(glyph[1], glyph[2], M.colour(picture, map, worst_cell))
  else
    local top, bottom = M.colour(picture, map, above), below and M.colour(picture, map, below)
    if top == bottom then paint.put(" ", nil, top) else paint.put("▀", top, bottom) end
  end
end

local function coloured_rows(picture, map, depth, margin, lines)
  local columns = picture.columns
  for row = 0, picture.rows - 1, 2 do
    local paint = painter(depth)
    local dead = picture.dead_rows[row] ~= 0
    for c = 0, columns - 1 do
      local below = row + 1 < picture.rows and (row + 1) * columns + c or nil
      put_cells(paint, picture, map, row * columns + c, below)
    end
    if row + 1 < picture.rows then dead = dead or picture.dead_rows[row + 1] ~= 0 end
    if dead then paint.put("×", colours.special.dead) end
    lines[#lines + 1] = row_tick(picture, row / 2, row, margin) .. paint.line()
  end
end

-- Without colours

local marks = {[reduce.NAN] = "N", [reduce.POSINF] = "^", [reduce.NEGINF] = "v", [reduce.MASKED] = ".",
  [reduce.ZERO] = "0"}

-- Numbers are 1 to 9, in ninths of the range; negative ones a to i.
local function character(picture, cell)
  local mark = marks[picture.kind[cell]]
  if mark then return mark end
  local x = picture.value[cell]
  if picture.fraction and x == 1 then return "#" end
  local part = picture.signed and math.abs(x) / picture.high or position(picture, x)
  local level = math.max(1, math.min(9, math.ceil(9 * part)))
  return x < 0 and string.char(96 + level) or tostring(level)
end

local function plain_rows(picture, margin, lines)
  local cells = {}
  for row = 0, picture.rows - 1 do
    for c = 0, picture.columns - 1 do cells[c + 1] = character(picture, row * picture.columns + c) end
    lines[#lines + 1] = row_tick(picture, row, row, margin) .. table.concat(cells, "", 1, picture.columns)
      .. (picture.dead_rows[row] ~= 0 and "x" or "")
  end
end

-- Legend

local function dead_keys_line(picture, plain, depth, margin)
  local paint = painter(depth)
  local cells = {}
  for c = 0, picture.columns - 1 do cells[c + 1] = picture.dead_keys[c] ~= 0 and (plain and "x" or "×") or " " end
  local text = table.concat(cells):gsub(" +$", "")
  if plain then return string.rep(" ", margin) .. text end
  paint.put(text, colours.special.dead)
  return string.rep(" ", margin) .. paint.line()
end

local function number_text(x)
  return string.format("%.4g", x)
end

-- Steps of the scale, an odd number so that 0 has one of its own.
local SCALE = 25

local function scale_line(picture, map, depth, plain)
  local low, high = number_text(picture.low), number_text(picture.high)
  if plain then
    if picture.fraction then return "# all pairs visible, 1-9 a part of them" end
    local shown = picture.signed and string.format("1-9: up to %s, a-i: down to %s", high, low)
      or string.format("1-9: %s to %s", low, high)
    return picture.present.number and shown or "no numbers"
  end
  if not picture.present.number then return "no numbers" end
  local paint = painter(depth)
  for n = 0, SCALE - 1 do
    paint.put(" ", nil, map[1 + math.floor(n / (SCALE - 1) * (colours.STEPS - 1) + 0.5)])
  end
  return low .. " " .. paint.line() .. " " .. high
end

local function legend_line(picture, depth, plain)
  local parts = {}
  local function entry(mark, meaning, fore, back)
    if not plain then
      local paint = painter(depth)
      paint.put(mark, fore, back)
      mark = paint.line()
    end
    parts[#parts + 1] = mark .. " " .. meaning
  end
  for _, kind in ipairs {{reduce.MASKED, "masked"}, {reduce.ZERO, "exact zero"}, {reduce.NAN, "NaN"},
      {reduce.POSINF, "+Inf"}, {reduce.NEGINF, "-Inf"}} do
    local name = reduce.kinds[kind[1]]
    if picture.present[name] then
      local glyph = glyphs[kind[1]]
      entry(plain and marks[kind[1]] or glyph[1], kind[2], glyph[2], colours.special[name])
    end
  end
  local dead = plain and "x" or "×"
  if picture.present.dead_rows then entry(dead, "right: dead row", colours.special.dead) end
  if picture.present.dead_keys then entry(dead, "below: dead key", colours.special.dead) end
  return #parts > 0 and table.concat(parts, "  ") or nil
end

local function reduction_line(picture)
  if picture.rows == picture.queries and picture.columns == picture.keys then return nil end
  local function size(elements, cells)
    local exact = elements / cells
    return exact == math.floor(exact) and tostring(exact) or string.format("about %.1f", exact)
  end
  return string.format("each cell: %s of %s x %s", picture.shows, size(picture.queries, picture.rows),
    size(picture.keys, picture.columns))
end

--- The text of a picture, ending with a newline.
-- @param picture of `draw.reduce`, with a title
-- @param map of `draw.colours`
-- @param depth a result of depth()
function M.text(picture, map, depth)
  local plain = depth == "none"
  local margin = #tostring(picture.queries) + 1
  local lines = {picture.title}
  if picture.rows * picture.columns == 0 then
    lines[2] = "(empty)"
  else
    lines[2] = column_ticks(picture, margin)
    if plain then plain_rows(picture, margin, lines) else coloured_rows(picture, map, depth, margin, lines) end
    if picture.present.dead_keys then lines[#lines + 1] = dead_keys_line(picture, plain, depth, margin) end
    lines[#lines + 1] = scale_line(picture, map, depth, plain)
    lines[#lines + 1] = legend_line(picture, depth, plain)
    lines[#lines + 1] = reduction_line(picture)
  end
  return table.concat(lines, "\n") .. "\n"
end

return M
