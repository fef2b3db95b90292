--- what print shows of a tensor: a header, statistics, and as much of the body as fits; the way to its pictures

local core = require "safeattn.core"
local tensor = require "safeattn.tensor"

-- More elements than this are cut to the EDGE first and last of every dim; so are more slices than SLICES.
local WHOLE, EDGE, SLICES = 1000, 3, 16
local WIDTH, INDENT, GAP = 80, 2, 2

local function header(t)
  local layout = t:is_contiguous() and "contiguous" or "strided (" .. table.concat(t:stride(), ",") .. ")"
  local name = core.dtype_names[t.handle.dtype] .. "[" .. table.concat(t.shape, ",") .. "]"
  return name .. " " .. t.device .. " " .. layout .. (t.requires_grad and " requires_grad" or "")
end

local function statistics(t)
  local s = t:stats()
  local line = string.format("min %.5g  max %.5g  mean %.5g  norm %.5g", s.min, s.max, s.mean, s.norm)
  if s.nan + s.posinf + s.neginf == s.count then line = "nothing finite" end
  for _, kind in ipairs {{"nan", s.nan}, {"+inf", s.posinf}, {"-inf", s.neginf}, {"zero", s.zero}} do
    if kind[2] > 0 then line = line .. string.format("  #%s %d", kind[1], kind[2]) end
  end
  return line
end

-- How to write these values alike, and the width that takes. An exact zero is "0", unlike what rounds to it.
local function format_for(values)
  local integers, most = true, 0
  for _, value in ipairs(values) do
    if type(value) == "number" and value - value == 0 then
      integers = integers and value % 1 == 0
      most = math.max(most, math.abs(value))
    end
  end
  local pattern = "%.4f"
  if integers and most < 1e10 then
    pattern = "%.0f"
  elseif most < 1e-2 or most >= 1e6 then
    pattern = "%.4e"
  end
  local function text_of(value)
    if type(value) ~= "number" then return (tostring(value):gsub("LL$", "")) end
    if value ~= value then return "nan" end
    if value == 0 then return "0" end
    return value - value == 0 and string.format(pattern, value) or tostring(value)
  end
  local width = 3
  for _, value in ipairs(values) do width = math.max(width, #text_of(value)) end
  return text_of, width
end

-- 1 .. size, or its edges around a 0, which stands for what is left out.
local function shown(size, edge)
  local list = {}
  for i = 1, size do
    if i <= edge or i > size - edge then
      list[#list + 1] = i
    elseif i == edge + 1 then
      list[#list + 1] = 0
    end
  end
  return list
end

-- The leading indices of the slices to show, in order; false stands for those left out.
local function slices(shape, rank)
  local count = 1
  for d = 1, rank do count = count * shape[d] end
  local list = {}
  for _, place in ipairs(shown(count, count > SLICES and EDGE or count)) do
    local index, rest = {}, place - 1
    for d = rank, 1, -1 do
      index[d] = rest % shape[d] + 1
      rest = math.floor(rest / shape[d])
    end
    list[#list + 1] = place > 0 and index
  end
  return list
end

local function columns_that_fit(width)
  return math.max(1, math.floor((WIDTH - INDENT + GAP) / (width + GAP)))
end

local function line_of(cells, first, last)
  return string.rep(" ", INDENT) .. table.concat(cells, string.rep(" ", GAP), first, last)
end

local function vector_lines(t, edge)
  local places, values = shown(t:size(1), edge), {}
  for _, place in ipairs(places) do
    if place > 0 then values[#values + 1] = t:get(place) end
  end
  local text_of, width = format_for(values)
  local cells, lines = {}, {}
  for c, place in ipairs(places) do
    cells[c] = string.format("%" .. width .. "s", place == 0 and "..." or text_of(t:get(place)))
  end
  local fitting = columns_that_fit(width)
  for first = 1, #cells, fitting do
    lines[#lines + 1] = line_of(cells, first, math.min(first + fitting - 1, #cells))
  end
  return lines
end

local function element(t, index, row, column)
  local place = {unpack(index)}
  place[#place + 1], place[#place + 2] = row, column
  return t:get(unpack(place))
end

-- The lines of rank 2 and more: matrices, under their leading indices when there are any.
local function matrix_lines(t, edge)
  local shape = t.shape
  local rank = #shape
  local indices = slices(shape, rank - 2)
  local rows, columns = shown(shape[rank - 1], edge), shown(shape[rank], edge)
  local values = {}
  for _, index in ipairs(indices) do
    for _, row in ipairs(index and rows or {}) do
      for _, column in ipairs(row > 0 and columns or {}) do
        if column > 0 then values[#values + 1] = element(t, index, row, column) end
      end
    end
  end
  local text_of, width = format_for(values)
  local fitting = columns_that_fit(width)
  if #columns > fitting then columns = shown(shape[rank], math.max(1, math.floor((fitting - 1) / 2))) end

  local lines = {}
  for _, index in ipairs(indices) do
    if rank > 2 then lines[#lines + 1] = index and "(" .. table.concat(index, ",") .. ",:,:)" or "..." end
    for _, row in ipairs(index and rows or {}) do
      local cells = {}
      for c, column in ipairs(columns) do
        if column == 0 then
          cells[c] = "..."
        else
          local text = row == 0 and "..." or text_of(element(t, index, row, column))
          cells[c] = string.format("%" .. width .. "s", text)
        end
      end
      lines[#lines + 1] = line_of(cells)
    end
  end
  return lines
end

function tensor.metatable.__tostring(t)
  if not t.handle then return "a tensor that was freed" end
  local count = t:numel()
  if count == 0 then return header(t) .. "\n  (empty)" end
  local rank = t:dim()
  if rank == 0 then
    local value = t:item()
    return header(t) .. "\n  " .. format_for({value})(value)
  end
  local edge = count > WHOLE and EDGE or math.huge
  local body = rank == 1 and vector_lines(t, edge) or matrix_lines(t, edge)
  return table.concat({header(t), statistics(t), unpack(body)}, "\n")
end

--- A heat map of a matrix in the tensor, in the terminal or a PNG file: see `safeattn.draw.tensor`.
function tensor.methods.heat(t, options)
  return require("safeattn.draw").tensor(t, options)
end
