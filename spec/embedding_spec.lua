-- a host is left as it was: globals, environment, floating-point modes, signals, OpenBLAS, random numbers

local child = require "spec.child"

-- Uses what could touch the host: masks, attention forward and backward on several threads, products by OpenBLAS.
local use = [[
local sa = require "safeattn"
local function use()
  local q = sa.randn({1, 4, 256, 64}, {seed = 1, requires_grad = true})
  local out = sa.sdpa(q, q, q, {mask = sa.mask.causal() * sa.mask.fn(function(_, _, i, j) return (i + j) % 5 > 0 end)})
  sa.matmul(out, q:transpose(3, 4)):sum():backward()
  assert(q.grad:stats().nan == 0)
  pcall(sa.sdpa, q, 1, 2)
end
]]

describe("safeattn in a host", function()
  it("sets no globals and reads none that are not there", function()
    child.must_run([[
setmetatable(_G, {
  __newindex = function(_, name) error("the global " .. tostring(name) .. " was set", 2) end,
  __index = function(_, name) error("the global " .. tostring(name) .. " was read", 2) end,
})
]] .. use .. "use()\n")
  end)

  it("changes no global that was there, and no string or table library", function()
    assert.equal("", child.must_run([[
local function contents()
  local found = {}
  for name, value in pairs(_G) do
    found[name] = value
    if type(value) == "table" and value ~= _G then
      for key, inner in pairs(value) do
        if value ~= package.loaded then found[name .. "." .. tostring(key)] = inner end
      end
    end
  end
  return found
end
local before = contents()
]] .. use .. [[
use()
local after = contents()
for name, value in pairs(after) do if before[name] ~= value then print("changed: " .. name) end end
for name in pairs(before) do if after[name] == nil then print("removed: " .. name) end end
]]))
  end)

  it("leaves math.random's sequence alone", function()
    local draw = "math.randomseed(5); %s print(math.random(), math.random())"
    assert.equal(child.must_run(draw:format ""), child.must_run(use .. draw:format "use()"))
  end)

  it("leaves the environment as it was", function()
    assert.equal("", child.must_run([[
local ffi = require "ffi"
ffi.cdef "extern char **environ;"
local function environment()
  local list, k = {}, 0
  while ffi.C.environ[k] ~= nil do
    list[k + 1] = ffi.string(ffi.C.environ[k])
    k = k + 1
  end
  return table.concat(list, "\n")
end
local before = environment()
]] .. use .. [[
use()
local after = environment()
if before ~= after then print("before:\n" .. before .. "\n\nafter:\n" .. after) end
]]))
  end)

  -- The sticky flags may change: arithmetic sets them. Rounding, traps and the treatment of denormals may not.
  local float_modes = [[
local ffi = require "ffi"
ffi.cdef "int fegetround(void); int fesetround(int); int fegetexcept(void); int fegetenv(void *);"
local m = ffi.load "m"
local buffer = ffi.new "uint8_t[256]"
local function modes()
  local text = m.fegetround() .. " " .. m.fegetexcept()
  if ffi.arch == "x64" then
    m.fegetenv(buffer)
    -- the control word of the x87, and MXCSR without its flags
    local mxcsr = ffi.cast("uint32_t *", buffer + 28)[0]
    text = text .. " " .. ffi.cast("uint16_t *", buffer)[0] .. " " .. bit.band(mxcsr, bit.bnot(0x3f))
  end
  return text
end
]]

  it("leaves the floating-point modes as they were", function()
    assert.equal("", child.must_run(float_modes .. use .. [[
local before = modes()
use()
if before ~= modes() then print(before, modes()) end
]]))
  end)

  it("leaves the modes of a host that rounds upward and flushes denormals", function()
    assert.equal("", child.must_run(float_modes .. use .. [[
ffi.cdef "int fesetenv(const void *);"
local fresh = modes()
if ffi.arch == "x64" then
  m.fegetenv(buffer)
  local mxcsr = ffi.cast("uint32_t *", buffer + 28)
  mxcsr[0] = bit.bor(mxcsr[0], 0x8040) -- flush to zero, denormals are zero
  m.fesetenv(buffer)
end
local FE_UPWARD = ffi.arch == "x64" and 0x800 or 0x400000
m.fesetround(FE_UPWARD)
local before = modes()
assert(before ~= fresh)
use()
if before ~= modes() then print(before, modes()) end
]]))
  end)

  it("leaves signal handlers and the signal mask as they were", function()
    assert.equal("", child.must_run([[
local ffi = require "ffi"
ffi.cdef "int sigaction(int, const void *, void *); int sigprocmask(int, const void *, void *);"
-- The C library leaves what it does not use of its struct unset: the handler, the 64 signals of the mask and the flags
-- are what counts.
local function signals()
  local list = {}
  local buffer = ffi.new "uint8_t[256]"
  for signal = 1, 64 do
    ffi.fill(buffer, 256)
    ffi.C.sigaction(signal, nil, buffer)
    list[signal] = ffi.string(buffer, 16) .. ffi.string(buffer + 136, 4)
  end
  ffi.fill(buffer, 256)
  ffi.C.sigprocmask(0, nil, buffer)
  list[65] = ffi.string(buffer, 8)
  return list
end
local before = signals()
]] .. use .. [[
use()
for signal, action in ipairs(signals()) do if before[signal] ~= action then print("signal " .. signal) end end
]]))
  end)

  it("leaves the settings of an OpenBLAS that the host uses as they were", function()
    assert.equal("", child.must_run([[
local ffi = require "ffi"
ffi.cdef "int openblas_get_num_threads(void); void openblas_set_num_threads(int); char *openblas_get_corename(void);"
local blas = ffi.load "libopenblas.so.0"
blas.openblas_set_num_threads(2)
local function settings() return blas.openblas_get_num_threads() .. " " .. ffi.string(blas.openblas_get_corename()) end
local before = settings()
]] .. use .. [[
use()
if before ~= settings() then print(before, settings()) end
]]))
  end)

  it("writes nothing to the host's output", function()
    assert.equal("", child.must_run(use .. "use()"))
  end)

  it("lets go when a Lua state ends with tensors, masks and tapes alive", function()
    child.must_run(use .. [[
use()
local q = sa.randn({64, 64}, {requires_grad = true})
kept = {q, sa.sdpa(q, q, q, {mask = sa.mask.causal()}), sa.mask.all() + sa.mask.none()}
]])
  end)
end)
