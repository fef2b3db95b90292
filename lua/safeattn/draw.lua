--- Pictures of masks, tensors and attention, in the terminal and in PNG files.
-- The methods `mask:show`, `tensor:heat` and `look:heat` end here.
--
-- Options that all of them have:
--
-- * `width`, `height`: of the text, in characters and lines; default: what the terminal has
-- * `colours`: "true" (24 bits), "256" or "none"; default: what the terminal shows
-- * `map`: "sequential", "diverging" (default for signed values, symmetric about 0) or "grey"
-- * `title`: the first line of the text
-- * `to`: "string" gives the text back instead of printing it
-- * `file`: the name of a PNG file to write instead; needs libpng
-- * `size`: of the file in pixels: {width, height}, or a width; default 640
--
-- What is larger than the picture is reduced by tiles: a cell is NaN when any of its elements is, else infinite when
-- any is, else the number of the largest magnitude, else an exact zero, and masked only when all its pairs are. Rows
-- without a visible key are marked at the right, keys that nothing sees below.
-- @module safeattn.draw

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local contents = require "safeattn.contents"
local reduce = require "safeattn.draw.reduce"
local terminal = require "safeattn.draw.terminal"
local colours = require "safeattn.draw.colours"

local ffi, lib = core.ffi, core.lib
local fail, describe = core.fail, core.describe

local M = {}

local common = {width = true, height = true, colours = true, map = true, title = true, to = true, file = true,
  size = true}

-- The common options and some more.
local function names(...)
  local set = {}
  for name in pairs(common) do set[name] = true end
  for _, name in ipairs {...} do set[name] = true end
  return set
end

local function text_option(fname, name, value)
  if value ~= nil and type(value) ~= "string" then
    fail(fname, "%s: got %s, wanted a string", name, describe(value))
  end
  return value
end

local depths = {["true"] = true, ["256"] = true, none = true}

local function checked(fname, options)
  text_option(fname, "title", options.title)
  if options.to ~= nil and options.to ~= "string" then
    fail(fname, 'to: got %s, wanted "string" (or nothing, to print)', describe(options.to))
  end
  if options.file ~= nil and (type(options.file) ~= "string" or options.file == "") then
    fail(fname, "file: got %s, wanted the name of a file", describe(options.file))
  end
  if options.colours ~= nil and not depths[options.colours] then
    fail(fname, "colours: got %s, wanted %s", describe(options.colours), '"true", "256" or "none"')
  end
  if options.map ~= nil then colours.map(fname, options.map) end
  local columns, lines = terminal.size()
  return {
    width = options.width == nil and columns or core.integer(fname, "width", options.width, 16, 10000),
    height = options.height == nil and lines - 2 or core.integer(fname, "height", options.height, 4, 10000),
    depth = options.colours or (options.to == nil and terminal.depth() or "none"),
  }
end

-- Makes the picture in the size that the output has room for, and puts it out.
-- @param build function(rows, columns) giving the picture
local function deliver(fname, options, title, queries, keys, build)
  local frame = checked(fname, options)
  local rows, columns, width, height, png
  if options.file then
    png = require "safeattn.draw.png"
    width, height = png.size(fname, options.size, queries, keys)
    rows, columns = png.grid(queries, keys, width, height)
  else
    rows, columns = terminal.grid(queries, keys, frame.depth, frame.width, frame.height)
  end
  if queries == 0 or keys == 0 then rows, columns = 0, 0 end
  local picture = build(rows, columns)
  picture.title = options.title or title
  local map = colours.map(fname, options.map or (picture.signed and "diverging" or "sequential"))
  if png then return png.write(options.file, picture, map, width, height) end
  local text = terminal.text(picture, map, frame.depth)
  if options.to then return text end
  io.stdout:write(text)
end

-- Tensors

-- The matrix that indices of the leading dims choose, as a view with two dims, and its text.
local function matrix_of(fname, t, indices)
  local shape = t.shape
  local rank = #shape
  if rank == 0 then fail(fname, "t: got %s, wanted a tensor with dims", describe(t)) end
  local leading = math.max(0, rank - 2)
  if #indices > leading then
    fail(fname, "indices: got %d, wanted at most %d: the last two dims of %s are drawn", #indices, leading,
      describe(t))
  end
  local text = {}
  t = t:detach()
  for d = 1, leading do
    local index = indices[d] == nil and 1 or indices[d]
    if shape[d] == 0 then fail(fname, "t: got %s, wanted a matrix in it", describe(t)) end
    core.integer(fname, "index " .. d, index, 1, shape[d])
    t = t:select(1, index)
    text[d] = tostring(index)
  end
  if rank == 1 then t = t:expand(1, shape[1]) end
  return t, leading > 0 and "[" .. table.concat(text, ",") .. ",:,:]" or ""
end

local function stats_text(s)
  local text = string.format("min %.4g  max %.4g", s.min, s.max)
  if s.nan + s.posinf + s.neginf == s.count then text = "nothing finite" end
  if s.nan > 0 then text = text .. "  #nan " .. s.nan end
  if s.posinf + s.neginf > 0 then text = text .. "  #inf " .. s.posinf + s.neginf end
  return text
end

local heat_names = names()

--- A heat map of a matrix.
-- @param t tensor of at least one dim, of any dtype, on any device
-- @param options the common ones; at [1], [2], ... the indices of the leading dims of a tensor of more than two (1
-- where none is given): `t:heat{2, 3}` draws t[2,3,:,:]
-- @return nothing; the text with to = "string"; the file's name, or nil and why, with `file`
function M.tensor(t, options)
  local fname = "heat"
  tensor.pointer(t, fname, "t")
  if options == nil then options = {} end
  local named, indices = options, {}
  if type(options) == "table" and not getmetatable(options) then
    named = {}
    for name, value in pairs(options) do
      if type(name) == "number" then indices[name] = value else named[name] = value end
    end
  end
  named = core.options(fname, named, heat_names)
  local matrix, place = matrix_of(fname, t, indices)
  local queries, keys = unpack(matrix.shape)
  local copy = contents.wide(fname, matrix)
  local title = describe(t) .. place .. "  " .. stats_text(copy:stats())
  return deliver(fname, named, title, queries, keys, function(rows, columns)
    return reduce.matrix(copy:data(), nil, queries, keys, rows, columns)
  end)
end

-- Masks

--- The options of mask:show.
M.show_names = names("B", "H", "L", "S", "b", "h")

--- A picture of which pairs a mask lets see each other, from its compiled form: the pairs are never listed.
-- @param fname for messages
-- @param mask
-- @param plan the compiled mask
-- @param options the common ones; b = 1, h = 1: the batch and the head to show
-- @return as for a tensor
function M.plan(fname, mask, plan, options)
  local counts = ffi.new "sa_plan_counts"
  lib.sa_plan_count(plan, counts)
  local queries, keys = tonumber(counts.queries), tonumber(counts.keys)
  local B, H = options.B or tonumber(counts.batch), options.H or tonumber(counts.heads)
  local b = core.integer(fname, "b", options.b == nil and 1 or options.b, 1, math.max(B, tonumber(counts.batch)))
  local h = core.integer(fname, "h", options.h == nil and 1 or options.h, 1, math.max(H, tonumber(counts.heads)))
  local all = queries * keys * tonumber(counts.batch) * tonumber(counts.heads)
  local place = (counts.batch > 1 or counts.heads > 1) and string.format("  b=%d h=%d", b, h) or ""
  local dead = tonumber(counts.dead_rows)
  local title = string.format("%s  L=%d S=%d%s  %.3g%% visible%s", tostring(mask), queries, keys, place,
    all > 0 and 100 * tonumber(counts.visible) / all or 0,
    dead > 0 and string.format("  %d dead row%s", dead, dead > 1 and "s" or "") or "")
  return deliver(fname, options, title, queries, keys, function(rows, columns)
    local picture = reduce.plan(fname, plan, b - 1, h - 1, rows, columns)
    picture.fraction = true
    return picture
  end)
end

-- Looks

-- One plane as bool[queries * keys].
local function visible_pairs(fname, plan, b, h, queries, keys)
  local count = queries * keys
  local visible, seen = ffi.new("bool[?]", math.max(1, count)), ffi.new("int64_t[?]", math.max(1, count))
  if count > 0 then core.call(fname, lib.sa_plan_coverage, plan, b - 1, h - 1, queries, keys, seen) end
  for n = 0, count - 1 do visible[n] = seen[n] ~= 0 end
  return visible
end

local look_names = names("what", "b", "h")
local drawable = {weights = true, scores = true, dscores = true}

--- A heat map of one head of an inspected attention; masked pairs are told from zeros.
-- @param look what sa.inspect gave
-- @param problem what the look is about
-- @param options the common ones; what = "weights" (default), "scores" or "dscores"; b = 1, h = 1
-- @return as for a tensor
function M.look(look, problem, options)
  local fname = "inspect():heat"
  options = core.options(fname, options, look_names)
  local what = options.what == nil and "weights" or options.what
  if not drawable[what] then
    fail(fname, "what: got %s, wanted %s", describe(what), core.alternatives(drawable))
  end
  local b = core.integer(fname, "b", options.b == nil and 1 or options.b, 1, problem.B)
  local h = core.integer(fname, "h", options.h == nil and 1 or options.h, 1, problem.H)
  local matrix = look[what](look, b, h)
  local queries, keys = problem.L, problem.S
  local visible = visible_pairs(fname, problem:plan(problem.mask).c, b, h, queries, keys)
  local title = string.format("%s  b=%d h=%d  L=%d S=%d", what, b, h, queries, keys)
  return deliver(fname, options, title, queries, keys, function(rows, columns)
    return reduce.matrix(matrix:data(), visible, queries, keys, rows, columns)
  end)
end

return M
