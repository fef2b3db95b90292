-- clocks for measuring, and the median of what they measured

local ffi = require "ffi"

ffi.cdef [[
typedef struct bench_timespec { long seconds, nanoseconds; } bench_timespec;
int clock_gettime(int clock, bench_timespec *time);
]]

local MONOTONIC, THREAD_CPU_TIME = 1, 3 -- Linux's numbers

local clock = {}

local time = ffi.new "bench_timespec"
local function read(which)
  ffi.C.clock_gettime(which, time)
  return tonumber(time.seconds) + tonumber(time.nanoseconds) * 1e-9
end

--- Seconds of wall time.
function clock.now() return read(MONOTONIC) end

--- Seconds that the processor spent on this thread: what other programs do meanwhile does not count.
function clock.spent() return read(THREAD_CPU_TIME) end

--- The median of a list, from its entry `first` (1) on.
function clock.median(times, first)
  local sorted = {}
  for i = first or 1, #times do sorted[#sorted + 1] = times[i] end
  table.sort(sorted)
  return sorted[math.floor((#sorted + 1) / 2)]
end

return clock
