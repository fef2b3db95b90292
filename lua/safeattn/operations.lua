--- arithmetic on tensors, recorded on the tape: elementwise, reductions, matmul and what a small model needs

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local views = require "safeattn.views"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call
local pointer, methods, new_handle = tensor.pointer, tensor.methods, tensor.handle
local record, wanted, sum_to = autograd.record, autograd.wanted, views.sum_to

local operations = {}

-- The tensor that f(...) of the C library makes of the empty handle `out`, one of its arguments. (Appending `out` here
-- would take unpack, which LuaJIT does not compile: 20 us a call.)
local function made(fname, out, f, ...)
  call(fname, f, ...)
  return tensor.adopt(out)
end

local function requires_grad(x)
  return tensor.is(x) and x.requires_grad
end

-- Elementwise, one operand

local function unary(fname, op)
  return function(x)
    local handle = pointer(x, fname, "x")
    local out = new_handle()
    local y = made(fname, out, lib.sa_unary, op, handle, out)
    if wanted {x} then
      record(fname, {y}, {x}, function(g)
        local dx = new_handle()
        return {made("backward", dx, lib.sa_unary_backward, op, handle, out, g.handle, dx)}
      end, {x, y})
    end
    return y
  end
end

--- -x, also written so.
operations.neg = unary("neg", lib.SA_NEG)
--- e^x.
operations.exp = unary("exp", lib.SA_EXP)
--- The natural logarithm: -inf at 0, NaN below.
operations.log = unary("log", lib.SA_LOG)
--- The square root; NaN below 0.
operations.sqrt = unary("sqrt", lib.SA_SQRT)
--- The hyperbolic tangent.
operations.tanh = unary("tanh", lib.SA_TANH)
--- max(x, 0).
operations.relu = unary("relu", lib.SA_RELU)
--- x times the normal distribution's share below x.
operations.gelu = unary("gelu", lib.SA_GELU)
--- The absolute value.
operations.abs = unary("abs", lib.SA_ABS)

-- Elementwise, two operands: tensors that broadcast, or a tensor and a number

-- Either operand may be a number.
local function combine(fname, op, a, b)
  local y = new_handle()
  if type(b) == "number" then
    return made(fname, y, lib.sa_binary_scalar, op, pointer(a, fname, "a"), b, false, y)
  elseif type(a) == "number" then
    return made(fname, y, lib.sa_binary_scalar, op, pointer(b, fname, "b"), a, true, y)
  end
  return made(fname, y, lib.sa_binary, op, pointer(a, fname, "a"), pointer(b, fname, "b"), y)
end

local function multiply(a, b) return combine("backward", lib.SA_MUL, a, b) end
local function divide(a, b) return combine("backward", lib.SA_DIV, a, b) end
local function negative(a)
  local y = new_handle()
  return made("backward", y, lib.sa_unary, lib.SA_NEG, a.handle, y)
end

-- A sum that leads back to an operand's shape, which the tape keeps instead of the operand.
local function shrink_to(x)
  local ndim, shape = x.handle.ndim, ffi.new("int64_t[8]", x.handle.shape)
  return function(g) return sum_to(g, ndim, shape) end
end

-- gradients(a, b, y) gives two functions of g, for a and for b, and a list of the tensors they read.
local function arithmetic(fname, op, gradients)
  return function(a, b)
    local y = combine(fname, op, a, b)
    if wanted {a, b} then
      local for_a, for_b, saved = gradients(a, b, y)
      local shrink_a, shrink_b = requires_grad(a) and shrink_to(a), requires_grad(b) and shrink_to(b)
      record(fname, {y}, {a, b}, function(g)
        return {shrink_a and shrink_a(for_a(g)), shrink_b and shrink_b(for_b(g))}
      end, saved)
    end
    return y
  end
end

local function same(g) return g end

--- a + b, also written so.
operations.add = arithmetic("add", lib.SA_ADD, function() return same, same end)
--- a - b, also written so.
operations.sub = arithmetic("sub", lib.SA_SUB, function() return same, negative end)
--- a * b, also written so.
operations.mul = arithmetic("mul", lib.SA_MUL, function(a, b)
  local read_a, read_b = requires_grad(b) and a, requires_grad(a) and b
  return function(g) return multiply(g, read_b) end, function(g) return multiply(g, read_a) end, {read_a, read_b, n = 2}
end)
--- a / b, also written so.
operations.div = arithmetic("div", lib.SA_DIV, function(_, b, y)
  local read_y = requires_grad(b) and y
  return function(g) return divide(g, b) end,
    function(g) return negative(divide(multiply(g, read_y), b)) end, {b, read_y, n = 2}
end)

local function comparison(fname, op)
  return function(a, b) return combine(fname, op, a, b) end
end

--- a < b, as a bool tensor; false where either is NaN.
operations.lt = comparison("lt", lib.SA_LT)
--- a <= b, as a bool tensor; false where either is NaN.
operations.le = comparison("le", lib.SA_LE)
--- a > b, as a bool tensor; false where either is NaN.
operations.gt = comparison("gt", lib.SA_GT)
--- a >= b, as a bool tensor; false where either is NaN.
operations.ge = comparison("ge", lib.SA_GE)
--- Whether a and b are equal, as a bool tensor; false where either is NaN.
operations.eq = comparison("eq", lib.SA_EQ)
--- Whether a and b differ, as a bool tensor; true where either is NaN.
operations.ne = comparison("ne", lib.SA_NE)

-- A tensor, or a number as a scalar tensor like `model`.
local function operand(fname, argument, x, model)
  if type(x) ~= "number" then
    pointer(x, fname, argument)
    return x
  end
  local scalar = tensor.new(fname, model.handle.dtype, model.handle.device, 0, nil)
  call(fname, lib.sa_fill, scalar.handle, x)
  return scalar
end

local function choose(fname, condition, a, b)
  local y = new_handle()
  return made(fname, y, lib.sa_where, condition.handle, a.handle, b.handle, y)
end

--- a where the bool tensor `condition` is true, else b; all three broadcast; a or b (not both) may be a number.
function operations.where(condition, a, b)
  pointer(condition, "where", "condition")
  if type(a) == "number" and type(b) == "number" then
    fail("where", "a: got two numbers, wanted a tensor for a or b, which says the dtype")
  end
  a = operand("where", "a", a, b)
  b = operand("where", "b", b, a)
  local y = choose("where", condition, a, b)
  if wanted {a, b} then
    local zero = operand("where", "a", 0, a)
    local shrink_a, shrink_b = requires_grad(a) and shrink_to(a), requires_grad(b) and shrink_to(b)
    record("where", {y}, {a, b}, function(g)
      return {shrink_a and shrink_a(choose("backward", condition, g, zero)),
        shrink_b and shrink_b(choose("backward", condition, zero, g))}
    end, {condition})
  end
  return y
end

--- x with the number `value` where the bool tensor `mask` (broadcast to x) is true.
function operations.masked_fill(x, mask, value)
  local handle, mask_handle = pointer(x, "masked_fill", "x"), pointer(mask, "masked_fill", "mask")
  core.number("masked_fill", "value", value)
  local lead = handle.ndim - mask_handle.ndim
  local fits = lead >= 0
  for d = 0, fits and mask_handle.ndim - 1 or -1 do
    fits = fits and (mask_handle.shape[d] == 1 or mask_handle.shape[d] == handle.shape[lead + d])
  end
  if not fits or mask_handle.dtype ~= lib.SA_BOOL or mask_handle.device ~= handle.device then
    fail("masked_fill", "mask: got %s, wanted a bool tensor that broadcasts to %s", tensor.describe_both(mask, x))
  end
  local y = choose("masked_fill", mask, operand("masked_fill", "value", value, x), x)
  if wanted {x} then
    local zero = operand("masked_fill", "value", 0, x)
    record("masked_fill", {y}, {x}, function(g) return {choose("backward", mask, zero, g)} end, {mask})
  end
  return y
end

-- Reductions

local keep_option = {keep = true}

-- Bits of the dims to reduce: nil is all, a number is one, a table several. Also the shape that keeps them as 1.
local function reduced_dims(fname, handle, dims)
  local ndim = handle.ndim
  local kept = ffi.new("int64_t[8]", handle.shape)
  local bits = 0
  local function take(dim)
    bits = bits + 2 ^ dim
    kept[dim] = 1
  end
  if dims == nil then
    for d = 0, ndim - 1 do take(d) end
  elseif core.is_plain(dims) then
    core.check_list(fname, "dims", dims, "a list of dims (options come after it)")
    for i = 1, #dims do
      local dim = core.dim(fname, "dims", dims[i], ndim)
      if bit.band(bits, 2 ^ dim) ~= 0 then fail(fname, "dims: got %d twice, wanted each dim once", dim + 1) end
      take(dim)
    end
  else
    take(core.dim(fname, "dims", dims, ndim))
  end
  return bits, kept
end

local function expanded(g, kept, ndim, shape)
  local out, wide = new_handle(), new_handle()
  if not lib.sa_tensor_contiguous(g.handle) then g = g:clone() end
  call("backward", lib.sa_tensor_view, out, g.handle, ndim, kept)
  local view = tensor.adopt(out)
  call("backward", lib.sa_tensor_expand, wide, view.handle, ndim, shape)
  return tensor.adopt(wide)
end

local function reduced(fname, op, handle, bits, keep)
  local y = new_handle()
  return made(fname, y, lib.sa_reduce, op, handle, bits, keep, y)
end

-- backward_of(x, y, spread, total) gives the function from g to the gradient of x, and what it reads. spread(t) brings
-- something of y's shape to x's, total(t) sums something of x's shape to y's.
local function reduction(fname, op, backward_of)
  return function(x, dims, options)
    local handle = pointer(x, fname, "x")
    local bits, kept = reduced_dims(fname, handle, dims)
    options = core.options(fname, options, keep_option)
    local keep = core.boolean(fname, "keep", options.keep, false)
    local y = reduced(fname, op, handle, bits, keep)
    if wanted {x} then
      local ndim, shape = handle.ndim, ffi.new("int64_t[8]", handle.shape)
      local backward, saved = backward_of(x, y, function(t) return expanded(t, kept, ndim, shape) end,
        function(t) return reduced("backward", lib.SA_SUM, t.handle, bits, keep) end)
      record(fname, {y}, {x}, function(g) return {backward(g)} end, saved)
    end
    return y
  end
end

--- The sum of everything (x:sum()), over a dim (x:sum(2)) or over several (x:sum{1, -1}); the dims go, unless the
-- option keep leaves them as 1: x:sum(2, {keep = true}).
operations.sum = reduction("sum", lib.SA_SUM, function(_, _, spread)
  return spread
end)

--- The mean; dims and options as in sum.
operations.mean = reduction("mean", lib.SA_MEAN, function(x, y, spread)
  local count = x:numel() / y:numel()
  return function(g) return spread(divide(g, count)) end
end)

local function extreme(x, y, spread, total)
  return function(g)
    local hits = operations.eq(x, spread(y)):to(x.dtype)
    return multiply(hits, spread(divide(g, total(hits))))
  end, {x, y}
end

--- The largest; dims and options as in sum. NaN wins; equal extremes share the gradient.
operations.max = reduction("max", lib.SA_MAX, extreme)
--- The smallest; dims and options as in sum. NaN wins; equal extremes share the gradient.
operations.min = reduction("min", lib.SA_MIN, extreme)

--- Where the largest element of a dim is: i64, 1-based, the first of equals. Without a dim: its place in row-major
-- order.
function operations.argmax(x, dim, options)
  local handle = pointer(x, "argmax", "x")
  options = core.options("argmax", options, keep_option)
  local keep = core.boolean("argmax", "keep", options.keep, false)
  if dim == nil then
    if keep then fail("argmax", "keep: got true without a dim, wanted a dim too") end
    local flat = methods.view(methods.contiguous(methods.detach(x)), -1)
    return operations.add(reduced("argmax", lib.SA_ARGMAX, flat.handle, 1, false), 1)
  end
  dim = core.dim("argmax", "dim", dim, handle.ndim)
  return operations.add(reduced("argmax", lib.SA_ARGMAX, handle, 2 ^ dim, keep), 1)
end

-- Products

local function transposed(t)
  return methods.transpose(t, -1, -2)
end

-- All dims but the last as one.
local function rows(t)
  local handle, count = t.handle, 1
  for d = 0, handle.ndim - 2 do count = count * tonumber(handle.shape[d]) end
  return methods.view(methods.contiguous(t), count, tonumber(handle.shape[handle.ndim - 1]))
end

--- Matrix product [..,M,K] x [..,K,N] of floats; the leading dims broadcast.
function operations.matmul(a, b)
  local left, right = pointer(a, "matmul", "a"), pointer(b, "matmul", "b")
  local out = new_handle()
  local y = made("matmul", out, lib.sa_matmul, left, right, out)
  if wanted {a, b} then
    local shrink_a, shrink_b = requires_grad(a) and shrink_to(a), requires_grad(b) and shrink_to(b)
    local read_a, read_b = shrink_b and a, shrink_a and b
    local one_matrix = right.ndim == 2
    record("matmul", {y}, {a, b}, function(g)
      local da = shrink_a and shrink_a(operations.matmul(g, transposed(read_b)))
      local db
      if shrink_b and one_matrix then
        -- one product over all rows, instead of one per batch and a sum of them
        db = operations.matmul(transposed(rows(read_a)), rows(g))
      elseif shrink_b then
        db = shrink_b(operations.matmul(transposed(read_a), g))
      end
      return {da, db}
    end, {read_a, read_b, n = 2})
  end
  return y
end

-- Layers

local epsilon_option = {epsilon = true}

--- (x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim of x.
-- @param x [..,n]
-- @param weight [n], or nil
-- @param bias [n], or nil
-- @param options epsilon (1e-5)
function operations.layernorm(x, weight, bias, options)
  local handle = pointer(x, "layernorm", "x")
  local weight_handle = weight ~= nil and pointer(weight, "layernorm", "weight") or nil
  local bias_handle = bias ~= nil and pointer(bias, "layernorm", "bias") or nil
  options = core.options("layernorm", options, epsilon_option)
  local epsilon = options.epsilon == nil and 1e-5 or core.number("layernorm", "epsilon", options.epsilon)
  if not (epsilon >= 0 and epsilon < math.huge) then
    fail("layernorm", "epsilon: got %s, wanted a finite number of at least 0", core.describe(epsilon))
  end
  local out = new_handle()
  local y = made("layernorm", out, lib.sa_layernorm, handle, weight_handle, bias_handle, epsilon, out)
  if wanted {x, weight, bias, n = 3} then
    local has_x, has_weight, has_bias = requires_grad(x), requires_grad(weight), requires_grad(bias)
    record("layernorm", {y}, {x, weight, bias, n = 3}, function(g)
      local dx = has_x and new_handle() or nil
      local dweight = has_weight and new_handle() or nil
      local dbias = has_bias and new_handle() or nil
      call("backward", lib.sa_layernorm_backward, handle, weight_handle, epsilon, g.handle, dx, dweight, dbias)
      return {dx and tensor.adopt(dx), dweight and tensor.adopt(dweight), dbias and tensor.adopt(dbias)}
    end, {x, weight or false})
  end
  return y
end

-- Ids count from 1 here; C reports them as they came when it is told so.
local ID_BASE = 1

--- Rows of `table` [n,..] by ids (i32 or i64, from 1): [ids..,..].
function operations.embedding(table, ids)
  local handle, id_handle = pointer(table, "embedding", "table"), pointer(ids, "embedding", "ids")
  local out = new_handle()
  local y = made("embedding", out, lib.sa_embedding, handle, id_handle, ID_BASE, out)
  if wanted {table} then
    local ndim, shape = handle.ndim, ffi.new("int64_t[8]", handle.shape)
    local dtype, device = handle.dtype, handle.device
    record("embedding", {y}, {table}, function(g)
      local dtable = tensor.new("backward", dtype, device, ndim, shape)
      call("backward", lib.sa_embedding_backward, id_handle, ID_BASE, g.handle, dtable.handle)
      return {dtable}
    end, {ids})
  end
  return y
end

local cross_entropy_options = {ignore = true, reduction = true}
local NO_ID = ffi.new("int64_t", -2 ^ 63)

--- -log softmax(x)[id] per row of x.
-- @param x [..,n]
-- @param ids [..], i32 or i64, from 1
-- @param options reduction: "mean" over the rows that count (default; 0 when there are none), "sum" or "none";
--   ignore: an id whose rows do not count
function operations.cross_entropy(x, ids, options)
  local handle, id_handle = pointer(x, "cross_entropy", "x"), pointer(ids, "cross_entropy", "ids")
  options = core.options("cross_entropy", options, cross_entropy_options)
  local reduction_name = options.reduction == nil and "mean" or options.reduction
  if reduction_name ~= "mean" and reduction_name ~= "sum" and reduction_name ~= "none" then
    fail("cross_entropy", 'reduction: got %s, wanted "mean", "sum" or "none"', core.describe(reduction_name))
  end
  local ignore = NO_ID
  if options.ignore ~= nil then
    ignore = core.integer("cross_entropy", "ignore", options.ignore, -2 ^ 53, 2 ^ 53)
  end
  local out = new_handle()
  local losses = made("cross_entropy", out, lib.sa_cross_entropy, handle, id_handle, ID_BASE, ignore, out)
  if wanted {x} then
    record("cross_entropy", {losses}, {x}, function(g)
      local dx = new_handle()
      return {made("backward", dx, lib.sa_cross_entropy_backward, handle, id_handle, ID_BASE, ignore, g.handle, dx)}
    end, {x, ids})
  end
  if reduction_name == "none" then return losses end
  local total = operations.sum(losses)
  if reduction_name == "sum" then return total end
  local counted = losses:numel()
  if options.ignore ~= nil then
    counted = operations.sum(operations.ne(ids, ignore):to("f64")):item()
  end
  return operations.div(total, math.max(counted, 1))
end

-- As methods and operators

for name, operation in pairs(operations) do methods[name] = operation end

local Tensor = tensor.metatable
Tensor.__add, Tensor.__sub, Tensor.__mul, Tensor.__div = operations.add, operations.sub, operations.mul, operations.div
Tensor.__unm = function(x) return operations.neg(x) end

return operations
