--- pictures as PNG files, written by libpng, which is opened when the first one is

local core = require "safeattn.core"
local colours = require "safeattn.draw.colours"
local terminal = require "safeattn.draw.terminal"
local replace = require "safeattn.replace"

local ffi = core.ffi

local M = {}

-- libpng

-- The part of libpng 1.6 that takes a whole picture and raises nothing.
local declared = pcall(ffi.typeof, "safeattn_png_image") or pcall(ffi.cdef, [[
typedef struct safeattn_png_image {
  void *opaque;
  uint32_t version, width, height, format, flags, colormap_entries, warning_or_error;
  char message[64];
} safeattn_png_image;
int png_image_write_to_file(safeattn_png_image *, const char *file, int convert_to_8bit, const void *buffer,
                            int32_t row_stride, const void *colormap);
]])

local VERSION, RGB, ERROR = 1, 2, 2
local names = {"libpng16.so.16", "png16", "libpng16.16.dylib"}
local opened

local function open()
  for _, name in ipairs(names) do
    local found, lib = pcall(ffi.load, name)
    if found and declared and pcall(function() return lib.png_image_write_to_file end) then return lib end
  end
  return nil, "PNG files want libpng 1.6, which is not on this machine (Debian: libpng16-16)"
end

local function write_rgb(path, pixels, width, height)
  if not opened then
    local lib, problem = open()
    if not lib then return nil, problem end
    opened = lib
  end
  local image = ffi.new "safeattn_png_image"
  image.version, image.width, image.height, image.format = VERSION, width, height, RGB
  return replace(path, function(name)
    if opened.png_image_write_to_file(image, name, 0, pixels, 0, nil) ~= 0 then return true end
    return nil, image.warning_or_error % 4 >= ERROR and ffi.string(image.message) or "libpng could not write it"
  end)
end

-- Drawing

local PAPER, INK = {255, 255, 255}, {40, 40, 44}

local function new_canvas(width, height)
  local pixels = ffi.new("uint8_t[?]", width * height * 3)
  ffi.fill(pixels, width * height * 3, PAPER[1])
  return {pixels = pixels, width = width, height = height}
end

-- What lies outside of the canvas is not painted.
local function fill(canvas, x, y, width, height, rgb)
  local r, g, b = rgb[1], rgb[2], rgb[3]
  local x0, x1 = math.max(0, x), math.min(canvas.width, x + width) - 1
  for row = math.max(0, y), math.min(canvas.height, y + height) - 1 do
    local at = (row * canvas.width + x0) * 3
    for _ = x0, x1 do
      canvas.pixels[at], canvas.pixels[at + 1], canvas.pixels[at + 2] = r, g, b
      at = at + 3
    end
  end
end

-- The characters of ticks and legends: five rows of three pixels each, as octal digits.
local font = {
  ["0"] = "75557", ["1"] = "26227", ["2"] = "71747", ["3"] = "71717", ["4"] = "55711", ["5"] = "74717", ["6"] = "74757",
  ["7"] = "71122", ["8"] = "75757", ["9"] = "75717", ["-"] = "00700", ["+"] = "02720", ["."] = "00002",
  a = "25755", d = "65556", e = "74647", f = "74644", i = "72227", k = "55655", m = "57755", n = "65555", o = "75557",
  r = "65655", s = "34216", z = "71247",
}
-- Pixels of a point of the font, and of a character with the gap behind it.
local POINT = 2
local ADVANCE, LINE = 4 * POINT, 5 * POINT

local function text_width(text)
  return #text * ADVANCE - POINT
end

local function write(canvas, x, y, text)
  for character in text:gmatch "." do
    local row = 0
    for digit in (font[character] or "00000"):gmatch "%d" do
      for bit = 0, 2 do
        if math.floor(digit / 2 ^ (2 - bit)) % 2 == 1 then
          fill(canvas, x + bit * POINT, y + row * POINT, POINT, POINT, INK)
        end
      end
      row = row + 1
    end
    x = x + ADVANCE
  end
end

-- Layout

local GAP, MARK, BAR = 6, 4, 10

-- The margins around the cells.
local function margins(queries)
  local left = text_width(tostring(queries)) + 2 * GAP
  return {left = left, top = LINE + 2 * GAP, right = MARK + 2 * GAP, bottom = MARK + LINE + BAR + 4 * GAP}
end

--- The size of a file in which a matrix keeps its shape: width and height in pixels.
-- @param fname for messages
-- @param given {width, height}, or the width alone; nil: 640
-- @param queries of the matrix
-- @param keys
function M.size(fname, given, queries, keys)
  local least, most = 160, 8192
  if type(given) == "table" and not getmetatable(given) then
    return core.integer(fname, "size[1]", given[1], least, most), core.integer(fname, "size[2]", given[2], least, most)
  end
  if given ~= nil and type(given) ~= "number" then
    core.fail(fname, "size: got %s, wanted {width, height} or a width, in pixels", core.describe(given))
  end
  local width = given == nil and 640 or core.integer(fname, "size", given, least, most)
  local m = margins(queries)
  local shape = math.max(1 / 8, math.min(4, queries / math.max(1, keys)))
  local height = m.top + m.bottom + math.floor((width - m.left - m.right) * shape)
  return width, math.max(least, math.min(most, height))
end

--- How many cells of a matrix fit: rows and columns of the picture.
function M.grid(queries, keys, width, height)
  local m = margins(queries)
  return math.min(queries, height - m.top - m.bottom), math.min(keys, width - m.left - m.right)
end

local function paint_cells(canvas, picture, map, box)
  local columns, pixels = picture.columns, canvas.pixels
  for y = 0, box.height - 1 do
    local row = math.floor(y * picture.rows / box.height)
    local at = ((box.y + y) * canvas.width + box.x) * 3
    local last, rgb = -1, nil
    for x = 0, box.width - 1 do
      local cell = row * columns + math.floor(x * columns / box.width)
      if cell ~= last then rgb, last = terminal.colour(picture, map, cell), cell end
      pixels[at], pixels[at + 1], pixels[at + 2] = rgb[1], rgb[2], rgb[3]
      at = at + 3
    end
  end
end

-- Where a cell begins on the canvas.
local function edge(cell, cells, start, length)
  return start + math.floor(cell * length / cells)
end

local function paint_marks(canvas, picture, box)
  for r = 0, picture.rows - 1 do
    if picture.dead_rows[r] ~= 0 then
      local y = edge(r, picture.rows, box.y, box.height)
      fill(canvas, box.x + box.width + 2, y, MARK, math.max(2, edge(r + 1, picture.rows, box.y, box.height) - y),
        colours.special.dead)
    end
  end
  for c = 0, picture.columns - 1 do
    if picture.dead_keys[c] ~= 0 then
      local x = edge(c, picture.columns, box.x, box.width)
      fill(canvas, x, box.y + box.height + 2, math.max(2, edge(c + 1, picture.columns, box.x, box.width) - x), MARK,
        colours.special.dead)
    end
  end
end

-- Ticks are about so many pixels apart.
local TICK = 72

-- Elements (from 1) to label, evenly spaced and the first among them.
local function tick_places(size, length)
  local wanted = math.max(1, math.floor(length / TICK))
  local step = 1
  while size / step > wanted do
    step = step * (tostring(step):sub(1, 1) == "2" and 2.5 or 2)
  end
  local places = {1}
  for n = step, size, step do
    if n > 1 then places[#places + 1] = n end
  end
  return places
end

local function paint_ticks(canvas, picture, box)
  for _, n in ipairs(tick_places(picture.keys, box.width)) do
    local middle = box.x + math.floor((n - 0.5) * box.width / picture.keys)
    local label = tostring(n)
    write(canvas, math.max(0, middle - math.floor(text_width(label) / 2)), GAP, label)
    fill(canvas, middle, box.y - 4, 1, 3, INK)
  end
  for _, n in ipairs(tick_places(picture.queries, box.height)) do
    local middle = box.y + math.floor((n - 0.5) * box.height / picture.queries)
    local label = tostring(n)
    write(canvas, box.x - GAP - text_width(label), math.max(0, middle - math.floor(LINE / 2)), label)
    fill(canvas, box.x - 4, middle, 3, 1, INK)
  end
end

local function paint_scale(canvas, picture, map, box)
  local y = box.y + box.height + MARK + 2 * GAP
  local low, high = string.format("%.3g", picture.low), string.format("%.3g", picture.high)
  local x = box.x
  if picture.present.number then
    write(canvas, x, y, low)
    x = x + text_width(low) + GAP
    local length = math.max(20, math.min(200, canvas.width - x - text_width(high) - 2 * GAP))
    for n = 0, length - 1 do
      fill(canvas, x + n, y, 1, BAR, map[1 + math.floor(n / (length - 1) * (colours.STEPS - 1) + 0.5)])
    end
    write(canvas, x + length + GAP, y, high)
  end
  x, y = box.x, y + BAR + GAP
  for _, entry in ipairs {{"masked", "masked"}, {"zero", "zero"}, {"nan", "nan"}, {"posinf", "+inf"},
      {"neginf", "-inf"}, {"dead", "dead"}} do
    local name, label = entry[1], entry[2]
    local present = picture.present[name]
    if name == "dead" then present = picture.present.dead_rows or picture.present.dead_keys end
    if present then
      fill(canvas, x, y, BAR, BAR, colours.special[name])
      write(canvas, x + BAR + GAP, y, label)
      x = x + BAR + 2 * GAP + text_width(label) + GAP
    end
  end
end

--- Writes a picture.
-- @param path of the file; replaced in one step
-- @param picture of `draw.reduce`
-- @param map of `draw.colours`
-- @param width in pixels
-- @param height
-- @return path; or nil and why not
function M.write(path, picture, map, width, height)
  local m = margins(picture.queries)
  local canvas = new_canvas(width, height)
  local box = {x = m.left, y = m.top, width = width - m.left - m.right, height = height - m.top - m.bottom}
  if picture.rows * picture.columns > 0 then
    paint_cells(canvas, picture, map, box)
    paint_marks(canvas, picture, box)
    paint_ticks(canvas, picture, box)
  end
  paint_scale(canvas, picture, map, box)
  return write_rgb(path, canvas.pixels, width, height)
end

return M
