--- seeds for whatever draws random numbers and was given none

local core = require "safeattn.core"

local ffi = core.ffi
local fail = core.fail

local random = {}

local base, drawn = ffi.new("uint64_t", 0), ffi.new("uint64_t", 0)

local uint64 = ffi.typeof("uint64_t")

--- A seed as C wants it: a count up to 2^53, or a 64-bit cdata integer.
function random.checked(fname, argument, seed)
  if core.is_count(seed) or ffi.istype("uint64_t", seed) or ffi.istype("int64_t", seed) then return uint64(seed) end
  fail(fname, "%s: got %s, wanted a count or a 64-bit integer", argument, core.describe(seed))
end

--- Starts the sequence of seeds anew. Without an argument it stays as it is.
-- @return the seed that the sequence started from (0 in a fresh program)
function random.seed(seed)
  if seed ~= nil then base, drawn = random.checked("seed", "seed", seed), uint64(0) end
  return base <= uint64(2 ^ 53) and tonumber(base) or base
end

--- The next seed of the sequence, or the one that is given.
-- @return uint64_t
function random.draw(fname, argument, given)
  if given ~= nil then return random.checked(fname, argument, given) end
  drawn = drawn + 1
  -- SplitMix64: neighbouring bases and counts give seeds that have nothing in common
  local z = base * 0xd1342543de82ef95ULL + drawn * 0x9e3779b97f4a7c15ULL
  z = bit.bxor(z, bit.rshift(z, 30)) * 0xbf58476d1ce4e5b9ULL
  z = bit.bxor(z, bit.rshift(z, 27)) * 0x94d049bb133111ebULL
  return bit.bxor(z, bit.rshift(z, 31))
end

return random
