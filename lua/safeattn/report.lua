--- A page on an attention: one HTML file with everything in it, for any browser, without a network.
-- The methods `look:report` and `tap:report` end here. The page holds the inputs, not the matrices: of 8 heads of
-- 512 x 512 the inputs take 4 MiB, weights and dS alone 32. Its script computes the rows that a reader looks at by the
-- definition, in f64, so that the numbers are those of the tensors to all digits shown.
-- @module safeattn.report

local core = require "safeattn.core"
local colours = require "safeattn.draw.colours"
local create = require "safeattn.create"
local sdpa = require "safeattn.sdpa"
local replace = require "safeattn.replace"

local ffi, lib = core.ffi, core.lib

local M = {}

local bytes_type = ffi.typeof "uint8_t[?]"

-- Text

local alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

-- Base64 of bytes, three at a time.
local function base64(bytes, count)
  local code = ffi.cast("const uint8_t *", alphabet)
  local text, at = bytes_type(math.ceil(count / 3) * 4 + 4), 0
  for n = 0, count - 1, 3 do
    local word = bytes[n] * 65536 + (n + 1 < count and bytes[n + 1] or 0) * 256 + (n + 2 < count and bytes[n + 2] or 0)
    text[at] = code[bit.rshift(word, 18)]
    text[at + 1] = code[bit.band(bit.rshift(word, 12), 63)]
    text[at + 2] = code[bit.band(bit.rshift(word, 6), 63)]
    text[at + 3] = code[bit.band(word, 63)]
    at = at + 4
  end
  for n = 1, (3 - count % 3) % 3 do text[at - n] = ("="):byte() end
  return ffi.string(text, at)
end

-- "<" would end the script that the text stands in.
local function quoted(text)
  return '"' .. text:gsub('[%c"\\<\127]', function(c) return string.format("\\u%04x", c:byte()) end) .. '"'
end

local json

local function fields(object)
  local names, parts = {}, {}
  for name in pairs(object) do names[#names + 1] = name end
  table.sort(names)
  for n, name in ipairs(names) do parts[n] = quoted(name) .. ":" .. json(object[name]) end
  return "{" .. table.concat(parts, ",") .. "}"
end

-- JSON. A table with an element [1], or an empty one, is a list; numbers are finite.
function json(value)
  local kind = type(value)
  if kind == "string" then return quoted(value) end
  if kind == "number" then return string.format("%.17g", value) end
  if kind ~= "table" then return tostring(value) end
  if value[1] == nil and next(value) ~= nil then return fields(value) end
  local parts = {}
  for n = 1, #value do parts[n] = json(value[n]) end
  return "[" .. table.concat(parts, ",") .. "]"
end

-- Tensors

-- The bytes that are most frequent among the highest of f32 numbers: sign and exponent. There are few of them.
local COMMON = 15

local function frequent_bytes(bytes, count)
  local seen = ffi.new "int32_t[256]"
  for n = 0, count - 1 do seen[bytes[4 * n + 3]] = seen[bytes[4 * n + 3]] + 1 end
  local order = {}
  for byte = 0, 255 do order[byte + 1] = byte end
  table.sort(order, function(a, b) return seen[a] > seen[b] or seen[a] == seen[b] and a < b end)
  local rare = 0
  for n = COMMON + 1, 256 do rare = rare + seen[order[n]] end
  return order, rare
end

-- f32 in 3.5 bytes a number: the table of common highest bytes, the three low bytes of each number, the highest as
-- nibbles into the table (15: not in it), and those that are not in it.
local function packed_singles(bytes, count)
  local order, rare = frequent_bytes(bytes, count)
  local low, high = COMMON, COMMON + 3 * count
  local at = high + math.ceil(count / 2)
  local packed, code = bytes_type(at + rare + 1), bytes_type(256, COMMON)
  for n = 1, COMMON do packed[n - 1], code[order[n]] = order[n], n - 1 end
  for n = 0, count - 1 do
    local to, from = low + 3 * n, 4 * n
    packed[to], packed[to + 1], packed[to + 2] = bytes[from], bytes[from + 1], bytes[from + 2]
    local top = code[bytes[from + 3]]
    local place = high + bit.rshift(n, 1)
    packed[place] = packed[place] + (n % 2 == 0 and top or 16 * top)
    if top == COMMON then
      packed[at] = bytes[from + 3]
      at = at + 1
    end
  end
  return packed, at
end

local function numbers(t)
  if not t then return false end
  local whole = t:detach():to("cpu"):contiguous()
  local count = whole:numel()
  local bytes = ffi.cast("const uint8_t *", whole:data())
  local size = count * tonumber(lib.sa_dtype_size(whole.handle.dtype))
  local packed = {dtype = t.dtype, count = count, shape = t.shape}
  if t.dtype == "f32" then
    packed.data = base64(packed_singles(bytes, count))
  else
    packed.data = base64(bytes, size)
  end
  whole:free()
  return packed
end

-- Pairs

-- The truth of every element, eight to a byte.
local function bits(truth, count)
  local packed = bytes_type(math.ceil(count / 8) + 1)
  for n = 0, count - 1 do
    if truth[n] then
      local byte = bit.rshift(n, 3)
      packed[byte] = packed[byte] + bit.lshift(1, bit.band(n, 7))
    end
  end
  return base64(packed, math.ceil(count / 8))
end

local function visible_bits(plan)
  local pairs_seen = ffi.gc(ffi.new "sa_tensor", lib.sa_tensor_release)
  core.call("report", lib.sa_plan_dense, plan, pairs_seen)
  local packed = bits(ffi.cast("const bool *", pairs_seen.data), tonumber(lib.sa_tensor_numel(pairs_seen)))
  lib.sa_tensor_release(pairs_seen)
  return packed
end

-- Which weights dropout keeps: attention with equal weights, to values that are the keys' own unit vectors, shows them.
local function kept_bits(p)
  if p.dropout == 0 or p.S == 0 then return false end
  local unit = create.zeros({p.S, p.S})
  for j = 1, p.S do unit:set(j, j, 1) end
  local run = sdpa.forward(create.zeros({p.B, p.H, p.L, 1}), create.zeros({p.B, p.H, p.S, 1}),
    unit:expand(p.B, p.H, p.S, p.S):contiguous(), {dropout = p.dropout, seed = p.options.seed})
  local out = run.out:contiguous()
  local kept, count = out:data(), out:numel()
  local truth = ffi.new("bool[?]", math.max(1, count))
  for n = 0, count - 1 do truth[n] = kept[n] ~= 0 end
  out:free()
  return bits(truth, count)
end

-- Looks

local function stats_of(p)
  local lines = {}
  for _, name in ipairs {"q", "k", "v", "dout", "bias", "sinks", "alibi"} do
    local t = p.given[name] or p.options[name]
    if t then
      local s = t:stats()
      local function text(x) return x == x and x or "-" end
      lines[#lines + 1] = {name .. " " .. core.describe(t), text(s.min), text(s.max), text(s.mean), text(s.norm), s.nan,
        s.posinf, s.neginf, s.zero, s.count}
    end
  end
  return lines
end

-- At most so many dead rows come with their reasons; the text has them all, as ranges.
local MOST_REASONS = 4096

local function reasons(list)
  local found = {}
  for n = 1, math.min(#list, MOST_REASONS) do
    local row = list[n]
    found[n] = {b = row.b, h = row.h, i = row.i, reason = row.reason}
  end
  return found
end

-- The bias with four dims, as it was given: what it is broadcast over is not repeated.
local function bias_of(p)
  local bias = p.options.bias
  if not bias then return false end
  local packed = numbers(bias)
  while #packed.shape < 4 do table.insert(packed.shape, 1, 1) end
  return packed
end

local function finite_number(x)
  return x == x and math.abs(x) < math.huge and x or 0
end

-- Pairs that a page may hold, one bit each.
local MOST_PAIRS = 2 ^ 27

local function contents(fname, look, p, name)
  local plan = p:plan(p.mask)
  local count = plan.batch * plan.heads * p.L * p.S
  if count > MOST_PAIRS then
    core.fail(fname, "self: got an attention whose mask has %.0f pairs, wanted at most %.0f: inspect some of its"
      .. " heads or queries (q:narrow)", count, MOST_PAIRS)
  end
  local dead_rows = look:dead_rows()
  return {
    name = name, B = p.B, H = p.H, Hkv = p.Hkv, L = p.L, S = p.S, E = p.E, Ev = p.Ev,
    scale = finite_number(p.scale), softcap = p.softcap, dropout = p.dropout, diagonal = p.diagonal,
    q = numbers(p.q), k = numbers(p.k), v = numbers(p.v), dout = numbers(p.dout), bias = bias_of(p),
    sinks = numbers(p.options.sinks), alibi = numbers(p.options.alibi),
    maskB = plan.batch, maskH = plan.heads, visible = visible_bits(plan.c), keep = kept_bits(p),
    deadRows = reasons(dead_rows), deadRowsText = tostring(dead_rows), deadKeysText = tostring(look:dead_keys()),
    nonfiniteText = tostring(look:nonfinite()), stats = stats_of(p), summaryText = tostring(look),
    note = p.dout and "" or "Made without dout: there are no gradients to show.",
  }
end

-- The page

local function hex(rgb)
  return string.format("%02x%02x%02x", unpack(rgb))
end

local function map_text(name)
  local parts = {}
  for n, rgb in ipairs(colours.map("report", name)) do parts[n] = hex(rgb) end
  return table.concat(parts)
end

local function special_colours()
  local special = {}
  for name, rgb in pairs(colours.special) do special[name] = hex(rgb) end
  return special
end

local function escaped(text)
  return (text:gsub("[&<>]", {["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;"}))
end

local function page(title, looks)
  local parts = {
    title = escaped(title), style = require "safeattn.report.style", script = require "safeattn.report.script",
    data = json {
      looks = looks, maps = {sequential = map_text "sequential", diverging = map_text "diverging"},
      special = special_colours(),
      names = {masked = "masked", zero = "exact zero", ["nan"] = "NaN", posinf = "+Inf", neginf = "-Inf"},
    },
  }
  return (require("safeattn.report.page"):gsub("%$%((%l+)%)", parts))
end

-- Writes a page about one or several looks, a list of {look =, problem =, name =}.
local function write(fname, path, list, title)
  if type(path) ~= "string" or path == "" then
    core.fail(fname, "path: got %s, wanted the name of a file", core.describe(path))
  end
  if title == nil then title = "Attention, looked into" end
  if type(title) ~= "string" then core.fail(fname, "title: got %s, wanted a string", core.describe(title)) end
  local looks = {}
  for n, entry in ipairs(list) do looks[n] = contents(fname, entry.look, entry.problem, entry.name) end
  local text = page(title, looks)
  return replace(path, function(name)
    local file, problem = io.open(name, "wb")
    if not file then return nil, problem end
    local written, failure = file:write(text)
    local closed, late = file:close()
    return written and closed, failure or late
  end)
end

local look_options = {title = true}

--- What `look:report` does.
-- @param look what sa.inspect gave
-- @param problem what the look is about
-- @param path of the file, replaced in one step
-- @param options {title = a string}
-- @return path; or nil and why it could not be written
function M.look(look, problem, path, options)
  local fname = "inspect():report"
  options = core.options(fname, options, look_options)
  return write(fname, path, {{look = look, problem = problem, name = "attention"}}, options.title)
end

local tap_options = {title = true, newest = true}

--- What `tap:report` does: one page for the newest recorded attentions.
-- @param tap what sa.tap gave
-- @param path of the file, replaced in one step
-- @param options {title = a string, newest = 8}: how many at most
-- @return path; or nil and why it could not be written
function M.tap(tap, path, options)
  local fname = "tap():report"
  options = core.options(fname, options, tap_options)
  local most = options.newest == nil and 8 or core.integer(fname, "newest", options.newest, 1)
  local inspect = require "safeattn.inspect"
  local list = {}
  for place, entry in ipairs(tap:list()) do
    if entry.kept and #list < most then
      local look = tap:get(place)
      list[#list + 1] = {look = look, problem = inspect.problem(look, fname), name = entry.name}
    end
  end
  if #list == 0 then core.fail(fname, "self: got a tap that recorded nothing, wanted one with a record") end
  return write(fname, path, list, options.title)
end

return M
