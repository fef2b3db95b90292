--- what a name at the prompt means: its completions, and the documentation of its function

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"

local names = {}

-- What a name stands for that nobody defined: methods of objects, found by their last part alone.
local function method_tables()
  local tables = {tensor.methods, getmetatable(require("safeattn.mask").causal()).__index}
  local found, inspect = pcall(require, "safeattn.inspect")
  if found then tables[#tables + 1] = inspect.methods end
  return tables
end

local function field_of(value, key)
  if type(value) == "string" then value = string end
  if tensor.is(value) then return tensor.methods[key] end
  if type(value) ~= "table" then return nil end
  local own = rawget(value, key)
  if own ~= nil then return own end
  local metatable = getmetatable(value)
  local index = type(metatable) == "table" and rawget(metatable, "__index")
  return type(index) == "table" and index[key] or nil
end

-- Follows "a.b:c" without calling anything.
local function value_of(path, environment)
  local value = environment
  for part in path:gmatch("[^.:]+") do
    value = field_of(value, part)
    if value == nil then return nil end
  end
  return value
end

local function keys_of(value)
  local keys = {}
  local function add(t)
    for key in pairs(type(t) == "table" and t or {}) do
      if type(key) == "string" and key:match("^[%a_][%w_]*$") then keys[key] = true end
    end
  end
  if tensor.is(value) then
    add(tensor.methods)
    for _, field in ipairs {"shape", "dtype", "device", "grad", "requires_grad"} do keys[field] = true end
  elseif type(value) == "table" then
    add(value)
    local metatable = getmetatable(value)
    add(type(metatable) == "table" and rawget(metatable, "__index"))
  elseif type(value) == "string" then
    add(string)
  end
  return keys
end

local keywords = {}
for word in ([[and break do else elseif end false for function goto if in local nil not or repeat return then true until
  while]]):gmatch("%a+") do
  keywords[word] = true
end

--- What a word at the prompt may become: a sorted list of whole words.
function names.complete(word, environment)
  local mark, path = word:match("^(%??)(.*)$")
  local owner, separator, start = path:match("^(.-)([.:])([%w_]*)$")
  local keys
  if owner then
    keys = keys_of(value_of(owner, environment))
  elseif path:match("^[%w_]*$") then
    owner, separator, start, keys = "", "", path, keys_of(environment)
    for keyword in pairs(keywords) do keys[keyword] = true end
  else
    return {}
  end
  local list = {}
  for key in pairs(keys) do
    if key:sub(1, #start) == start then list[#list + 1] = mark .. owner .. separator .. key end
  end
  table.sort(list)
  return list
end

-- Functions that load their module when they are called hold its name and theirs.
local function behind(fn)
  local held = {}
  for n = 1, 2 do
    local name, value = debug.getupvalue(fn, n)
    if name then held[name] = value end
  end
  if type(held.module) ~= "string" or type(held.name) ~= "string" then return fn end
  local loaded, module = pcall(require, held.module)
  return loaded and type(module) == "table" and module[held.name] or fn
end

local function lines_of(path)
  local file = io.open(path)
  if not file then return nil end
  local lines = {}
  for line in file:lines() do lines[#lines + 1] = line end
  file:close()
  return lines
end

-- The comment that ends above a line, from its `---` on; nil when there is none.
local function comment_above(lines, number)
  local first = number
  while first > 1 and lines[first - 1]:match("^%s*%-%-") do
    first = first - 1
    if lines[first]:match("^%s*%-%-%-") then break end
  end
  if first == number or not lines[first]:match("^%s*%-%-%-") then return nil end
  local texts = {}
  for n = first, number - 1 do texts[#texts + 1] = (lines[n]:gsub("^%s*%-%-+ ?", "  ")) end
  return table.concat(texts, "\n")
end

-- A function that another one made is defined where its name is assigned.
local function line_of_assignment(lines, name)
  for n, line in ipairs(lines) do
    if line:match("[.:]" .. name .. "%s*=") or line:match("^function [%w_.]*[.:]" .. name .. "%(") then return n end
  end
end

local function documentation_of(fn, name)
  fn = behind(fn)
  local info = debug.getinfo(fn, "S")
  local lines = info.source:sub(1, 1) == "@" and lines_of(info.source:sub(2))
  if not lines then return nil end
  local number = info.linedefined
  local text = comment_above(lines, number)
  if not text then
    number = line_of_assignment(lines, name)
    text = number and comment_above(lines, number)
  end
  return text and (lines[number]:gsub("^%s*", "")) .. "\n" .. text
end

local function listed(value)
  local list = {}
  for key in pairs(keys_of(value)) do list[#list + 1] = key end
  table.sort(list)
  local lines, line = {}, " "
  for _, key in ipairs(list) do
    if #line + #key > 78 then
      lines[#lines + 1] = line
      line = " "
    end
    line = line .. " " .. key
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n")
end

--- The documentation of what a name stands for, as text; nil and why there is none.
function names.documentation(name, environment)
  name = name:match("^%s*(.-)%s*$"):gsub("%(.*$", ""):gsub(":", ".")
  if name == "" or name:find("[^%w_.]") then
    return nil, "wanted a name, as in ?sdpa, ?sa.sdpa, ?m.causal, ?t:view"
  end
  local last = name:match("([%w_]+)%.*$")
  local candidates = {value_of(name, environment) or false}
  for _, t in ipairs {environment.sa, environment.m} do candidates[#candidates + 1] = t and rawget(t, last) or false end
  for _, t in ipairs(method_tables()) do candidates[#candidates + 1] = type(t) == "table" and t[last] or false end
  for _, value in ipairs(candidates) do
    if type(value) == "function" then
      local text = documentation_of(value, last)
      if text then return text end
    end
  end
  local value = candidates[1]
  if type(value) == "table" then
    return (tensor.is(value) and core.describe(value) or name) .. "\n" .. listed(value)
  end
  return nil, value and "nothing is written of " .. name or "there is no " .. name
end

return names
