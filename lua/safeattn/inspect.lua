--- Looking inside one attention: everything is recomputed from the definition, in f64, when it is asked for.
-- `local look = sa.inspect(q, k, v, opts, dout)`. Batches, heads, queries and keys count from 1; inputs of rank 3 and 2
-- have one batch (and one head).
-- @module safeattn.inspect

local core = require "safeattn.core"
local Problem = require "safeattn.inspect.problem"
local row = require "safeattn.inspect.row"
local matrices = require "safeattn.inspect.matrices"
local reasons = require "safeattn.inspect.reasons"

local M = {}

local methods = {}
local Look = {__index = methods}

--- The methods of a look, for modules that draw or write what it finds.
M.methods = methods

--- The problem behind a look: sizes B, H, Hkv, L, S, E, Ev, and what the rooms of this module read.
function M.problem(look, fname)
  if type(look) ~= "table" or getmetatable(look) ~= Look then
    core.fail(fname, "self: got %s, wanted what sa.inspect gave", core.describe(look))
  end
  look.problem:forget()
  return look.problem
end
local problem = M.problem

function Look.__describe(look)
  local p = look.problem
  return string.format("an inspection of B=%d H=%d L=%d S=%d", p.B, p.H, p.L, p.S)
end

function Look.__tostring(look)
  local p = look.problem
  local counts = p:plan(p.mask)
  local all = p.L * p.S * counts.batch * counts.heads
  local texts = {}
  for n, part in ipairs(p.parts) do texts[n] = part.text end
  return string.format("attention B=%d H=%d%s L=%d S=%d E=%d Ev=%d %s; %s: %.3g%% of the pairs visible; %s", p.B, p.H,
    p.Hkv ~= p.H and " Hkv=" .. p.Hkv or "", p.L, p.S, p.E, p.Ev, p.given.q.dtype,
    #texts > 0 and table.concat(texts, ", ") or "no mask", all > 0 and 100 * counts.visible / all or 0,
    p.dout and "with gradients" or "without dout")
end

--- Looks at the attention that sdpa(q, k, v, opts) computes. The tensors are read when something is asked, so change
-- them in place only when you are done looking.
-- @param q as in sdpa
-- @param k
-- @param v
-- @param opts as in sdpa; dropout needs its seed
-- @param dout gradient of the output; without it there is nothing to say of gradients
-- @return a look
function M.inspect(q, k, v, opts, dout)
  return setmetatable({problem = Problem.new("inspect", q, k, v, opts, dout)}, Look)
end

--- One query: see `safeattn.inspect.row`. Prints as a table of its largest contributions.
function methods.row(look, b, h, i)
  local p = problem(look, "inspect():row")
  p:check_place("inspect():row", b, h, i, true)
  return row.row(p, b, h, i)
end

for name, matrix in pairs(matrices) do
  methods[name] = function(look, ...)
    return matrix(problem(look, "inspect():" .. name), ...)
  end
end

--- Queries that see no key: a list of {b, h, i, reason, factors}, where b or h is nil when the row is dead in all of
-- them. `factors` are the parts of the mask and the options that together leave it nothing. Prints as ranges.
function methods.dead_rows(look)
  return reasons.dead_rows(problem(look, "inspect():dead_rows"))
end

--- Keys that no query sees: a list of {b, h, j, reason, factors}; h is a key head.
function methods.dead_keys(look)
  return reasons.dead_keys(problem(look, "inspect():dead_keys"))
end

--- Where the non-finite numbers are, how far they went and where they came from: see `safeattn.inspect.nonfinite`.
function methods.nonfinite(look)
  return require("safeattn.inspect.nonfinite").trace(problem(look, "inspect():nonfinite"))
end

--- Fused against reference, and the three stances on dead rows: see `safeattn.inspect.compare`.
function methods.compare(look)
  return require("safeattn.inspect.compare").compare(problem(look, "inspect():compare"))
end

--- A heat map of one head, in the terminal or a PNG file: see `safeattn.draw.look`.
function methods.heat(look, options)
  return require("safeattn.draw").look(look, problem(look, "inspect():heat"), options)
end

--- A page for a browser, with everything in one file: see `safeattn.report.look`.
function methods.report(look, path, options)
  return require("safeattn.report").look(look, problem(look, "inspect():report"), path, options)
end

return M
