--- why a query sees no key, or no query sees a key: which parts of the mask leave it nothing

local ranges = require "safeattn.inspect.ranges"

local M = {}

-- Of an expression with more factors than this only those are named that leave nothing by themselves.
local MOST_FACTORS = 12

-- What is asked of rows and of keys.
local rows = {of_keys = false, place = "i", noun = "query", plural = "queries",
  nothing = "there are no keys",
  one = "%s shows it no key", many = "%s have no key in common for it"}
local keys = {of_keys = true, place = "j", noun = "key", plural = "keys",
  nothing = "there are no queries",
  one = "%s shows it to no query", many = "%s show it to no query in common"}

-- The operands of a chain of `*` and `-` (a - b is a * -b), in order; the mask itself when it is none.
local function factors_of(given)
  local list, stack = {}, {given}
  while #stack > 0 do
    local mask = table.remove(stack)
    if mask.symbol == "*" or mask.symbol == "-" then
      local a, b = mask.operands[1], mask.operands[2]
      if mask.symbol == "-" then b = -b end
      stack[#stack + 1], stack[#stack + 2] = b, a
    else
      list[#list + 1] = {mask = mask, text = tostring(mask)}
    end
  end
  return list
end

local function product(factors)
  local all
  for _, factor in ipairs(factors) do all = all and all * factor.mask or factor.mask end
  return all
end

-- Combinations of factors recur from row to row: the mask of each is made once.
local function combination(p, factors, chosen)
  local list, name = {}, {}
  for n, factor in ipairs(factors) do
    if chosen[n] then
      list[#list + 1] = factor
      name[#name + 1] = n
    end
  end
  name = table.concat(name, ",")
  p.combinations = p.combinations or setmetatable({}, {__mode = "k"})
  local of = p.combinations[factors] or {}
  p.combinations[factors] = of
  of[name] = of[name] or product(list)
  return of[name], list
end

local explain

-- A factor that leaves nothing by itself: of a sum all terms do, and the text says by what.
local function single(p, axis, factor, b, h, place)
  local mask = factor.mask
  if mask.symbol ~= "+" then return {factor.text} end
  factor.terms = factor.terms or {factors_of(mask.operands[1]), factors_of(mask.operands[2])}
  local list = {}
  for _, term in ipairs(factor.terms) do
    for _, text in ipairs(explain(p, axis, term, b, h, place)) do list[#list + 1] = text end
  end
  return list
end

-- The texts of a smallest set of factors that leaves (b, h, place) nothing.
function explain(p, axis, factors, b, h, place)
  for _, factor in ipairs(factors) do
    if p:emptiness(factor.mask, axis.of_keys)(b, h, place) then return single(p, axis, factor, b, h, place) end
  end
  local chosen, texts = {}, {}
  for n = 1, #factors do chosen[n] = true end
  if #factors <= MOST_FACTORS then
    for n = #factors, 1, -1 do
      chosen[n] = false
      local mask = combination(p, factors, chosen)
      if not mask or not p:emptiness(mask, axis.of_keys)(b, h, place) then chosen[n] = true end
    end
  end
  for n, factor in ipairs(factors) do
    if chosen[n] then texts[#texts + 1] = factor.text end
  end
  return texts
end

-- The factors of the whole: those of the mask, then what the other options say.
local function all_factors(p)
  if not p.factors then
    p.factors = {}
    for _, part in ipairs(p.parts) do
      local own = part.mask.symbol and factors_of(part.mask) or {part}
      for _, factor in ipairs(own) do p.factors[#p.factors + 1] = factor end
    end
  end
  return p.factors
end

local function joined(texts)
  local last = texts[#texts]
  return #texts == 1 and last or table.concat(texts, ", ", 1, #texts - 1) .. " and " .. last
end

local function reason(p, axis, b, h, place)
  if (axis == rows and p.S or p.L) == 0 then return {factors = {}, reason = axis.nothing} end
  local texts = explain(p, axis, all_factors(p), b, h, place)
  return {factors = texts, reason = string.format(#texts == 1 and axis.one or axis.many, joined(texts))}
end

--- Why query i is dead: {factors = list of texts, reason = a sentence}.
function M.of_row(p, b, h, i)
  return reason(p, rows, b, h, i)
end

-- Lists

local List = {}
List.__index = List

local function where(entry)
  if not entry.b and not entry.h then return " of every batch and head" end
  if not entry.b then return string.format(" of head %d of every batch", entry.h) end
  if not entry.h then return string.format(" of every head of batch %d", entry.b) end
  return string.format(" of batch %d, head %d", entry.b, entry.h)
end

function List.__describe(list)
  return string.format("a list of %d dead %s", #list, list.axis.plural)
end

function List.__tostring(list)
  local axis = list.axis
  if #list == 0 then return "no dead " .. axis.plural end
  local lines = {string.format("%d dead %s", #list, #list == 1 and axis.noun or axis.plural)}
  local n = 1
  while n <= #list do
    local first, places = list[n], {}
    while n <= #list and list[n].b == first.b and list[n].h == first.h and list[n].reason == first.reason do
      places[#places + 1] = list[n][axis.place]
      n = n + 1
    end
    lines[#lines + 1] = string.format("  %s %s%s: %s", #places == 1 and axis.noun or axis.plural, ranges.text(places),
      where(first), first.reason)
  end
  return table.concat(lines, "\n")
end

local function new_list(axis)
  return setmetatable({axis = axis}, List)
end

-- Equal sentences and lists of factors stand once in memory.
local function shared(found, why)
  found[why.reason] = found[why.reason] or why
  return found[why.reason]
end

-- Lists what is dead of 1 .. size in every batch and head; b or h is nil where the plan says the same of all of them.
-- @param heads query heads, or key heads
-- @param is_dead function(b, h, place)
-- @param why function(b, h, place): what `reason` gives
local function listed(p, axis, heads, size, is_dead, why)
  local list, found, plan = new_list(axis), {}, p:plan(p.mask)
  for b = 1, plan.batch == 1 and math.min(p.B, 1) or p.B do
    for h = 1, plan.heads == 1 and math.min(heads, 1) or heads do
      for place = 1, size do
        if is_dead(b, h, place) then
          local said = shared(found, why(b, h, place))
          list[#list + 1] = {b = (plan.batch > 1 or p.B == 1) and b or nil,
            h = (plan.heads > 1 or heads == 1) and h or nil, [axis.place] = place, reason = said.reason,
            factors = said.factors}
        end
      end
    end
  end
  return list
end

--- The dead rows: a list of {b, h, i, reason, factors}; b or h is nil when the row is dead in all of them alike. Prints
-- as ranges.
function M.dead_rows(p)
  return listed(p, rows, p.H, p.L, p:emptiness(p.mask), function(b, h, i) return reason(p, rows, b, h, i) end)
end

-- A key head is read by several query heads; none of them may see the key.
local function dead_to_all(p, empty, heads, b, h, j)
  for head = (h - 1) * p.group + 1, heads == 1 and (h - 1) * p.group + 1 or h * p.group do
    if not empty(b, head, j) then return false end
  end
  return true
end

local function reason_for_all(p, heads, b, h, j)
  local first = (h - 1) * p.group + 1
  local why = reason(p, keys, b, first, j)
  for head = first + 1, heads == 1 and first or h * p.group do
    local other = reason(p, keys, b, head, j)
    if not why.reason:find(other.reason, 1, true) then
      local factors = {unpack(why.factors)}
      for _, text in ipairs(other.factors) do factors[#factors + 1] = text end
      why = {factors = factors, reason = why.reason .. "; " .. other.reason}
    end
  end
  return why
end

--- The dead keys: a list of {b, h, j, reason, factors}, h a key head, otherwise like dead rows.
function M.dead_keys(p)
  local heads, empty = p:plan(p.mask).heads, p:emptiness(p.mask, true)
  return listed(p, keys, p.Hkv, p.S, function(b, h, j) return dead_to_all(p, empty, heads, b, h, j) end,
    function(b, h, j) return reason_for_all(p, heads, b, h, j) end)
end

return M
