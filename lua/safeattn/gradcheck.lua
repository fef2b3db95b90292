--- compares the gradients of the tape with central differences, or with those of the reference, element by element

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local create = require "safeattn.create"
local contents = require "safeattn.contents"
local sdpa = require "safeattn.sdpa"
local scope = require "safeattn.scope"

local fail = core.fail

local option_names = {eps = true, atol = true, rtol = true, samples = true, seed = true, against = true, dtype = true}

-- Central differences are off by about eps^2 (of f) and rounding / eps: the default steps balance the two.
local steps = {f64 = 1e-6, f32 = 1e-2}

local Report = {}
Report.__index = Report
Report.__describe = function() return "a gradcheck report" end

local function element_text(worst, against)
  return string.format("[%s]: analytic %.10g, %s %.10g, error %.3g, allowed %.3g", table.concat(worst.index, ","),
    worst.analytic, against, worst[against], worst.error, worst.allowed)
end

local function part_text(name, part)
  return part.checked > 0 and string.format("%s: %d of %d differ", name, part.failed, part.checked) or nil
end

local function input_text(input, against)
  local parts = {}
  parts[#parts + 1] = part_text("live rows", input.live)
  parts[#parts + 1] = part_text("dead rows", input.dead)
  if input.checked < input.count then parts[#parts + 1] = string.format("%d elements, sampled", input.count) end
  if input.step then parts[#parts + 1] = string.format("step %.6g", input.step) end
  if input.failed > 0 then parts[#parts + 1] = "worst " .. element_text(input.worst, against) end
  return string.format("input %d %s: %s", input.input, input.description, table.concat(parts, "; "))
end

function Report.__tostring(report)
  local lines = {string.format("gradcheck %s: %d of %d elements differ", report.ok and "passed" or "FAILED",
    report.failed, report.checked)}
  local worst = report.worst
  if worst then
    lines[2] = string.format("worst: input %d, element %s", worst.input, element_text(worst, report.against))
  end
  for _, input in ipairs(report.inputs) do lines[#lines + 1] = input_text(input, report.against) end
  return table.concat(lines, "\n")
end

-- The tensors among the results of fn; sdpa, for one, returns a table behind its output.
local function tensors_of(...)
  local list = {}
  for i = 1, select("#", ...) do
    local result = select(i, ...)
    if tensor.is(result) and core.is_float[result.handle.dtype] then list[#list + 1] = result end
  end
  if #list == 0 then
    fail("gradcheck", "fn: got a function that returned %s, wanted a float tensor first", core.describe((...)))
  end
  return list
end

-- What is differentiated: all outputs, each weighted by random numbers that do not change between calls.
local function weighted_sum(outputs)
  local total
  for i, out in ipairs(outputs) do
    local weights = create.randn(out.shape, {dtype = "f64", seed = 7000 + i, device = out.device})
    local part = (out:to("f64") * weights):sum()
    total = total and total + part or part
  end
  return total
end

local function number(options, name, default)
  local value = options[name]
  if value == nil then return default end
  if type(value) ~= "number" or not (value >= 0 and value < math.huge) or (name == "eps" and value == 0) then
    fail("gradcheck", "%s: got %s, wanted a %s number", name, core.describe(value),
      name == "eps" and "positive finite" or "finite, not negative")
  end
  return value
end

-- Copies of the float inputs, which require grad; other things are passed as they are.
local function promoted(inputs, dtype)
  local copies, checked = {}, {}
  for i = 1, table.maxn(inputs) do
    local x = inputs[i]
    if tensor.is(x) and core.is_float[tensor.pointer(x, "gradcheck", "inputs[" .. i .. "]").dtype] then
      local copy = x:detach():to(dtype):clone()
      copy.requires_grad = true
      copies[i], checked[#checked + 1] = copy, i
    else
      copies[i] = x
    end
  end
  if #checked == 0 then fail("gradcheck", "inputs: got no float tensor, wanted at least one") end
  return copies, checked
end

local function put(x, index, value)
  local arguments = {unpack(index)}
  arguments[#arguments + 1] = value
  x:set(unpack(arguments))
end

-- Which elements (from 0) of `count` are checked: all, or `samples` of them, drawn with the seed, in rising order.
local function places_of(count, samples, seed)
  local list = {}
  if count <= samples then
    for place = 0, count - 1 do list[place + 1] = place end
    return list
  end
  local chosen, round = {}, 0
  while #list < samples do
    local drawn = create.rand({samples}, {dtype = "f64", seed = seed + round}):totable()
    for n = 1, samples do
      local place = math.floor(drawn[n] * count)
      if #list < samples and not chosen[place] then
        chosen[place] = true
        list[#list + 1] = place
      end
    end
    round = round + 1
  end
  table.sort(list)
  return list
end

-- Checks

local Check = {}
Check.__index = Check

function Check:weigh()
  return weighted_sum(tensors_of(self.fn(unpack(self.copies, 1, self.n))))
end

function Check:gradients()
  local total = self:weigh()
  if total.requires_grad then total:backward() end
  local list = {}
  for _, i in ipairs(self.checked) do
    list[i] = self.copies[i].gradient or nil
    self.copies[i].gradient = false
  end
  return list, total
end

local function set_backend(value)
  local before = sdpa.backend
  sdpa.backend = value
  return before
end

function Check:difference_quotient(x, index)
  local value = x:get(unpack(index))
  put(x, index, value + self.eps)
  local upper, above = x:get(unpack(index)), self:weigh():item()
  put(x, index, value - self.eps)
  local lower, below = x:get(unpack(index)), self:weigh():item()
  put(x, index, value)
  return (above - below) / (upper - lower), (upper - lower) / 2
end

local function new_part()
  return {checked = 0, failed = 0, worst = false}
end

-- Counts an element into the whole, its input, and its live or dead rows.
local function count_in(element, agrees, badness, ...)
  for _, part in ipairs {...} do
    part.checked = part.checked + 1
    if not agrees then part.failed = part.failed + 1 end
    if not part.worst or badness > part.badness then part.worst, part.badness = element, badness end
  end
end

-- What one input's elements are: {place, index, analytic, expected}; and the rows (along its last dim) in which
-- something has an influence.
function Check:elements_of(i, gradient, reference)
  local x = self.copies[i]
  local shape, elements, live_rows, step = x.shape, {}, {}, nil
  local width = #shape > 0 and shape[#shape] or 1
  local places = places_of(x:numel(), reference and math.huge or self.samples, self.seed)
  for n, place in ipairs(places) do
    local index = contents.index_of(place, shape)
    local expected
    if reference then
      expected = reference[i] and reference[i]:get(unpack(index)) or 0
    else
      expected, step = self:difference_quotient(x, index)
    end
    local row = math.floor(place / width)
    if expected ~= 0 then live_rows[row] = true end
    elements[n] = {row = row, index = index, analytic = gradient and gradient:get(unpack(index)) or 0,
      expected = expected}
  end
  return elements, live_rows, step
end

function Check:compare_input(report, i, gradient, reference)
  local input = new_part()
  input.input, input.description, input.count = i, core.describe(self.copies[i]), self.copies[i]:numel()
  input.live, input.dead = new_part(), new_part()
  local elements, live_rows
  elements, live_rows, input.step = self:elements_of(i, gradient, reference)
  for _, element in ipairs(elements) do
    local analytic, expected = element.analytic, element.expected
    local difference, allowed = math.abs(analytic - expected), self.atol + self.rtol * math.abs(expected)
    local agrees = difference <= allowed
    -- in units of what is allowed; what is not finite is worse than any number
    local badness = difference / allowed
    if badness ~= badness then badness = agrees and 0 or math.huge end
    count_in({input = i, index = element.index, analytic = analytic, [report.against] = expected, error = difference,
      allowed = allowed}, agrees, badness, report, input, live_rows[element.row] and input.live or input.dead)
  end
  report.inputs[#report.inputs + 1] = input
end

-- A check as the arguments describe it.
local function new_check(fn, inputs, options)
  if type(fn) ~= "function" then fail("gradcheck", "fn: got %s, wanted a function", core.describe(fn)) end
  if not core.is_plain(inputs) then
    fail("gradcheck", "inputs: got %s, wanted a list of tensors", core.describe(inputs))
  end
  for key in pairs(inputs) do
    if type(key) ~= "number" then
      fail("gradcheck", "inputs: got a key %s, wanted a list of tensors", core.describe(key))
    end
  end
  options = core.options("gradcheck", options, option_names)
  local dtype = options.dtype == nil and "f64" or options.dtype
  if not steps[dtype] then fail("gradcheck", 'dtype: got %s, wanted "f64" or "f32"', core.describe(dtype)) end
  local against = options.against == nil and "numeric" or options.against
  if against ~= "numeric" and against ~= "reference" then
    fail("gradcheck", 'against: got %s, wanted "numeric" or "reference"', core.describe(against))
  end
  local check = setmetatable({fn = fn, n = table.maxn(inputs), against = against,
    eps = number(options, "eps", steps[dtype]), atol = number(options, "atol", 1e-5),
    rtol = number(options, "rtol", 1e-3),
    samples = core.integer("gradcheck", "samples", options.samples == nil and 1000 or options.samples, 1),
    seed = core.integer("gradcheck", "seed", options.seed == nil and 1 or options.seed)}, Check)
  check.copies, check.checked = promoted(inputs, dtype)
  return check
end

--- Compares the gradients that fn's tape gives with central differences, for the elements of every float input; or with
-- the gradients that the reference gives for the same function.
-- @param fn function of the inputs; its float tensor results are checked
-- @param inputs a list; float tensors are passed as copies in f64, everything else as it is
-- @param options
--
-- * `atol` (1e-5), `rtol` (1e-3): |analytic - numeric| <= atol + rtol |numeric|. What is not finite fails
-- * `eps`: the step (1e-6; 1e-2 in f32)
-- * `samples` (1000): of an input with more elements so many are checked, drawn with `seed` (1)
-- * `dtype` ("f64"): what the inputs are computed in, "f64" or "f32"
-- * `against`: "numeric" (default) or "reference": every sa.sdpa of fn on the reference back end. That compares all
--   elements, and takes two calls of fn instead of two for each
--
-- All three may be given as one table: gradcheck{fn, inputs, against = "reference"}.
-- @return whether all agree
-- @return a report: ok, checked, failed, worst {input, index, analytic, numeric or reference, error, allowed}, against;
-- `inputs`, a list of {input, count, checked, failed, worst, step, live, dead}, the last two {checked, failed, worst},
-- where a dead row (along the last dim) is one whose checked elements have no influence at all. It prints
return function(fn, inputs, options)
  if type(fn) == "table" and not tensor.is(fn) and inputs == nil and options == nil then
    options = {}
    for name, value in pairs(fn) do
      if name ~= 1 and name ~= 2 then options[name] = value end
    end
    fn, inputs = fn[1], fn[2]
  end
  local check = new_check(fn, inputs, options)
  local gradients, total = check:gradients()
  -- every sdpa of fn on the reference, whatever back end it asks for
  local reference = check.against == "reference" and scope(set_backend, "reference", check.gradients, check) or nil
  local report = setmetatable(new_part(), Report)
  report.against, report.inputs = check.against, {}
  autograd.no_grad(function()
    if not contents.allclose(check:weigh(), total, {atol = 0, rtol = 0, equal_nan = true}) then
      fail("gradcheck", "fn: got a function that gives different results for the same inputs, wanted one that"
        .. " depends on them alone (dropout needs a seed)")
    end
    for _, i in ipairs(check.checked) do check:compare_input(report, i, gradients[i], reference) end
  end)
  report.ok = report.failed == 0
  return report.ok, report
end
