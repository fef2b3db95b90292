-- what the specs of files share: a folder, bytes of files, damaged copies, and Python where it is there

local ffi = require "ffi"
local assert = require "luassert"
local sa = require "safeattn"
local child = require "spec.child"

local files = {}

--- A folder of its own for a spec; remove(folder) ends it.
function files.folder()
  return child.command("mktemp -d"):match("%S+")
end

function files.remove(folder)
  child.command("rm -rf " .. folder)
end

function files.read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

function files.write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
  return path
end

--- The names of the files in a folder, in order.
function files.names(folder)
  return (child.command("ls -A " .. folder):gsub("\n", " "):gsub(" $", ""))
end

--- A value of every size as the formats write it.
function files.little(size, value)
  local text = {}
  for n = 1, size do
    text[n] = string.char(value % 256)
    value = math.floor(value / 256)
  end
  return table.concat(text)
end

--- A tensor with the odd values of its dtype, and NaNs with a payload.
function files.sample(dtype)
  if dtype == "bool" then return sa.tensor {{true, false, false}, {false, true, true}} end
  if dtype == "i32" then return sa.tensor({{0, 1, -1}, {2 ^ 31 - 1, -2 ^ 31, 77}}, {dtype = "i32"}) end
  if dtype == "i64" then return sa.tensor({{0, 1, -1}, {2 ^ 53 + 2, -2 ^ 63, 77}}, {dtype = "i64"}) end
  local t = sa.tensor({{0, -0.0, 1.5}, {1 / 0, -1 / 0, 0 / 0}}, {dtype = dtype})
  local bytes = ffi.cast("uint8_t *", t:data())
  bytes[0] = 1 -- the least number that is not 0
  bytes[ffi.cast("uint8_t *", t:data() + 5) - bytes] = 5
  return t
end

--- Loads what is no good file: must be nil and a message that names the file and holds `pattern`.
function files.must_refuse(path, pattern, options)
  local result, problem = sa.load(path, options)
  assert.is_nil(result)
  assert.is_string(problem)
  assert.matches(pattern, problem, 1, true)
  assert.matches(path, problem, 1, true)
end

--- Loads copies of a good file that are cut at every length, and with every byte of the first `header` (or all) and the
-- last 128 changed in several ways. Each must give tensors or nil and a message. They are more than a process may have
-- open files.
-- @return how many gave a message
function files.torture(path, good, header)
  local refused = 0
  local function try(text)
    files.write(path, text)
    local succeeded, result, problem = pcall(sa.load, path)
    if not succeeded then error("load raised: " .. tostring(result), 0) end
    if result == nil then
      assert.is_string(problem)
      refused = refused + 1
    end
    return result
  end
  for length = 0, #good - 1 do
    if try(good:sub(1, length)) ~= nil then error("a file cut to " .. length .. " bytes was loaded", 0) end
  end
  for place = 1, #good do
    if place <= (header or #good) or place > #good - 128 then
      for _, value in ipairs {0, 0x2d, 0x39, 0x7b, 0xff, (good:byte(place) + 1) % 256} do
        try(good:sub(1, place - 1) .. string.char(value) .. good:sub(place + 1))
      end
    end
  end
  return refused
end

-- A Python that imports `modules`, or nil. Where python3 is not Debian's, only /usr/bin/python3 sees Debian's NumPy.
local function python_with(modules)
  for _, python in ipairs {"python3", "/usr/bin/python3"} do
    if select(2, child.command(python .. " -c 'import " .. modules .. "'")) == 0 then return python end
  end
end

--- Runs Python; the test is pending where Python or a module that it imports is missing. `pending` is busted's, which
-- only specs see.
function files.python(pending, modules, code)
  local python = python_with(modules)
  if not python then pending("python3 with " .. modules .. " is not here") end
  local script = os.tmpname()
  files.write(script, code)
  local output, status = child.command(python .. " " .. script)
  os.remove(script)
  assert(status == 0, output)
  return output
end

return files
