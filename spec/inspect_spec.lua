-- looking inside: rows, matrices, dead rows and their reasons, the way of non-finite numbers, and comparisons

local helper = require "spec.helper"
local sa = require "safeattn"

local m = sa.mask
local nan, inf = 0 / 0, math.huge

local function random(seed, shape, dtype)
  return sa.randn(shape, {seed = seed, dtype = dtype})
end

local function f64(list) return sa.tensor(list, {dtype = "f64"}) end

-- A problem with everything in it: grouped heads, strides, every option.
local function everything(dtype)
  local q = random(1, {2, 12, 4, 8}, dtype):transpose(2, 3)
  local k, v = random(2, {2, 2, 13, 8}, dtype), random(3, {2, 2, 13, 7}, dtype)
  local options = {
    mask = m.documents({1, 1, 1, 2, 2, 2, -1, 3, 3, 3, 3, 3}, {1, 1, 1, 2, 2, 2, -1, 3, 3, 3, 3, 3, 3})
      - m.padding {2, 9},
    causal = "bottom-right", window = {5, 1}, softcap = 4, scale = 0.4, dropout = 0.3, seed = 77,
    bias = random(4, {4, 12, 13}), sinks = random(5, {4}), alibi = random(6, {4}),
  }
  options.bias:set(2, 5, 5, -inf)
  return q, k, v, options, random(7, {2, 4, 12, 7}, dtype)
end

local function reference(q, k, v, options, dout)
  local all = {}
  for name, value in pairs(options or {}) do all[name] = value end
  all.backend, all.weights = "reference", true
  local run = sa.forward(q, k, v, all)
  return run, dout and run:backward(dout)
end

describe("a row", function()
  it("agrees with the reference in all it says, with every option", function()
    for _, dtype in ipairs {"f32", "f64", "bf16", "f16"} do
      local q, k, v, options, dout = everything(dtype)
      if dtype == "f64" then
        for _, name in ipairs {"bias", "sinks", "alibi"} do options[name] = options[name]:to "f64" end
      end
      local run, g = reference(q, k, v, options, dout)
      local look = sa.inspect(q, k, v, options, dout)
      local tolerance = {atol = ({f32 = 2e-6, f64 = 1e-13, bf16 = 3e-2, f16 = 4e-3})[dtype], rtol = 1e-2}
      for b = 1, 2 do
        for h = 1, 4 do
          for i = 1, 12 do
            local function here(t) return t:select(1, b):select(1, h):select(1, i):to "f64" end
            local row = look:row(b, h, i)
            assert.tensor.near(f64(row.out), here(run.out), tolerance)
            assert.tensor.near(f64(row.dq), here(g.dq), tolerance)
            assert.tensor.near(f64 {row.lse}, f64 {run.lse:get(b, h, i)}, {atol = 1e-5})
            local weights = sa.zeros({13}, {dtype = "f64"})
            for n, j in ipairs(row.keys) do weights:set(j, row.weights[n]) end
            assert.tensor.near(weights, here(run.weights), tolerance)
          end
        end
      end
    end
  end)

  it("has scores, weights and their gradients by the formulas", function()
    local q, k, v = f64 {{1, 0}, {0, 2}}, f64 {{1, 1}, {2, 0}}, f64 {{1}, {3}}
    local row = sa.inspect(q, k, v, {scale = 1}, f64 {{1}, {1}}):row(1, 1, 1)
    local p = {1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))}
    assert.same({1, 2}, row.keys)
    assert.same({1, 2}, row.scores)
    for n = 1, 2 do assert.is_true(math.abs(row.weights[n] - p[n]) < 1e-15) end
    assert.same({1, 3}, row.dP)
    local delta = p[1] + 3 * p[2]
    assert.is_true(math.abs(row.dS[2] - p[2] * (3 - delta)) < 1e-15)
    assert.is_true(math.abs(row.lse - math.log(math.exp(1) + math.exp(2))) < 1e-15)
    assert.is_true(math.abs(row.entropy + p[1] * math.log(p[1]) + p[2] * math.log(p[2])) < 1e-15)
    assert.same({2, 1}, {row.top_out[1].j, row.top_out[2].j})
    assert.is_true(math.abs(row.top_out[1].norm - 3 * p[2]) < 1e-15)
    assert.is_true(math.abs(row.top_dq[1].norm - 2 * math.abs(row.dS[2])) < 1e-15)
  end)

  it("prints as a short table of the largest contributions", function()
    local q = random(1, {1, 2, 128, 8})
    local text = tostring(sa.inspect(q, q, q, {causal = true}, q):row(1, 2, 77))
    assert.matches("^query %(1,2,77%) sees 77 of 128 keys; lse [%d.]+, entropy [%d.]+ nats, |o| [%d.]+, |dq| ", text)
    assert.matches("\n +key +score +weight +dP +dS +to o +to dq\n", text)
    assert.matches("\n +77 ", text)
    assert.matches("more contribute less$", text)
    local _, lines = text:gsub("\n", "")
    assert.is_true(lines <= 18)
    assert.matches(" %- +%-", tostring(sa.inspect(q, q, q):row(1, 1, 1)))
  end)

  it("says why it is dead", function()
    local q = random(1, {4, 8})
    local row = sa.inspect(q, q, q, {mask = m.documents {1, -1, 1, 1} * m.causal()}, q):row(1, 1, 2)
    assert.is_true(row.dead)
    assert.equal(-inf, row.lse)
    assert.equal(0, row.entropy)
    assert.same({"documents"}, row.factors)
    assert.same({0, 0, 0, 0, 0, 0, 0, 0}, row.out)
    assert.same({0, 0, 0, 0, 0, 0, 0, 0}, row.dq)
    assert.equal("query (1,1,2) is dead: it sees none of 4 keys; documents shows it no key", tostring(row))
  end)

  it("is not touched by what is masked, and takes NaN of any bits", function()
    local q, k, v = random(1, {4, 8}), random(2, {4, 8}), random(3, {4, 8})
    local before = sa.inspect(q, k, v, {causal = true}, q):row(1, 1, 2)
    local ffi = require "ffi"
    ffi.fill(k:data() + 16, 64, 0xFF)
    ffi.fill(v:data() + 16, 64, 0xFF)
    local look = sa.inspect(q, k, v, {causal = true}, q)
    assert.same(before, look:row(1, 1, 2))
    for _ = 1, 100 do
      local row = look:row(1, 1, 4)
      assert.is_true(row.scores[3] ~= row.scores[3] and row.out[1] ~= row.out[1] and row.scores[1] == row.scores[1])
    end
    assert.matches("nan", tostring(look:row(1, 1, 4)))
  end)
end)

describe("matrices", function()
  it("agree with the reference", function()
    local q, k, v, options, dout = everything "f32"
    local run, g = reference(q, k, v, options, dout)
    local look = sa.inspect(q, k, v, options, dout)
    assert.same({2, 4, 12, 13}, look:weights().shape)
    assert.tensor.near(look:weights():to "f32", run.weights, {atol = 1e-6})
    assert.tensor.near(look:dscores():sum(1):to "f32", g.dbias, {atol = 1e-5})
    assert.tensor.near(look:lse():to "f32", run.lse, {atol = 1e-5})
    assert.equal(-inf, look:scores(1, 2):get(5, 5))
  end)

  it("come whole, by head, and by tile, in q's rank", function()
    local q, k, v, options, dout = everything "f32"
    local look = sa.inspect(q, k, v, options, dout)
    for _, name in ipairs {"weights", "scores", "dscores"} do
      local head = look[name](look, 2, 3)
      assert.tensor.bitwise(look[name](look):select(1, 2):select(1, 3):contiguous(), head)
      assert.tensor.bitwise(head:narrow(1, 4, 5):narrow(2, 6, 3):contiguous(),
        look[name](look, 2, 3, {rows = {4, 8}, keys = {6, 8}}))
    end
    assert.tensor.bitwise(look:entropy():select(1, 2):select(1, 3):contiguous(), look:entropy(2, 3))
    local x = random(1, {3, 5, 4})
    assert.same({3, 5, 5}, sa.inspect(x, x, x):weights().shape)
    assert.same({3, 5}, sa.inspect(x, x, x):entropy().shape)
    x = x:select(1, 1)
    assert.same({5, 5}, sa.inspect(x, x, x):scores().shape)
    assert.same({5}, sa.inspect(x, x, x):entropy().shape)
  end)

  it("have the entropy of even weights, and none of one key", function()
    local x = sa.zeros({4, 4})
    assert.tensor.near(sa.inspect(x, x, x, {causal = true}):entropy(), {0, math.log(2), math.log(3), math.log(4)},
      {atol = 1e-15})
  end)

  it("are refused beyond what memory holds, rows are not", function()
    local q = sa.zeros({1}):expand(1, 8, 2 ^ 20, 4)
    local look = sa.inspect(q, q, q, {causal = true})
    assert.matches("^safeattn%.inspect%(%):weights: the 1 x 8 x 1048576 x 1048576 matrix in f64 is 65536%.0 GiB, "
      .. "wanted at most 1: ask for one head", helper.message_of(look.weights, look))
    assert.equal(3, look:row(1, 8, 3).count)
    assert.same({2, 2}, look:weights(1, 8, {rows = {5, 6}, keys = {1, 2}}).shape)
  end)
end)

describe("dead rows", function()
  local function reasons(mask, options, L, S)
    options = options or {}
    options.mask = mask
    local q, k = random(1, {L or 6, 4}), random(2, {S or 6, 4})
    return sa.inspect(q, k, k, options)
  end

  it("name the factor that emptied them", function()
    local list = reasons(m.documents {1, 1, -1, 2, 2, 2} * m.causal() - m.padding(2)):dead_rows()
    assert.equal(3, #list)
    assert.same({1, {"documents", "-padding({2})"}}, {list[1].i, list[1].factors})
    assert.same({3, {"documents"}, "documents shows it no key"}, {list[3].i, list[3].factors, list[3].reason})
    assert.equal(1, list[1].b)
    assert.equal([[
3 dead queries
  queries 1-2 of batch 1, head 1: documents and -padding({2}) have no key in common for it
  query 3 of batch 1, head 1: documents shows it no key]], tostring(list))
  end)

  it("name options and the bias too", function()
    local bias = sa.zeros {6, 6}
    bias:select(1, 4):fill(-inf)
    local list = reasons(nil, {bias = bias}):dead_rows()
    assert.equal(1, #list)
    assert.same({4, {"bias = -inf"}}, {list[1].i, list[1].factors})
    list = reasons(m.padding(3), {window = {1, 0}, causal = true}):dead_rows()
    assert.same({5, {"padding({3})", "window = {1, 0}"}}, {list[1].i, list[1].factors})
    list = reasons(nil, {causal = "bottom-right"}, 6, 4):dead_rows()
    assert.same({1, {'causal = "bottom-right"'}}, {list[1].i, list[1].factors})
    assert.equal(2, #list)
  end)

  it("look into sums, where every term must fail", function()
    local list = reasons((m.prefix(0) + m.documents {1, -1, 1, 1, 1, 1}) * m.causal()):dead_rows()
    assert.equal(1, #list)
    assert.same({2, {"prefix(0)", "documents"}}, {list[1].i, list[1].factors})
  end)

  it("stand once for what the mask does not depend on, and for each where it does", function()
    local q = random(1, {2, 3, 4, 8})
    local list = sa.inspect(q, q, q, {mask = m.documents {1, -1, 1, 1}}):dead_rows()
    assert.equal(1, #list)
    assert.is_nil(list[1].b)
    assert.is_nil(list[1].h)
    assert.matches("query 2 of every batch and head: documents", tostring(list), 1, true)
    list = sa.inspect(q, q, q, {mask = m.padding({4, 0})}):dead_rows()
    assert.equal(4, #list)
    assert.same({2, 1}, {list[1].b, list[1].i})
    local mask = m.fn(function(_, h, i) return h ~= 2 or i ~= 3 end, {batch = false})
    list = sa.inspect(q, q, q, {mask = mask}):dead_rows()
    assert.equal("1 dead query\n  query 3 of head 2 of every batch: fn shows it no key", tostring(list))
  end)

  it("are none where every query sees a key, and all without keys", function()
    assert.equal("no dead queries", tostring(reasons(m.causal()):dead_rows()))
    local list = reasons(nil, nil, 3, 0):dead_rows()
    assert.equal(3, #list)
    assert.equal("there are no keys", list[3].reason)
  end)

  it("agree with what the kernel treats as dead, on random masks", function()
    for seed = 1, 20 do
      local q = random(seed, {2, 2, 9, 4})
      local mask = m.random(0.3, seed) * (m.window(2, 1) + m.padding {1, 0}) - m.documents {1, 2, 3, 1, 2, 3, 4, 5, -1}
      local lse = sa.forward(q, q, q, {mask = mask}).lse
      local count = lse:stats().neginf
      local list = sa.inspect(q, q, q, {mask = mask}):dead_rows()
      local found = 0
      for _, entry in ipairs(list) do
        assert.equal(-inf, lse:get(entry.b or 1, entry.h or 1, entry.i))
        found = found + (entry.b and 1 or 2) * (entry.h and 1 or 2)
        local masks = {["random(0.3, " .. seed .. ")"] = m.random(0.3, seed), ["window(2, 1)"] = m.window(2, 1),
          ["-documents"] = -m.documents {1, 2, 3, 1, 2, 3, 4, 5, -1}, ["padding({1, 0})"] = m.padding {1, 0},
          ["window(2, 1) + padding({1, 0})"] = m.window(2, 1) + m.padding {1, 0}}
        local all = m.all()
        for _, factor in ipairs(entry.factors) do all = all * assert(masks[factor], factor) end
        local visible = all:dense {B = 2, L = 9, S = 9}
        visible = visible:select(1, visible:size(1) > 1 and entry.b or 1):select(1, 1):select(1, entry.i)
        assert.equal(0, visible:to("f32"):sum():item())
      end
      assert.equal(count, found)
    end
  end)

  it("take expressions of many parts", function()
    local mask = m.none()
    for _ = 1, 300 do mask = mask * m.causal() end
    assert.same({"none"}, reasons(mask):dead_rows()[6].factors)
  end)
end)

describe("dead keys", function()
  it("name what hides them from every query", function()
    local q = random(1, {1, 2, 6, 4})
    local list = sa.inspect(q, q, q, {mask = m.documents {1, -1, 1, 2, 2, 2} * m.padding(5)}):dead_keys()
    assert.equal(2, #list)
    assert.same({2, {"documents"}, "documents shows it to no query"}, {list[1].j, list[1].factors, list[1].reason})
    assert.same({6, {"padding({5})"}}, {list[2].j, list[2].factors})
    assert.matches("key 6 of every head of batch 1: padding", tostring(list), 1, true)
  end)

  it("are dead to all heads that share them", function()
    local q, k = random(1, {1, 4, 3, 4}), random(2, {1, 2, 3, 4})
    local mask = m.fn(function(_, h, _, j) return not (j == 1 and h == 1 or j == 2 and h >= 3 or j == 3 and h <= 2) end)
    local list = sa.inspect(q, k, k, {mask = mask}):dead_keys()
    local found = {}
    for n, entry in ipairs(list) do found[n] = {entry.h, entry.j} end
    assert.same({{1, 3}, {2, 2}}, found)
  end)
end)

describe("nonfinite", function()
  local q, k, v, dout

  before_each(function()
    q, k, v = random(1, {1, 2, 128, 8}), random(2, {1, 2, 128, 8}), random(3, {1, 2, 128, 8})
    dout = random(4, {1, 2, 128, 8})
  end)

  it("says that everything is finite", function()
    local trace = sa.inspect(q, k, v, {causal = true, mask = m.documents(sa.full({128}, -1, {dtype = "i32"}))}, dout)
      :nonfinite()
    assert.is_true(trace.clean)
    assert.equal("everything is finite: Q, K, V, dout, out, lse, dq, dk, dv", tostring(trace))
  end)

  it("traces an input to what it reaches", function()
    v:select(1, 1):select(1, 2):select(1, 77):fill(nan)
    local trace = sa.inspect(q, k, v, {causal = true, window = {3, 0}}, dout):nonfinite()
    assert.equal([=[
V[1,2,77,:] is NaN; seen by rows 77-80 of head 2; hidden from 124 rows; reaches out, dq, dk
  out[1,2,77-80,:] is NaN; from V[1,2,77,:]
  dq[1,2,77-80,:] is NaN; from V[1,2,77,:]
  dk[1,2,74-80,:] is NaN; from V[1,2,77,:]]=], tostring(trace))
    assert.same({{b = 1, h = 2, rows = {77, 78, 79, 80}}}, trace.inputs[1].heads)
    assert.equal(trace.inputs[1], trace.results[1].causes[1])
  end)

  it("says of what is masked that nobody sees it", function()
    k:set(1, 1, 100, 3, inf)
    q:set(1, 2, 5, 1, nan)
    dout:set(1, 2, 5, 8, -inf)
    local mask = m.padding(99) * m.fn(function(_, _, i) return i ~= 5 end)
    local trace = sa.inspect(q, k, v, {mask = mask}, dout):nonfinite()
    assert.equal(0, #trace.results)
    for _, input in ipairs(trace.inputs) do
      assert.matches("seen by no row; hidden from 128 rows; reaches nothing", input.text)
    end
    assert.equal(3, #trace.inputs)
  end)

  it("traces results back to each of their causes", function()
    q:set(1, 1, 10, 1, nan)
    k:set(1, 1, 9, 2, inf)
    dout:set(1, 2, 3, 4, -inf)
    local bias, sinks = sa.zeros {128, 128}, sa.tensor {0, 0}
    bias:set(20, 18, nan)
    bias:set(21, 1, nan) -- outside the window
    local trace = sa.inspect(q, k, v, {causal = true, window = {3, 0}, bias = bias, sinks = sinks}, dout):nonfinite()
    local causes = {}
    for _, result in ipairs(trace.results) do
      local names = {}
      for n, cause in ipairs(result.causes) do names[n] = cause.where end
      causes[result.where] = table.concat(names, " ")
    end
    assert.equal("Q[1,1,10,1] K[1,1,9,2]", causes["out[1,1,10,:]"])
    assert.equal("bias[20,18]", causes["out[1,2,20,:]"])
    assert.equal("dout[1,2,3,4]", causes["dq[1,2,3,:]"])
    assert.equal("dout[1,2,3,4]", causes["dk[1,2,1-3,:]"])
    assert.is_nil(causes["out[1,2,3,:]"])
    for _, input in ipairs(trace.inputs) do
      if input.where == "bias[21,1]" then assert.matches("seen by no row", input.text) end
    end
  end)

  it("finds every row that is not finite, and no other, on random poison", function()
    for seed = 1, 10 do
      local x, y, z = random(seed, {2, 4, 9, 4}), random(seed + 50, {2, 2, 9, 4}), random(seed + 90, {2, 2, 9, 4})
      local place = seed % 9 + 1
      x:set(1, seed % 4 + 1, place, 1, nan)
      y:set(2, 1, place, 2, nan)
      z:set(1, 2, place, 3, inf)
      local mask = m.random(0.4, seed)
      local trace = sa.inspect(x, y, z, {mask = mask}, x):nonfinite()
      local run = sa.forward(x, y, z, {mask = mask, backend = "reference"})
      local g = run:backward(x)
      local want, got = {}, {}
      for name, t in pairs {out = run.out, dq = g.dq, dk = g.dk, dv = g.dv} do
        for b = 1, 2 do
          for h = 1, t:size(2) do
            for i = 1, 9 do
              local s = t:select(1, b):select(1, h):select(1, i):stats()
              if s.nan + s.posinf + s.neginf > 0 then want[table.concat({name, b, h, i}, ",")] = true end
            end
          end
        end
      end
      for _, result in ipairs(trace.results) do
        if result.tensor ~= "lse" then
          assert.is_true(#result.causes > 0, result.text)
          for _, i in ipairs(result.places) do got[table.concat({result.tensor, result.b, result.h, i}, ",")] = true end
        end
      end
      assert.same(want, got)
    end
  end)

  it("tells an overflow from a cause", function()
    local x = sa.full({3, 8}, 3e30)
    local trace = sa.inspect(x, x, x):nonfinite()
    assert.equal(0, #trace.inputs)
    assert.matches("^all inputs are finite\n  out%[1%-3,:%] is NaN; no input is to blame: its scores overflow ",
      tostring(trace))
    assert.is_false(trace.clean)
  end)
end)

describe("compare", function()
  it("finds the largest difference and where, in absolute terms and in ulps", function()
    local q, k, v, options, dout = everything "f32"
    local comparison = sa.inspect(q, k, v, options, dout):compare()
    local run = sa.forward(q, k, v, options)
    local want, place = 0, nil
    local other = reference(q, k, v, options)
    for b = 1, 2 do
      for h = 1, 4 do
        for i = 1, 12 do
          for d = 1, 7 do
            local apart = math.abs(run.out:get(b, h, i, d) - other.out:get(b, h, i, d))
            if apart > want then want, place = apart, {b, h, i, d} end
          end
        end
      end
    end
    local out = comparison.backends[1]
    assert.equal("out", out.tensor)
    assert.equal(want, out.absolute.difference)
    if place then
      assert.same(place, out.absolute.index)
      local at = out.ulps
      local larger = math.max(math.abs(at.fused), math.abs(at.reference))
      local _, exponent = math.frexp(larger)
      assert.equal(math.abs(at.fused - at.reference) / 2 ^ (exponent - 24), at.difference)
    end
    assert.equal(8, #comparison.backends)
    assert.matches("^fused%-f32%-[%w]+ against reference\n  out ", tostring(comparison))
  end)

  it("shows what each stance does to dead rows, and that live ones agree", function()
    local q = random(1, {1, 2, 6, 4}, "f64")
    local comparison = sa.inspect(q, q, q, {mask = m.documents {1, 1, -1, 2, 2, 2} * m.causal()}, q):compare()
    local s = comparison.stances
    assert.same({dead_nan = 0, dead_nonzero = 0, live_difference = 0}, s.zero.out)
    assert.same({dead_nan = 0, dead_nonzero = 0, live_difference = 0}, s.zero.dscores)
    assert.same({dead_nan = 8, dead_nonzero = 8, live_difference = 0}, s.nan.out)
    assert.same({dead_nan = 12, dead_nonzero = 12, live_difference = 0}, s.nan.weights)
    assert.same({dead_nan = 0, dead_nonzero = 12, live_difference = 0}, s.uniform.weights)
    assert.is_nil(sa.inspect(q, q, q):compare().stances.nan.dscores)
  end)
end)

describe("inspect", function()
  it("prints what it looks at", function()
    local q = random(1, {2, 4, 8, 4})
    assert.equal("attention B=2 H=4 L=8 S=8 E=4 Ev=4 f32; causal: 56.3% of the pairs visible; without dout",
      tostring(sa.inspect(q, q, q, {mask = m.causal()})))
  end)

  it("changes nothing, and records nothing", function()
    local q = random(1, {1, 1, 4, 4})
    q.requires_grad = true
    local before = q:detach():clone()
    local look = sa.inspect(q, q, q, nil, q)
    look:compare()
    look:nonfinite()
    assert.is_false(look:weights().requires_grad)
    assert.tensor.bitwise(before, q:detach())
    assert.is_nil(q.grad)
  end)

  it("says which argument is wrong", function()
    local q = random(1, {1, 2, 4, 8})
    local function wrong(text, ...)
      assert.matches("safeattn.inspect" .. text, helper.message_of(sa.inspect, ...), 1, true)
    end
    wrong(": k: got 3, wanted a tensor", q, 3, q)
    wrong(": k: got nil, wanted a tensor", q)
    wrong(": v: got nil, wanted a tensor", q, q)
    wrong(": k: got f32[2,4,8], wanted 4 dims like q", q, q:select(1, 1), q)
    wrong(": q: got f32[8], wanted 2 to 4 dims", sa.zeros {8}, sa.zeros {8}, sa.zeros {8})
    wrong(": options: got unknown option maks", q, q, q, {maks = 1})
    wrong(": mask: got f32[1,2,4,8], wanted a mask or a bool tensor; scores to add are given as `bias`", q, q, q,
      {mask = q})
    wrong(": causal: got \"left\", wanted", q, q, q, {causal = "left"})
    wrong(": window: got 3, wanted", q, q, q, {window = 3})
    wrong(": seed: got nil, wanted the seed that the dropout was drawn with", q, q, q, {dropout = 0.5})
    wrong(": dout: got f32[4], wanted f32[1,2,4,8], like the output", q, q, q, nil, sa.zeros {4})
    wrong(": dout: got 3, wanted a tensor", q, q, q, nil, 3)
    wrong(": softcap:", q, q, q, {softcap = -1})
    wrong(": lse: got 1, wanted true or false", q, q, q, {lse = 1})
    wrong(": weights: got \"yes\", wanted true or false", q, q, q, {weights = "yes"})
    wrong(": out: got true, wanted a tensor", q, q, q, {out = true})
    wrong(": bias: has shape [3,3], wanted one that broadcasts to [1,2,4,4]", q, q, q, {bias = sa.zeros {3, 3}})
    wrong(": bias: has shape [1,2,3,3], wanted one that broadcasts to [1,2,4,4]", q, q, q,
      {bias = sa.zeros {1, 2, 3, 3}})
    wrong(": mask: documents has ids of 2 keys, wanted 4", q, q, q, {mask = m.documents {1, 2}})
    local look = sa.inspect(q, q, q)
    for text, call in pairs {
      ["safeattn.inspect():row: h: got 3, wanted an integer from 1 to 2"] = function() look:row(1, 3, 1) end,
      ["safeattn.inspect():row: i: got nil, wanted an integer from 1 to 4"] = function() look:row(1, 1) end,
      ["safeattn.inspect():weights: h: got nil"] = function() look:weights(1) end,
      ["safeattn.inspect():weights: rows[2]: got 5, wanted an integer from 2 to 4"] =
        function() look:weights(1, 1, {rows = {2, 5}}) end,
      ["safeattn.inspect():dscores: dout: got nil, wanted the gradient of the output"] = function() look:dscores() end,
      ["safeattn.inspect():row: self: got 3, wanted what sa.inspect gave"] = function() look.row(3) end,
    } do
      assert.matches(text, helper.message_of(call), 1, true)
    end
  end)

  it("is loaded when it is first used", function()
    local child = require "spec.child"
    assert.equal("true\n", child.must_run([[
local sa = require "safeattn"
for name in pairs(package.loaded) do
  assert(not (name:find "inspect" or name:find "tap" or name:find "anomaly"), name)
end
local q = sa.ones {2, 2}
print(sa.inspect(q, q, q):row(1, 1, 1).count == 2)
]]))
  end)
end)
