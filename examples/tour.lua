-- a mask, an output, a gradient: the shortest walk through safeattn (DEVICE=cuda: on a GPU)
local sa = require "safeattn"
local device = os.getenv "DEVICE" or "cpu"

-- six tokens of two documents; the fourth belongs to neither, sees nothing and is seen by nobody
local mask = sa.mask.documents({1, 1, 1, -1, 2, 2}) * sa.mask.causal()
print(mask)
print(mask:dense{L = 6, S = 6}:view(6, 6):to("i32"))

local q = assert(sa.randn({6, 4}, {seed = 1, device = device, requires_grad = true}))
local k = sa.randn({6, 4}, {seed = 2, device = device, requires_grad = true})
local v = sa.randn({6, 4}, {seed = 3, device = device, requires_grad = true})
sa.no_grad(function() k:select(1, 4):fill(0 / 0) end) -- what lies behind the mask has no influence, not even NaN
local out = sa.sdpa(q, k, v, {mask = mask})
print("\noutput; the fourth row is 0:\n" .. tostring(out))
out:backward(sa.randn({6, 4}, {seed = 4, device = device}))
print("\ngradient of the keys; the fourth row is 0 again:\n" .. tostring(k.grad))
