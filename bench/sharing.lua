-- whether another guest works on the core just now, by the share of its issue slots and first cache that is left to us
--
-- A virtual core may be one of the two threads of a real one. While the other's owner computes, this thread keeps its
-- multiply-adds, if the other does none, but issues half as many instructions: on a Sapphire Rapids the kernels fell
-- from 86 to 70 % of a peak that read the same. Words are read here from the first cache, some five instructions a
-- cycle; a rate below nine tenths of the best one of the run says that the core is shared. Beside 112 forwards that
-- rate and their share of the peak had a correlation of 0.83. Nothing that is to be timed has a part in it.
local bit, ffi = require "bit", require "ffi"
local clock = require "bench.clock"
local placing = require "bench.placing"

local WORDS, PASSES = 8192, 200 -- 32 KiB; some 0.3 ms
local LEFT_ALONE = 0.9

local words = ffi.new("int32_t[?]", WORDS)
local best = 0

local function rate()
  local start = clock.now()
  local a, b, c, d = 0, 0, 0, 0
  for _ = 1, PASSES do
    for i = 0, WORDS - 1, 4 do
      a, b = bit.bxor(a, words[i]), bit.bxor(b, words[i + 1])
      c, d = bit.bxor(c, words[i + 2]), bit.bxor(d, words[i + 3])
    end
  end
  words[0] = bit.bxor(a, b, c, d) -- so that nothing of it can be left out
  return WORDS * PASSES / (clock.now() - start)
end

local sharing = {}

--- Whether the core that the caller is on is shared just now.
function sharing.here()
  if best == 0 then
    for _ = 1, 50 do best = math.max(best, rate()) end
  end
  local now = rate()
  best = math.max(best, now)
  return now < LEFT_ALONE * best
end

--- Whether some core that the caller may be on is.
function sharing.anywhere()
  local shared = false
  for _, core in ipairs(placing.list()) do shared = placing.on(core, sharing.here)() or shared end
  return shared
end

return sharing
