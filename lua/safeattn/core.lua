--- loads the C library, and turns what it reports and what callers get wrong into Lua errors

if type(jit) ~= "table" then
  error("safeattn needs LuaJIT 2.1, this is " .. _VERSION .. ": run the script with luajit", 0)
end
local has_ffi, ffi = pcall(require, "ffi")
if not has_ffi then error("safeattn needs LuaJIT's FFI, which this build of it leaves out: " .. tostring(ffi), 0) end

local core = {ffi = ffi}

-- The folder of this file, "lua/safeattn/": the library lies here in the tree, and frames from here are never to blame.
local home = debug.getinfo(1, "S").source:match("^@(.*[/\\])[^/\\]*$") or "@none"

-- Loading

-- Declaring a struct twice is an error, and busted loads modules anew for every file.
if not pcall(ffi.typeof, "sa_attention") then
  local found, problem = pcall(require, "safeattn.cdef")
  if not found then
    error("safeattn: the C declarations are missing: run `make` in the source tree\n" .. problem, 0)
  end
end

local function open_library()
  local tried = {}
  local function try(path, origin)
    local opened, lib = pcall(ffi.load, path)
    if opened then return lib end
    tried[#tried + 1] = string.format("  %s (%s)\n    %s", path, origin, lib)
  end

  local lib
  local named = os.getenv("SAFEATTN_LIB")
  if named and named ~= "" then
    -- Who names a library wants that one: another one in its place would hide the mistake.
    lib = try(named, "SAFEATTN_LIB")
  else
    -- Beside the modules first, so that an older library elsewhere never serves the modules of a source tree.
    lib = try(home .. "core.so", "beside the Lua modules")
    if not lib then
      local path, missing = package.searchpath("safeattn.core", package.cpath)
      if path then
        lib = try(path, "package.cpath")
      else
        tried[#tried + 1] = "  package.cpath has no safeattn/core.so:" .. missing:gsub("\n%s*", "\n    ")
      end
    end
    lib = lib or try("safeattn", "the system's library path")
  end
  if lib then return lib end
  error("safeattn: the C library could not be loaded; `make` in the source tree builds it, and SAFEATTN_LIB names one"
    .. " elsewhere. Tried:\n" .. table.concat(tried, "\n"), 0)
end

local lib = open_library()
core.lib = lib

do
  local has_abi, abi = pcall(function() return lib.sa_abi() end)
  if not has_abi or abi ~= lib.SA_ABI then
    error(string.format("safeattn: the C library has ABI %s, these Lua modules want %d: run `make` in the source tree,"
      .. " or install both parts from one version", has_abi and tostring(abi) or "none", tonumber(lib.SA_ABI)), 0)
  end
end

-- Errors

-- The level of the innermost Lua function outside safeattn, as error() counts it in the caller of the caller: whoever
-- called us gets the line number, however deep inside us the mistake shows. 0 (no position) when there is none.
local function blamed_level()
  local level = 3
  while true do
    local frame = debug.getinfo(level, "S")
    if not frame then return 0 end
    if frame.what ~= "C" and frame.source:sub(2, #home + 1) ~= home then return level - 1 end
    level = level + 1
  end
end

--- Raises "safeattn.<fname>: <message>".
-- @param fname what was called, without "safeattn."
-- @param format of the message, as for string.format, with what follows
function core.fail(fname, format, ...)
  error("safeattn." .. fname .. ": " .. string.format(format, ...), blamed_level())
end
local fail = core.fail

--- What the C library reported last, without the name of its function.
function core.last_error()
  return (ffi.string(lib.sa_last_error()):gsub("^sa_[%w_]+: ", ""))
end

--- Raises what the C library reported, unless status is 0.
function core.check(status, fname)
  if status ~= 0 then fail(fname, "%s", core.last_error()) end
end

--- Calls a C function and raises what it reports. Memory that garbage holds is invisible to C: when an allocation is
-- refused, the garbage is collected and the call made once more.
function core.call(fname, f, ...)
  local status = f(...)
  if status == lib.SA_NO_MEMORY then
    collectgarbage()
    collectgarbage()
    status = f(...)
  end
  if status ~= 0 then core.check(status, fname) end
end

-- The `__describe` of the library's objects.
local function describer(value)
  local metatable = type(value) == "table" and getmetatable(value)
  return type(metatable) == "table" and rawget(metatable, "__describe")
end

--- Whether a value is a table that is none of the library's objects.
function core.is_plain(value)
  return type(value) == "table" and not describer(value)
end

--- What came, for a message: `f32[2,3]`, `"abc"`, `a table`. The library's objects, whose metatables have `__describe`,
-- say it themselves.
function core.describe(value)
  local describe = describer(value)
  if describe then return describe(value) end
  local kind = type(value)
  if kind == "string" then
    return #value <= 60 and string.format("%q", value) or string.format("a string of %d bytes", #value)
  elseif kind == "number" then
    if value ~= value then return "nan" end
    return value == math.floor(value) and math.abs(value) < 2 ^ 63 and string.format("%.0f", value)
      or string.format("%.14g", value)
  elseif kind == "nil" or kind == "boolean" then
    return tostring(value)
  elseif kind == "cdata" then
    return "cdata " .. tostring(ffi.typeof(value)):match("<(.*)>")
  end
  return "a " .. kind
end
local describe = core.describe

--- "a, b or c", sorted.
function core.alternatives(set)
  local names = {}
  for name in pairs(set) do names[#names + 1] = name end
  table.sort(names)
  local last = table.remove(names)
  return #names == 0 and last or table.concat(names, ", ") .. " or " .. last
end

-- Levenshtein distance.
local function distance(a, b)
  local row = {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local diagonal = row[0]
    row[0] = i
    for j = 1, #b do
      local substitute = diagonal + (a:byte(i) == b:byte(j) and 0 or 1)
      diagonal = row[j]
      row[j] = math.min(substitute, diagonal + 1, row[j - 1] + 1)
    end
  end
  return row[#b]
end

--- The name of the set that `name` may be a typo of, or nil.
function core.nearest(name, set)
  local best, best_distance
  for candidate in pairs(set) do
    local d = distance(name, candidate)
    if not best or d < best_distance or (d == best_distance and candidate < best) then
      best, best_distance = candidate, d
    end
  end
  return best and best_distance <= math.ceil(#name / 3) and best or nil
end

-- Arguments

--- The options of a call without any.
core.no_options = setmetatable({}, {__newindex = function() error("shared, read-only", 2) end})
local no_options = core.no_options

--- Checks a table of options; nil counts as an empty one.
-- @param fname for messages
-- @param options
-- @param allowed a table with the legal names as keys
-- @return the options
function core.options(fname, options, allowed)
  if options == nil then return no_options end
  if not core.is_plain(options) then
    fail(fname, "options: got %s, wanted a table", describe(options))
  end
  for name in pairs(options) do
    if not allowed[name] then
      local meant = type(name) == "string" and core.nearest(name, allowed)
      fail(fname, "options: got unknown option %s, wanted %s%s",
        type(name) == "string" and name or describe(name), core.alternatives(allowed),
        meant and string.format(" (did you mean %s?)", meant) or "")
    end
  end
  return options
end

--- Whether x is a count: an integer of at least 0 that a double holds exactly.
function core.is_count(x)
  return type(x) == "number" and x >= 0 and x <= 2 ^ 53 and x == math.floor(x)
end

--- Checks for a finite or infinite number (NaN only when the caller wants it) and returns it.
function core.number(fname, argument, value)
  if type(value) ~= "number" then fail(fname, "%s: got %s, wanted a number", argument, describe(value)) end
  return value
end

--- Checks for an integer in [low, high] (default 0 to 2^53) and returns it.
function core.integer(fname, argument, value, low, high)
  if type(value) == "number" and value == math.floor(value) and value >= (low or 0) and value <= (high or 2 ^ 53) then
    return value
  end
  local range
  if low and low == high then
    range = string.format("%.0f", low)
  elseif high and high < low then
    range = "none: there is nothing to choose from"
  elseif high then
    range = string.format("an integer from %.0f to %.0f", low, high)
  elseif (low or 0) == 0 then
    range = "a count"
  else
    range = string.format("an integer of at least %.0f", low)
  end
  fail(fname, "%s: got %s, wanted %s", argument, describe(value), range)
end

--- Checks for a boolean; nil gives the default.
function core.boolean(fname, argument, value, default)
  if value == nil then return default end
  if type(value) ~= "boolean" then fail(fname, "%s: got %s, wanted true or false", argument, describe(value)) end
  return value
end

--- A dim, 1-based or negative from the end, as C counts it.
function core.dim(fname, argument, value, ndim)
  local dim = value
  if type(dim) == "number" and dim == math.floor(dim) then
    if dim < 0 then dim = dim + ndim + 1 end
    if dim >= 1 and dim <= ndim then return dim - 1 end
  end
  if ndim == 0 then
    fail(fname, "%s: got %s of a tensor without dims, wanted a tensor with dims", argument, describe(value))
  end
  fail(fname, "%s: got %s, wanted 1 to %d, or -1 to -%d from the end", argument, describe(value), ndim, ndim)
end

--- Raises unless a value is a list: with another key, too, such as an option in the wrong braces.
-- @param fname for messages
-- @param argument its name
-- @param value
-- @param wanted what, for the message: "a list of tensors"
function core.check_list(fname, argument, value, wanted)
  if not core.is_plain(value) then fail(fname, "%s: got %s, wanted %s", argument, describe(value), wanted) end
  local n = #value
  -- next() is compiled where pairs() is not, and finds nothing behind the entries of most lists
  for key in next, value, n > 0 and n or nil do
    if type(key) ~= "number" or key < 1 or key > n or key ~= math.floor(key) then
      fail(fname, "%s: got a key %s, wanted %s", argument, describe(key), wanted)
    end
  end
end

local sizes = ffi.typeof("int64_t[8]")

--- A shape (or index) of counts as C wants it.
-- @param fname for messages
-- @param argument its name
-- @param list a table of integers
-- @param lowest the least value that an entry may have (default 0; -1 where that has a meaning)
-- @return int64_t[8], number of dims
function core.shape(fname, argument, list, lowest)
  core.check_list(fname, argument, list, "a list of counts")
  local n = #list
  if n > lib.SA_MAX_DIMS then
    fail(fname, "%s: got %d dims, wanted at most %d", argument, n, tonumber(lib.SA_MAX_DIMS))
  end
  local shape = sizes()
  for i = 1, n do
    local size = list[i]
    if not core.is_count(size) and not (type(size) == "number" and size < 0 and size >= (lowest or 0)) then
      fail(fname, "%s: got %s at [%d], wanted a count", argument, describe(size), i)
    end
    shape[i - 1] = size
  end
  return shape, n
end

-- Types and devices

core.dtypes = {
  f32 = lib.SA_F32, f64 = lib.SA_F64, f16 = lib.SA_F16, bf16 = lib.SA_BF16, bool = lib.SA_BOOL, i32 = lib.SA_I32,
  i64 = lib.SA_I64,
}

-- From code to name, and whether it is a float.
core.dtype_names, core.is_float = {}, {}
for name, code in pairs(core.dtypes) do
  core.dtype_names[tonumber(code)] = name
  core.is_float[tonumber(code)] = name:find("f", 1, true) ~= nil
end

--- The code of a dtype's name.
function core.dtype(fname, argument, name)
  local code = type(name) == "string" and core.dtypes[name]
  if not code then
    fail(fname, "%s: got %s, wanted %s", argument, describe(name), core.alternatives(core.dtypes))
  end
  return tonumber(code)
end

--- The code of a device's name.
-- @return the code; nil and what is missing when there is no such device
function core.device(fname, argument, name)
  if name == "cpu" then return lib.SA_CPU end
  local number = name == "cuda" and 0 or type(name) == "string" and tonumber(name:match("^cuda:(%d%d?%d?)$"))
  if not number then
    fail(fname, '%s: got %s, wanted "cpu", "cuda" or "cuda:0", "cuda:1", ...', argument, describe(name))
  end
  local code = lib.SA_CUDA + number
  if number < lib.sa_device_count(lib.SA_CUDA) then return code end
  lib.sa_synchronize(code) -- refuses, and says why
  return nil, core.last_error()
end

--- The name of a device's code.
function core.device_name(code)
  return code == lib.SA_CPU and "cpu" or "cuda:" .. tonumber(code - lib.SA_CUDA)
end

return core
