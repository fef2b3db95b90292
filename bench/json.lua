-- results as JSON, for the scripts that read them

--- A value as text: a list has an entry at 1 or is empty, any other table is an object with its keys in order. Results
-- in a list stand on lines of their own.
local function json(value)
  if type(value) == "table" and (value[1] ~= nil or next(value) == nil) then
    local items = {}
    for i, item in ipairs(value) do items[i] = json(item) end
    return "[" .. table.concat(items, type(value[1]) == "table" and ",\n " or ", ") .. "]"
  elseif type(value) == "table" then
    local keys, items = {}, {}
    for key in pairs(value) do keys[#keys + 1] = key end
    table.sort(keys)
    for i, key in ipairs(keys) do items[i] = ("%q: %s"):format(key, json(value[key])) end
    return "{" .. table.concat(items, ", ") .. "}"
  elseif type(value) == "string" then
    return '"' .. value:gsub('[%c"\\]', function(c) return ("\\u%04x"):format(c:byte()) end) .. '"'
  end
  return tostring(value)
end

--- Writes a value to a file below build/.
local function write(path, value)
  os.execute "mkdir -p build"
  local file = assert(io.open(path, "w"))
  file:write(json(value), "\n")
  file:close()
end

--- The same, and says so.
local function save(path, value)
  write(path, value)
  print("\nsaved as " .. path)
end

return {write = write, save = save}
