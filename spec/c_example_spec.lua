-- a C program alone: examples/c/minimal.c, built against the tree and run

local must_run = require("spec.child").must_command

describe("a C program alone", function()
  local program = os.tmpname()

  lazy_setup(function()
    must_run("${CC:-gcc} -std=c11 -Wall -Wextra -Wpedantic -Werror -g -Isrc -o " .. program
      .. " examples/c/minimal.c -Lbuild -lsafeattn -lm -Wl,-rpath,\"$PWD/build\"")
  end)

  lazy_teardown(function() os.remove(program) end)

  it("runs attention forward and backward behind a mask", function()
    local output = must_run(program)
    assert.matches("kernel fused%-f32%-", output)
    assert.matches("out%[2%] +%-?%d+%.%d+ +%-?%d+%.%d+ +%-?%d+%.%d+ +%-?%d+%.%d+\n", output)
  end)

  it("prints zeros for the row that sees nothing", function()
    local output = must_run(program)
    local zeros = "( +%-?0%.000000 +%-?0%.000000 +%-?0%.000000 +%-?0%.000000)\n"
    assert.matches("out%[3%]" .. zeros, output)
    assert.matches("dq%[3%] " .. zeros, output)
  end)

  it("gets the same numbers as Lua", function()
    local sa = require "safeattn"
    local output = must_run(program)
    local q, k, v = sa.randn({1, 2, 6, 4}, {seed = 1}), sa.randn({1, 2, 6, 4}, {seed = 2}),
      sa.randn({1, 2, 6, 4}, {seed = 3})
    local run_ = sa.forward(q, k, v, {mask = sa.mask.documents {1, 1, 1, -1, 2, 2} * sa.mask.causal()})
    local row = {}
    for column = 1, 4 do row[column] = ("%.6f"):format(run_.out:get(1, 1, 3, column)) end
    local printed = {}
    for number in output:match("out%[2%]([^\n]*)"):gmatch("%S+") do printed[#printed + 1] = number end
    assert.same(row, printed)
  end)

  it("is told in a sentence what was wrong with a call", function()
    assert.matches("error  sa_forward: k: ", must_run(program), 1, true)
  end)

  it("compiles as the first include of a file", function()
    must_run("echo \"#include <safeattn.h>\" | ${CC:-gcc} -std=c11 -Wall -Wextra -Wpedantic -Werror -Isrc "
      .. "-fsyntax-only -x c -")
  end)
end)
