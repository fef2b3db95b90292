-- what a softmax can say about a row without a visible entry, and what each answer does to the gradients
--
-- The listings of PyTorch's pull request 131060 (a private _safe_softmax), number for number as far as its inputs are
-- known. Its first row is a random draw, of which the weights are known to four digits; their logarithms (with a fifth
-- digit that makes them sum to 1) stand in for the draw, since softmax does not see a constant that is added to a row.
local sa = require "safeattn"
local device = os.getenv "DEVICE" or "cpu"

local inf, nan = math.huge, 0 / 0

-- "[0.5377, nan]", with as many digits as the pull request prints
local function row_text(t)
  local cells = {}
  for i = 1, t:numel() do
    local x = t:get(i)
    cells[i] = x ~= x and "nan" or (("%.4f"):format(x):gsub("^%-(0%.0000)$", "%1"))
  end
  return "[" .. table.concat(cells, ", ") .. "]"
end

local function title(text) print("\n" .. text .. "\n" .. ("-"):rep(#text)) end

local function matrix(fill)
  local rows = {{}, {fill, fill, fill, fill}}
  for i, weight in ipairs {0.53773, 0.27293, 0.06922, 0.12012} do rows[1][i] = math.log(weight) end
  return assert(sa.tensor(rows, {requires_grad = true, device = device}))
end

title "1. Today's answer is NaN, and slicing it away looks like a way out"
do
  local out = sa.softmax(matrix(-inf), {dead_rows = "nan"})
  print("both rows   ", row_text(out:select(1, 1)), row_text(out:select(1, 2)))
  print("row 1 alone ", row_text(out:select(1, 1)))
end

title "2. It is none: the gradient of the row that nobody used is NaN"
-- The sum of a row's weights is always 1, so its gradient is 0; the pull request shows the rounding, some 1e-8.
for _, stance in ipairs {"nan", "uniform", "zero"} do
  local x = matrix(-inf)
  sa.softmax(x, {dead_rows = stance}):select(1, 1):sum():backward()
  print(("%-12s"):format(stance), row_text(x.grad:select(1, 1)), row_text(x.grad:select(1, 2)))
end

title "3. Where the NaN comes from: a softmax of nothing but -inf is 0/0"
for _, stance in ipairs {"nan", "uniform", "zero"} do
  local row = sa.softmax(sa.full({4}, -inf, {device = device}), {dead_rows = stance})
  print(("%-12s"):format(stance), row_text(row))
end

title "4. A large negative number instead of -inf attends to everything alike"
do
  print("-1e6        ", row_text(sa.softmax(sa.full({4}, -1e6, {device = device}))))
  local x = matrix(-1e6)
  sa.softmax(x):select(1, 1):sum():backward()
  print("gradient    ", row_text(x.grad:select(1, 1)), row_text(x.grad:select(1, 2)))
  print("             finite, as long as everybody remembers to slice")
end

title "5. A NaN that somebody put there stays: only a row without a visible entry is zeroed"
print("zero        ", row_text(sa.softmax(sa.tensor({0.1, 0.2, 0.3, nan}, {device = device}), {dead_rows = "zero"})))
print("zero        ", row_text(sa.softmax(sa.tensor({1, inf, 1, 1}, {device = device}), {dead_rows = "zero"})))

title "6. The same in attention: one shared weight, two queries, the second sees nothing"
-- q = x * w, so a NaN in the second row's gradient reaches w although the loss reads the first row only. The mask is
-- added to the scores, as PyTorch does it.
for _, stance in ipairs {"nan", "uniform", "zero", "sa.sdpa"} do
  local x = sa.tensor({{1, 2}, {3, 4}}, {device = device})
  local w = sa.tensor({0.5, -0.25}, {requires_grad = true, device = device})
  local k = sa.tensor({{1, 0}, {0, 1}}, {device = device})
  local v = sa.tensor({{1, 2}, {3, 5}}, {device = device})
  local visible = sa.tensor({{true, true}, {false, false}}, {device = device})
  local out
  if stance == "sa.sdpa" then
    out = sa.sdpa(x * w, k, v, {mask = visible})
  else
    local scores = sa.matmul(x * w, k:transpose(1, 2)) * (1 / math.sqrt(2))
    local bias = sa.where(visible, sa.zeros({2, 2}, {device = device}), -inf)
    out = sa.matmul(sa.softmax(scores + bias, {dead_rows = stance}), v)
  end
  out:select(1, 1):sum():backward()
  print(("%-12s"):format(stance), "second row", row_text(out:select(1, 2)), "dw", row_text(w.grad))
end
