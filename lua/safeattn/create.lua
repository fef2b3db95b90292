--- tensors from nothing: of Lua tables, of numbers, of chance, of foreign memory

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local random = require "safeattn.random"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call

local create = {}

local I32, I64 = tonumber(lib.SA_I32), tonumber(lib.SA_I64)
local int64 = ffi.typeof("int64_t")

local function allowed(...)
  local set = {dtype = true, device = true, requires_grad = true}
  for _, name in ipairs {...} do set[name] = true end
  return set
end

-- Options that every constructor has: dtype, device; nil and what is missing instead of a device that is not there.
local function common(fname, options, default)
  local dtype = core.dtype(fname, "dtype", options.dtype == nil and default or options.dtype)
  local device, missing = core.device(fname, "device", options.device == nil and "cpu" or options.device)
  if core.boolean(fname, "requires_grad", options.requires_grad, false) and not core.is_float[dtype] then
    fail(fname, "requires_grad: got true for %s, wanted f32, f64, f16 or bf16", core.dtype_names[dtype])
  end
  return dtype, device, missing
end

local function finished(t, options)
  if options.requires_grad then t.tracked = true end
  return t
end

local plain = allowed()

local function new(fname, shape, options, default)
  local dtype, device, missing = common(fname, options, default)
  local sizes, ndim = core.shape(fname, "shape", shape)
  if not device then return nil, missing end
  return finished(tensor.new(fname, dtype, device, ndim, sizes), options)
end

--- Unset memory. shape: a list of counts; {} is a scalar. Options of all constructors: dtype ("f32"), device ("cpu"),
-- requires_grad (false). Where the device is not there, all constructors give nil and say what is missing.
function create.empty(shape, options)
  return new("empty", shape, core.options("empty", options, plain), "f32")
end

local function filled(fname, shape, value, options, default)
  local t, missing = new(fname, shape, core.options(fname, options, plain), default)
  if not t then return nil, missing end
  call(fname, lib.sa_fill, t.handle, value)
  return t
end

--- Every element 0 (false in a bool tensor).
function create.zeros(shape, options)
  return filled("zeros", shape, 0, options, "f32")
end

--- Every element 1 (true in a bool tensor).
function create.ones(shape, options)
  return filled("ones", shape, 1, options, "f32")
end

--- Every element `value`: a number, or a boolean, which makes a bool tensor.
function create.full(shape, value, options)
  if type(value) == "boolean" then return filled("full", shape, value and 1 or 0, options, "bool") end
  return filled("full", shape, core.number("full", "value", value), options, "f32")
end

local seeded = allowed("seed")

local function drawn(fname, shape, options, draw)
  options = core.options(fname, options, seeded)
  local seed = options.seed ~= nil and random.checked(fname, "seed", options.seed)
  local dtype = common(fname, options, "f32")
  if not core.is_float[dtype] then
    fail(fname, "dtype: got %s, wanted f32, f64, f16 or bf16", core.dtype_names[dtype])
  end
  local t, missing = new(fname, shape, options, "f32")
  if not t then return nil, missing end
  call(fname, draw, t.handle, seed or random.draw(fname))
  return t
end

--- Uniform on [0, 1). Option seed: a count; the numbers depend on it alone, on every device. Without it every call
-- draws others, in a sequence that sa.seed restarts.
function create.rand(shape, options)
  return drawn("rand", shape, options, lib.sa_rand)
end

--- Normal with mean 0 and variance 1; otherwise as rand.
function create.randn(shape, options)
  return drawn("randn", shape, options, lib.sa_randn)
end

local ranged = allowed("start", "step")

--- n numbers from `start` (default 0) in steps of `step` (default 1): arange(3) is 0, 1, 2. Ids count from 1:
-- arange(n, {start = 1, dtype = "i32"}).
function create.arange(n, options)
  options = core.options("arange", options, ranged)
  n = core.integer("arange", "n", n)
  local start = core.number("arange", "start", options.start == nil and 0 or options.start)
  local step = core.number("arange", "step", options.step == nil and 1 or options.step)
  local t, missing = new("arange", {n}, options, "f32")
  if not t then return nil, missing end
  call("arange", lib.sa_arange, t.handle, start, step)
  return t
end

-- Tables

-- The shape of nested tables, taken from the first element of each level.
local function shape_of(data)
  local shape = {}
  while core.is_plain(data) do
    shape[#shape + 1] = #data
    if #shape > lib.SA_MAX_DIMS then
      fail("tensor", "data: got tables nested more than 8 deep, wanted at most 8")
    end
    data = data[1]
  end
  return shape, data
end

local function place_text(place, depth)
  return depth == 0 and "" or " at [" .. table.concat(place, "][", 1, depth) .. "]"
end

local range_of = {[I32] = {-2 ^ 31, 2 ^ 31 - 1}, [I64] = {-2 ^ 63, 2 ^ 63 - 1024}}

-- Raises unless a value can stand in a tensor of the dtype; gives what to store.
local function checked(value, dtype, booleans, place, depth)
  local kind = type(value)
  if kind == "boolean" and booleans then return value and 1 or 0 end
  if kind == "cdata" and dtype == I64 and ffi.istype(int64, value) then return value end
  if kind ~= "number" or booleans then
    fail("tensor", "data: got %s%s, wanted a %s", core.describe(value), place_text(place, depth),
      booleans and "boolean, as before" or "number")
  end
  local range = range_of[dtype]
  if range and not (value % 1 == 0 and value >= range[1] and value <= range[2]) then
    fail("tensor", "data: got %s%s, wanted integers of %s", core.describe(value), place_text(place, depth),
      core.dtype_names[dtype])
  end
  return value
end

-- Writes nested tables to a row-major array and returns the next free place of it.
local function store(data, shape, depth, array, at, dtype, booleans, place)
  if depth == #shape then
    if core.is_plain(data) then
      fail("tensor", "data: got a table%s, wanted a number: ragged", place_text(place, depth))
    end
    array[at] = checked(data, dtype, booleans, place, depth)
    return at + 1
  end
  local size = shape[depth + 1]
  if not core.is_plain(data) or #data ~= size then
    fail("tensor", "data: got %s%s, wanted a table of %d like the first: ragged",
      core.is_plain(data) and "a table of " .. #data or core.describe(data), place_text(place, depth), size)
  end
  core.check_list("tensor", "data", data, "a list")
  for i = 1, size do
    place[depth + 1] = i
    at = store(data[i], shape, depth + 1, array, at, dtype, booleans, place)
  end
  return at
end

--- A tensor of nested tables of numbers, or of booleans (which make a bool tensor); a bare number gives a scalar.
function create.tensor(data, options)
  options = core.options("tensor", options, plain)
  if type(data) == "table" and not core.is_plain(data) then
    fail("tensor", "data: got %s, wanted tables of numbers (clone and to copy a tensor)", core.describe(data))
  end
  local shape, first = shape_of(data)
  local booleans = type(first) == "boolean"
  if first == nil and (#shape == 0 or shape[#shape] > 0) then
    fail("tensor", "data: got nil, wanted a number, a boolean or tables of them")
  end
  local dtype, device, missing = common("tensor", options, booleans and "bool" or "f32")
  -- Doubles hold what every dtype but i64 can; casting is C's work.
  local wide = dtype == I64 and I64 or tonumber(lib.SA_F64)
  local sizes, ndim = core.shape("tensor", "data", shape)
  local staged = tensor.new("tensor", wide, lib.SA_CPU, ndim, sizes)
  store(data, shape, 0, staged:data(), 0, dtype, booleans, {})
  if not device then return nil, missing end
  if wide == dtype and device == lib.SA_CPU then return finished(staged, options) end
  local t = tensor.new("tensor", dtype, device, ndim, sizes)
  call("tensor", lib.sa_copy, t.handle, staged.handle)
  staged:free()
  return finished(t, options)
end

-- Foreign memory

local dtype_of_element = {float = "f32", double = "f64", bool = "bool", int = "i32", int64_t = "i64"}

-- The element type of a pointer or array, whether it is const, and the array's bytes where they are known.
local function pointed_to(data)
  local name, consts = tostring(ffi.typeof(data)):match("^ctype<(.*)>$"):gsub("const ", "")
  local element, rest = name:match("^([%w_ ]-) ?([%*%[%(].*)$")
  if not element or (rest:sub(1, 1) == "*" and rest ~= "*") then return nil end
  return element, consts > 0, rest ~= "*" and ffi.sizeof(data) or nil
end

local pointer_options = {dtype = true, device = true, stride = true, owner = true, requires_grad = true}

--- A tensor on memory that something else owns; nothing is copied. The pointer and `owner` are kept alive as long as
-- the tensor and its views are.
-- @param data an FFI pointer or array; on const memory the tensor refuses to be written
-- @param shape a list of counts
-- @param options dtype (default: what the pointer points to; a must for half types and void pointers); device, that the
--   memory is on ("cpu"); stride, in elements (default: row-major); owner, any Lua value; requires_grad
function create.from_pointer(data, shape, options)
  options = core.options("from_pointer", options, pointer_options)
  local element, constant, bytes
  if type(data) == "cdata" then element, constant, bytes = pointed_to(data) end
  if not element then
    fail("from_pointer", "data: got %s, wanted an FFI pointer or array", core.describe(data))
  end
  if options.dtype == nil and not dtype_of_element[element] then
    fail("from_pointer", "dtype: got none for %s, which does not say it, wanted %s", core.describe(data),
      core.alternatives(core.dtypes))
  end
  local dtype, device, missing = common("from_pointer", options, dtype_of_element[element])
  local sizes, ndim = core.shape("from_pointer", "shape", shape)
  local stride
  if options.stride ~= nil then
    local count
    stride, count = core.shape("from_pointer", "stride", options.stride)
    if count ~= ndim then fail("from_pointer", "stride: got %d strides, wanted %d", count, ndim) end
  end
  if not device then return nil, missing end
  local handle = tensor.handle()
  call("from_pointer", lib.sa_tensor_borrow, handle, ffi.cast("void *", data), dtype, device, ndim, sizes, stride)
  if bytes then
    local ends = ffi.new("const char *[2]")
    lib.sa_tensor_extent(handle, ends, ends + 1)
    local wanted = tonumber(ends[1] - ffi.cast("const char *", data))
    if lib.sa_tensor_numel(handle) > 0 and wanted > bytes then
      fail("from_pointer", "shape: got one that reaches over %.0f bytes, wanted at most the array's %.0f", wanted,
        bytes)
    end
  end
  local t = tensor.adopt(handle)
  local storage = tensor.storage(t)
  storage.owner, storage.constant = {data, options.owner}, constant
  return finished(t, options)
end

return create
