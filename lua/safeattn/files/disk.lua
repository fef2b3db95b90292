--- reads files by mapping them into memory, and writes them whole or not at all

local ffi = require "ffi"

local disk = {}

-- Own names for the C library's functions: whatever a script declares beside us, it cannot disagree.
ffi.cdef [[
int safeattn_open(const char *path, int flags, ...) __asm__("open");
int safeattn_close(int fd) __asm__("close");
int64_t safeattn_lseek(int fd, int64_t offset, int whence) __asm__("lseek64");
intptr_t safeattn_read(int fd, void *bytes, size_t count) __asm__("read");
intptr_t safeattn_write(int fd, const void *bytes, size_t count) __asm__("write");
int safeattn_fsync(int fd) __asm__("fsync");
int safeattn_rename(const char *from, const char *to) __asm__("rename");
int safeattn_unlink(const char *path) __asm__("unlink");
int safeattn_getpid(void) __asm__("getpid");
char *safeattn_strerror(int number) __asm__("strerror");
void *safeattn_mmap(void *at, size_t length, int protection, int flags, int fd, int64_t offset) __asm__("mmap64");
int safeattn_munmap(void *at, size_t length) __asm__("munmap");
]]
local C = ffi.C

-- Linux's numbers, alike on x86 and ARM.
local O_RDONLY, O_WRONLY, O_CREAT, O_EXCL, O_NONBLOCK, O_CLOEXEC = 0, 1, 0x40, 0x80, 0x800, 0x80000
local SEEK_END, PROT_READ_WRITE, MAP_PRIVATE = 2, 3, 2
local EINTR, EEXIST = 4, 17

-- What is wrong with a file or with the machine. A caller's mistake is an error of Lua's own kind instead.
local Refusal = {}

--- Ends disk.attempt with nil and this message.
function disk.refuse(format, ...)
  error(setmetatable({message = string.format(format, ...)}, Refusal), 0)
end
local refuse = disk.refuse

--- Calls fn(...), which may refuse. A refusal gives nil and its message behind `subject`; a mistake is raised as it is.
function disk.attempt(subject, fn, ...)
  local function results(succeeded, result, ...)
    if succeeded then return result, ... end
    if getmetatable(result) == Refusal then return nil, subject .. ": " .. result.message end
    error(result, 0)
  end
  return results(pcall(fn, ...))
end

local function reason()
  return ffi.string(C.safeattn_strerror(ffi.errno()))
end

-- Reading

local Mapping = ffi.typeof "struct { uint8_t *bytes; double length; }"

local function unmap(mapping)
  if mapping.length > 0 then C.safeattn_munmap(mapping.bytes, mapping.length) end
  mapping.length = 0
end

local function mapped(fd)
  -- A directory can be opened, and has a length; reading nothing of it fails.
  if C.safeattn_read(fd, nil, 0) < 0 then refuse("cannot be read: %s", reason()) end
  local length = tonumber(C.safeattn_lseek(fd, 0, SEEK_END))
  if length < 0 then refuse("cannot be read: %s", reason()) end
  if length == 0 then refuse("is empty") end
  -- Private and writable: who changes a tensor in place changes a copy of its pages, never the file.
  local at = C.safeattn_mmap(nil, length, PROT_READ_WRITE, MAP_PRIVATE, fd, 0)
  if ffi.cast("intptr_t", at) == -1 then refuse("cannot be read: %s", reason()) end
  return ffi.gc(Mapping(at, length), unmap)
end

--- A file in memory: `bytes` (which may be written without touching the file) and `length`, until it is collected.
function disk.map(path)
  -- O_NONBLOCK: a named pipe without a writer would be waited for.
  local fd = C.safeattn_open(path, O_RDONLY + O_NONBLOCK + O_CLOEXEC)
  if fd < 0 then refuse("cannot be opened: %s", reason()) end
  local succeeded, mapping = pcall(mapped, fd)
  C.safeattn_close(fd)
  return succeeded and mapping or error(mapping, 0)
end

--- Gives a mapping back now.
function disk.unmap(mapping)
  unmap(ffi.gc(mapping, nil))
end

-- Writing

local MOST = 2 ^ 30 -- bytes a call; Linux writes no more than 2^31 at once

local function write_all(fd, bytes, count)
  bytes = ffi.cast("const uint8_t *", bytes)
  while count > 0 do
    local written = tonumber(C.safeattn_write(fd, bytes, math.min(count, MOST)))
    if written >= 0 then
      bytes, count = bytes + written, count - written
    elseif ffi.errno() ~= EINTR then
      refuse("cannot be written: %s", reason())
    end
  end
end

local serial = 0

-- A new file beside `path`, on the same file system, so that it can be renamed to it.
local function create_beside(path)
  while true do
    serial = serial + 1
    local name = string.format("%s.%d-%d.tmp", path, C.safeattn_getpid(), serial)
    local fd = C.safeattn_open(name, O_WRONLY + O_CREAT + O_EXCL + O_CLOEXEC, ffi.cast("int", tonumber("666", 8)))
    if fd >= 0 then return fd, name end
    if ffi.errno() ~= EEXIST then refuse("cannot be created: %s", reason()) end
  end
end

-- The rename itself survives a loss of power once the folder is on the disk; file systems that cannot do that may not.
local function sync_folder(path)
  local fd = C.safeattn_open(path:match("^(.*/)[^/]*$") or ".", O_RDONLY + O_CLOEXEC)
  if fd < 0 then return end
  C.safeattn_fsync(fd)
  C.safeattn_close(fd)
end

--- Writes a file under a temporary name in the same folder and renames it when it is complete and on the disk. Readers
-- see the old file or the new one; when anything fails the old one stays and the temporary one goes.
-- @param path
-- @param fill called with write(bytes, count); bytes: a string (count not needed) or a pointer
function disk.replace(path, fill)
  local fd, name = create_beside(path)
  local open = true
  local succeeded, problem = pcall(function()
    fill(function(bytes, count) write_all(fd, bytes, count or #bytes) end)
    if C.safeattn_fsync(fd) ~= 0 then refuse("cannot be written: %s", reason()) end
    open = false
    if C.safeattn_close(fd) ~= 0 then refuse("cannot be written: %s", reason()) end
    if C.safeattn_rename(name, path) ~= 0 then refuse("cannot be replaced: %s", reason()) end
  end)
  if not succeeded then
    if open then C.safeattn_close(fd) end
    C.safeattn_unlink(name)
    error(problem, 0)
  end
  sync_folder(path)
end

return disk
