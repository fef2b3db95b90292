-- .npz: round trips, stored and deflated members, broken and hostile archives

local sa = require "safeattn"
local helper = require "spec.helper"
local files = require "spec.files"

local folder
setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

local function path(name) return folder .. "/" .. name end

local function sample()
  local tensors = {scalar = sa.tensor(2.5), empty = sa.zeros {0, 3}}
  tensors["layer.1/weight"] = sa.randn({30, 40}, {seed = 1})
  for _, dtype in ipairs {"f32", "f64", "f16", "bool", "i32", "i64"} do tensors[dtype] = files.sample(dtype) end
  return tensors
end

local function count(tensors)
  local n = 0
  for _ in pairs(tensors) do n = n + 1 end
  return n
end

-- An archive of our choosing: members {name =, data =, and what to claim instead of the truth}.
local function archive(members)
  local little = files.little
  local body, directory = "", ""
  for _, m in ipairs(members) do
    local offset = m.offset or #body
    local function described()
      return little(2, 20) .. little(2, m.flags or 0) .. little(2, m.method or 0) .. little(4, 0)
        .. little(4, m.crc or 0) .. little(4, m.packed or #m.data) .. little(4, m.size or #m.data)
        .. little(2, #m.name) .. little(2, 0)
    end
    body = body .. "PK\3\4" .. described() .. m.name .. m.data
    directory = directory .. "PK\1\2" .. little(2, 20) .. described() .. little(10, 0) .. little(4, offset) .. m.name
  end
  return body .. directory .. "PK\5\6" .. little(4, 0) .. little(2, members.count or #members)
    .. little(2, members.count or #members) .. little(4, #directory) .. little(4, members.start or #body)
    .. little(2, 0)
end

describe(".npz", function()
  it("gives back all tensors, stored and deflated", function()
    local tensors = sample()
    local sizes = {}
    for _, compress in ipairs {false, true} do
      tensors.zeros = sa.zeros {5000}
      assert(sa.save(path "a.npz", tensors, {compress = compress}))
      sizes[compress] = #files.read(path "a.npz")
      local got = assert(sa.load(path "a.npz"))
      assert.equal(count(tensors), count(got))
      for name, t in pairs(tensors) do assert.tensor.bitwise(got[name], t) end
    end
    assert.is_true(sizes[true] < sizes[false] - 19000)
  end)

  it("gives back one tensor by its name", function()
    local tensors = sample()
    assert(sa.save(path "a.npz", tensors))
    assert.tensor.bitwise(sa.load(path "a.npz", {name = "f16"}), tensors.f16)
    files.must_refuse(path "a.npz", 'has no tensor "f17"', {name = "f17"})
  end)

  it("keeps an empty table", function()
    assert(sa.save(path "a.npz", {}))
    assert.same({}, sa.load(path "a.npz"))
  end)

  it("deflates more than a chunk of output", function()
    local t = sa.rand({700000}, {seed = 3})
    assert(sa.save(path "a.npz", {t = t}, {compress = true}))
    assert.tensor.bitwise(sa.load(path "a.npz").t, t)
  end)

  it("writes the same bytes for the same tensors", function()
    assert(sa.save(path "a.npz", sample()))
    assert(sa.save(path "b.npz", sample()))
    assert.equal(files.read(path "a.npz"), files.read(path "b.npz"))
  end)

  it("refuses archives that lie", function()
    assert(sa.save(path "x.npy", sa.zeros {100}))
    local data = files.read(path "x.npy")
    for _, case in ipairs {
      {archive {{name = "x.npy", data = data}}, "checksum"},
      {archive {{name = "x.npy", data = data, size = 10}}, "claims 10"},
      {archive {{name = "x.npy", data = data, packed = 9999, size = 9999}}, "outside of the file"},
      {archive {{name = "x.npy", data = data, offset = 9999}}, "outside of the file"},
      {archive {{name = "x.npy", data = data, method = 12}}, "method 12"},
      {archive {{name = "x.npy", data = data, flags = 1}}, "encrypted"},
      {archive {{name = "x.npy", data = data, size = 2 ^ 32 - 1}}, "ZIP64"},
      {archive {{name = "x.npy", data = data}, count = 65535}, "ZIP64"},
      {archive {{name = "x.npy", data = data}, count = 2}, "broken directory"},
      {archive {{name = "x.npy", data = data}, start = 2 ^ 31}, "outside of the file"},
      {archive {{name = "x.npy", data = data}, {name = "y.npy", data = data, offset = 0}}, "overlapping"},
      {archive {{name = "x.npy", data = data}, {name = "y.npy", data = "", offset = 0}}, "overlapping"},
      {archive {{name = "x.npy", data = "abc", method = 8, size = 2 ^ 31}}, "claims to inflate"},
      {archive {{name = "x.npy", data = ("\7"):rep(100), method = 8, size = 500}}, "compressed data that is broken"},
      {archive {{name = "x.npy", data = "\3\0", method = 8, size = 500}}, "ends too early"},
      {archive {{name = "x.txt", data = "hello, here is a text"}}, "NumPy's mark"},
      {archive {{name = "x.npy", data = data}} .. "x", "no .npz, or cut short"},
    } do
      files.must_refuse(files.write(path "lie.npz", case[1]), case[2])
    end
  end)

  it("compares sizes before it inflates a bomb", function()
    -- A member that inflates to 16 MiB, while its header says 4 bytes: nothing behind the header is inflated.
    assert(sa.save(path "a.npz", {bomb = sa.zeros {2 ^ 22}}, {compress = true}))
    local text = files.read(path "a.npz")
    local name = "bomb.npy"
    local directory = text:find("PK\1\2", 1, true)
    local size = files.little(4, 2 ^ 24 + 128)
    assert.equal(size, text:sub(directory + 24, directory + 27))
    files.write(path "lie.npz", text:sub(1, directory + 23) .. files.little(4, 132) .. text:sub(directory + 28))
    files.must_refuse(path "lie.npz", 'member "' .. name .. '": holds 4 bytes of elements')
    -- One that says the truth of another size inflates no more than it says.
    assert(sa.save(path "b.npz", {bomb = sa.zeros {1}}, {compress = true}))
    local small = files.read(path "b.npz")
    local from = small:find("PK\1\2", 1, true)
    files.write(path "lie.npz", small:sub(1, from + 23) .. files.little(4, 60000) .. small:sub(from + 28))
    files.must_refuse(path "lie.npz", "holds 59872 bytes of elements")
  end)

  it("notices every changed byte of the elements", function()
    assert(sa.save(path "a.npz", {t = sa.rand({64}, {seed = 1})}))
    local text = files.read(path "a.npz")
    for place = 200, 300, 7 do
      files.write(path "lie.npz", text:sub(1, place - 1) .. string.char((text:byte(place) + 1) % 256)
        .. text:sub(place + 1))
      files.must_refuse(path "lie.npz", "checksum")
    end
  end)

  it("survives every cut and every changed byte", function()
    for _, compress in ipairs {false, true} do
      assert(sa.save(path "a.npz", {a = sa.arange(3), b = sa.zeros {2}}, {compress = compress}))
      assert.is_true(files.torture(path "bad.npz", files.read(path "a.npz")) > 200)
    end
  end)

  it("raises for misuse", function()
    assert.equal("safeattn.save: tensors.w: got bf16[2], which NumPy has no dtype for, wanted bool, f16, f32, f64, i32"
      .. " or i64 (.safetensors keeps bf16)",
      helper.message_of(sa.save, path "a.npz", {w = sa.zeros({2}, {dtype = "bf16"})}))
    local large = sa.zeros({1}):expand(2 ^ 30)
    assert.matches("wanted less than 65535 and 4 GiB in an .npz",
      helper.message_of(sa.save, path "a.npz", {large = large}), 1, true)
  end)

  it("says when zlib is not there", function()
    local child = require "spec.child"
    assert(sa.save(path "a.npz", {t = sa.zeros {1}}))
    local output = child.must_run(([[
local ffi = require "ffi"
local sa = require "safeattn"
local load = ffi.load
ffi.load = function(name, ...) if name:find "libz" then error "no such library" end return load(name, ...) end
print(sa.load("%s"))
print(sa.save("%s", {t = sa.zeros {1}}))
]]):format(path "a.npz", path "b.npz"))
    assert.matches("a.npz: [^\n]*needs zlib.-b.npz: %.npz needs zlib", output)
  end)

  it("may be unloaded together with a stream that was given up", function()
    local output = require "spec.child".must_run [[
local zlib = require "safeattn.files.zlib"
local broken = ("x"):rep(64)
assert(not pcall(zlib.inflater(broken, #broken), require "ffi".new "uint8_t[100]", 100))
zlib, package.loaded["safeattn.files.zlib"] = nil, nil
for _ = 1, 3 do collectgarbage() end
print "alive"
]]
    assert.equal("alive\n", output)
  end)

  it("is what NumPy reads and writes", function()
    local tensors = sample()
    assert(sa.save(path "stored.npz", tensors))
    assert(sa.save(path "deflated.npz", tensors, {compress = true}))
    files.python(pending, "numpy", (([=[
import numpy as np
for name in ('stored', 'deflated'):
  z = np.load('FOLDER/%s.npz' % name)
  assert len(z.files) == 9, z.files
  assert z['scalar'] == 2.5 and z['empty'].shape == (0, 3) and z['layer.1/weight'].shape == (30, 40)
  assert z['i64'].tolist() == [[0, 1, -1], [2 ** 53 + 2, -2 ** 63, 77]], z['i64']
  assert z['bool'].tolist() == [[True, False, False], [False, True, True]]
x = np.arange(12).reshape(3, 4)
np.savez('FOLDER/from.npz', x=x, y=np.asfortranarray(x.astype('>f4')))
np.savez_compressed('FOLDER/packed.npz', x=x, y=np.asfortranarray(x.astype('>f4')))
]=]):gsub("FOLDER", folder)))
    for _, name in ipairs {"from.npz", "packed.npz"} do
      local got = assert(sa.load(path(name)))
      assert.tensor.bitwise(got.x, sa.arange(12, {dtype = "i64"}):view(3, 4))
      assert.tensor.bitwise(got.y, sa.arange(12):view(3, 4))
    end
  end)
end)
