--- scores, weights, their gradients and entropies as tensors: whole, of one head, or a tile of it

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local create = require "safeattn.create"
local row = require "safeattn.inspect.row"

local M = {}

-- What one tensor may take; larger ones are refused.
local MOST_BYTES = 2 ^ 30

local function room(p, fname, shape, value)
  local bytes = 8
  for _, size in ipairs(shape) do bytes = bytes * size end
  if bytes > MOST_BYTES then
    core.fail(fname, "the %s matrix in f64 is %.1f GiB, wanted at most %.0f: ask for one head"
      .. " (b, h), a tile of it (b, h, {rows = {first, last}, keys = {first, last}}), or a row (look:row)",
      table.concat(shape, " x "), bytes / 2 ^ 30, MOST_BYTES / 2 ^ 30)
  end
  while #shape > p.rank do table.remove(shape, 1) end
  return create.full(shape, value, {dtype = "f64"})
end

local function interval(fname, name, given, size)
  if given == nil then return 1, size end
  if type(given) ~= "table" or tensor.is(given) or #given ~= 2 then
    core.fail(fname, "%s: got %s, wanted {first, last}", name, core.describe(given))
  end
  local first = core.integer(fname, name .. "[1]", given[1], 1, size)
  return first, core.integer(fname, name .. "[2]", given[2], first, size)
end

-- Writes a row's list into a row of a matrix, whose columns are keys first .. last.
local function scatter(to, w, list, first, last)
  for n = 0, w.count - 1 do
    local j = w.key[n] + 1
    if j >= first and j <= last then to[j - first] = list[n] end
  end
end

local tile_options = {rows = true, keys = true}

-- `matrix`: whether each query has a value per key; read(w) gives the list, or the number.
local function collect(p, fname, b, h, tile, matrix, masked, with_output, read)
  local whole = b == nil and h == nil
  if not whole then p:check_place(fname, b, h) end
  tile = core.options(fname, tile, tile_options)
  local first_row, last_row = interval(fname, "rows", tile.rows, p.L)
  local first_key, last_key = interval(fname, "keys", tile.keys, p.S)
  local L, S = last_row - first_row + 1, last_key - first_key + 1
  local shape = whole and {p.B, p.H, L} or {L}
  if matrix then shape[#shape + 1] = S end
  local result
  if whole and not matrix then
    result = create.full({unpack(shape, 4 - math.min(3, p.rank - 1))}, masked, {dtype = "f64"})
  elseif whole then
    result = room(p, fname, shape, masked)
  else
    result = room({rank = #shape}, fname, shape, masked)
  end
  local to, step = result:data(), matrix and S or 1
  for batch = whole and 1 or b, whole and p.B or b do
    for head = whole and 1 or h, whole and p.H or h do
      for i = first_row, last_row do
        local w = row.compute(p, batch, head, i, with_output)
        if matrix then scatter(to, w, read(w), first_key, last_key) else to[0] = read(w) end
        to = to + step
      end
    end
  end
  return result
end

--- Scores after scale, softcap, bias and ALiBi; -inf where masked. f64 [B,H,L,S] in q's rank; with b and h [L,S] of one
-- head, with `tile` a part of it.
-- @param p
-- @param b
-- @param h
-- @param tile {rows = {first, last}, keys = {first, last}}
function M.scores(p, b, h, tile)
  return collect(p, "inspect():scores", b, h, tile, true, -math.huge, false, function(w) return w.s end)
end

--- Weights before dropout, 0 where masked; shaped like scores.
function M.weights(p, b, h, tile)
  return collect(p, "inspect():weights", b, h, tile, true, 0, false, function(w) return w.p end)
end

--- Gradients of the scores, 0 where masked; shaped like scores. Wants a dout.
function M.dscores(p, b, h, tile)
  local fname = "inspect():dscores"
  if not p.dout then
    core.fail(fname, "dout: got nil, wanted the gradient of the output: sa.inspect(q, k, v, opts, dout)")
  end
  return collect(p, fname, b, h, tile, true, 0, true, function(w) return w.ds end)
end

--- The entropy of each query's weights in nats, 0 of a dead row: f64 [B,H,L] in q's rank, or [L] of one head.
function M.entropy(p, b, h)
  return collect(p, "inspect():entropy", b, h, nil, false, 0, false, function(w) return w.entropy end)
end

--- The LSE of each query, -inf (or the sink) of a dead row; shaped like entropy.
function M.lse(p, b, h)
  return collect(p, "inspect():lse", b, h, nil, false, 0, false, function(w) return w.lse end)
end

return M
