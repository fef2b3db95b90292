--- CUDA devices: their memory, their streams, and waiting for them

local core = require "safeattn.core"
local scope = require "safeattn.scope"

local ffi, lib = core.ffi, core.lib
local fail, call = core.fail, core.call

local cuda = {}

-- The code of the CUDA device that `name` says, "cuda" when it is nil; nil and what is missing when it is not there.
local function device_of(fname, name)
  local device, missing = core.device(fname, "device", name == nil and "cuda" or name)
  if device == lib.SA_CPU then fail(fname, 'device: got "cpu", wanted a CUDA device') end
  return device, missing
end

local memory_type = ffi.typeof("sa_device_memory")

--- What a device's memory is used for, in bytes: `bytes` (held by tensors and calls at work), `peak` (their most so
-- far), `cached` (released, kept for the next tensor), `free` and `total` (what the device says); and how many `blocks`
-- are held.
-- @param device "cuda" unless given
-- @return a table; nil and what is missing when there is no such device
function cuda.memory(device)
  local code, missing = device_of("cuda.memory", device)
  if not code then return nil, missing end
  local use = memory_type()
  call("cuda.memory", lib.sa_cuda_memory, code, use)
  return {
    bytes = tonumber(use.bytes), blocks = tonumber(use.blocks), peak = tonumber(use.peak_bytes),
    cached = tonumber(use.cached_bytes), free = tonumber(use.free_bytes), total = tonumber(use.total_bytes),
  }
end

--- Collects garbage and gives the memory that is kept for the next tensors back to the device.
-- @return true; nil and what is missing when there is no such device
function cuda.empty_cache(device)
  local code, missing = device_of("cuda.empty_cache", device)
  if not code then return nil, missing end
  collectgarbage()
  collectgarbage()
  call("cuda.empty_cache", lib.sa_cuda_empty_cache, code)
  return true
end

--- Waits until a device, or every CUDA device, has done all that was asked of it. (Reading a tensor waits by itself.)
-- @return true; nil and what is missing when there is no such device
function cuda.synchronize(device)
  if device ~= nil then
    local code, missing = core.device("synchronize", "device", device)
    if not code then return nil, missing end
    call("synchronize", lib.sa_synchronize, code)
    return true
  end
  for k = 0, lib.sa_device_count(lib.SA_CUDA) - 1 do call("synchronize", lib.sa_synchronize, lib.SA_CUDA + k) end
  return true
end

-- Streams

local Stream = {}
Stream.__index = Stream

local pointer_type, slot_type = ffi.typeof("void *"), ffi.typeof("void *[1]")

-- The handle of a stream that was not released.
local function handle_of(stream, fname)
  if getmetatable(stream) ~= Stream then
    fail(fname, "stream: got %s, wanted a stream", core.describe(stream))
  end
  if stream.released then fail(fname, "stream: got one that was released, wanted one that lives") end
  return stream.pointer
end

local stream_options = {device = true, pointer = true}

--- A stream: what is asked of the device while it is in use is done in its order, beside what is on other streams.
-- Whoever reads on one stream what another writes has to wait in between (stream:synchronize()).
-- @param options device ("cuda"); pointer, to adopt a cudaStream_t that something else made, and keeps as long as it is
--   in use here
-- @return an object with use(fn, ...), synchronize(), release(), and the cudaStream_t as `pointer`; nil and what is
--   missing when there is no such device
function cuda.stream(options)
  options = core.options("cuda.stream", options, stream_options)
  local device, missing = device_of("cuda.stream", options.device)
  if options.pointer ~= nil and type(options.pointer) ~= "cdata" then
    fail("cuda.stream", "pointer: got %s, wanted a cudaStream_t as cdata", core.describe(options.pointer))
  end
  if not device then return nil, missing end
  local slot = slot_type()
  if options.pointer ~= nil then
    slot[0] = ffi.cast(pointer_type, options.pointer)
  else
    call("cuda.stream", lib.sa_cuda_stream_new, device, slot)
  end
  local stream = {device = core.device_name(device), code = device, pointer = slot[0], released = false}
  if options.pointer == nil then
    local finish = lib.sa_cuda_stream_release
    stream.pointer = ffi.gc(slot[0], function(pointer) finish(device, pointer) end)
  end
  return setmetatable(stream, Stream)
end

-- Puts a stream in use, or the pointer of one that was.
local function set_stream(code, stream)
  local before = slot_type()
  call("stream:use", lib.sa_cuda_stream, code, before)
  call("stream:use", lib.sa_cuda_stream_use, code,
    type(stream) == "table" and handle_of(stream, "stream:use") or stream)
  return before[0]
end

--- Calls fn(...) with the stream in use for this thread, and gives back what it returns.
function Stream:use(fn, ...)
  handle_of(self, "stream:use")
  if type(fn) ~= "function" then fail("stream:use", "fn: got %s, wanted a function", core.describe(fn)) end
  local code = self.code
  return scope(function(stream) return set_stream(code, stream) end, self, fn, ...)
end

--- Waits until all that was asked on the stream is done.
function Stream:synchronize()
  call("stream:synchronize", lib.sa_cuda_stream_synchronize, self.code, handle_of(self, "stream:synchronize"))
end

--- Waits for the stream and ends its use here; one that was made here is destroyed.
function Stream:release()
  local pointer = handle_of(self, "stream:release")
  ffi.gc(pointer, nil)
  self.released = true
  call("stream:release", lib.sa_cuda_stream_release, self.code, pointer)
end

function Stream.__describe(stream)
  return "a stream of " .. stream.device
end

function Stream:__tostring()
  return self.released and "a stream that was released" or string.format("stream of %s: %s", self.device, self.pointer)
end

return cuda
