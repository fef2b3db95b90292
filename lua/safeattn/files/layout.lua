--- what all formats share: elements of a shape counted without overflow, tensors made or refused, bytes of a tensor

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"
local disk = require "safeattn.files.disk"

local ffi, lib = core.ffi, core.lib
local refuse = disk.refuse

local layout = {}

--- Bytes of an element of each dtype, by name.
layout.sizes = {}
for name, code in pairs(core.dtypes) do layout.sizes[name] = tonumber(lib.sa_dtype_size(code)) end

--- "[2,3]"
function layout.shape_text(shape)
  local texts = {}
  for d, size in ipairs(shape) do texts[d] = string.format("%.0f", size) end
  return "[" .. table.concat(texts, ",") .. "]"
end

--- How many bytes a tensor takes; refuses shapes that no tensor has.
-- @param shape a list of numbers that a file claims
-- @param dtype its name
function layout.bytes(shape, dtype)
  if #shape > lib.SA_MAX_DIMS then
    refuse("claims a tensor of %d dims, wanted at most %d", #shape, tonumber(lib.SA_MAX_DIMS))
  end
  local count, empty = 1, false
  for _, size in ipairs(shape) do
    if not core.is_count(size) then refuse("claims a size of %s, wanted a count", core.describe(size)) end
    -- Sizes beside a 0 must be possible too: strides are made of them.
    empty = empty or size == 0
    count = count * math.max(size, 1)
  end
  if count * layout.sizes[dtype] > 2 ^ 53 then
    refuse("claims the shape %s, which is too large for any memory", layout.shape_text(shape))
  end
  return empty and 0 or count * layout.sizes[dtype]
end

--- A tensor with unset memory, or a refusal when there is not so much memory.
function layout.new(shape, dtype)
  local sizes = ffi.new("int64_t[8]", shape)
  local handle = tensor.handle()
  if lib.sa_tensor_new(handle, core.dtypes[dtype], lib.SA_CPU, #shape, sizes) ~= 0 then
    refuse("%s", core.last_error())
  end
  return tensor.adopt(handle)
end

--- What a file keeps of a tensor: row-major on the CPU. Hold the result while the pointer is used.
-- @return a tensor, its first byte, how many bytes
function layout.flat(t)
  local flat = t:detach():to("cpu"):contiguous()
  return flat, ffi.cast("const uint8_t *", flat.handle.data), flat:numel() * layout.sizes[flat.dtype]
end

--- Writes the elements of a tensor.
-- @return what holds their memory, so that it lives while it is written
function layout.write(write, t)
  local flat, bytes, count = layout.flat(t)
  write(bytes, count)
  return flat
end

--- Makes bytes that came from a file true or false: a bool that is neither has no meaning in C.
function layout.make_booleans(bytes, count)
  bytes = ffi.cast("uint8_t *", bytes)
  for n = 0, count - 1 do
    if bytes[n] > 1 then bytes[n] = 1 end
  end
end

--- The names of a table in order.
function layout.names(tensors)
  local names = {}
  for name in pairs(tensors) do names[#names + 1] = name end
  table.sort(names)
  return names
end

return layout
