-- casts: every value of the 16-bit floats, every tie between them, and the ends of every range

local ffi = require "ffi"
local helper = require "spec.helper"
local sa = helper.sa

local inf, nan = math.huge, 0 / 0
local dtypes = {"f32", "f64", "f16", "bf16", "bool", "i32", "i64"}
local halves = {f16 = {fraction = 10, bias = 15}, bf16 = {fraction = 7, bias = 127}}

-- As assert.equal, for loops of many thousands: luassert takes several microseconds a call.
local function check(wanted, got, what, ...)
  if got ~= wanted then error(string.format(what, ...) .. ": got " .. got .. ", wanted " .. wanted, 2) end
end

-- What 16 bits mean, by definition.
local function decode(bits, format)
  local sign = bits >= 0x8000 and -1 or 1
  local exponent = math.floor(bits % 0x8000 / 2 ^ format.fraction)
  local fraction = bits % 2 ^ format.fraction / 2 ^ format.fraction
  if exponent == 2 * format.bias + 1 then return fraction == 0 and sign * inf or nan end
  if exponent == 0 then return sign * fraction * 2 ^ (1 - format.bias) end
  return sign * (1 + fraction) * 2 ^ (exponent - format.bias)
end

local function infinity_bits(format)
  return (2 * format.bias + 1) * 2 ^ format.fraction
end

-- The patterns of a 16-bit tensor, from index 0 on. (Copied: a pointer does not keep its tensor.)
local function bits_of(t)
  local here = t:to("cpu")
  local bits, list = ffi.cast("const uint16_t *", here:data()), {}
  for n = 0, t:numel() - 1 do list[n] = bits[n] end
  return list
end

-- A 16-bit tensor that holds the patterns 0 .. 0xffff.
local function all_patterns(dtype)
  local t = sa.empty({0x10000}, {dtype = dtype, device = "cpu"})
  local bits = ffi.cast("uint16_t *", t:data())
  for n = 0, 0xffff do bits[n] = n end
  return t:to(helper.device)
end

local function f64_of(values)
  return sa.tensor(values, {dtype = "f64"})
end

local number = ffi.new("union { double real; int64_t bits; }")

-- The f64 next to a positive x, one step up or down.
local function neighbour(x, step)
  number.real = x
  number.bits = number.bits + step
  return number.real
end

describe("the 16-bit floats", function()
  for dtype, format in pairs(halves) do
    it("of all 65536 patterns of " .. dtype .. " are exact in f32 and f64, and come back as they were", function()
      local all = all_patterns(dtype)
      for wide, quiet in pairs {f32 = 0x7fc00000, f64 = 0x7ff80000} do
        local widened = all:to(wide)
        local here = widened:to("cpu")
        local values, back = here:data(), bits_of(widened:to(dtype))
        -- the sign, the exponent and the upper bits of the fraction: a NaN is not read as a number, see below
        local upper = ffi.cast("const int32_t *", values) + (wide == "f64" and 1 or 0)
        for n = 0, 0xffff do
          local wanted = decode(n, format)
          if wanted ~= wanted then
            check(quiet, bit.band(upper[wide == "f64" and 2 * n or n], quiet), "%04x in %s", n, wide)
            -- a NaN keeps its sign and payload, and is quiet
            check(bit.bor(n, 2 ^ (format.fraction - 1)), back[n], "%04x from %s", n, wide)
          else
            check(wanted, values[n], "%04x in %s", n, wide)
            check(1 / wanted, 1 / values[n], "1 / %04x in %s", n, wide) -- the sign of 0
            check(n, back[n], "%04x from %s", n, wide)
          end
        end
        widened:free()
      end
      local copied = bits_of(all:clone())
      for n = 0, 0xffff do check(n, copied[n], "%04x copied", n) end
    end)

    -- Between each pattern and the next one: a step past the lower, both sides of the middle, the middle, a step before
    -- the upper.
    it("take ties to even between any two neighbours of " .. dtype .. ", from f64 and from f32", function()
      local last = infinity_bits(format) - 1
      local inputs, negated, wanted = {}, {}, {}
      local function add(value, bits)
        inputs[#inputs + 1], negated[#negated + 1], wanted[#wanted + 1] = value, -value, bits
      end
      for n = 0, last do
        local low = decode(n, format)
        local high = n < last and decode(n + 1, format) or 2 ^ (format.bias + 1)
        local middle = low + (high - low) / 2
        local even = n % 2 == 0 and n or n + 1
        if low > 0 then add(neighbour(low, 1), n) end
        add(neighbour(middle, -1), n)
        add(middle, even)
        add(neighbour(middle, 1), n + 1)
        add(neighbour(high, -1), n + 1)
      end
      local values = f64_of(inputs)
      local positive, negative = bits_of(values:to(dtype)), bits_of(f64_of(negated):to(dtype))
      for i, bits in ipairs(wanted) do
        check(bits, positive[i - 1], "%.17g", inputs[i])
        check(bits + 0x8000, negative[i - 1], "%.17g", -inputs[i])
      end
      -- f32 holds the middles; the steps beside them round to low, middle or high first
      local narrow = values:to("f32")
      local from_narrow, exact = bits_of(narrow:to(dtype)), bits_of(narrow:to("f64"):to(dtype))
      for i = 0, #wanted - 1 do check(exact[i], from_narrow[i], "%.17g by way of f32", inputs[i + 1]) end
      for i, value in ipairs(narrow:totable()) do
        if value == inputs[i] then check(wanted[i], from_narrow[i - 1], "%.17g from f32", value) end
      end
    end)

    it("of " .. dtype .. " are rounded once from f64, where a step through f32 would round twice", function()
      local unit = 2 ^ -format.fraction
      -- just above a tie, by less than f32 can see
      local t = f64_of {1 + unit / 2 + 2 ^ -40, 1 + 3 * unit / 2 - 2 ^ -40, 1 + unit / 2, 1 + 3 * unit / 2}
      assert.same({1 + unit, 1 + unit, 1, 1 + 2 * unit}, t:to(dtype):totable())
      assert.same({1, 1 + 2 * unit, 1, 1 + 2 * unit}, t:to("f32"):to(dtype):totable())
    end)

    it("of " .. dtype .. " are the same from tables, fills and single elements as from casts", function()
      local unit = 2 ^ -format.fraction
      local value = 1 + unit / 2 + 2 ^ -40
      local t = sa.zeros({1}, {dtype = dtype})
      t:set(1, value)
      assert.equal(1 + unit, t:item())
      assert.equal(1 + unit, sa.full({}, value, {dtype = dtype}):item())
      assert.equal(1 + unit, sa.tensor({value}, {dtype = dtype}):item())
    end)
  end
end)

describe("a NaN", function()
  -- LuaJIT boxes its values in the bits of NaNs: read through the FFI as they are, these would be nil, booleans,
  -- strings and functions.
  it("is a number in Lua, whatever bits foreign memory has for it", function()
    for dtype, size in pairs {f32 = 4, f64 = 8, f16 = 2, bf16 = 2} do
      for upper = 0xf8, 0xff do
        local t = sa.zeros({3}, {dtype = dtype, device = "cpu"})
        local bytes = ffi.cast("uint8_t *", t:data())
        for n = 0, 3 * size - 1 do bytes[n] = n % size == size - 1 and 0xff or upper end
        t = t:to(helper.device)
        local function is_nan(x)
          assert.equal("number", type(x))
          assert.is_true(x ~= x)
        end
        is_nan(t:get(2))
        is_nan(t:narrow(1, 3, 1):view(1):item())
        for _, x in ipairs {t, t:view(3, 1):expand(3, 2):select(2, 1)} do
          local list = x:totable()
          assert.equal(3, #list)
          for i = 1, 3 do is_nan(list[i]) end
        end
        assert.equal(3, t:stats().nan)
        assert.truthy(tostring(t):find("nan"))
      end
    end
  end)
end)

describe("integers", function()
  it("go to f32 and f64 with one rounding, ties to even", function()
    local t = sa.tensor({0x1000001LL, 0x1000003LL, -0x1000001LL, 0x20000000000001LL, 0x20000000000003LL,
      0x7fffffffffffffffLL, 0x4000004000000001LL}, {dtype = "i64"})
    assert.same({2 ^ 24, 2 ^ 24 + 4, -2 ^ 24, 2 ^ 53, 2 ^ 53, 2 ^ 63, 2 ^ 62 + 2 ^ 39},
      t:to("f32"):totable())
    assert.same({2 ^ 24 + 1, 2 ^ 24 + 3, -2 ^ 24 - 1, 2 ^ 53, 2 ^ 53 + 4, 2 ^ 63, 2 ^ 62 + 2 ^ 38},
      t:to("f64"):totable())
  end)

  it("go to bf16 with one rounding, even beyond what f64 holds, and to f16 as far as it reaches", function()
    local tie = 0x4040000000000000LL -- half way between 2^62 and its neighbour in bf16, to even
    local t = sa.tensor({tie - 1, tie, tie + 1, -tie - 1, 257, 259}, {dtype = "i64"})
    assert.same({2 ^ 62, 2 ^ 62, 2 ^ 62 + 2 ^ 55, -2 ^ 62 - 2 ^ 55, 256, 260}, t:to("bf16"):totable())
    t = sa.tensor({2049, 2051, 65519, 65520, -65520, 2 ^ 40}, {dtype = "i64"})
    assert.same({2048, 2052, 65504, inf, -inf, inf}, t:to("f16"):totable())
    t = t:narrow(1, 1, 5):to("i32")
    assert.same({2048, 2052, 65504, inf, -inf}, t:to("f16"):totable())
  end)

  it("are cut from floats towards 0, held inside their range, and 0 for NaN", function()
    for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
      local t = sa.tensor({1.75, -1.75, 0.5, -0.5, nan, inf, -inf}, {dtype = dtype})
      assert.same({1, -1, 0, 0, 0, 2 ^ 31 - 1, -2 ^ 31}, t:to("i32"):totable())
      local wide = t:to("i64")
      for i, wanted in ipairs {1, -1, 0, 0, 0, 0x7fffffffffffffffLL, -0x7fffffffffffffffLL - 1} do
        assert.is_true(wide:get(i) == wanted)
      end
    end
    local t = f64_of {2 ^ 31 - 0.5, 2 ^ 31, -2 ^ 31 - 0.5, -2 ^ 31 - 1, 2 ^ 63 - 1024, 2 ^ 63, -2 ^ 63, 1e300}
    local most, least = 2 ^ 31 - 1, -2 ^ 31
    assert.same({most, most, least, least, most, most, least, most}, t:to("i32"):totable())
    local wide = t:to("i64")
    assert.is_true(wide:get(5) == 0x7ffffffffffffc00LL)
    assert.is_true(wide:get(6) == 0x7fffffffffffffffLL)
    assert.is_true(wide:get(7) == -0x7fffffffffffffffLL - 1)
    assert.is_true(wide:get(8) == 0x7fffffffffffffffLL)
  end)

  it("of 64 bits are held inside the range of 32", function()
    local t = sa.tensor({2 ^ 31, -2 ^ 31 - 1, 2 ^ 31 - 1, -5}, {dtype = "i64"})
    assert.same({2 ^ 31 - 1, -2 ^ 31, 2 ^ 31 - 1, -5}, t:to("i32"):totable())
  end)
end)

describe("bools", function()
  it("ask of every dtype whether it is zero; NaN is not", function()
    for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
      local t = sa.tensor({0, -0.0, 2 ^ -14, -3, nan, inf}, {dtype = dtype})
      assert.same({false, false, true, true, true, true}, t:to("bool"):totable())
    end
    for _, dtype in ipairs {"i32", "i64"} do
      assert.same({false, true, true}, sa.tensor({0, 256, -1}, {dtype = dtype}):to("bool"):totable())
    end
  end)

  it("are 0 or 1 in every dtype, whatever byte foreign memory holds", function()
    local bytes = ffi.new("uint8_t[6]", 0, 1, 2, 128, 255, 0)
    local t = sa.from_pointer(ffi.cast("bool *", bytes), {6}, {dtype = "bool", owner = bytes})
    for _, dtype in ipairs(dtypes) do
      local values = t:to(dtype):to("f64"):totable()
      assert.same({0, 1, 1, 1, 1, 0}, values)
    end
    local clean = t:clone()
    local stored = ffi.cast("const uint8_t *", clean:data())
    for i, wanted in ipairs {0, 1, 1, 1, 1, 0} do assert.equal(wanted, stored[i - 1]) end
    clean:free()
  end)
end)

describe("a cast", function()
  -- Values that all dtypes hold, so that only the route can go wrong.
  it("agrees between all 49 pairs of dtypes, over contiguous rows, strides, transposes and broadcasts", function()
    for _, from in ipairs(dtypes) do
      local source = sa.zeros({9, 70}, {dtype = from})
      for i = 1, 9 do
        for j = 1, 70 do source:set(i, j, (i * 31 + j * 7) % 5 < 2 and 1 or 0) end
      end
      local wanted = source:to("f64"):totable()
      for _, to in ipairs(dtypes) do
        assert.same(wanted, source:to(to):to("f64"):totable())
        local column = sa.zeros({70, 9}, {dtype = to})
        column:transpose(1, 2):copy(source)
        assert.same(wanted, column:transpose(1, 2):to("f64"):totable())
        local every_other = sa.zeros({9, 70, 2}, {dtype = to})
        every_other:select(3, 2):copy(source)
        assert.same(wanted, every_other:select(3, 2):to("f64"):totable())
        assert.equal(0, every_other:select(3, 1):to("f64"):stats().max)
        local repeated = sa.zeros({4, 70}, {dtype = to})
        repeated:copy(source:narrow(1, 3, 1))
        for i = 1, 4 do assert.same(wanted[3], repeated:select(1, i):to("f64"):totable()) end
      end
    end
  end)

  it("of a tensor onto an overlapping part of itself gives what was there before", function()
    local t = sa.arange(10)
    t:narrow(1, 3, 8):copy(t:narrow(1, 1, 8))
    assert.same({0, 1, 0, 1, 2, 3, 4, 5, 6, 7}, t:totable())
    t = sa.arange(10)
    t:narrow(1, 1, 8):copy(t:narrow(1, 3, 8))
    assert.same({2, 3, 4, 5, 6, 7, 8, 9, 8, 9}, t:totable())
    local square = sa.arange(2500):view(50, 50)
    local wanted = square:clone():transpose(1, 2):contiguous()
    square:copy(square:transpose(1, 2))
    assert.tensor.bitwise(square, wanted)
  end)
end)
