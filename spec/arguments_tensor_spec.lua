-- bad arguments of everything that makes, changes or computes with tensors: the error says which, what came, what was
-- wanted; arguments_attention_spec.lua does the same for masks and attention

local helper = require "spec.helper"
local child = require "spec.child"
local ffi = require "ffi"
local sa = require "safeattn"

local inf, nan = math.huge, 0 / 0

local t = sa.zeros {2, 3}
local wide = sa.zeros({2, 3}, {dtype = "f64"})
local flags = sa.zeros({2, 3}, {dtype = "bool"})
local ids = sa.ones({2}, {dtype = "i32"})
local leaf = sa.zeros({2, 3}, {requires_grad = true})
local freed = sa.zeros {2}
freed:free()
local eight = sa.zeros {1, 1, 1, 1, 1, 1, 1, 1}
local nine_deep = {{{{{{{{{1}}}}}}}}}

-- Every row: argument, what came (as the message has it), what was wanted, and the call.
local cases = {
  tensor = {
    {"data", "nil", "a number, a boolean or tables of them", function() sa.tensor() end},
    {"data", '"abc"', "a number", function() sa.tensor("abc") end},
    {"data", "f32[2,3]", "tables of numbers", function() sa.tensor(t) end},
    {"data", "the mask none", "tables of numbers", function() sa.tensor(sa.mask.none()) end},
    {"data", 'a key "dtype"', "a list", function() sa.tensor {1, 2, dtype = "f64"} end},
    {"data", "a key 3", "a list", function() sa.tensor {{[3] = 1}} end},
    {"data", 'a key "n"', "a list", function() sa.tensor {{1, 2}, {1, 2, n = 2}} end},
    {"data", "a table of 1 at [2]", "a table of 2", function() sa.tensor {{1, 2}, {3}} end},
    {"data", "3 at [2]", "a table of 2", function() sa.tensor {{1, 2}, 3} end},
    {"data", "a table at [2]", "a number", function() sa.tensor {1, {2}} end},
    {"data", "nil", "a number", function() sa.tensor {{nil, 2}} end},
    {"data", "true at [2]", "a number", function() sa.tensor {1, true} end},
    {"data", "1 at [1][2]", "a boolean", function() sa.tensor {{true, 1}} end},
    {"data", '"x" at [2]', "a number", function() sa.tensor {1, "x"} end},
    {"data", "1.5 at [1]", "integers of i32", function() sa.tensor({1.5}, {dtype = "i32"}) end},
    {"data", "nan at [1]", "integers of i64", function() sa.tensor({nan}, {dtype = "i64"}) end},
    {"data", "2147483648 at [1]", "integers of i32", function() sa.tensor({2 ^ 31}, {dtype = "i32"}) end},
    {"data", "nested more than 8 deep", "at most 8", function() sa.tensor(nine_deep) end},
    {"dtype", '"f8"', "bf16, bool, f16, f32, f64, i32 or i64", function() sa.tensor({1}, {dtype = "f8"}) end},
    {"dtype", "32", "bf16", function() sa.tensor({1}, {dtype = 32}) end},
    {"device", '"tpu"', '"cpu"', function() sa.tensor({1}, {device = "tpu"}) end},
    {"requires_grad", "1", "true or false", function() sa.tensor({1}, {requires_grad = 1}) end},
    {"requires_grad", "true for i32", "f32, f64", function() sa.tensor({1}, {dtype = "i32", requires_grad = true}) end},
    {"options", "unknown option dtyp", "(did you mean dtype?)", function() sa.tensor({1}, {dtyp = "f64"}) end},
    {"options", '"f64"', "a table", function() sa.tensor({1}, "f64") end},
    {"options", "f32[2,3]", "a table", function() sa.tensor({1}, t) end},
  },
  full = {
    {"value", "nil", "a number", function() sa.full({2}) end},
    {"value", '"1"', "a number", function() sa.full({2}, "1") end},
    {"shape", "2", "a list of counts", function() sa.full(2, 1) end},
  },
  arange = {
    {"n", "nil", "a count", function() sa.arange() end},
    {"n", "-1", "a count", function() sa.arange(-1) end},
    {"n", "1.5", "a count", function() sa.arange(1.5) end},
    {"n", "nan", "a count", function() sa.arange(nan) end},
    {"start", '"a"', "a number", function() sa.arange(3, {start = "a"}) end},
    {"dtype", "bool", "numbers", function() sa.arange(3, {dtype = "bool"}) end},
    {"step", "true", "a number", function() sa.arange(3, {step = true}) end},
    {"step", "2000000000", "i32", function() sa.arange(3, {step = 2e9, dtype = "i32"}) end},
    {"options", "unknown option stop", "(did you mean step?)", function() sa.arange(3, {stop = 4}) end},
  },
  from_pointer = {
    {"data", "nil", "an FFI pointer", function() sa.from_pointer(nil, {1}) end},
    {"data", "a table", "an FFI pointer", function() sa.from_pointer({1}, {1}) end},
    {"data", "cdata int64_t", "an FFI pointer", function() sa.from_pointer(5LL, {1}) end},
    {"data", "cdata float **", "an FFI pointer", function() sa.from_pointer(ffi.new("float *[1]") + 0, {1}) end},
    {"data", "NULL", "the memory of f32[2]",
      function() sa.from_pointer(ffi.cast("float *", nil), {2}) end},
    {"data", "0x", "aligned to the 4 bytes of f32",
      function() sa.from_pointer(ffi.cast("float *", ffi.cast("char *", ffi.new("float[4]")) + 1), {2}) end},
    {"dtype", "none for cdata unsigned short *", "bf16",
      function() sa.from_pointer(ffi.cast("uint16_t *", ffi.new("uint16_t[2]")), {2}) end},
    {"shape", "24 bytes", "at most the array's 16", function() sa.from_pointer(ffi.new("float[4]"), {2, 3}) end},
    {"stride", "1 strides", "2", function() sa.from_pointer(ffi.new("float[4]"), {2, 2}, {stride = {1}}) end},
    {"stride", "-1 at [1]", "a count", function() sa.from_pointer(ffi.new("float[4]"), {4}, {stride = {-1}}) end},
    {"stride", "1099511627776 for a size of 1099511627776", "a reach of at most",
      function() sa.from_pointer(ffi.cast("float *", ffi.new("float[4]")), {2 ^ 40}, {stride = {2 ^ 40}}) end},
    {"options", "unknown option place", "device, dtype, owner, requires_grad or stride",
      function() sa.from_pointer(ffi.new("float[4]"), {4}, {place = "cpu"}) end},
  },
  shape = {{"t", "a tensor that was freed", "one that lives", function() return freed.shape end}},
  size = {
    {"dim", "3", "1 to 2, or -1 to -2", function() t:size(3) end},
    {"dim", "0", "1 to 2", function() t:size(0) end},
    {"dim", "-3", "1 to 2", function() t:size(-3) end},
    {"dim", "1.5", "1 to 2", function() t:size(1.5) end},
    {"dim", '"1"', "1 to 2", function() t:size("1") end},
    {"dim", "1", "a tensor with dims", function() sa.tensor(1):size(1) end},
  },
  stride = {{"dim", "3", "1 to 2", function() t:stride(3) end}},
  requires_grad = {
    {"value", "1", "true or false", function() t.requires_grad = 1 end},
    {"t", "i32[2]", "f32, f64, f16 or bf16", function() ids.requires_grad = true end},
    {"t", "the result of mul", "a leaf", function() (leaf * 2).requires_grad = false end},
  },
  grad = {
    {"value", "1", "a tensor", function() leaf.grad = 1 end},
    {"value", "f64[2,3]", "f32[2,3]", function() leaf.grad = wide end},
    {"value", "f32[3]", "f32[2,3]", function() leaf.grad = sa.zeros {3} end},
  },
  get = {
    {"index", "1 indices", "2", function() t:get(1) end},
    {"index", "3 indices", "2", function() t:get(1, 2, 3) end},
    {"index 1", "0", "from 1 to 2", function() t:get(0, 1) end},
    {"index 2", "4", "from 1 to 3", function() t:get(1, 4) end},
    {"index 2", "-1", "from 1 to 3", function() t:get(1, -1) end},
    {"index 2", "1.5", "from 1 to 3", function() t:get(1, 1.5) end},
    {"index 2", "nan", "from 1 to 3", function() t:get(1, nan) end},
    {"index 2", '"1"', "from 1 to 3", function() t:get(1, "1") end},
    {"index 2", "nil", "from 1 to 3", function() t:get(1, nil) end},
    {"index 1", "1", "none", function() sa.zeros({0}):get(1) end},
  },
  set = {
    {"value", "nothing", "a value", function() t:set() end},
    {"index", "1 indices", "2", function() t:set(1, 5) end},
    {"index 2", "4", "from 1 to 3", function() t:set(1, 4, 5) end},
    {"value", '"5"', "a number", function() t:set(1, 1, "5") end},
    {"value", "nil", "a number", function() t:set(1, 1, nil) end},
    {"value", "true", "a number", function() t:set(1, 1, true) end},
    {"value", "a table", "true, false or a number", function() flags:set(1, 1, {}) end},
    {"t", "a tensor that requires grad", "one that does not", function() leaf:set(1, 1, 5) end},
  },
  item = {{"t", "f32[2,3]", "one element", function() t:item() end}},
  fill = {
    {"t", "f32[2,3]", "memory for every element", function() sa.ones({}):expand(2, 3):fill(1) end},
    {"value", "nil", "a number", function() t:fill() end},
    {"value", "true", "a number", function() t:fill(true) end},
    {"t", "the result of a recorded mul", "a tensor that the tape does not know", function() (leaf * 2):fill(1) end},
  },
  copy = {
    {"from", "1", "a tensor", function() t:copy(1) end},
    {"from", "a tensor that was freed", "one that lives", function() t:copy(freed) end},
    {"from", "f32[3,2]", "[2,3]", function() t:copy(sa.zeros {3, 2}) end},
  },
  equal = {
    {"a", "nil", "a tensor", function() sa.equal(nil, t) end},
    {"b", "1", "a tensor", function() sa.equal(t, 1) end},
  },
  allclose = {
    {"a", "nil", "a tensor", function() sa.allclose(nil, t) end},
    {"b", '"x"', "a tensor", function() sa.allclose(t, "x") end},
    {"atol", '"x"', "a number", function() sa.allclose(t, t, {atol = "x"}) end},
    {"atol", "-1", "at least 0", function() sa.allclose(t, t, {atol = -1}) end},
    {"rtol", "nan", "at least 0", function() sa.allclose(t, t, {rtol = nan}) end},
    {"equal_nan", "1", "true or false", function() sa.allclose(t, t, {equal_nan = 1}) end},
    {"options", "unknown option tol", "atol, equal_nan or rtol", function() sa.allclose(t, t, {tol = 1}) end},
  },
  view = {
    {"shape", "[7]", "6", function() t:view(7) end},
    {"shape", "[6]", "contiguous", function() t:transpose(1, 2):view(6) end},
    {"shape", "[-1,0]", "counts", function() sa.zeros({0}):view(-1, 0) end},
    {"shape", "[-1,-1]", "one", function() t:view(-1, -1) end},
    {"shape", "[-1,4]", "6", function() t:view(-1, 4) end},
    {"shape", "-2 at [1]", "a count", function() t:view(-2, 3) end},
    {"shape", "1.5 at [2]", "a count", function() t:view(2, 1.5) end},
    {"shape", '"6"', "a count", function() t:view("6") end},
    {"shape", "f32[2,3]", "a list of counts", function() t:view(t) end},
    {"shape", "9 dims", "at most 8", function() t:view(1, 1, 1, 1, 1, 1, 1, 2, 3) end},
    {"shape", '"n"', "a list of counts", function() t:view {2, 3, n = 2} end},
  },
  transpose = {
    {"dim1", "3", "1 to 2", function() t:transpose(3, 1) end},
    {"dim2", "0", "1 to 2", function() t:transpose(1, 0) end},
    {"dim2", "nil", "1 to 2", function() t:transpose(1) end},
  },
  permute = {
    {"dims", "1 dims", "each of the 2 dims once", function() t:permute(1) end},
    {"dims", "1 twice", "each of the 2 dims once", function() t:permute(1, 1) end},
    {"dims", "3", "1 to 2", function() t:permute(1, 3) end},
    {"dims", "f32[2,3]", "a list of dims", function() t:permute(t) end},
    {"dims", 'a key "n"', "a list of dims", function() t:permute {2, 1, n = 2} end},
    {"dims", '"a"', "1 to 2", function() t:permute(1, "a") end},
  },
  narrow = {
    {"dim", "3", "1 to 2", function() t:narrow(3, 1, 1) end},
    {"start", "0", "from 1 to 4", function() t:narrow(2, 0, 1) end},
    {"start", "5", "from 1 to 4", function() t:narrow(2, 5, 0) end},
    {"start", "nil", "from 1 to 4", function() t:narrow(2) end},
    {"count", "3", "from 0 to 2", function() t:narrow(2, 2, 3) end},
    {"count", "-1", "from 0 to 2", function() t:narrow(2, 2, -1) end},
    {"count", "nil", "from 0 to 2", function() t:narrow(2, 2) end},
  },
  select = {
    {"dim", "3", "1 to 2", function() t:select(3, 1) end},
    {"index", "0", "from 1 to 2", function() t:select(1, 0) end},
    {"index", "3", "from 1 to 2", function() t:select(1, 3) end},
    {"index", "1", "none", function() sa.zeros({0}):select(1, 1) end},
  },
  expand = {
    {"shape", "[4,3]", "f32[2,3]", function() t:expand(4, 3) end},
    {"shape", "[9007199254740992,9007199254740992]", "elements", function() sa.ones({}):expand(2 ^ 53, 2 ^ 53) end},
    {"shape", "[3]", "2 dims of f32[2,3]", function() t:expand(3) end},
    {"shape", "[-1,2,3]", "f32[2,3]", function() t:expand(-1, 2, 3) end},
    {"shape", '"4"', "a count", function() t:expand("4") end},
  },
  to = {
    {"target", '"f8"', "a dtype", function() t:to("f8") end},
    {"target", "nil", "a dtype", function() t:to() end},
    {"target", "f64[2,3]", "a dtype", function() t:to(wide) end},
    {"device", '"cude"', '"cpu"', function() t:to("cude") end},
    {"dtype", "8", "bf16", function() t:to {dtype = 8} end},
    {"options", "unknown option type", "device or dtype", function() t:to {type = "f32"} end},
  },
  cat = {
    {"tensors", "nil", "a list", function() sa.cat() end},
    {"tensors", "f32[2,3]", "a list", function() sa.cat(t) end},
    {"tensors", "an empty list", "at least one", function() sa.cat {} end},
    {"tensors", 'a key "dim"', "a list of tensors", function() sa.cat {t, t, dim = 2} end},
    {"tensors[2]", "1", "a tensor", function() sa.cat {t, 1} end},
    {"tensors[2]", "f64[2,3]", "f32[2,3]", function() sa.cat {t, wide} end},
    {"tensors[2]", "f32[3,4]", "in all dims but 1", function() sa.cat {t, sa.zeros {3, 4}} end},
    {"tensors[2]", "f32[3]", "f32[2,3]", function() sa.cat {t, sa.zeros {3}} end},
    {"dim", "3", "1 to 2", function() sa.cat({t, t}, 3) end},
    {"dim", "1", "a tensor with dims", function() sa.cat {sa.tensor(1), sa.tensor(2)} end},
  },
  stack = {
    {"tensors", "nil", "a list", function() sa.stack() end},
    {"tensors", "a key 3", "a list of tensors", function() sa.stack {t, [3] = t} end},
    {"tensors[2]", "f32[3]", "f32[2,3]", function() sa.stack {t, sa.zeros {3}} end},
    {"tensors[1]", "8 dims", "less", function() sa.stack {eight} end},
    {"dim", "4", "1 to 3", function() sa.stack({t, t}, 4) end},
  },
  where = {
    {"condition", "true", "a tensor", function() sa.where(true, t, t) end},
    {"condition", "f32", "bool", function() sa.where(t, t, t) end},
    {"a", "two numbers", "a tensor", function() sa.where(flags, 1, 2) end},
    {"a", "nil", "a tensor", function() sa.where(flags, nil, t) end},
    {"b", "nil", "a tensor", function() sa.where(flags, t) end},
    {"b", "f64", "f32", function() sa.where(flags, t, wide) end},
  },
  masked_fill = {
    {"x", "nil", "a tensor", function() sa.masked_fill(nil, flags, 1) end},
    {"mask", "f32[2,3]", "a bool tensor that broadcasts to f32[2,3]", function() t:masked_fill(t, 1) end},
    {"mask", "bool[2,2,3]", "a bool tensor that broadcasts to f32[2,3]",
      function() t:masked_fill(sa.full({2, 2, 3}, true), 1) end},
    {"mask", "bool[2]", "a bool tensor that broadcasts to f32[2,3]",
      function() t:masked_fill(sa.full({2}, true), 1) end},
    {"value", "nil", "a number", function() t:masked_fill(flags) end},
    {"value", "true", "a number", function() t:masked_fill(flags, true) end},
  },
  matmul = {
    {"a", "nil", "a tensor", function() sa.matmul(nil, t) end},
    {"b", "2", "a tensor", function() t:matmul(2) end},
    {"b", "2", "3", function() t:matmul(t) end},
    {"b", "f32[3]", "dims", function() t:matmul(sa.zeros {3}) end},
    {"b", "f64", "f32", function() t:matmul(sa.zeros({3, 2}, {dtype = "f64"})) end},
    {"a", "i32", "f32, f64", function()
      local i = sa.ones({2, 2}, {dtype = "i32"})
      i:matmul(i)
    end},
  },
  layernorm = {
    {"x", "nil", "a tensor", function() sa.layernorm() end},
    {"x", "i32", "f32, f64", function() sa.layernorm(ids) end},
    {"weight", "1", "a tensor", function() sa.layernorm(t, 1) end},
    {"weight", "[2]", "[3]", function() sa.layernorm(t, sa.zeros {2}) end},
    {"bias", "f64", "f32", function() sa.layernorm(t, nil, sa.zeros({3}, {dtype = "f64"})) end},
    {"epsilon", "-1", "at least 0", function() sa.layernorm(t, nil, nil, {epsilon = -1}) end},
    {"epsilon", "nan", "at least 0", function() sa.layernorm(t, nil, nil, {epsilon = nan}) end},
    {"epsilon", "inf", "at least 0", function() sa.layernorm(t, nil, nil, {epsilon = inf}) end},
    {"epsilon", '"x"', "a number", function() sa.layernorm(t, nil, nil, {epsilon = "x"}) end},
    {"options", "unknown option eps", "epsilon", function() sa.layernorm(t, nil, nil, {eps = 1}) end},
  },
  embedding = {
    {"table", "nil", "a tensor", function() sa.embedding() end},
    {"table", "f32[]", "dims", function() sa.embedding(sa.ones({}), ids) end},
    {"ids", "1", "a tensor", function() sa.embedding(t, 1) end},
    {"ids", "f32", "i32 or i64", function() sa.embedding(t, t) end},
    {"ids", "0", "1", function() sa.embedding(t, sa.tensor({0}, {dtype = "i32"})) end},
    {"ids", "3", "2", function() sa.embedding(t, sa.tensor({3}, {dtype = "i32"})) end},
  },
  cross_entropy = {
    {"x", "nil", "a tensor", function() sa.cross_entropy() end},
    {"ids", "nil", "a tensor", function() t:cross_entropy() end},
    {"ids", "f32", "i32 or i64", function() t:cross_entropy(t) end},
    {"ids", "[3]", "[2]", function() t:cross_entropy(sa.ones({3}, {dtype = "i32"})) end},
    {"ids", "4", "3", function() t:cross_entropy(sa.tensor({1, 4}, {dtype = "i32"})) end},
    {"ids", "0", "1", function() t:cross_entropy(sa.tensor({1, 0}, {dtype = "i32"})) end},
    {"ignore", "1.5", "an integer", function() t:cross_entropy(ids, {ignore = 1.5}) end},
    {"reduction", '"avg"', '"mean", "sum" or "none"', function() t:cross_entropy(ids, {reduction = "avg"}) end},
    {"options", "unknown option ignored", "(did you mean ignore?)",
      function() t:cross_entropy(ids, {ignored = 0}) end},
  },
  argmax = {
    {"x", "nil", "a tensor", function() sa.argmax() end},
    {"dim", "3", "1 to 2", function() t:argmax(3) end},
    {"keep", "true without a dim", "a dim", function() t:argmax(nil, {keep = true}) end},
    {"keep", "1", "true or false", function() t:argmax(1, {keep = 1}) end},
    {"options", "unknown option keepdim", "keep", function() t:argmax(1, {keepdim = true}) end},
    {"x", "f32[0] with nothing to choose from", "something", function() sa.zeros({0}):argmax(1) end},
  },
  backward = {
    {"t", "f32[2,3]", "one that requires grad", function() t:backward() end},
    {"gradient", "none", "f32[2,3]", function() leaf:backward() end},
    {"gradient", "1", "a tensor", function() leaf:backward(1) end},
    {"gradient", "f64[2,3]", "f32[2,3]", function() leaf:backward(wide) end},
    {"gradient", "f32[3]", "f32[2,3]", function() leaf:backward(sa.zeros {3}) end},
  },
  no_grad = {{"fn", "nil", "a function", function() sa.no_grad() end}},
  gradcheck = {
    {"fn", "nil", "a function", function() sa.gradcheck(nil, {t}) end},
    {"fn", "that returned nil", "a float tensor", function() sa.gradcheck(function() end, {t}) end},
    {"fn", "that returned bool[2,3]", "a float tensor",
      function() sa.gradcheck(function(x) return x:gt(0) end, {t}) end},
    {"inputs", "f32[2,3]", "a list", function() sa.gradcheck(function(x) return x end, t) end},
    {"inputs", 'a key "atol"', "a list", function() sa.gradcheck(function(x) return x end, {t, atol = 1}) end},
    {"inputs", "no float tensor", "at least one", function() sa.gradcheck(function(x) return x end, {ids}) end},
    {"inputs[1]", "a tensor that was freed", "one that lives",
      function() sa.gradcheck(function(x) return x end, {freed}) end},
    {"eps", "0", "positive", function() sa.gradcheck(function(x) return x end, {t}, {eps = 0}) end},
    {"atol", "-1", "not negative", function() sa.gradcheck(function(x) return x end, {t}, {atol = -1}) end},
    {"rtol", '"x"', "finite", function() sa.gradcheck(function(x) return x end, {t}, {rtol = "x"}) end},
    {"options", "unknown option tol", "samples or seed",
      function() sa.gradcheck(function(x) return x end, {t}, {tol = 1}) end},
  },
  seed = {
    {"seed", "-1", "a count", function() sa.seed(-1) end},
    {"seed", '"x"', "a count", function() sa.seed("x") end},
    {"seed", "nan", "a count", function() sa.seed(nan) end},
  },
  threads = {
    {"n", "0", "from 1", function() sa.threads(0) end},
    {"n", '"2"', "from 1", function() sa.threads("2") end},
    {"n", "1.5", "from 1", function() sa.threads(1.5) end},
  },
  isa = {
    {"name", "5", '"generic"', function() sa.isa(5) end},
    {"name", '"mmx"', '"auto"', function() sa.isa("mmx") end},
  },
}

-- What constructors of a shape have in common.
for _, name in ipairs {"empty", "zeros", "ones", "rand", "randn"} do
  local make = sa[name]
  cases[name] = {
    {"shape", "nil", "a list of counts", function() make() end},
    {"shape", "3", "a list of counts", function() make(3) end},
    {"shape", "f32[2,3]", "a list of counts", function() make(t) end},
    {"shape", "-1 at [2]", "a count", function() make {2, -1} end},
    {"shape", "1.5 at [1]", "a count", function() make {1.5} end},
    {"shape", "nan at [1]", "a count", function() make {nan} end},
    {"shape", '"2" at [1]', "a count", function() make {"2"} end},
    {"shape", '"dtype"', "a list of counts", function() make {2, dtype = "f32"} end},
    {"shape", "9 dims", "at most 8", function() make {1, 1, 1, 1, 1, 1, 1, 1, 1} end},
    {"dtype", '"float"', "f32", function() make({2}, {dtype = "float"}) end},
    {"device", '"gpu"', '"cpu"', function() make({2}, {device = "gpu"}) end},
    {"requires_grad", '"yes"', "true or false", function() make({2}, {requires_grad = "yes"}) end},
    {"requires_grad", "i64", "f32, f64", function() make({2}, {requires_grad = true, dtype = "i64"}) end},
    {"options", "unknown option requiresgrad", "(did you mean requires_grad?)",
      function() make({2}, {requiresgrad = true}) end},
    {"options", "true", "a table", function() make({2}, true) end},
  }
end
for _, name in ipairs {"rand", "randn"} do
  local make = sa[name]
  table.remove(cases[name], 13)
  for _, case in ipairs {
    {"dtype", "i64", "f32, f64", function() make({2}, {dtype = "i64"}) end},
    {"seed", "-1", "a count", function() make({2}, {seed = -1}) end},
    {"seed", '"x"', "a count", function() make({2}, {seed = "x"}) end},
  } do table.insert(cases[name], case) end
end

for _, name in ipairs {"neg", "exp", "log", "sqrt", "tanh", "relu", "gelu", "abs"} do
  local apply = sa[name]
  cases[name] = {
    {"x", "nil", "a tensor", function() apply() end},
    {"x", "1", "a tensor", function() apply(1) end},
    {"x", "bool", "f32, f64", function() apply(flags) end},
    {"x", "a tensor that was freed", "one that lives", function() apply(freed) end},
  }
end

for _, name in ipairs {"add", "sub", "mul", "div", "lt", "le", "gt", "ge", "eq", "ne"} do
  local apply = sa[name]
  cases[name] = {
    {"a", "nil", "a tensor", function() apply(nil, t) end},
    {"b", "nil", "a tensor", function() apply(t) end},
    {"b", '"1"', "a tensor", function() apply(t, "1") end},
    {"b", "true", "a tensor", function() apply(t, true) end},
    {"a", "1", "a tensor", function() apply(1, 2) end},
    {"b", "f64", "f32", function() apply(t, wide) end},
    {"b", "[2,2]", "[2,3]", function() apply(t, sa.zeros {2, 2}) end},
    {"b", "a tensor that was freed", "one that lives", function() apply(t, freed) end},
  }
end

for _, name in ipairs {"sum", "mean", "max", "min"} do
  local reduce = sa[name]
  cases[name] = {
    {"x", "nil", "a tensor", function() reduce() end},
    {"dims", "3", "1 to 2", function() reduce(t, 3) end},
    {"dims", '"all"', "1 to 2", function() reduce(t, "all") end},
    {"dims", "3", "1 to 2", function() reduce(t, {1, 3}) end},
    {"dims", "2 twice", "each dim once", function() reduce(t, {2, -1}) end},
    {"dims", '"keep"', "options come after", function() reduce(t, {keep = true}) end},
    {"dims", "a key 3", "a list of dims", function() reduce(t, {[3] = 1}) end},
    {"keep", "1", "true or false", function() reduce(t, 1, {keep = 1}) end},
    {"options", "unknown option keepdims", "keep", function() reduce(t, 1, {keepdims = true}) end},
    {"options", "true", "a table", function() reduce(t, 1, true) end},
  }
end

for _, name in ipairs {"dim", "numel", "is_contiguous", "data", "contiguous", "clone", "detach", "free", "stats",
  "totable", "item", "size", "stride", "get", "set", "fill", "copy", "view", "transpose", "permute", "narrow", "select",
  "expand", "to", "backward"} do
  cases[name] = cases[name] or {}
  for _, case in ipairs {
    {"t", "a tensor that was freed", "one that lives", function() t[name](freed, 1, 1, 1) end},
    {"t", "nil", "a tensor", function() t[name]() end},
    {"t", "7", "a tensor", function() t[name](7) end},
    {"t", "a table", "a tensor", function() t[name]({}) end},
  } do table.insert(cases[name], case) end
end

local function has(text, part)
  return text:find(part, 1, true) ~= nil
end

for name, rows in pairs(cases) do
  describe("a bad argument of " .. name, function()
    for i, row in ipairs(rows) do
      local argument, got, wanted, call = unpack(row)
      it(string.format("(%d: %s, %s)", i, argument, got), function()
        local message = helper.message_of(call)
        local start = "safeattn." .. name .. ": " .. argument .. ": "
        assert.equal(start, message:sub(1, #start))
        assert.truthy(has(message:sub(#start), got), got .. " is not what came in: " .. message)
        assert.truthy(has(message:sub(#start), wanted), wanted .. " is not what was wanted in: " .. message)
        if not has(got, "freed") then assert.matches("wanted", message, 1, true) end
      end)
    end
  end)
end

describe("a call that fails", function()
  it("changes nothing and leaks nothing", function()
    local lib = require("safeattn.core").lib
    local use = ffi.new("sa_memory_use")
    local function blocks()
      lib.sa_memory(use)
      return tonumber(use.blocks)
    end
    local function fail_all()
      for _, rows in pairs(cases) do
        for _, row in ipairs(rows) do pcall(row[4]) end
      end
      return helper.settled(blocks)
    end
    -- What a spec before this one left on the stack may be freed only now.
    local before, once = helper.settled(blocks), fail_all()
    assert(once <= before, ("%d blocks became %d"):format(before, once))
    assert.equal(once, fail_all())
    assert.same({{0, 0, 0}, {0, 0, 0}}, t:totable())
    assert.same({{0, 0, 0}, {0, 0, 0}}, leaf:totable())
    assert.same({{false, false, false}, {false, false, false}}, flags:totable())
    assert.is_nil(leaf.grad)
  end)

  it("says what came without asking the caller's classes", function()
    local Model = {describe = function(model) return model.name:upper() end}
    assert.equal("safeattn.matmul: a: got a table, wanted a tensor",
      helper.message_of(sa.matmul, setmetatable({}, Model), t))
  end)
end)

describe("a function of the C face that gives back no status", function()
  it("takes NULL", function()
    assert.equal("alive\n", child.must_run([[
local core = require "safeattn.core"
local ffi, lib = core.ffi, core.lib
local t, pointer = ffi.new "sa_tensor", ffi.new "const char *[1]"
lib.sa_info(nil)
lib.sa_memory(nil)
lib.sa_attention_init(nil)
lib.sa_blocks_release(nil, 1)
lib.sa_tensor_retain(nil)
lib.sa_tensor_release(nil)
lib.sa_tensor_extent(nil, pointer, pointer)
lib.sa_tensor_extent(t, nil, pointer)
lib.sa_tensor_extent(t, pointer, nil)
lib.sa_mask_retain(nil)
lib.sa_mask_release(nil)
lib.sa_plan_release(nil)
lib.sa_plan_count(nil, nil)
print "alive"
]]))
  end)
end)
