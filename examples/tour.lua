-- a mask, an output, a gradient: the shortest walk through safeattn
local sa = require "safeattn"

-- six tokens of two documents; the fourth belongs to neither, sees nothing and is seen by nobody
local mask = sa.mask.documents({1, 1, 1, -1, 2, 2}) * sa.mask.causal()
print(mask)
mask:show{L = 6, S = 6}

local q = sa.randn({1, 1, 6, 4}, {seed = 1, requires_grad = true})
local k = sa.randn({1, 1, 6, 4}, {seed = 2, requires_grad = true})
local v = sa.randn({1, 1, 6, 4}, {seed = 3, requires_grad = true})
k:detach():select(3, 4):fill(0 / 0) -- what lies behind the mask has no influence, not even NaN
local out = sa.sdpa(q, k, v, {mask = mask})
out:sum():backward()
print("output, the fourth row is 0", out)
print("gradient of the keys", k.grad)
