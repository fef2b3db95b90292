-- what the compiler of the CUDA part reported: no kernel keeps registers in memory unless its file says so, and no
-- wgmma waits for the one before

local child = require "spec.child"
local files = require "spec.files"

-- The reports of the last build: {{source =, text =}, ...}.
local function reports()
  local all = {}
  for path in child.command("find build -path '*/cuda*' -name '*.cu.o.log' -not -path '*/emulated/*'"):gmatch "%S+" do
    local source = path:gsub("^build/", "src/"):gsub("%.o%.log$", "")
    local there = io.open(source)
    if there then
      there:close()
      all[#all + 1] = {source = source, text = files.read(path)}
    end
  end
  return all
end

-- Kernels of a report that spill, as "name: 16 bytes stack frame, ...".
local function spilling(text)
  local found = {}
  local line = "Function properties for (%S+)%s+%d+ bytes stack frame, (%d+) bytes spill stores, (%d+)"
  for name, stores, loads in text:gmatch(line) do
    if stores ~= "0" or loads ~= "0" then found[#found + 1] = ("%s: %s and %s bytes"):format(name, stores, loads) end
  end
  return found
end

-- A file whose head (its comments before the first line of code) says "may spill" has a reason, which stands there.
local function may_spill(source)
  return files.read(source):match "^[^#]*":find("may spill", 1, true) ~= nil
end

-- Without nvcc there is nothing to report on.
local all = reports()
local test = #all > 0 and it or pending

describe("the build of the CUDA part", function()
  test("spills no registers", function()
    for _, report in ipairs(all) do
      if not may_spill(report.source) then
        assert.equal("", table.concat(spilling(report.text), "\n"), report.source)
      end
    end
  end)

  test("serialises no wgmma", function()
    for _, report in ipairs(all) do
      assert.is_nil(report.text:match "[^\n]*C75%d%d[^\n]*", report.source)
    end
  end)

  it("would find a spill", function()
    local text = [[
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for bad
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads]]
    assert.same({"bad: 12 and 8 bytes"}, spilling(text))
  end)
end)
