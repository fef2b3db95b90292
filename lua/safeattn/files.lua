--- Tensors in files: .npy and .npz, as NumPy reads and writes them, and .safetensors.
-- Files are replaced whole: a reader sees the old one or the new one, and a write that fails leaves the old one.
-- @module safeattn.files

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local disk = require "safeattn.files.disk"

local fail = core.fail

local files = {}

local extensions = {npy = true, npz = true, safetensors = true}

local function format_of(fname, path)
  if type(path) ~= "string" or path:find("%z") then
    fail(fname, "path: got %s, wanted the name of a file", core.describe(path))
  end
  local extension = path:match("%.(%w+)$")
  if not extensions[extension] then
    fail(fname, "path: got %s, wanted a name that ends in .npy, .npz or .safetensors", core.describe(path))
  end
  return require("safeattn.files." .. extension), "." .. extension
end

local function check_named(tensors)
  if type(tensors) ~= "table" or tensor.is(tensors) then
    fail("save", "tensors: got %s, wanted a table of named tensors (.npy holds a single one)",
      core.describe(tensors))
  end
  for name, t in pairs(tensors) do
    if type(name) ~= "string" or name == "" or name:find("%z") then
      fail("save", "tensors: got the name %s, wanted a string", core.describe(name))
    end
    tensor.pointer(t, "save", "tensors." .. name)
  end
end

local save_options = {metadata = true, compress = true}

--- Writes a tensor (.npy) or a table of named tensors (.npz, .safetensors). The name of the file says which.
-- Tensors on a GPU are copied; gradients and the tape are not kept. A symbolic link is replaced, not followed.
-- @param path name of a file; the folder must exist
-- @param tensors a tensor, or {name = tensor, ...}; bf16 only in .safetensors
-- @param options metadata: {name = text, ...}, kept in .safetensors; compress (false): deflate an .npz
-- @return true; nil and a message when the file cannot be written
function files.save(path, tensors, options)
  local format, extension = format_of("save", path)
  options = core.options("save", options, save_options)
  local compress = core.boolean("save", "compress", options.compress, false)
  if compress and extension ~= ".npz" then
    fail("save", "compress: got true for %s, wanted it for .npz", extension)
  end
  if options.metadata ~= nil and not format.holds_metadata then
    fail("save", "metadata: got %s for %s, wanted it for .safetensors", core.describe(options.metadata),
      extension)
  end
  if format.holds_one then
    tensor.pointer(tensors, "save", "tensors")
  else
    check_named(tensors)
  end
  format.check("save", "tensors", tensors, options)
  return disk.attempt(path, function()
    format.save(path, tensors, options)
    return true
  end)
end

local load_options = {name = true}

--- Reads what `save`, NumPy or the safetensors package wrote.
-- Tensors of a .safetensors lie on the mapped file: they are read when they are used, changing them does not change
-- the file, and the file must not be cut short while they live (save replaces files and is harmless).
-- @param path name of a file
-- @param options name: the one tensor wanted of an .npz or .safetensors; the others are not read
-- @return a tensor (.npy, or with a name), or a table of tensors; and the metadata of a .safetensors, if it has any.
--   nil and a message when the file is not there, broken, or without the tensor
function files.load(path, options)
  local format, extension = format_of("load", path)
  options = core.options("load", options, load_options)
  local name = options.name
  if name ~= nil and (type(name) ~= "string" or format.holds_one) then
    fail("load", "name: got %s, wanted %s", core.describe(name),
      format.holds_one and "none: " .. extension .. " holds a single tensor" or "a string")
  end
  return disk.attempt(path, function()
    local found, metadata = format.load(path, name)
    if name == nil then return found, metadata end
    return found[name] or disk.refuse("has no tensor %s", core.describe(name)), metadata
  end)
end

return files
