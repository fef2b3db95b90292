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
-- `disturbed` (may be nil) says whether the core was shared just now, and is asked between the rounds: the lists'
-- `shared` names those that lie beside such a moment. Others take their places, until all are `most` (1) times as many
-- and as long.
function clock.turns(functions, rounds, seconds, disturbed, most)
  local times, last, shared, count = {}, #functions, {}, 0
  most = most or 1
  for n, fn in ipairs(functions) do
    fn()
    times[n] = {shared = shared}
  end
  local start, before = clock.now(), disturbed and disturbed()
  repeat
    for n, fn in ipairs(functions) do table.insert(times[n], fn()) end
    local after, round, spent = disturbed and disturbed(), #times[last], clock.now() - start
    if before or after then shared[round], count = true, count + 1 end
    before = after
    local enough = round - count >= rounds or round >= most * rounds and spent >= most * seconds
  until enough and spent >= seconds
  for n = 1, last - 1 do table.insert(times[n], functions[n]()) end
  return times
end

--- In each round, what `how` makes of the time of what came last and, when there is another, of the mean of what that
-- took before and after it.
function clock.compare(times, other, how)
  local results = {shared = times.shared}
  for round, seconds in ipairs(times) do
    results[round] = how(seconds, other and (other[round] + other[round + 1]) / 2)
  end
  return results
end

--- What came of the rounds that were not shared, or, when they are less than a third of those that were wanted, of all;
-- and how many were.
function clock.undisturbed(results, wanted)
  local alone, shared = {}, 0
  for round, result in ipairs(results) do
    if results.shared[round] then
      shared = shared + 1
    else
      alone[#alone + 1] = result
    end
  end
  return 3 * #alone < wanted and results or alone, shared
end

--- A list's median and quartiles, and how long it is: {median =, low =, high =, rounds =}.
function clock.spread(list)
  local sorted = {unpack(list)}
  table.sort(sorted)
  local function at(share) return sorted[math.floor(share * (#sorted - 1) + 1.5)] end
  return {low = at(0.25), median = at(0.5), high = at(0.75), rounds = #sorted}
end

return clock
