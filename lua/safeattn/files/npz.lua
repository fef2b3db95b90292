--- NumPy's .npz: a ZIP archive of .npy members, stored or deflated

local core = require "safeattn.core"
local disk = require "safeattn.files.disk"
local layout = require "safeattn.files.layout"
local npy = require "safeattn.files.npy"
local zlib = require "safeattn.files.zlib"

local ffi, bit = core.ffi, require "bit"
local refuse = disk.refuse

local npz = {}

local STORED, DEFLATED = 0, 8
local LOCAL, CENTRAL, END, END64 = "PK\3\4", "PK\1\2", "PK\5\6", "PK\6\7"
local LOCAL_SIZE, CENTRAL_SIZE, END_SIZE, END64_SIZE = 30, 46, 22, 20
local LONGEST_COMMENT = 65535
local LIMIT, MOST_MEMBERS = 2 ^ 32 - 1, 65535 -- these values themselves mean: look into the ZIP64 records
local DEFLATE_RATIO = 1032 -- no deflate data grows by more
local DATE = 0x21 -- 1 January 1980, so that the same tensors give the same bytes

local function little(size, value)
  local text = {}
  for n = 1, size do
    text[n] = string.char(value % 256)
    value = math.floor(value / 256)
  end
  return table.concat(text)
end

-- Writing

-- What both headers of a member say of it.
local function described(member)
  local utf8 = member.name:find("[\128-\255]") and 0x800 or 0
  return little(2, 20) .. little(2, utf8) .. little(2, member.method) .. little(2, 0) .. little(2, DATE)
    .. little(4, member.crc) .. little(4, member.packed) .. little(4, member.size) .. little(2, #member.name)
    .. little(2, 0)
end

-- Gives the bytes it took; and the memory it wrote from, which lives so long.
local function write_member(write, member, t, compress)
  local flat, bytes, count = layout.flat(t)
  local header = npy.header(flat)
  member.size = #header + count
  member.crc = zlib.crc32(zlib.crc32(0, header, #header), bytes, count)
  local pieces = compress and zlib.deflate {{header, #header}, {bytes, count, flat}}
  member.method, member.packed = STORED, member.size
  if pieces then
    member.method, member.packed = DEFLATED, 0
    for _, piece in ipairs(pieces) do member.packed = member.packed + #piece end
  end
  write(LOCAL .. described(member) .. member.name)
  if pieces then
    for _, piece in ipairs(pieces) do write(piece) end
  else
    write(header)
    write(bytes, count)
  end
  return LOCAL_SIZE + #member.name + member.packed, flat
end

--- Raises unless the tensors fit: dtypes of NumPy's, and less than 4 GiB in all, for ZIP64 is not written.
function npz.check(fname, argument, tensors)
  local total, count = END_SIZE, 0
  for name, t in pairs(tensors) do
    npy.check(fname, argument .. "." .. name, t)
    total = total + t:numel() * layout.sizes[t.dtype] + LOCAL_SIZE + CENTRAL_SIZE + 2 * #name + 512
    count = count + 1
  end
  if total >= LIMIT or count >= MOST_MEMBERS then
    core.fail(fname, "%s: got %d tensors of %.0f bytes, wanted less than 65535 and 4 GiB in an .npz"
      .. " (.safetensors has no such limit)", argument, count, total)
  end
end

function npz.save(path, tensors, options)
  disk.replace(path, function(write)
    local offset, directory = 0, {}
    for _, name in ipairs(layout.names(tensors)) do
      local member = {name = name .. ".npy"}
      local written = write_member(write, member, tensors[name], options.compress)
      directory[#directory + 1] = CENTRAL .. little(2, 20) .. described(member) .. little(2, 0) .. little(2, 0)
        .. little(2, 0) .. little(4, 0) .. little(4, offset) .. member.name
      offset = offset + written
    end
    local text = table.concat(directory)
    write(text .. END .. little(4, 0) .. little(2, #directory) .. little(2, #directory) .. little(4, #text)
      .. little(4, offset) .. little(2, 0))
  end)
end

-- Reading

local function number(bytes, at, size)
  local value = 0
  for n = size - 1, 0, -1 do value = value * 256 + tonumber(bytes[at + n]) end
  return value
end

local function marked(bytes, at, mark)
  return ffi.string(bytes + at, 4) == mark
end

-- Where the record that ends an archive starts: behind it there is nothing but its comment.
local function find_end(bytes, length)
  for at = length - END_SIZE, math.max(0, length - END_SIZE - LONGEST_COMMENT), -1 do
    if bytes[at] == 0x50 and marked(bytes, at, END) and number(bytes, at + 20, 2) == length - at - END_SIZE then
      return at
    end
  end
  refuse("is no .npz, or cut short: a ZIP archive ends with a directory")
end

local function zip64()
  refuse("is a ZIP64 archive (a member of 4 GiB, or 65535 of them), wanted a plain one; .safetensors has no such limit")
end

-- The directory: name, method, crc, packed, size, offset of every member.
local function read_directory(bytes, length)
  if length < END_SIZE then refuse("is no .npz: has %.0f bytes, wanted at least %d", length, END_SIZE) end
  local stop = find_end(bytes, length)
  local count, size, start = number(bytes, stop + 10, 2), number(bytes, stop + 12, 4), number(bytes, stop + 16, 4)
  if count == MOST_MEMBERS or size == LIMIT or start == LIMIT
      or (stop >= END64_SIZE and marked(bytes, stop - END64_SIZE, END64)) then
    zip64()
  end
  if start + size > stop then refuse("has a directory that lies outside of the file") end
  local members, at = {}, start
  for n = 1, count do
    if at + CENTRAL_SIZE > start + size or not marked(bytes, at, CENTRAL) then refuse("has a broken directory") end
    local name_length = number(bytes, at + 28, 2)
    local next_at = at + CENTRAL_SIZE + name_length + number(bytes, at + 30, 2) + number(bytes, at + 32, 2)
    if next_at > start + size then refuse("has a broken directory") end
    members[n] = {
      flags = number(bytes, at + 8, 2), method = number(bytes, at + 10, 2), crc = number(bytes, at + 16, 4),
      packed = number(bytes, at + 20, 4), size = number(bytes, at + 24, 4), offset = number(bytes, at + 42, 4),
      name = ffi.string(bytes + at + CENTRAL_SIZE, name_length), limit = start,
    }
    at = next_at
  end
  return members
end

-- Finds a member's bytes, and sees that its sizes can be true before anything is inflated.
local function locate(bytes, member)
  local text = core.describe(member.name)
  if member.packed == LIMIT or member.size == LIMIT or member.offset == LIMIT then zip64() end
  if bit.band(member.flags, 1) ~= 0 then refuse("has an encrypted member %s", text) end
  if member.method ~= STORED and member.method ~= DEFLATED then
    refuse("has a member %s packed by method %d, wanted 0 (stored) or 8 (deflated)", text, member.method)
  end
  if member.offset + LOCAL_SIZE > member.limit or not marked(bytes, member.offset, LOCAL) then
    refuse("has a member %s that lies outside of the file", text)
  end
  member.first = member.offset + LOCAL_SIZE + number(bytes, member.offset + 26, 2)
    + number(bytes, member.offset + 28, 2)
  if member.first + member.packed > member.limit then
    refuse("has a member %s that lies outside of the file", text)
  end
  if member.method == STORED and member.size ~= member.packed then
    refuse("has a stored member %s of %.0f bytes that claims %.0f", text, member.packed, member.size)
  end
  if member.size > DEFLATE_RATIO * member.packed then
    refuse("has a member %s of %.0f bytes that claims to inflate to %.0f", text, member.packed, member.size)
  end
end

-- Members that share bytes multiply what is inflated: a bomb.
local function check_overlaps(members)
  table.sort(members, function(a, b) return a.offset < b.offset end)
  for n = 2, #members do
    if members[n].offset < members[n - 1].first + members[n - 1].packed then
      refuse("has overlapping members %s and %s", core.describe(members[n - 1].name), core.describe(members[n].name))
    end
  end
end

local function read_member(bytes, member)
  local packed, finish = npy.source(bytes + member.first, member.packed), nil
  local read = packed.read
  if member.method == DEFLATED then read, finish = zlib.inflater(bytes + member.first, member.packed) end
  local crc = 0
  local t = npy.read {
    size = member.size,
    read = function(to, count)
      read(to, count)
      crc = zlib.crc32(crc, to, count)
    end,
  }
  if finish then finish() end
  if crc ~= member.crc then refuse("does not have the checksum that the archive says") end
  return t
end

local function read_members(mapping, wanted)
  local bytes, members = mapping.bytes, read_directory(mapping.bytes, mapping.length)
  for _, member in ipairs(members) do locate(bytes, member) end
  check_overlaps(members)
  local tensors = {}
  for _, member in ipairs(members) do
    local name = member.name:gsub("%.npy$", "")
    if tensors[name] ~= nil then refuse("has two members %s", core.describe(member.name)) end
    tensors[name] = false
    if wanted == nil or wanted == name then
      local t, problem = disk.attempt("member " .. core.describe(member.name), read_member, bytes, member)
      tensors[name] = t or refuse("%s", problem)
    end
  end
  return tensors
end

function npz.load(path, wanted)
  local mapping = disk.map(path)
  local succeeded, tensors = pcall(read_members, mapping, wanted)
  disk.unmap(mapping)
  return succeeded and tensors or error(tensors, 0)
end

return npz
