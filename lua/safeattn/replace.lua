--- replaces a file in one step, so that nobody ever reads half of it

local EEXIST = 17

-- The name of a new file beside `path`, which is nobody else's ("x"): other processes and Lua states may be about to
-- replace `path` too. Or nil, why, and the name that it could not have.
local function reserve(path)
  local count = 0
  while true do
    count = count + 1
    local name = string.format("%s.%d.part", path, count)
    local file, problem, number = io.open(name, "wbx")
    if file then
      file:close()
      return name
    end
    if number ~= EEXIST then return nil, problem, name end
  end
end

-- Who asked for `path` knows no other name, and wants to read that one.
local function naming(path, name, problem)
  local first, last = problem:find(name, 1, true)
  return first and problem:sub(1, first - 1) .. path .. problem:sub(last + 1) or path .. ": " .. problem
end

--- Has `write(name)` write a file beside `path`, and then gives it that name.
-- @param path of the file to replace or make
-- @param write function(name), true when it wrote, else nil and why
-- @return path; or nil and why, and then `path` is what it was before
return function(path, write)
  local name, refusal, wanted = reserve(path)
  if not name then return nil, naming(path, wanted, refusal) end
  local written, problem = write(name)
  if written then written, problem = os.rename(name, path) end
  if written then return path end
  os.remove(name)
  return nil, naming(path, name, problem)
end
