-- the tap: every attention of a model, recorded in bounded memory and looked into afterwards

local helper = require "spec.helper"
local sa = require "safeattn"
local sdpa = require "safeattn.sdpa"
local core = require "safeattn.core"

local ffi, lib = core.ffi, core.lib

local function random(seed, shape, requires_grad)
  return sa.randn(shape or {1, 2, 8, 4}, {seed = seed, requires_grad = requires_grad})
end

local function held()
  local use = ffi.new "sa_memory_use"
  return helper.settled(function()
    lib.sa_memory(use)
    return tonumber(use.bytes)
  end)
end

describe("a tap", function()
  local tap

  after_each(function()
    if tap then tap:stop() end
    tap = nil
  end)

  it("records what sdpa read, newest first, under a name", function()
    tap = sa.tap()
    for n = 1, 3 do sa.sdpa(random(n), random(n), random(n)) end
    local list = tap:list()
    assert.equal(3, #list)
    assert.equal("sdpa 3", list[1].name)
    assert.equal("sdpa 1", list[3].name)
    assert.same({1, 2, 8, 4}, list[1].q_shape)
    assert.matches("sdpa 2 +f32%[1,2,8,4%]", tostring(tap))
    local want = sa.inspect(random(2), random(2), random(2)):weights()
    assert.tensor.bitwise(want, tap:get("sdpa 2"):weights())
    assert.tensor.bitwise(want, tap:get(2):weights())
  end)

  it("names the next attention, or all that a function computes", function()
    tap = sa.tap()
    local x = random(1)
    tap:name("first")
    sa.sdpa(x, x, x)
    sa.sdpa(x, x, x)
    assert.equal(7, tap:name("layer 2", function(seven)
      sa.sdpa(x, x, x)
      return seven
    end, 7))
    assert.is_false((pcall(tap.name, tap, "broken", error, "x")))
    sa.sdpa(x, x, x)
    local names = {}
    for n, entry in ipairs(tap:list()) do names[n] = entry.name end
    assert.same({"sdpa 4", "layer 2", "sdpa 2", "first"}, names)
  end)

  it("names nothing that runs while its coroutine has yielded", function()
    tap = sa.tap()
    local x = random(1)
    local run = coroutine.wrap(function()
      tap:name("layer", function()
        coroutine.yield()
        sa.sdpa(x, x, x)
      end)
    end)
    run()
    sa.sdpa(x, x, x)
    run()
    assert.same({"layer", "sdpa 1"}, {tap:list()[1].name, tap:list()[2].name})
  end)

  it("has the gradient of the output, and every option, of a model that was trained", function()
    local q, k, v = random(1, nil, true), random(2, nil, true), random(3, nil, true)
    local bias, dout = random(4, {8, 8}), random(5)
    local options = {mask = sa.mask.padding(6), causal = true, softcap = 3, scale = 0.3, bias = bias, dropout = 0.5,
      sinks = random(6, {2}), alibi = random(7, {2}), window = {4, 0}}
    tap = sa.tap()
    local out = sa.sdpa(q, k, v, options)
    out:backward(dout)
    tap:stop()
    assert.is_true(tap:list()[1].dout)
    -- in place, after the step: the tap holds what was there
    sa.no_grad(function() q:fill(0) end)
    local look = tap:get(1)
    for i = 1, 8 do
      local row = look:row(1, 2, i)
      local function here(t) return t:detach():select(1, 1):select(1, 2):select(1, i):to "f64" end
      assert.tensor.near(sa.tensor(row.out, {dtype = "f64"}), here(out), {atol = 1e-6})
      assert.tensor.near(sa.tensor(row.dq, {dtype = "f64"}), here(q.grad), {atol = 1e-5})
    end
  end)

  it("never holds more than its bytes; the oldest go first", function()
    local x = random(1)
    local one = 3 * x:numel() * 4
    tap = sa.tap {bytes = 3 * one + 5}
    local before = held()
    for n = 1, 10 do
      sa.sdpa(x, x, x)
      assert.is_true(held() - before <= 3 * one + 5 + 64 * 9)
      assert.equal(math.min(n, 3), #tap:list())
    end
    assert.equal("sdpa 10", tap:list()[1].name)
    assert.equal("sdpa 8", tap:list()[3].name)
    assert.is_true(tap.used <= tap.limit)
  end)

  it("makes room for gradients too, and keeps what a person looks at", function()
    local x = random(1, nil, true)
    local one = x:numel() * 4
    tap = sa.tap {bytes = 8 * one}
    local first, second = sa.sdpa(x, x, x), sa.sdpa(x, x, x)
    local look = tap:get("sdpa 1")
    sa.sum(first):backward()
    assert.equal(7 * one, tap.used)
    sa.sum(second):backward()
    assert.equal(8 * one, tap.used)
    sa.sdpa(x, x, x)
    assert.same({"sdpa 3", "sdpa 2"}, {tap:list()[1].name, tap:list()[2].name})
    assert.equal(8, look:weights():size(3))
  end)

  it("lists what is too large for it, and says so when asked to look", function()
    tap = sa.tap {bytes = 10}
    local x = random(1)
    sa.sdpa(x, x, x)
    assert.is_false(tap:list()[1].kept)
    assert.equal(0, tap.used)
    assert.matches("^safeattn%.tap%(%):get: which: sdpa 1 was larger than the tap's 0%.0 MiB",
      helper.message_of(tap.get, tap, 1))
  end)

  it("leaves no trace when it is off", function()
    assert.is_nil(sdpa.observer)
    local x = random(1, nil, true)
    tap = sa.tap()
    assert.is_true(tap:on())
    local out = sa.sdpa(x, x, x)
    tap:stop()
    tap:stop()
    assert.is_nil(sdpa.observer)
    assert.is_false(tap:on())
    sa.sum(out):backward()
    assert.is_false(tap:list()[1].dout)
    sa.sdpa(x, x, x)
    assert.equal(1, #tap:list())
    tap:clear()
    assert.equal(0, tap.used)
    assert.equal("nothing recorded", tostring(tap:list()))
  end)

  it("gives its memory back", function()
    local x = random(1, {1, 2, 64, 16})
    local before = held()
    tap = sa.tap()
    for _ = 1, 5 do sa.sdpa(x, x, x) end
    assert.is_true(held() > before + 5 * 3 * x:numel() * 4 - 1)
    tap:clear()
    assert.equal(before, held())
  end)

  it("stops the one before it, and records inside no_grad", function()
    local x = random(1)
    local old = sa.tap()
    tap = sa.tap()
    assert.is_false(old:on())
    sa.no_grad(function() sa.sdpa(x, x, x) end)
    assert.equal(0, #old:list())
    assert.equal(1, #tap:list())
  end)

  it("says what is wrong", function()
    tap = sa.tap()
    local x = random(1)
    for text, call in pairs {
      ["^safeattn%.tap: options: got unknown option byte, wanted bytes"] = function() sa.tap {byte = 3} end,
      ["^safeattn%.tap: bytes: got %-1, wanted a count"] = function() sa.tap {bytes = -1} end,
      ["^safeattn%.tap%(%):get: which: got 1, but nothing is recorded"] = function() tap:get(1) end,
      ["^safeattn%.tap%(%):name: name: got 3, wanted a string"] = function() tap:name(3) end,
      ["^safeattn%.tap%(%):list: self: got nil, wanted a tap"] = function() tap.list() end,
    } do
      assert.matches(text, helper.message_of(call))
      if not tap:on() then tap = sa.tap() end
    end
    sa.sdpa(x, x, x)
    assert.matches('which: got "sdpa 2", wanted a name that tap:list() has (did you mean "sdpa 1"?)',
      helper.message_of(tap.get, tap, "sdpa 2"), 1, true)
    assert.matches("which: got 2, wanted", helper.message_of(tap.get, tap, 2), 1, true)
  end)
end)

describe("docs/debugging-nan.md", function()
  -- What one line at the prompt shows: the values of an expression, or the message of an error.
  local function shown(line, environment)
    local chunk = loadstring("return " .. line, "=prompt") or assert(loadstring(line, "=prompt"))
    local results = {pcall(setfenv(chunk, environment))}
    if not results[1] then return results[2] end
    for n = 1, #results do results[n] = tostring(results[n]) end
    return table.concat(results, "\n", 2)
  end

  -- The lines after prompts, each with the lines of output under it.
  local function dialogue(block)
    local list = {}
    for line in block:gmatch "([^\n]*)\n" do
      local asked = line:match "^> (.*)"
      if asked then
        list[#list + 1] = {asked = asked, output = ""}
      else
        list[#list].output = list[#list].output .. line .. "\n"
      end
    end
    return list
  end

  it("shows what really happens", function()
    local file = assert(io.open "docs/debugging-nan.md")
    local text = file:read "*a"
    file:close()
    local environment = setmetatable({}, {__index = _G})
    local prompts = 0
    for language, block in text:gmatch "```(%w*)\n(.-)```" do
      if language == "lua" then
        setfenv(assert(loadstring(block, "@model.lua")), environment)()
      else
        for _, turn in ipairs(dialogue(block)) do
          local got, want = shown(turn.asked, environment) .. "\n", turn.output
          local whole = want:gsub("%.%.%.\n$", "")
          if whole ~= want then got = got:sub(1, #whole) end
          assert.equal(want == "" and "\n" or whole, got)
          prompts = prompts + 1
        end
      end
    end
    assert.equal(8, prompts)
  end)
end)
