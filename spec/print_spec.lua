-- printing: a header, statistics, a body that fits

local sa = require("spec.helper").sa

local inf, nan = math.huge, 0 / 0

local function lines_of(t)
  local lines = {}
  for line in (tostring(t) .. "\n"):gmatch("(.-)\n") do lines[#lines + 1] = line end
  return lines
end

describe("print", function()
  it("shows a small matrix in full", function()
    assert.equal(table.concat({
      "f32[2,3] cpu contiguous",
      "min -4.5  max 6  mean 1  norm 7.9687  #zero 1",
      "   1.0000   2.0000   0.0000",
      "  -4.5000   1.5000   6.0000",
    }, "\n"):gsub("0%.0000", "     0"), (tostring(sa.tensor {{1, 2, 0}, {-4.5, 1.5, 6}})))
  end)

  it("shows scalars, empty tensors and booleans", function()
    assert.equal("f64[] cpu contiguous\n  2.5000", tostring(sa.tensor(2.5, {dtype = "f64"})))
    assert.equal("i32[0,3] cpu contiguous\n  (empty)", tostring(sa.zeros({0, 3}, {dtype = "i32"})))
    assert.same({"bool[2] cpu contiguous", "min 0  max 1  mean 0.5  norm 1  #zero 1", "   true  false"},
      lines_of(sa.tensor {true, false}))
  end)

  it("names strides, and gradients that are wanted", function()
    assert.equal("f32[3,2] cpu strided (1,3)", lines_of(sa.zeros({2, 3}):transpose(1, 2))[1])
    assert.equal("f32[1] cpu contiguous requires_grad", lines_of(sa.zeros({1}, {requires_grad = true}))[1])
  end)

  it("counts what is odd, and shows it", function()
    local lines = lines_of(sa.tensor {{nan, inf}, {-inf, 0}})
    assert.equal("min 0  max 0  mean 0  norm 0  #nan 1  #+inf 1  #-inf 1  #zero 1", lines[2])
    assert.same({"   nan   inf", "  -inf     0"}, {lines[3], lines[4]})
    assert.equal("nothing finite  #nan 1", lines_of(sa.tensor {nan})[2])
  end)

  it("writes an exact zero otherwise than what rounds to it", function()
    assert.equal("       0  0.0000  1.0000", lines_of(sa.tensor {0, 1e-9, 1 + 2 ^ -20})[3])
  end)

  it("turns to exponents when a fixed point would hide everything", function()
    assert.equal("   1.5000e-05  -2.0000e-09", lines_of(sa.tensor({1.5e-5, -2e-9}, {dtype = "f64"}))[3])
    assert.equal("  1.2346e+08  5.0000e-01", lines_of(sa.tensor({123456789.5, 0.5}, {dtype = "f64"}))[3])
  end)

  it("heads matrices with their indices", function()
    local lines = lines_of(sa.tensor {{{1, 2}}, {{3, 4}}})
    assert.same({"(1,:,:)", "    1    2", "(2,:,:)", "    3    4"}, {select(3, unpack(lines))})
  end)

  it("cuts long tensors to their edges", function()
    local lines = lines_of(sa.arange(10000, {dtype = "i32"}))
    assert.equal(3, #lines)
    assert.equal("     0     1     2   ...  9997  9998  9999", lines[3])
    lines = lines_of(sa.arange(10000):view(100, 100))
    assert.equal(2 + 7, #lines)
    assert.equal("     0     1     2  ...    97    98    99", lines[3])
    assert.equal("   ...   ...   ...  ...   ...   ...   ...", lines[6])
    lines = lines_of(sa.zeros {40, 30, 20, 10})
    assert.equal(2 + 6 * (1 + 7) + 1, #lines)
    assert.equal("(40,30,:,:)", lines[#lines - 7])
  end)

  it("never is wider than 80 columns", function()
    for _, shape in ipairs {{5, 200}, {900}, {1, 1, 1, 60}, {3000}, {7, 500}} do
      for _, line in ipairs(lines_of(sa.randn(shape, {seed = 3}) * 1000)) do assert.is_true(#line <= 80, line) end
    end
  end)

  it("does not copy what it shows", function()
    local ffi, lib = require "ffi", require("safeattn.core").lib
    local t = sa.zeros({2 ^ 20}):view(2, 2 ^ 19):transpose(1, 2)
    local use = ffi.new("sa_memory_use")
    lib.sa_memory(use)
    local before = tonumber(use.bytes)
    lib.sa_memory_reset_peak()
    assert.equal(2 + 7, #lines_of(t))
    lib.sa_memory(use)
    assert.is_true(tonumber(use.peak_bytes) - before < 2 ^ 16)
  end)
end)
