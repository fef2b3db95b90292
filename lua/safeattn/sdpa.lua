--- attention: sdpa on the tape, forward and backward without it, the merge of parts, and the stand-alone softmax

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local autograd = require "safeattn.autograd"
local expression = require "safeattn.mask_expression"
local mask = require "safeattn.mask"
local random = require "safeattn.random"

local ffi, lib = core.ffi, core.lib
local describe, fail, call = core.describe, core.fail, core.call
local pointer, adopt = tensor.pointer, tensor.adopt
local descriptor, new_handle = tensor.descriptor, tensor.handle

local M = {}

local attention_type = ffi.typeof "sa_attention"
local tensor_list = ffi.typeof "const sa_tensor *[?]"
local output_list = ffi.typeof "sa_tensor *[?]"

-- Options

local option_names = {
  mask = true, bias = true, causal = true, window = true, scale = true, softcap = true, sinks = true, alibi = true,
  dropout = true, seed = true, backend = true, deterministic = true, out = true, lse = true, weights = true,
}
local backends = {auto = lib.SA_AUTO, reference = lib.SA_REFERENCE, fused = lib.SA_FUSED}

local function causality(fname, causal)
  if not causal then return lib.SA_NO_CAUSAL end
  if causal == true then return lib.SA_TOP_LEFT end
  return expression.alignments[causal]
    or fail(fname, 'causal: got %s, wanted true, false, "top-left" or "bottom-right"', describe(causal))
end

local function set_window(a, fname, window)
  if type(window) ~= "table" or getmetatable(window) then
    fail(fname, "window: got %s, wanted {left, right}: counts, or nil for unbounded", describe(window))
  end
  for key in pairs(window) do
    if key ~= 1 and key ~= 2 then
      fail(fname, "window: got the key %s, wanted {left, right}: counts, or nil for unbounded", describe(key))
    end
  end
  local left, right = window[1], window[2]
  a.window_left = left == nil and -1 or core.integer(fname, "window[1]", left)
  a.window_right = right == nil and -1 or core.integer(fname, "window[2]", right)
end

-- The mask that the option gives: a mask, or a bool tensor.
local function mask_of(fname, given)
  if expression.is(given) then return given end
  if not tensor.is(given) then fail(fname, "mask: got %s, wanted a mask or a bool tensor", describe(given)) end
  if core.is_float[pointer(given, fname, "mask").dtype] then
    fail(fname, "mask: got %s, wanted a mask or a bool tensor; scores to add are given as `bias`, and"
      .. " mask.additive masks where they are -inf", describe(given))
  elseif given.dtype ~= "bool" then
    fail(fname, "mask: got %s, wanted a mask or a bool tensor", describe(given))
  end
  return mask.dense(given)
end

-- The nodes of a mask for the sizes of q and k; nil when those are not sizes of attention, which C then says.
local function mask_nodes(fname, given, q, k)
  if given.handle then return given.handle end
  local rank = q.ndim
  if rank < 2 or rank > 4 or k.ndim ~= rank then return nil end
  return expression.nodes(given, fname, rank == 4 and tonumber(q.shape[0]) or 1,
    rank >= 3 and tonumber(q.shape[rank - 3]) or 1, tonumber(q.shape[rank - 2]), tonumber(k.shape[rank - 2]))
end

local function set_numbers(a, fname, options)
  local scale, softcap, dropout, seed = options.scale, options.softcap, options.dropout, options.seed
  if scale ~= nil then
    a.scale = core.number(fname, "scale", scale)
    a.has_scale = 1
  end
  if softcap ~= nil then a.softcap = core.number(fname, "softcap", softcap) end
  if seed ~= nil then a.seed = random.checked(fname, "seed", seed) end
  if dropout ~= nil then
    a.dropout = core.number(fname, "dropout", dropout)
    if seed == nil and dropout > 0 then a.seed = random.draw(fname) end
  end
end

local function set_choices(a, fname, options)
  local backend = M.backend or options.backend
  if backend ~= nil then
    a.backend = backends[backend]
      or fail(fname, "backend: got %s, wanted %s", describe(backend), core.alternatives(backends))
  end
  if not core.boolean(fname, "deterministic", options.deterministic, true) then a.deterministic = 0 end
end

-- A run is one forward call: its outputs, what backward reads, and the call as C saw it.
local Run = {}
Run.__index = Run

-- The mask, and its nodes: a mask with Lua functions keeps those of the last few sizes only.
local function set_extras(a, fname, options)
  local bias, sinks, alibi = options.bias, options.sinks, options.alibi
  if bias ~= nil then a.bias = pointer(bias, fname, "bias") end
  if sinks ~= nil then a.sinks = pointer(sinks, fname, "sinks") end
  if alibi ~= nil then a.alibi = pointer(alibi, fname, "alibi") end
  if options.mask == nil then return end
  local given = mask_of(fname, options.mask)
  local nodes = mask_nodes(fname, given, a.q, a.k)
  a.mask = nodes
  return given, nodes
end

local function set_options(a, fname, options)
  local used, nodes = set_extras(a, fname, options)
  set_numbers(a, fname, options)
  set_choices(a, fname, options)
  a.causal = causality(fname, options.causal)
  if options.window ~= nil then set_window(a, fname, options.window) end
  return used, nodes
end

-- An output of C: the descriptor to fill, as a tensor once C has filled it.
local function output(wanted)
  return wanted and descriptor() or nil
end

local function adopted(handle)
  return handle and adopt(handle) or nil
end

-- `for_backward`: the gradients may be asked for, so what they read is kept.
local function forward(fname, q, k, v, options, wants_lse, for_backward)
  local a = attention_type()
  lib.sa_attention_init(a)
  a.q, a.k, a.v = pointer(q, fname, "q"), pointer(k, fname, "k"), pointer(v, fname, "v")
  local plain = options == core.no_options and not M.backend
  local mask_used, nodes, weights, dead
  if not plain then mask_used, nodes = set_options(a, fname, options) end

  local given = options.out
  local out = given == nil and new_handle() or pointer(given, fname, "out")
  local lse = output(wants_lse or for_backward)
  a.out, a.lse = out, lse
  if not plain then
    weights = output(core.boolean(fname, "weights", options.weights, false))
    dead = output(for_backward and options.bias)
    a.weights, a.dead = weights, dead
    if given ~= nil then autograd.change(fname, "out", given) end
  end
  call(fname, lib.sa_forward, a)

  -- What every run has is there at once: a table that grows costs as much as all of this.
  local run = setmetatable({
    false, false, -- the gradients that a backward in hand reads
    q = q, k = k, v = v, attention = a, out = given or adopt(out), lse = adopted(lse),
    backend = a.used == lib.SA_REFERENCE and "reference" or "fused", kernel = ffi.string(a.kernel),
  }, Run)
  if not plain then
    run.bias, run.sinks, run.alibi = options.bias, options.sinks, options.alibi
    run.mask, run.mask_nodes = mask_used, nodes
    run.weights, run.dead = adopted(weights), adopted(dead)
  end
  return run
end

-- The gradients that are wanted: a table with some of dq, dk, dv, dbias, dsinks, dalibi.
local function gradients(fname, run, dout, dlse, wanted)
  -- The forward's own struct: it has the inputs and the outputs, which may have been freed since.
  local a = run.attention
  pointer(run.q, fname, "q") pointer(run.k, fname, "k") pointer(run.v, fname, "v")
  pointer(run.out, fname, "out") pointer(run.lse, fname, "lse")
  if run.bias then pointer(run.bias, fname, "bias") end
  if run.sinks then pointer(run.sinks, fname, "sinks") end
  if run.alibi then pointer(run.alibi, fname, "alibi") end
  a.dout = dout ~= nil and pointer(dout, fname, "dout") or nil
  a.dlse = dlse ~= nil and pointer(dlse, fname, "dlse") or nil
  -- The struct keeps nothing alive, and LuaJIT keeps no local variable that is not read again.
  run[1], run[2] = dout or false, dlse or false
  local dq = wanted.q and new_handle() or nil
  local dk, dv = output(wanted.k), output(wanted.v)
  local dbias, dsinks, dalibi = output(wanted.bias), output(wanted.sinks), output(wanted.alibi)
  a.dq, a.dk, a.dv, a.dbias, a.dsinks, a.dalibi = dq, dk, dv, dbias, dsinks, dalibi
  call(fname, lib.sa_backward, a)
  run[1], run[2] = false, false
  local made = {dq = adopted(dq), dk = adopted(dk), dv = adopted(dv)}
  if dbias then made.dbias = adopt(dbias) end
  if dsinks then made.dsinks = adopt(dsinks) end
  if dalibi then made.dalibi = adopt(dalibi) end
  return made
end

--- The gradients of everything that forward read.
-- @param run
-- @param dout gradient of `out`, like it; nil: zeros
-- @param dlse gradient of `lse`, like it; nil: zeros
-- @return {dq, dk, dv, dbias, dsinks, dalibi}, the last three when a bias, sinks, alibi were given
function Run.backward(run, dout, dlse)
  local fname = "forward():backward"
  if type(run) ~= "table" or getmetatable(run) ~= Run then
    fail(fname, "self: got %s, wanted what sa.forward gave", describe(run))
  end
  if dout == nil and dlse == nil then fail(fname, "dout: got nil, wanted a tensor like out (or dlse like lse)") end
  return (gradients(fname, run, dout, dlse, run))
end

--- Attention without a tape.
-- @param q as in sdpa, like all that follows
-- @param k
-- @param v
-- @param options `lse` is there anyway
-- @return a run: `out`, `lse`, `weights` when asked for, `kernel` and `backend` that served it, and
-- `run:backward(dout, dlse)`
function M.forward(q, k, v, options)
  options = core.options("forward", options, option_names)
  core.boolean("forward", "lse", options.lse, true)
  return (forward("forward", q, k, v, options, true, true))
end

-- A function of its own: LuaJIT compiles none that closures capture variables of.
local function record(run, inputs)
  local wanted = {}
  for _, name in ipairs {"q", "k", "v", "bias", "sinks", "alibi"} do
    wanted[name] = run[name] and run[name].requires_grad
  end
  autograd.record("sdpa", {run.out, run.lse}, inputs, function(dout, dlse)
    local g = gradients("backward", run, dout, dlse, wanted)
    return {g.dq, g.dk, g.dv, g.dbias, g.dsinks, g.dalibi, n = 6}
  end, {run.q, run.k, run.v, run.bias, run.sinks, run.alibi, run.out, run.lse, n = 8})
end

--- Attention.
-- @param q [B,H,L,E], or of rank 3, [H,L,E], or 2, [L,E], which the result then has too; f32, f64, f16 or bf16
-- @param k [B,Hkv,S,E], of q's rank and dtype; H is a multiple of Hkv
-- @param v [B,Hkv,S,Ev], likewise
-- @param options
--
-- * `mask`: a mask or a bool tensor (true = visible), broadcastable to [B,H,L,S]
-- * `bias`: added to the scores, broadcastable to [B,H,L,S], q's dtype or f32; -inf masks the pair
-- * `causal`: true or "top-left" (j <= i), "bottom-right" (j - i <= S - L)
-- * `window`: {left, right}; nil is unbounded
-- * `scale`: default 1/sqrt(E)
-- * `softcap`: scores become softcap * tanh(score / softcap); 0 is off
-- * `sinks`: [H], one more logit in each head's denominator
-- * `alibi`: slopes [H]
-- * `dropout`, `seed`: probability of dropping a weight; without a seed one is drawn from sa.seed's generator
-- * `backend`: "auto", "reference" or "fused"
-- * `deterministic`: true (default) for the same bits every time
-- * `out`: a tensor to write to
-- * `lse`, `weights`: true to have them in `more`
--
-- Gradients flow from out and lse to q, k, v, bias, sinks and alibi.
-- @return out [B,H,L,Ev]
-- @return more: `lse` [B,H,L] and `weights` [B,H,L,S] (before dropout) when asked for
function M.sdpa(q, k, v, options)
  local fname = "sdpa"
  options = core.options(fname, options, option_names)
  local wants_lse = core.boolean(fname, "lse", options.lse, false)
  local inputs = {q, k, v, options.bias, options.sinks, options.alibi, n = 6}
  local taped = autograd.wanted(inputs)
  local run = forward(fname, q, k, v, options, wants_lse, taped)
  if taped then record(run, inputs) end
  if M.observer then M.observer(run, options) end
  return run.out, {lse = wants_lse and run.lse or nil, weights = run.weights}
end

-- The pointers of a list of tensors.
local function pointers(fname, argument, list)
  core.check_list(fname, argument, list, "a list of tensors")
  local array = tensor_list(#list)
  for p = 1, #list do array[p - 1] = pointer(list[p], fname, string.format("%s[%d]", argument, p)) end
  return array
end

-- Outputs for C to create: the list for C, and what becomes of it.
local function outputs(n)
  local array, handles = output_list(n), {}
  for p = 1, n do
    handles[p] = new_handle()
    array[p - 1] = handles[p]
  end
  return array, handles
end

-- C counts the parts from 0.
local function merge_parts(...)
  local status = lib.sa_merge(...)
  if status ~= lib.SA_INVALID then return status end
  local message = core.last_error():gsub("(%l%l%ls)%[(%d+)%]", function(list, p)
    return string.format("%s[%d]", list, p + 1)
  end)
  fail("merge", "%s", message)
end

--- Attention over parts of the keys, merged: what attention over all of them gives. A part with lse = -inf saw nothing
-- and is not read. Differentiable.
-- @param outs list of the parts' outputs, of one shape
-- @param lses list of their lse
-- @return out
-- @return lse
function M.merge(outs, lses)
  local fname = "merge"
  local parts, part_lses = pointers(fname, "outs", outs), pointers(fname, "lses", lses)
  local n = #outs
  if n == 0 then fail(fname, "outs: got an empty list, wanted at least one part") end
  if #lses ~= n then fail(fname, "lses: got a list of %d, wanted %d, one for each of outs", #lses, n) end
  local out_handle, lse_handle = new_handle(), new_handle()
  call(fname, merge_parts, parts, part_lses, n, out_handle, lse_handle)
  local out, lse = adopt(out_handle), adopt(lse_handle)

  local inputs = {n = 2 * n}
  for p = 1, n do inputs[p], inputs[n + p] = outs[p], lses[p] end
  if autograd.wanted(inputs) then
    local saved = {out, lse, unpack(inputs)}
    autograd.record(fname, {out, lse}, inputs, function(dout, dlse)
      local douts, dout_handles = outputs(n)
      local dlses, dlse_handles = outputs(n)
      call("backward", lib.sa_merge_backward, parts, part_lses, n, out_handle, lse_handle,
        dout and dout.handle, dlse and dlse.handle, douts, dlses)
      local results = {n = 2 * n}
      for p = 1, n do results[p], results[n + p] = adopt(dout_handles[p]), adopt(dlse_handles[p]) end
      return results
    end, saved)
  end
  return out, lse
end

local softmax_options = {dim = true, dead_rows = true}
local stances = {zero = lib.SA_ZERO, ["nan"] = lib.SA_NAN, uniform = lib.SA_UNIFORM}

--- Softmax that knows dead rows: rows of nothing but -inf. Differentiable.
-- @param x float tensor
-- @param options {dim = -1, dead_rows = "zero"}: what a dead row gives: "zero", "nan" or "uniform" (1/n)
function M.softmax(x, options)
  local fname = "softmax"
  local handle = pointer(x, fname, "x")
  options = core.options(fname, options, softmax_options)
  local dim = core.dim(fname, "dim", options.dim == nil and -1 or options.dim, handle.ndim)
  local stance = stances[options.dead_rows == nil and "zero" or options.dead_rows]
    or fail(fname, "dead_rows: got %s, wanted %s", describe(options.dead_rows), core.alternatives(stances))
  local y = new_handle()
  call(fname, lib.sa_softmax, handle, dim, stance, y)
  local result = adopt(y)
  if autograd.wanted {x} then
    autograd.record(fname, {result}, {x}, function(dy)
      local dx = new_handle()
      call("backward", lib.sa_softmax_backward, handle, y, dy.handle, dim, stance, dx)
      return {adopt(dx)}
    end, {x, result})
  end
  return result
end

return M
