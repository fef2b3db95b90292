--- tensors made of tensors without arithmetic: views of the same memory, copies, casts, and putting parts together

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call
local pointer, methods = tensor.pointer, tensor.methods

local views = {}

local dims_type = ffi.typeof("int32_t[8]")

-- A view of t: f(out, t, ...) is one of the C library's.
local function view_of(fname, t, f, ...)
  local handle = tensor.handle()
  call(fname, f, handle, t.handle, ...)
  return tensor.adopt(handle, tensor.storage(t))
end

-- The list that was given as several arguments or as one table.
local function as_list(first, ...)
  if type(first) == "table" and select("#", ...) == 0 then return first end
  return {first, ...}
end

local function copy_of(fname, t)
  local copy = tensor.like(fname, t)
  call(fname, lib.sa_copy, copy.handle, t.handle)
  return copy
end

-- The shape of a handle, as C wants it, for a backward that need not keep the tensor.
local function shape_of(handle)
  local shape = ffi.new("int64_t[8]", handle.shape)
  return shape, handle.ndim
end

-- g with a shape of as many elements.
local function reshaped(fname, g, ndim, shape)
  if not lib.sa_tensor_contiguous(g.handle) then g = copy_of(fname, g) end
  return view_of(fname, g, lib.sa_tensor_view, ndim, shape)
end

--- The gradient of something that was broadcast from a shape: summed over the dims that broadcasting added or grew.
function views.sum_to(g, ndim, shape)
  local handle = g.handle
  local lead = handle.ndim - ndim
  local dims = 0
  for d = 0, handle.ndim - 1 do
    if d < lead or (shape[d - lead] == 1 and handle.shape[d] ~= 1) then dims = dims + 2 ^ d end
  end
  if dims == 0 then return g end
  local summed = tensor.handle()
  call("backward", lib.sa_reduce, lib.SA_SUM, handle, dims, true, summed)
  return reshaped("backward", tensor.adopt(summed), ndim, shape)
end

--- The same elements in another shape, without a copy: t:view(2, -1) or t:view{2, -1}; one count may be -1. Only what
-- the strides allow; t:contiguous():view(...) always works.
function methods.view(t, ...)
  local handle = pointer(t, "view", "t")
  local shape, ndim = core.shape("view", "shape", as_list(...), -1)
  local out = view_of("view", t, lib.sa_tensor_view, ndim, shape)
  if autograd.wanted {t} then
    local from, from_ndim = shape_of(handle)
    autograd.record("view", {out}, {t}, function(g)
      return {reshaped("backward", g, from_ndim, from)}
    end)
  end
  return out
end

local function permuted(fname, t, dims)
  local out = view_of(fname, t, lib.sa_tensor_permute, dims)
  if autograd.wanted {t} then
    local inverse = dims_type()
    for d = 0, t.handle.ndim - 1 do inverse[dims[d]] = d end
    autograd.record(fname, {out}, {t}, function(g)
      return {view_of("backward", g, lib.sa_tensor_permute, inverse)}
    end)
  end
  return out
end

--- A view with two dims exchanged.
function methods.transpose(t, a, b)
  local ndim = pointer(t, "transpose", "t").ndim
  a, b = core.dim("transpose", "dim1", a, ndim), core.dim("transpose", "dim2", b, ndim)
  local dims = dims_type()
  for d = 0, ndim - 1 do dims[d] = d end
  dims[a], dims[b] = b, a
  return permuted("transpose", t, dims)
end

--- A view with the dims in a new order: t:permute(2, 1, 3); each dim stands once.
function methods.permute(t, ...)
  local ndim = pointer(t, "permute", "t").ndim
  local order = as_list(...)
  core.check_list("permute", "dims", order, "a list of dims")
  if #order ~= ndim then fail("permute", "dims: got %d dims, wanted each of the %d dims once", #order, ndim) end
  local dims, seen = dims_type(), {}
  for i = 1, ndim do
    local dim = core.dim("permute", "dims", order[i], ndim)
    if seen[dim] then fail("permute", "dims: got %d twice, wanted each of the %d dims once", dim + 1, ndim) end
    seen[dim] = true
    dims[i - 1] = dim
  end
  return permuted("permute", t, dims)
end

-- A view of a part: its gradient is zero outside.
local function window(fname, t, f, ...)
  local out = view_of(fname, t, f, ...)
  if autograd.wanted {t} then
    local shape, ndim = shape_of(t.handle)
    local dtype, device = t.handle.dtype, t.handle.device
    local place = {...}
    autograd.record(fname, {out}, {t}, function(g)
      local whole = tensor.new("backward", dtype, device, ndim, shape)
      call("backward", lib.sa_fill, whole.handle, 0)
      call("backward", lib.sa_copy, view_of("backward", whole, f, unpack(place)).handle, g.handle)
      return {whole}
    end)
  end
  return out
end

--- A view of `count` positions of a dim, from `start` on (1-based).
function methods.narrow(t, dim, start, count)
  local handle = pointer(t, "narrow", "t")
  dim = core.dim("narrow", "dim", dim, handle.ndim)
  local size = tonumber(handle.shape[dim])
  start = core.integer("narrow", "start", start, 1, size + 1) - 1
  count = core.integer("narrow", "count", count, 0, size - start)
  return window("narrow", t, lib.sa_tensor_narrow, dim, start, count)
end

--- A view at one index (1-based) of a dim, which goes.
function methods.select(t, dim, index)
  local handle = pointer(t, "select", "t")
  dim = core.dim("select", "dim", dim, handle.ndim)
  index = core.integer("select", "index", index, 1, tonumber(handle.shape[dim])) - 1
  return window("select", t, lib.sa_tensor_select, dim, index)
end

--- A view that repeats dims of size 1: t:expand(4, -1, 3); -1 keeps a dim's size, new dims may lead.
function methods.expand(t, ...)
  local handle = pointer(t, "expand", "t")
  local shape, ndim = core.shape("expand", "shape", as_list(...), -1)
  local out = view_of("expand", t, lib.sa_tensor_expand, ndim, shape)
  if autograd.wanted {t} then
    local from, from_ndim = shape_of(handle)
    autograd.record("expand", {out}, {t}, function(g)
      return {views.sum_to(g, from_ndim, from)}
    end)
  end
  return out
end

--- The same memory, unknown to the tape.
function methods.detach(t)
  local handle = pointer(t, "detach", "t")
  return view_of("detach", t, lib.sa_tensor_expand, handle.ndim, handle.shape)
end

local function identity(g)
  return {g}
end

--- A copy with memory of its own, contiguous.
function methods.clone(t)
  pointer(t, "clone", "t")
  local out = copy_of("clone", t)
  autograd.record("clone", {out}, {t}, identity)
  return out
end

--- t itself when it is contiguous, else a copy that is.
function methods.contiguous(t)
  if lib.sa_tensor_contiguous(pointer(t, "contiguous", "t")) then return t end
  local out = copy_of("contiguous", t)
  autograd.record("contiguous", {out}, {t}, identity)
  return out
end

local dtype_or_device = {dtype = true, device = true}

--- t as another dtype or on another device: t:to("f64"), t:to("cuda") or t:to{dtype = "bf16", device = "cpu"}. t itself
-- when it is all that already. Rounds to nearest even; floats become integers by truncation.
-- @return a tensor; nil and what is missing when there is no such device
function methods.to(t, target)
  local handle = pointer(t, "to", "t")
  local options = target
  if type(target) == "string" then
    options = core.dtypes[target] and {dtype = target} or {device = target}
    if not core.dtypes[target] and not target:find("^c") then
      fail("to", "target: got %s, wanted a dtype (%s) or a device", core.describe(target),
        core.alternatives(core.dtypes))
    end
  elseif type(target) ~= "table" or tensor.is(target) then
    fail("to", "target: got %s, wanted a dtype, a device or a table of both", core.describe(target))
  end
  core.options("to", options, dtype_or_device)
  local dtype = options.dtype == nil and handle.dtype or core.dtype("to", "dtype", options.dtype)
  local device, missing = handle.device, nil
  if options.device ~= nil then device, missing = core.device("to", "device", options.device) end
  if not device then return nil, missing end
  if dtype == handle.dtype and device == handle.device then return t end
  local out = tensor.new("to", dtype, device, handle.ndim, handle.shape)
  call("to", lib.sa_copy, out.handle, handle)
  if core.is_float[tonumber(dtype)] and autograd.wanted {t} then
    local back = {dtype = t.dtype, device = t.device}
    autograd.record("to", {out}, {t}, function(g) return {g:to(back)} end)
  end
  return out
end

-- Putting parts together

local function checked_list(fname, list)
  core.check_list(fname, "tensors", list, "a list of tensors")
  if #list == 0 then fail(fname, "tensors: got an empty list, wanted at least one tensor") end
  for i = 1, #list do
    local handle = pointer(list[i], fname, "tensors[" .. i .. "]")
    if handle.dtype ~= list[1].handle.dtype or handle.device ~= list[1].handle.device then
      fail(fname, "tensors[%d]: got %s, wanted the dtype and device of tensors[1], %s", i,
        tensor.describe_both(list[i], list[1]))
    end
  end
end

-- Copies every part into its place and records it; place(whole, i) is the view of part i.
local function assembled(fname, parts, ndim, shape, place)
  local first = parts[1].handle
  local whole = tensor.new(fname, first.dtype, first.device, ndim, shape)
  local n = #parts
  for i = 1, n do call(fname, lib.sa_copy, place(whole, i).handle, parts[i].handle) end
  autograd.record(fname, {whole}, parts, function(g)
    local pieces = {}
    for i = 1, n do pieces[i] = place(g, i) end
    return pieces
  end)
  return whole
end

--- Tensors put one behind the other along a dim (default 1); the other dims agree.
function views.cat(list, dim)
  checked_list("cat", list)
  local first = list[1].handle
  dim = core.dim("cat", "dim", dim == nil and 1 or dim, first.ndim)
  local shape, total, starts, counts = shape_of(first), 0, {}, {}
  for i = 1, #list do
    local handle = list[i].handle
    local agrees = handle.ndim == first.ndim
    for d = 0, first.ndim - 1 do agrees = agrees and (d == dim or handle.shape[d] == first.shape[d]) end
    if not agrees then
      fail("cat", "tensors[%d]: got %s, wanted the shape of tensors[1], %s, in all dims but %d", i,
        core.describe(list[i]), core.describe(list[1]), dim + 1)
    end
    starts[i], counts[i] = total, tonumber(handle.shape[dim])
    total = total + counts[i]
  end
  shape[dim] = total
  return assembled("cat", {unpack(list)}, first.ndim, shape, function(whole, i)
    return view_of("cat", whole, lib.sa_tensor_narrow, dim, starts[i], counts[i])
  end)
end

--- Tensors of one shape, put side by side along a new dim (default 1).
function views.stack(list, dim)
  checked_list("stack", list)
  local first = list[1].handle
  if first.ndim == lib.SA_MAX_DIMS then
    fail("stack", "tensors[1]: got %d dims, wanted less, as stack adds one", first.ndim)
  end
  dim = core.dim("stack", "dim", dim == nil and 1 or dim, first.ndim + 1)
  for i = 2, #list do
    if not tensor.alike(list[i].handle, first) then
      fail("stack", "tensors[%d]: got %s, wanted the shape of tensors[1], %s", i, core.describe(list[i]),
        core.describe(list[1]))
    end
  end
  local shape = ffi.new("int64_t[8]")
  for d = 0, first.ndim do
    shape[d] = d < dim and first.shape[d] or d == dim and #list or first.shape[d - 1]
  end
  return assembled("stack", {unpack(list)}, first.ndim + 1, shape, function(whole, i)
    return view_of("stack", whole, lib.sa_tensor_select, dim, i - 1)
  end)
end

return views
