-- fork after use: the child computes, and so does the parent, while both live

local child = require "spec.child"

local prelude = [[
local ffi = require "ffi"
ffi.cdef "int fork(void); int waitpid(int, int *, int); void _exit(int);"
local sa = require "safeattn"
sa.threads(4)
local q = sa.randn({2, 4, 256, 64}, {seed = 1})
local mask = sa.mask.documents(sa.arange(256, {dtype = "i32"})) + sa.mask.causal()
local function results()
  local run = sa.forward(q, q, q, {mask = mask})
  local g = run:backward(q)
  return {run.out, run.lse, g.dq, g.dk, g.dv, sa.matmul(q, q:transpose(3, 4)), sa.softmax(q)}
end
local function same(a, b)
  for k = 1, #a do if not sa.equal(a[k], b[k]) then return false end end
  return true
end
-- Runs f in a forked child; true when it gave true.
local function in_child(f)
  local pid = ffi.C.fork()
  assert(pid >= 0)
  if pid == 0 then
    local ok, result = pcall(f)
    ffi.C._exit(ok and result == true and 0 or 1)
  end
  return function()
    local status = ffi.new "int[1]"
    assert(ffi.C.waitpid(pid, status, 0) == pid)
    return status[0] == 0
  end
end
]]

describe("after fork", function()
  it("the child computes the same, and so does the parent meanwhile", function()
    child.must_run(prelude .. [[
local before = results()
local wait = in_child(function() return same(before, results()) end)
assert(same(before, results()))
assert(wait(), "the child computed something else, or failed")
assert(same(before, results()))
]])
  end)

  it("a child that is the first to use it can", function()
    child.must_run(prelude .. [[
assert(in_child(function() return same(results(), results()) end)())
assert(same(results(), results()))
]])
  end)

  it("children of children compute too", function()
    child.must_run(prelude .. [[
local before = results()
local function agrees() return same(before, results()) end
assert(in_child(function() return agrees() and in_child(agrees)() and agrees() end)())
]])
  end)

  it("many children compute at once", function()
    child.must_run(prelude .. [[
local before = results()
local waits = {}
for k = 1, 8 do waits[k] = in_child(function() return same(before, results()) end) end
for k = 1, 8 do assert(waits[k]()) end
]])
  end)

  it("a child that ends as Lua ends, with its finalisers, ends well", function()
    local _, status = child.run(prelude .. [[
local before = results()
local pid = ffi.C.fork()
if pid == 0 then
  assert(same(before, results()))
  os.exit(7, true)
end
local status = ffi.new "int[1]"
ffi.C.waitpid(pid, status, 0)
os.exit(status[0] == 7 * 256 and 3 or 4, true)
]])
    assert.equal(3, status)
  end)
end)
