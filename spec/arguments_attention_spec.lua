-- bad arguments of attention and masks: every one is an error that names function, argument, what came, what was wanted

local sa = require "safeattn"
local core = require "safeattn.core"
local m = sa.mask

local ffi, lib = core.ffi, core.lib
local nan, inf = 0 / 0, math.huge
local memory = ffi.new "float[120]"

local function t(...)
  return sa.zeros {...}
end

local function typed(dtype, ...)
  return sa.zeros({...}, {dtype = dtype})
end

local function freed()
  local gone = t(2, 2)
  gone:free()
  return gone
end

-- Rows of {what is called, the argument that is wrong, what came as the message says it}.
local function refuses(fname, rows)
  describe("safeattn." .. fname .. " refuses", function()
    for _, row in ipairs(rows) do
      local call, argument, came = unpack(row)
      it(argument .. ": " .. came, function()
        local ok, message = pcall(call)
        assert.is_false(ok, "it was accepted")
        assert.matches("^spec/arguments_attention_spec%.lua:%d+: ", message)
        local said = message:gsub("^[^ ]+ ", "")
        local head = "safeattn." .. fname .. ": " .. argument
        assert.equal(head, said:sub(1, #head))
        assert.matches(came, said:sub(#head + 1), 1, true)
        if came ~= "freed" then assert.matches("wanted", said, 1, true) end
      end)
    end
  end)
end

local tensors = {
  {"nil", "got nil"}, {3, "got 3"}, {"text", 'got "text"'}, {{1, 2}, "got a table"}, {true, "got true"},
  {print, "got a function"},
}
tensors[1][1] = nil

-- Attention: sdpa and forward take the same.
for _, fname in ipairs {"sdpa", "forward"} do
  local attend = sa[fname]
  local q, k, v = t(2, 4, 5, 8), t(2, 2, 6, 8), t(2, 2, 6, 3)

  local function with(options)
    return function() return attend(q, k, v, options) end
  end

  local rows = {}
  for _, wrong in ipairs {1, 2, 3, 4, 5, 6} do
    local value, came = tensors[wrong][1], tensors[wrong][2]
    table.insert(rows, {function() attend(value, k, v) end, "q", came})
    table.insert(rows, {function() attend(q, value, v) end, "k", came})
    table.insert(rows, {function() attend(q, k, value) end, "v", came})
    if value ~= nil then
      for _, name in ipairs {"bias", "sinks", "alibi", "out", "mask"} do
        table.insert(rows, {with {[name] = value}, name, came})
      end
    end
  end

  refuses(fname .. "", rows)

  refuses(fname .. "", {
    -- shapes and dtypes of q, k, v
    {function() attend(t(4), k, v) end, "q", "1 dims"},
    {function() attend(t(1, 2, 4, 5, 8), k, v) end, "q", "5 dims"},
    {function() attend(t(), k, v) end, "q", "0 dims"},
    {function() attend(q, t(6, 8), v) end, "k", "2 dims"},
    {function() attend(q, k, t(2, 6, 3)) end, "v", "3 dims"},
    {function() attend(q, t(3, 2, 6, 8), v) end, "k", "3"},
    {function() attend(q, t(1, 2, 6, 8), v) end, "k", "1"},
    {function() attend(q, k, t(1, 2, 6, 3)) end, "v", "1"},
    {function() attend(q, t(2, 3, 6, 8), t(2, 3, 6, 3)) end, "k", "3 heads"},
    {function() attend(q, t(2, 8, 6, 8), t(2, 8, 6, 3)) end, "k", "8 heads"},
    {function() attend(q, t(2, 0, 6, 8), t(2, 0, 6, 3)) end, "k", "0 heads"},
    {function() attend(q, k, t(2, 4, 6, 3)) end, "v", "4 heads"},
    {function() attend(q, t(2, 2, 6, 7), v) end, "k", "7"},
    {function() attend(q, k, t(2, 2, 7, 3)) end, "v", "7"},
    {function() attend(typed("i32", 2, 4, 5, 8), k, v) end, "q", "i32"},
    {function() attend(typed("bool", 2, 4, 5, 8), k, v) end, "q", "bool"},
    {function() attend(q, typed("f64", 2, 2, 6, 8), v) end, "k", "f64"},
    {function() attend(q, k, typed("bf16", 2, 2, 6, 3)) end, "v", "bf16"},
    {function() attend(freed(), k, v) end, "q", "freed"},
    {function() attend(q, freed(), v) end, "k", "freed"},
    {function() attend(q, k, freed()) end, "v", "freed"},
    -- tensors among the options
    {with {bias = t(5, 7)}, "bias", "[5,7]"},
    {with {bias = t(3, 5, 6)}, "bias", "[3,5,6]"},
    {with {bias = t(1, 2, 4, 5, 6)}, "bias", "[1,2,4,5,6]"},
    {with {bias = typed("f64", 5, 6)}, "bias", "f64"},
    {with {bias = typed("f16", 5, 6)}, "bias", "f16"},
    {with {bias = typed("bool", 5, 6)}, "bias", "bool"},
    {with {bias = freed()}, "bias", "freed"},
    {with {sinks = t(2)}, "sinks", "[2]"},
    {with {sinks = t(1, 4)}, "sinks", "[1,4]"},
    {with {sinks = t()}, "sinks", "[]"},
    {with {sinks = typed("i64", 4)}, "sinks", "i64"},
    {with {alibi = t(5)}, "alibi", "[5]"},
    {with {alibi = typed("f64", 4)}, "alibi", "f64"},
    {with {out = t(2, 4, 5, 8)}, "out", "[2,4,5,8]"},
    {with {out = t(4, 5, 3)}, "out", "[4,5,3]"},
    {with {out = typed("f64", 2, 4, 5, 3)}, "out", "f64"},
    {with {out = t(1):expand(2, 4, 5, 3)}, "out", "expanded"},
    {with {out = sa.from_pointer(memory, {2, 4, 5, 3}, {stride = {60, 15, 2, 1}})}, "out", "share memory"},
    {with {out = freed()}, "out", "freed"},
    {with {out = sa.zeros({2, 4, 5, 3}, {requires_grad = true})}, "out", "requires grad"},
    {function() attend(q, k, k, {out = q}) end, "out", "shares memory with q"},
    -- masks
    {with {mask = t(5, 6)}, "mask", "f32[5,6]"},
    {with {mask = typed("i32", 5, 6)}, "mask", "i32[5,6]"},
    {with {mask = freed()}, "mask", "freed"},
    -- numbers
    {with {scale = "1"}, "scale", 'got "1"'},
    {with {scale = true}, "scale", "got true"},
    {with {scale = nan}, "scale", "got nan"},
    {with {scale = inf}, "scale", "inf"},
    {with {scale = -inf}, "scale", "-inf"},
    {with {softcap = "30"}, "softcap", 'got "30"'},
    {with {softcap = -1}, "softcap", "-1"},
    {with {softcap = nan}, "softcap", "got nan"},
    {with {softcap = inf}, "softcap", "inf"},
    {with {dropout = "0.1"}, "dropout", 'got "0.1"'},
    {with {dropout = 1}, "dropout", "1"},
    {with {dropout = -0.1}, "dropout", "-0.1"},
    {with {dropout = nan}, "dropout", "got nan"},
    {with {dropout = 0.1, seed = -1}, "seed", "-1"},
    {with {dropout = 0.1, seed = 1.5}, "seed", "1.5"},
    {with {dropout = 0.1, seed = nan}, "seed", "nan"},
    {with {dropout = 0.1, seed = 2 ^ 54}, "seed", "18014398509481984"},
    {with {seed = "7"}, "seed", '"7"'},
    -- choices
    {with {causal = "bottom"}, "causal", '"bottom"'},
    {with {causal = 1}, "causal", "1"},
    {with {causal = {}}, "causal", "a table"},
    {with {window = 3}, "window", "3"},
    {with {window = "3"}, "window", '"3"'},
    {with {window = t(2)}, "window", "f32[2]"},
    {with {window = {-1, 0}}, "window[1]", "-1"},
    {with {window = {0, -5}}, "window[2]", "-5"},
    {with {window = {1.5, 0}}, "window[1]", "1.5"},
    {with {window = {nan}}, "window[1]", "nan"},
    {with {window = {nil, "1"}}, "window[2]", '"1"'},
    {with {window = {1, 2, 3}}, "window", "3"},
    {with {window = {left = 1}}, "window", '"left"'},
    {with {backend = "gpu"}, "backend", '"gpu"'},
    {with {backend = 1}, "backend", "1"},
    {with {deterministic = 1}, "deterministic", "1"},
    {with {deterministic = "no"}, "deterministic", '"no"'},
    {with {lse = 1}, "lse", "1"},
    {with {weights = "yes"}, "weights", '"yes"'},
    -- the options themselves
    {with "causal", "options", '"causal"'},
    {with(true), "options", "true"},
    {with(t(5, 6)), "options", "f32[5,6]"},
    {with(m.causal()), "options", "the mask causal"},
    {with {casual = true}, "options", "casual"},
    {with {[1] = m.causal()}, "options", "1"},
    {with {is_causal = true}, "options", "is_causal"},
  })

  describe("safeattn." .. fname, function()
    it("says which option a typo was meant to be", function()
      local _, message = pcall(attend, q, k, v, {casual = true})
      assert.matches("did you mean causal?", message, 1, true)
      _, message = pcall(attend, q, k, v, {soft_cap = 1})
      assert.matches("did you mean softcap?", message, 1, true)
    end)

    it("points from a float mask to bias and mask.additive", function()
      local _, message = pcall(attend, q, k, v, {mask = t(5, 6)})
      assert.matches("bias", message, 1, true)
      assert.matches("mask.additive", message, 1, true)
    end)

    it("names both devices or dtypes that are mixed", function()
      local _, message = pcall(attend, q, typed("f64", 2, 2, 6, 8), v)
      assert.matches("k: .*f64.*f32", message)
    end)

    it("says that the fused kernels are not for such widths", function()
      local _, message = pcall(attend, t(2, 257), t(2, 257), t(2, 3), {backend = "fused"})
      assert.matches("^[^ ]+ safeattn%." .. fname .. ": backend: got fused, .* up to 256, for 257 and 3; wanted auto or"
        .. " reference$", message)
      assert.is_true(pcall(attend, t(2, 257), t(2, 257), t(2, 3)))
    end)

    it("refuses masks of other sizes, and says which", function()
      local rows_ = {
        {m.dense(sa.full({5, 7}, true)), "7", "6"},
        {m.dense(sa.full({3, 1, 1, 1}, true)), "3", "2"},
        {m.dense(sa.full({1, 3, 1, 1}, true)), "3", "4"},
        {m.padding {7, 2}, "7", "6"},
        {m.padding({6, 2}, {6, 1}), "6", "5"},
        {m.padding {1, 2, 3}, "3", "2"},
        {m.documents {1, 2, 3, 4, 5}, "5", "6"},
        {m.documents({1, 2, 3}, {1, 2, 3, 4, 5, 6}), "3", "5"},
        {m.documents({1, 2, 3, 4, 5}, {{1, 2, 3, 4, 5, 6}, {1, 2, 3, 4, 5, 6}, {1, 2, 3, 4, 5, 6}}), "3", "2"},
        {m.blocks(sa.full({2, 2}, true), 2), "2", "3"},
      }
      for n, row in ipairs(rows_) do
        local ok, message = pcall(attend, q, k, v, {mask = row[1]})
        assert.is_false(ok, "mask " .. n)
        assert.matches("^[^ ]+ safeattn%." .. fname .. ": mask: .*" .. row[2] .. ".*wanted.*" .. row[3], message)
        local combined
        ok, combined = pcall(attend, q, k, v, {mask = m.all() - row[1] * m.causal()})
        assert.is_false(ok, "mask " .. n .. ", combined")
        assert.equal(message:gsub("^[^ ]+", ""), (combined:gsub("^[^ ]+", "")))
      end
    end)

    it("changes nothing when it fails", function()
      local out = sa.full({2, 4, 5, 3}, 5)
      assert.is_false(pcall(attend, q, k, v, {out = out, bias = t(9, 9)}))
      assert.is_false(pcall(attend, q, k, v, {out = out, mask = m.padding {100}}))
      assert.is_false(pcall(attend, q, k, v, {out = out, scale = nan}))
      assert.is_true(sa.equal(out, sa.full({2, 4, 5, 3}, 5)))
    end)
  end)
end

refuses("forward():backward", (function()
  local q = t(2, 4, 5, 8)
  local run = sa.forward(q, q, t(2, 4, 5, 3))
  local good = t(2, 4, 5, 3)
  local spoilt = sa.forward(q, q, t(2, 4, 5, 3))
  spoilt.out:free()
  return {
    {function() run:backward() end, "dout", "got nil"},
    {function() run:backward(3) end, "dout", "got 3"},
    {function() run:backward(good, {}) end, "dlse", "got a table"},
    {function() run:backward(t(2, 4, 5, 8)) end, "dout", "[2,4,5,8]"},
    {function() run:backward(t(4, 5, 3)) end, "dout", "[4,5,3]"},
    {function() run:backward(typed("f64", 2, 4, 5, 3)) end, "dout", "f64"},
    {function() run:backward(good, t(2, 4, 6)) end, "dlse", "[2,4,6]"},
    {function() run:backward(nil, typed("f16", 2, 4, 5)) end, "dlse", "f16"},
    {function() run:backward(freed()) end, "dout", "freed"},
    {function() run.backward({}, good) end, "self", "got a table"},
    {function() run.backward(nil, good) end, "self", "got nil"},
    {function() spoilt:backward(good) end, "out", "freed"},
  }
end)())

refuses("softmax", {
  {function() sa.softmax() end, "x", "got nil"},
  {function() sa.softmax {1, 2} end, "x", "got a table"},
  {function() sa.softmax(typed("i32", 4)) end, "x", "i32"},
  {function() sa.softmax(typed("bool", 4)) end, "x", "bool"},
  {function() sa.softmax(freed()) end, "x", "freed"},
  {function() sa.softmax(t(2, 3), {dim = 3}) end, "dim", "got 3"},
  {function() sa.softmax(t(2, 3), {dim = 0}) end, "dim", "got 0"},
  {function() sa.softmax(t(2, 3), {dim = -3}) end, "dim", "got -3"},
  {function() sa.softmax(t(2, 3), {dim = 1.5}) end, "dim", "got 1.5"},
  {function() sa.softmax(t(2, 3), {dim = "1"}) end, "dim", 'got "1"'},
  {function() sa.softmax(t(2, 3), {dead_rows = "one"}) end, "dead_rows", 'got "one"'},
  {function() sa.softmax(t(2, 3), {dead_rows = 0}) end, "dead_rows", "got 0"},
  {function() sa.softmax(t(2, 3), {dead_row = "zero"}) end, "options", "dead_row"},
  {function() sa.softmax(t(2, 3), 1) end, "options", "got 1"},
})

refuses("merge", (function()
  local out, lse = t(2, 5, 3), t(2, 5)
  return {
    {function() sa.merge() end, "outs", "got nil"},
    {function() sa.merge(out, {lse}) end, "outs", "f32[2,5,3]"},
    {function() sa.merge({out}) end, "lses", "got nil"},
    {function() sa.merge({out}, lse) end, "lses", "f32[2,5]"},
    {function() sa.merge({}, {}) end, "outs", "empty"},
    {function() sa.merge({out, n = 1}, {lse}) end, "outs", 'a key "n"'},
    {function() sa.merge({out}, {lse, [3] = lse}) end, "lses", "a key 3"},
    {function() sa.merge({out, out}, {lse}) end, "lses", "1"},
    {function() sa.merge({out, 3}, {lse, lse}) end, "outs[2]", "got 3"},
    {function() sa.merge({out, out}, {lse, "x"}) end, "lses[2]", 'got "x"'},
    {function() sa.merge({out, freed()}, {lse, lse}) end, "outs[2]", "freed"},
    {function() sa.merge({out, t(2, 5, 4)}, {lse, lse}) end, "outs[2]", "[2,5,4]"},
    {function() sa.merge({out, out}, {lse, t(2, 4)}) end, "lses[2]", "[2,4]"},
    {function() sa.merge({out, typed("f64", 2, 5, 3)}, {lse, lse}) end, "outs[2]", "f64"},
    {function() sa.merge({out}, {typed("f16", 2, 5)}) end, "lses[1]", "f16"},
    {function() sa.merge({typed("i32", 2, 5, 3)}, {lse}) end, "outs[1]", "i32"},
  }
end)())

-- Masks

refuses("mask.causal", {
  {function() m.causal "bottom" end, "align", 'got "bottom"'},
  {function() m.causal(true) end, "align", "got true"},
  {function() m.causal(1) end, "align", "got 1"},
})

refuses("mask.window", {
  {function() m.window(-1, 0) end, "left", "got -1"},
  {function() m.window(1.5, 0) end, "left", "got 1.5"},
  {function() m.window("1", 0) end, "left", 'got "1"'},
  {function() m.window({1, 2}) end, "left", "got a table"},
  {function() m.window(0, -2) end, "right", "got -2"},
  {function() m.window(0, nan) end, "right", "got nan"},
  {function() m.window(0, inf) end, "right", "got inf"},
  {function() m.window(0, 0, "left") end, "align", 'got "left"'},
  {function() m.window(0, 0, false) end, "align", "got false"},
})

refuses("mask.padding", {
  {function() m.padding() end, "k_lengths", "got nil"},
  {function() m.padding "3" end, "k_lengths", 'got "3"'},
  {function() m.padding(-1) end, "k_lengths[1]", "got -1"},
  {function() m.padding {3, -1} end, "k_lengths[2]", "got -1"},
  {function() m.padding {3, 1.5} end, "k_lengths[2]", "got 1.5"},
  {function() m.padding {"3"} end, "k_lengths[1]", 'got "3"'},
  {function() m.padding {{3}} end, "k_lengths[1]", "got a table"},
  {function() m.padding {[2] = 3} end, "k_lengths", "a key 2"},
  {function() m.padding({3}, {3, batch = 1}) end, "q_lengths", 'a key "batch"'},
  {function() m.padding(t(3)) end, "k_lengths", "f32[3]"},
  {function() m.padding(typed("i32", 2, 3)) end, "k_lengths", "i32[2,3]"},
  {function() m.padding(freed()) end, "k_lengths", "freed"},
  {function() m.padding(m.all()) end, "k_lengths", "the mask all"},
  {function() m.padding({3}, {-3}) end, "q_lengths[1]", "got -3"},
  {function() m.padding({3}, "3") end, "q_lengths", 'got "3"'},
  {function() m.padding({3, 4}, {3}) end, "q_lengths", "got 1"},
  {function() m.padding(sa.tensor({2, -2}, {dtype = "i64"})) end, "k_lengths[2]", "got -2"},
})

refuses("mask.prefix", {
  {function() m.prefix() end, "n", "got nil"},
  {function() m.prefix(-1) end, "n[1]", "got -1"},
  {function() m.prefix {1, nan} end, "n[2]", "got nan"},
  {function() m.prefix {n = 3} end, "n", 'a key "n"'},
  {function() m.prefix "all" end, "n", 'got "all"'},
})

refuses("mask.global", {
  {function() m.global() end, "n", "got nil"},
  {function() m.global(-1) end, "n", "got -1"},
  {function() m.global {1} end, "n", "got a table"},
  {function() m.global(0.5) end, "n", "got 0.5"},
})

refuses("mask.documents", {
  {function() m.documents() end, "ids", "got nil"},
  {function() m.documents(3) end, "ids", "got 3"},
  {function() m.documents "ids" end, "ids", 'got "ids"'},
  {function() m.documents(t(3)) end, "ids", "f32[3]"},
  {function() m.documents(freed()) end, "ids", "freed"},
  {function() m.documents(typed("i32", 1, 2, 3)) end, "ids", "i32[1,2,3]"},
  {function() m.documents(typed("i32")) end, "ids", "i32[]"},
  {function() m.documents {1, 2.5} end, "ids[2]", "got 2.5"},
  {function() m.documents {1, "2"} end, "ids[2]", 'got "2"'},
  {function() m.documents {{1, 2}, {1}} end, "ids[2]", "1"},
  {function() m.documents {{1, 2}, 3} end, "ids[2]", "got 3"},
  {function() m.documents {1, {2}} end, "ids[2]", "got a table"},
  {function() m.documents {1, 2, [9] = 1} end, "ids", "a key 9"},
  {function() m.documents {{1, 2}, {1, 2}, ids = 1} end, "ids", 'a key "ids"'},
  {function() m.documents {{1, 2}, {1, 2, ids = 1}} end, "ids[2]", 'a key "ids"'},
  {function() m.documents {{1, 2}, {1, nan}} end, "ids[2][2]", "got nan"},
  {function() m.documents({1, 2}, 3) end, "k_ids", "got 3"},
  {function() m.documents({1, 2}, t(2)) end, "k_ids", "f32[2]"},
  {function() m.documents(t(2), {1, 2}) end, "q_ids", "f32[2]"},
})

refuses("mask.blocks", {
  {function() m.blocks() end, "keep", "got nil"},
  {function() m.blocks({{true}}, 2) end, "keep", "got a table"},
  {function() m.blocks(t(2, 2), 2) end, "keep", "f32[2,2]"},
  {function() m.blocks(freed(), 2) end, "keep", "freed"},
  {function() m.blocks(typed("bool", 1, 1, 1, 2, 2), 2) end, "keep", "5 dims"},
  {function() m.blocks(typed("bool", 2, 2)) end, "size", "got nil"},
  {function() m.blocks(typed("bool", 2, 2), 0) end, "size", "got 0"},
  {function() m.blocks(typed("bool", 2, 2), -4) end, "size", "got -4"},
  {function() m.blocks(typed("bool", 2, 2), 1.5) end, "size", "got 1.5"},
  {function() m.blocks(typed("bool", 2, 2), "8") end, "size", 'got "8"'},
})

refuses("mask.dense", {
  {function() m.dense() end, "visible", "got nil"},
  {function() m.dense {{true}} end, "visible", "got a table"},
  {function() m.dense(t(2, 2)) end, "visible", "f32[2,2]"},
  {function() m.dense(typed("i32", 2, 2)) end, "visible", "i32[2,2]"},
  {function() m.dense(m.all()) end, "visible", "the mask all"},
  {function() m.dense(freed()) end, "visible", "freed"},
  {function() m.dense(typed("bool", 1, 1, 1, 2, 2)) end, "visible", "5 dims"},
})

refuses("mask.additive", {
  {function() m.additive() end, "bias", "got nil"},
  {function() m.additive(typed("bool", 2, 2)) end, "bias", "bool[2,2]"},
  {function() m.additive(typed("i64", 2, 2)) end, "bias", "i64[2,2]"},
  {function() m.additive(freed()) end, "bias", "freed"},
  {function() m.additive(t(1, 1, 1, 2, 2)) end, "bias", "5 dims"},
  {function() m.additive(t(2, 2), {at_most = "0"}) end, "at_most", 'got "0"'},
  {function() m.additive(t(2, 2), {at_most = nan}) end, "at_most", "got nan"},
  {function() m.additive(t(2, 2), {atmost = 0}) end, "options", "atmost"},
  {function() m.additive(t(2, 2), -1e9) end, "options", "got -1000000000"},
})

refuses("mask.random", {
  {function() m.random() end, "p", "got nil"},
  {function() m.random "half" end, "p", 'got "half"'},
  {function() m.random(-0.1) end, "p", "got -0.1"},
  {function() m.random(1.1) end, "p", "got 1.1"},
  {function() m.random(nan) end, "p", "got nan"},
  {function() m.random(0.5, -1) end, "seed", "got -1"},
  {function() m.random(0.5, "x") end, "seed", 'got "x"'},
  {function() m.random(0.5, 0.5) end, "seed", "got 0.5"},
})

refuses("mask.fn", {
  {function() m.fn() end, "f", "got nil"},
  {function() m.fn "i >= j" end, "f", 'got "i >= j"'},
  {function() m.fn(print, {batch = 1}) end, "batch", "got 1"},
  {function() m.fn(print, {heads = "no"}) end, "heads", 'got "no"'},
  {function() m.fn(print, {head = false}) end, "options", "head"},
  {function() m.fn(print, true) end, "options", "got true"},
})

for _, answer in ipairs {{0, "0"}, {"true", '"true"'}, {{}, "a table"}} do
  refuses("mask.fn", {
    {function()
      local q = t(3, 4)
      sa.sdpa(q, q, q, {mask = m.causal() * m.fn(function(_, _, i, j) return i + j < 5 or answer[1] end)})
    end, "the function gave " .. answer[2], "(b = 1, h = 1, i = 2, j = 3)"},
  })
end

local odd_sizes = {
  {"nothing", nil, "L", "got nil"}, {"no S", {L = 3}, "S", "got nil"}, {"a negative", {L = -1, S = 3}, "L", "got -1"},
  {"a fraction", {L = 1.5, S = 3}, "L", "got 1.5"}, {"text", {L = "3", S = 3}, "L", 'got "3"'},
  {"B", {B = -1, L = 3, S = 3}, "B", "got -1"}, {"H", {H = nan, L = 3, S = 3}, "H", "got nan"},
  {"a small letter", {l = 3, S = 3}, "options", "l,"}, {"a number", 3, "options", "got 3"},
}
for _, method in ipairs {"dense", "density", "dead_rows", "dead_keys", "tiles"} do
  local rows = {{function() m.all()[method]({}, {}) end, "self", "got a table"}}
  for _, row in ipairs(odd_sizes) do
    table.insert(rows, {function() m.all()[method](m.all(), row[2]) end, row[3], row[4]})
  end
  refuses("mask:" .. method, rows)
end

describe("operators of masks", function()
  local function check(f, ...)
    local ok, message = pcall(f)
    assert.is_false(ok)
    assert.matches("^spec/arguments_attention_spec%.lua:%d+: safeattn%.mask: ", message)
    for _, text in ipairs {...} do assert.matches(text, message, 1, true) end
    assert.matches("wanted a mask on both sides", message, 1, true)
  end

  it("refuse what is no mask, and name both sides", function()
    local c = m.causal()
    check(function() return c * 2 end, "causal * 2")
    check(function() return 2 * c end, "2 * ", "causal")
    check(function() return c + "text" end, 'causal + "text"')
    check(function() return {} + c end, "a table + ", "causal")
    check(function() return c - nil end, "causal - nil")
    check(function() return c * sa.full({3, 3}, true) end, "causal * bool[3,3]", "mask.dense")
  end)
end)

describe("fields of masks", function()
  it("that are not there are nil, so that a misspelt method is Lua's own error", function()
    assert.has_error(function() m.causal():desnity {L = 1, S = 1} end)
  end)
end)

describe("a descriptor that a C program filled wrongly", function()
  local call = ffi.new "sa_attention"

  for _, name in ipairs {"q", "k", "v", "bias", "sinks", "alibi"} do
    it("is refused, not read: " .. name, function()
      local given = {q = t(2, 4, 5, 8), k = t(2, 4, 6, 8), v = t(2, 4, 6, 8), bias = t(5, 6), sinks = t(4),
        alibi = t(4)}
      for field, number in pairs {stride = -1, shape = -4, ndim = -1} do
        local wrong, out = ffi.new("sa_tensor", given[name].handle), ffi.new "sa_tensor"
        if field == "ndim" then wrong.ndim = number else wrong[field][0] = number end
        lib.sa_attention_init(call)
        for other, tensor in pairs(given) do call[other] = tensor.handle end
        call.out, call[name] = out, wrong
        assert.equal(tonumber(lib.SA_INVALID), lib.sa_forward(call), field)
        assert.matches("sa_forward: " .. name .. ": has ", ffi.string(lib.sa_last_error()), 1, true)
        assert.is_true(out.data == nil)
      end
    end)
  end
end)

describe("no argument of attention crashes", function()
  -- Every public function with every odd value at every place: an error or a result, but never the end of the process.
  local odd = {
    nil, false, true, 0, -1, 1.5, nan, inf, -inf, 2 ^ 53, 2 ^ 62, "", "text", {}, {{}}, {nan}, {"x"}, print,
    coroutine.create(print), io.stdout, t(), t(0), t(2, 3), typed("bool", 2, 3), typed("i64", 3), freed(), m.all(),
    m.fn(function() error "raised" end), newproxy(),
  }
  odd[1] = nil
  local n = 29

  local functions = {sdpa = sa.sdpa, forward = sa.forward, softmax = sa.softmax, merge = sa.merge}
  for name, constructor in pairs(m) do functions["mask." .. name] = constructor end
  for _, name in ipairs {"dense", "density", "dead_rows", "dead_keys", "tiles"} do
    functions["mask:" .. name] = m.all()[name]
  end

  for name, f in pairs(functions) do
    it(name, function()
      local count = 0
      for a = 1, n do
        for b = 1, n do
          pcall(f, odd[a], odd[b])
          pcall(f, odd[a], odd[b], odd[(a * 7 + b * 3) % n + 1])
          pcall(f, t(2, 3), odd[a], odd[b])
          pcall(f, t(2, 3), t(2, 3), odd[a], {mask = odd[b], bias = odd[(a + b) % n + 1]})
          count = count + 1
        end
      end
      assert.equal(n * n, count)
    end)
  end

  it("sdpa's options", function()
    local q = t(2, 3)
    for _, option in ipairs {
      "mask", "bias", "causal", "window", "scale", "softcap", "sinks", "alibi", "dropout", "seed", "backend",
      "deterministic", "out", "lse", "weights",
    } do
      for a = 1, n do
        local ok, message = pcall(sa.sdpa, q, q, q, {[option] = odd[a]})
        assert.is_true(ok or type(message) == "string")
      end
    end
  end)
end)
