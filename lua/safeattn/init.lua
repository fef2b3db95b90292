--- safeattn: attention where masked means masked, with gradients, for LuaJIT.
-- `local sa = require "safeattn"`. Indices and dims count from 1.
-- @module safeattn

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local contents = require "safeattn.contents"
local random = require "safeattn.random"
local create = require "safeattn.create"
local views = require "safeattn.views"
local operations = require "safeattn.operations"
local optim = require "safeattn.optim"
require "safeattn.print"

local ffi, lib = core.ffi, core.lib
local fail = core.fail

local sa = {
  _VERSION = "safeattn " .. ffi.string(lib.sa_version()),
  equal = contents.equal,
  allclose = contents.allclose,
  cat = views.cat,
  stack = views.stack,
  no_grad = autograd.no_grad,
  adamw = optim.adamw,
  gradcheck = require "safeattn.gradcheck",
  seed = random.seed,
  mask = require "safeattn.mask",
}

do
  local cuda = require "safeattn.cuda"
  sa.synchronize = cuda.synchronize
  sa.cuda = {memory = cuda.memory, empty_cache = cuda.empty_cache, stream = cuda.stream}
end

for name, constructor in pairs(create) do sa[name] = constructor end
for name, operation in pairs(operations) do sa[name] = operation end
for name, attention in pairs(require "safeattn.sdpa") do sa[name] = attention end

for _, name in ipairs {"view", "transpose", "permute", "narrow", "select", "expand", "contiguous", "to", "clone"} do
  sa[name] = tensor.methods[name]
end
tensor.methods.softmax = sa.softmax

-- What looks inside, and files, are loaded when they are first used.
local function later(module, name)
  return function(...) return require(module)[name](...) end
end
sa.inspect = later("safeattn.inspect", "inspect")
sa.tap = later("safeattn.tap", "tap")
sa.detect_anomaly = later("safeattn.anomaly", "detect_anomaly")
tensor.methods.register_hook = later("safeattn.anomaly", "register_hook")
sa.save = later("safeattn.files", "save")
sa.load = later("safeattn.files", "load")

--- What the library found on this machine: version, isa (in force), isas (a list), threads (in force), cores, blas and
-- cuda (what they say of themselves).
function sa.info()
  local host = ffi.new("sa_host_info")
  lib.sa_info(host)
  local isas = {}
  for isa in ffi.string(host.isas):gmatch("%S+") do isas[#isas + 1] = isa end
  return {
    version = ffi.string(lib.sa_version()), threads = host.threads, cores = host.cores, isa = ffi.string(host.isa),
    isas = isas, blas = ffi.string(host.blas), cuda = ffi.string(host.cuda), devices = sa.devices(),
  }
end

--- Sets how many threads calls from this thread may use, when n is given.
-- @return the number in force
function sa.threads(n)
  if n == nil then return lib.sa_threads(0) end
  return lib.sa_threads(core.integer("threads", "n", n, 1, 1024))
end

--- The devices that tensors may live on: {"cpu"}, and one "cuda:k" for each GPU.
-- @return a list; without a GPU also what is missing for one: what whoever asks for "cuda" gets behind nil
function sa.devices()
  local devices = {"cpu"}
  local gpus = lib.sa_device_count(lib.SA_CUDA)
  for k = 1, gpus do devices[k + 1] = "cuda:" .. k - 1 end
  if gpus > 0 then return devices end
  return devices, select(2, core.device("devices", "device", "cuda"))
end

--- Chooses the instruction set of the CPU kernels: "generic", "avx2", "avx512", "amx" or "auto" (the best). For tests
-- and measurements.
-- @return the one in force; nil and why when this machine has it not
function sa.isa(name)
  if name ~= nil then
    if type(name) ~= "string" then
      fail("isa", 'name: got %s, wanted "generic", "avx2", "avx512", "amx" or "auto"', core.describe(name))
    end
    local status = lib.sa_set_isa(name)
    if status == lib.SA_UNSUPPORTED then return nil, core.last_error() end
    core.check(status, "isa")
  end
  return sa.info().isa
end

return sa
