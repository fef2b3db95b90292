--- what is inspected: the inputs with four dims, the parts of the mask, and one head at a time in f64

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local contents = require "safeattn.contents"
local expression = require "safeattn.mask_expression"
local mask = require "safeattn.mask"
local sdpa = require "safeattn.sdpa"

local ffi, lib = core.ffi, core.lib
local describe, fail = core.describe, core.fail

local Problem = {}
Problem.__index = Problem

local plan_cell = ffi.typeof "const sa_plan *[1]"
local counts_type = ffi.typeof "sa_plan_counts"

-- Arguments

--- A view with four dims: 1 for those in front that t has not.
local function with_four_dims(t)
  local shape = t.shape
  if #shape == 4 then return t end
  while #shape < 4 do table.insert(shape, 1, 1) end
  return t:expand(shape)
end
Problem.with_four_dims = with_four_dims

local function shape_text(shape)
  return "[" .. table.concat(shape, ",") .. "]"
end

local function check_sizes(fname, q, k, v)
  local rank = q:dim()
  if rank < 2 or rank > 4 then fail(fname, "q: got %s, wanted 2 to 4 dims", describe(q)) end
  for name, t in pairs {k = k, v = v} do
    if t:dim() ~= rank then fail(fname, "%s: got %s, wanted %d dims like q", name, describe(t), rank) end
  end
end

local function set_mask(p, fname, given)
  if given == nil then return end
  if not expression.is(given) then
    if not tensor.is(given) or not given.handle or given.dtype ~= "bool" then
      fail(fname, "mask: got %s, wanted a mask or a bool tensor%s", describe(given),
        tensor.is(given) and "; scores to add are given as `bias`" or "")
    end
    given = mask.dense(given)
  end
  p.parts[#p.parts + 1] = {mask = given}
end

local function count_text(count)
  return count == nil and "nil" or describe(count)
end

-- The restrictions that the options state, each as a mask with the text that stands for it.
local function set_parts(p, fname, options)
  p.parts = {}
  set_mask(p, fname, options.mask)
  local align = options.causal == true and "top-left" or options.causal or nil
  if align then
    p.parts[#p.parts + 1] = {mask = mask.causal(align),
      text = options.causal == true and "causal = true" or string.format("causal = %q", align)}
  end
  p.diagonal = align == "bottom-right" and p.S - p.L or 0
  local window = options.window
  if window then
    p.parts[#p.parts + 1] = {mask = mask.window(window[1], window[2], align),
      text = string.format("window = {%s, %s}", count_text(window[1]), count_text(window[2]))}
  end
  if p.bias and p.bias:stats().neginf > 0 then
    p.parts[#p.parts + 1] = {mask = mask.additive(p.bias), text = "bias = -inf"}
  end
  local all
  for _, part in ipairs(p.parts) do
    part.text = part.text or tostring(part.mask)
    all = all and all * part.mask or part.mask
  end
  p.mask = all or mask.all()
end

local kept_options = {scale = true, softcap = true, dropout = true, seed = true, bias = true, sinks = true,
  alibi = true, causal = true, window = true, backend = true, deterministic = true}

-- The C side checks every argument before it computes; without a batch there is nothing to compute.
local function check_options(p, fname, options)
  local empty = {}
  for name, value in pairs(options) do
    if kept_options[name] then empty[name] = value end
  end
  local bias = options.bias
  if tensor.is(bias) and bias.handle and bias:dim() == 4 and bias:size(1) > 0 and bias:size(1) == p.B then
    empty.bias = bias:detach():narrow(1, 1, 0)
  end
  local passed, problem = pcall(sdpa.forward, p.q:narrow(1, 1, 0), p.k:narrow(1, 1, 0), p.v:narrow(1, 1, 0), empty)
  if passed then return end
  local text = tostring(problem):gsub("^.-safeattn%.forward: ", ""):gsub("%[0(,%d+,%d+,%d+%])", "[" .. p.B .. "%1")
  fail(fname, "%s", text)
end

local function detached(t)
  return tensor.is(t) and t:detach() or t
end

--- Checks the arguments of `sa.inspect` and looks at none of their elements yet.
function Problem.new(fname, q, k, v, options, dout)
  tensor.pointer(q, fname, "q") tensor.pointer(k, fname, "k") tensor.pointer(v, fname, "v")
  check_sizes(fname, q, k, v)
  local known = {}
  for name in pairs(kept_options) do known[name] = true end
  for _, name in ipairs {"mask", "out", "lse", "weights"} do known[name] = true end
  options = core.options(fname, options, known)
  -- What sdpa gives besides is not wanted here, but may stand in options that serve both.
  for _, name in ipairs {"lse", "weights"} do core.boolean(fname, name, options[name]) end
  if options.out ~= nil then tensor.pointer(options.out, fname, "out") end

  local p = setmetatable({rank = q:dim(), plans = {}, empty_rows = {}, empty_keys = {}, options = {}}, Problem)
  for name in pairs(known) do
    if name ~= "out" and name ~= "lse" and name ~= "weights" then p.options[name] = detached(options[name]) end
  end
  p.given = {q = q:detach(), k = k:detach(), v = v:detach(), dout = dout and detached(dout)}
  p.q, p.k, p.v = with_four_dims(p.given.q), with_four_dims(p.given.k), with_four_dims(p.given.v)
  p.B, p.H, p.L, p.E = unpack(p.q.shape)
  p.Hkv, p.S, p.Ev = p.k:size(2), p.k:size(3), p.v:size(4)
  check_options(p, fname, options)
  p.group = p.Hkv > 0 and p.H / p.Hkv or 1

  if dout ~= nil then
    local wanted = q.shape
    wanted[#wanted] = p.Ev
    local handle = tensor.pointer(dout, fname, "dout")
    if dout.dtype ~= q.dtype or shape_text(dout.shape) ~= shape_text(wanted) or handle.device ~= q.handle.device then
      local came, like = tensor.describe_both(dout, q)
      fail(fname, "dout: got %s, wanted %s, like the output", came, (like:gsub("%b[]", shape_text(wanted))))
    end
    p.dout = with_four_dims(p.given.dout)
  end
  p.scale = options.scale or (p.E > 0 and 1 / math.sqrt(p.E) or 1)
  p.softcap, p.dropout = options.softcap or 0, options.dropout or 0
  if p.dropout > 0 and options.seed == nil then
    fail(fname, "seed: got nil, wanted the seed that the dropout was drawn with")
  end
  p.bias = p.options.bias and p.options.bias:expand(p.B, p.H, p.L, p.S)
  set_parts(p, fname, options)
  p:plan(p.mask, fname)
  return p
end

-- Plans

--- The compiled form of a mask, for the sizes of this problem: what C has, and its counts.
function Problem:plan(given, fname)
  local plan = self.plans[given]
  if plan then return plan end
  local nodes = expression.nodes(given, fname or "inspect", self.B, self.H, self.L, self.S)
  local out = plan_cell()
  core.call(fname or "inspect", lib.sa_mask_plan, out, nodes, lib.SA_NO_CAUSAL, -1, -1, self.B, self.H, self.L,
    self.S)
  local counts = counts_type()
  lib.sa_plan_count(out[0], counts)
  plan = {c = ffi.gc(out[0], lib.sa_plan_release), batch = tonumber(counts.batch), heads = tonumber(counts.heads),
    visible = tonumber(counts.visible)}
  self.plans[given] = plan
  return plan
end

--- Whether query i sees key j; all counted from 1.
function Problem:sees(b, h, i, j)
  return lib.sa_plan_visible(self:plan(self.mask).c, b - 1, h - 1, i - 1, j - 1)
end

--- Which queries see no key under a mask, or with `of_keys` which keys no query sees: a function of (b, h, place).
function Problem:emptiness(given, of_keys)
  local kept = of_keys and self.empty_keys or self.empty_rows
  if kept[given] then return kept[given] end
  local plan, handle = self:plan(given), tensor.handle()
  core.call("inspect", of_keys and lib.sa_plan_dead_keys or lib.sa_plan_dead_rows, plan.c, handle)
  local flags = tensor.adopt(handle)
  local flag, n = flags:data(), flags:size(3)
  -- Reading `flags` keeps it, and so the memory behind the pointer.
  kept[given] = function(b, h, place)
    local batch, head = plan.batch == 1 and 1 or b, plan.heads == 1 and 1 or h
    return flags.handle ~= nil and flag[((batch - 1) * plan.heads + head - 1) * n + place - 1]
  end
  return kept[given]
end

--- Whether query i sees a key.
function Problem:is_live(b, h, i)
  return not self:emptiness(self.mask)(b, h, i)
end

-- Heads

local function wide(t)
  return contents.wide("inspect", t)
end
Problem.wide = wide

--- The key head of a query head.
function Problem:key_head(h)
  return math.floor((h - 1) / self.group) + 1
end

local bits_of = ffi.typeof "const int32_t *"

-- Negative for a NaN alone: its magnitude, as an integer, is above that of infinity.
local function below(bits)
  return 0x7f800000 - bit.band(bits, 0x7fffffff)
end

local function holds_nan(data, rows, step, width)
  local bits, sign, other = ffi.cast(bits_of, data), 0, 0
  for n = 0, rows - 1 do
    local x = bits + n * step
    for d = 0, width - 4, 4 do
      sign = bit.bor(sign, below(x[d]), below(x[d + 1]))
      other = bit.bor(other, below(x[d + 2]), below(x[d + 3]))
    end
    for d = width - width % 4, width - 1 do sign = bit.bor(sign, below(x[d])) end
  end
  return bit.bor(sign, other) < 0
end

-- The rows of a matrix [n, width] as loops read them: what must stay alive, a pointer, and its step from row to row.
-- f32 without NaN is read where it lies: a copy in f64 takes longer than a query.
local function rows_of(t)
  local handle = t.handle
  local rows, width, step = tonumber(handle.shape[0]), tonumber(handle.shape[1]), tonumber(handle.stride[0])
  if handle.device == lib.SA_CPU and handle.dtype == lib.SA_F32 and (handle.stride[1] == 1 or width <= 1)
    and not holds_nan(handle.data, rows, step, width) then
    return t, t:data(), step
  end
  local copy = wide(t)
  return copy, copy:data(), width
end

--- Keys and values of one head: {k = pointer, k_step, v = pointer, v_step}, rows `step` elements apart; the last one
-- is kept until `forget`.
function Problem:head(b, h)
  local hk = self:key_head(h)
  local last = self.last
  if last and last.b == b and last.hk == hk then return last end
  self.last = nil
  local head = {b = b, hk = hk}
  head.keys, head.k, head.k_step = rows_of(self.k:select(1, b):select(1, hk))
  head.values, head.v, head.v_step = rows_of(self.v:select(1, b):select(1, hk))
  self.last = head
  return head
end

--- Forgets what was read: every question reads the tensors anew.
function Problem:forget()
  self.last = nil
end

--- Row i of one head of a tensor [B,H,L,n] in f64: the copy; its data() is what loops read.
function Problem.row_of(t, b, h, i)
  return wide(t:select(1, b):select(1, h):select(1, i))
end

--- An element of a tensor [H], in f64; nil without the tensor.
function Problem.element(t, h)
  return t and t:get(h) or nil
end

--- Checks 1-based b, h and, when it is wanted, i.
function Problem:check_place(fname, b, h, i, wants_row)
  core.integer(fname, "b", b, 1, self.B)
  core.integer(fname, "h", h, 1, self.H)
  if wants_row then core.integer(fname, "i", i, 1, self.L) end
end

return Problem
