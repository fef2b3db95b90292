--- what a mask is to Lua: an expression, its text, its C nodes, and what can be asked of it

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"

local ffi, lib = core.ffi, core.lib

local M = {}

--- What causality and windows are aligned to.
M.alignments = {["top-left"] = lib.SA_TOP_LEFT, ["bottom-right"] = lib.SA_BOTTOM_RIGHT}

local methods = {}
local metatable = {__index = methods}

local mask_cell = ffi.typeof "sa_mask *[1]"
local plan_cell = ffi.typeof "const sa_plan *[1]"
local counts_type = ffi.typeof "sa_plan_counts"

-- How tightly an expression binds, as in Lua itself.
local SUM, PRODUCT, NEGATION, ATOM = 1, 2, 3, 4

-- Longer operands are printed as (...): an expression of thousands of parts costs no more than one of few.
local LONGEST = 1000

-- For so many sizes a mask with Lua functions keeps what it built: models alternate between few.
local KEPT_SIZES = 8

function M.is(x)
  return type(x) == "table" and getmetatable(x) == metatable
end

function metatable.__tostring(mask)
  return mask.text
end

--- For messages.
function metatable.__describe(mask)
  return "the mask " .. mask.text
end

--- Calls a C constructor; what it made goes with the cdata that comes back.
function M.construct(fname, constructor, ...)
  local out = mask_cell()
  core.call(fname, constructor, out, ...)
  return ffi.gc(out[0], lib.sa_mask_release)
end

-- A mask is `handle` (C nodes), or, when a Lua function is part of it, `build(fname, B, H, L, S)`, which makes them for
-- one size. `known` holds the sizes (B, H, L, S) that the mask's own data fixes. What was combined keeps its `symbol`
-- (none for a negation) and its `operands`, so that a dead row can be traced to a part.
local function new(text, binding, known, handle, build)
  return setmetatable({text = text, binding = binding, known = known, handle = handle, build = build,
    built = build and {}, sizes = 0}, metatable)
end

--- A mask without operands.
function M.atom(text, known, handle, build)
  return new(text, ATOM, known, handle, build)
end

--- The C nodes of a mask for one size. Whoever takes them keeps them referenced while C reads them.
function M.nodes(mask, fname, B, H, L, S)
  if mask.handle then return mask.handle end
  local size = table.concat({B, H, L, S}, ",")
  local nodes = mask.built[size]
  if not nodes then
    nodes = mask.build(fname, B, H, L, S)
    if mask.sizes == KEPT_SIZES then mask.built, mask.sizes = {}, 0 end
    mask.built[size], mask.sizes = nodes, mask.sizes + 1
  end
  return nodes
end

-- The algebra

local function both(fname, a, b)
  return M.construct(fname, lib.sa_mask_and, a, b)
end

local function either(fname, a, b)
  return M.construct(fname, lib.sa_mask_or, a, b)
end

local function opposite(fname, a)
  return M.construct(fname, lib.sa_mask_not, a)
end

local function without(fname, a, b)
  return both(fname, a, opposite(fname, b))
end

local function combined_sizes(a, b)
  local known = {}
  for name, size in pairs(b) do known[name] = size end
  for name, size in pairs(a) do known[name] = size end
  return known
end

local function bracketed(mask, binding)
  if #mask.text > LONGEST then return "(...)" end
  return mask.binding < binding and "(" .. mask.text .. ")" or mask.text
end

-- `associative`: a right operand with the same operator needs no brackets.
local function operator(symbol, binding, associative, combine)
  return function(a, b)
    if not (M.is(a) and M.is(b)) then
      core.fail("mask", "%s %s %s: wanted a mask on both sides (mask.dense makes one of a bool tensor)",
        core.describe(a), symbol, core.describe(b))
    end
    local right = bracketed(b, associative and b.symbol == symbol and binding or binding + 1)
    local handle, build
    if a.handle and b.handle then
      handle = combine("mask", a.handle, b.handle)
    else
      function build(fname, B, H, L, S)
        return combine(fname, M.nodes(a, fname, B, H, L, S), M.nodes(b, fname, B, H, L, S))
      end
    end
    local text = bracketed(a, binding) .. " " .. symbol .. " " .. right
    local mask = new(text, binding, combined_sizes(a.known, b.known), handle, build)
    mask.symbol, mask.operands = symbol, {a, b}
    return mask
  end
end

metatable.__mul = operator("*", PRODUCT, true, both)
metatable.__add = operator("+", SUM, true, either)
metatable.__sub = operator("-", SUM, false, without)

function metatable.__unm(a)
  local handle, build
  if a.handle then
    handle = opposite("mask", a.handle)
  else
    function build(fname, B, H, L, S)
      return opposite(fname, M.nodes(a, fname, B, H, L, S))
    end
  end
  -- Brackets around another negation too: "--" starts a comment in Lua.
  local mask = new("-" .. bracketed(a, ATOM), NEGATION, a.known, handle, build)
  mask.operands = {a}
  return mask
end

-- Questions

local size_names = {B = "batches", H = "heads", L = "queries", S = "keys"}

local function size_of(mask, fname, sizes, name, default)
  local size = sizes[name]
  if size == nil then size = mask.known[name] or default end
  if size == nil then
    core.fail(fname, "%s: got nil, wanted the number of %s, which this mask does not fix", name, size_names[name])
  end
  return core.integer(fname, name, size)
end

-- The compiled mask for the sizes that a method was given, and the method's name for errors.
-- @param allowed names of the options; default: the sizes alone
local function plan_of(mask, method, sizes, allowed)
  local fname = "mask:" .. method
  if not M.is(mask) then core.fail(fname, "self: got %s, wanted a mask", core.describe(mask)) end
  sizes = core.options(fname, sizes, allowed or size_names)
  local B, H = size_of(mask, fname, sizes, "B", 1), size_of(mask, fname, sizes, "H", 1)
  local L, S = size_of(mask, fname, sizes, "L"), size_of(mask, fname, sizes, "S")
  local nodes = M.nodes(mask, fname, B, H, L, S)
  local out = plan_cell()
  core.call(fname, lib.sa_mask_plan, out, nodes, lib.SA_NO_CAUSAL, -1, -1, B, H, L, S)
  return ffi.gc(out[0], lib.sa_plan_release), fname
end

local function counts_of(plan)
  local counts = counts_type()
  lib.sa_plan_count(plan, counts)
  return counts
end

local function read(reader, plan, fname)
  local handle = tensor.handle()
  core.call(fname, reader, plan, handle)
  return tensor.adopt(handle)
end

local function dead(reader, plan, fname)
  local flags = read(reader, plan, fname)
  local B, H, n = unpack(flags.shape)
  local flag = flags:data()
  local list = {}
  for b = 1, B do
    for h = 1, H do
      for i = 1, n do
        if flag[((b - 1) * H + h - 1) * n + i - 1] then list[#list + 1] = B * H == 1 and i or {b, h, i} end
      end
    end
  end
  flags:free()
  return list
end

--- The visible pairs.
-- @param mask
-- @param sizes {B = 1, H = 1, L =, S =}, as for all methods here; what the mask's own data fixes may be left out
-- @return bool tensor [B,H,L,S]; B or H is 1 when the mask does not depend on it
function methods.dense(mask, sizes)
  local plan, fname = plan_of(mask, "dense", sizes)
  return read(lib.sa_plan_dense, plan, fname)
end

--- The fraction of all pairs that are visible; 0 when there are no pairs.
function methods.density(mask, sizes)
  local counts = counts_of((plan_of(mask, "density", sizes)))
  local all = tonumber(counts.batch) * tonumber(counts.heads) * tonumber(counts.queries) * tonumber(counts.keys)
  return all == 0 and 0 or tonumber(counts.visible) / all
end

--- The queries that see no key.
-- @return a list of i when the mask is the same for all batches and heads (or there is one of each), else a list of
-- {b, h, i}, where b or h is 1 when the mask does not depend on it
function methods.dead_rows(mask, sizes)
  local plan, fname = plan_of(mask, "dead_rows", sizes)
  return dead(lib.sa_plan_dead_rows, plan, fname)
end

--- The keys that no query sees, listed like dead rows: j or {b, h, j}.
function methods.dead_keys(mask, sizes)
  local plan, fname = plan_of(mask, "dead_keys", sizes)
  return dead(lib.sa_plan_dead_keys, plan, fname)
end

--- How many tiles of 128 x 128 pairs are empty (skipped), full (they need no checks), partial, and visited (full or
-- partial). Batches and heads that the mask does not depend on count once.
function methods.tiles(mask, sizes)
  local counts = counts_of((plan_of(mask, "tiles", sizes)))
  local empty, partial, full = tonumber(counts.empty), tonumber(counts.partial), tonumber(counts.full)
  return {empty = empty, partial = partial, full = full, visited = partial + full}
end

--- A picture of the visible pairs, in the terminal or a PNG file. It costs what the plan costs, not what the pairs do.
-- @param mask
-- @param options sizes, as for all methods; `b`, `h`: which batch and head (1); what `safeattn.draw` lists
-- @return nothing; the text with to = "string"; with `file` its name, or nil and why not
function methods.show(mask, options)
  local draw = require "safeattn.draw"
  local plan, fname = plan_of(mask, "show", options, draw.show_names)
  return draw.plan(fname, mask, plan, options or {})
end

return M
