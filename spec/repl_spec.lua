-- the prompt, on a pseudo-terminal and through pipes: lines, documentation, interruption in Lua and in kernels

local ffi = require "ffi"
local sa = require "safeattn"
local child = require "spec.child"
local files = require "spec.files"
local helper = require "spec.helper"
local Terminal = require "spec.terminal"
local lib = require("safeattn.core").lib

local folder
setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

-- The command with a home of its own, so that no history is read or left.
local function command(arguments)
  return "HOME=" .. folder .. " bin/safeattn " .. (arguments or "")
end

local function piped(input, arguments)
  return child.command(("printf '%%s' %s | %s"):format(child.quoted(input), command(arguments)))
end

describe("the command line", function()
  it("runs code and scripts, with arguments and exit status", function()
    files.write(folder .. "/script.lua", "print(arg[0]:match '[^/]*$', arg[1], sa.info().threads > 0, m.causal(),"
      .. " ...)\nif arg[1] == 'bad' then error 'a mistake' end")
    local output, status = child.command(command("-e 'x = 3' -e 'print(x + 1)'"))
    assert.same({"4\n", 0}, {output, status})
    output, status = child.command(command(folder .. "/script.lua one two"))
    assert.same({"script.lua\tone\ttrue\tcausal\tone\ttwo\n", 0}, {output, status})
    output, status = child.command(command(folder .. "/script.lua bad"))
    assert.equal(1, status)
    assert.matches("script.lua:2: a mistake\nstack traceback:", output, 1, true)
    output, status = child.command(command("-e 'x ='"))
    assert.equal(1, status)
    assert.matches("near '<eof>'", output, 1, true)
    output, status = child.command(command(folder .. "/absent.lua"))
    assert.equal(1, status)
    assert.matches("cannot open", output, 1, true)
  end)

  it("shows the version and how it is used", function()
    assert.equal(sa._VERSION .. "\n", (child.command(command("-v"))))
    assert.matches("usage: safeattn [-i] [-e code] [script [arguments]]", child.command(command("-h")), 1, true)
    local output, status = child.command(command("-x"))
    assert.equal(2, status)
    assert.matches("safeattn: got unknown option -x\nusage:", output, 1, true)
    assert.equal(2, select(2, child.command(command("-e"))))
  end)

  it("finds its modules from any folder", function()
    local here = child.command("pwd"):match("[^\n]+")
    local output = child.command(("cd / && env -u LUA_PATH HOME=%s %s/bin/safeattn -e 'print(sa.isa() ~= nil)'"):format(
      folder, child.quoted(here)))
    assert.equal("true\n", output)
  end)
end)

describe("the prompt through a pipe", function()
  it("prints what expressions give", function()
    assert.equal("3\n" .. '"a\\\nb"' .. "\nnil\n1\nnil\n", (piped("1 + 2\n'a\\nb'\nnil\n1, nil\nlocal x = 1\n")))
    assert.equal("{1, 2, 3, a = {...}, f = function}\n", (piped("{1, 2, 3, a = {}, f = print}\n")))
    assert.equal("7\n", (piped("x = 7\n= x")))
    assert.matches("f32[2,2] cpu contiguous", piped("sa.ones {2, 2}\n"), 1, true)
    assert.equal("documents * causal\n", (piped("m.documents {1, 2} * m.causal()\n")))
  end)

  it("reads on while a statement is unfinished", function()
    assert.equal("10\n6\n", (piped("s = 0\nfor i = 1, 4 do\ns = s + i\nend\ns\n{1,\n2, 3}[3] and 0\n(1 +\n2) * 2\n")
      :gsub("[^\n]*near[^\n]*\n", "")))
  end)

  it("goes on after errors, with a traceback of the chunk alone", function()
    local output = piped("x = = 1\nlocal function f() error 'oops' end f()\nsa.zeros('a')\n1\n")
    assert.matches("unexpected symbol near '='", output, 1, true)
    assert.matches("prompt:1: oops\nstack traceback:", output, 1, true)
    assert.matches('prompt:1: safeattn.zeros: shape: got "a", wanted a list of counts', output, 1, true)
    assert.matches("\n1\n$", output)
    assert.not_matches("xpcall", output)
  end)

  it("goes on after values and errors that cannot be printed", function()
    local output = piped([[
broken = setmetatable({}, {__tostring = function() error("no words", 0) end})
mute = setmetatable({}, {__tostring = function() error {} end})
broken
mute
{broken}
error(broken)
7
]])
    assert.equal("no text: no words\nno text: table\n{a table}\nno text: no words\n7\n", (output))
  end)

  it("shows the documentation of functions", function()
    for name, text in pairs {
      sdpa = "k", ["sa.zeros"] = "Every element 0", ["m.causal"] = "Query i sees",
      ["t:stats"] = "Over the finite elements",
      ["sa.save"] = "Writes a tensor (.npy) or a table of named tensors", gradcheck = "central differences",
      ["sa.load()"] = "@param path name of a file", window = "-left <= j - i - d <= right",
    } do
      assert.matches(text, piped("?" .. name .. "\n"), 1, true)
    end
    assert.matches("^there is no nothing_such\n", (piped("?nothing_such\n")))
    assert.matches("^wanted a name", (piped("?1 + 2\n")))
    assert.matches("Ctrl-C ends what runs", (piped("?\n")), 1, true)
    assert.matches("gradcheck.*sdpa", (piped("?sa\n")))
    assert.matches("additive all blocks causal", (piped("?m\n")), 1, true)
  end)

  it("has documentation of every function and method", function()
    local names = require "safeattn.repl.names"
    local environment = {sa = sa, m = sa.mask, t = sa.ones {1}}
    for prefix, functions in pairs {
      ["sa."] = sa, ["m."] = sa.mask, ["sa.cuda."] = sa.cuda, ["t:"] = require("safeattn.tensor").methods,
    } do
      for name, value in pairs(functions) do
        if type(value) == "function" then assert(names.documentation(prefix .. name, environment)) end
      end
    end
  end)

  it("comes behind a script with -i", function()
    files.write(folder .. "/begin.lua", "y = 5 return 'unseen'")
    assert.equal("6\n", (piped("y + x\n", "-i -e 'x = 1' " .. folder .. "/begin.lua")))
  end)
end)

describe("completion", function()
  local names = require "safeattn.repl.names"
  local environment = {sa = sa, m = sa.mask, text = "x", t = sa.zeros {2}, number = 3}

  it("follows tables, tensors, masks and strings", function()
    assert.same({"sa.save"}, names.complete("sa.sa", environment))
    assert.same({"sa.sdpa", "sa.seed", "sa.select"}, {unpack(names.complete("sa.s", environment), 2, 4)})
    assert.same({"m.padding", "m.prefix"}, names.complete("m.p", environment))
    assert.same({"t:transpose"}, names.complete("t:tr", environment))
    assert.same({"t.requires_grad"}, names.complete("t.req", environment))
    assert.same({"text:find", "text:format"}, names.complete("text:f", environment))
    assert.same({"?sa.sdpa"}, names.complete("?sa.sd", environment))
    assert.same({"t", "text", "then", "true"}, names.complete("t", environment))
    assert.same({}, names.complete("number.x", environment))
    assert.same({}, names.complete("absent.x", environment))
    assert.same({}, names.complete("f(x).y", environment))
  end)
end)

describe("an interruption", function()
  after_each(function() lib.sa_interrupt(false) end)

  it("ends attention, forward and backward, and gives back what was created", function()
    helper.with_threads(4, function()
      for _, backend in ipairs {"fused", "reference"} do
        local q = sa.randn({2, 4, 300, 16}, {seed = 1})
        local options = {mask = sa.mask.causal(), backend = backend}
        local run = sa.forward(q, q, q, options)
        local dout = sa.ones {2, 4, 300, 16}
        local want = run:backward(dout)
        local use = ffi.new("sa_memory_use")
        local function blocks()
          lib.sa_memory(use)
          return tonumber(use.blocks)
        end
        local before = helper.settled(blocks)
        lib.sa_interrupt(true)
        assert.is_true(lib.sa_interrupted())
        assert.equal("safeattn.forward: interrupted", helper.message_of(sa.forward, q, q, q, options))
        assert.equal("safeattn.sdpa: interrupted", helper.message_of(sa.sdpa, q, q, q, options))
        assert.matches("backward: interrupted$", helper.message_of(run.backward, run, dout))
        lib.sa_interrupt(false)
        assert.equal(before, helper.settled(blocks))
        -- and the next call is whole
        local got = run:backward(dout)
        for name, gradient in pairs(want) do assert.tensor.bitwise(got[name], gradient) end
      end
    end)
  end)

  it("leaves other operations alone", function()
    lib.sa_interrupt(true)
    assert.tensor.near(sa.ones({300, 300}):matmul(sa.ones {300, 300}), sa.full({300, 300}, 300))
    assert.equal(90000, sa.ones({300, 300}):sum():item())
  end)

  it("is a status with a name", function()
    assert.equal("interrupted", ffi.string(lib.sa_status_name(lib.SA_INTERRUPTED)))
  end)
end)

describe("the prompt on a terminal", function()
  local terminal

  -- With plain lines, or as this machine has it.
  local function start(plain)
    terminal = Terminal.start {"env", "HOME=" .. folder, "TERM=dumb", "bin/safeattn", "-i", "-e",
      plain and "package.preload.readline = function() error 'none' end" or "x = 1"}
    terminal:expect "? for help"
    terminal:expect "> "
  end
  after_each(function() terminal:stop() end)

  for _, plain in ipairs {true, false} do
    local how = plain and " (plain lines)" or " (lua-readline, where it is there)"

    it("answers, reads several lines and leaves at the end of the input" .. how, function()
      start(plain)
      terminal:type "21 * 2\n"
      terminal:expect "\n42\n"
      terminal:expect "> "
      terminal:type "for i = 1, 2 do\n"
      terminal:expect ">> "
      terminal:type "print('line ' .. i) end\n"
      terminal:expect "line 1\nline 2\n"
      terminal:expect "> "
      terminal:type "\4"
      assert.equal(0, terminal:wait())
    end)

    it("interrupts a loop and keeps what there was" .. how, function()
      start(plain)
      terminal:type "t = sa.ones {3}\n"
      terminal:expect "> "
      terminal:type "print('g' .. 'o') n = 0 while true do n = n + 1 end\n"
      terminal:expect "go\n"
      terminal:type "\3"
      terminal:expect "interrupted\n"
      terminal:expect "> "
      terminal:type "print(n > 0, t:sum():item() == 3 and 'whole')\n"
      terminal:expect "true\twhole\n"
    end)
  end

  it("interrupts a loop that catches errors, in a function, a coroutine and a module", function()
    files.write(folder .. "/endless.lua", "return {run = function() while true do end end}")
    start(true)
    terminal:type("package.path = '" .. folder .. "/?.lua;' .. package.path\n")
    terminal:expect "> "
    for _, code in ipairs {
      "while true do pcall(function() while true do end end) end",
      "f = function(x) return x + 1 end x = 0 while true do x = f(x) end",
      "coroutine.wrap(function() while true do end end)()",
      "require('endless').run()",
      "loop = {} for i = 1, 1e15 do loop[i % 7] = i end",
    } do
      terminal:type("print('g' .. 'o') " .. code .. "\n")
      terminal:expect "go\n"
      terminal:type "\3"
      terminal:expect "interrupted\n"
      terminal:expect "> "
    end
    terminal:type "1 + 1\n"
    terminal:expect "\n2\n"
  end)

  it("leaves the tape as it was", function()
    start(true)
    for _, code in ipairs {
      "sa.no_grad(function() while true do end end)",
      "while true do sa.no_grad(function() return sa.ones {2} + 1 end) end",
      "x = sa.ones({3}, {requires_grad = true}) while true do (x * x):sum():backward() end",
    } do
      for _ = 1, 3 do
        terminal:type("print('g' .. 'o') " .. code .. "\n")
        terminal:expect "go\n"
        terminal:type "\3"
        terminal:expect "interrupted\n"
        terminal:expect "> "
        terminal:type "y = sa.ones({1}, {requires_grad = true}) print('records', (y * 2).requires_grad)\n"
        terminal:expect "records\ttrue\n"
        terminal:expect "> "
      end
    end
    terminal:type "x.grad = nil (x * x):sum():backward() print(x.grad:sum():item())\n"
    terminal:expect "\n6\n"
  end)

  it("completes a name at Tab", function()
    if not pcall(require, "readline") then pending "lua-readline is not here" end
    start(false)
    terminal:type "print(sa.sdp\t == sa.sdpa)\n"
    terminal:expect "\ntrue\n"
    terminal:expect "> "
    terminal:type "\16\n" -- the line before, again
    terminal:expect "\ntrue\n"
    terminal:expect "> "
    terminal:type "\4"
    assert.equal(0, terminal:wait())
    assert.matches("sa.sdpa", files.read(folder .. "/.safeattn_history"), 1, true)
  end)

  it("interrupts a kernel in the middle", function()
    -- 18 Tflop: minutes.
    start(true)
    terminal:type "q = sa.zeros {1, 1, 262144, 64}\n"
    terminal:expect "> "
    terminal:type "print('g' .. 'o') out = sa.sdpa(q, q, q)\n"
    terminal:expect "go\n"
    child.command "sleep 0.3"
    terminal:type "\3"
    terminal:expect "interrupted\n"
    terminal:expect "> "
    terminal:type "print(out, q:sum():item(), sa.sdpa(sa.ones {2, 4}, sa.ones {2, 4}, sa.ones {2, 4}):sum():item())\n"
    terminal:expect "nil\t0\t8\n"
  end)

  it("interrupts a backward, whose threads wait for each other", function()
    start(true)
    terminal:type "sa.threads(4) q = sa.randn({1, 2, 4096, 32}, {seed = 1})\n"
    terminal:type "r = sa.forward(q, q, q) d = sa.ones(q.shape)\n"
    terminal:expect "> "
    terminal:expect "> "
    for _ = 1, 3 do
      terminal:type "print('g' .. 'o') while true do r:backward(d) end\n"
      terminal:expect "go\n"
      child.command "sleep 0.1"
      terminal:type "\3"
      terminal:expect "interrupted\n"
      terminal:expect "> "
    end
    terminal:type "print(r:backward(d).dv:sum():item() > 0)\n"
    terminal:expect "true\n"
  end)

  it("forgets a line at Ctrl-C, and goes on", function()
    start(true)
    terminal:type "for i = 1, 2 do\n"
    terminal:expect ">> "
    terminal:type "\3"
    terminal:expect "> "
    terminal:type "'still ' .. 'here'\n"
    terminal:expect '"still here"\n'
  end)
end)
