--- NaN and Inf: which inputs hold them, who sees those, what they reach, and what caused those in the results

local sdpa = require "safeattn.sdpa"
local Problem = require "safeattn.inspect.problem"
local ranges = require "safeattn.inspect.ranges"
local row = require "safeattn.inspect.row"

local M = {}

local INF = math.huge

-- With more findings than this the columns are no longer told apart.
local MOST = 64

-- Finding them

local function kind_of(nan, plus, minus)
  if nan and (plus or minus) then return "NaN and Inf" end
  if nan then return "NaN" end
  if plus and minus then return "+Inf and -Inf" end
  return plus and "+Inf" or "-Inf"
end

-- The columns of a row that are not finite, and what they hold; nil when all are finite.
local function look_at(values, at, width, minus_is_fine)
  local columns, nan, plus, minus
  for d = 0, width - 1 do
    local x = values[at + d]
    if x - x ~= 0 and not (minus_is_fine and x == -INF) then
      columns = columns or {}
      columns[#columns + 1] = d + 1
      nan, plus, minus = nan or x ~= x, plus or x == INF, minus or x == -INF
    end
  end
  return columns, columns and kind_of(nan, plus, minus)
end

-- Calls found(b, h, place, columns, kind) for every row of t [B,H,n,width] with something that is not finite.
local function each_row(t, minus_is_fine, found)
  local stats = t:stats()
  if stats.nan + stats.posinf + (minus_is_fine and 0 or stats.neginf) == 0 then return end
  local B, H, n, width = unpack(t.shape)
  for b = 1, B do
    for h = 1, H do
      local copy = Problem.wide(t:select(1, b):select(1, h))
      local values = copy:data()
      for place = 1, n do
        local columns, kind = look_at(values, (place - 1) * width, width, minus_is_fine)
        if columns then found(b, h, place, columns, kind) end
      end
      copy:free()
    end
  end
end

local function columns_text(columns, width)
  return #columns == width and ":" or ranges.text(columns)
end

-- What is not finite in t, rows of a head with the same columns and kind together: a list of
-- {tensor, b, h, places, columns, kind, where}.
local function findings(name, t, minus_is_fine, coarse)
  local list, known = {}, {}
  local width = t:size(4)
  each_row(t, minus_is_fine, function(b, h, place, columns, kind)
    local text = coarse and "some" or columns_text(columns, width)
    local key = table.concat({b, h, text, coarse and "" or kind}, "|")
    local finding = known[key]
    if not finding then
      finding = {tensor = name, b = b, h = h, places = {}, columns = text, kind = coarse and "not finite" or kind}
      known[key] = finding
      list[#list + 1] = finding
    end
    finding.places[#finding.places + 1] = place
  end)
  if #list > MOST and not coarse then return findings(name, t, minus_is_fine, true) end
  return list
end

-- What stands in the brackets: the dims that the tensor has, of batch, head, place and column.
local function name_place(finding, dims)
  local places = ranges.text(finding.places)
  if places:find "," or places:find " " then places = "{" .. places .. "}" end
  local index = {finding.b, finding.h, places, finding.columns}
  local shown = {}
  for _, dim in ipairs(dims) do shown[#shown + 1] = index[dim] end
  finding.where = finding.tensor .. "[" .. table.concat(shown, ",") .. "]"
end

local no_column, of_head = {1, 2, 3}, {2}

local function last_dims(rank)
  local dims = {}
  for dim = 5 - rank, 4 do dims[#dims + 1] = dim end
  return dims
end

-- Who sees a finding

local function any_visible(p, b, h, i, places)
  for _, j in ipairs(places) do
    if p:sees(b, h, i, j) then return true end
  end
  return false
end

local from_keys = {K = true, V = true}
local of_a_head = {sinks = true, alibi = true}

-- Whether rows of (b, h) could read a finding, if the mask let them.
local function concerns(p, finding, b, h)
  local name = finding.tensor
  if name == "bias" then
    return (finding.shape[1] == 1 or b == finding.b) and (finding.shape[2] == 1 or h == finding.h)
  elseif of_a_head[name] then
    return h == finding.h
  end
  return b == finding.b and finding.h == (from_keys[name] and p:key_head(h) or h)
end

-- Whether row i does.
local function reads(p, finding, b, h, i)
  local name = finding.tensor
  if from_keys[name] then
    return any_visible(p, b, h, i, finding.places)
  elseif name == "bias" then
    return (finding.shape[3] == 1 or finding.has[i] == true) and any_visible(p, b, h, i, finding.keys)
  end
  return (of_a_head[name] or finding.has[i] == true) and p:is_live(b, h, i)
end

-- Sets `heads`, the rows that read a finding, a list of {b, h, rows}; `reads`, the same to look up; and `hidden`, how
-- many rows of the heads concerned do not.
local function find_rows(p, finding)
  finding.heads, finding.hidden, finding.reads, finding.has = {}, 0, {}, {}
  for _, place in ipairs(finding.places) do finding.has[place] = true end
  for b = 1, p.B do
    for h = 1, p.H do
      local rows, has = {}, {}
      for i = 1, concerns(p, finding, b, h) and p.L or 0 do
        if reads(p, finding, b, h, i) then
          rows[#rows + 1] = i
          has[i] = true
        else
          finding.hidden = finding.hidden + 1
        end
      end
      finding.reads[(b - 1) * p.H + h] = has
      if #rows > 0 then finding.heads[#finding.heads + 1] = {b = b, h = h, rows = rows} end
    end
  end
end

-- The inputs

-- Columns of a bias are keys, so its findings are kept apart by key.
local function bias_findings(p, t)
  local list = findings("bias", t, true)
  for _, finding in ipairs(list) do
    finding.shape, finding.keys = t.shape, {}
    local seen = {}
    each_row(t:narrow(1, finding.b, 1):narrow(2, finding.h, 1), true, function(_, _, place, columns)
      for _, known in ipairs(finding.places) do
        if known == place then
          for _, j in ipairs(columns) do seen[j] = true end
        end
      end
    end)
    for j = 1, p.S do
      if seen[t.shape[4] > 1 and j or 1] then finding.keys[#finding.keys + 1] = j end
    end
  end
  return list
end

local function sources_of(p)
  local sources = {}
  local function add(list, dims)
    for _, finding in ipairs(list) do
      name_place(finding, dims)
      find_rows(p, finding)
      sources[#sources + 1] = finding
    end
  end
  local dims = last_dims(p.rank)
  add(findings("Q", p.q), dims)
  add(findings("K", p.k), dims)
  add(findings("V", p.v), dims)
  local bias = p.options.bias
  if bias then add(bias_findings(p, Problem.with_four_dims(bias)), last_dims(bias:dim())) end
  for _, name in ipairs {"sinks", "alibi"} do
    local t = p.options[name]
    -- A sink of -inf is no sink.
    if t then add(findings(name, t:expand(1, 1, 1, p.H):transpose(2, 4), name == "sinks"), of_head) end
  end
  if p.dout then add(findings("dout", p.dout), dims) end
  return sources
end

-- The results

-- What attention gives for these inputs, as the options ask for it.
local function results_of(p)
  local options = {}
  for name, value in pairs(p.options) do options[name] = value end
  local run = sdpa.forward(p.given.q, p.given.k, p.given.v, options)
  local results = {{"out", run.out}, {"lse", run.lse}}
  if p.given.dout then
    local g = run:backward(p.given.dout)
    for _, name in ipairs {"dq", "dk", "dv", "dbias", "dsinks", "dalibi"} do
      if g[name] then results[#results + 1] = {name, g[name]} end
    end
  end
  return results, run.kernel
end

-- Results, each with four dims, and the dims that are named.
local function result_findings(p)
  local list = {}
  local results, kernel = results_of(p)
  for _, result in ipairs(results) do
    local name, t = unpack(result)
    local dims = name == "lse" and no_column or last_dims(t:dim())
    local found
    if name == "lse" then
      local shape = t.shape
      while #shape < 3 do table.insert(shape, 1, 1) end
      t = t:expand(unpack(shape)):view(shape[1], shape[2], shape[3], 1)
      found = findings(name, t)
      if p.rank < 4 then dims = {unpack(no_column, 5 - p.rank)} end
    elseif name == "dsinks" or name == "dalibi" then
      dims = of_head
      found = findings(name, t:expand(1, 1, 1, p.H):transpose(2, 4))
    else
      found = findings(name, Problem.with_four_dims(t))
    end
    for _, finding in ipairs(found) do
      finding.shape = name == "dbias" and Problem.with_four_dims(t).shape or nil
      finding.dims = dims
      list[#list + 1] = finding
    end
  end
  return list, kernel
end

-- An lse of -inf is what a dead row has.
local function without_dead_rows(p, list)
  local kept = {}
  for _, finding in ipairs(list) do
    if finding.tensor == "lse" and finding.kind == "-Inf" then
      local places = {}
      for _, i in ipairs(finding.places) do
        if p:is_live(finding.b, finding.h, i) then places[#places + 1] = i end
      end
      finding.places = places
    end
    if #finding.places > 0 then
      name_place(finding, finding.dims)
      kept[#kept + 1] = finding
    end
  end
  return kept
end

local of_rows = {out = true, lse = true, dq = true}

-- What no path of the formulas leads to.
local apart = {V = {lse = true, dv = true}, dout = {out = true, lse = true}}

-- Whether a source is read by a row that a place of a result comes from.
local function touches(p, source, result, place)
  if apart[source.tensor] and apart[source.tensor][result.tensor] then return false end
  if of_rows[result.tensor] then return source.reads[(result.b - 1) * p.H + result.h][place] == true end
  for _, head in ipairs(source.heads) do
    if result.tensor == "dk" or result.tensor == "dv" then
      if head.b == result.b and p:key_head(head.h) == result.h then
        for _, i in ipairs(head.rows) do
          if p:sees(head.b, head.h, i, place) then return true end
        end
      end
    elseif result.tensor == "dbias" then
      local shape = result.shape
      if (shape[1] == 1 or head.b == result.b) and (shape[2] == 1 or head.h == result.h) then
        for _, i in ipairs(head.rows) do
          if shape[3] == 1 or i == place then return true end
        end
      end
    elseif head.h == result.h then
      return true
    end
  end
  return false
end

local LARGEST = {f16 = 65504, bf16 = 3.3895313892515355e38, f32 = 3.4028234663852886e38, f64 = 1.7976931348623157e308}

local function largest(list)
  local most = 0
  for _, x in ipairs(list) do
    if x ~= x then return INF end
    most = math.max(most, math.abs(x))
  end
  return most
end

-- What a result is due to that no input explains: its row, recomputed in f64.
local function overflow(p, result, place)
  if not of_rows[result.tensor] then
    return "no input is to blame: a sum overflowed, or a gradient that came with it"
  end
  local found, dtype = row.row(p, result.b, result.h, place), p.given.q.dtype
  local score, value = largest(found.scores), largest(result.tensor == "dq" and found.dq or found.out)
  if score > LARGEST.f32 then
    return string.format("no input is to blame: its scores overflow (the largest is %.3g)", score)
  elseif value > LARGEST[dtype] then
    return string.format("no input is to blame: %.3g is more than %s holds", value, dtype)
  end
  return "no input is to blame: in f64 the definition gives finite numbers here"
end

-- Sets `causes` of each result, splitting it by them, and `reached` of each source.
local function link(p, sources, results)
  local list = {}
  for _, result in ipairs(results) do
    local groups = {}
    for _, place in ipairs(result.places) do
      local causes, key = {}, {}
      for n, source in ipairs(sources) do
        if touches(p, source, result, place) then
          causes[#causes + 1], key[#key + 1] = source, n
        end
      end
      key = table.concat(key, ",")
      local group = groups[key]
      if not group then
        group = {tensor = result.tensor, b = result.b, h = result.h, places = {}, columns = result.columns,
          kind = result.kind, causes = causes, dims = result.dims}
        groups[key] = group
        list[#list + 1] = group
      end
      group.places[#group.places + 1] = place
    end
  end
  for _, group in ipairs(list) do
    name_place(group, group.dims)
    for _, source in ipairs(group.causes) do
      source.reached = source.reached or {}
      source.reached[#source.reached + 1] = group
    end
    if #group.causes == 0 then group.overflow = overflow(p, group, group.places[1]) end
  end
  return list
end

-- Text

local function head_text(p, head)
  local text = ranges.named("row", head.rows)
  if p.B > 1 then return string.format("%s of batch %d, head %d", text, head.b, head.h) end
  return p.H > 1 and text .. " of head " .. head.h or text
end

local function source_text(p, source)
  local seen = {}
  for n, head in ipairs(source.heads) do seen[n] = head_text(p, head) end
  local text = source.where .. " is " .. source.kind .. "; "
    .. (#seen > 0 and "seen by " .. table.concat(seen, ", ") or "seen by no row")
  if source.hidden > 0 then
    text = text .. string.format("; hidden from %d row%s", source.hidden, source.hidden == 1 and "" or "s")
  end
  local reached, tensors, order = {}, {}, {}
  for _, group in ipairs(source.reached or {}) do
    if not tensors[group.tensor] then order[#order + 1] = group.tensor end
    tensors[group.tensor] = true
  end
  for n, tensor in ipairs(order) do reached[n] = tensor end
  return text .. "; reaches " .. (#reached > 0 and table.concat(reached, ", ") or "nothing")
end

local function result_text(result)
  local names = {}
  for n, cause in ipairs(result.causes) do names[n] = cause.where end
  return string.format("%s is %s; %s", result.where, result.kind,
    #names > 0 and "from " .. table.concat(names, ", ") or result.overflow)
end

local Trace = {}
Trace.__index = Trace
Trace.__describe = function() return "a trace of non-finite numbers" end

function Trace.__tostring(trace)
  if trace.clean then return "everything is finite: " .. table.concat(trace.looked_at, ", ") end
  local lines = {}
  for _, source in ipairs(trace.inputs) do lines[#lines + 1] = source.text end
  if #trace.inputs == 0 then lines[1] = "all inputs are finite" end
  for _, result in ipairs(trace.results) do lines[#lines + 1] = "  " .. result.text end
  if #trace.results == 0 then lines[#lines + 1] = "  all results are finite" end
  return table.concat(lines, "\n")
end

--- Traces NaN and Inf of the inputs to the results that they reach, and those of the results back. Results are what
-- attention gives under the options of the look; who sees what follows from the mask.
-- @return a trace: `clean`; `inputs`, a list of {tensor, b, h, places, columns, kind, where, heads = {{b, h, rows}},
-- hidden, reached}; `results`, a list of {tensor, b, h, places, columns, kind, where, causes, overflow}, where overflow
-- says what happened when no input is the cause; both with `text`. Prints as those texts
function M.trace(p)
  local sources = sources_of(p)
  local found, kernel = result_findings(p)
  local results = link(p, sources, without_dead_rows(p, found))
  for _, source in ipairs(sources) do source.text = source_text(p, source) end
  for _, result in ipairs(results) do result.text = result_text(result) end
  local looked_at = {"Q", "K", "V"}
  for _, name in ipairs {"bias", "sinks", "alibi"} do
    if p.options[name] then looked_at[#looked_at + 1] = name end
  end
  for _, name in ipairs(p.dout and {"dout", "out", "lse", "dq", "dk", "dv"} or {"out", "lse"}) do
    looked_at[#looked_at + 1] = name
  end
  return setmetatable({clean = #sources == 0 and #results == 0, inputs = sources, results = results, kernel = kernel,
    looked_at = looked_at}, Trace)
end

return M
