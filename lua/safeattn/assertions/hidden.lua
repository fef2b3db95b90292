--- whether what a mask hides has an influence: it is poisoned, and everything out of its reach must keep its bits

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local create = require "safeattn.create"
local expression = require "safeattn.mask_expression"
local compare = require "safeattn.assertions.compare"

local hidden = {}

local MOST_KEYS = 6 -- keys that are poisoned one by one
local huge = {f16 = 65504, bf16 = 3e38, f32 = 3e38, f64 = 1e308}

local function poisons_of(dtype)
  return {{"NaN", 0 / 0}, {"Inf", math.huge}, {"-Inf", -math.huge}, {"junk", huge[dtype]}, {"junk", -1234.5}}
end

-- B, H, Hkv, L, S of q and k, with dims that are missing in front as 1.
local function sizes_of(q, k)
  local function at(t, dim)
    local place = dim - 4 + t:dim()
    return place >= 1 and t:size(place) or 1
  end
  return {B = at(q, 1), H = at(q, 2), Hkv = at(k, 2), L = at(q, 3), S = at(k, 3)}
end

-- visible(b, h, i, j), counted from 1. It holds the tensor that it reads.
local function reader(mask, n)
  local dense = mask:dense {B = n.B, H = n.H, L = n.L, S = n.S}
  local bits, B, H = dense:data(), dense:size(1), dense:size(2)
  return function(b, h, i, j)
    local plane = ((B > 1 and b or 1) - 1) * H + (H > 1 and h or 1) - 1
    return dense and bits[(plane * n.L + i - 1) * n.S + j - 1]
  end
end

-- A [B,H,...] view of a tensor whose leading dims may be missing.
local function of_rank_4(t)
  local shape = t.shape
  while #shape < 4 do table.insert(shape, 1, 1) end
  return t:view(shape)
end

-- Runs fn forward and backward on copies that were changed by poison(copies, dout); a list of {name, tensor}.
local function run(fn, inputs, count, poison, seed)
  local copies, tracked = {}, {}
  for n = 1, count do
    local x = inputs[n]
    local float = tensor.is(x) and core.is_float[tensor.pointer(x, "masked_safe", "inputs").dtype]
    copies[n] = float and x:detach():contiguous():clone() or x
    if float then tracked[#tracked + 1] = n end
  end
  local poison_dout = poison(copies)
  for _, n in ipairs(tracked) do copies[n].requires_grad = true end
  local out = (fn(unpack(copies, 1, count)))
  if not tensor.is(out) then
    return nil, "fn: got a function that returned " .. core.describe(out) .. ", wanted a tensor first"
  end
  local results = {{"the output", out:detach()}}
  if out.requires_grad then
    local dout = create.randn(out.shape, {seed = seed}):to(out.dtype)
    poison_dout(dout)
    out:backward(dout)
    for _, n in ipairs(tracked) do
      results[#results + 1] = {"the gradient of input " .. n, copies[n].grad or create.zeros(copies[n].shape,
        {dtype = copies[n].dtype}), n}
    end
  end
  return results
end

-- Rows that see no key, and key rows that no query sees (in any head that reads them).
local function dead_places(n, visible)
  local rows, keys = {}, {}
  local group = n.Hkv > 0 and n.H / n.Hkv or 1
  for b = 1, n.B do
    for h = 1, n.H do
      for i = 1, n.L do
        local alive = false
        for j = 1, n.S do alive = alive or visible(b, h, i, j) end
        if not alive then rows[#rows + 1] = {b, h, i} end
      end
    end
    for g = 1, n.Hkv do
      for j = 1, n.S do
        local alive = false
        for h = (g - 1) * group + 1, g * group do
          for i = 1, n.L do alive = alive or visible(b, h, i, j) end
        end
        if not alive then keys[#keys + 1] = {b, g, j} end
      end
    end
  end
  return rows, keys
end

local function fill_rows(t, places, value)
  local whole = of_rank_4(t)
  for _, p in ipairs(places) do whole:select(1, p[1]):select(1, p[2]):select(1, p[3]):fill(value) end
end

-- Fills the places of a bias [..,L,S] whose pair is masked in all batches and heads that share it.
local function fill_bias(bias, n, visible, value)
  local whole = of_rank_4(bias)
  local B, H = whole:size(1), whole:size(2)
  for b = 1, B do
    for h = 1, H do
      for i = 1, n.L do
        for j = 1, n.S do
          local seen = false
          for c = B == 1 and 1 or b, B == 1 and n.B or b do
            for g = H == 1 and 1 or h, H == 1 and n.H or h do seen = seen or visible(c, g, i, j) end
          end
          if not seen then whole:set(b, h, i, j, value) end
        end
      end
    end
  end
end

-- What a poisoned key (b, g, j) reaches: the queries that see it, and the keys that those see. Everything else of the
-- results must keep its bits: skip functions for the output (and dq) and for dk and dv.
local function reach(n, visible, b, g, j)
  local rows, keys = {}, {}
  local group = n.H / n.Hkv
  for h = (g - 1) * group + 1, g * group do
    for i = 1, n.L do
      if visible(b, h, i, j) then
        rows[((b - 1) * n.H + h - 1) * n.L + i - 1] = true
        for other = 1, n.S do
          if visible(b, h, i, other) then keys[((b - 1) * n.Hkv + g - 1) * n.S + other - 1] = true end
        end
      end
    end
  end
  return rows, keys
end

local function compare_results(got, want, rows, keys, what)
  for r, result in ipairs(got) do
    local input, t = result[3], result[2]
    local reached = (input == nil or input == 1) and rows or (input == 2 or input == 3) and keys
    -- Of other gradients (a bias, a weight) nobody can say what a visible key may reach.
    if reached or rows == nil then
      local width = t:dim() > 0 and math.max(t:size(-1), 1) or 1
      local problem = compare.bit_difference(t, want[r][2], reached and function(place)
        return reached[math.floor(place / width)]
      end)
      if problem then return what .. " has an influence on " .. result[1] .. ": " .. problem end
    end
  end
end

-- What is wrong with the arguments, or nil.
local function mistake_in(fn, inputs, mask)
  if type(fn) ~= "function" then return "fn: got " .. core.describe(fn) .. ", wanted a function" end
  if type(inputs) ~= "table" or tensor.is(inputs) then
    return "inputs: got " .. core.describe(inputs) .. ", wanted a list: q, k, v"
  end
  for i = 1, 3 do
    local x = inputs[i]
    if not tensor.is(x) or x:dim() < 2 or x:dim() > 4 or not huge[x.dtype] then
      return ("inputs[%d]: got %s, wanted a float tensor of 2 to 4 dims"):format(i, core.describe(x))
    end
  end
  if not expression.is(mask) then return "mask: got " .. core.describe(mask) .. ", wanted a mask" end
end

local function is_bias(x, n)
  return tensor.is(x) and huge[x.dtype] and x:dim() >= 2 and x:size(-2) == n.L and x:size(-1) == n.S
end

local function keep() end

-- What NaN, Inf and junk have an influence on where nothing sees them, or nil. run_poisoned(poison) runs fn.
local function influence_of_dead(run_poisoned, want, n, visible, dtype, has_bias)
  local dead_rows, dead_keys = dead_places(n, visible)
  for _, poison in ipairs(poisons_of(dtype)) do
    local name, value = poison[1], poison[2]
    local got = run_poisoned(function(copies)
      fill_rows(copies[1], dead_rows, value)
      fill_rows(copies[2], dead_keys, value)
      fill_rows(copies[3], dead_keys, value)
      if has_bias then fill_bias(copies[4], n, visible, value) end
      return function(dout) fill_rows(dout, dead_rows, value) end
    end)
    local problem = compare_results(got, want, nil, nil, name .. " behind the mask (dead rows, dead keys"
      .. (has_bias and ", masked bias)" or ")"))
    if problem then return problem end
  end
end

-- The same of keys that some queries see and others do not: the others must not notice.
local function influence_of_keys(run_poisoned, want, n, visible)
  local step = math.max(1, math.ceil(n.S / MOST_KEYS))
  for j = 1, n.Hkv > 0 and n.B > 0 and n.S or 0, step do
    local b, g = j % n.B + 1, j % n.Hkv + 1
    local rows, keys = reach(n, visible, b, g, j)
    local got = run_poisoned(function(copies)
      fill_rows(copies[2], {{b, g, j}}, 0 / 0)
      fill_rows(copies[3], {{b, g, j}}, math.huge)
      return keep
    end)
    local problem = compare_results(got, want, rows, keys,
      ("NaN in key %d of batch %d, key head %d, which the mask hides there,"):format(j, b, g))
    if problem then return problem end
  end
end

--- Poisons what a mask hides and compares bits.
-- @param fn function of the inputs; its first result is the output [..,L,Ev]
-- @param inputs {q, k, v}, after them a bias [..,L,S] if there is one, and whatever else fn takes
-- @param mask the mask that fn applies
-- @return nil, or what has an influence that it must not have; when the arguments are wrong, nil and why
function hidden.influence(fn, inputs, mask)
  local wrong = mistake_in(fn, inputs, mask)
  if wrong then return nil, wrong end
  local n = sizes_of(inputs[1], inputs[2])
  local visible = reader(mask, n)
  local function run_poisoned(poison) return run(fn, inputs, table.maxn(inputs), poison, 1) end
  local function untouched() return keep end

  local want, mistake = run_poisoned(untouched)
  if not want then return nil, mistake end
  if compare_results(run_poisoned(untouched), want, nil, nil, "nothing") then
    return nil, "fn: got a function that gives different results for the same inputs"
  end
  return influence_of_dead(run_poisoned, want, n, visible, inputs[1].dtype, is_bias(inputs[4], n))
    or influence_of_keys(run_poisoned, want, n, visible)
end

return hidden
