-- masks and plans through the C face, and random masks of every kind with their definitions

local sa = require "safeattn"
local core = require "safeattn.core"

local ffi, lib = core.ffi, core.lib
local floor, max, random = math.floor, math.max, math.random

local masks = {}

--- What the last call that failed said.
function masks.last_error()
  return ffi.string(lib.sa_last_error())
end

--- Raises what a call said that failed.
function masks.check(status)
  if status ~= 0 then error(masks.last_error(), 2) end
end

--- A mask by its constructor: sa_mask_NAME.
function masks.construct(name, ...)
  local out = ffi.new "sa_mask *[1]"
  masks.check(lib["sa_mask_" .. name](out, ...))
  return ffi.gc(out[0], lib.sa_mask_release)
end

--- The plan for sizes {B, H, L, S}, or nil and the status.
function masks.try_plan(mask, sizes, causal, left, right)
  local out = ffi.new "const sa_plan *[1]"
  local status = lib.sa_mask_plan(out, mask, causal or 0, left or -1, right or -1, unpack(sizes, 1, 4))
  return status == 0 and ffi.gc(out[0], lib.sa_plan_release) or nil, status
end

--- The plan, or the error raised.
function masks.compile(...)
  local plan, status = masks.try_plan(...)
  masks.check(status)
  return plan
end

--- What a plan counts, as a table of numbers.
function masks.counts_of(plan)
  local counts = ffi.new "sa_plan_counts"
  lib.sa_plan_count(plan, counts)
  local result = {}
  for _, name in ipairs {"batch", "heads", "queries", "keys", "visible", "empty", "partial", "full", "dead_rows",
                         "dead_keys", "bytes", "patterns"} do
    result[name] = tonumber(counts[name])
  end
  return result
end

--- Bytes of the library's own memory in use.
function masks.internal_bytes()
  local use = ffi.new "sa_memory_use"
  lib.sa_memory(use)
  return tonumber(use.internal_bytes)
end

--- A list of counts as an array.
function masks.lengths(list)
  local array = ffi.new("int64_t[?]", max(#list, 1))
  for k, length in ipairs(list) do array[k - 1] = length end
  return array
end

-- Masks with their definitions ---------------------------------------------------------------------------------------

local construct, lengths = masks.construct, masks.lengths

local function diagonal(align, L, S)
  return align == lib.SA_BOTTOM_RIGHT and S - L or 0
end

--- The definition of a window, as of all masks: visible(b, h, i, j), positions counted from 0.
function masks.in_window(left, right, align, L, S)
  local d = diagonal(align, L, S)
  return function(_, _, i, j)
    return (left < 0 or j - i - d >= -left) and (right < 0 or j - i - d <= right)
  end
end

local function some_lengths(count, most)
  local list = {}
  for k = 1, count do list[k] = random(4) == 1 and most or random(4) == 1 and 0 or random(0, most) end
  return list
end

-- Ids of `count` positions for each batch, in one of four manners: sorted, unsorted, with negative ones, sparse.
local function some_ids(batch, count, manner)
  local ids, id = {}, 0
  for b = 1, batch do
    ids[b] = {}
    for n = 1, count do
      if random(30) == 1 then id = random(0, 5) end
      ids[b][n] = manner == 1 and floor(n / 50) or manner == 2 and random(0, 3) or manner == 3 and random(-2, 2)
        or id * 1000003 - (id == 3 and 2 ^ 40 or 0)
    end
  end
  return ids
end

local function ids_tensor(ids, count)
  local t = sa.empty({#ids, count}, {dtype = "i64"})
  for b, row in ipairs(ids) do
    for n, id in ipairs(row) do t:data()[(b - 1) * count + n - 1] = id end
  end
  return t
end

local function batch_of(list, b)
  return list[#list == 1 and 1 or b + 1]
end

-- A bool tensor that broadcasts to `shape`, of some rank, layout and content; and what it says of an index from 0.
local function some_flags(shape)
  local rank, kept = random(0, 4), {}
  for k = 5 - rank, 4 do kept[#kept + 1] = random(3) == 1 and 1 or shape[k] end
  local turned = rank >= 2 and random(3) == 1
  if turned then kept[rank - 1], kept[rank] = kept[rank], kept[rank - 1] end
  local t = sa.empty(kept, {dtype = "bool"})
  local manner, share, flags = random(3), random(), t:data()
  for n = 0, t:numel() - 1 do
    flags[n] = manner == 1 and random() < share or manner == 2 and floor(n / 77) % 2 == 0 or manner == 3
  end
  if turned then t = t:transpose(rank - 1, rank) end
  local stride = {0, 0, 0, 0}
  for k = 1, rank do stride[4 - rank + k] = t:size(k) == 1 and 0 or t:stride(k) end
  local batch, head, query, key = unpack(stride)
  return t, function(b, h, i, j) return flags[b * batch + h * head + i * query + j * key] end
end

--- By kind: a random mask for B, H, L, S, and its definition.
local makers = {}
masks.makers = makers

function makers.all() return construct "all", function() return true end end
function makers.none() return construct "none", function() return false end end

function makers.causal(_, _, L, S)
  local align = random(lib.SA_TOP_LEFT, lib.SA_BOTTOM_RIGHT)
  return construct("causal", align), masks.in_window(-1, 0, align, L, S)
end

function makers.window(_, _, L, S)
  local align, left, right = random(lib.SA_NO_CAUSAL, lib.SA_BOTTOM_RIGHT), random(-30, 200), random(-30, 200)
  return construct("window", left, right, align), masks.in_window(left, right, align, L, S)
end

function makers.padding(B, _, L, S)
  local count = random(2) == 1 and B or 1
  local k, q = some_lengths(count, S), random(2) == 1 and some_lengths(count, L)
  return construct("padding", lengths(k), q and lengths(q) or nil, count), function(b, _, i, j)
    return j < batch_of(k, b) and (not q or i < batch_of(q, b))
  end
end

function makers.prefix(B, _, _, S)
  local counts = some_lengths(random(2) == 1 and B or 1, S + 9) -- there may be fewer keys
  return construct("prefix", lengths(counts), #counts), function(b, _, _, j) return j < batch_of(counts, b) end
end

function makers.global()
  local count = random(0, 200)
  return construct("global", count), function(_, _, i, j) return i < count or j < count end
end

function makers.documents(B, _, L, S)
  local manner, shared = random(4), L == S and random(2) == 1
  local k = some_ids(random(2) == 1 and B or 1, S, manner)
  local q = shared and k or some_ids(random(2) == 1 and B or 1, L, manner)
  local k_tensor, q_tensor = ids_tensor(k, S), ids_tensor(q, L)
  return construct("documents", not shared and q_tensor.handle or nil, k_tensor.handle), function(b, _, i, j)
    local id = batch_of(q, b)[i + 1]
    return id >= 0 and id == batch_of(k, b)[j + 1]
  end
end

function makers.dense(B, H, L, S)
  local t, flag = some_flags {B, H, L, S}
  return construct("dense", t.handle), function(b, h, i, j) return t and flag(b, h, i, j) end -- t: it must live
end

function makers.blocks(B, H, L, S)
  local size = random(2) == 1 and random(1, 20) or random(1, 200)
  local t, flag = some_flags {B, H, math.ceil(L / size), math.ceil(S / size)}
  return construct("blocks", t.handle, size), function(b, h, i, j)
    return t and flag(b, h, floor(i / size), floor(j / size))
  end
end

function makers.random(_, _, L, S)
  local probability, seed = random(4) == 1 and random(0, 1) or random(), random(0, 2 ^ 30)
  -- sa_rand draws from the same words
  local u = sa.empty({max(L, 1), max(S, 1)})
  masks.check(lib.sa_rand(u.handle, seed))
  return construct("random", probability, seed), function(_, _, i, j) return u:data()[i * S + j] < probability end
end

function makers.bits(B, H, L, S)
  local batch, heads = random(2) == 1 and B or 1, random(2) == 1 and H or 1
  local mask, flags = construct("bits", batch, heads, L, S), {}
  local row = ffi.new("uint8_t[?]", max(S, 1))
  for b = 0, batch - 1 do
    for h = 0, heads - 1 do
      for i = 0, L - 1 do
        local filled, share = random(10) > 1, random()
        for j = 0, S - 1 do
          row[j] = random() < share and random(255) or 0
          flags[((b * heads + h) * L + i) * S + j] = filled and row[j] ~= 0
        end
        if filled then masks.check(lib.sa_mask_bits_row(mask, b, h, i, row)) end
      end
    end
  end
  return mask, function(b, h, i, j)
    return flags[(((batch == 1 and 0 or b) * heads + (heads == 1 and 0 or h)) * L + i) * S + j]
  end
end

--- The kinds.
local names = {}
masks.names = names
for name in pairs(makers) do names[#names + 1] = name end
table.sort(names)

--- A random expression of random masks for B, H, L, S, and its definition.
function masks.some(depth, ...)
  if depth == 0 or random(3) == 1 then return makers[names[random(#names)]](...) end
  local a, sees_a = masks.some(depth - 1, ...)
  local operator = random(3)
  if operator == 1 then return construct("not", a), function(...) return not sees_a(...) end end
  local b, sees_b = masks.some(depth - 1, ...)
  if operator == 2 then return construct("and", a, b), function(...) return sees_a(...) and sees_b(...) end end
  return construct("or", a, b), function(...) return sees_a(...) or sees_b(...) end
end

return masks
