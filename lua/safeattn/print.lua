-- what print shows of a tensor: a header, statistics, and as much of the body as fits

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

-- How to write these numbers with one precision. An exact zero is "0", so that it differs from what rounds to it.
local function formatter(values)
  local integers, most, least = true, 0, math.huge
  for _, value in ipairs(values) do
    if type(value) == "number" and value - value == 0 then
      local size = math.abs(value)
      integers = integers and value % 1 == 0
      most = math.max(most, size)
      if size > 0 then least = math.min(least, size) end
    end
  end
  local pattern = "%.4f"
  if integers and most < 1e10 then
    pattern = "%.0f"
  elseif most >= 1e6 or least < 1e-4 then
    pattern = "%.4e"
  end
  return function(value)
    if type(value) ~= "number" then return (tostring(value):gsub("U?LL$", "")) end
    if value ~= value then return "nan" end
    if value == 0 then return "0" end
    return value - value == 0 and string.format(pattern, value) or tostring(value)
  end
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

local function values_of(t, index, rows, columns)
  local values = {}
  local rank = #index
  for r, row in ipairs(rows) do
    values[r] = {}
    for c, column in ipairs(columns) do
      if row > 0 and column > 0 then
        index[rank + 1], index[rank + 2] = row, column
        values[r][c] = t:get(unpack(index, 1, rank + 2))
      end
    end
  end
  index[rank + 1], index[rank + 2] = nil, nil
  return values
end

-- Lines of one matrix; gaps are columns and rows of "...".
local function matrix_lines(texts, rows, columns, width)
  local lines = {}
  for r, row in ipairs(rows) do
    local cells = {}
    for c, column in ipairs(columns) do
      cells[c] = column == 0 and "..." or string.format("%" .. width .. "s", row == 0 and "..." or texts[r][c])
    end
    lines[#lines + 1] = string.rep(" ", INDENT) .. table.concat(cells, string.rep(" ", GAP))
  end
  return lines
end

-- The body of a view of rank 2 or more; a vector comes as a matrix that is wrapped.
local function body(t, edge, title)
  local shape = t.shape
  local rank = #shape
  local rows, columns = shown(shape[rank - 1], edge), shown(shape[rank], edge)
  local all, blocks = {}, {}
  local indices = slices(shape, rank - 2)
  for s, index in ipairs(indices) do
    if index then
      blocks[s] = values_of(t, index, rows, columns)
      for r = 1, #rows do
        for c = 1, #columns do all[#all + 1] = blocks[s][r][c] end
      end
    end
  end
  local text_of, width = formatter(all), 3
  for _, value in ipairs(all) do width = math.max(width, #text_of(value)) end
  local fitting = math.max(1, math.floor((WIDTH - INDENT + GAP) / (width + GAP)))
  if #columns > fitting then columns = shown(shape[rank], math.max(1, math.floor((fitting - 1) / 2))) end
  local lines = {}
  for _, index in ipairs(indices) do
    if rank > 2 then lines[#lines + 1] = index and title(index) or "..." end
    if index then
      local texts = values_of(t, index, rows, columns)
      for r = 1, #rows do
        for c = 1, #columns do
          if texts[r][c] ~= nil then texts[r][c] = text_of(texts[r][c]) end
        end
      end
      for _, line in ipairs(matrix_lines(texts, rows, columns, width)) do lines[#lines + 1] = line end
    end
  end
  return lines
end

local function vector_lines(t, edge)
  local places = shown(t:size(1), edge)
  local values = {}
  for _, place in ipairs(places) do
    if place > 0 then values[#values + 1] = t:get(place) end
  end
  local text_of, width, cells = formatter(values), 3, {}
  for _, value in ipairs(values) do width = math.max(width, #text_of(value)) end
  for c, place in ipairs(places) do
    cells[c] = place == 0 and "..." or string.format("%" .. width .. "s", text_of(t:get(place)))
  end
  local per_line = math.max(1, math.floor((WIDTH - INDENT + GAP) / (width + GAP)))
  local lines = {}
  for first = 1, #cells, per_line do
    local last = math.min(first + per_line - 1, #cells)
    lines[#lines + 1] = string.rep(" ", INDENT) .. table.concat(cells, string.rep(" ", GAP), first, last)
  end
  return lines
end

local function slice_title(index)
  return "(" .. table.concat(index, ",") .. ",:,:)"
end

function tensor.metatable.__tostring(t)
  if not t.handle then return "a tensor that was freed" end
  local count = t:numel()
  if count == 0 then return header(t) .. "\n  (empty)" end
  local rank = t:dim()
  if rank == 0 then
    local value = t:item()
    return header(t) .. "\n  " .. formatter({value})(value)
  end
  local edge = count > WHOLE and EDGE or math.huge
  local lines = {header(t), statistics(t)}
  for _, line in ipairs(rank == 1 and vector_lines(t, edge) or body(t, edge, slice_title)) do
    lines[#lines + 1] = line
  end
  return table.concat(lines, "\n")
end

return tensor
