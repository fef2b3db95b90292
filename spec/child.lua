-- runs Lua text, or a command, in a process of its own

local child = {}

-- A sanitizer that watches this process is for its library alone: children then run the tree's plain library.
local clean = (os.getenv "LD_PRELOAD" or "") ~= "" and "env -u LD_PRELOAD -u SAFEATTN_LIB " or ""

local function quoted(text)
  return "'" .. tostring(text):gsub("'", "'\\''") .. "'"
end
child.quoted = quoted

--- Runs a command of the shell. Returns what it printed (errors too) and its exit status; 124: it took over 5 minutes.
function child.command(command)
  local pipe = assert(io.popen(clean .. "timeout 300 sh -c " .. quoted(command) .. " 2>&1; echo \"status $?\""))
  local output, status = pipe:read("*a"):match("^(.*)status (%d+)\n$")
  pipe:close()
  return output, tonumber(status)
end

--- Runs a command that must end well, and returns what it printed.
function child.must_command(command)
  local output, status = child.command(command)
  if status ~= 0 then error(command .. "\nended with status " .. tostring(status) .. ":\n" .. output, 2) end
  return output
end

--- Runs Lua text.
-- @param options `environment`: table of variables, false removes one; `before`: commands of the shell to run first;
--   `path`: of the Lua modules (default: the tree's)
-- @return what it printed, its exit status
function child.run(text, options)
  options = options or {}
  local script = os.tmpname()
  local file = assert(io.open(script, "w"))
  file:write(text)
  file:close()
  local removed, set = {}, {"LUA_PATH=" .. quoted((options.path or "lua/?.lua;lua/?/init.lua") .. ";;")}
  for name, value in pairs(options.environment or {}) do
    if value then
      table.insert(set, name .. "=" .. quoted(value))
    else
      table.insert(removed, "-u " .. name)
    end
  end
  local output, status = child.command(string.format("%s env %s %s luajit %s",
    options.before and options.before .. ";" or "", table.concat(removed, " "), table.concat(set, " "), script))
  os.remove(script)
  return output, status
end

--- Runs Lua text that must end well, and returns what it printed.
function child.must_run(text, options)
  local output, status = child.run(text, options)
  if status ~= 0 then error("a child process ended with status " .. tostring(status) .. ":\n" .. output, 2) end
  return output
end

return child
