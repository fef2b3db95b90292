--- the JSON of file headers, from strangers: dkjson behind a check of depth

local disk = require "safeattn.files.disk"

local json = {}

local DEEPEST = 8

-- Not needed before a file asks for it.
local function library()
  local found, dkjson = pcall(require, "dkjson")
  if not found then
    disk.refuse(".safetensors needs the Lua module dkjson (luarocks install dkjson; Debian: lua-dkjson)")
  end
  return dkjson
end

-- dkjson calls itself for every level, so that a header of brackets would end in an overflow of the stack.
local function check_depth(text)
  local depth, at = 0, 1
  while true do
    local found = text:find('[%[%]{}"]', at)
    if not found then return end
    local mark = text:byte(found)
    at = found + 1
    if mark == 0x22 then -- a quote: on to the one that ends the string
      repeat
        found = text:find('["\\]', at)
        if not found then return end
        at = found + (text:byte(found) == 0x5c and 2 or 1)
      until text:byte(found) == 0x22
    elseif mark == 0x5b or mark == 0x7b then
      depth = depth + 1
      if depth > DEEPEST then disk.refuse("has a header nested deeper than %d", DEEPEST) end
    else
      depth = depth - 1
    end
  end
end

--- The value of a JSON text. Arrays and objects can be told apart by json.kind.
function json.decode(text)
  check_depth(text)
  local dkjson = library()
  local value, after, problem = dkjson.decode(text, 1, dkjson.null)
  if problem or text:find("%S", after) then
    disk.refuse("has a header that is not JSON: %s", problem or "text behind its end")
  end
  return value
end

--- "object", "array", or the type of anything else.
function json.kind(value)
  local metatable = type(value) == "table" and getmetatable(value)
  return metatable and metatable.__jsontype or type(value)
end

--- A string as JSON writes it.
function json.quoted(text)
  return library().quotestring(text)
end

return json
