--- the tensor: a Lua table that owns a handle of the C library, its fields and its lifetime

local core = require "safeattn.core"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call

local tensor = {}

-- What `t.name` finds: methods as they are, fields computed. Modules of the library add methods here.
local methods, fields = {}, {}
tensor.methods = methods

local Tensor = {}

-- Memory

-- LuaJIT's collector sees a handle of 160 bytes where C holds megabytes, so it would let garbage pile up. Past this
-- many bytes a collection is forced; the next one comes when what is left has grown by the factor.
local LEAST_LIMIT, GROWTH = 256 * 2 ^ 20, 1.4
local limit = LEAST_LIMIT
-- Of the devices: more by far, for the memory of one GPU may be full of tensors that live.
local LEAST_DEVICE_LIMIT = 8 * 2 ^ 30
local device_limit = LEAST_DEVICE_LIMIT
local memory_use = ffi.new("sa_memory_use")

local function held_bytes()
  lib.sa_memory(memory_use)
  return tonumber(memory_use.bytes) + tonumber(memory_use.internal_bytes)
end

local function collect_past_limit()
  if held_bytes() <= limit and tonumber(lib.sa_device_bytes()) <= device_limit then return end
  collectgarbage()
  limit = math.max(LEAST_LIMIT, GROWTH * held_bytes())
  device_limit = math.max(LEAST_DEVICE_LIMIT, GROWTH * tonumber(lib.sa_device_bytes()))
end

-- Who holds a block is told by its handle. A finaliser on each handle would cost as much as all else about a small
-- tensor (0.3 us), and whatever trace is recorded while one runs is given up. So handles stand in a weak table, what
-- they hold in an array beside it, and the finaliser of one object per collection gives back what has lost its handle.
local holders = setmetatable({}, {__mode = "v"})
local block_array = ffi.typeof "sa_block *[?]"
local room = 256
local blocks = block_array(room) -- [0] is not used
local slots = 0                  -- 1 .. slots are in use, or spare
local spare, spares = {}, 0      -- the lowest last
local watched = false            -- whether an object waits for the next collection
local Watch = ffi.typeof "char[1]"
local watch
-- The handle that is about to get its slot, at [1]: a debugger's hook may collect between any two instructions. Weak,
-- so that a hook which raises an error there stops nothing for good.
local taking = setmetatable({}, {__mode = "v"})

-- Gives back the blocks of first .. last.
local function give_back(first, last)
  if first <= last then lib.sa_blocks_release(blocks + first, last - first + 1) end
end

local function sweep()
  if taking[1] then return watch() end
  local highest, last = 0, slots
  spares = 0
  for slot = slots, 1, -1 do
    if holders[slot] then
      give_back(slot + 1, last)
      last = slot - 1
      if highest == 0 then highest = slot end
    elseif highest > 0 then
      spares = spares + 1
      spare[spares] = slot
    end
  end
  give_back(1, last)
  slots, watched = highest, false
  -- With nothing left to watch, these modules themselves may go.
  if slots > 0 then watch() end
end

function watch()
  watched = true
  ffi.gc(Watch(), sweep)
end

-- Goes with the Lua state, or with these modules.
local closing = ffi.gc(Watch(), function() give_back(1, slots) end)

local function more_slots()
  local wanted = math.max(2 * slots, 128)
  if wanted >= room then
    local larger = block_array(2 * wanted)
    ffi.copy(larger, blocks, room * ffi.sizeof "void *")
    blocks, room = larger, 2 * wanted
  end
  for slot = wanted, slots + 1, -1 do
    spares = spares + 1
    spare[spares] = slot
  end
  slots = wanted
  if not watched and closing then watch() end
end

local function slot_for(handle)
  taking[1] = handle
  if spares == 0 then more_slots() end
  local slot = spare[spares]
  spares = spares - 1
  -- In this order: reading `block` makes a cdata, at which the collector may run and look for slots without holders.
  holders[slot] = handle
  blocks[slot] = handle.block
  taking[1] = nil
  return slot
end

-- Calls that end a function stand in parentheses here: tail calls count as turns of a loop, and LuaJIT gives up a trace
-- that has more than a few.

--- An empty `sa_tensor` for C to fill.
tensor.descriptor = ffi.typeof "sa_tensor"
local descriptor = tensor.descriptor

--- The same, where C is about to allocate: garbage that holds much memory is collected first.
function tensor.handle()
  collect_past_limit()
  return (descriptor())
end

--- Makes a Lua tensor of a filled handle, which from now on gives its memory back when it is garbage.
-- @param handle
-- @param storage what tensors on the same memory share (see tensor.storage); nil for memory of its own
function tensor.adopt(handle, storage)
  return (setmetatable({
    handle = handle,     -- false once freed
    slot = slot_for(handle),
    storage = storage or false,
    node = false,        -- the tape's record of what made this tensor
    output = 0,          -- which output of it
    tracked = false,     -- a leaf whose gradient is wanted
    gradient = false,
    sink = false,        -- what stands for this leaf on the tape
  }, Tensor))
end
local adopt = tensor.adopt

--- What all tensors on one memory share: how often it was changed in place; of borrowed memory the owner, and whether
-- it is constant.
function tensor.storage(t)
  local storage = t.storage
  if not storage then
    storage = {version = 0, owner = nil, constant = false}
    t.storage = storage
  end
  return storage
end

function tensor.is(x)
  return getmetatable(x) == Tensor
end

--- The handle of a tensor that an argument must be.
function tensor.pointer(x, fname, argument)
  if getmetatable(x) ~= Tensor then
    fail(fname, "%s: got %s, wanted a tensor", argument, core.describe(x))
  end
  return x.handle or fail(fname, "%s: got a tensor that was freed, wanted one that lives", argument)
end
local pointer = tensor.pointer

--- A tensor with unset memory. shape: int64_t[ndim].
function tensor.new(fname, dtype, device, ndim, shape)
  local handle = tensor.handle()
  call(fname, lib.sa_tensor_new, handle, dtype, device, ndim, shape)
  return adopt(handle)
end

--- A tensor with unset memory and the shape, dtype and device of another.
function tensor.like(fname, t)
  local handle = pointer(t, fname, "t")
  return tensor.new(fname, handle.dtype, handle.device, handle.ndim, handle.shape)
end

--- Gives the memory back now instead of at some collection. Views of it stay valid; any later use of this tensor is an
-- error.
function methods.free(t)
  local handle = pointer(t, "free", "t")
  lib.sa_tensor_release(handle)
  blocks[t.slot] = nil
  t.handle, t.storage, t.node, t.gradient, t.sink = false, false, false, false, false
end

-- Fields

local function list(numbers, n)
  local result = {}
  for i = 1, n do result[i] = tonumber(numbers[i - 1]) end
  return result
end

function fields.shape(t)
  local handle = pointer(t, "shape", "t")
  return list(handle.shape, handle.ndim)
end

function fields.dtype(t)
  return core.dtype_names[pointer(t, "dtype", "t").dtype]
end

function fields.device(t)
  return core.device_name(pointer(t, "device", "t").device)
end

function fields.grad(t)
  return t.gradient or nil
end

function fields.requires_grad(t)
  return t.tracked or t.node ~= false
end

local assignable = {}

function assignable.requires_grad(t, value)
  local handle = pointer(t, "requires_grad", "t")
  if type(value) ~= "boolean" then
    fail("requires_grad", "value: got %s, wanted true or false", core.describe(value))
  end
  if t.node then
    fail("requires_grad", "t: got the result of %s, wanted a leaf (t:detach() makes one)", t.node.name)
  end
  if value and not core.is_float[handle.dtype] then
    fail("requires_grad", "t: got %s, wanted f32, f64, f16 or bf16", core.describe(t))
  end
  t.tracked = value
end

function assignable.grad(t, value)
  local handle = pointer(t, "grad", "t")
  if value == nil then
    t.gradient = false
    return
  end
  if not tensor.alike(handle, pointer(value, "grad", "value")) then
    fail("grad", "value: got %s, wanted %s", tensor.describe_both(value, t))
  end
  t.gradient = value
end

--- Whether two handles agree in shape, dtype and device.
function tensor.alike(a, b)
  if a.dtype ~= b.dtype or a.device ~= b.device or a.ndim ~= b.ndim then return false end
  for i = 0, a.ndim - 1 do
    if a.shape[i] ~= b.shape[i] then return false end
  end
  return true
end

function Tensor.__index(t, name)
  local method = methods[name]
  if method then return method end
  local field = fields[name]
  if field then return field(t) end
  local known = {}
  for k in pairs(methods) do known[k] = true end
  for k in pairs(fields) do known[k] = true end
  local meant = type(name) == "string" and core.nearest(name, known)
  fail("tensor", "got unknown field or method %s%s", core.describe(name),
    meant and ", did you mean " .. meant .. "?" or "")
end

function Tensor.__newindex(t, name, value)
  local assign = assignable[name]
  if not assign then
    fail("tensor", "got an assignment to %s, wanted one to grad or requires_grad", core.describe(name))
  end
  assign(t, value)
end

--- "f32[2,8,128,64]", for messages and print.
-- @param t a tensor
-- @param located whether the CPU is named too, as other devices are
function Tensor.__describe(t, located)
  local handle = t.handle
  if not handle then return "a tensor that was freed" end
  local name = core.dtype_names[handle.dtype] .. "[" .. table.concat(list(handle.shape, handle.ndim), ",") .. "]"
  if handle.device == lib.SA_CPU and not located then return name end
  return name .. " on " .. core.device_name(handle.device)
end

--- Two tensors of which a message says that one came where one like the other was wanted. It names both devices when
-- they differ.
function tensor.describe_both(came, wanted)
  local apart = came.handle.device ~= wanted.handle.device
  return Tensor.__describe(came, apart), Tensor.__describe(wanted, apart)
end

-- Print and arithmetic are other modules' work: they fill in what the metatable wants.
tensor.metatable = Tensor

-- Sizes

--- The number of dims.
function methods.dim(t)
  return pointer(t, "dim", "t").ndim
end

--- The size of a dim, or a list of all sizes.
function methods.size(t, dim)
  local handle = pointer(t, "size", "t")
  if dim == nil then return list(handle.shape, handle.ndim) end
  return tonumber(handle.shape[core.dim("size", "dim", dim, handle.ndim)])
end

--- How many elements apart neighbours of a dim lie, or a list for all dims.
function methods.stride(t, dim)
  local handle = pointer(t, "stride", "t")
  if dim == nil then return list(handle.stride, handle.ndim) end
  return tonumber(handle.stride[core.dim("stride", "dim", dim, handle.ndim)])
end

--- The number of elements.
function methods.numel(t)
  return tonumber(lib.sa_tensor_numel(pointer(t, "numel", "t")))
end

--- Whether the elements lie in row-major order without gaps.
function methods.is_contiguous(t)
  return lib.sa_tensor_contiguous(pointer(t, "is_contiguous", "t"))
end

local element_pointers = {}
for name, element in pairs {
  f32 = "float *", f64 = "double *", f16 = "uint16_t *", bf16 = "uint16_t *", bool = "bool *", i32 = "int32_t *",
  i64 = "int64_t *",
} do
  element_pointers[tonumber(core.dtypes[name])] = ffi.typeof(element)
end

--- A typed pointer to the first element (uint16_t * for the half types). It does not keep the memory: hold the tensor
-- as long as you use it.
function methods.data(t)
  local handle = pointer(t, "data", "t")
  return ffi.cast(element_pointers[handle.dtype], handle.data)
end

return tensor
