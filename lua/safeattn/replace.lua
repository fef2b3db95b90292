--- replaces a file in one step, so that nobody ever reads half of it

-- Names differ within this process, and between processes of different seconds.
local count = 0

--- Has `write(name)` write a file beside `path`, and then gives it that name.
-- @param path of the file to replace or make
-- @param write function(name), true when it wrote, else nil and why
-- @return path; or nil and why, and then `path` is what it was before
return function(path, write)
  count = count + 1
  local name = string.format("%s.%d-%d.part", path, os.time(), count)
  local written, problem = write(name)
  if written then written, problem = os.rename(name, path) end
  if written then return path end
  os.remove(name)
  -- Who asked for `path` knows no other name.
  local first, last = problem:find(name, 1, true)
  return nil, first and problem:sub(1, first - 1) .. path .. problem:sub(last + 1) or problem
end
