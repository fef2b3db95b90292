-- several Lua states in several threads of one process, at once, and the pool's threads, awake and asleep

local ffi = require "ffi"
local sa = require "safeattn"
local child = require "spec.child"

local script = [[
package.path = "lua/?.lua;lua/?/init.lua;" .. package.path
local ffi = require "ffi"
local sa = require "safeattn"
local m = sa.mask
local sum = 0
local function add(t)
  local words = ffi.cast("uint32_t *", t:contiguous():data())
  for n = 0, t:numel() - 1 do sum = (sum * 31 + words[n]) % 4294967291 end
end
for round = 1, 12 do
  local q = sa.randn({1, 2, 150 + round, 32}, {seed = round, requires_grad = true})
  local ids = {}
  for i = 1, 150 + round do ids[i] = math.floor(i / 40) end
  local mask = m.documents(ids) * m.causal() + m.fn(function(_, _, i, j) return (i * j) % 11 == 0 end)
  local out, more = sa.sdpa(q, q, q, {mask = mask, lse = true, dropout = 0.1, seed = round})
  sa.matmul(out, q:transpose(3, 4)):sum():backward()
  add(out)
  add(more.lse)
  add(q.grad)
  -- errors belong to the thread that made them
  local ok, problem = pcall(sa.sdpa, q, sa.zeros {1, 2, 4, 32}, sa.zeros {1, 2, 5 + round, 32})
  assert(not ok and problem:find("sdpa: v: has " .. 5 + round .. " keys", 1, true), problem)
  if round % 4 == 0 then collectgarbage() end
end
kept = sa.ones {3}
return string.format("sum %.0f", sum)
]]

describe("Lua states in threads", function()
  local program, file

  setup(function()
    program, file = os.tmpname(), os.tmpname()
    local output, status = child.command("${CC:-gcc} -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wno-unused-parameter -g "
      .. "$(pkg-config --cflags luajit) -o " .. program
      .. " spec/embedding/threads.c $(pkg-config --libs luajit) -pthread")
    assert.equal(0, status, output)
    local handle = assert(io.open(file, "w"))
    handle:write(script)
    handle:close()
  end)

  teardown(function()
    os.remove(program)
    os.remove(file)
  end)

  for _, states in ipairs {1, 2, 8} do
    it(states .. " at once compute the same as one", function()
      local alone = child.command(program .. " " .. file .. " 1")
      local output, status = child.command(program .. " " .. file .. " " .. states)
      assert.equal(0, status, output)
      assert.equal(alone:match "sum %d+", output:match "sum %d+")
      assert.is_truthy(alone:match "sum %d+", alone)
      assert.equal("0 bytes in 0 blocks are left", output:match "%d+ bytes in %d+ blocks are left")
    end)
  end
end)

ffi.cdef "int usleep(unsigned microseconds);"

describe("the pool of threads", function()
  local before = sa.threads()

  after_each(function() sa.threads(before) end)

  it("computes the same however many it calls, and however long they have waited", function()
    local x = sa.randn({1, 5, 130, 32}, {seed = 1})
    sa.threads(1)
    local alone = sa.forward(x, x, x)
    local gradients = alone:backward(x)
    for round = 1, 240 do
      sa.threads(1 + round * 5 % 7)
      -- awake, about to lie down, asleep
      ffi.C.usleep(({0, 40, 60, 400})[1 + round % 4])
      local run = sa.forward(x, x, x)
      assert(sa.equal(alone.out, run.out))
      for name, gradient in pairs(run:backward(x)) do assert(sa.equal(gradients[name], gradient), name) end
    end
  end)

  it("shares out chunks of keys of several lengths", function()
    local q, dout = sa.randn({1, 8, 200, 8}, {seed = 1}), sa.randn({1, 8, 200, 8}, {seed = 2})
    local k, v = sa.randn({1, 8, 1990, 8}, {seed = 3}), sa.randn({1, 8, 1990, 8}, {seed = 4})
    for _, mask in ipairs {sa.mask.window(64, 900) * sa.mask.causal "bottom-right", sa.mask.random(0.1, 5)} do
      local expected = sa.forward(q, k, v, {mask = mask, backend = "reference"}):backward(dout)
      sa.threads(1)
      local alone = sa.forward(q, k, v, {mask = mask}):backward(dout)
      for name, gradient in pairs(alone) do assert.tensor.near(gradient, expected[name], {atol = 1e-5, rtol = 1e-5}) end
      for threads = 2, 5 do
        sa.threads(threads)
        local gradients = sa.forward(q, k, v, {mask = mask}):backward(dout)
        for name, gradient in pairs(gradients) do assert(sa.equal(alone[name], gradient), name) end
      end
    end
  end)
end)
