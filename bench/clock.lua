-- clocks for measuring, what takes turns under them, and what is made of the times

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

--- A function that calls fn for so many seconds, once at least, and returns the median of the calls' times. fn may
-- return a function that cleans up, off the clock.
function clock.slice(fn, seconds)
  return function()
    local times, total = {}, 0
    repeat
      local start = clock.now()
      local clean = fn()
      times[#times + 1] = clock.now() - start
      total = total + times[#times]
      if clean then clean() end
    until total >= seconds
    return clock.median(times)
  end
end

--- Lets functions that return seconds take turns, so that what the machine does besides meets all alike: rounds of one
-- turn each, until there are so many and the last function's turns have taken so long, after a round that does not
-- count. Returns the list of each; those before the last have one turn more, after the last round.
function clock.turns(functions, rounds, seconds)
  local times, last = {}, #functions
  for n, fn in ipairs(functions) do
    fn()
    times[n] = {}
  end
  local start = clock.now()
  repeat
    for n, fn in ipairs(functions) do table.insert(times[n], fn()) end
  until #times[last] >= rounds and clock.now() - start >= seconds
  for n = 1, last - 1 do table.insert(times[n], functions[n]()) end
  return times
end

--- In each round, what `how` makes of the time of what came last and the mean of what another took before and after it.
function clock.compare(times, other, how)
  local results = {}
  for round, seconds in ipairs(times) do results[round] = how(seconds, (other[round] + other[round + 1]) / 2) end
  return results
end

--- What `how` makes of each time.
function clock.each(times, how)
  local results = {}
  for round, seconds in ipairs(times) do results[round] = how(seconds) end
  return results
end

--- A list's median and quartiles, and how long it is: {median =, low =, high =, rounds =}.
function clock.spread(list)
  local sorted = {unpack(list)}
  table.sort(sorted)
  local function at(share) return sorted[math.floor(share * (#sorted - 1) + 1.5)] end
  return {low = at(0.25), median = at(0.5), high = at(0.75), rounds = #sorted}
end

return clock
