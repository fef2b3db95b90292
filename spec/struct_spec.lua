-- structs and constants of safeattn.h: LuaJIT's FFI and the C compiler agree on every size, offset and value

local core = require "safeattn.core"
local child = require "spec.child"

local ffi, lib = core.ffi, core.lib

local header
do
  local file = assert(io.open "src/safeattn.h")
  header = file:read("*a"):gsub("//[^\n]*", ""):gsub("/%*.-%*/", "")
  file:close()
end

-- Every struct with the names of its fields.
local structs = {}
for name, body in header:gmatch "typedef struct ([%w_]+) (%b{})" do
  local fields = {}
  for declaration in body:sub(2, -2):gmatch "[^;]+" do
    -- "const sa_tensor *q, *k" -> q, k;  "int64_t shape[8]" -> shape
    for declarator in (declaration:gsub("%[[^%]]*%]", "") .. ","):gmatch "([^,]+)," do
      table.insert(fields, declarator:match "([%w_]+)%s*$")
    end
  end
  table.insert(structs, {name = name, fields = fields})
end

-- Every constant of an enum.
local constants = {}
for body in header:gmatch "enum [%w_]*%s*(%b{})" do
  for name in body:gmatch "(SA_[%w_]+)" do table.insert(constants, name) end
end

describe("LuaJIT and the C compiler agree", function()
  local said = {}

  setup(function()
    local lines = {"#include <stdio.h>", "#include <safeattn.h>", "int main(void) {"}
    local function print_number(key, expression)
      table.insert(lines, ('  printf("%s %%lld\\n", (long long)(%s));'):format(key, expression))
    end
    for _, struct in ipairs(structs) do
      print_number(struct.name, "sizeof(" .. struct.name .. ")")
      for _, field in ipairs(struct.fields) do
        local key = struct.name .. "." .. field
        print_number(key, ("offsetof(%s, %s)"):format(struct.name, field))
        print_number(key .. ".size", ("sizeof(((%s *)0)->%s)"):format(struct.name, field))
      end
    end
    for _, name in ipairs(constants) do print_number(name, name) end
    table.insert(lines, "  return 0;\n}\n")

    local program = os.tmpname()
    local file = assert(io.open(program .. ".c", "w"))
    file:write(table.concat(lines, "\n"))
    file:close()
    local output, status = child.command(("${CC:-gcc} -std=c11 -Isrc -o %s %s.c && %s")
      :format(program, program, program))
    os.remove(program)
    os.remove(program .. ".c")
    assert.equal(0, status, output)
    for key, number in output:gmatch "(%S+) (%-?%d+)\n" do said[key] = tonumber(number) end
  end)

  it("on which structs there are", function()
    local found = {}
    for _, struct in ipairs(structs) do found[struct.name] = #struct.fields end
    assert.is_true(found.sa_tensor == 8 and found.sa_attention >= 30 and found.sa_plan_counts >= 10)
    -- A struct that the header names but this reading of it missed would go unchecked.
    for name in header:gmatch "}%s*(sa_[%w_]+);" do
      local kind = header:match("typedef (%w+) " .. name .. " {")
      assert.is_true(kind == "enum" or found[name] ~= nil, name)
    end
  end)

  for _, struct in ipairs(structs) do
    it("on " .. struct.name, function()
      assert.equal(said[struct.name], ffi.sizeof(struct.name))
      local instance = ffi.new(struct.name)
      for _, field in ipairs(struct.fields) do
        local key = struct.name .. "." .. field
        assert.equal(said[key], ffi.offsetof(struct.name, field), key)
        -- a field that the FFI reads as a plain Lua value has no size to ask for
        local value = instance[field]
        if type(value) == "cdata" and tostring(ffi.typeof(value)):find("&", 1, true) then
          assert.equal(said[key .. ".size"], ffi.sizeof(value), key)
        end
      end
    end)
  end

  it("on the constants", function()
    assert.is_true(#constants > 40)
    for _, name in ipairs(constants) do assert.equal(said[name], tonumber(lib[name]), name) end
  end)
end)
