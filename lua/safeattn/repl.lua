--- The prompt: `safeattn` reads Lua, runs it, and prints what it gives.
-- Ctrl-C ends what runs, a kernel too, and comes back with everything as it was. For that, what is typed is not
-- compiled by the JIT, whose traces look at no hook; the library and the kernels run as fast as ever.
-- @module safeattn.repl

local sa = require "safeattn"
local core = require "safeattn.core"
local names = require "safeattn.repl.names"

local ffi, lib = core.ffi, core.lib

local repl = {}

ffi.cdef [[
int safeattn_isatty(int fd) __asm__("isatty");
int safeattn_poll(void *descriptors, unsigned long count, int milliseconds) __asm__("poll");
]]

local USAGE = [==[
usage: safeattn [-i] [-e code] [script [arguments]]
  (nothing)   the prompt
  -e code     run Lua code (may be repeated)
  -i          the prompt, after code and script have run
  -v          the version
  -h          this text
`sa` is the module, `m` its masks.]==]

local HELP = [[
Lua, with the module as `sa` and its masks as `m`. Expressions are printed; an unfinished statement goes on in the next
line. Variables need no `local`, which would end with its line.
  ?sdpa  ?m.causal  ?t:view   the documentation of a function;  ?sa  ?m  names
  Tab completes, the arrows find earlier lines (with lua-readline)
  Ctrl-C ends what runs;  Ctrl-D leaves]]

local EVERY = 1000 -- instructions between two looks at the flag: 10 us of interpreted Lua
local SHOWN = 40   -- entries of a table that are printed

-- Interruption

local INTERRUPTED = setmetatable({}, {__tostring = function() return "interrupted" end})

-- The library keeps state (what the tape records, files half written), so that its functions come to their ends; those
-- that only look may take long and keep none.
local home = debug.getinfo(1, "S").source:match("^(.*)repl%.lua$")
local looking = {inspect = true, draw = true, report = true}

local function may_end(source)
  return source:sub(1, #home) ~= home or looking[source:match("^(%w+)/", #home + 1)]
end

local function poll()
  if not lib.sa_interrupted() then return end
  -- From now on at every instruction: it is raised when the library returns, and raised again when it is caught, before
  -- the next loop is entered.
  debug.sethook(debug.gethook(), "", 1)
  if may_end(debug.getinfo(2, "S").source) then error(INTERRUPTED, 0) end
end

local function traced(problem)
  debug.sethook()
  if problem == INTERRUPTED or lib.sa_interrupted() then return INTERRUPTED end
  if type(problem) ~= "string" then return problem end
  -- Frames below the chunk are the prompt's own.
  return (debug.traceback(problem, 2):gsub("\n%s*%[C%]: in function 'xpcall'.*$", ""))
end

--- Calls fn(...) so that Ctrl-C ends it, in Lua that is interpreted and in kernels.
-- @return as xpcall; an interruption gives false and a value that tostring turns to "interrupted"
function repl.call(fn, ...)
  lib.sa_interrupt(false)
  local function finished(...)
    debug.sethook()
    lib.sa_interrupt(false)
    return ...
  end
  debug.sethook(poll, "", EVERY)
  return finished(xpcall(fn, traced, ...))
end

-- A chunk, or nil and why; the JIT leaves it and its functions alone, so that the hook sees them.
local function interpreted(chunk, problem)
  if chunk then jit.off(chunk, true) end
  return chunk, problem
end

-- Modules that are no part of the library are the user's code: they can be interrupted too.
local function interpret_modules()
  local search = package.loaders[2]
  package.loaders[2] = function(name)
    local loader = search(name)
    if type(loader) == "function" and not name:match("^safeattn%f[%z.]") then jit.off(loader, true) end
    return loader
  end
end

-- Printing

local function shown(value)
  local kind = type(value)
  local metatable = getmetatable(value)
  if kind == "string" then return string.format("%q", value) end
  if kind ~= "table" or (type(metatable) == "table" and rawget(metatable, "__tostring")) then return tostring(value) end
  local texts, keys = {}, {}
  local function brief(x) return type(x) == "table" and not getmetatable(x) and "{...}" or core.describe(x) end
  for n = 1, math.min(#value, SHOWN) do texts[n] = brief(value[n]) end
  if #value > SHOWN then texts[#texts + 1] = string.format("... %d in all", #value) end
  for key in pairs(value) do
    if type(key) == "string" then keys[#keys + 1] = key end
  end
  table.sort(keys)
  for n = 1, math.min(#keys, SHOWN) do
    local item = value[keys[n]]
    texts[#texts + 1] = keys[n] .. " = " .. (type(item) == "function" and "function" or brief(item))
  end
  if #keys > SHOWN then texts[#texts + 1] = string.format("... %d names in all", #keys) end
  local line = "{" .. table.concat(texts, ", ") .. "}"
  return #line <= 100 and line or "{\n  " .. table.concat(texts, ",\n  ") .. "\n}"
end

-- to_text(value), or why it has none: a value's own __tostring may raise.
local function text_of(to_text, value)
  local succeeded, text = pcall(to_text, value)
  return succeeded and text or "no text: " .. (type(text) == "string" and text or type(text))
end

local function print_results(succeeded, ...)
  if not succeeded then
    io.stdout:flush()
    io.stderr:write(text_of(tostring, (...)), "\n")
    return false
  end
  for n = 1, select("#", ...) do print(text_of(shown, (select(n, ...)))) end
  return true
end

-- Lines

local function complete_word(line, from, to)
  local completed, list = pcall(names.complete, line:sub(from, to), _G)
  return completed and list or {}
end

local function on_terminal()
  return ffi.C.safeattn_isatty(0) == 1
end

local Descriptor = ffi.typeof "struct { int fd; short events, revents; }"

-- Waits for a line at the terminal; false when Ctrl-C came first. Looked at now and then, for a signal that comes just
-- before the wait does not end it.
local function wait_for_line()
  local input = Descriptor(0, 1, 0)
  repeat
    if lib.sa_interrupted() then return false end
  until ffi.C.safeattn_poll(input, 1, 100) > 0
  return true
end

-- How to ask for a line: read(prompt), and what to do at the end.
local function line_reader()
  local terminal = on_terminal()
  local found, readline = pcall(require, "readline")
  if terminal and found and readline.set_complete_function then
    local folder = os.getenv "HOME"
    readline.set_options {histfile = folder and folder .. "/.safeattn_history" or "", keeplines = 1000, auto_add = true}
    readline.set_complete_function(complete_word)
    return readline.readline, readline.save_history
  end
  local function read(prompt)
    if not terminal then return io.read "*l" end
    io.write(prompt)
    io.flush()
    return wait_for_line() and io.read "*l" or nil
  end
  return read, function() end
end

-- Whether more lines may still make sense of a text that does not.
local function unfinished(problem)
  return problem:find("near '<eof>'", 1, true) ~= nil
end

-- The function of a text, and whether it is an expression, whose values come behind a `true`: a call that is all that
-- is returned would take the place of the prompt's line on the stack, and errors could not name it. nil and why; true
-- when more lines may still make sense of it.
local function chunk_of(text)
  local expression, expression_problem = loadstring("return true, " .. text, "=prompt")
  if expression then return interpreted(expression), true end
  local chunk, problem = loadstring(text, "=prompt")
  if chunk then return interpreted(chunk), false end
  return nil, problem, unfinished(problem) or unfinished(expression_problem)
end

-- Reads lines until they make a chunk. nil at the end of the input; as chunk_of, or false when there is nothing to run.
local function next_chunk(read)
  local text
  while true do
    lib.sa_interrupt(false)
    local line = read(text and ">> " or "> ")
    if not line then
      if on_terminal() then print() end
      if lib.sa_interrupted() then return false end
      return nil
    end
    local name = not text and line:match("^%s*%?(.*)$")
    if name then
      local found, problem = names.documentation(name, _G)
      print(name:match("%S") and (found or problem) or HELP)
      return false
    end
    text = text and text .. "\n" .. line or line
    local chunk, detail, more = chunk_of((text:gsub("^%s*=", "", 1)))
    if chunk then return chunk, detail end
    if not more then
      io.stderr:write(detail, "\n")
      return false
    end
  end
end

-- What the call of a chunk gave, without the `true` before an expression's values.
local function values(of_expression, succeeded, ...)
  if of_expression and succeeded then return true, select(2, ...) end
  return succeeded, ...
end

local function interact()
  core.check(lib.sa_catch_interrupts(true), "repl")
  interpret_modules()
  local read, finish = line_reader()
  if on_terminal() then print(sa._VERSION .. ", " .. jit.version .. "; ? for help") end
  while true do
    local chunk, is_expression = next_chunk(read)
    if chunk == nil then break end
    if chunk then print_results(values(is_expression, repl.call(chunk))) end
  end
  finish()
  lib.sa_catch_interrupts(false)
end

-- The command line

-- What is to be done, or nil and what is wrong with it.
local function parse(arguments)
  local wanted = {codes = {}}
  local n = 1
  while arguments[n] and arguments[n]:sub(1, 1) == "-" do
    local option = arguments[n]
    if option == "-i" then
      wanted.interactive = true
    elseif option == "-e" then
      n = n + 1
      if not arguments[n] then return nil, "-e: got nothing, wanted Lua code behind it" end
      table.insert(wanted.codes, arguments[n])
    elseif option == "-v" or option == "-h" or option == "--help" then
      wanted.text = option == "-v" and sa._VERSION or USAGE
    else
      return nil, "got unknown option " .. option
    end
    n = n + 1
  end
  wanted.script = arguments[n]
  wanted.arguments = {[0] = arguments[n], unpack(arguments, n + 1)}
  return wanted
end

-- Runs a chunk of the command line; with the prompt to come it can be interrupted.
local function run(wanted, chunk, problem, ...)
  if not chunk then return print_results(false, problem) end
  if wanted.interactive then return print_results(repl.call(interpreted(chunk), ...)) end
  return print_results(xpcall(chunk, traced, ...))
end

local function silent(chunk, problem)
  return chunk and function(...) chunk(...) end, problem
end

--- Does what a command line says.
-- @param arguments a list of strings: [-i] [-e code] [script [arguments]]
-- @return the exit status: 0, 1 when code or script failed, 2 when the command line is wrong
function repl.main(arguments)
  local wanted, mistake = parse(arguments)
  if not wanted then
    io.stderr:write("safeattn: ", mistake, "\n", USAGE, "\n")
    return 2
  end
  if wanted.text then
    print(wanted.text)
    return 0
  end
  _G.sa, _G.m, _G.arg = sa, sa.mask, wanted.arguments
  if wanted.interactive then lib.sa_catch_interrupts(true) end
  local succeeded = true
  for _, code in ipairs(wanted.codes) do succeeded = succeeded and run(wanted, loadstring(code, "=-e")) end
  if succeeded and wanted.script then
    local chunk, problem = silent(loadfile(wanted.script))
    succeeded = run(wanted, chunk, problem, unpack(wanted.arguments))
  end
  if wanted.interactive or not (wanted.script or wanted.codes[1]) then
    interact()
    return 0
  end
  return succeeded and 0 or 1
end

return repl
