-- pictures in PNG files, read back by libpng: sizes, colours of cells and marks, and what goes wrong

local ffi = require "ffi"
local sa = require "safeattn"
local helper = require "spec.helper"
local child = require "spec.child"
local files = require "spec.files"
local colours = require "safeattn.draw.colours"
local m = sa.mask

local folder

-- The pixels of a file, as a function of (x, y) from 0 giving "r,g,b", its width and height.
local function open(path)
  require "safeattn.draw.png" -- declares the struct
  pcall(ffi.cdef, [[
int png_image_begin_read_from_file(safeattn_png_image *, const char *);
int png_image_finish_read(safeattn_png_image *, const void *, void *, int32_t, void *);
]])
  local png = ffi.load "libpng16.so.16"
  local image = ffi.new "safeattn_png_image"
  image.version = 1
  assert(png.png_image_begin_read_from_file(image, path) ~= 0, ffi.string(image.message))
  image.format = 2
  local pixels = ffi.new("uint8_t[?]", image.width * image.height * 3)
  assert(png.png_image_finish_read(image, nil, pixels, 0, nil) ~= 0, ffi.string(image.message))
  local width, height = image.width, image.height
  return function(x, y)
    local at = (y * width + x) * 3
    return pixels[at] .. "," .. pixels[at + 1] .. "," .. pixels[at + 2]
  end, width, height
end

local function colour(rgb)
  return table.concat(rgb, ",")
end

-- How many pixels have a colour.
local function count(at, width, height, rgb)
  local wanted, found = colour(rgb), 0
  for y = 0, height - 1 do
    for x = 0, width - 1 do
      if at(x, y) == wanted then found = found + 1 end
    end
  end
  return found
end

describe("a PNG file", function()
  setup(function() folder = child.command("mktemp -d"):match "%S+" end)
  teardown(function() child.command("rm -rf " .. folder) end)

  it("has the size that was asked for", function()
    local path = folder .. "/size.png"
    for _, size in ipairs {{200, 300}, {640, 160}} do
      assert.equal(path, sa.randn({7, 9}, {seed = 1}):heat{file = path, size = size})
      local _, width, height = open(path)
      assert.same(size, {width, height})
    end
    m.causal():show{L = 50, S = 50, file = path, size = 400}
    assert.equal(400, (select(2, open(path))))
  end)

  it("paints every cell by its value", function()
    local path = folder .. "/cells.png"
    local t = sa.tensor {{1, 0 / 0, 0}, {-1, math.huge, -math.huge}}
    t:heat{file = path, size = {300, 200}}
    local at, width, height = open(path)
    local map = colours.map("test", "diverging")
    -- the cells lie right of the ticks; each is (width - left - right) / 3 wide
    local left, top = 18, 22
    local cell_width, cell_height = (width - left - 16) / 3, (height - top - 48) / 2
    local function cell(i, j)
      return at(math.floor(left + (j - 0.5) * cell_width), math.floor(top + (i - 0.5) * cell_height))
    end
    assert.equal(colour(map[256]), cell(1, 1))
    assert.equal(colour(map[1]), cell(2, 1))
    assert.equal(colour(colours.special["nan"]), cell(1, 2))
    assert.equal(colour(colours.special.zero), cell(1, 3))
    assert.equal(colour(colours.special.posinf), cell(2, 2))
    assert.equal(colour(colours.special.neginf), cell(2, 3))
  end)

  it("never loses a NaN or a dead row in a reduction", function()
    local path = folder .. "/reduced.png"
    local t = sa.zeros {3000, 2000}
    t:set(1777, 1333, 0 / 0)
    t:heat{file = path, size = {300, 300}}
    local square = 10 * 10 -- of the legend
    assert.is_true(count(open(path), 300, 300, colours.special["nan"]) > square)
    local ids = {}
    for n = 1, 4000 do ids[n] = n == 2500 and -1 or 1 end
    m.documents(ids):show{file = path, size = {300, 300}}
    local at, width, height = open(path)
    assert.is_true(count(at, width, height, colours.special.dead) >= square + 2 * 2 * 4)
  end)

  it("has the colours of the map that was asked for", function()
    local path = folder .. "/grey.png"
    sa.tensor({{1, 2}, {3, 4}}):heat{file = path, map = "grey", size = 200}
    local at, width, height = open(path)
    assert.is_true(count(at, width, height, colours.map("test", "grey")[256]) > 1000)
    assert.equal(0, count(at, width, height, colours.map("test", "sequential")[256]))
  end)

  it("draws a head that was looked into", function()
    local path = folder .. "/look.png"
    local x = sa.randn({1, 2, 6, 4}, {seed = 1})
    assert.equal(path, sa.inspect(x, x, x, {causal = true}):heat{file = path, h = 2})
    local at, width, height = open(path)
    assert.is_true(count(at, width, height, colours.special.masked) > width * height / 8)
  end)

  it("replaces a file whole, or not at all", function()
    local t = sa.ones {2, 2}
    local written, problem = t:heat{file = folder .. "/no/such/folder.png"}
    assert.is_nil(written)
    assert.matches("no/such/folder.png: ", problem, 1, true)
    child.command("mkdir " .. folder .. "/one " .. folder .. "/folder.png")
    written, problem = t:heat{file = folder .. "/folder.png"}
    assert.is_nil(written)
    assert.equal(folder .. "/folder.png: Is a directory", problem)
    t:heat{file = folder .. "/one/a.png"}
    t:heat{file = folder .. "/one/a.png"}
    assert.equal("a.png\n", child.command("ls " .. folder .. "/one"))
  end)

  it("is replaced beside somebody else who replaces it", function()
    local path, loaded, replacements = folder .. "/shared.png", package.loaded["safeattn.replace"], {}
    for n = 1, 2 do -- as two Lua states, or processes, have it
      package.loaded["safeattn.replace"] = nil
      replacements[n] = require "safeattn.replace"
    end
    package.loaded["safeattn.replace"] = loaded
    assert(replacements[1](path, function(name)
      files.write(name, "first")
      assert(replacements[2](path, function(other)
        assert.not_equal(name, other)
        files.write(other, "second")
        return true
      end))
      assert.equal("first", files.read(name))
      return true
    end))
    assert.equal("first", files.read(path))
  end)

  it("says that it wants libpng where there is none", function()
    assert.equal("nil\tPNG files want libpng 1.6, which is not on this machine (Debian: libpng16-16)\n",
      child.must_run [[
local ffi = require "ffi"
local sa = require "safeattn"
local load = ffi.load
function ffi.load(name) if name:find "png" then error("not here", 0) end return load(name) end
print(sa.ones({2, 2}):heat{file = "unwritten.png"})
assert(not io.open "unwritten.png")]])
  end)

  it("says what is wrong with its arguments", function()
    local t = sa.ones {2, 2}
    local function message(size) return helper.message_of(t.heat, t, {file = folder .. "/x.png", size = size}) end
    assert.equal('safeattn.heat: size: got "large", wanted {width, height} or a width, in pixels', message "large")
    assert.equal("safeattn.heat: size: got 10, wanted an integer from 160 to 8192", message(10))
    assert.equal("safeattn.heat: size[2]: got nil, wanted an integer from 160 to 8192", message {200})
  end)
end)
