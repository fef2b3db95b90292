-- pointwise operations: their values in every dtype, over strided, broadcast and long tensors

local sa = require("spec.helper").sa

local inf, nan = math.huge, 0 / 0

-- Relative; of the last bit of each dtype, with room for a few.
local tolerances = {f32 = 8e-7, f64 = 2e-15, f16 = 1e-3, bf16 = 8e-3}

-- erf by its series, enough for |x| < 4
local function erf(x)
  local sum, term = x, x
  for n = 1, 80 do
    term = -term * x * x / n
    sum = sum + term / (2 * n + 1)
  end
  return 2 / math.sqrt(math.pi) * sum
end

local functions = {
  neg = function(x) return -x end,
  exp = math.exp,
  log = math.log,
  sqrt = math.sqrt,
  tanh = math.tanh,
  relu = function(x) return math.max(x, 0) end,
  gelu = function(x) return x / 2 * (1 + erf(x / math.sqrt(2))) end,
  abs = math.abs,
}

-- Calls fn(x) for the values in a row, strided, expanded and transposed tensors. fn gives a tensor of the same shape.
local function each_layout(values, dtype, fn)
  local x = sa.tensor(values, {dtype = dtype})
  local want = fn(x)
  local count = #values
  local apart = sa.full({count, 3}, nan, {dtype = dtype}):select(2, 2):copy(x)
  assert.tensor.bitwise(fn(apart), want)
  assert.tensor.bitwise(fn(x:expand(4, count)), want:expand(4, count))
  local columns = x:view(count, 1):expand(count, 5)
  assert.tensor.bitwise(fn(columns:transpose(1, 2)), want:expand(5, count))
  return want
end

describe("functions", function()
  for name, fn in pairs(functions) do
    for dtype, tolerance in pairs(tolerances) do
      it("give " .. name .. " in " .. dtype, function()
        local values = {}
        for i = 1, 700 do
          values[i] = (i - 350.5) / 120 -- -2.9 .. 2.9, past one piece of the loops
          if name == "log" or name == "sqrt" then values[i] = math.abs(values[i]) end
        end
        local y = each_layout(values, dtype, sa[name])
        assert.equal(dtype, y.dtype)
        local rounded, want = sa.tensor(values, {dtype = dtype}):totable(), {}
        for i, x in ipairs(rounded) do want[i] = fn(x) end
        -- gelu's own formula cancels below 0
        assert.tensor.near(y, want, {rtol = tolerance, atol = name == "gelu" and 1e-14 or 0})
      end)
    end
  end

  it("follow IEEE where numbers end", function()
    for dtype in pairs(tolerances) do
      local x = sa.tensor({nan, inf, -inf, 0, -1}, {dtype = dtype})
      assert.tensor.near(x:exp(), {nan, inf, 0, 1, math.exp(-1)}, {rtol = 4e-3, nonfinite = "same"})
      assert.tensor.same(x:log(), {nan, inf, nan, -inf, nan})
      assert.tensor.same(x:sqrt(), {nan, inf, nan, 0, nan})
      assert.tensor.near(x:tanh(), {nan, 1, -1, 0, math.tanh(-1)}, {rtol = 4e-3, nonfinite = "same"})
      assert.tensor.same(x:relu(), {nan, inf, 0, 0, 0})
      assert.tensor.same(x:abs(), {nan, inf, inf, 0, 1})
    end
  end)

  it("reach subnormal results of exp, and the tails of gelu", function()
    assert.tensor.near(sa.tensor({-100, 88.5}):exp(), {math.exp(-100), math.exp(88.5)}, {rtol = 1e-5, atol = 1e-45})
    assert.tensor.near(sa.tensor({-6}):gelu(), {-5.919526e-9}, {rtol = 1e-6}) -- -3 erfc(6 / sqrt 2)
    assert.tensor.same(sa.tensor({-40, 40}):gelu(), {0, 40})
  end)

  it("let a gradient through relu only where it was open", function()
    local x = sa.tensor({-1, 0, 2}, {requires_grad = true})
    x:relu():backward(sa.tensor {nan, nan, 3})
    assert.tensor.same(x.grad, {0, 0, 3})
  end)
end)

describe("operators", function()
  for _, dtype in ipairs {"f32", "f64", "f16", "bf16", "i32", "i64"} do
    it("compute and compare " .. dtype .. ", broadcast any way", function()
      local a, b = sa.tensor({{1, 2, 3}, {4, 5, 6}}, {dtype = dtype}), sa.tensor({4, -2, 2}, {dtype = dtype})
      local cases = {
        add = {{5, 0, 5}, {8, 3, 8}}, sub = {{-3, 4, 1}, {0, 7, 4}}, mul = {{4, -4, 6}, {16, -10, 12}},
        lt = {{true, false, false}, {false, false, false}}, le = {{true, false, false}, {true, false, false}},
        gt = {{false, true, true}, {false, true, true}}, ge = {{false, true, true}, {true, true, true}},
        eq = {{false, false, false}, {true, false, false}}, ne = {{true, true, true}, {false, true, true}},
      }
      local layouts = {
        function(t) return t end,
        function(t) return t:transpose(1, -1):contiguous():transpose(1, -1) end,
        function(t) return t:view(1, unpack(t.shape)):expand(2, unpack(t.shape)):select(1, 2) end,
      }
      for name, want in pairs(cases) do
        for _, of_a in ipairs(layouts) do
          for _, of_b in ipairs(layouts) do
            local y = sa[name](of_a(a), of_b(b))
            assert.same(want, y:totable(), name)
            assert.equal(type(want[1][1]) == "boolean" and "bool" or dtype, y.dtype)
          end
        end
      end
      assert.same({{5, 0, 5}}, sa.add(a:narrow(1, 1, 1), b):totable())
      assert.same({{{5, 6, 7}}, {{-1, 0, 1}}, {{3, 4, 5}}}, sa.add(b:view(3, 1, 1), a:narrow(1, 1, 1)):totable())
    end)
  end

  it("divide floats by IEEE, integers towards zero", function()
    assert.tensor.same(sa.tensor {1, -1, 0} / 0, {inf, -inf, nan})
    local a, b = sa.tensor({7, -7, 7, -7}, {dtype = "i32"}), sa.tensor({2, 2, -2, -2}, {dtype = "i32"})
    assert.same({3, -3, -3, 3}, (a / b):totable())
    -- x / 0 is what a cast makes of infinity and NaN: no trap
    local limit = 2 ^ 31
    assert.same({limit - 1, -limit, 0}, (sa.tensor({5, -5, 0}, {dtype = "i32"}) / 0):totable())
    assert.same({limit - 1}, (sa.tensor({-limit}, {dtype = "i32"}) / -1):totable())
    assert.same({-limit}, (sa.tensor({limit - 1}, {dtype = "i32"}) + 1):totable())
  end)

  it("keep a number in f32 beside half types", function()
    local x = sa.ones({2}, {dtype = "bf16"})
    assert.tensor.same(x * 1.005859375 - 1, {0.0078125, 0.0078125}) -- rounded once, not to 1 before
    assert.tensor.same((x * 3):mul(1 + 1 / 256), {3.015625, 3.015625})
  end)

  it("compare bool, and NaN as IEEE does", function()
    local a, b = sa.tensor {true, false}, sa.tensor {true, true}
    assert.same({true, false}, a:eq(b):totable())
    assert.same({false, true}, a:lt(b):totable())
    local x = sa.tensor {nan}
    for name, want in pairs {lt = false, le = false, gt = false, ge = false, eq = false, ne = true} do
      assert.same({want}, sa[name](x, x):totable(), name)
      assert.same({want}, sa[name](x, 1):totable(), name)
    end
  end)
end)

describe("sa.where", function()
  for _, dtype in ipairs {"f32", "f64", "f16", "bf16", "bool", "i32", "i64"} do
    it("chooses " .. dtype .. ", broadcast", function()
      local a, b = sa.ones({1, 3}, {dtype = dtype}), sa.zeros({2, 1}, {dtype = dtype})
      local y = sa.where(sa.tensor {{true, false, true}, {false, false, true}}, a, b)
      assert.equal(dtype, y.dtype)
      assert.same({{1, 0, 1}, {0, 0, 1}}, y:to("f64"):totable())
    end)
  end

  it("does not let what it leaves out through", function()
    local a = sa.tensor({nan, 1}, {requires_grad = true})
    local y = sa.where(sa.tensor {false, true}, a, 0)
    assert.tensor.same(y, {0, 1})
    y:backward(sa.tensor {nan, 2})
    assert.tensor.same(a.grad, {0, 2})
  end)
end)
