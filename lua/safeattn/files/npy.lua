--- NumPy's .npy: one tensor behind a header that is a Python literal

local core = require "safeattn.core"
local disk = require "safeattn.files.disk"
local layout = require "safeattn.files.layout"

local ffi, bit = core.ffi, require "bit"
local refuse = disk.refuse

local npy = {}

local MAGIC = "\147NUMPY"
local LONGEST_HEADER = 65536 -- NumPy itself reads no more than 10000 unless it is told to

local letters = {f32 = "f4", f64 = "f8", f16 = "f2", bool = "b1", i32 = "i4", i64 = "i8"}
local dtypes = {}
for dtype, letter in pairs(letters) do dtypes[letter] = dtype end

-- Writing

local function literal(t)
  local shape = t.shape
  local texts = {}
  for d, size in ipairs(shape) do texts[d] = string.format("%.0f", size) end
  return string.format("{'descr': '%s%s', 'fortran_order': False, 'shape': (%s%s), }", t.dtype == "bool" and "|" or "<",
    letters[t.dtype], table.concat(texts, ", "), #shape == 1 and "," or "")
end

--- The bytes in front of a tensor's elements. Padded so that the elements start at a multiple of 64.
function npy.header(t)
  local text = literal(t)
  local padding = -(#MAGIC + 4 + #text + 1) % 64
  local length = #text + padding + 1
  return MAGIC .. string.char(1, 0, length % 256, math.floor(length / 256)) .. text .. (" "):rep(padding) .. "\n"
end

--- Raises when .npy has no dtype for a tensor.
function npy.check(fname, argument, t)
  if letters[t.dtype] then return end
  core.fail(fname, "%s: got %s, which NumPy has no dtype for, wanted %s (.safetensors keeps bf16)", argument,
    core.describe(t), core.alternatives(letters))
end

-- Reading

-- The entries of a header, strictly: {'descr': 'x', 'fortran_order': x, 'shape': (x)} in any order.
local function parse(text)
  local entries, at = {}, text:match("^%s*{()")
  while at do
    local _, quote, key, value_at = text:match("^%s*((['\"])(%l[%l_]*)%2%s*:%s*)()", at)
    if not key then break end
    local value, next_at
    if key == "descr" then
      local mark
      mark, value, next_at = text:match("^(['\"])([^'\"]*)%1()", value_at)
      if not mark then refuse("holds records or other things that are no tensor: %s", core.describe(text)) end
    elseif key == "fortran_order" then
      value, next_at = text:match("^(%u%l+)()", value_at)
    else
      value, next_at = text:match("^%(([%d%s,L]*)%)()", value_at)
    end
    if not next_at or not quote or entries[key] then break end
    entries[key], at = value, text:match("^%s*,?()", next_at)
  end
  if not (at and text:match("^%s*}%s*$", at) and entries.descr and entries.shape
      and (entries.fortran_order == "True" or entries.fortran_order == "False")) then
    refuse("has a header that is not NumPy's: %s", core.describe(text))
  end
  return entries
end

local function parse_shape(text)
  local shape = {}
  for size in (text .. ","):gmatch("([^,]*),") do
    local digits = size:match("^%s*(%d+)L?%s*$")
    if digits then
      shape[#shape + 1] = tonumber(digits)
    elseif size:match("%S") then
      refuse("has a header with the shape (%s), wanted counts", text)
    end
  end
  return shape
end

local function byte(bytes, n)
  return tonumber(bytes[n])
end

local function read_header(source)
  local start = ffi.new("uint8_t[12]")
  if source.size < 10 then refuse("is no .npy: has %.0f bytes, wanted at least 10", source.size) end
  source.read(start, 10)
  if ffi.string(start, 6) ~= MAGIC then refuse("is no .npy: does not start with NumPy's mark") end
  local version, length, used = byte(start, 6), byte(start, 8) + 256 * byte(start, 9), 10
  if version < 1 or version > 3 then refuse("has version %d of .npy, wanted 1 to 3", version) end
  if version > 1 then
    if source.size < 12 then refuse("is cut short in its header") end
    source.read(start + 10, 2)
    length, used = length + 2 ^ 16 * byte(start, 10) + 2 ^ 24 * byte(start, 11), 12
  end
  if length > source.size - used then
    refuse("is cut short: its header claims %.0f bytes, %.0f are there", length, source.size - used)
  end
  if length > LONGEST_HEADER then
    refuse("has a header of %.0f bytes, wanted at most %d", length, LONGEST_HEADER)
  end
  local text = ffi.new("uint8_t[?]", length + 1)
  source.read(text, length)
  return parse(ffi.string(text, length)), used + length
end

local swaps = {
  [2] = function(words, count)
    words = ffi.cast("uint16_t *", words)
    for n = 0, count - 1 do words[n] = bit.rshift(bit.bswap(words[n]), 16) end
  end,
  [4] = function(words, count)
    words = ffi.cast("uint32_t *", words)
    for n = 0, count - 1 do words[n] = bit.bswap(words[n]) end
  end,
  [8] = function(words, count)
    words = ffi.cast("uint32_t *", words)
    for n = 0, 2 * count - 1, 2 do
      words[n], words[n + 1] = bit.bswap(words[n + 1]), bit.bswap(words[n])
    end
  end,
}

local function reversed(list)
  local result = {}
  for n = #list, 1, -1 do result[#result + 1] = list[n] end
  return result
end

local function places_reversed(rank)
  local places = {}
  for d = 1, rank do places[d] = rank + 1 - d end
  return places
end

--- Reads a tensor.
-- @param source `size`, in bytes, and read(to, count), which copies the next bytes to a pointer
function npy.read(source)
  local header, used = read_header(source)
  local order, letter = header.descr:match("^([<>|=])(%a%d+)$")
  local dtype = dtypes[letter]
  if not dtype then
    refuse("has elements of NumPy's type %s, wanted %s", core.describe(header.descr), core.alternatives(dtypes))
  end
  local shape = parse_shape(header.shape)
  local bytes = layout.bytes(shape, dtype)
  if bytes ~= source.size - used then
    refuse("holds %.0f bytes of elements, but its header says %s%s, which takes %.0f", source.size - used, dtype,
      layout.shape_text(shape), bytes)
  end
  local fortran = header.fortran_order == "True" and #shape > 1
  local t = layout.new(fortran and reversed(shape) or shape, dtype)
  local memory = ffi.cast("uint8_t *", t.handle.data)
  source.read(memory, bytes)
  local size = layout.sizes[dtype]
  if order == ">" and size > 1 then swaps[size](memory, bytes / size) end
  if dtype == "bool" then layout.make_booleans(memory, bytes) end
  return fortran and t:permute(unpack(places_reversed(#shape))):contiguous() or t
end

--- A source over bytes in memory.
function npy.source(bytes, length)
  local at = 0
  return {
    size = length,
    read = function(to, count)
      ffi.copy(to, bytes + at, count)
      at = at + count
    end,
  }
end

-- As a format of files

npy.holds_one = true

function npy.save(path, t)
  disk.replace(path, function(write)
    write(npy.header(t))
    return layout.write(write, t)
  end)
end

function npy.load(path)
  local mapping = disk.map(path)
  local succeeded, t = pcall(npy.read, npy.source(mapping.bytes, mapping.length))
  disk.unmap(mapping)
  return succeeded and t or error(t, 0)
end

return npy
