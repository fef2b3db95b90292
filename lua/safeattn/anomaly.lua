--- Watching gradients on their way: hooks on tensors, and the search for the first non-finite gradient.
-- @module safeattn.anomaly

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local scope = require "safeattn.scope"

local fail, describe = core.fail, core.describe

local M = {}

-- Hooks

local Handle = {}
Handle.__index = Handle
Handle.__describe = function() return "the handle of a hook" end

--- Takes the hook off its tensor; doing so again is fine.
function Handle:remove()
  local list = self.list
  for n = #list, 1, -1 do
    if list[n] == self then table.remove(list, n) end
  end
end

local function run(list, slot, came)
  -- a copy, as hooks may remove themselves
  for _, handle in ipairs {unpack(list)} do
    local gradient = came[slot]
    if gradient then
      -- The hook may keep what it is shown, and what it gives belongs to somebody else: the tape has to copy both.
      came.owned[slot] = false
      local given = handle.fn(gradient)
      if given ~= nil then
        if not tensor.is(given) or not given.handle or not tensor.alike(given.handle, gradient.handle) then
          fail("register_hook", "the hook gave %s, wanted nil or a gradient %s", describe(given),
            describe(gradient))
        end
        came[slot] = given
      end
    end
  end
end

-- The list of a node's hooks on one of its outputs.
local function hooks_on(node, slot)
  if not node.hooks then
    local hooks = {}
    node.hooks = hooks
    function node.hook(came)
      for at = 1, node.outputs do
        if hooks[at] then run(hooks[at], at, came) end
      end
    end
  end
  node.hooks[slot] = node.hooks[slot] or {}
  return node.hooks[slot]
end

--- `t:register_hook(fn)`: calls fn(gradient) whenever the whole gradient of t has been computed, before it goes on (to
-- `grad` of a leaf, to the operation that made any other tensor). Hooks of a tensor run in the order in which they were
-- registered, without recording. The gradient may be kept, but is not to be changed in place.
-- @param t a tensor that requires grad
-- @param fn function(gradient); may return a tensor like it, which takes its place
-- @return a handle, with `handle:remove()`
function M.register_hook(t, fn)
  tensor.pointer(t, "register_hook", "t")
  if type(fn) ~= "function" then fail("register_hook", "fn: got %s, wanted a function", describe(fn)) end
  local node, slot = autograd.node(t)
  if not node then fail("register_hook", "t: got %s, wanted one that requires grad", describe(t)) end
  local list = hooks_on(node, slot)
  local handle = setmetatable({fn = fn, list = list}, Handle)
  list[#list + 1] = handle
  return handle
end

-- Anomalies

-- Frames of these modules are not what a person looks for.
local home = debug.getinfo(1, "S").source:match("^@(.*[/\\])[^/\\]*$") or "@none"

local function caller_traceback()
  local level = 2
  local frame = debug.getinfo(level, "S")
  while frame and (frame.what == "C" or frame.source:sub(2, #home + 1) == home) do
    level = level + 1
    frame = debug.getinfo(level, "S")
  end
  -- not as a tail call, which would take this function off the stack that `level` counts
  local text = debug.traceback("", frame and level or 2)
  return text
end

local function odd_numbers(t)
  local s = t:stats()
  local parts = {}
  for _, kind in ipairs {{s.nan, "NaN"}, {s.posinf, "+inf"}, {s.neginf, "-inf"}} do
    if kind[1] > 0 then parts[#parts + 1] = kind[1] .. " " .. kind[2] end
  end
  return #parts > 0 and string.format("%s with %s", describe(t), table.concat(parts, ", ")) or nil
end

-- What of the forward was not finite already: the tensors that the operation reads for its gradient.
local function odd_inputs(node)
  local lines = {}
  for _, t in ipairs(node.saved or {}) do
    if core.is_float[t.handle.dtype] then lines[#lines + 1] = odd_numbers(t) end
  end
  if #lines == 0 then return "\nall that it kept of the forward is finite" end
  return "\nof what it kept of the forward, not all is finite: " .. table.concat(lines, "; ")
end

local observer = {}

function observer.recorded(node)
  node.traceback = caller_traceback()
end

function observer.carried(node, results)
  for i = 1, node.inputs do
    local odd = node[i] and tensor.is(results[i]) and odd_numbers(results[i])
    if odd then
      fail("detect_anomaly", "%s gave a non-finite gradient of its input %d: %s%s\n%s", node.name, i, odd,
        odd_inputs(node), node.traceback and "it was called here:" .. node.traceback
          or "it was called before detect_anomaly")
    end
  end
end

local function set_observer(value)
  local before = autograd.observer
  autograd.observer = value
  return before
end

--- Calls fn(...), a forward and its backward, and raises at the first non-finite gradient that an operation gives. The
-- message names the operation, says what of its forward was not finite, and holds the traceback of its call. Every
-- operation pays for its traceback, every gradient is read once more.
-- @return what fn returned
function M.detect_anomaly(fn, ...)
  if type(fn) ~= "function" then fail("detect_anomaly", "fn: got %s, wanted a function", describe(fn)) end
  return scope(set_observer, observer, fn, ...)
end

return M
