-- require from elsewhere: the library beside the Lua modules, whatever folder a program runs in; and without LuaJIT

local child = require "spec.child"

local shell = child.must_command

describe("require", function()
  local folder

  setup(function()
    folder = shell("mktemp -d"):match "%S+"
    local library = os.getenv "SAFEATTN_LIB"
    if not library or library == "" or (os.getenv "LD_PRELOAD" or "") ~= "" then library = "lua/safeattn/core.so" end
    shell("mkdir " .. folder .. "/safeattn && cp lua/safeattn/*.lua " .. folder .. "/safeattn/ && cp " .. library .. " "
      .. folder .. "/safeattn/core.so")
  end)

  teardown(function() shell("rm -rf " .. folder) end)

  it("finds the library beside the modules, from any folder, by absolute and relative paths", function()
    for _, case in ipairs {{"/", folder .. "/"}, {folder, "./"}, {folder .. "/safeattn", "../"}, {folder, ""}} do
      assert.equal("3\n", child.must_run("print(require('safeattn').ones({3}):numel())", {
        before = "cd " .. case[1],
        environment = {SAFEATTN_LIB = false, LUA_CPATH = "/nowhere/?.so"},
        path = case[2] .. "?.lua;" .. case[2] .. "?/init.lua",
      }))
    end
  end)

  it("prefers it to an older one on package.cpath", function()
    local output = child.must_run([[
require "safeattn"
for line in io.lines "/proc/self/maps" do if line:find "core.so" then print(line:match "%S+$") break end end
]], {
      before = "mkdir -p " .. folder .. "/old/safeattn && cp " .. folder .. "/safeattn/core.so " .. folder
        .. "/old/safeattn/ && cd " .. folder,
      environment = {SAFEATTN_LIB = false, LUA_CPATH = folder .. "/old/?.so"},
      path = "./?.lua;./?/init.lua",
    })
    assert.equal(folder .. "/safeattn/core.so\n", output)
  end)

  it("says that it needs LuaJIT", function()
    local output, status = child.command("LUA_PATH='lua/?.lua;lua/?/init.lua' lua5.1 -e 'require \"safeattn\"'")
    assert.equal(1, status)
    assert.matches("safeattn needs LuaJIT 2.1, this is Lua 5.1", output, 1, true)
  end)
end)
