-- what the specs share: module paths, assertions on tensors, poisoned outputs, ISA tiers and threads

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path

local ffi = require "ffi"
local assert = require "luassert"
local sa = require "safeattn"
local assertions = require "safeattn.assertions"

local helper = {}

-- Assertions

helper.difference, helper.bit_difference = assertions.difference, assertions.bit_difference

--- assert.tensor.same(got, want): equal values of any dtypes, NaN where NaN is wanted
assert:register("assertion", "tensor_same", function(state, arguments)
  local problem = assertions.difference(arguments[1], arguments[2], {nonfinite = "same"})
  state.failure_message = problem
  return not problem
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
