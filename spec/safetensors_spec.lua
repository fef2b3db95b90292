-- .safetensors: round trips, mapped reading, metadata, broken and hostile headers

local sa = require "safeattn"
local helper = require "spec.helper"
local child = require "spec.child"
local files = require "spec.files"

local folder
setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

local function path(name) return folder .. "/" .. name end

local dtypes = {"f32", "f64", "f16", "bf16", "bool", "i32", "i64"}

local function sample()
  local tensors = {scalar = sa.tensor(2.5), empty = sa.zeros {0, 3}}
  tensors["layer.1/größe\n\""] = sa.randn({3, 4}, {seed = 1})
  for _, dtype in ipairs(dtypes) do tensors[dtype] = files.sample(dtype) end
  return tensors
end

local function file_with(header, data)
  return files.little(8, #header) .. header .. (data or "")
end

describe(".safetensors", function()
  it("gives back all tensors and the metadata", function()
    local tensors, metadata = sample(), {epoch = "7", ["größe"] = "a \"quoted\"\nline"}
    assert(sa.save(path "a.safetensors", tensors, {metadata = metadata}))
    local got, kept = assert(sa.load(path "a.safetensors"))
    for name, t in pairs(tensors) do
      assert.tensor.bitwise(got[name], t)
      got[name] = nil
    end
    assert.same({}, got)
    assert.same(metadata, kept)
    assert(sa.save(path "a.safetensors", {}))
    assert.same({{}}, {sa.load(path "a.safetensors")})
  end)

  it("starts the elements at a multiple of 64", function()
    assert(sa.save(path "a.safetensors", {x = sa.zeros {1}}))
    assert.equal(4, #files.read(path "a.safetensors") % 64)
  end)

  it("maps the file: a tensor lives without its table, and changes stay in memory", function()
    assert(sa.save(path "a.safetensors", {x = sa.ones {1000}, y = sa.zeros {3}}))
    local y = sa.load(path "a.safetensors").y
    local row = sa.load(path "a.safetensors").x:narrow(1, 10, 5)
    for _ = 1, 3 do collectgarbage() end
    y:fill(7)
    assert(sa.save(path "a.safetensors", {x = sa.zeros {5}}))
    assert.tensor.bitwise(y, sa.full({3}, 7))
    assert.tensor.bitwise(row, sa.ones {5})
    assert.same({0, 0, 0, 0, 0}, sa.load(path "a.safetensors").x:totable())
  end)

  it("gives a mapping back with its last tensor", function()
    local output = child.must_run(([[
local sa = require "safeattn"
local function mappings()
  collectgarbage() collectgarbage()
  local n = 0
  for line in io.lines "/proc/self/maps" do n = n + (line:find("a.safetensors", 1, true) and 1 or 0) end
  return n
end
local t = sa.load("%s", {name = "x"})
local view = t:narrow(1, 1, 2)
t = nil
io.write(mappings(), " ")
view = view:sum():item() and nil
io.write(mappings(), "\n")
]]):format(path "a.safetensors"))
    assert.equal("1 0\n", output)
  end)

  it("reads one tensor without the others", function()
    -- Only the pages of the wanted one are read: the file has a hole where the other would be, of 8 GiB.
    local size = 2 ^ 33
    local header = ('{"a":{"dtype":"U8","shape":[%.0f],"data_offsets":[0,%.0f]},"b":{"dtype":"I32","shape":[2],'
      .. '"data_offsets":[%.0f,%.0f]}}'):format(size, size, size, size + 8)
    header = header .. (" "):rep(-#header % 8)
    files.write(path "large.safetensors", file_with(header))
    local file = assert(io.open(path "large.safetensors", "r+b"))
    file:seek("set", 8 + #header + size)
    file:write(files.little(4, 5) .. files.little(4, 6))
    file:close()
    assert.same({5, 6}, sa.load(path "large.safetensors", {name = "b"}):totable())
    files.must_refuse(path "large.safetensors", 'has "a" in U8', {name = "a"})
    files.must_refuse(path "large.safetensors", 'has no tensor "c"', {name = "c"})
    os.remove(path "large.safetensors")
  end)

  it("reads elements that lie across their natural places", function()
    local header = '{"b":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]},'
      .. '"x":{"dtype":"I32","shape":[2],"data_offsets":[1,9]}}'
    files.write(path "odd.safetensors", file_with(header, "\2" .. files.little(4, 5) .. files.little(4, 6)))
    local got = assert(sa.load(path "odd.safetensors"))
    assert.same({5, 6}, got.x:totable())
    assert.tensor.bitwise(got.b, sa.tensor {true})
  end)

  it("refuses headers that lie", function()
    local function entry(name, dtype, shape, first, last)
      return ('"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}'):format(name, dtype, shape, first, last)
    end
    local data = ("x"):rep(16)
    local function header(...) return "{" .. table.concat({...}, ",") .. "}" end
    for _, case in ipairs {
      {header(entry("a", "F32", "[2]", 0, 8), entry("b", "F32", "[2]", 4, 12)), "an overlap"},
      {header(entry("a", "F32", "[2]", 0, 8), entry("b", "F32", "[2]", 0, 8)), "an overlap"},
      {header(entry("a", "F32", "[2]", 0, 8), entry("b", "F32", "[1]", 12, 16)), "a gap"},
      {header(entry("a", "F32", "[2]", 8, 16)), "a gap"},
      {header(entry("a", "F32", "[2]", 0, 8)), "holds 16 bytes of data, but its header says 8"},
      {header(entry("a", "F32", "[8]", 0, 32)), "holds 16 bytes of data, but its header says 32"},
      {header(entry("a", "F32", "[8]", 0, 16)), "takes 32 bytes, and gives it 16"},
      {header(entry("a", "F32", "[4]", 16, 0)), "not what it should"},
      {header(entry("a", "F32", "[4]", -16, 0)), "not what it should"},
      {header(entry("a", "F32", "[4]", 0, "16.5")), "not what it should"},
      {header(entry("a", "F32", "[4]", "18446744073709551600", "18446744073709551616")), "not what it should"},
      {header(entry("a", "F32", "[9223372036854775808]", 0, 16)), "wanted a count"},
      {header(entry("a", "F32", "[4611686018427387904,4]", 0, 16)), "wanted a count"},
      {header(entry("a", "F32", "[4503599627370496,4503599627370496]", 0, 16)), "too large for any memory"},
      {header(entry("a", "F32", "[1,1,1,1,1,1,1,1,4]", 0, 16)), "9 dims"},
      {header(entry("a", "F32", "[4,null]", 0, 16)), "wanted a count"},
      {header(entry("a", "F32", '["4"]', 0, 16)), "wanted a count"},
      {header(entry("a", "F32", '{"1":4}', 0, 16)), "not what it should"},
      {header(entry("a", "U8", "[16]", 0, 16)), 'has "a" in U8, wanted BF16, BOOL, F16, F32, F64, I32 or I64'},
      {header '"a":7', "not what it should"},
      {header(entry("a", "F32", "[4]", 0, 16), '"__metadata__":{"k":7}'), "metadata"},
      {header(entry("a", "F32", "[4]", 0, 16), '"__metadata__":[]'), "metadata"},
      {header(entry("a", "F32", "[4]", 0, 16)) .. "{}", "not JSON"},
      {"[1]", "no JSON object"},
      {"", "no JSON object"},
      {"{" .. '"a":' .. ("["):rep(1e6), "nested deeper than 8"},
      {"{" .. '"a":' .. ('{"a":'):rep(1e6), "nested deeper than 8"},
      {'{"a":"' .. ("["):rep(1e6), "not JSON"},
    } do
      files.must_refuse(files.write(path "lie.safetensors", file_with(case[1], data)), case[2])
    end
    for _, case in ipairs {
      {"abc", "wanted at least 8"}, {files.little(8, 3) .. "{}", "has a header of 3 bytes"},
      {("\255"):rep(8) .. "{}", "has a header of 18446744073709551616 bytes"},
    } do
      files.must_refuse(files.write(path "lie.safetensors", case[1]), case[2])
    end
  end)

  it("survives every cut and every changed byte", function()
    assert(sa.save(path "a.safetensors", {a = sa.arange(3), b = sa.zeros {2}}, {metadata = {k = "v"}}))
    assert.is_true(files.torture(path "bad.safetensors", files.read(path "a.safetensors")) > 200)
  end)

  it("raises for misuse", function()
    local t = sa.zeros {1}
    for message, call in pairs {
      ['safeattn.save: tensors: got the name "__metadata__", wanted UTF-8 other than __metadata__'] =
        function() sa.save(path "a.safetensors", {__metadata__ = t}) end,
      ['safeattn.save: tensors: got the name "\255", wanted UTF-8 other than __metadata__'] =
        function() sa.save(path "a.safetensors", {["\255"] = t}) end,
      ['safeattn.save: metadata: got 3, wanted a table of strings'] =
        function() sa.save(path "a.safetensors", {t = t}, {metadata = 3}) end,
      ['safeattn.save: metadata: got "epoch" = 7, wanted strings of UTF-8'] =
        function() sa.save(path "a.safetensors", {t = t}, {metadata = {epoch = 7}}) end,
    } do
      assert.equal(message, helper.message_of(call))
    end
  end)

  it("says when dkjson is not there", function()
    local output = child.must_run(([[
package.preload.dkjson = function() error "no such module" end
local sa = require "safeattn"
print(sa.load("%s"))
print(sa.save("%s", {t = sa.zeros {1}}))
]]):format(path "a.safetensors", path "b.safetensors"))
    assert.matches("a.safetensors: %.safetensors needs the Lua module dkjson.-b.safetensors: %.safetensors needs",
      output)
  end)

  it("is what the reference package reads and writes", function()
    local tensors = sample()
    assert(sa.save(path "a.safetensors", tensors, {metadata = {epoch = "7"}}))
    files.python(pending, "safetensors, numpy", (([=[
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
with safe_open('FOLDER/a.safetensors', 'numpy') as f:
  assert f.metadata() == {'epoch': '7'}, f.metadata()
  assert len(f.keys()) == 10, f.keys()
  assert f.get_tensor('i64').tolist() == [[0, 1, -1], [2 ** 53 + 2, -2 ** 63, 77]]
  assert f.get_tensor('bool').tolist() == [[True, False, False], [False, True, True]]
  assert f.get_tensor('f16')[0, 2] == 1.5 and f.get_tensor('empty').shape == (0, 3)
  assert f.get_slice('bf16').get_dtype() == 'BF16' and f.get_slice('bf16').get_shape() == [2, 3]
x = np.arange(12).reshape(3, 4)
save_file({'x': x, 'y': x.astype(np.float16), 'b': x > 5}, 'FOLDER/from.safetensors', {'a': 'b'})
]=]):gsub("FOLDER", folder)))
    local got, metadata = assert(sa.load(path "from.safetensors"))
    assert.same({a = "b"}, metadata)
    assert.tensor.bitwise(got.x, sa.arange(12, {dtype = "i64"}):view(3, 4))
    assert.tensor.bitwise(got.y, sa.arange(12, {dtype = "f16"}):view(3, 4))
    assert.tensor.bitwise(got.b, sa.arange(12):view(3, 4):gt(5))
  end)
end)
