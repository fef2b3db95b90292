--- masks: which pairs of a query and a key are visible; constructors, combined by * (and), + (or), - (not, and not)

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local random = require "safeattn.random"
local expression = require "safeattn.mask_expression"
local mask_function = require "safeattn.mask_function"

local ffi, lib = core.ffi, core.lib
local atom, construct, describe, fail = expression.atom, expression.construct, core.describe, core.fail

local M = {}

-- Lists up to this length are printed.
local SHORT = 4

local function alignment(fname, align)
  if align == nil then return lib.SA_TOP_LEFT end
  return expression.alignments[align]
    or fail(fname, 'align: got %s, wanted "top-left" or "bottom-right"', describe(align))
end

local integers_of = {i32 = true, i64 = true}
local bools = {bool = true}
local floats = {f32 = true, f64 = true, f16 = true, bf16 = true}

-- The handle of a tensor with one of some dtypes, or nil.
local function handle_of(fname, argument, x, dtypes)
  if not tensor.is(x) then return nil end
  local handle = tensor.pointer(x, fname, argument)
  return dtypes[core.dtype_names[handle.dtype]] and handle or nil
end

-- Stores the integers in `list`, each at least `lowest`, and gives the array.
local function integers(fname, argument, list, lowest, array)
  core.check_list(fname, argument, list, "a list of integers")
  for k = 1, #list do
    local x = list[k]
    -- Names are made for messages only: lists of ids are long.
    if not (core.is_count(x) or type(x) == "number" and core.is_count(-x) and x >= lowest) then
      core.integer(fname, string.format("%s[%d]", argument, k), x, lowest)
    end
    array[k - 1] = x
  end
  return array
end

-- Counts, one for all batches or one for each: a number, a list or an integer tensor. Gives an array, and the list.
local function counts(fname, argument, value)
  local list = value
  if type(value) == "number" then
    list = {value}
  elseif not core.is_plain(value) then
    local handle = handle_of(fname, argument, value, integers_of)
    if not handle or handle.ndim ~= 1 then
      fail(fname, "%s: got %s, wanted a count, a list of counts, or an i32 or i64 tensor [B]", argument,
        describe(value))
    end
    list = value:totable()
  end
  return integers(fname, argument, list, 0, ffi.new("int64_t[?]", #list)), list
end

local function short(list)
  return #list <= SHORT and "{" .. table.concat(list, ", ") .. "}" or nil
end

-- A size that more than one entry fixes; one entry serves any size.
local function fixed(size)
  return size ~= 1 and size or nil
end

-- Document ids as a tensor [S] or [B,S]: from such a tensor, a list of integers, or a list of equally long lists.
local function document_ids(fname, argument, ids)
  local handle = handle_of(fname, argument, ids, integers_of)
  if handle and (handle.ndim == 1 or handle.ndim == 2) then return ids end
  if not core.is_plain(ids) then
    fail(fname, "%s: got %s, wanted i32 or i64 ids [S] or [B,S]: a tensor or a table", argument, describe(ids))
  end
  local nested = type(ids[1]) == "table"
  if nested then core.check_list(fname, argument, ids, "a list of lists of ids") end
  local rows = nested and ids or {ids}
  local count = #rows[1]
  local shape, ndim = core.shape(fname, argument, nested and {#ids, count} or {count})
  local t = tensor.new(fname, lib.SA_I64, lib.SA_CPU, ndim, shape)
  for b, row in ipairs(rows) do
    local name = nested and string.format("%s[%d]", argument, b) or argument
    if not core.is_plain(row) or #row ~= count then
      fail(fname, "%s: got %s, wanted a list of %d ids, like the first", name,
        core.is_plain(row) and "one of " .. #row or describe(row), count)
    end
    integers(fname, name, row, -2 ^ 53, t:data() + (b - 1) * count)
  end
  return t
end

-- The sizes that a tensor to be broadcast to [B,H,L,S] fixes.
local function broadcast_sizes(t)
  local shape, names = t.shape, {"S", "L", "H", "B"}
  local known = {}
  for k = 1, math.min(#shape, 4) do known[names[k]] = fixed(shape[#shape - k + 1]) end
  return known
end

--- Every pair is visible.
function M.all()
  return atom("all", {}, construct("mask.all", lib.sa_mask_all))
end

--- No pair is visible.
function M.none()
  return atom("none", {}, construct("mask.none", lib.sa_mask_none))
end

--- Query i sees keys j <= i, or with "bottom-right" j - i <= S - L (the last query sees all).
-- @param align "top-left" (default) or "bottom-right"
function M.causal(align)
  local code = alignment("mask.causal", align)
  local text = code == lib.SA_BOTTOM_RIGHT and 'causal("bottom-right")' or "causal"
  return atom(text, {}, construct("mask.causal", lib.sa_mask_causal, code))
end

--- Query i sees keys with -left <= j - i - d <= right, where d = S - L for "bottom-right", else 0.
-- @param left a count; nil is unbounded
-- @param right likewise
-- @param align as in causal
function M.window(left, right, align)
  local fname = "mask.window"
  if left ~= nil then core.integer(fname, "left", left) end
  if right ~= nil then core.integer(fname, "right", right) end
  local code = alignment(fname, align)
  local text = string.format("window(%s, %s%s)", left and describe(left) or "nil", right and describe(right) or "nil",
    code == lib.SA_BOTTOM_RIGHT and ', "bottom-right"' or "")
  return atom(text, {}, construct(fname, lib.sa_mask_window, left or -1, right or -1, code))
end

--- Key j of batch b is real when j <= k_lengths[b], query i when i <= q_lengths[b].
-- @param k_lengths one count for each batch (or one for all): a list, an i32 or i64 tensor, a number
-- @param q_lengths likewise; without it all queries are real
function M.padding(k_lengths, q_lengths)
  local fname = "mask.padding"
  local keys, k_list = counts(fname, "k_lengths", k_lengths)
  local queries, q_list
  if q_lengths ~= nil then
    queries, q_list = counts(fname, "q_lengths", q_lengths)
    if #q_list ~= #k_list then
      fail(fname, "q_lengths: got %d lengths, wanted %d, as many as k_lengths", #q_list, #k_list)
    end
  end
  local k_text, q_text = short(k_list), q_list and short(q_list)
  local text = k_text and string.format("padding(%s%s)", k_text, q_text and ", " .. q_text or "") or "padding"
  return atom(text, {B = fixed(#k_list)}, construct(fname, lib.sa_mask_padding, keys, queries, #k_list))
end

--- A query sees the keys of its own document.
-- @param q_ids i32 or i64 ids, [S] or [B,S]: a tensor or a (nested) table; a negative id belongs to no document
-- @param k_ids those of the keys, when they differ from those of the queries
function M.documents(q_ids, k_ids)
  local fname = "mask.documents"
  local shared = k_ids == nil
  local queries = document_ids(fname, shared and "ids" or "q_ids", q_ids)
  local keys = shared and queries or document_ids(fname, "k_ids", k_ids)
  local handle = construct(fname, lib.sa_mask_documents, not shared and queries.handle or nil, keys.handle)
  local B = queries:dim() == 2 and fixed(queries:size(1)) or keys:dim() == 2 and fixed(keys:size(1)) or nil
  return atom("documents", {B = B, L = queries:size(-1), S = keys:size(-1)}, handle)
end

--- Keys 1..n are visible to all; where there are fewer, all of them.
-- @param n a count, or one for each batch: a list, an i32 or i64 tensor
function M.prefix(n)
  local array, list = counts("mask.prefix", "n", n)
  local text = #list == 1 and "prefix(" .. describe(list[1]) .. ")" or short(list) and "prefix(" .. short(list) .. ")"
  return atom(text or "prefix", {B = fixed(#list)}, construct("mask.prefix", lib.sa_mask_prefix, array, #list))
end

--- Pairs with i <= n or j <= n.
-- @param n a count
function M.global(n)
  core.integer("mask.global", "n", n)
  return atom("global(" .. describe(n) .. ")", {}, construct("mask.global", lib.sa_mask_global, n))
end

--- Square blocks of pairs.
-- @param keep bool tensor [.., ceil(L/size), ceil(S/size)], or 1 for any of its dims; true = visible
-- @param size of a block, at least 1
function M.blocks(keep, size)
  local fname = "mask.blocks"
  local handle = handle_of(fname, "keep", keep, bools)
    or fail(fname, "keep: got %s, wanted a bool tensor [.., ceil(L/size), ceil(S/size)]", describe(keep))
  core.integer(fname, "size", size, 1)
  local known = broadcast_sizes(keep)
  return atom("blocks", {B = known.B, H = known.H}, construct(fname, lib.sa_mask_blocks, handle, size))
end

--- The pairs that a bool tensor says; it is copied.
-- @param visible bool tensor, broadcastable to [B,H,L,S]; true = visible
function M.dense(visible)
  local fname = "mask.dense"
  local handle = handle_of(fname, "visible", visible, bools)
    or fail(fname, "visible: got %s, wanted a bool tensor (mask.additive reads a float one)", describe(visible))
  return atom("dense", broadcast_sizes(visible), construct(fname, lib.sa_mask_dense, handle))
end

local additive_options = {at_most = true}

--- Pairs whose additive bias is not -inf. Its finite values are not used: give them as `bias`.
-- @param bias float tensor, broadcastable to [B,H,L,S]
-- @param options {at_most = x}: values <= x count as -inf
function M.additive(bias, options)
  local fname = "mask.additive"
  local handle = handle_of(fname, "bias", bias, floats)
    or fail(fname, "bias: got %s, wanted a float tensor (mask.dense reads a bool one)", describe(bias))
  local at_most = core.options(fname, options, additive_options).at_most
  if at_most == nil then at_most = -math.huge end
  core.number(fname, "at_most", at_most)
  if at_most ~= at_most then fail(fname, "at_most: got nan, wanted a number") end
  return atom("additive", broadcast_sizes(bias), construct(fname, lib.sa_mask_additive, handle, at_most))
end

--- Each pair is visible with probability p, alike for all batches and heads.
-- @param p from 0 to 1
-- @param seed a count; the same seed gives the same pairs on every machine. Default: from sa.seed's generator
function M.random(p, seed)
  local fname = "mask.random"
  if not (core.number(fname, "p", p) >= 0 and p <= 1) then
    fail(fname, "p: got %s, wanted a probability: 0 to 1", describe(p))
  end
  seed = random.draw(fname, "seed", seed)
  local text = string.format("random(%s, %s)", describe(p), tostring(seed):match("%d+"))
  return atom(text, {}, construct(fname, lib.sa_mask_random, p, seed))
end

local function_options = {batch = true, heads = true}

--- The pairs for which a Lua function gives true. It is called once for each pair of a size, when the mask is first
-- used with that size, and must be a function of its arguments alone.
-- @param visible_to function(b, h, i, j), counted from 1, giving a boolean; its errors pass through
-- @param options {batch = true, heads = true}: false when it does not depend on b, h, which it then gets as nil
function M.fn(visible_to, options)
  local fname = "mask.fn"
  if type(visible_to) ~= "function" then
    fail(fname, "f: got %s, wanted a function of (b, h, i, j)", describe(visible_to))
  end
  options = core.options(fname, options, function_options)
  local batch = core.boolean(fname, "batch", options.batch, true)
  local heads = core.boolean(fname, "heads", options.heads, true)
  return atom("fn", {}, nil, mask_function.builder(visible_to, batch, heads))
end

return M
