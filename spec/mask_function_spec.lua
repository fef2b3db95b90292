-- masks of Lua functions: what the function gets, what it may give, and that each is compiled for itself

local sa = require "safeattn"
local core = require "safeattn.core"
local jit_util = require "jit.util"
local m = sa.mask

local function internal_bytes()
  local use = core.ffi.new "sa_memory_use"
  core.lib.sa_memory(use)
  return tonumber(use.internal_bytes)
end

-- What LuaJIT compiled of the loop over keys while f ran: how many traces that are a loop, and how many that lead into
-- a trace that was there before.
local function traces_of(f)
  local new, loops, into_old = {}, 0, 0
  local function on_trace(what, trace, func, pc)
    if what ~= "stop" or jit_util.funcinfo(func, pc).source ~= "=mask.fn" then return end
    local info = jit_util.traceinfo(trace)
    new[trace] = true
    if info.linktype == "loop" then
      loops = loops + 1
    elseif info.linktype == "root" and not new[info.link] then
      into_old = into_old + 1
    end
  end
  jit.attach(on_trace, "trace")
  f()
  jit.attach(on_trace)
  return loops, into_old
end

describe("mask.fn", function()
  it("gives the function b, h, i, j counted from 1, once for each pair", function()
    local seen = {}
    local mask = m.fn(function(b, h, i, j)
      seen[#seen + 1] = table.concat({b, h, i, j}, " ")
      return true
    end)
    mask:density {B = 2, H = 2, L = 1, S = 2}
    assert.same({"1 1 1 1", "1 1 1 2", "1 2 1 1", "1 2 1 2", "2 1 1 1", "2 1 1 2", "2 2 1 1", "2 2 1 2"}, seen)
    mask:density {B = 2, H = 2, L = 1, S = 2}
    assert.equal(8, #seen)
  end)

  it("gives nil for what the mask does not depend on, and asks once for all of them", function()
    local calls = 0
    local mask = m.fn(function(b, h)
      calls = calls + 1
      assert.is_nil(b)
      return h == 1
    end, {batch = false})
    assert.same({1, 3, 2, 2}, mask:dense {B = 4, H = 3, L = 2, S = 2}.shape)
    assert.equal(12, calls)
    local neither = m.fn(function(b, h) return b == nil and h == nil end, {batch = false, heads = false})
    assert.equal(1, neither:density {B = 4, H = 3, L = 2, S = 2})
  end)

  it("refuses an answer that is no boolean, and names the pair", function()
    local mask = m.fn(function(_, _, i, j) return i ~= 2 or j ~= 3 or 1 end)
    assert.has_error(function() mask:density {H = 2, L = 3, S = 3} end)
    local _, message = pcall(function() mask:density {H = 2, L = 3, S = 3} end)
    assert.truthy(message:find("safeattn.mask.fn: the function gave 1 for (b = 1, h = 1, i = 2, j = 3), wanted a"
      .. " boolean", 1, true), message)
    assert.truthy(message:find("mask_function_spec.lua", 1, true), message)
    local alone = m.fn(function() end, {batch = false, heads = false})
    _, message = pcall(function() alone:density {L = 1, S = 1} end)
    assert.truthy(message:find("gave nil for (b = nil, h = nil, i = 1, j = 1)", 1, true), message)
  end)

  it("lets an error of the function through, whatever it is, and can be used afterwards", function()
    local problem = {}
    local broken = true
    local mask = m.fn(function(_, _, i, j)
      if broken and i == 2 and j == 2 then error(problem) end
      return j <= i
    end)
    for _ = 1, 3 do
      local ok, raised = pcall(mask.density, mask, {L = 4, S = 4})
      assert.is_false(ok)
      assert.equal(problem, raised)
    end
    broken = false
    assert.equal(10 / 16, mask:density {L = 4, S = 4})
    local texts = m.fn(function() error("no such document", 0) end)
    local ok, message = pcall(sa.sdpa, sa.zeros {2, 4}, sa.zeros {2, 4}, sa.zeros {2, 4}, {mask = texts})
    assert.is_false(ok)
    assert.equal("no such document", message)
  end)

  it("leaves nothing behind when the function raises", function()
    local mask = m.fn(function(_, _, i) return i < 100 or error("late") end)
    pcall(mask.density, mask, {L = 128, S = 4096})
    collectgarbage()
    collectgarbage()
    local before = internal_bytes()
    for _ = 1, 20 do pcall(mask.density, mask, {L = 128, S = 4096}) end
    collectgarbage()
    collectgarbage()
    assert.equal(before, internal_bytes())
  end)

  it("works in a coroutine that the function yields from", function()
    local routine = coroutine.wrap(function()
      return m.fn(function(_, _, i, j)
        coroutine.yield(i * 10 + j)
        return true
      end):density {L = 2, S = 1}
    end)
    assert.equal(11, routine())
    assert.equal(21, routine())
    assert.equal(1, routine())
  end)

  it("compiles a loop of its own for every mask", function()
    -- One shared loop would be compiled for the first function, and the others would run through its exits.
    local functions = {
      function(_, _, i, j) return j <= i end,
      function(_, _, i, j) return (i + j) % 3 == 0 end,
      function(_, _, i, j) return i * j % 7 < 3 end,
    }
    jit.flush()
    for _, f in ipairs(functions) do
      local mask = m.fn(f, {batch = false, heads = false})
      local loops, into_old = traces_of(function() mask:density {L = 256, S = 256} end)
      assert.is_true(loops > 0)
      assert.equal(0, into_old)
    end
  end)
end)
