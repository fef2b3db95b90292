-- sa.matmul: products of batches of matrices, whatever their layout and dtype, and a host that does not notice OpenBLAS

local sa = require("spec.helper").sa
local child = require "spec.child"

local inf, nan = math.huge, 0 / 0

-- The definition, in plain loops over two matrices in f64. What it is compared with differs by rounding, which grows
-- with the second result, the sum of |a b|.
local function product(a, b)
  local rows, inner, columns = a.shape[1], a.shape[2], b.shape[2]
  local on_cpu = {dtype = "f64", device = "cpu"}
  local out, magnitude = sa.zeros({rows, columns}, on_cpu), sa.zeros({rows, columns}, on_cpu)
  local x, y = a:to(on_cpu):contiguous(), b:to(on_cpu):contiguous()
  local px, py, po, pm = x:data(), y:data(), out:data(), magnitude:data()
  for i = 0, rows - 1 do
    for j = 0, columns - 1 do
      local sum, absolute = 0, 0
      for k = 0, inner - 1 do
        local term = px[i * inner + k] * py[k * columns + j]
        sum, absolute = sum + term, absolute + math.abs(term)
      end
      po[i * columns + j], pm[i * columns + j] = sum, absolute
    end
  end
  return out, magnitude
end

local tolerances = {f32 = 1e-6, f64 = 1e-15, f16 = 1e-3, bf16 = 8e-3}

local function check(got, a, b)
  local want, magnitude = product(a, b)
  local smallest = got.dtype == "f16" and 6e-8 or 1e-30 -- the steps of subnormal f16
  local allowed = magnitude * tolerances[got.dtype] + smallest
  assert.tensor.near((got:to {dtype = "f64", device = "cpu"} - want) / allowed, sa.zeros(want.shape), {atol = 1})
end

-- The same values, stored in other orders; what lies between them is NaN.
local layouts = {
  rows = function(t) return t end,
  columns = function(t) return t:transpose(1, 2):contiguous():transpose(1, 2) end,
  scattered = function(t)
    local rows, columns = t:size(1), t:size(2)
    local whole = sa.full({columns, 2, 3 * rows}, nan, {dtype = t.dtype})
    return whole:select(2, 2):narrow(2, 2, rows):transpose(1, 2):copy(t)
  end,
}

describe("sa.matmul", function()
  it("multiplies: numbers by hand", function()
    local a, b = sa.tensor {{1, 2, 3}, {4, 5, 6}}, sa.tensor {{1, 0}, {0, 1}, {2, 3}}
    assert.tensor.same(sa.matmul(a, b), {{7, 11}, {16, 23}})
    assert.tensor.same(a:matmul(b:narrow(2, 1, 1)), {{7}, {16}})
  end)

  for dtype in pairs(tolerances) do
    it("takes every layout and size, in " .. dtype, function()
      for _, size in ipairs {{3, 4, 5}, {1, 100, 1}, {40, 1, 30}, {1, 70, 90}, {65, 33, 47}, {1, 5000, 1}} do
        local a = sa.randn({size[1], size[2]}, {seed = 1, dtype = dtype})
        local b = sa.randn({size[2], size[3]}, {seed = 2, dtype = dtype})
        for _, of_a in pairs(layouts) do
          for _, of_b in pairs(layouts) do
            local y = sa.matmul(of_a(a), of_b(b))
            assert.equal(dtype, y.dtype)
            check(y, a, b)
          end
        end
      end
    end)

    it("broadcasts batches, in " .. dtype, function()
      local a = sa.randn({2, 1, 18, 17}, {seed = 1, dtype = dtype})
      local b = sa.randn({3, 17, 16}, {seed = 2, dtype = dtype})
      local weight = sa.randn({17, 19}, {seed = 3, dtype = dtype})
      local y, z = sa.matmul(a, b), sa.matmul(a:expand(2, 3, 18, 17), weight)
      assert.same({2, 3, 18, 16}, y.shape)
      assert.same({2, 3, 18, 19}, z.shape)
      for i = 1, 2 do
        local one = a:select(1, i):select(1, 1)
        for j = 1, 3 do
          check(y:select(1, i):select(1, j), one, b:select(1, j))
          check(z:select(1, i):select(1, j), one, weight)
        end
      end
    end)
  end

  it("multiplies many small matrices, and activations by a weight, as it does one", function()
    local a, b = sa.randn({300, 4, 5}, {seed = 1}), sa.randn({300, 5, 6}, {seed = 2})
    local y = sa.matmul(a, b)
    -- cuBLAS takes other kernels for a batch than for one product.
    local function same(got, want)
      if got.device == "cpu" then
        assert.tensor.bitwise(got, want)
      else
        assert.tensor.near(got, want, {atol = 1e-5})
      end
    end
    for i = 1, 300, 23 do same(y:select(1, i), sa.matmul(a:select(1, i), b:select(1, i))) end
    local x, weight = sa.randn({7, 30, 16}, {seed = 3}), sa.randn({16, 24}, {seed = 4})
    same(sa.matmul(x, weight), sa.matmul(x:view(210, 16), weight):view(7, 30, 24))
    assert.tensor.near(sa.matmul(x:transpose(1, 2), weight), sa.matmul(x, weight):transpose(1, 2), {atol = 1e-5})
  end)

  it("gives zeros where there is nothing to sum, and empty tensors where there is nothing", function()
    assert.tensor.same(sa.matmul(sa.ones {2, 3, 0}, sa.ones {0, 4}), sa.zeros {2, 3, 4})
    assert.same({0, 4}, sa.matmul(sa.ones {0, 3}, sa.ones {3, 4}).shape)
    assert.same({0, 2, 4}, sa.matmul(sa.ones {0, 2, 3}, sa.ones {3, 4}).shape)
  end)

  it("lets NaN and infinity through to what reads them, by a zero too, and to nothing else", function()
    for _, size in ipairs {3, 60} do -- plain loops, and OpenBLAS
      for _, bad in ipairs {nan, inf} do
        local a, b = sa.ones {size, size}, sa.zeros {size, size}
        a:set(2, 3, bad)
        local y, z = sa.matmul(a, b), sa.matmul(b, a:transpose(1, 2))
        for i = 1, size do
          assert.equal(size * (i == 2 and 1 or 0), y:select(1, i):stats().nan)
          assert.equal(size * (i == 2 and 1 or 0), z:select(2, i):stats().nan)
        end
      end
    end
  end)

  it("gives the same bits every time, on any thread count", function()
    local a, b = sa.randn({3, 130, 70}, {seed = 1}), sa.randn({3, 70, 90}, {seed = 2})
    local small_a, small_b = sa.randn({4000, 8, 8}, {seed = 3}), sa.randn({4000, 8, 8}, {seed = 4})
    local first, small = sa.matmul(a, b), sa.matmul(small_a, small_b)
    require("spec.helper").with_threads(1, function()
      assert.tensor.bitwise(sa.matmul(a, b), first)
      assert.tensor.bitwise(sa.matmul(small_a, small_b), small)
    end)
  end)
end)

if require("spec.helper").device ~= "cpu" then return end -- OpenBLAS is the CPU's

describe("the host", function()
  local script = [[
local ffi = require "ffi"
ffi.cdef "int fegetround(void);"
local sa = require("spec.helper").sa
assert(sa.info().blas == "not loaded", sa.info().blas)
sa.matmul(sa.ones {2, 2}, sa.ones {2, 2})
assert(sa.info().blas == "not loaded", "a tiny product opened it")
local before = ffi.C.fegetround()
sa.matmul(sa.ones {100, 100}, sa.ones {100, 100})
assert(ffi.C.fegetround() == before)
local value = os.getenv "OPENBLAS_CORETYPE"
print(sa.info().blas)
print(value)
]]

  it("keeps its environment, and is told which BLAS there is", function()
    local output = child.must_run(script, {environment = {OPENBLAS_CORETYPE = false}})
    assert.truthy(output:match "OpenBLAS", output)
    assert.is_nil(output:match "Prescott", output)
    assert.truthy(output:match "\nnil\n$", output)
  end)

  it("may choose the core type itself", function()
    local core = jit.arch == "x64" and "Prescott" or "ARMV8"
    local output = child.must_run(script, {environment = {OPENBLAS_CORETYPE = core}})
    assert.truthy(output:lower():match(core:lower() .. ".*\n" .. core:lower() .. "\n$"), output)
  end)
end)
