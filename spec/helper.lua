-- what the specs share: module paths, assertions on tensors, poisoned outputs, ISA tiers and threads

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path

local ffi = require "ffi"
local assert = require "luassert"
local sa = require "safeattn"
local tensor = require "safeattn.tensor"
local double_at = require("safeattn.contents").double_at

ffi.cdef "int memcmp(const void *, const void *, size_t);"

local helper = {}

-- Assertions

-- 1-based indices of the n-th element (from 0) in row-major order, as text.
local function place(n, shape)
  local index = {}
  for d = #shape, 1, -1 do
    index[d] = n % shape[d] + 1
    n = math.floor(n / shape[d])
  end
  return "[" .. table.concat(index, ",") .. "]"
end

-- A tensor of what a test may give as one: a tensor, nested tables or a number.
local function as_tensor(x)
  if tensor.is(x) then return x end
  return sa.tensor(x, {dtype = type(x) == "boolean" and "bool" or "f64"})
end

local function same_shape(a, b)
  return table.concat(a.shape, ",") == table.concat(b.shape, ",")
end

-- What of `got` is not within atol + rtol |want| of `want`, as text, or nil. Infinities must be equal. A NaN in either
-- differs from everything; with nonfinite = "same", NaN agrees with NaN.
function helper.difference(got, want, options)
  got, want, options = as_tensor(got), as_tensor(want), options or {}
  if not same_shape(got, want) then return tostring(got) .. "\nhas not the shape of\n" .. tostring(want) end
  local shape = got.shape
  local a, b = got:detach():to("f64"):contiguous(), want:detach():to("f64"):contiguous()
  local x, y = a:data(), b:data()
  local atol, rtol, nan_agrees = options.atol or 0, options.rtol or 0, options.nonfinite == "same"
  local count, worst, worst_excess = 0, 0, -1
  for n = 0, a:numel() - 1 do
    local g, w = double_at(x, n), double_at(y, n)
    local excess = math.abs(g - w) - (atol + rtol * math.abs(w))
    local agrees = excess <= 0 or g == w -- both false when either is NaN
    if not agrees and not (nan_agrees and g ~= g and w ~= w) then
      count = count + 1
      if excess ~= excess then excess = math.huge end
      if excess > worst_excess then worst, worst_excess = n, excess end
    end
  end
  if count == 0 then return nil end
  return string.format("%d of %d elements differ (atol %g, rtol %g); the worst at %s: got %.17g, wanted %.17g", count,
    a:numel(), atol, rtol, place(worst, shape), double_at(x, worst), double_at(y, worst))
end

-- The first element whose bits differ, as text, or nil.
function helper.bit_difference(got, want)
  if got.dtype ~= want.dtype or not same_shape(got, want) then
    return string.format("got %s%s, wanted %s%s", got.dtype, place(0, got.shape), want.dtype, place(0, want.shape))
  end
  local a, b = got:detach():contiguous(), want:detach():contiguous()
  local x, y = a:data(), b:data()
  local p, q = ffi.cast("const char *", x), ffi.cast("const char *", y)
  local size = ffi.cast("const char *", x + 1) - p
  for n = 0, a:numel() - 1 do
    if ffi.C.memcmp(p + n * size, q + n * size, size) ~= 0 then
      return string.format("the bits differ first at %s: got %s, wanted %s", place(n, got.shape),
        tostring(a:view(-1):get(n + 1)), tostring(b:view(-1):get(n + 1)))
    end
  end
end

local function register(name, check, message)
  assert:register("assertion", "tensor_" .. name, function(state, arguments)
    local problem = check(unpack(arguments, 1, arguments.n))
    state.failure_message = problem
    return not problem
  end, message, message)
end

-- A negated assertion must not pass because of a NaN that slipped in.
local function finite(x)
  local stats = as_tensor(x):stats()
  if stats.nan > 0 then error("a NaN in an operand of tensor.near: say nonfinite = \"same\" when it is meant", 0) end
end

--- assert.tensor.near(got, want, {atol =, rtol =, nonfinite = "same"})
register("near", function(got, want, options)
  if not (options and options.nonfinite == "same") then
    finite(got)
    finite(want)
  end
  return helper.difference(got, want, options)
end, "assertion.tensor_near")

--- assert.tensor.same(got, want): equal values, NaN where NaN is wanted
register("same", function(got, want)
  return helper.difference(got, want, {nonfinite = "same"})
end, "assertion.tensor_same")

--- assert.tensor.bitwise(got, want)
register("bitwise", helper.bit_difference, "assertion.tensor_bitwise")

local say = require "say"
for _, name in ipairs {"near", "same", "bitwise"} do
  say:set("assertion.tensor_" .. name, "Expected tensors to agree (" .. name .. ").\nGot:\n%s\nWanted:\n%s")
end

assert:add_formatter(function(x)
  if tensor.is(x) then return tostring(x) end
end)

--- Calls fn(...), which must raise; gives the message without its position.
function helper.message_of(fn, ...)
  local succeeded, problem = pcall(fn, ...)
  assert(not succeeded, "expected an error")
  return (tostring(problem):gsub("^[^\n]-:%d+: ", ""))
end

-- Outputs

--- A tensor to be written, filled with NaN (0x7f bytes in the integer types), inside memory that must stay untouched.
-- @return the tensor; a function that raises when anything around it was written
function helper.poisoned(shape, dtype)
  local margin, count = 64, 1
  for _, size in ipairs(shape) do count = count * size end
  local whole = sa.empty({count + 2 * margin}, {dtype = dtype})
  local bytes = ffi.cast("uint8_t *", whole:data())
  local size = tonumber(ffi.cast("uint8_t *", whole:data() + 1) - bytes)
  ffi.fill(bytes, (count + 2 * margin) * size, 0xA5)
  local inside = whole:narrow(1, margin + 1, count)
  ffi.fill(bytes + margin * size, count * size, dtype == "bool" and 1 or 0xFF)
  return inside:view(shape), function()
    for n = 0, (count + 2 * margin) * size - 1 do
      if (n < margin * size or n >= (margin + count) * size) and bytes[n] ~= 0xA5 then
        error(string.format("byte %d %s was written", n < margin * size and margin * size - n
          or n - (margin + count) * size, n < margin * size and "before the output" or "behind the output"), 2)
      end
    end
    return whole
  end
end

-- Tiers

--- Calls fn(isa) under every instruction set that this machine has.
function helper.each_isa(fn)
  for _, isa in ipairs(sa.info().isas) do
    assert.equal(isa, sa.isa(isa))
    local succeeded, problem = pcall(fn, isa)
    sa.isa("auto")
    if not succeeded then error(type(problem) == "string" and isa .. ": " .. problem or problem, 0) end
  end
end

--- Calls fn() with n threads.
function helper.with_threads(n, fn)
  local before = sa.threads()
  sa.threads(n)
  local succeeded, problem = pcall(fn)
  sa.threads(before)
  if not succeeded then error(problem, 0) end
end

return helper
