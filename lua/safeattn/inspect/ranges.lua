--- sets of positions as short text: "3-7, 12"

local M = {}

-- More runs than this are cut.
local MOST = 8

--- "3-7, 12 and 4 more runs" of a rising list of positions; "none" when it is empty.
function M.text(positions)
  local runs = {}
  for _, place in ipairs(positions) do
    local last = runs[#runs]
    if last and last[2] == place - 1 then last[2] = place else runs[#runs + 1] = {place, place} end
  end
  local parts = {}
  for n = 1, math.min(#runs, MOST) do
    parts[n] = runs[n][1] == runs[n][2] and tostring(runs[n][1]) or runs[n][1] .. "-" .. runs[n][2]
  end
  if #runs == 0 then return "none" end
  return table.concat(parts, ", ") .. (#runs > MOST and string.format(" and %d more runs", #runs - MOST) or "")
end

--- "row 3", "rows 3-7".
function M.named(noun, positions)
  return noun .. (#positions == 1 and " " or "s ") .. M.text(positions)
end

return M
