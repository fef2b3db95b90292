-- .npy: round trips, the versions and orders that NumPy writes, broken and hostile files, atomic writes

local sa = require "safeattn"
local helper = require "spec.helper"
local child = require "spec.child"
local files = require "spec.files"

local folder
setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

local function path(name) return folder .. "/" .. name end

-- A file with a header of our choosing.
local function file_with(header, data, version)
  local length = files.little(version and version > 1 and 4 or 2, #header)
  return "\147NUMPY" .. string.char(version or 1, 0) .. length .. header .. (data or "")
end

local function header_of(descr, shape, fortran)
  return ("{'descr': '%s', 'fortran_order': %s, 'shape': %s, }\n"):format(descr, fortran and "True" or "False", shape)
end

local dtypes = {"f32", "f64", "f16", "bool", "i32", "i64"}

describe(".npy", function()
  it("gives back the bits of every dtype", function()
    for _, dtype in ipairs(dtypes) do
      local t = files.sample(dtype)
      assert.is_true(sa.save(path "a.npy", t))
      assert.tensor.bitwise(assert(sa.load(path "a.npy")), t)
    end
  end)

  it("gives back every shape, and views as what they show", function()
    for _, t in ipairs {
      sa.tensor(3), sa.zeros {0}, sa.zeros {2, 0, 3}, sa.arange(5), sa.rand {1, 2, 1, 2, 1, 2, 1, 2},
      sa.rand({4, 3}):transpose(1, 2), sa.rand({4, 6}):narrow(2, 2, 3), sa.rand({3, 1}):expand(3, 4),
    } do
      assert(sa.save(path "a.npy", t))
      assert.tensor.bitwise(assert(sa.load(path "a.npy")), t)
    end
  end)

  it("gives tensors of their own memory", function()
    assert(sa.save(path "a.npy", sa.zeros {3}))
    local t = sa.load(path "a.npy")
    t:fill(7)
    assert.tensor.bitwise(sa.load(path "a.npy"), sa.zeros {3})
  end)

  it("starts the elements at a multiple of 64", function()
    for rank = 0, 8 do
      local shape = {}
      for d = 1, rank do shape[d] = 1 end
      assert(sa.save(path "a.npy", sa.zeros(shape, {dtype = "f64"})))
      assert.equal(8, #files.read(path "a.npy") % 64)
    end
  end)

  it("reads versions 1 to 3", function()
    for version = 1, 3 do
      files.write(path "v.npy", file_with(header_of("<i4", "(2,)"), files.little(4, 5) .. files.little(4, 6), version))
      assert.same({5, 6}, sa.load(path "v.npy"):totable())
    end
  end)

  it("reads both orders and both ends", function()
    local data = ""
    for n = 1, 6 do data = data .. files.little(4, n) end
    files.write(path "c.npy", file_with(header_of("<i4", "(2, 3)"), data))
    files.write(path "f.npy", file_with(header_of("<i4", "(2, 3)", true), data))
    files.write(path "b.npy", file_with(header_of(">i4", "(2, 3)"), data:reverse()))
    assert.same({{1, 2, 3}, {4, 5, 6}}, sa.load(path "c.npy"):totable())
    assert.same({{1, 3, 5}, {2, 4, 6}}, sa.load(path "f.npy"):totable())
    assert.is_true(sa.load(path "f.npy"):is_contiguous())
    assert.same({{6, 5, 4}, {3, 2, 1}}, sa.load(path "b.npy"):totable())
  end)

  it("swaps the bytes of every size", function()
    for dtype, letter in pairs {f16 = "f2", f32 = "f4", f64 = "f8", i64 = "i8"} do
      local t = sa.arange(3, {dtype = dtype, start = 1})
      assert(sa.save(path "a.npy", t))
      local size = tonumber(letter:match("%d"))
      local data = files.read(path "a.npy"):sub(-3 * size)
      files.write(path "b.npy", file_with(header_of(">" .. letter, "(3,)"), data:reverse()))
      assert.same({3, 2, 1}, sa.load(path "b.npy"):totable())
    end
  end)

  it("makes bools of bytes that are neither 0 nor 1", function()
    files.write(path "b.npy", file_with(header_of("|b1", "(3,)"), "\0\255\2"))
    local t = sa.load(path "b.npy")
    assert.tensor.bitwise(t, sa.tensor {false, true, true})
  end)

  it("refuses what is no file", function()
    files.must_refuse(path "absent.npy", "cannot be opened: No such file or directory")
    child.command("mkdir " .. path "folder.npy")
    files.must_refuse(path "folder.npy", "cannot be read: Is a directory")
    child.command("mkfifo " .. path "pipe.npy")
    files.must_refuse(path "pipe.npy", "cannot be read")
    files.must_refuse(files.write(path "empty.npy", ""), "is empty")
    files.must_refuse(files.write(path "text.npy", "hello, here is a text"), "does not start with NumPy's mark")
  end)

  it("refuses headers that lie", function()
    for _, case in ipairs {
      {file_with(header_of("<f4", "(3,)"), ("x"):rep(8)), "holds 8 bytes of elements"},
      {file_with(header_of("<f4", "(1,)"), ("x"):rep(8)), "holds 8 bytes of elements"},
      {file_with(header_of("<f4", "(9223372036854775808,)")), "wanted a count"},
      {file_with(header_of("<f4", "(4611686018427387904, 4)")), "wanted a count"},
      {file_with(header_of("<f8", "(4503599627370496, 4503599627370496)")), "too large for any memory"},
      {file_with(header_of("<f8", "(0, 4503599627370496, 4503599627370496)")), "too large for any memory"},
      {file_with(header_of("<f8", "(1125899906842624,)")), "holds 0 bytes"},
      {file_with(header_of("<f4", "(" .. ("1,"):rep(9) .. ")"), "abcd"), "9 dims, wanted at most 8"},
      {file_with(header_of("<f4", "(-1,)")), "not NumPy's"},
      {file_with(header_of("<f4", "(1 2,)"), ("x"):rep(8)), "wanted counts"},
      {file_with(header_of("<c8", "(1,)"), ("x"):rep(8)), 'type "<c8"'},
      {file_with(header_of("|O", "(1,)"), ("x"):rep(8)), 'type "|O"'},
      {file_with(header_of("<f4", "(1,)"):gsub("False", "Maybe"), "abcd"), "not NumPy's"},
      {file_with("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", "abcd"), "records"},
      {file_with("{'fortran_order': False, 'shape': (1,), }", "abcd"), "not NumPy's"},
      {file_with("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", "abcd"), "not NumPy's"},
      {file_with("__import__('os').system('true')", "abcd"), "not NumPy's"},
      {file_with((" "):rep(70000) .. header_of("<f4", "(1,)"), "abcd", 2), "wanted at most 65536"},
      {file_with(header_of("<f4", "(1,)"), "abcd", 4), "version 4"},
      {"\147NUMPY\2\0\255\255\255\255{}", "cut short"},
    } do
      files.must_refuse(files.write(path "lie.npy", case[1]), case[2])
    end
  end)

  it("refuses what memory cannot hold", function()
    local header = file_with(header_of("<f8", "(8796093022208,)"))
    child.command(("truncate -s %.0f %s"):format(#header + 2 ^ 46, path "huge.npy"))
    local file = io.open(path "huge.npy", "r+b")
    local size = file and file:seek("end")
    if file then file:close() end
    if size == #header + 2 ^ 46 then
      file = io.open(path "huge.npy", "r+b")
      file:write(header)
      file:close()
    else -- the file system has no files so large
      files.write(path "huge.npy", header)
    end
    local result, problem = sa.load(path "huge.npy")
    assert.is_nil(result)
    assert.is_string(problem)
    os.remove(path "huge.npy")
  end)

  it("survives every cut and every changed byte", function()
    assert(sa.save(path "good.npy", sa.arange(6, {dtype = "i32"}):view(2, 3)))
    assert.is_true(files.torture(path "bad.npy", files.read(path "good.npy")) > 200)
  end)

  it("is what NumPy reads and writes", function()
    assert(sa.save(path "half.npy", files.sample "f16"))
    files.python(pending, "numpy", (([=[
import numpy as np
t = np.load('FOLDER/half.npy')
assert t.dtype == np.float16 and t.shape == (2, 3) and t[0, 2] == 1.5 and np.isinf(t[1, 0]) and np.isnan(t[1, 2]), t
for name in 'f4 f8 f2 b1 i4 i8'.split():
  for end in '<>':
    x = np.arange(24).reshape(2, 3, 4).astype(end + name)
    np.save('FOLDER/%s_%s_c.npy' % (name, end == '<'), x)
    np.save('FOLDER/%s_%s_f.npy' % (name, end == '<'), np.asfortranarray(x))
]=]):gsub("FOLDER", folder)))
    for dtype, name in pairs {f32 = "f4", f64 = "f8", f16 = "f2", bool = "b1", i32 = "i4", i64 = "i8"} do
      local want = sa.arange(24, {dtype = "f64"}):view(2, 3, 4):to(dtype)
      for _, kind in ipairs {"True_c", "True_f", "False_c", "False_f"} do
        assert.tensor.bitwise(assert(sa.load(path(name .. "_" .. kind .. ".npy"))), want)
      end
    end
  end)
end)

describe("saving", function()
  it("replaces a file whole or not at all", function()
    local place = path "whole"
    child.command("mkdir " .. place)
    assert(sa.save(place .. "/a.npy", sa.zeros {3}))
    assert(sa.save(place .. "/a.npy", sa.ones {4}))
    assert.tensor.bitwise(sa.load(place .. "/a.npy"), sa.ones {4})
    assert.equal("a.npy", files.names(place))
    child.command("mkdir -p " .. place .. "/b.npy/c")
    local saved, problem = sa.save(place .. "/b.npy", sa.zeros {3})
    assert.is_nil(saved)
    assert.matches("cannot be replaced", problem, 1, true)
    assert.equal("a.npy b.npy", files.names(place))
  end)

  it("leaves the old file when the disk is full", function()
    -- A limit on the size of files stands for the disk; the signal that comes with it is ignored by the shell's child.
    assert(sa.save(path "full.npy", sa.ones {2}))
    local output = child.run(([[
local sa = require "safeattn"
print(sa.save("%s", sa.zeros {100000}))
]]):format(path "full.npy"), {before = "trap '' XFSZ; ulimit -f 8"})
    assert.matches("nil\t[^\n]*full.npy: cannot be written: File too large", output)
    assert.tensor.bitwise(sa.load(path "full.npy"), sa.ones {2})
    assert.not_matches("tmp", files.names(folder))
  end)

  it("says what the environment lacks", function()
    local saved, problem = sa.save(path "no/such/folder.npy", sa.zeros {1})
    assert.is_nil(saved)
    assert.matches("folder.npy: cannot be created: No such file or directory", problem, 1, true)
  end)

  it("raises for misuse", function()
    local t = sa.zeros {2}
    for message, call in pairs {
      ['safeattn.save: path: got 3, wanted the name of a file'] = function() sa.save(3, t) end,
      ['safeattn.save: path: got "a.txt", wanted a name that ends in .npy, .npz or .safetensors'] =
        function() sa.save("a.txt", t) end,
      ['safeattn.save: tensors: got a table, wanted a tensor'] = function() sa.save("a.npy", {t}) end,
      ['safeattn.save: tensors: got f32[2], wanted a table of named tensors (.npy holds a single one)'] =
        function() sa.save("a.npz", t) end,
      ['safeattn.save: tensors: got the name 1, wanted a string'] = function() sa.save("a.npz", {t}) end,
      ['safeattn.save: tensors.x: got 3, wanted a tensor'] = function() sa.save("a.npz", {x = 3}) end,
      ['safeattn.save: tensors: got bf16[2], which NumPy has no dtype for, wanted bool, f16, f32, f64, i32 or i64'
        .. ' (.safetensors keeps bf16)'] = function() sa.save("a.npy", t:to("bf16")) end,
      ['safeattn.save: metadata: got a table for .npy, wanted it for .safetensors'] =
        function() sa.save("a.npy", t, {metadata = {}}) end,
      ['safeattn.save: compress: got true for .npy, wanted it for .npz'] =
        function() sa.save("a.npy", t, {compress = true}) end,
      ['safeattn.load: path: got nil, wanted the name of a file'] = function() sa.load() end,
      ['safeattn.load: name: got "x", wanted none: .npy holds a single tensor'] =
        function() sa.load("a.npy", {name = "x"}) end,
      ['safeattn.load: name: got 3, wanted a string'] = function() sa.load("a.npz", {name = 3}) end,
    } do
      assert.equal(message, helper.message_of(call))
    end
    t:free()
    assert.equal("safeattn.save: tensors: got a tensor that was freed, wanted one that lives",
      helper.message_of(sa.save, "a.npy", t))
  end)
end)
