--- settings that hold while a function runs, and not while its coroutine has yielded

-- In a coroutine the function gets one of its own, whose yields are handed on; `thread` is false elsewhere.
local go_on

local function left(set, value, before, thread, succeeded, ...)
  set(before)
  if not succeeded then error((...), 0) end
  if not thread or coroutine.status(thread) == "dead" then return ... end
  return go_on(set, value, thread, coroutine.yield(...))
end

function go_on(set, value, thread, ...)
  local before = set(value)
  return left(set, value, before, thread, coroutine.resume(thread, ...))
end

--- Calls fn(...) with a value set, and sets what was there before whenever others run: when fn has returned, raised an
-- error, or yielded.
-- @param set function(value) that gives back the value before; where nothing was changed yet it may raise
-- @param value
-- @param fn
-- @return what fn returned
return function(set, value, fn, ...)
  local running, is_main = coroutine.running()
  if running and not is_main then return go_on(set, value, coroutine.create(fn), ...) end
  local before = set(value)
  return left(set, value, before, false, pcall(fn, ...))
end
