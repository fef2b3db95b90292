--- evaluates a Lua function of (b, h, i, j) into the bits of a mask

local core = require "safeattn.core"
local expression = require "safeattn.mask_expression"

local ffi, lib = core.ffi, core.lib

local M = {}

-- Fills a row; gives the first key whose answer is no boolean, and that answer. The text is loaded anew for every mask,
-- so that LuaJIT compiles a loop of its own for each: the traces of a shared loop specialise on the first function, and
-- the next ones run through their side exits.
local row_loop = [[
local visible_to, row = ...
return function(b, h, i, keys)
  for j = 1, keys do
    local visible = visible_to(b, h, i, j)
    if visible == true then
      row[j - 1] = 1
    elseif visible == false then
      row[j - 1] = 0
    else
      return j, visible
    end
  end
end
]]

--- What builds the C nodes of a mask from a function, for any size. An error raised by the function passes through.
-- @param visible_to function(b, h, i, j) giving a boolean
-- @param batch whether it depends on b, which it gets as nil otherwise
-- @param heads whether it depends on h, likewise
function M.builder(visible_to, batch, heads)
  return function(fname, B, H, L, S)
    if not batch then B = 1 end
    if not heads then H = 1 end
    local nodes = expression.construct(fname, lib.sa_mask_bits, B, H, L, S)
    local row = ffi.new("uint8_t[?]", S)
    local fill = loadstring(row_loop, "=mask.fn")(visible_to, row)
    for plane = 0, B * H - 1 do
      local b, h = math.floor(plane / H), plane % H
      local given_b, given_h = batch and b + 1 or nil, heads and h + 1 or nil
      for i = 1, L do
        local j, answer = fill(given_b, given_h, i, S)
        if j then
          core.fail("mask.fn", "the function gave %s for (b = %s, h = %s, i = %d, j = %d), wanted a boolean",
            core.describe(answer), tostring(given_b), tostring(given_h), i, j)
        end
        core.call(fname, lib.sa_mask_bits_row, nodes, b, h, i - 1, row)
      end
    end
    return nodes
  end
end

return M
