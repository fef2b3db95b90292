--- colour maps, computed in OKLab, whose distances are those that people see; and what stands for what is not a number

local core = require "safeattn.core"

local M = {}

-- Colours in a map.
M.STEPS = 256

local function encoded(linear)
  local x = linear <= 0.0031308 and 12.92 * linear or 1.055 * linear ^ (1 / 2.4) - 0.055
  return math.floor(255 * x + 0.5)
end

-- Linear sRGB of lightness, chroma and hue (degrees); the matrices define OKLab.
local function linear_rgb(lightness, chroma, hue)
  local a, b = chroma * math.cos(math.rad(hue)), chroma * math.sin(math.rad(hue))
  local l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ^ 3
  local m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ^ 3
  local s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ^ 3
  return 4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s
end

local function displayable(...)
  for n = 1, 3 do
    local x = select(n, ...)
    if x < -1e-6 or x > 1 + 1e-6 then return false end
  end
  return true
end

-- What a screen cannot show loses chroma, so that lightness, which carries the value, stays.
local function rgb(lightness, chroma, hue)
  local low, high = 0, chroma
  if displayable(linear_rgb(lightness, chroma, hue)) then low = chroma end
  while high - low > 1e-4 do
    local middle = (low + high) / 2
    if displayable(linear_rgb(lightness, middle, hue)) then low = middle else high = middle end
  end
  local r, g, b = linear_rgb(lightness, low, hue)
  local function shown(x) return encoded(math.min(1, math.max(0, x))) end
  return {shown(r), shown(g), shown(b)}
end

-- Each map is a function of x in [0, 1]. Hues run along blue and yellow, the axis that most colour-blind people see,
-- and lightness alone orders the values.
local formulas = {}

--- Dark blue, over green, to light yellow: for values of one sign.
function formulas.sequential(x)
  return rgb(0.22 + 0.74 * x, 0.10 + 0.06 * math.sin(math.pi * x), 285 - 180 * x)
end

--- Blue, white, orange: for values around 0.
function formulas.diverging(x)
  local distance = math.abs(2 * x - 1)
  return rgb(0.97 - 0.50 * distance, 0.17 * distance, x < 0.5 and 255 or 55)
end

--- Black to white.
function formulas.grey(x)
  return rgb(0.1 + 0.88 * x, 0, 0)
end

local made = {}

--- A colour map: a list of STEPS {red, green, blue}, 0 to 255.
function M.map(fname, name)
  local formula = formulas[name]
    or core.fail(fname, "map: got %s, wanted %s", core.describe(name), core.alternatives(formulas))
  if not made[name] then
    local map = {}
    for n = 1, M.STEPS do map[n] = formula((n - 1) / (M.STEPS - 1)) end
    made[name] = map
  end
  return made[name]
end

-- The colours of cells that hold no number worth a place on the map, and of the mark beside dead rows and keys.
M.special = {
  masked = {38, 38, 42}, zero = {104, 104, 108}, ["nan"] = {255, 0, 255}, posinf = {0, 230, 90},
  neginf = {0, 190, 255}, dead = {235, 40, 40},
}

return M
