-- .safetensors: named tensors behind a JSON header, mapped into memory

local core = require "safeattn.core"
local create = require "safeattn.create"
local disk = require "safeattn.files.disk"
local json = require "safeattn.files.json"
local layout = require "safeattn.files.layout"

local ffi = core.ffi
local refuse = disk.refuse

local safetensors = {holds_metadata = true}

local METADATA = "__metadata__"
local LONGEST_HEADER = 100e6 -- the reference package's limit
local ALIGNMENT = 64 -- of the first element; the format asks for 8

local names = {f32 = "F32", f64 = "F64", f16 = "F16", bf16 = "BF16", bool = "BOOL", i32 = "I32", i64 = "I64"}
local dtypes = {}
for dtype, name in pairs(names) do dtypes[name] = dtype end

-- Writing

-- JSON is Unicode. Overlong forms and surrogates are no UTF-8.
local function is_utf8(text)
  local rest = text:gsub("[%z\1-\127]+", ""):gsub("[\194-\223][\128-\191]", "")
    :gsub("\224[\160-\191][\128-\191]", ""):gsub("\237[\128-\159][\128-\191]", "")
    :gsub("[\225-\236\238\239][\128-\191][\128-\191]", ""):gsub("\240[\144-\191][\128-\191][\128-\191]", "")
    :gsub("[\241-\243][\128-\191][\128-\191][\128-\191]", ""):gsub("\244[\128-\143][\128-\191][\128-\191]", "")
  return rest == ""
end

function safetensors.check(fname, argument, tensors, options)
  for name in pairs(tensors) do
    if name == METADATA or not is_utf8(name) then
      core.fail(fname, "%s: got the name %s, wanted UTF-8 other than %s", argument, core.describe(name), METADATA)
    end
  end
  local metadata = options.metadata
  if metadata == nil then return end
  if type(metadata) ~= "table" then
    core.fail(fname, "metadata: got %s, wanted a table of strings", core.describe(metadata))
  end
  for key, value in pairs(metadata) do
    if type(key) ~= "string" or type(value) ~= "string" or not is_utf8(key) or not is_utf8(value) then
      core.fail(fname, "metadata: got %s = %s, wanted strings of UTF-8", core.describe(key), core.describe(value))
    end
  end
end

-- Names in the order of their data: wide elements first, so that each starts at a multiple of its size.
local function ordered(tensors)
  local list = layout.names(tensors)
  local place = {}
  for n, name in ipairs(list) do place[name] = n end
  table.sort(list, function(a, b)
    local size, other = layout.sizes[tensors[a].dtype], layout.sizes[tensors[b].dtype]
    if size ~= other then return size > other end
    return place[a] < place[b]
  end)
  return list
end

local function header(tensors, list, metadata)
  local entries, offset = {}, 0
  if metadata and next(metadata) ~= nil then
    local pairs_of = {}
    for n, key in ipairs(layout.names(metadata)) do
      pairs_of[n] = json.quoted(key) .. ":" .. json.quoted(metadata[key])
    end
    entries[1] = json.quoted(METADATA) .. ":{" .. table.concat(pairs_of, ",") .. "}"
  end
  for _, name in ipairs(list) do
    local t = tensors[name]
    local last = offset + t:numel() * layout.sizes[t.dtype]
    entries[#entries + 1] = string.format('%s:{"dtype":"%s","shape":%s,"data_offsets":[%.0f,%.0f]}', json.quoted(name),
      names[t.dtype], layout.shape_text(t.shape), offset, last)
    offset = last
  end
  local text = "{" .. table.concat(entries, ",") .. "}"
  return text .. (" "):rep(-(8 + #text) % ALIGNMENT)
end

function safetensors.save(path, tensors, options)
  local list = ordered(tensors)
  local text = header(tensors, list, options.metadata)
  disk.replace(path, function(write)
    local length = ffi.new("uint64_t[1]", #text)
    write(length, 8)
    write(text)
    for _, name in ipairs(list) do layout.write(write, tensors[name]) end
  end)
end

-- Reading

local function check_metadata(metadata)
  local broken = json.kind(metadata) ~= "object"
  for _, value in pairs(broken and {} or metadata) do broken = broken or type(value) ~= "string" end
  if broken then refuse("has metadata that is not a table of strings") end
  return setmetatable(metadata, nil)
end

local function pair_of_offsets(offsets)
  return json.kind(offsets) == "array" and #offsets == 2 and core.is_count(offsets[1]) and core.is_count(offsets[2])
    and offsets[1] <= offsets[2]
end

-- What a header says of a tensor: name, dtype, shape, first, last. The dtype is nil when it is none of ours.
local function check_entry(name, entry)
  local text = core.describe(name)
  if json.kind(entry) ~= "object" or type(entry.dtype) ~= "string" or json.kind(entry.shape) ~= "array"
      or not pair_of_offsets(entry.data_offsets) then
    refuse("says of %s not what it should: a dtype, a shape and two offsets", text)
  end
  local first, last = entry.data_offsets[1], entry.data_offsets[2]
  local dtype = dtypes[entry.dtype]
  if dtype then
    local bytes, problem = disk.attempt(text, layout.bytes, entry.shape, dtype)
    if not bytes then refuse("%s", problem) end
    if bytes ~= last - first then
      refuse("says that %s is %s%s, which takes %.0f bytes, and gives it %.0f", text, dtype,
        layout.shape_text(entry.shape), bytes, last - first)
    end
  end
  return {name = name, dtype = dtype, stored = entry.dtype, shape = entry.shape, first = first, last = last}
end

-- As the reference package does: the data of the tensors follow each other without gaps and fill the file.
local function check_ranges(entries, length)
  table.sort(entries, function(a, b)
    if a.first ~= b.first then return a.first < b.first end
    return a.last < b.last
  end)
  local reached = 0
  for _, entry in ipairs(entries) do
    if entry.first ~= reached then
      refuse("has %s between the data of its tensors, before %s", entry.first < reached and "an overlap" or "a gap",
        core.describe(entry.name))
    end
    reached = entry.last
  end
  if reached ~= length then
    refuse("holds %.0f bytes of data, but its header says %.0f", length, reached)
  end
end

local function read_header(mapping)
  if mapping.length < 8 then refuse("is no .safetensors: has %.0f bytes, wanted at least 8", mapping.length) end
  local length = 0
  for n = 7, 0, -1 do length = length * 256 + tonumber(mapping.bytes[n]) end
  if length > mapping.length - 8 or length > LONGEST_HEADER then
    refuse("has a header of %.0f bytes, wanted at most the file's %.0f and %.0f", length, mapping.length - 8,
      LONGEST_HEADER)
  end
  local text = ffi.string(mapping.bytes + 8, length)
  local content = text:sub(1, 1) == "{" and json.decode(text)
  if json.kind(content) ~= "object" then refuse("is no .safetensors: its header is no JSON object") end
  local entries, metadata = {}, nil
  for name, entry in pairs(content) do
    if name == METADATA then
      metadata = check_metadata(entry)
    else
      entries[#entries + 1] = check_entry(name, entry)
    end
  end
  check_ranges(entries, mapping.length - 8 - length)
  return entries, metadata, 8 + length
end

-- A tensor on the mapping itself. Where an element would straddle its natural place, it is a copy.
local function borrow(mapping, entry, start)
  if not entry.dtype then
    refuse("has %s in %s, wanted %s", core.describe(entry.name), entry.stored, core.alternatives(dtypes))
  end
  local at = mapping.bytes + start + entry.first
  if entry.dtype == "bool" then layout.make_booleans(at, entry.last - entry.first) end
  if tonumber(ffi.cast("uintptr_t", at) % layout.sizes[entry.dtype]) ~= 0 then
    local t = layout.new(entry.shape, entry.dtype)
    ffi.copy(t.handle.data, at, entry.last - entry.first)
    return t
  end
  return create.from_pointer(ffi.cast("void *", at), setmetatable(entry.shape, nil),
    {dtype = entry.dtype, owner = mapping})
end

function safetensors.load(path, wanted)
  local mapping = disk.map(path)
  local entries, metadata, start = read_header(mapping)
  local tensors = {}
  for _, entry in ipairs(entries) do
    tensors[entry.name] = (wanted == nil or wanted == entry.name) and borrow(mapping, entry, start)
  end
  return tensors, metadata
end

return safetensors
