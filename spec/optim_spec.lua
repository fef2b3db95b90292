-- adamw: against its definition, and on a small problem

local helper = require "spec.helper"
local sa = helper.sa

describe("adamw", function()
  it("does what its definition says", function()
    local w = sa.tensor({0.5, -2, 0}, {dtype = "f64", requires_grad = true})
    local c = sa.tensor({3, -0.1, 1e-6}, {dtype = "f64"})
    local options = {lr = 0.1, betas = {0.8, 0.95}, eps = 1e-6, weight_decay = 0.3}
    local optimizer = sa.adamw({w}, options)
    local p, m, v = {0.5, -2, 0}, {0, 0, 0}, {0, 0, 0}
    for step = 1, 4 do
      optimizer:zero_grad()
      ;(w * w * c):sum():backward()
      optimizer:step()
      for i, factor in ipairs {3, -0.1, 1e-6} do
        local g = 2 * p[i] * factor
        m[i] = 0.8 * m[i] + 0.2 * g
        v[i] = 0.95 * v[i] + 0.05 * g * g
        p[i] = p[i] * (1 - 0.1 * 0.3)
        p[i] = p[i] - 0.1 * (m[i] / (1 - 0.8 ^ step)) / (math.sqrt(v[i] / (1 - 0.95 ^ step)) + 1e-6)
      end
      assert.tensor.near(w:detach(), p, {rtol = 1e-12, atol = 1e-15})
    end
  end)

  it("leaves parameters without a gradient alone, and counts their steps apart", function()
    local a = sa.ones({2}, {requires_grad = true})
    local b = sa.ones({2}, {requires_grad = true})
    local optimizer = sa.adamw({a, b})
    a:sum():backward()
    optimizer:step()
    assert.same({1, 1}, b:totable())
    assert.is_true(a:get(1) < 1)
    optimizer:zero_grad()
    assert.is_nil(a.grad)
  end)

  it("finds a minimum, with a rate that is changed on the way", function()
    local target = sa.randn({10}, {seed = 1})
    local w = sa.zeros({10}, {requires_grad = true})
    local optimizer = sa.adamw({w}, {lr = 0.1, weight_decay = 0})
    for step = 1, 300 do
      if step == 200 then optimizer.lr = 0.01 end
      optimizer:zero_grad()
      local d = w - target
      ;(d * d):mean():backward()
      optimizer:step()
    end
    assert.tensor.near(w, target, {atol = 1e-3})
  end)

  it("refuses what it cannot step", function()
    local cpu = require "safeattn" -- messages name a device that is not the CPU
    local w = cpu.ones({2, 2}, {requires_grad = true})
    local cases = {
      {{}, nil, "params: got an empty list"},
      {{cpu.ones {2}}, nil, "params%[1%]: got f32%[2%] that does not require grad"},
      {{w, w}, nil, "params%[2%]: got params%[1%] again"},
      {{w * 2}, nil, "params%[1%]: got f32%[2,2%] that does not require grad, wanted a leaf"},
      {{cpu.ones({2}, {dtype = "bf16", requires_grad = true})}, nil, "params%[1%]: got bf16%[2%], wanted"},
      {{w, lr = 1}, nil, 'params: got a key "lr", wanted a list of tensors'},
      {{w}, {betas = {0.9, 0.9, n = 2}}, 'betas: got a key "n"'},
      {{w}, {lr = -1}, "lr: got %-1, wanted a finite number of at least 0"},
      {{w}, {lr = 0 / 0}, "lr: got nan"},
      {{w}, {betas = {0.9}}, "betas: got a table"},
      {{w}, {betas = {0.9, 1}}, "betas%[2%]: got 1, wanted a number in %[0, 1%)"},
      {{w}, {rate = 1}, "options: got unknown option rate, wanted"},
      {{w}, 3, "options: got 3, wanted a table"},
    }
    for _, case in ipairs(cases) do
      assert.matches("^safeattn%.adamw: " .. case[3], helper.message_of(cpu.adamw, case[1], case[2]))
    end
    local optimizer = cpu.adamw({w})
    assert.matches("^safeattn%.step: self: ", helper.message_of(optimizer.step))
  end)
end)
