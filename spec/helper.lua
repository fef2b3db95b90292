-- what the specs share: module paths, assertions on tensors, poisoned outputs, ISA tiers and threads, devices

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

--- Calls fn(...), which must raise; gives the message without its position, and without the device under test.
function helper.message_of(fn, ...)
  local succeeded, problem = pcall(fn, ...)
  assert(not succeeded, "expected an error")
  local message = tostring(problem):gsub("^[^\n]-:%d+: ", "")
  return helper.device == "cpu" and message or (message:gsub(" on cuda:%d", ""))
end

-- Devices

--- The device that the specs of tensors and operations run on: SAFEATTN_TEST_DEVICE, "cpu" unless given.
helper.device = os.getenv "SAFEATTN_TEST_DEVICE" or "cpu"
_G.assert(sa.synchronize(helper.device))

--- safeattn, with constructors that make tensors on that device unless they are told another.
helper.sa = sa
if helper.device ~= "cpu" then
  helper.sa = setmetatable({}, {__index = sa})
  -- Where the options are among the arguments.
  for name, place in pairs {empty = 2, zeros = 2, ones = 2, full = 3, rand = 2, randn = 2, arange = 2, tensor = 2} do
    local make = sa[name]
    helper.sa[name] = function(...)
      local arguments, count = {...}, math.max(select("#", ...), place)
      local options = arguments[place]
      if options == nil or (type(options) == "table" and getmetatable(options) == nil and options.device == nil) then
        arguments[place] = {device = helper.device}
        for option, value in pairs(options or {}) do arguments[place][option] = value end
      end
      return make(unpack(arguments, 1, count))
    end
  end
end

--- Why there is no CUDA device, or nil when there is one.
function helper.no_cuda()
  local devices, why = sa.devices()
  return #devices < 2 and why or nil
end

--- A describe of what needs a CUDA device. Without one it is pending, visibly; SAFEATTN_REQUIRE_CUDA=1 makes it fail.
function helper.describe_cuda(name, fn)
  local busted = require "busted"
  local why = helper.no_cuda()
  busted.describe(name .. " #gpu", function()
    if not why then return fn() end
    if os.getenv "SAFEATTN_REQUIRE_CUDA" ~= "1" then return busted.pending("wants a CUDA device, but " .. why) end
    busted.it("wants a CUDA device", function() error("SAFEATTN_REQUIRE_CUDA is set, but " .. why, 0) end)
  end)
end

-- Outputs

--- A tensor to be written, filled with NaN (-1 in the integer types, true in bool), inside memory that must stay
-- untouched.
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

--- What count() gives once nothing more is collected: what a finalizer held goes a cycle later, and what other specs
-- left must not go between two counts.
function helper.settled(count)
  local last
  repeat
    last = count()
    collectgarbage()
    collectgarbage()
  until count() == last
  return last
end

return helper
