-- cases of attention, how they are timed, and the peak of the processor that they are held against

local sa = require "safeattn"
local core = require "safeattn.core"
local calls = require "bench.calls"
local clock = require "bench.clock"
local sharing = require "bench.sharing"
local lib = core.lib

local cases = {quick = false, batch = 1, heads = 8, length = 2048, enough_rounds = 9, enough_seconds = 1}

--- A glance, not a measurement: short sequences and few repetitions.
function cases.hurry()
  cases.quick, cases.length, cases.enough_rounds, cases.enough_seconds = true, 512, 3, 0.1
end

function cases.slice(fn, seconds) return clock.slice(fn, cases.quick and 0 or seconds or 5e-3) end

function cases.turns(...) return clock.turns({...}, cases.enough_rounds, cases.enough_seconds) end

--- The same, noting the rounds beside which the core was shared.
function cases.watched_turns(...)
  return clock.turns({...}, cases.enough_rounds, cases.enough_seconds, sharing.here)
end

--- The median in seconds of one thing that takes no turns with another.
function cases.measure(fn) return clock.spread(cases.turns(cases.slice(fn))[1]).median end

--- GFLOP/s of the threads in force; the half types are computed in f32.
function cases.peak(dtype)
  return tonumber(lib.sa_measure_peak(dtype == "f64" and lib.SA_F64 or lib.SA_F32)) * 1e-9
end

--- The seconds that threads at their peak would take for so many flops, as they were for some 20 ms: whatever keeps
-- the processor from a case keeps it from these as well.
function cases.at_peak(flops, dtype, threads)
  return function()
    sa.threads(threads or 1)
    local start, looks, sum = clock.now(), 0, 0
    repeat
      sum, looks = sum + 1e-9 / cases.peak(dtype), looks + 1
    until clock.now() - start >= (cases.quick and 5e-3 or 20e-3)
    return flops * sum / looks
  end
end

function cases.over(seconds, other) return seconds / other end
function cases.under(seconds, other) return other / seconds end

--- What is timed of a case {length =, width =, key_heads =, dtype =, threads =, prepare =, options =}, "forward" or
-- "backward".
function cases.one_way(case, way)
  local q, k, v, dout = calls.inputs {length = case.length or cases.length, width = case.width,
    key_heads = case.key_heads, dtype = case.dtype}
  if case.prepare then case.prepare(q, k, v) end
  local threads = case.threads or 1
  sa.threads(threads)
  if way == "forward" then return calls.with_threads(threads, calls.forward(q, k, v, case.options)) end
  return calls.with_threads(threads, calls.backward(q, k, v, dout, case.options))
end

return cases
