-- the cores that the calling thread may run on, and work that stays on one of them

local ffi = require "ffi"

ffi.cdef [[
int sched_getaffinity(int thread, size_t bytes, uint64_t *cores);
int sched_setaffinity(int thread, size_t bytes, const uint64_t *cores);
]]

local placing = {}

local WORDS, CALLER = 16, 0 -- Linux takes thread 0 for the one that calls
local BYTES = 8 * WORDS

local function allowed()
  local set = ffi.new("uint64_t[?]", WORDS)
  assert(ffi.C.sched_getaffinity(CALLER, BYTES, set) == 0, "the cores of a thread cannot be asked for")
  return set
end

--- The numbers of the cores that the calling thread may run on.
function placing.list()
  local set, list = allowed(), {}
  for core = 0, 64 * WORDS - 1 do
    if bit.band(bit.rshift(set[math.floor(core / 64)], core % 64), 1) ~= 0 then list[#list + 1] = core end
  end
  return list
end

--- fn, while the calling thread, and no other, stays on a core.
function placing.on(core, fn)
  return function()
    local before, only = allowed(), ffi.new("uint64_t[?]", WORDS)
    only[math.floor(core / 64)] = bit.lshift(1ULL, core % 64)
    ffi.C.sched_setaffinity(CALLER, BYTES, only)
    local result = fn()
    ffi.C.sched_setaffinity(CALLER, BYTES, before)
    return result
  end
end

return placing
