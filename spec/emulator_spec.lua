-- the emulator of CUDA (spec/emulator) does what the instructions are defined to do

local function succeeds(command)
  local pipe = io.popen(command .. " 2>&1; echo status $?")
  local output = pipe:read("*a")
  pipe:close()
  return output:match("status 0\n$") ~= nil, output
end

describe("the emulator", function()
  if jit.arch ~= "x64" then
    return pending("runs on x86-64 only")
  end

  setup(function()
    assert(succeeds("make --no-print-directory build/emulated/instructions build/emulated/instructions_hopper"))
  end)

  for _, setting in ipairs{"", "SAFEATTN_EMULATED_COPIES=early", "SAFEATTN_EMULATED_ORDER=1",
    "SAFEATTN_EMULATED_ORDER=7 SAFEATTN_EMULATED_THREADS=2"} do
    it("gives what matrix products, copies, collectives and conversions are defined to give " .. setting, function()
      assert(succeeds(setting .. " build/emulated/instructions"))
    end)

    it("gives what Hopper's instructions are defined to give " .. setting, function()
      assert(succeeds(setting .. " build/emulated/instructions_hopper"))
    end)
  end
end)
