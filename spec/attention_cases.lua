-- attention problems for the specs: made of a plain table, run on any engine, compared with the definition in f64

local sa = require "safeattn"
local core = require "safeattn.core"
local tensor = require "safeattn.tensor"

local ffi, lib, bit = core.ffi, core.lib, require "bit"
local device = require("spec.helper").device

local cases = {}

-- While a case runs, fresh memory is filled with 0x7f, which is a huge number or a NaN in every float dtype: an element
-- that a kernel forgets to write then shows. (-6 is glibc's M_PERTURB; it fills with the complement.)
pcall(ffi.cdef, "int mallopt(int, int);")
local function poison_fresh_memory(on)
  pcall(function() ffi.C.mallopt(-6, on and 0x80 or 0) end)
end

-- Engines

--- Every engine that is under test: the reference, and the fused kernels on each instruction set (SAFEATTN_TEST_ISA: on
-- this one), or those of the device that the specs run on.
cases.engines = {{backend = "reference"}}
cases.fused = {}
if device ~= "cpu" then
  cases.fused = {{backend = "fused", device = device}}
  cases.engines = {{backend = "reference", device = device}, cases.fused[1]}
else
  local info = ffi.new("sa_host_info")
  lib.sa_info(info)
  for isa in ffi.string(info.isas):gmatch("%S+") do
    local engine = {backend = "fused", isa = isa}
    if isa == (os.getenv "SAFEATTN_TEST_ISA" or isa) then
      table.insert(cases.engines, engine)
      table.insert(cases.fused, engine)
    end
  end
end

--- Runs f with an engine's instruction set and thread count in force, and fresh memory poisoned.
function cases.with(engine, f)
  assert(lib.sa_set_isa(engine.isa or "auto") == 0, ffi.string(lib.sa_last_error()))
  local threads = sa.threads()
  if engine.threads then sa.threads(engine.threads) end
  poison_fresh_memory(true)
  local ok, result = pcall(f)
  poison_fresh_memory(false)
  sa.threads(threads)
  lib.sa_set_isa("auto")
  if not ok then error(result, 0) end
  return result
end

--- The dtypes under test (SAFEATTN_TEST_DTYPE: this one).
cases.dtypes = {os.getenv "SAFEATTN_TEST_DTYPE"}
if not cases.dtypes[1] then cases.dtypes = {"f32", "f64", "f16", "bf16"} end

--- How many times fewer cases are wanted: SAFEATTN_QUICK, for what makes everything slower (3 for sanitizers, more
-- for the emulator of GPUs); 1 means all.
cases.fewer = tonumber(os.getenv "SAFEATTN_QUICK") or 1

--- What takes every `fewer`-th case of lists of any length, so that all kinds come: a function that says whether to.
function cases.every(fewer)
  local n = 0
  return function()
    n = n % fewer + 1
    return n == 1
  end
end

--- A function that gives the next `count` of a list at every call where fewer cases are wanted, else all of it.
function cases.turns(list, count)
  local n = 0
  return function()
    if cases.fewer == 1 then return list end
    local some = {}
    for k = 1, count do
      n = n % #list + 1
      some[k] = list[n]
    end
    return some
  end
end

-- Places

-- A tensor of the same contents and strides where an engine wants it.
local function moved(t, to)
  if t.device == to then return t end
  local count, single = 1, t
  for d, size in ipairs(t.shape) do
    count = count + math.max(size - 1, 0) * t:stride(d)
    if t:stride(d) == 0 and size > 1 then single = single:narrow(d, 1, 1) end
  end
  local memory = t.dtype == "bool" and sa.full({count}, true, {device = to})
    or sa.full({count}, core.is_float[t.handle.dtype] and 0 / 0 or 0, {dtype = t.dtype, device = to})
  sa.from_pointer(memory:data(), single.shape, {stride = t:stride(), dtype = t.dtype, device = to, owner = memory})
    :copy(single)
  return sa.from_pointer(memory:data(), t.shape, {stride = t:stride(), dtype = t.dtype, device = to, owner = memory})
end

--- A tensor, or a table of them (what is no tensor is left as it is), on the device of an engine, with their strides.
function cases.place(t, engine)
  if tensor.is(t) then return moved(t, engine.device or "cpu") end
  local placed = {}
  for name, x in pairs(t) do placed[name] = tensor.is(x) and moved(x, engine.device or "cpu") or x end
  return placed
end

-- Contents

-- Uniform numbers on [0, 1), the same for the same seed.
local function generator(seed)
  local state = bit.tobit(seed % 65536 * 40503 + 12345)
  local function uniform()
    state = bit.bxor(state, bit.lshift(state, 13))
    state = bit.bxor(state, bit.rshift(state, 17))
    state = bit.bxor(state, bit.lshift(state, 5))
    return bit.rshift(state, 1) / 2 ^ 31
  end
  for _ = 1, 8 do uniform() end
  return uniform
end
cases.generator = generator

-- Near enough to normal, and without the tails that would make tolerances a matter of luck.
local function normal(uniform)
  return (uniform() + uniform() + uniform() + uniform() - 2) * math.sqrt(3)
end

local function size_of(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

--- A contiguous f64 tensor of value(uniform, index).
function cases.filled(shape, seed, value)
  local t = sa.empty(shape, {dtype = "f64"})
  local data, uniform = t:data(), generator(seed)
  for n = 0, size_of(shape) - 1 do data[n] = value(uniform, n) end
  return t
end

local function times(factor)
  return function(uniform) return normal(uniform) * factor end
end

local function integers(uniform)
  return math.floor(uniform() * 3) - 1
end

local function heavy_tailed(uniform)
  return normal(uniform) * 2 ^ math.floor(uniform() * 12 - 8)
end

-- What q, k, v and dout hold.
local contents = {
  normal = {q = times(1), k = times(1), v = times(1), dout = times(1)},
  spread = {q = times(6), k = times(4), v = times(1), dout = times(1)},  -- scores to +-100
  ties = {q = integers, k = integers, v = integers, dout = integers},
  huge = {q = times(1), k = times(1), v = times(1e30), dout = times(1e-3), f16 = 1e4 / 1e30},
  tiny = {q = times(1), k = times(1), v = times(1e-36), dout = times(1), f16 = 1e-3 / 1e-36},
  heavy = {q = heavy_tailed, k = heavy_tailed, v = heavy_tailed, dout = heavy_tailed},
}
cases.contents = {"normal", "spread", "ties", "huge", "tiny", "heavy"}

-- What a bias holds. Where a value must exceed f16, the case gives the bias in f32.
local biases = {
  normal = function() return normal end,
  -- Pairs, and every fourth row in full.
  inf = function(shape)
    local width = shape[#shape]
    return function(uniform, n)
      local row = math.floor(n / width)
      local x = normal(uniform)
      return (uniform() < 0.3 or row % 4 == 1) and -math.huge or x
    end
  end,
  -- Finite, however low: not a mask.
  lowest = function()
    return function(uniform) return uniform() < 0.6 and -1e30 or normal(uniform) end
  end,
  highest = function()
    return function(uniform) return uniform() < 0.6 and 1e30 or normal(uniform) end
  end,
  -- With contents "ties" and scale 1 the scores are exact in f32, their LSE is not.
  offset = function()
    return function(uniform) return 2 ^ 20 + integers(uniform) end
  end,
}

-- Layouts

-- A tensor of the same contents that lies in memory in another way.
local layouts = {
  plain = function(t) return t end,
  -- [B,L,H,E] in memory.
  interleaved = function(t)
    local s = t.shape
    return sa.empty({s[1], s[3], s[2], s[4]}, {dtype = t.dtype}):transpose(2, 3):copy(t)
  end,
  -- Rows at odd addresses, NaN between them.
  padded = function(t)
    local s = t.shape
    local wide = sa.full({s[1], s[2], s[3], s[4] + 5}, 0 / 0, {dtype = t.dtype})
    return wide:narrow(4, 4, s[4]):copy(t)
  end,
  -- [B,H,E,L] in memory: the last dim has no unit stride.
  columns = function(t)
    local s = t.shape
    return sa.empty({s[1], s[2], s[4], s[3]}, {dtype = t.dtype}):transpose(3, 4):copy(t)
  end,
  -- Every second row and every second head of a larger tensor.
  sparse = function(t)
    local s = t.shape
    local large = sa.full({s[1], s[2], 2, s[3], 2, s[4]}, 0 / 0, {dtype = t.dtype})
    return large:select(5, 2):select(3, 1):copy(t)
  end,
  -- One batch and one head, repeated.
  expanded = function(t)
    local s = t.shape
    if s[1] == 0 or s[2] == 0 then return t end
    return t:narrow(1, 1, 1):narrow(2, 1, 1):expand(s)
  end,
}
cases.layouts = {"plain", "interleaved", "padded", "columns", "sparse", "expanded"}

-- Masks

local m = sa.mask

local function bools(shape, seed, density, special)
  local t = sa.empty(shape, {dtype = "bool"})
  local data, uniform = t:data(), generator(seed)
  local keys, queries = shape[#shape], shape[#shape - 1]
  for n = 0, size_of(shape) - 1 do
    local visible = uniform() < density
    if special then visible = special(visible, math.floor(n / keys) % queries, n % keys) end
    data[n] = visible
  end
  return t
end

-- Runs of equal ids of very different lengths, with a negative id and a repeated one among them.
local function documents(n, seed)
  local ids, uniform, id = {}, generator(seed), 0
  while #ids < n do
    local length = math.floor(2 ^ (uniform() * 7))
    for _ = 1, math.min(length, n - #ids) do ids[#ids + 1] = id == 2 and -1 or id % 5 end
    id = id + 1
  end
  return sa.tensor(ids, {dtype = "i32"})
end

local function lengths(c, n)
  local list = {}
  for b = 1, c.batch do list[b] = b == 1 and math.floor(n * 0.6) or b == 2 and 0 or n end
  return list
end

-- mask kind -> function(case): a mask, or a bool tensor.
local masks = {
  all = function() return m.all() end,
  none = function() return m.none() end,
  causal = function() return m.causal() end,
  bottom_right = function() return m.causal("bottom-right") end,
  anticausal = function() return -m.causal() end,
  window = function() return m.window(20, 3) end,
  window_bottom_right = function() return m.window(70, 0, "bottom-right") end,
  padding = function(c) return m.padding(lengths(c, c.keys)) end,
  padding_both = function(c) return m.padding(lengths(c, c.keys), lengths(c, c.queries)) end,
  documents = function(c)
    return m.documents(documents(math.max(c.queries, c.keys), 3):narrow(1, 1, c.queries),
      documents(math.max(c.queries, c.keys), 3):narrow(1, 1, c.keys))
  end,
  causal_documents = function(c)
    return m.documents(documents(math.max(c.queries, c.keys), 4):narrow(1, 1, c.queries),
      documents(math.max(c.queries, c.keys), 4):narrow(1, 1, c.keys)) * m.causal()
  end,
  prefix = function(c) return m.prefix(math.min(17, c.keys)) + m.causal() end,
  global = function() return m.global(2) + m.window(9, 9) end,
  blocks = function(c)
    return m.blocks(bools({c.heads, math.ceil(c.queries / 16), math.ceil(c.keys / 16)}, 5, 0.4), 16)
  end,
  dense = function(c) return bools({c.batch, c.heads, c.queries, c.keys}, 6, 0.5) end,
  dense_per_batch = function(c) return m.dense(bools({c.batch, 1, c.queries, c.keys}, 7, 0.9)) end,
  dense_keys = function(c) return bools({1, 1, 1, c.keys}, 8, 0.5) end,
  -- Rows that see nothing, keys that nobody sees.
  dead = function(c)
    return m.dense(bools({c.queries, c.keys}, 9, 0.7, function(visible, i, j)
      return visible and i % 5 ~= 2 and j % 7 ~= 3
    end))
  end,
  single = function(c)
    return m.dense(bools({c.queries, c.keys}, 9, 1, function(_, i, j) return j == i * 37 % math.max(c.keys, 1) end))
  end,
  fn = function()
    return m.fn(function(_, h, i, j) return (i * 7 + j * 3 + h) % 4 ~= 0 end, {batch = false})
  end,
  random = function() return m.random(0.3, 11) end,
}
cases.masks = {}
for name in pairs(masks) do table.insert(cases.masks, name) end
table.sort(cases.masks)

--- The mask of a case (a mask, or a bool tensor), or nil.
function cases.mask(c)
  return c.mask and masks[c.mask](c) or nil
end

--- The pairs that the mask of a case shows: bool [B,H,L,S].
function cases.visible(c)
  local mask = cases.mask(c)
  if tensor.is(mask) then mask = m.dense(mask) end
  return mask:dense({B = c.batch, H = c.heads, L = c.queries, S = c.keys}):expand(c.batch, c.heads, c.queries, c.keys)
end

-- Cases

local defaults = {
  dtype = "f32", batch = 2, heads = 4, key_heads = 2, queries = 70, keys = 65, width = 16, layout = "plain",
  values = "normal", seed = 1, dlse = true,
}

--- The case with defaults filled in. Fields, all plain values:
--
-- * `dtype`, `batch`, `heads`, `key_heads`, `queries`, `keys`, `width`, `value_width` (default: width)
-- * `rank`: 4, 3 or 2; `mask`: one of cases.masks; `causal`, `window`, `scale`, `softcap`, `dropout`: as sa.sdpa's
-- * `bias`: its dims, as in "b1ls" or "s"; `bias_values`: normal, inf, lowest, highest or offset
-- * `extras_dtype`: of bias, sinks and slopes
-- * `sinks` ("huge": finite, but some hide all keys), `alibi`, `dlse`, `weights`: true to have them
-- * `layout`: one of cases.layouts; `values`: one of cases.contents; `seed`
-- * `backend`, `isa`, `threads`, `device`: the engine, when only one is meant
function cases.complete(c)
  local full = setmetatable({}, {__index = defaults})
  for name, value in pairs(c) do full[name] = value end
  full.value_width = full.value_width or full.width
  return full
end

local function serialise(value)
  if type(value) == "table" then
    local parts, names = {}, {}
    for name in pairs(value) do
      if type(name) == "string" then names[#names + 1] = name end
    end
    table.sort(names)
    for _, item in ipairs(value) do parts[#parts + 1] = serialise(item) end
    for _, name in ipairs(names) do parts[#parts + 1] = name .. " = " .. serialise(value[name]) end
    return "{" .. table.concat(parts, ", ") .. "}"
  end
  return type(value) == "string" and string.format("%q", value)
    or type(value) == "number" and string.format("%.17g", value) or tostring(value)
end

--- One line of Lua that runs a case again on an engine, from the root of the tree.
function cases.line(c, engine)
  local full = {}
  for name, value in pairs(c) do full[name] = value end
  for name, value in pairs(engine) do full[name] = value end
  return 'require("spec.attention_cases").check' .. serialise(full)
end

local function without_leading_dims(t, rank)
  while t and t:dim() > rank do t = t:select(1, 1) end
  return t
end

--- The tensors of a complete case: q k v dout dlse, and bias sinks alibi when it has them.
function cases.operands(c)
  local values = contents[c.values]
  local of_f16 = c.dtype == "f16" and values.f16 or 1
  local function operand(name, shape, factor)
    local t = cases.filled(shape, c.seed * 16 + #name + name:byte(), values[name])
    if factor ~= 1 then
      local data = t:data()
      for n = 0, t:numel() - 1 do data[n] = data[n] * factor end
    end
    return without_leading_dims(layouts[c.layout](t:to(c.dtype)), c.rank or 4)
  end
  local o = {
    q = operand("q", {c.batch, c.heads, c.queries, c.width}, 1),
    k = operand("k", {c.batch, c.key_heads, c.keys, c.width}, 1),
    v = operand("v", {c.batch, c.key_heads, c.keys, c.value_width}, of_f16),
    dout = operand("dout", {c.batch, c.heads, c.queries, c.value_width}, 1),
  }
  if c.dlse then
    o.dlse = without_leading_dims(
      cases.filled({c.batch, c.heads, c.queries}, c.seed + 7, normal):to(c.dtype == "f64" and "f64" or "f32"),
      (c.rank or 4) - 1)
  end
  if c.bias then
    local sizes, shape = {b = c.batch, h = c.heads, l = c.queries, s = c.keys, ["1"] = 1}, {}
    for letter in c.bias:gmatch(".") do shape[#shape + 1] = sizes[letter] end
    local value = biases[c.bias_values or "normal"](shape)
    o.bias = cases.filled(shape, c.seed + 8, value):to(c.extras_dtype or c.dtype)
  end
  if c.sinks then
    -- The second head's sink is -inf: as if it had none.
    o.sinks = cases.filled({c.heads}, c.seed + 9, function(uniform, h)
      if c.sinks == "huge" then return (h % 2 == 0 and 1e30 or -1e30) / (h + 1) end
      return h == 1 and -math.huge or normal(uniform) * 2
    end):to(c.extras_dtype or c.dtype)
  end
  if c.alibi then
    o.alibi = cases.filled({c.heads}, c.seed + 10, function(_, h) return h == 1 and 0 or 2 ^ -(h + 1) end)
      :to(c.extras_dtype or c.dtype)
  end
  return o
end

--- The options of sa.forward for a case.
function cases.options(c, o)
  return {
    mask = cases.mask(c), bias = o.bias, sinks = o.sinks, alibi = o.alibi, causal = c.causal, window = c.window,
    scale = c.scale, softcap = c.softcap, dropout = c.dropout, seed = c.dropout and c.seed, weights = c.weights,
  }
end

local function all_nan(...)
  for _, t in ipairs {...} do
    if t:stats().nan ~= t:numel() then return false end
  end
  return true
end

-- A given `out`, poisoned, inside a larger buffer: at odd places of wider rows, or with a few elements on both sides.
-- The second result says whether all around it is as it was.
local function guarded_out(c, shape, engine)
  local wide = c.layout == "padded" or c.layout == "sparse"
  local last = shape[#shape]
  if wide then
    local buffer_shape = {unpack(shape)}
    buffer_shape[#shape] = last + 3
    local buffer = sa.full(buffer_shape, 0 / 0, {dtype = c.dtype, device = engine.device})
    local left, right = buffer:narrow(-1, 1, 1), buffer:narrow(-1, last + 2, 2)
    return buffer:narrow(-1, 2, last), function() return all_nan(left, right) end
  end
  local n, guard = size_of(shape), 16  -- so that kernels that write 16 bytes at once may be chosen
  local buffer = sa.full({n + 2 * guard}, 0 / 0, {dtype = c.dtype, device = engine.device})
  local before, behind = buffer:narrow(1, 1, guard), buffer:narrow(1, guard + n + 1, guard)
  return buffer:narrow(1, guard + 1, n):view(shape), function() return all_nan(before, behind) end
end

--- Forward and backward of a case on an engine: a table of out, lse, weights, dq, dk, dv, dbias, dsinks, dalibi.
function cases.run(c, o, engine)
  return cases.with(engine, function()
    o = cases.place(o, engine)
    local options = cases.place(cases.options(c, o), engine)
    options.backend = engine.backend
    local out_shape = o.q.shape
    out_shape[#out_shape] = c.value_width
    local intact
    options.out, intact = guarded_out(c, out_shape, engine)
    local run = sa.forward(o.q, o.k, o.v, options)
    local g = run:backward(o.dout, o.dlse)
    if not intact() then error("out: memory around the given buffer was written: " .. cases.line(c, engine), 0) end
    return cases.place({
      out = run.out, lse = run.lse, weights = run.weights, dq = g.dq, dk = g.dk, dv = g.dv, dbias = g.dbias,
      dsinks = g.dsinks, dalibi = g.dalibi,
    }, {device = "cpu"})
  end)
end

--- What the definition gives in f64.
function cases.oracle(c, o)
  local exact = {}
  for name, t in pairs(o) do exact[name] = t:to("f64"):contiguous() end
  local options = cases.options(c, exact)
  options.backend = "reference"
  local run = sa.forward(exact.q, exact.k, exact.v, options)
  local g = run:backward(exact.dout, exact.dlse)
  return {
    out = run.out, lse = run.lse, weights = run.weights, dq = g.dq, dk = g.dk, dv = g.dv, dbias = g.dbias,
    dsinks = g.dsinks, dalibi = g.dalibi,
  }
end

-- Comparison

cases.results = {"out", "lse", "weights", "dq", "dk", "dv", "dbias", "dsinks", "dalibi"}

-- Half an ulp of a value, relative to it, and of the smallest normal one, absolute.
local half_ulp = {f32 = 2 ^ -24, f64 = 2 ^ -53, f16 = 2 ^ -11, bf16 = 2 ^ -8}
local half_tiny = {f32 = 2 ^ -150, f64 = 0, f16 = 2 ^ -25, bf16 = 2 ^ -134}

-- The largest size of a finite element, and of a row's finite elements together.
local function sizes_of(t)
  if not t then return 0, 0 end
  local exact = t:to("f64"):contiguous()
  local data, width, largest, largest_row = exact:data(), exact:size(-1), 0, 0
  for first = 0, exact:numel() - 1, width do
    local row = 0
    for d = first, first + width - 1 do
      local size = math.abs(data[d])
      if size < math.huge then
        largest, row = math.max(largest, size), row + size * size
      end
    end
    largest_row = math.max(largest_row, row)
  end
  return largest, math.sqrt(largest_row)
end

-- What the terms of each gradient come to, by their sizes: what a rounding error is relative to, when the terms cancel
-- (a row with one key has a gradient of 0, and so has a bias that is the same for all keys).
local function magnitudes(c, o)
  local query, key, value = sizes_of(o.q), sizes_of(o.k), sizes_of(o.v)
  local dout, dout_row = sizes_of(o.dout)
  local dscore = dout_row * value / (1 - (c.dropout or 0)) + sizes_of(o.dlse)
  local scale = math.abs(c.scale or 1 / math.sqrt(c.width))
  local rows = math.sqrt(c.batch * c.heads * c.queries)  -- sums of so many errors of either sign
  return {
    out = 0, lse = 0, weights = 0, dq = scale * dscore * key, dk = scale * dscore * query * rows, dv = dout * rows,
    dbias = dscore * rows * math.sqrt(c.keys), dsinks = dscore * rows,
    dalibi = dscore * rows * math.max(c.queries, c.keys),
  }
end

-- How far a result may be off: relative to itself, relative to the largest of its tensor, and absolutely.
local function tolerance(c, engine, name, dtype, magnitude)
  local exact = engine.backend == "reference" or c.dtype == "f64"
  -- Scores beyond 100 have an ulp of 8e-6 in f32; ALiBi makes such of distances.
  local spread = c.values == "spread" or c.values == "heavy" or c.alibi
  local norm, rounding
  -- dout * v and dout * out are sums of so many products, each off by half an ulp of them, with either sign, and what
  -- is left of a row with one key is the difference of the two: of twice as many.
  local sums = math.max(8, math.sqrt(2 * c.value_width))
  if exact then
    norm, rounding = 1e-12, half_ulp.f64 * sums
  elseif name == "out" or name == "weights" or name == "lse" then
    -- A score is a sum of `width` products in one chain, each of which rounds what is there by then.
    norm, rounding = spread and 2e-5 * math.max(1, math.sqrt(c.width / 64)) or 3e-6, 0
    -- AMX takes weights in two parts, off by 2^-17 of them.
    if engine.isa == "amx" and name == "out" then norm = math.max(norm, 2 ^ -17) end
  else
    norm, rounding = spread and 1e-4 or 5e-6, half_ulp.f32 * sums
    -- The gradients of the half types read `out` as the forward rounded it: the sum of dout * out is off by that.
    if c.dtype ~= "f32" then rounding = 2 * half_ulp[c.dtype] end
  end
  local tiny = half_tiny[dtype] * 2
  -- What is that small of a row whose sink has nearly all of it, the kernels take for 0 (LOWEST_EXPONENT).
  if name == "weights" and not exact then tiny = math.max(tiny, 2 ^ -102) end
  if engine.device and engine.backend ~= "reference" and c.dtype ~= "f64" then
    -- The products of GPUs take weights and their gradients in the half type, as every kernel there does, and those of
    -- f32 in parts, of which the ones below the smallest normal number are lost.
    if c.dtype ~= "f32" and name ~= "lse" and name ~= "weights" then
      norm = (name == "out" and 1 or 2) * half_ulp[c.dtype]
    end
    tiny = math.max(tiny, 2 ^ -126)
  end
  return half_ulp[dtype] * 1.001, norm, tiny + rounding * magnitude + (name == "lse" and norm or 0)
end

--- What is wrong with `got` (any dtype) beside `want` (f64): nil, or a sentence.
function cases.difference(got, want, relative, norm_relative, absolute)
  if table.concat(got.shape, ",") ~= table.concat(want.shape, ",") then
    return string.format("shape {%s}, wanted {%s}", table.concat(got.shape, ","), table.concat(want.shape, ","))
  end
  local exact = {dtype = "f64", device = "cpu"}
  local a, b = got:to(exact):contiguous(), want:to(exact):contiguous()
  local x, y, n = a:data(), b:data(), a:numel()
  local largest = 0
  for i = 0, n - 1 do
    local size = math.abs(y[i])
    if size > largest and size < math.huge then largest = size end
  end
  local bad, worst, at = 0, -1, nil
  for i = 0, n - 1 do
    local g, w = x[i], y[i]
    local excess = 0  -- over what is allowed; infinite for the wrong kind of value
    if w ~= w then
      if g == g then excess = math.huge end
    elseif math.abs(w) == math.huge then
      if g ~= w then excess = math.huge end
    else
      local limit = relative * math.abs(w) + norm_relative * largest + absolute
      local off = math.abs(g - w)
      if off ~= off then excess = math.huge elseif off > limit then excess = off / limit end
    end
    if excess > 0 then
      bad = bad + 1
      if excess > worst then worst, at = excess, i end
    end
  end
  if bad == 0 then return nil end
  local index, rest = {}, at
  for d = #got.shape, 1, -1 do
    index[d] = rest % got.shape[d] + 1
    rest = math.floor(rest / got.shape[d])
  end
  return string.format("%d of %d wrong, the worst at (%s): got %.9g, wanted %.9g, %.3g times what is allowed"
    .. " (the largest is %.3g)", bad, n, table.concat(index, ","), x[at], y[at], worst, largest)
end

--- What is wrong with the results of a case: nil, or sentences.
function cases.compare(c, o, engine, got, want)
  local problems, magnitude = {}, magnitudes(c, o)
  for _, name in ipairs(cases.results) do
    if (got[name] ~= nil) ~= (want[name] ~= nil) then
      problems[#problems + 1] = name .. (got[name] and ": not wanted" or ": missing")
    elseif got[name] then
      local problem = cases.difference(got[name], want[name], tolerance(c, engine, name, got[name].dtype,
        magnitude[name]))
      if problem then problems[#problems + 1] = name .. ": " .. problem end
    end
  end
  if #problems == 0 then return nil end
  return table.concat(problems, "\n  ") .. "\n  " .. cases.line(c, engine)
end

--- Runs a case on its engine, or on all (or those given), and raises what is wrong.
function cases.check(given, engines)
  local c = cases.complete(given)
  if c.backend then engines = {{backend = c.backend, isa = c.isa, threads = c.threads, device = c.device}} end
  local o = cases.operands(c)
  local want = cases.oracle(c, o)
  local problems = {}
  for _, engine in ipairs(engines or cases.engines) do
    local ok, result = pcall(cases.run, c, o, engine)
    problems[#problems + 1] = not ok and result .. "\n  " .. cases.line(given, engine)
      or cases.compare(c, o, engine, result, want)
  end
  if #problems > 0 then error(table.concat(problems, "\n"), 0) end
end

return cases
