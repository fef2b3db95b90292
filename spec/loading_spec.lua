-- finding the C library: SAFEATTN_LIB, the tree, the ABI, and what is said when it is not there

local child = require "spec.child"

local load = "local ok, problem = pcall(require, 'safeattn') print(ok and 'loaded' or problem)"

local folder

local shell = child.must_command

local function library()
  local named = os.getenv "SAFEATTN_LIB"
  if named and named ~= "" and (os.getenv "LD_PRELOAD" or "") == "" then return named end
  return "lua/safeattn/core.so"
end

setup(function()
  folder = shell("mktemp -d"):match "%S+"
  -- the Lua modules without their library
  shell("mkdir " .. folder .. "/safeattn && cp lua/safeattn/*.lua " .. folder .. "/safeattn/")
end)

teardown(function() shell("rm -rf " .. folder) end)

local function modules_alone()
  return folder .. "/?.lua;" .. folder .. "/?/init.lua"
end

describe("loading", function()
  it("takes the library that SAFEATTN_LIB names", function()
    shell("cp " .. library() .. " " .. folder .. "/named.so")
    local output = child.must_run([[
require "safeattn"
for line in io.lines "/proc/self/maps" do if line:find "named.so" then print "it is there" break end end
]], {environment = {SAFEATTN_LIB = folder .. "/named.so"}, path = modules_alone()})
    assert.equal("it is there\n", output)
  end)

  it("takes no other when that one is not there", function()
    local output = child.must_run(load, {environment = {SAFEATTN_LIB = "/nowhere/core.so"}})
    assert.matches("safeattn: the C library could not be loaded", output, 1, true)
    assert.matches("/nowhere/core.so (SAFEATTN_LIB)", output, 1, true)
    assert.matches("make", output, 1, true)
  end)

  it("finds it on package.cpath", function()
    shell("mkdir -p " .. folder .. "/lib/safeattn && cp " .. library() .. " " .. folder .. "/lib/safeattn/core.so")
    assert.equal("loaded\n", child.must_run(load,
      {environment = {SAFEATTN_LIB = false, LUA_CPATH = folder .. "/lib/?.so"}, path = modules_alone()}))
  end)

  it("says every path that it tried, and what mends it", function()
    local output = child.must_run(load,
      {environment = {SAFEATTN_LIB = false, LUA_CPATH = "/one/?.so;/two/?.so"}, path = modules_alone()})
    for _, text in ipairs {
      "safeattn: the C library could not be loaded", "`make`", "SAFEATTN_LIB", folder .. "/safeattn/core.so",
      "/one/safeattn/core.so", "/two/safeattn/core.so", "No such file",
    } do
      assert.matches(text, output, 1, true)
    end
  end)

  it("finds the CUDA part beside it in whatever folder the program is by then", function()
    local beside = folder .. "/beside"
    shell(("mkdir %s && cp %s %s/named.so"):format(beside, library(), beside))
    local function why(name)
      return child.must_run([[
local sa = require "safeattn"
local ffi = require "ffi"
ffi.cdef "int chdir(const char *);"
assert(ffi.C.chdir "/" == 0)
print(select(2, sa.devices()))
]], {environment = {SAFEATTN_LIB = name, SAFEATTN_CUDA_LIB = false}, path = modules_alone(), before = "cd " .. beside})
    end
    for _, name in ipairs {"./named.so", "../beside/named.so", beside .. "/named.so"} do
      local place = name:find "^/" and name or beside .. "/" .. name
      assert.matches("there is no cuda.so beside " .. place .. "\n", why(name), 1, true)
    end
    shell("touch " .. beside .. "/cuda.so")
    for _, name in ipairs {"./named.so", "../beside/named.so"} do
      local place = beside .. "/" .. name:gsub("named", "cuda")
      assert.matches("the CUDA part cannot be loaded: " .. place .. ": file too short", why(name), 1, true)
    end
  end)

  it("refuses a library of another ABI, and one that has none", function()
    local function with(source)
      local file = assert(io.open(folder .. "/other.c", "w"))
      file:write(source)
      file:close()
      shell(("${CC:-gcc} -shared -fPIC -o %s/other.so %s/other.c"):format(folder, folder))
      return child.must_run(load, {environment = {SAFEATTN_LIB = folder .. "/other.so"}})
    end
    assert.matches("safeattn: the C library has ABI 999, these Lua modules want %d+: run `make`",
      with "int sa_abi(void) { return 999; }")
    assert.matches("safeattn: the C library has ABI none, these Lua modules want %d+",
      with "int other(void) { return 1; }")
  end)

  it("says that the declarations are missing when the tree was not built", function()
    local output = child.must_run("package.preload['safeattn.cdef'] = function() error 'none' end " .. load)
    assert.matches("safeattn: the C declarations are missing: run `make`", output, 1, true)
  end)

  it("may happen again in one state, as busted does it", function()
    child.must_run [[
local first = require "safeattn"
for name in pairs(package.loaded) do if name:find "^safeattn" then package.loaded[name] = nil end end
local second = require "safeattn"
assert(first ~= second)
local t = second.randn({4, 4}, {seed = 1})
assert(second.equal(second.sdpa(t, t, t), second.sdpa(t, t, t)))
]]
  end)
end)
