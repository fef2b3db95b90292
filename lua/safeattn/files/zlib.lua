--- zlib through FFI, for the members of an .npz: checksums, inflating, deflating

local ffi = require "ffi"
local disk = require "safeattn.files.disk"

local zlib = {}

ffi.cdef [[
unsigned long safeattn_crc32(unsigned long crc, const uint8_t *bytes, unsigned count) __asm__("crc32");
const char *safeattn_zlib_version(void) __asm__("zlibVersion");
int safeattn_inflate_init(void *stream, int bits, const char *version, int size) __asm__("inflateInit2_");
int safeattn_inflate(void *stream, int flush) __asm__("inflate");
int safeattn_inflate_end(void *stream) __asm__("inflateEnd");
int safeattn_deflate_init(void *stream, int level, int method, int bits, int memory, int strategy, const char *version,
                          int size) __asm__("deflateInit2_");
int safeattn_deflate(void *stream, int flush) __asm__("deflate");
int safeattn_deflate_end(void *stream) __asm__("deflateEnd");
]]

-- zlib's z_stream.
local Stream = ffi.typeof [[struct {
  const uint8_t *next_in; unsigned avail_in; unsigned long total_in;
  uint8_t *next_out; unsigned avail_out; unsigned long total_out;
  const char *message; void *state, *allocate, *free, *opaque;
  int data_type; unsigned long adler, reserved;
}]]

local Z_NO_FLUSH, Z_FINISH, Z_OK, Z_STREAM_END, Z_DEFLATED = 0, 4, 0, 1, 8
local RAW, LEVEL, MEMORY = -15, 6, 8 -- no zlib header: ZIP has its own; zlib's defaults
local CHUNK = 2 ^ 20

local lib

-- Not needed before a file asks for it.
local function library()
  if not lib then
    local loaded, found = pcall(ffi.load, "libz.so.1")
    if not loaded then disk.refuse(".npz needs zlib, which is not here (Debian: zlib1g): %s", tostring(found)) end
    lib = found
  end
  return lib
end

--- The CRC-32 of what had `crc` so far (0 at the start) and `count` more bytes.
function zlib.crc32(crc, bytes, count)
  bytes = ffi.cast("const uint8_t *", bytes)
  while count > 0 do
    local part = math.min(count, 2 ^ 30)
    crc = tonumber(library().safeattn_crc32(crc, bytes, part))
    bytes, count = bytes + part, count - part
  end
  return crc
end

-- A library is unloaded with the last reference to it, and its functions are none: the finaliser, which may be called
-- in the collection that finds this module gone too, holds one.
local function ended_by(finalize, stream, z)
  return ffi.gc(stream, function(own) z[finalize](own) end)
end

local function check(status)
  if status ~= Z_OK then disk.refuse("zlib failed with status %d", status) end
end

--- Inflates piece by piece.
-- @param bytes raw deflate data
-- @param count of its bytes, below 4 GiB
-- @return read(to, count): the next bytes, exactly so many, or a refusal; finish(): refuses when there are more
function zlib.inflater(bytes, count)
  local z = library()
  local stream = Stream()
  stream.next_in, stream.avail_in = bytes, count
  check(z.safeattn_inflate_init(stream, RAW, z.safeattn_zlib_version(), ffi.sizeof(stream)))
  stream = ended_by("safeattn_inflate_end", stream, z)
  local ended = false
  local function read(to, wanted)
    stream.next_out, stream.avail_out = to, wanted
    while stream.avail_out > 0 and not ended do
      local status = z.safeattn_inflate(stream, Z_NO_FLUSH)
      ended = status == Z_STREAM_END
      if not ended and status ~= Z_OK then disk.refuse("holds compressed data that is broken") end
    end
    if stream.avail_out > 0 then disk.refuse("holds compressed data that ends too early") end
  end
  local function finish()
    local room = ffi.new("uint8_t[1]")
    stream.next_out, stream.avail_out = room, 1
    if not ended then ended = z.safeattn_inflate(stream, Z_NO_FLUSH) == Z_STREAM_END end
    local clean = ended and stream.avail_out == 1 and stream.avail_in == 0
    ffi.gc(stream, nil)
    z.safeattn_inflate_end(stream)
    if not clean then disk.refuse("holds more compressed data than it says") end
  end
  return read, finish
end

--- Deflates pieces.
-- @param pieces a list of {string or pointer, count, what holds the memory}
-- @return a list of strings
function zlib.deflate(pieces)
  local z = library()
  local stream = Stream()
  check(z.safeattn_deflate_init(stream, LEVEL, Z_DEFLATED, RAW, MEMORY, 0, z.safeattn_zlib_version(),
    ffi.sizeof(stream)))
  stream = ended_by("safeattn_deflate_end", stream, z)
  local room, output = ffi.new("uint8_t[?]", CHUNK), {}
  local function run(flush)
    local status
    repeat
      stream.next_out, stream.avail_out = room, CHUNK
      status = z.safeattn_deflate(stream, flush)
      output[#output + 1] = ffi.string(room, CHUNK - stream.avail_out)
    until stream.avail_out > 0 or status == Z_STREAM_END
  end
  for _, piece in ipairs(pieces) do
    stream.next_in, stream.avail_in = ffi.cast("const uint8_t *", piece[1]), piece[2]
    run(Z_NO_FLUSH)
  end
  run(Z_FINISH)
  ffi.gc(stream, nil)
  z.safeattn_deflate_end(stream)
  return output
end

return zlib
