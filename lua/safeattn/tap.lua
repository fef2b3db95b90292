--- Recording every attention of a model while it runs, in bounded memory, to look inside afterwards.
--
--    local tap = sa.tap()
--    train(model)
--    tap:stop()
--    print(tap)
--    print(tap:get("sdpa 3"):row(1, 3, 77))
-- @module safeattn.tap

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local sdpa = require "safeattn.sdpa"
local inspect = require "safeattn.inspect"
local scope = require "safeattn.scope"

local fail, describe = core.fail, core.describe

local M = {}

local DEFAULT_BYTES = 256 * 2 ^ 20

local Tap = {}
Tap.__index = Tap
Tap.__describe = function() return "a tap" end

-- The tap that is on, or nil: only one at a time.
local current

local inputs = {"q", "k", "v", "bias", "sinks", "alibi"}
local passed_on = {"mask", "causal", "window", "scale", "softcap", "dropout", "backend", "deterministic"}

local function bytes_of(t)
  local handle = t.handle
  return tonumber(core.lib.sa_tensor_numel(handle) * core.lib.sa_dtype_size(handle.dtype))
end

local function copy_of(t)
  local copy = tensor.like("tap", t)
  core.call("tap", core.lib.sa_copy, copy.handle, t.handle)
  return copy
end

-- Records

-- Memory goes back at once, unless somebody was given the tensors to look at.
local function release(tap, record)
  if record.hook then record.hook:remove() end
  for name, t in pairs(record.tensors or {}) do
    if not record.taken then t:free() end
    record.tensors[name] = nil
  end
  tap.used = tap.used - record.bytes
  record.bytes, record.tensors = 0, nil
end

-- Drops the oldest records until `bytes` more fit; false when they never will. `spared` is not dropped.
local function make_room(tap, bytes, spared)
  if bytes + (spared and spared.bytes or 0) > tap.limit then return false end
  while tap.used + bytes > tap.limit do
    local oldest = tap.records[1] == spared and 2 or 1
    release(tap, table.remove(tap.records, oldest))
  end
  return true
end

-- The gradient of the output, once it is there.
local function catch_gradient(tap, record, out)
  if not autograd.node(out) then return end
  record.hook = out:register_hook(function(gradient)
    if current ~= tap or not record.tensors or record.tensors.dout then return end
    local bytes = bytes_of(gradient)
    if make_room(tap, bytes, record) then
      record.tensors.dout = copy_of(gradient)
      record.bytes, tap.used = record.bytes + bytes, tap.used + bytes
    end
  end)
end

local function options_of(run, options)
  local kept = {}
  for _, name in ipairs(passed_on) do kept[name] = options[name] end
  if options.dropout and options.dropout > 0 then kept.seed = run.attention.seed end
  return kept
end

local function record_run(tap, run, options)
  tap.calls = tap.calls + 1
  local record = {n = tap.calls, name = tap.next_name or tap.scope or "sdpa " .. tap.calls, bytes = 0,
    q_shape = run.q.shape, k_shape = run.k.shape, dtype = run.q.dtype}
  tap.next_name = nil
  local bytes = 0
  for _, name in ipairs(inputs) do
    if run[name] then bytes = bytes + bytes_of(run[name]) end
  end
  local fits = make_room(tap, bytes)
  tap.records[#tap.records + 1] = record
  if not fits then return end
  record.options, record.tensors = options_of(run, options), {}
  for _, name in ipairs(inputs) do
    if run[name] then record.tensors[name] = copy_of(run[name]) end
  end
  record.bytes, tap.used = bytes, tap.used + bytes
  catch_gradient(tap, record, run.out)
end

-- On and off

local tap_options = {bytes = true}

--- Records every `sa.sdpa` from now on, until `tap:stop()`: copies of what it read, and the gradient of its output when
-- a backward brings one. One tap is on at a time: a new one stops the one before.
-- @param options {bytes = 2^28}: what the copies may take; the oldest go first. An attention that is larger by itself
-- is listed only
-- @return a tap
function M.tap(options)
  options = core.options("tap", options, tap_options)
  local limit = options.bytes == nil and DEFAULT_BYTES or core.integer("tap", "bytes", options.bytes)
  if current then current:stop() end
  local tap = setmetatable({limit = limit, used = 0, calls = 0, records = {}}, Tap)
  current = tap
  sdpa.observer = function(run, call_options)
    autograd.no_grad(record_run, tap, run, call_options)
  end
  return tap
end

local function checked(tap, method)
  if type(tap) ~= "table" or getmetatable(tap) ~= Tap then
    fail("tap():" .. method, "self: got %s, wanted a tap", describe(tap))
  end
  return tap
end

--- Stops recording; what was recorded stays. Doing so again is fine.
function Tap:stop()
  checked(self, "stop")
  for _, record in ipairs(self.records) do
    if record.hook then record.hook:remove() end
    record.hook = nil
  end
  if current == self then current, sdpa.observer = nil, nil end
end

--- Whether it records.
function Tap:on()
  return checked(self, "on") == current
end

--- Forgets what was recorded.
function Tap:clear()
  checked(self, "clear")
  for n = #self.records, 1, -1 do release(self, table.remove(self.records, n)) end
end

--- Names what is recorded: the next attention, or with fn all of those that fn(...) computes.
-- @param name a string
-- @param fn function or nil
-- @return what fn returned
function Tap:name(name, fn, ...)
  checked(self, "name")
  if type(name) ~= "string" then fail("tap():name", "name: got %s, wanted a string", describe(name)) end
  if fn == nil then
    self.next_name = name
    return
  end
  if type(fn) ~= "function" then fail("tap():name", "fn: got %s, wanted a function", describe(fn)) end
  return scope(function(value)
    local before = self.scope
    self.scope = value
    return before
  end, name, fn, ...)
end

-- Reading

local List = {}
List.__describe = function(list) return string.format("a list of %d recorded attentions", #list) end

function List.__tostring(list)
  if #list == 0 then return "nothing recorded" end
  local lines = {string.format("%4s  %-20s %-22s %-22s %10s", "", "name", "q", "k", "KiB")}
  for place, entry in ipairs(list) do
    lines[#lines + 1] = string.format("%4d  %-20s %-22s %-22s %10s%s", place, entry.name,
      entry.dtype .. "[" .. table.concat(entry.q_shape, ",") .. "]", "[" .. table.concat(entry.k_shape, ",") .. "]",
      entry.kept and string.format("%.1f", entry.bytes / 1024) or "too large", entry.dout and "  with dout" or "")
  end
  return table.concat(lines, "\n")
end

--- What was recorded, the newest first: a list of {n, name, dtype, q_shape, k_shape, bytes, kept, dout}; n counts the
-- calls from the first, `dout` is whether the gradient of the output came. Prints as a table.
function Tap:list()
  checked(self, "list")
  local list = setmetatable({}, List)
  for place = #self.records, 1, -1 do
    local record = self.records[place]
    list[#list + 1] = {n = record.n, name = record.name, dtype = record.dtype, q_shape = record.q_shape,
      k_shape = record.k_shape, bytes = record.bytes, kept = record.tensors ~= nil,
      dout = record.tensors ~= nil and record.tensors.dout ~= nil}
  end
  return list
end

function Tap.__tostring(tap)
  return string.format("tap %s: %d of %d recorded, %.1f of %.1f MiB\n%s", tap == current and "on" or "off",
    #tap.records, tap.calls, tap.used / 2 ^ 20, tap.limit / 2 ^ 20, tostring(tap:list()))
end

local function find(tap, which)
  local records = tap.records
  if type(which) == "string" then
    local names = {}
    for place = #records, 1, -1 do
      if records[place].name == which then return records[place] end
      names[records[place].name] = true
    end
    local meant = core.nearest(which, names)
    fail("tap():get", "which: got %q, wanted a name that tap:list() has%s", which,
      meant and string.format(" (did you mean %q?)", meant) or "")
  end
  if #records == 0 then fail("tap():get", "which: got %s, but nothing is recorded", describe(which)) end
  return records[#records + 1 - core.integer("tap():get", "which", which, 1, #records)]
end

--- Looks inside a recorded attention.
-- @param which a name (its newest), or a place in the list, 1 for the newest (default)
-- @return what `sa.inspect` gives
function Tap:get(which)
  checked(self, "get")
  local record = find(self, which == nil and 1 or which)
  if not record.tensors then
    fail("tap():get", "which: %s was larger than the tap's %.1f MiB, wanted a tap with more bytes", record.name,
      self.limit / 2 ^ 20)
  end
  record.taken = true
  local options = {}
  for name, value in pairs(record.options) do options[name] = value end
  for _, name in ipairs {"bias", "sinks", "alibi"} do options[name] = record.tensors[name] end
  local t = record.tensors
  return inspect.inspect(t.q, t.k, t.v, options, t.dout)
end

--- A page for a browser about the newest records: see `safeattn.report.tap`.
function Tap:report(path, options)
  return require("safeattn.report").tap(checked(self, "report"), path, options)
end

return M
