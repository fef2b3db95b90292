--- the elements of a tensor: reading, writing, comparing

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call
local pointer, methods = tensor.pointer, tensor.methods

local contents = {}

local BOOL, I64 = tonumber(lib.SA_BOOL), tonumber(lib.SA_I64)

-- Reused by every get and set: C reads and writes them before it returns.
local position = ffi.new("int64_t[8]")
local number, integer = ffi.new("double[1]"), ffi.new("int64_t[1]")

local EXACT = 2 ^ 53
local int64 = ffi.typeof("int64_t")

-- LuaJIT boxes its other values in the bits of NaNs, and takes a double from foreign memory as it is: such a NaN would
-- be nil or a function. So the bits are looked at first.
local LOW, HIGH = ffi.abi("le") and 0 or 1, ffi.abi("le") and 1 or 0
local words_type = ffi.typeof("const uint32_t *")

--- Element n, from 0, of a double *.
function contents.double_at(doubles, n)
  local words = ffi.cast(words_type, doubles + n)
  local high = words[HIGH]
  local is_nan = bit.band(high, 0x7ff00000) == 0x7ff00000 and (bit.band(high, 0xfffff) ~= 0 or words[LOW] ~= 0)
  return is_nan and 0 / 0 or doubles[n]
end
local double_at = contents.double_at

--- 1-based indices of element n, from 0 in row-major order, of a shape.
function contents.index_of(n, shape)
  local index = {}
  for d = #shape, 1, -1 do
    index[d] = n % shape[d] + 1
    n = math.floor(n / shape[d])
  end
  return index
end

-- An int64_t as a number when a number holds it.
local function exact(x)
  return (x >= -EXACT and x <= EXACT) and tonumber(x) or x
end

-- Fills `position` from 1-based indices, one a dim.
local function locate(fname, handle, n, ...)
  local ndim = handle.ndim
  if n ~= ndim then fail(fname, "index: got %d indices, wanted %d", n, ndim) end
  for d = 1, n do
    local index = select(d, ...)
    local size = tonumber(handle.shape[d - 1])
    if not (type(index) == "number" and index >= 1 and index <= size and index % 1 == 0) then
      core.integer(fname, "index " .. d, index, 1, size)
    end
    position[d - 1] = index - 1
  end
end

-- The element at `position` as Lua has it.
local function element(fname, handle)
  local dtype = handle.dtype
  if dtype == I64 then
    call(fname, lib.sa_get_integer, handle, position, integer)
    return exact(integer[0])
  end
  call(fname, lib.sa_get, handle, position, number)
  local value = double_at(number, 0)
  if dtype == BOOL then return value ~= 0 end
  return value
end

--- One element: a boolean of a bool tensor, else a number. Integers of i64 beyond 2^53, which no Lua number holds, come
-- as int64_t cdata. The tape does not see it.
function methods.get(t, ...)
  local handle = pointer(t, "get", "t")
  locate("get", handle, select("#", ...), ...)
  return element("get", handle)
end

--- The element of a tensor that has just one.
function methods.item(t)
  local handle = pointer(t, "item", "t")
  if lib.sa_tensor_numel(handle) ~= 1 then
    fail("item", "t: got %s, wanted one element", core.describe(t))
  end
  ffi.fill(position, ffi.sizeof(position))
  return element("item", handle)
end

-- A value to be stored: number, boolean (into bool) or 64-bit integer (into i64).
local function check_value(fname, value, dtype)
  local kind = type(value)
  if kind == "number" or (kind == "boolean" and dtype == BOOL) then return value end
  if dtype == I64 and ffi.istype(int64, value) then return value end
  local wanted = dtype == BOOL and "true, false or a number" or dtype == I64 and "a number or int64_t" or "a number"
  fail(fname, "value: got %s, wanted %s", core.describe(value), wanted)
end

--- Writes one element: t:set(i, j, value). The tape does not see it.
function methods.set(t, ...)
  local handle = pointer(t, "set", "t")
  local n = select("#", ...)
  if n == 0 then fail("set", "value: got nothing, wanted a value after the indices") end
  local value = check_value("set", (select(n, ...)), handle.dtype)
  locate("set", handle, n - 1, ...)
  autograd.check_change("set", "t", t)
  if type(value) == "cdata" then
    call("set", lib.sa_set_integer, handle, position, value)
  elseif type(value) == "boolean" then
    call("set", lib.sa_set, handle, position, value and 1 or 0)
  else
    call("set", lib.sa_set, handle, position, value)
  end
  autograd.mark_changed(t)
end

--- Sets every element to one number (or boolean). Returns t.
function methods.fill(t, value)
  local handle = pointer(t, "fill", "t")
  value = check_value("fill", value, handle.dtype)
  autograd.check_change("fill", "t", t)
  if type(value) == "boolean" then value = value and 1 or 0 end
  if type(value) == "cdata" then
    local one = tensor.new("fill", I64, lib.SA_CPU, 0, nil)
    call("fill", lib.sa_set_integer, one.handle, position, value)
    call("fill", lib.sa_copy, handle, one.handle)
  else
    call("fill", lib.sa_fill, handle, value)
  end
  autograd.mark_changed(t)
  return t
end

--- Copies the elements of another tensor, cast and broadcast, into t. Returns t. The tape does not see it.
function methods.copy(t, from)
  local handle, source = pointer(t, "copy", "t"), pointer(from, "copy", "from")
  autograd.check_change("copy", "t", t)
  call("copy", lib.sa_copy, handle, source)
  autograd.mark_changed(t)
  return t
end

--- A copy on the CPU, in f64 and row-major, each NaN the one that LuaJIT takes for a number.
function contents.wide(fname, t)
  local handle = pointer(t, fname, "t")
  local copy = tensor.new(fname, lib.SA_F64, lib.SA_CPU, handle.ndim, handle.shape)
  call(fname, lib.sa_get_all, handle, copy:data())
  return copy
end

local function integer_at(integers, n)
  return exact(integers[n])
end

local function boolean_at(booleans, n)
  return booleans[n]
end

-- Nested tables of the elements from `offset` on of a row-major array, `count` of them.
local function nest(elements, element_at, shape, dim, offset, count)
  if dim > #shape then return element_at(elements, offset) end
  local list = {}
  local step = shape[dim] > 0 and count / shape[dim] or 0
  for i = 1, shape[dim] do
    list[i] = nest(elements, element_at, shape, dim + 1, offset + (i - 1) * step, step)
  end
  return list
end

--- The elements as nested tables (numbers or booleans, as in get); one value for a tensor without dims.
function methods.totable(t)
  local handle = pointer(t, "totable", "t")
  local dtype = handle.dtype
  local element_at = dtype == I64 and integer_at or dtype == BOOL and boolean_at or double_at
  local wide = t
  if element_at == double_at then dtype = lib.SA_F64 end
  if dtype ~= handle.dtype or handle.device ~= lib.SA_CPU or not lib.sa_tensor_contiguous(handle) then
    wide = tensor.new("totable", dtype, lib.SA_CPU, handle.ndim, handle.shape)
    call("totable", lib.sa_copy, wide.handle, handle)
  end
  local nested = nest(wide:data(), element_at, t.shape, 1, 0, t:numel())
  -- No tail call, and both are read once more: what nobody reads again may go, and its memory while it is walked.
  if wide ~= t then wide:free() end
  return nested
end

local stats_type = ffi.typeof("sa_stats")

--- Over the finite elements min, max, mean and (Euclidean) norm; and how many there are in all (count), and of each odd
-- kind (nan, posinf, neginf, zero).
function methods.stats(t)
  local handle = pointer(t, "stats", "t")
  local s = stats_type()
  call("stats", lib.sa_tensor_stats, handle, s)
  return {
    min = s.min, max = s.max, mean = s.mean, norm = s.norm, count = tonumber(s.count), nan = tonumber(s.nan),
    posinf = tonumber(s.posinf), neginf = tonumber(s.neginf), zero = tonumber(s.zero),
  }
end

local answer = ffi.new("int[1]")

--- Whether two tensors have the same shape, dtype and values (NaN equals nothing, -0 equals 0).
function contents.equal(a, b)
  call("equal", lib.sa_equal, pointer(a, "equal", "a"), pointer(b, "equal", "b"), answer)
  return answer[0] == 1
end

local allclose_options = {atol = true, rtol = true, equal_nan = true}

local function tolerance(options, name, default)
  local value = options[name]
  if value == nil then return default end
  if core.number("allclose", name, value) >= 0 then return value end
  fail("allclose", "%s: got %s, wanted a number of at least 0", name, core.describe(value))
end

--- Whether |a - b| <= atol + rtol |b| everywhere. Infinities must be equal; NaN agrees with NaN only on request.
-- @param a a tensor
-- @param b one of the same shape
-- @param options atol (1e-8), rtol (1e-5), equal_nan (false)
function contents.allclose(a, b, options)
  local left, right = pointer(a, "allclose", "a"), pointer(b, "allclose", "b")
  options = core.options("allclose", options, allclose_options)
  local atol, rtol = tolerance(options, "atol", 1e-8), tolerance(options, "rtol", 1e-5)
  local equal_nan = core.boolean("allclose", "equal_nan", options.equal_nan, false)
  call("allclose", lib.sa_allclose, left, right, atol, rtol, equal_nan, answer)
  return answer[0] == 1
end

return contents
