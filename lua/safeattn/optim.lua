--- what changes parameters after a backward

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call

local optim = {}

local AdamW = {}
AdamW.__index = AdamW
AdamW.__describe = function() return "an adamw" end

local adamw_options = {lr = true, betas = true, eps = true, weight_decay = true}

-- A number that passes `test`, or the default.
local function setting(options, name, default, test, wanted)
  local value = options[name]
  if value == nil then return default end
  if type(value) ~= "number" or not test(value) then
    fail("adamw", "%s: got %s, wanted %s", name, core.describe(value), wanted)
  end
  return value
end

local function is_amount(x) return x >= 0 and x < math.huge end
local function is_share(x) return x >= 0 and x < 1 end

--- AdamW.
-- @param parameters a list of contiguous f32 or f64 tensors that require grad
-- @param options lr (1e-3), betas ({0.9, 0.999}), eps (1e-8), weight_decay (0.01). The fields lr, weight_decay
--   and eps of the result may be changed between steps
function optim.adamw(parameters, options)
  core.check_list("adamw", "params", parameters, "a list of tensors")
  if #parameters == 0 then fail("adamw", "params: got an empty list, wanted at least one tensor") end
  options = core.options("adamw", options, adamw_options)
  local seen = {}
  for i = 1, #parameters do
    local p = parameters[i]
    local handle = tensor.pointer(p, "adamw", "params[" .. i .. "]")
    if not p.tracked then
      fail("adamw", "params[%d]: got %s that does not require grad, wanted a leaf that does", i, core.describe(p))
    end
    if (handle.dtype ~= lib.SA_F32 and handle.dtype ~= lib.SA_F64) or not lib.sa_tensor_contiguous(handle) then
      fail("adamw", "params[%d]: got %s%s, wanted a contiguous f32 or f64", i,
        lib.sa_tensor_contiguous(handle) and "" or "a strided ", core.describe(p))
    end
    if seen[p] then fail("adamw", "params[%d]: got params[%d] again, wanted each once", i, seen[p]) end
    seen[p] = i
  end
  local betas = options.betas == nil and {0.9, 0.999} or options.betas
  core.check_list("adamw", "betas", betas, "a table of two numbers")
  if #betas ~= 2 then fail("adamw", "betas: got a table of %d, wanted two numbers", #betas) end
  return setmetatable({
    parameters = {unpack(parameters)},
    moments = {},
    lr = setting(options, "lr", 1e-3, is_amount, "a finite number of at least 0"),
    eps = setting(options, "eps", 1e-8, is_amount, "a finite number of at least 0"),
    weight_decay = setting(options, "weight_decay", 0.01, is_amount, "a finite number of at least 0"),
    betas = {
      setting({["betas[1]"] = betas[1] or false}, "betas[1]", 0, is_share, "a number in [0, 1)"),
      setting({["betas[2]"] = betas[2] or false}, "betas[2]", 0, is_share, "a number in [0, 1)"),
    },
  }, AdamW)
end

local function zeros_like(p)
  local zeros = tensor.like("step", p)
  call("step", lib.sa_fill, zeros.handle, 0)
  return zeros
end

local function checked(self, method)
  if getmetatable(self) ~= AdamW then
    fail(method, "self: got %s, wanted an adamw (call it with a colon)", core.describe(self))
  end
end

--- One step along the gradients; parameters without one stay.
function AdamW:step()
  checked(self, "step")
  local settings = ffi.new("sa_adamw_options")
  settings.rate, settings.epsilon, settings.weight_decay = self.lr, self.eps, self.weight_decay
  settings.beta1, settings.beta2 = self.betas[1], self.betas[2]
  autograd.no_grad(function()
    for i, p in ipairs(self.parameters) do
      local gradient = p.gradient
      if gradient then
        local handle = tensor.pointer(p, "step", "params[" .. i .. "]")
        local moments = self.moments[i]
        if not moments then
          moments = {zeros_like(p), zeros_like(p), steps = 0}
          self.moments[i] = moments
        end
        settings.step = moments.steps + 1
        autograd.change("step", "params[" .. i .. "]", p)
        call("step", lib.sa_adamw, handle, tensor.pointer(gradient, "step", "grad"), moments[1].handle,
          moments[2].handle, settings)
        moments.steps = moments.steps + 1
      end
    end
  end)
end

--- Forgets the gradients.
function AdamW:zero_grad()
  checked(self, "zero_grad")
  for _, p in ipairs(self.parameters) do p.gradient = false end
end

return optim
