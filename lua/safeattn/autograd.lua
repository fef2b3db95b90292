--- the tape: remembers what made a tensor and carries gradients back through it

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local scope = require "safeattn.scope"

local lib = core.lib
local fail, call = core.fail, core.call
local pointer = tensor.pointer

local autograd = {}

local recording = true

--- Who watches the tape, or false: `recorded(node)` hears of each operation, `carried(node, results)` of the gradients
-- that its backward gave.
autograd.observer = false

--- Whether operations are recorded: not inside `no_grad`, and not while gradients are computed.
function autograd.enabled()
  return recording
end

local function set_recording(value)
  local before = recording
  recording = value
  return before
end

--- Calls fn(...) without recording anything and returns its results.
function autograd.no_grad(fn, ...)
  if type(fn) ~= "function" then fail("no_grad", "fn: got %s, wanted a function", core.describe(fn)) end
  return scope(set_recording, false, fn, ...)
end

-- Lists of inputs may have holes.
local function length(inputs)
  return inputs.n or table.maxn(inputs)
end

local function requires_grad(x)
  return tensor.is(x) and (x.tracked or x.node ~= false)
end

--- Whether an operation on these inputs (a list that may hold nil and false) has to be recorded.
function autograd.wanted(inputs)
  if not recording then return false end
  for i = 1, length(inputs) do
    if requires_grad(inputs[i]) then return true end
  end
  return false
end

-- A node is one recorded operation. It knows the nodes that made its inputs, not the inputs themselves: memory that no
-- backward reads can go. A leaf is represented by a node of its own, without a backward.
local function node_of(x)
  if x.node then return x.node, x.output end
  x.sink = x.sink or {name = "leaf", leaf = x, inputs = 0, outputs = 1}
  return x.sink, 1
end

--- The node of a tensor that requires grad, and which of its outputs the tensor is; nil of another. A function in the
-- node's `hook` is called with what came to the node before its backward: a list of gradients, one for each output,
-- with `owned`, whether the tape may free or keep each.
function autograd.node(x)
  if requires_grad(x) then return node_of(x) end
end

local function version(t)
  return t.storage and t.storage.version or 0
end

local function tensors_and_versions(saved)
  local tensors, versions = {}, {}
  for i = 1, length(saved) do
    if tensor.is(saved[i]) then
      tensors[#tensors + 1] = saved[i]
      versions[#tensors] = version(saved[i])
    end
  end
  return tensors, versions
end

--- Records an operation, when gradient is wanted of it.
-- @param name for messages
-- @param outputs list of float tensors that it made
-- @param inputs list of its inputs; may hold nil, false and other things without gradient
-- @param backward called with the gradient of each output (nil when none came) and without recording; returns a list
--   of gradients aligned with inputs (nil or false: none). Each is a fresh tensor, or a gradient that was passed in, or
--   a view of one: never a tensor that somebody else holds
-- @param saved list of what backward reads (may hold nil, false and numbers): a tensor of it that was changed in place
--   since then makes it raise
function autograd.record(name, outputs, inputs, backward, saved)
  if not autograd.wanted(inputs) then return end
  local n = length(inputs)
  local node = {name = name, inputs = n, outputs = #outputs, backward = backward}
  for i = 1, n do
    if requires_grad(inputs[i]) then
      node[i], node[-i] = node_of(inputs[i])
    else
      node[i] = false
    end
  end
  if saved then node.saved, node.versions = tensors_and_versions(saved) end
  for i = 1, #outputs do
    outputs[i].node, outputs[i].output = node, i
  end
  if autograd.observer then autograd.observer.recorded(node) end
end

--- Notes that the contents of t were changed in place.
function autograd.mark_changed(t)
  local storage = tensor.storage(t)
  storage.version = storage.version + 1
end
local mark_changed = autograd.mark_changed

--- Raises unless the contents of t may be changed in place.
function autograd.check_change(fname, argument, t)
  if recording then
    if t.node then
      fail(fname, "%s: got the result of a recorded %s, wanted a tensor that the tape does not know"
        .. " (t:clone():detach(), or change it inside no_grad)", argument, t.node.name)
    elseif t.tracked then
      fail(fname, "%s: got a tensor that requires grad, wanted one that does not (or a call inside no_grad)",
        argument)
    end
  end
  if tensor.storage(t).constant then
    fail(fname, "%s: got a tensor on memory that was given as const, wanted one that may be written", argument)
  end
end

--- Raises unless the contents of t may be changed in place, and notes that they are.
function autograd.change(fname, argument, t)
  autograd.check_change(fname, argument, t)
  mark_changed(t)
end

local function check_saved(node)
  for i, t in ipairs(node.saved or {}) do
    if not t.handle then
      fail("backward", "a tensor that %s needs for its gradient was freed", node.name)
    elseif version(t) ~= node.versions[i] then
      fail("backward", "%s, which %s needs for its gradient, was changed in place after it was recorded",
        core.describe(t), node.name)
    end
  end
end

-- Gradients on their way. `owned`: nobody but us holds the memory, so it may be added to, kept, or given back at once
-- instead of at some collection.

local function sum(a, b)
  local handle = tensor.handle()
  call("backward", lib.sa_binary, lib.SA_ADD, a.handle, b.handle, handle)
  return tensor.adopt(handle)
end

local function add_to(a, b)
  local handle = pointer(a, "backward", "grad")
  call("backward", lib.sa_binary, lib.SA_ADD, handle, b.handle, handle)
  mark_changed(a)
end

local function copy_of(g)
  local copy = tensor.like("backward", g)
  call("backward", lib.sa_copy, copy.handle, g.handle)
  return copy
end

local function arrive(arrived, node, slot, g, owned)
  local at = arrived[node]
  if not at then
    at = {owned = {}}
    arrived[node] = at
  end
  if not at[slot] then
    at[slot], at.owned[slot] = g, owned
  else
    if at.owned[slot] then
      add_to(at[slot], g)
    else
      at[slot], at.owned[slot] = sum(at[slot], g), true
    end
    if owned then g:free() end
  end
end

local function keep(leaf, g, owned)
  if not leaf.handle then return end
  if not tensor.alike(leaf.handle, g.handle) then
    fail("backward", "got a gradient %s for a leaf %s", core.describe(g), core.describe(leaf))
  end
  if not leaf.gradient and owned and lib.sa_tensor_contiguous(g.handle) then
    leaf.gradient = g
    return
  end
  if leaf.gradient then
    add_to(leaf.gradient, g)
  else
    leaf.gradient = copy_of(g)
  end
  if owned then g:free() end
end

local function is_expanded(handle)
  for d = 0, handle.ndim - 1 do
    if handle.stride[d] == 0 and handle.shape[d] > 1 then return true end
  end
  return false
end

-- Whether every element of result i has memory of its own: it may be (a view of) a gradient that came, stand twice, or
-- repeat what it has.
local function is_fresh(results, i, n, came)
  local block = results[i].handle.block
  if block == nil or is_expanded(results[i].handle) then return false end
  for k = 1, n do
    if k ~= i and results[k] and results[k].handle.block == block then return false end
  end
  for k = 1, came.n do
    if came[k] and came[k].handle.block == block then return false end
  end
  return true
end

-- How many recorded uses each node below `root` has: its gradient is complete when that many have been carried back.
local function count_uses(root)
  local uses, stack = {[root] = 0}, {root}
  while #stack > 0 do
    local node = table.remove(stack)
    for i = 1, node.inputs do
      local parent = node[i]
      if parent then
        if not uses[parent] then
          uses[parent] = 0
          stack[#stack + 1] = parent
        end
        uses[parent] = uses[parent] + 1
      end
    end
  end
  return uses
end

-- The gradients of a node's inputs, and which of them are ours alone. What came to the node is used up.
local function run_backward(node, came)
  check_saved(node)
  came.n = node.outputs
  local results = node.backward(unpack(came, 1, node.outputs)) or {}
  if autograd.observer then autograd.observer.carried(node, results) end
  local owned, passed_on = {}, {}
  for i = 1, node.inputs do
    if results[i] then
      pointer(results[i], "backward", "a gradient of " .. node.name)
      passed_on[results[i]] = true
    end
  end
  for i = 1, node.inputs do owned[i] = results[i] and is_fresh(results, i, node.inputs, came) end
  for slot = 1, came.n do
    if came.owned[slot] and not passed_on[came[slot]] then came[slot]:free() end
  end
  return results, owned
end

-- Hands the gradients of a node's inputs on; a parent whose last one this was becomes ready.
local function hand_on(node, results, owned, arrived, uses, ready)
  for i = 1, node.inputs do
    local parent = node[i]
    if parent then
      if results[i] then arrive(arrived, parent, node[-i], results[i], owned[i]) end
      uses[parent] = uses[parent] - 1
      if uses[parent] == 0 then ready[#ready + 1] = parent end
    end
  end
end

local function carry_back(root, slot, gradient)
  local uses = count_uses(root)
  local arrived, ready = {}, {root}
  arrive(arrived, root, slot, gradient, false)
  while #ready > 0 do
    local node = table.remove(ready)
    local came = arrived[node]
    arrived[node] = nil
    if came and node.hook then node.hook(came) end
    if not node.leaf then
      local results, owned = {}, {}
      if came then results, owned = run_backward(node, came) end
      hand_on(node, results, owned, arrived, uses, ready)
    elseif came then
      keep(node.leaf, came[1], came.owned[1])
    end
  end
end

--- Carries the gradient of t back to every leaf that requires grad, adding to its `grad`.
-- @param t a tensor that recorded operations made
-- @param gradient like t; 1 when left out, which is allowed for one element only
function tensor.methods.backward(t, gradient)
  local handle = pointer(t, "backward", "t")
  if not requires_grad(t) then
    fail("backward", "t: got %s, wanted one that requires grad, or that a recorded operation made of such",
      core.describe(t))
  end
  if gradient == nil then
    if lib.sa_tensor_numel(handle) ~= 1 then
      fail("backward", "gradient: got none, wanted %s, as t has more than one element", core.describe(t))
    end
    gradient = tensor.like("backward", t)
    call("backward", lib.sa_fill, gradient.handle, 1)
  elseif not tensor.alike(handle, pointer(gradient, "backward", "gradient")) then
    fail("backward", "gradient: got %s, wanted %s", tensor.describe_both(gradient, t))
  end
  local node, slot = node_of(t)
  scope(set_recording, false, carry_back, node, slot, gradient)
end

return autograd
