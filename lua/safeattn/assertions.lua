--- Assertions on tensors, for busted suites: `require "safeattn.assertions"` in a spec or a helper.
-- Adds to `assert`: `tensor.near`, `tensor.equal`, `tensor.bitwise`, `tensor.finite`, `tensor.zero`, `tensor.shape`,
-- `tensor.dtype`, `gradients` and `masked_safe`, and prints tensors in messages. All can be negated
-- (`assert.is_not.tensor.near(...)`); a comparison with a NaN, or of two shapes, raises then, for it would pass by
-- mistake. examples/spec/ is a suite to copy.
-- @module safeattn.assertions

local assert = require "luassert"
local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local gradcheck = require "safeattn.gradcheck"
local compare = require "safeattn.assertions.compare"
local hidden = require "safeattn.assertions.hidden"

local assertions = {difference = compare.difference, bit_difference = compare.bit_difference}

local describe = core.describe

-- check(negated, ...) gives nil when the assertion holds, else why not; and, second, what is wrong with its arguments.
local function register(name, check)
  local text = "assert." .. name:gsub("^tensor_", "tensor.")
  assert:register("assertion", name, function(state, arguments, level)
    local negated = not state.mod
    local problem, mistake = check(negated, unpack(arguments, 1, arguments.n))
    if mistake then error(text .. ": " .. mistake, (level or 1) + 1) end
    state.failure_message = problem or text .. ": holds, and should not, for\n" .. tostring((arguments[1]))
    return not problem
  end)
end

local comparing = {atol = true, rtol = true, nonfinite = true}

-- What is wrong with two things to be compared; with no NaN allowed, also those.
local function operands(negated, got, want, options)
  for n, name in ipairs {"got", "want"} do
    local x
    if n == 1 then x = got else x = want end
    local t = compare.as_tensor(x)
    if not t then return name .. ": got " .. describe(x) .. ", wanted a tensor, nested tables or a number" end
    if t:stats().nan > 0 and not (options and options.nonfinite == "same") then
      return name .. ': holds a NaN, which agrees with nothing; say nonfinite = "same" when it is meant\n'
        .. tostring(t)
    end
  end
  if negated and not compare.same_shape(compare.as_tensor(got), compare.as_tensor(want)) then
    return "got and want have different shapes, so that is_not says nothing of their elements"
  end
end

local function check_options(options)
  if options == nil then return nil end
  if type(options) ~= "table" then return "options: got " .. describe(options) .. ", wanted a table" end
  for name, value in pairs(options) do
    if not comparing[name] then
      return "options: got unknown option " .. describe(name) .. ", wanted " .. core.alternatives(comparing)
    elseif name == "nonfinite" and value ~= "same" then
      return "nonfinite: got " .. describe(value) .. ', wanted "same"'
    elseif name ~= "nonfinite" and not (type(value) == "number" and value >= 0) then
      return name .. ": got " .. describe(value) .. ", wanted a number of at least 0"
    end
  end
end

--- assert.tensor.near(got, want, options): |got - want| <= atol + rtol |want| everywhere, and equal infinities.
-- @function assert.tensor.near
-- @param got a tensor, nested tables or a number
-- @param want likewise, of the same shape; dtypes may differ
-- @param options atol (0), rtol (0); nonfinite = "same": NaN agrees with NaN, where a NaN is an error otherwise
register("tensor_near", function(negated, got, want, options)
  local mistake = check_options(options) or operands(negated, got, want, options)
  if mistake then return nil, mistake end
  return compare.difference(got, want, options)
end)

--- assert.tensor.equal(got, want): equal values (-0 equals 0) in one dtype.
-- @function assert.tensor.equal
-- @param got a tensor
-- @param want a tensor, or nested tables or a number of any dtype
-- @param options nonfinite = "same": NaN agrees with NaN
register("tensor_equal", function(negated, got, want, options)
  local mistake = check_options(options) or operands(negated, got, want, options)
  if mistake then return nil, mistake end
  if tensor.is(got) and tensor.is(want) and got.dtype ~= want.dtype then
    return "got " .. describe(got) .. ", wanted " .. describe(want)
  end
  return compare.difference(got, want, {nonfinite = options and options.nonfinite})
end)

local function must_be_tensor(name, x)
  if not tensor.is(x) then return name .. ": got " .. describe(x) .. ", wanted a tensor" end
end

--- assert.tensor.bitwise(got, want): the same dtype, shape and bits; tells -0 from 0, and takes a NaN for itself.
-- @function assert.tensor.bitwise
register("tensor_bitwise", function(_, got, want)
  local mistake = must_be_tensor("got", got) or must_be_tensor("want", want)
  if mistake then return nil, mistake end
  return compare.bit_difference(got, want)
end)

-- The first element that is not as wanted, as text.
local function first(t, wanted, what)
  local flat = t:detach():contiguous():view(-1)
  for n = 1, flat:numel() do
    local value = tonumber(flat:get(n)) or flat:get(n)
    if not wanted(value) then
      return ("%s at %s is %s, wanted %s\n%s"):format(describe(t), compare.place(n - 1, t.shape), describe(value), what,
        tostring(t))
    end
  end
end

--- assert.tensor.finite(t): no NaN, no Inf.
-- @function assert.tensor.finite
register("tensor_finite", function(_, t)
  local mistake = must_be_tensor("t", t)
  if mistake then return nil, mistake end
  local stats = t:stats()
  if stats.nan + stats.posinf + stats.neginf == 0 then return nil end
  return ("%d NaN, %d Inf, %d -Inf; the first: "):format(stats.nan, stats.posinf, stats.neginf)
    .. first(t, function(x) return type(x) == "boolean" or x - x == 0 end, "a finite number")
end)

--- assert.tensor.zero(t): every element is 0 (or -0, or false).
-- @function assert.tensor.zero
register("tensor_zero", function(negated, t)
  local mistake = must_be_tensor("t", t)
  if mistake then return nil, mistake end
  if negated and t:stats().nan > 0 then
    return nil, "t: holds a NaN, of which is_not says nothing\n" .. tostring(t)
  end
  return first(t, function(x) return x == 0 or x == false end, "0")
end)

--- assert.tensor.shape(t, shape)
-- @function assert.tensor.shape
register("tensor_shape", function(_, t, shape)
  local mistake = must_be_tensor("t", t)
    or (type(shape) ~= "table" or tensor.is(shape)) and "shape: got " .. describe(shape) .. ", wanted a list of counts"
  if mistake then return nil, mistake end
  if table.concat(t.shape, ",") ~= table.concat(shape, ",") then
    return ("got %s, wanted the shape [%s]"):format(describe(t), table.concat(shape, ","))
  end
end)

--- assert.tensor.dtype(t, name)
-- @function assert.tensor.dtype
register("tensor_dtype", function(_, t, name)
  local mistake = must_be_tensor("t", t)
    or not core.dtypes[name] and "name: got " .. describe(name) .. ", wanted " .. core.alternatives(core.dtypes)
  if mistake then return nil, mistake end
  if t.dtype ~= name then return ("got %s, wanted %s"):format(describe(t), name) end
end)

--- assert.gradients(fn, inputs, opts): the tape's gradients of fn agree with differences, as `safeattn.gradcheck` says.
-- @function assert.gradients
register("gradients", function(negated, fn, inputs, options)
  local called, agrees, report = pcall(gradcheck, fn, inputs, options)
  if not called then return nil, tostring(agrees) end
  if agrees then return nil end
  local worst = report.worst
  if negated and worst and (worst.error ~= worst.error or worst.error == math.huge) then
    return nil, "a gradient or a difference is not finite, so that is_not says nothing of it\n" .. tostring(report)
  end
  return tostring(report)
end)

--- assert.masked_safe(fn, inputs, mask): what the mask hides has no influence. Queries that see no key, keys that no
-- query sees, gradients of dead rows and masked places of a bias are filled with NaN, Inf and junk: output and
-- gradients must keep their bits. Then single keys get NaN: what does not see them must keep its bits.
-- @function assert.masked_safe
-- @param fn function of the inputs, deterministic; its first result is the output
-- @param inputs {q, k, v}, then a bias [..,L,S] if there is one, then whatever else fn takes
-- @param mask the mask that fn applies
register("masked_safe", function(_, fn, inputs, mask)
  return hidden.influence(fn, inputs, mask)
end)

assert:add_formatter(function(x)
  if tensor.is(x) then return tostring(x) end
end)

return assertions
