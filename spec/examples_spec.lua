-- the examples run, and show what they say they show; the README's runs exactly as printed

local child = require "spec.child"
local files = require "spec.files"

local read, write = files.read, files.write

local function run(command)
  return child.must_command('LUA_PATH="lua/?.lua;lua/?/init.lua;;" ' .. command)
end

local folder

setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

describe("the README's example", function()
  local code, shown, more = read("README.md"):match("```lua\n(.-)```.-```text\n(.-)```.-```lua\n(.-)```")

  it("prints what is shown below it", function()
    write(folder .. "/readme.lua", code)
    assert.equal(shown, run("luajit " .. folder .. "/readme.lua"))
  end)

  it("goes on to look inside", function()
    local page = folder .. "/report.html"
    write(folder .. "/readme.lua", code .. more:gsub("report%.html", page))
    local output = run("luajit " .. folder .. "/readme.lua")
    assert.matches("documents * causal  L=6 S=6", output, 1, true)
    assert.matches("\nf32[1,2,6,8][1,2,:,:]  min", output, 1, true)
    assert.matches("\ndscores  b=1 h=2  L=6 S=6\n", output, 1, true)
    assert.matches("^<!doctype html>", read(page))
  end)

  it("is short", function()
    assert.is_true(select(2, code:gsub("\n", "\n")) <= 21)
  end)
end)

describe("the guide to the semantics", function()
  it("shows code that runs", function()
    local count = 0
    for code in read("docs/semantics.md"):gmatch("```lua\n(.-)```") do
      count = count + 1
      write(folder .. "/guide.lua", [[
local sa = require "safeattn"
local q, k, v = sa.randn {1, 2, 128, 16}, sa.randn {1, 2, 128, 16}, sa.randn {1, 2, 128, 16}
]] .. code)
      run("luajit " .. folder .. "/guide.lua")
    end
    assert.is_true(count > 0)
  end)
end)

describe("the tour", function()
  it("shows a mask, an output and a gradient", function()
    local output = run("luajit examples/tour.lua")
    assert.matches("documents * causal", output, 1, true)
    assert.equal(2, select(2, output:gsub("\n        0        0        0        0\n", "")))
    assert.not_matches("nan", output)
  end)
end)

describe("the three stances", function()
  local output
  lazy_setup(function() output = run("luajit examples/three_stances.lua") end)

  -- The lines of a section, with runs of spaces made one.
  local function section(number)
    local text = output:match("\n" .. number .. "%. [^\n]*\n%-+\n(.-)\n\n") or output:match("\n" .. number
      .. "%. [^\n]*\n%-+\n(.*)$")
    return (text:gsub("[ \t]+", " "))
  end

  it("start from the weights that the pull request prints", function()
    assert.matches("row 1 alone [0.5377, 0.2729, 0.0692, 0.1201]", section(1), 1, true)
    assert.matches("both rows [0.5377, 0.2729, 0.0692, 0.1201] [nan, nan, nan, nan]", section(1), 1, true)
  end)

  it("differ in the gradient of a row that nobody used", function()
    local live = "[0.0000, 0.0000, 0.0000, 0.0000] "
    assert.matches("nan " .. live .. "[nan, nan, nan, nan]", section(2), 1, true)
    assert.matches("uniform " .. live .. "[0.0000, 0.0000, 0.0000, 0.0000]", section(2), 1, true)
    assert.matches("zero " .. live .. "[0.0000, 0.0000, 0.0000, 0.0000]", section(2), 1, true)
  end)

  it("answer NaN, 1/n and 0 for a row of nothing but -inf", function()
    assert.equal("nan [nan, nan, nan, nan]\nuniform [0.2500, 0.2500, 0.2500, 0.2500]\n"
      .. "zero [0.0000, 0.0000, 0.0000, 0.0000]", section(3))
  end)

  it("all attend alike to a row of large negative numbers", function()
    assert.matches("-1e6 [0.2500, 0.2500, 0.2500, 0.2500]", section(4), 1, true)
  end)

  it("keep a NaN that is visible", function()
    assert.equal("zero [nan, nan, nan, nan]\nzero [nan, nan, nan, nan]", section(5))
  end)

  it("show in a shared weight what each of them costs", function()
    assert.matches("nan second row [nan, nan] dw [nan, nan]", section(6), 1, true)
    local zero = section(6):match("zero second row %[0.0000, 0.0000%] (dw %b[])")
    assert.matches("sa.sdpa second row [0.0000, 0.0000] " .. zero, section(6), 1, true)
    assert.not_matches("nan", zero)
    assert.matches("uniform second row [2.0000, 3.5000]", section(6), 1, true)
  end)
end)

describe("the language model", function()
  -- The rows of the table below `title`: stance -> {loss, how many NaN, difference}.
  local function stances(output, title)
    local rows = {}
    for line in output:match(title .. "\n[^\n]*\n(.-)\n\n"):gmatch("[^\n]+") do
      local name, loss, nan, all, difference = line:match("^ +(%S+) +(%S+) +(%d+) of (%d+) *(%S*)$")
      rows[name] = {loss = loss, nan = tonumber(nan), all = tonumber(all), difference = tonumber(difference)}
    end
    return rows
  end

  it("meets dead rows in its text, trains past them and writes", function()
    local output = run("luajit examples/train_lines.lua 100 examples/text.txt")
    local whole = stances(output, "one training step, the loss over every character")
    assert.equal("nan", whole.nan.loss)
    assert.is_true(whole.uniform.nan == 0 and whole.zero.nan == 0 and whole["sa.sdpa"].nan == 0)
    assert.is_true(whole.uniform.difference > 1e-3)
    assert.is_true(whole.zero.difference < 1e-4)

    local cut = stances(output, "the same, the characters below an empty line cut out of the loss")
    assert.equal(cut.zero.loss, cut.nan.loss)
    assert.is_true(cut.nan.nan > 0.5 * cut.nan.all)
    assert.is_true(cut.uniform.difference < 1e-4 and cut.zero.difference < 1e-4)

    local first = tonumber(output:match("step +1 +loss (%S+)"))
    local last = tonumber(output:match("step +100 +loss (%S+)"))
    local unknowing = tonumber(output:match("ln %d+ = (%S+)"))
    assert.is_true(math.abs(first - unknowing) < 0.5, output)
    assert.is_true(last < first - 1, output)
    assert.matches("a few lines of its own:\n  .*\n  .*\n  .*\n  .*\n  .*\n", output)
  end)

  it("falls back on the text beside it when there is no other", function()
    local output = run("luajit examples/train_lines.lua 1 /no/such/file")
    assert.matches("examples/text.txt: ", output, 1, true)
  end)
end)
