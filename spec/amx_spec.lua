-- the tier "amx", on processors that have no such instructions too: an emulator of them (spec/emulator/amx.h) stands in

local sa = require "safeattn"
local child = require "spec.child"

local runs = {}
for _, isa in ipairs(sa.info().isas) do runs[isa] = true end

local function succeeds(command)
  local output, status = child.command(command)
  if status ~= 0 then error(output, 0) end
end

describe("AMX", function()
  if runs.amx and not os.getenv "SAFEATTN_LIB" then
    it("gives the bits of its emulator", function()
      succeeds "make --no-print-directory build/emulated/amx/products && build/emulated/amx/products"
    end)
    return
  end
  if not runs.avx512 then return pending("is emulated with AVX-512, which this machine has not") end

  setup(function() succeeds "make --no-print-directory CUDA=0 build/emulated/amx/core.so" end)

  for _, name in ipairs {"isa", "accuracy", "attention", "masked", "property"} do
    it("emulated, passes spec/" .. name .. "_spec.lua", function()
      succeeds("SAFEATTN_LIB=$PWD/build/emulated/amx/core.so SAFEATTN_TEST_ISA=amx SAFEATTN_TEST_DTYPE=bf16 "
        .. "SAFEATTN_QUICK=3 busted spec/" .. name .. "_spec.lua")
    end)
  end
end)
