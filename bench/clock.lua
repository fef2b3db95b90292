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
-- turn each, until there are so many and they have taken so long, after a round that does not count. Returns the list
-- of each; those before the last have one turn more, after the last round.
--
-- `disturbed` (may be nil) says whether the core was shared just now, and is asked between the rounds. One that lies
-- beside such a moment is set aside, and another takes its place, until all are three times as many and as long; when
-- less than a third of what was wanted is left, none is set aside. The lists' `aside` says how many were and, `shared`,
-- how many could have been.
function clock.turns(functions, rounds, seconds, disturbed)
  local times, last, aside = {}, #functions, {shared = 0, count = 0}
  for n, fn in ipairs(functions) do
    fn()
    times[n] = {aside = aside}
  end
  local start, before = clock.now(), disturbed and disturbed()
  repeat
    for n, fn in ipairs(functions) do table.insert(times[n], fn()) end
    local after, round, spent = disturbed and disturbed(), #times[last], clock.now() - start
    if before or after then aside[round], aside.shared = true, aside.shared + 1 end
    before = after
    local kept = round - aside.shared
    local enough = kept >= rounds or round >= 3 * rounds and spent >= 3 * seconds
  until enough and spent >= seconds
  aside.count = aside.shared
  if 3 * (#times[last] - aside.shared) < rounds then
    for round = 1, #times[last] do aside[round] = nil end
    aside.count = 0
  end
  for n = 1, last - 1 do table.insert(times[n], functions[n]()) end
  return times
end

--- In each round that was not set aside, what `how` makes of the time of what came last and, when there is another, of
-- the mean of what that took before and after it.
function clock.compare(times, other, how)
  local results = {aside = times.aside}
  for round, seconds in ipairs(times) do
    if not times.aside[round] then
      results[#results + 1] = how(seconds, other and (other[round] + other[round + 1]) / 2)
    end
  end
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
