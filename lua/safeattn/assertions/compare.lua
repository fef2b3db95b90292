--- where two tensors differ, as text that names the worst element

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local create = require "safeattn.create"
local contents = require "safeattn.contents"

local ffi = core.ffi
local double_at = contents.double_at

local compare = {}

ffi.cdef 'int safeattn_memcmp(const void *, const void *, size_t) __asm__("memcmp");'

--- 1-based indices of the n-th element (from 0) in row-major order, as text.
function compare.place(n, shape)
  return "[" .. table.concat(contents.index_of(n, shape), ",") .. "]"
end
local place = compare.place

--- A tensor of what may be given as one: a tensor, nested tables, a number or a boolean; nil for anything else.
function compare.as_tensor(x)
  if tensor.is(x) then return x end
  local kind = type(x)
  if kind ~= "table" and kind ~= "number" and kind ~= "boolean" then return nil end
  local made, result = pcall(create.tensor, x)
  if not made then return nil end
  return result.dtype == "bool" and result or create.tensor(x, {dtype = "f64"})
end

function compare.same_shape(a, b)
  return table.concat(a.shape, ",") == table.concat(b.shape, ",")
end

--- What of `got` is not within atol + rtol |want| of `want`, as text, or nil. Infinities must be equal. A NaN in either
-- differs from everything; with nonfinite = "same", NaN agrees with NaN.
-- @param got a tensor, nested tables or a number
-- @param want likewise
-- @param options atol (0), rtol (0), nonfinite
function compare.difference(got, want, options)
  got, want, options = compare.as_tensor(got), compare.as_tensor(want), options or {}
  if not compare.same_shape(got, want) then
    return tostring(got) .. "\nhas not the shape of\n" .. tostring(want)
  end
  local shape = got.shape
  local exact = {dtype = "f64", device = "cpu"}
  local a, b = got:detach():to(exact):contiguous(), want:detach():to(exact):contiguous()
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
  local problem = count > 0 and string.format(
    "%d of %d elements differ (atol %g, rtol %g); the worst at %s: got %.17g, wanted %.17g", count, a:numel(), atol,
    rtol, place(worst, shape), double_at(x, worst), double_at(y, worst)) or nil
  a:free() b:free()
  return problem
end

--- The first element whose bits differ, as text, or nil.
-- @param got a tensor
-- @param want likewise
-- @param skip function(n) of the element's number from 0: true where no agreement is asked for
function compare.bit_difference(got, want, skip)
  if got.dtype ~= want.dtype or not compare.same_shape(got, want) then
    return string.format("got %s, wanted %s", core.describe(got), core.describe(want))
  end
  local a, b = got:detach():to("cpu"):contiguous(), want:detach():to("cpu"):contiguous()
  local x, y = a:data(), b:data()
  local p, q = ffi.cast("const char *", x), ffi.cast("const char *", y)
  local size = ffi.cast("const char *", x + 1) - p
  for n = 0, a:numel() - 1 do
    if ffi.C.safeattn_memcmp(p + n * size, q + n * size, size) ~= 0 and not (skip and skip(n)) then
      return string.format("the bits differ first at %s: got %s, wanted %s", place(n, got.shape),
        tostring(a:view(-1):get(n + 1)), tostring(b:view(-1):get(n + 1)))
    end
  end
end

return compare
