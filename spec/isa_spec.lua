-- SAFEATTN_ISA and SAFEATTN_THREADS: honoured, and without influence on what is right

local sa = require "safeattn"
local child = require "spec.child"

local isas = sa.info().isas

describe("SAFEATTN_ISA", function()
  for _, isa in ipairs(isas) do
    it("forces " .. isa .. ", and the kernel that serves a call says so", function()
      local output = child.must_run([[
local sa = require "safeattn"
print(sa.info().isa)
for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
  local q = sa.randn({1, 2, 33, 16}, {seed = 1, dtype = dtype})
  local run = sa.forward(q, q, q)
  local exact = sa.forward(q, q, q, {backend = "reference"})
  local near = dtype:find "16" and 1e-2 or 1e-5
  assert(sa.allclose(run.out, exact.out, {atol = near, rtol = near}))
  print(run.kernel, run.backend)
end
]], {environment = {SAFEATTN_ISA = isa}})
      -- AMX multiplies bf16 alone.
      local rest = isa == "amx" and "avx512" or isa
      assert.equal(("%s\nfused-f32-%s\tfused\nfused-f64-%s\tfused\nfused-f16-%s\tfused\nfused-bf16-%s\tfused\n"):format(
        isa, rest, rest, rest, isa), output)
    end)
  end

  it("that names no ISA leaves the best in force", function()
    assert.equal(isas[#isas] .. "\n", child.must_run("print(require('safeattn').info().isa)",
      {environment = {SAFEATTN_ISA = "quantum"}}))
  end)
end)

describe("sa.isa", function()
  after_each(function() sa.isa("auto") end)

  it("puts an ISA in force that the machine has, and gives nil and why of one that it has not", function()
    local here = {}
    for _, isa in ipairs(isas) do here[isa] = true end
    for _, isa in ipairs(jit.arch == "x64" and {"generic", "avx2", "avx512", "amx"} or {"generic"}) do
      sa.isa("generic")
      local chosen, why = sa.isa(isa)
      assert.equal(here[isa] and isa or nil, chosen)
      if not here[isa] then
        assert.matches(isa .. '", which this machine cannot run', why, 1, true)
      end
      assert.equal(here[isa] and isa or "generic", sa.info().isa)
    end
    assert.equal(isas[#isas], sa.isa("auto"))
  end)
end)

describe("SAFEATTN_THREADS", function()
  local threads = "print(require('safeattn').threads())"

  it("sets how many threads a call may use", function()
    for _, n in ipairs {"1", "2", "5"} do
      assert.equal(n .. "\n", child.must_run(threads, {environment = {SAFEATTN_THREADS = n}}))
    end
  end)

  it("defaults to the cores that the process may use", function()
    local cores = child.command "nproc"
    assert.equal(cores, child.must_run(threads, {environment = {SAFEATTN_THREADS = false, OMP_NUM_THREADS = false}}))
    assert.equal("1\n", child.must_run(threads,
      {environment = {SAFEATTN_THREADS = false}, before = "taskset -p -c 0 $$ > /dev/null"}))
  end)

  it("that is no count is as good as none", function()
    local default = child.must_run(threads, {environment = {SAFEATTN_THREADS = false}})
    for _, text in ipairs {"", "0", "-3", "many", "99999999999999999999"} do
      assert.equal(default, child.must_run(threads, {environment = {SAFEATTN_THREADS = text}}), text)
    end
  end)

  it("does not change a bit of the results", function()
    local script = [[
local sa = require "safeattn"
local q, k = sa.randn({2, 3, 300, 40}, {seed = 1}), sa.randn({2, 3, 500, 40}, {seed = 2})
local run = sa.forward(q, k, k, {causal = "bottom-right", dropout = 0.1, seed = 3})
local g = run:backward(q)
local ffi = require "ffi"
local sum = 0
for _, t in ipairs {run.out, run.lse, g.dq, g.dk, g.dv} do
  local words = ffi.cast("uint32_t *", t:data())
  for n = 0, t:numel() - 1 do sum = (sum * 31 + words[n]) % 4294967291 end
end
print(sum)
]]
    local one = child.must_run(script, {environment = {SAFEATTN_THREADS = "1"}})
    for _, n in ipairs {"2", "3", "8"} do
      assert.equal(one, child.must_run(script, {environment = {SAFEATTN_THREADS = n}}))
    end
  end)
end)
