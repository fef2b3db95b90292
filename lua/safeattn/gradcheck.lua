-- compares the gradients of the tape with central differences, element by element

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local create = require "safeattn.create"
local contents = require "safeattn.contents"

local fail = core.fail

local option_names = {eps = true, atol = true, rtol = true}

local Report = {}
Report.__index = Report
Report.describe = function() return "a gradcheck report" end

function Report.__tostring(report)
  local line = string.format("gradcheck %s: %d of %d elements differ", report.ok and "passed" or "FAILED",
    report.failed, report.checked)
  local worst = report.worst
  if not worst then return line end
  return line .. string.format(
    "\nworst: input %d, element [%s]: analytic %.10g, numeric %.10g, error %.3g, allowed %.3g",
    worst.input, table.concat(worst.index, ","), worst.analytic, worst.numeric, worst.error, worst.allowed)
end

-- The tensors among the results of fn; sdpa, for one, returns a table behind its output.
local function tensors_of(...)
  local list = {}
  for i = 1, select("#", ...) do
    local result = select(i, ...)
    if tensor.is(result) and core.is_float[result.handle.dtype] then list[#list + 1] = result end
  end
  if #list == 0 then
    fail("gradcheck", nil, "fn: got a function that returned %s, wanted a float tensor first", core.describe((...)))
  end
  return list
end

-- What is differentiated: all outputs, each weighted by random numbers that do not change between calls.
local function weighted_sum(outputs)
  local total
  for i, out in ipairs(outputs) do
    local weights = create.randn(out.shape, {dtype = "f64", seed = 7000 + i})
    local part = (out:to("f64") * weights):sum()
    total = total and total + part or part
  end
  return total
end

local function number(options, name, default)
  local value = options[name]
  if value == nil then return default end
  if type(value) ~= "number" or not (value >= 0 and value < math.huge) or (name == "eps" and value == 0) then
    fail("gradcheck", nil, "%s: got %s, wanted a %s number", name, core.describe(value),
      name == "eps" and "positive finite" or "finite, not negative")
  end
  return value
end

-- f64 copies of the float inputs, which require grad; other things are passed as they are.
local function promoted(inputs)
  local copies, checked = {}, {}
  for i = 1, table.maxn(inputs) do
    local x = inputs[i]
    if tensor.is(x) and core.is_float[tensor.pointer(x, "gradcheck", "inputs[" .. i .. "]").dtype] then
      local copy = x:detach():to("f64"):clone()
      copy.requires_grad = true
      copies[i], checked[#checked + 1] = copy, i
    else
      copies[i] = x
    end
  end
  if #checked == 0 then fail("gradcheck", nil, "inputs: got no float tensor, wanted at least one") end
  return copies, checked
end

-- 1-based indices of the n-th element (from 0) in row-major order.
local function index_of(n, shape)
  local index = {}
  for d = #shape, 1, -1 do
    index[d] = n % shape[d] + 1
    n = math.floor(n / shape[d])
  end
  return index
end

local function put(x, index, value)
  local arguments = {unpack(index)}
  arguments[#arguments + 1] = value
  x:set(unpack(arguments))
end

--- Compares the gradients that fn's tape gives with central differences in f64, for every element of every float input.
-- @param fn function of the inputs; its float tensor results are checked
-- @param inputs a list; float tensors are passed as f64 copies, everything else as it is
-- @param options eps (1e-6): the step; atol (1e-5), rtol (1e-3): |analytic - numeric| <= atol + rtol |numeric|. What is
--   not finite fails
-- @return whether all agree; a report: ok, checked, failed, worst {input, index, analytic, numeric, error, allowed}
return function(fn, inputs, options)
  if type(fn) ~= "function" then fail("gradcheck", nil, "fn: got %s, wanted a function", core.describe(fn)) end
  if type(inputs) ~= "table" or tensor.is(inputs) then
    fail("gradcheck", nil, "inputs: got %s, wanted a list of tensors", core.describe(inputs))
  end
  options = core.options("gradcheck", options, option_names)
  local eps, atol, rtol = number(options, "eps", 1e-6), number(options, "atol", 1e-5), number(options, "rtol", 1e-3)
  local n = table.maxn(inputs)
  local copies, checked = promoted(inputs)

  local function weigh()
    return weighted_sum(tensors_of(fn(unpack(copies, 1, n))))
  end

  local total = weigh()
  if total.requires_grad then total:backward() end

  local report = setmetatable({ok = true, checked = 0, failed = 0, worst = false}, Report)
  local function compare(input, index, analytic, numeric)
    local difference, allowed = math.abs(analytic - numeric), atol + rtol * math.abs(numeric)
    report.checked = report.checked + 1
    local agrees = difference <= allowed
    if not agrees then report.ok, report.failed = false, report.failed + 1 end
    -- in units of what is allowed; what is not finite is worse than any number
    local badness = difference / allowed
    if badness ~= badness then badness = agrees and 0 or math.huge end
    if not report.worst or badness > report.worst.badness then
      report.worst = {input = input, index = index, analytic = analytic, numeric = numeric, error = difference,
        allowed = allowed, badness = badness}
    end
  end

  autograd.no_grad(function()
    if not contents.allclose(weigh(), total, {atol = 0, rtol = 0, equal_nan = true}) then
      fail("gradcheck", nil, "fn: got a function that gives different results for the same inputs, wanted one that"
        .. " depends on them alone (dropout needs a seed)")
    end
    for _, i in ipairs(checked) do
      local x = copies[i]
      local shape, gradient = x.shape, x.gradient
      for place = 0, x:numel() - 1 do
        local index = index_of(place, shape)
        local value = x:get(unpack(index))
        local upper, lower = value + eps, value - eps
        put(x, index, upper)
        local above = weigh():item()
        put(x, index, lower)
        local below = weigh():item()
        put(x, index, value)
        compare(i, index, gradient and gradient:get(unpack(index)) or 0, (above - below) / (upper - lower))
      end
    end
  end)
  if report.worst then report.worst.badness = nil end
  return report.ok, report
end
