-- calls of attention to be timed: each is a function that returns one which frees what the call made

local sa = require "safeattn"

local calls = {}

local function free(tensors)
  for _, tensor in pairs(tensors) do tensor:free() end
end

--- Random q, k, v and the gradient of the output; `case` may name batch, heads, key_heads, length, width and dtype.
function calls.inputs(case)
  local function random(heads, seed)
    return sa.randn({case.batch or 1, heads, case.length, case.width or 64}, {seed = seed, dtype = case.dtype or "f32"})
  end
  local heads = case.heads or 8
  local key_heads = case.key_heads or heads
  return random(heads, 1), random(key_heads, 2), random(key_heads, 3), random(heads, 4)
end

function calls.forward(q, k, v, options)
  return function()
    local run = sa.forward(q, k, v, options)
    return function() free {run.out, run.lse} end
  end
end

function calls.backward(q, k, v, dout, options)
  local run = sa.forward(q, k, v, options)
  return function()
    local gradients = run:backward(dout)
    return function() free(gradients) end
  end
end

function calls.both(q, k, v, dout)
  return function()
    local run = sa.forward(q, k, v)
    local gradients = run:backward(dout)
    return function()
      free {run.out, run.lse}
      free(gradients)
    end
  end
end

--- The same on so many threads.
function calls.with_threads(threads, fn)
  return function()
    sa.threads(threads)
    return fn()
  end
end

return calls
