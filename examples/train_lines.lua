-- a small attention language model, trained on the lines of a real text in which dead rows really occur
--
-- Character by character, a line is predicted from its own beginning and from the line above it. Lines are ragged, so
-- batches are padded, and a text has empty lines, so there are queries that see no key at all:
--   * every query of an empty line, in the attention of a line to itself;
--   * every query of a line below an empty one, in the attention to the line above: real characters with a real loss.
-- First the same training step is taken under the three answers that a softmax can give about such rows, then the model
-- is trained with sa.sdpa.
--
--   luajit examples/train_lines.lua [steps [a text file]]
local sa = require "safeattn"
local device = os.getenv "DEVICE" or "cpu"

local steps, batch_size, rate = tonumber(arg[1]) or 600, 8, 6e-3
local width, heads, layers, longest = 64, 4, 2, 96
math.randomseed(1)

-- The text ------------------------------------------------------------------------------------------------------------

local function read_lines()
  local here = arg[0]:match("^(.*)/") or "."
  for _, path in ipairs {arg[2] or "/usr/share/common-licenses/GPL-3", here .. "/text.txt"} do
    local file = io.open(path, "rb")
    local text = file and file:read("*a") -- nil for a directory
    if file then file:close() end
    if text and text:find("%S") then
      local lines = {}
      for line in text:gsub("\r\n?", "\n"):gsub("\n*$", "\n"):gmatch("(.-)\n") do
        lines[#lines + 1] = line:gsub("%s+$", ""):sub(1, longest)
      end
      return lines, path
    end
  end
  error("train_lines: found no text to read", 0)
end

local lines, path = read_lines()

-- Characters are bytes, numbered from 1 in their order; the end of a line is one of them.
local END = "\n"
local id_of, char_of = {}, {}
do
  local seen = {[END] = true}
  for _, line in ipairs(lines) do
    for char in line:gmatch(".") do seen[char] = true end
  end
  for char in pairs(seen) do char_of[#char_of + 1] = char end
  table.sort(char_of)
  for id, char in ipairs(char_of) do id_of[char] = id end
end
local vocabulary, NO_TARGET = #char_of, 0

-- Batches -------------------------------------------------------------------------------------------------------------

-- i32 [#texts, the longest of their lengths, at least 1] of entry(text, position), and the lengths.
local function padded(texts, entry)
  local rows, lengths, count = {}, {}, 1
  for b, text in ipairs(texts) do
    lengths[b] = #text
    count = math.max(count, #text)
  end
  for b, text in ipairs(texts) do
    rows[b] = {}
    for i = 1, count do rows[b][i] = entry(text, i, b) end
  end
  return sa.tensor(rows, {dtype = "i32", device = device}), lengths
end

local function character(text, i) return i <= #text and id_of[text:sub(i, i)] or id_of[END] end

-- Each character is to predict the next one, the last character the end of the line; padding predicts nothing.
local function target(text, i) return i <= #text and character(text, i + 1) or NO_TARGET end

local function new_batch(here, above)
  local ids, lengths = padded(here, character)
  local ids_above, lengths_above = padded(above, character)
  return {
    ids = ids, ids_above = ids_above, targets = padded(here, target),
    -- The targets that remain when the rows with nothing above them are cut out of the loss.
    targets_cut = padded(here, function(text, i, b) return #above[b] > 0 and target(text, i) or NO_TARGET end),
    mask = sa.mask.padding(lengths) * sa.mask.causal(),
    mask_above = sa.mask.padding(lengths_above),
  }
end

-- The n-th line and the line above it; nothing is above the first.
local function batch_of(numbers)
  local here, above = {}, {}
  for b, n in ipairs(numbers) do here[b], above[b] = lines[n], lines[n - 1] or "" end
  return new_batch(here, above), here, above
end

local deck = {}
local function deal() -- every line once, in random order, then again
  local numbers = {}
  while #numbers < batch_size do
    if #deck == 0 then
      for n = 1, #lines do table.insert(deck, math.random(#deck + 1), n) end
    end
    numbers[#numbers + 1] = table.remove(deck)
  end
  return numbers
end

-- The model -----------------------------------------------------------------------------------------------------------

local parameters, names = {}, {}

local function parameter(name, t)
  t.requires_grad = true
  parameters[#parameters + 1], names[#names + 1] = t, name
  return t
end

local function matrix(name, rows, columns, size)
  local drawn = assert(sa.randn({rows, columns}, {seed = #parameters + 1, device = device}))
  return parameter(name, drawn * (size or rows ^ -0.5))
end

local function norm(name) return parameter(name .. ".norm", sa.ones({width}, {device = device})) end

local function new_attention(name)
  return {
    norm = norm(name), query = matrix(name .. ".query", width, width), key = matrix(name .. ".key", width, width),
    value = matrix(name .. ".value", width, width), out = matrix(name .. ".out", width, width),
  }
end

local model = {embedding = matrix("embedding", vocabulary, width), position = matrix("position", longest, width)}
for i = 1, layers do
  model[i] = {
    itself = new_attention(i .. ".itself"), above = new_attention(i .. ".above"),
    norm = norm(i), rise = matrix(i .. ".rise", width, 4 * width), fall = matrix(i .. ".fall", 4 * width, width),
  }
end
-- The output starts small, so that the model starts with knowing nothing.
model.norm, model.out = norm "last", matrix("out", width, vocabulary, 0.01)

-- Within a line a head prefers what is near, each by its own slope: the model need not learn first what "before" is.
local function nearness(length)
  local here = sa.arange(length, {device = device})
  local apart = (here:view(length, 1) - here:view(1, length)):abs()
  local slopes = {}
  for head = 1, heads do slopes[head] = -2 ^ (3 - 2 * head) end
  return apart * sa.tensor(slopes, {device = device}):view(heads, 1, 1)
end

-- The three answers, composed from products and a softmax as one would without a fused attention.
local function composed(q, k, v, mask, bias, dead_rows)
  local hidden = (-mask):dense {B = q:size(1), H = 1, L = q:size(3), S = k:size(3)}:to(device)
  local scores = sa.matmul(q, k:transpose(-1, -2)) * q:size(4) ^ -0.5
  if bias then scores = scores + bias end
  return sa.matmul(sa.softmax(sa.masked_fill(scores, hidden, -math.huge), {dead_rows = dead_rows}), v)
end

local function attend(weights, x, source, mask, bias, stance)
  local batch, length = x:size(1), x:size(2)
  local function split(t, projection)
    return sa.matmul(t, projection):view(batch, t:size(2), heads, width / heads):transpose(2, 3)
  end
  local q, k, v = split(x, weights.query), split(source, weights.key), split(source, weights.value)
  local out
  if stance == "sa.sdpa" then
    out = sa.sdpa(q, k, v, {mask = mask, bias = bias})
  else
    out = composed(q, k, v, mask, bias, stance)
  end
  return sa.matmul(out:transpose(2, 3):contiguous():view(batch, length, width), weights.out)
end

local function embed(ids)
  return sa.embedding(model.embedding, ids) + model.position:narrow(1, 1, ids:size(2))
end

local function logits_of(batch, stance)
  local x, above, near = embed(batch.ids), embed(batch.ids_above), nearness(batch.ids:size(2))
  for _, layer in ipairs(model) do
    local normed = sa.layernorm(x, layer.itself.norm)
    x = x + attend(layer.itself, normed, normed, batch.mask, near, stance)
    x = x + attend(layer.above, sa.layernorm(x, layer.above.norm), above, batch.mask_above, nil, stance)
    x = x + sa.matmul(sa.gelu(sa.matmul(sa.layernorm(x, layer.norm), layer.rise)), layer.fall)
  end
  return sa.matmul(sa.layernorm(x, model.norm), model.out)
end

local function loss_of(batch, stance, targets)
  return sa.cross_entropy(logits_of(batch, stance), targets or batch.targets, {ignore = NO_TARGET})
end

-- One step under the three stances ------------------------------------------------------------------------------------

local function gradients_under(batch, stance, targets)
  for _, t in ipairs(parameters) do t.grad = nil end
  local loss = loss_of(batch, stance, targets)
  loss:backward()
  local gradients, nan, count = {}, 0, 0
  for i, t in ipairs(parameters) do
    gradients[i] = t.grad
    t.grad = nil
    nan, count = nan + gradients[i]:stats().nan, count + t:numel()
  end
  return {loss = loss:item(), nan = nan, count = count, unpack(gradients)}
end

-- The largest difference between two sets of gradients, as a part of the largest gradient.
local function distance(a, b)
  local difference, largest = 0, 0
  for i = 1, #parameters do
    difference = math.max((a[i] - b[i]):abs():max():item(), difference)
    largest = math.max(b[i]:abs():max():item(), largest)
  end
  return difference / largest
end

local function compare(batch, title, targets)
  print("\n" .. title)
  print(("  %-9s %9s   %-24s %s"):format("dead rows", "loss", "NaN in the gradients", "differs from sa.sdpa's by"))
  local fused = gradients_under(batch, "sa.sdpa", targets)
  local of_nan
  for _, stance in ipairs {"nan", "uniform", "zero", "sa.sdpa"} do
    local result = stance == "sa.sdpa" and fused or gradients_under(batch, stance, targets)
    print(("  %-9s %9.4f   %-24s %s"):format(stance, result.loss, ("%d of %d"):format(result.nan, result.count),
      result.nan > 0 and "-" or result == fused and "" or ("%.1e"):format(distance(result, fused))))
    if stance == "nan" then of_nan = result end
  end
  return of_nan
end

-- Takes the first batch in which a line is empty and another has nothing above it.
local function first_batch_with_dead_rows()
  for _ = 1, #lines do
    local batch, here, above = batch_of(deal())
    local empty, bare = 0, 0
    for b = 1, batch_size do
      if #here[b] == 0 then empty = empty + 1 elseif #above[b] == 0 then bare = bare + 1 end
    end
    if empty > 0 and bare > 0 then return batch, empty, bare end
  end
end

local function show_stances()
  local batch, empty, bare = first_batch_with_dead_rows()
  if not batch then return print("this text has no empty lines, and so no dead rows to show") end
  local length = batch.ids:size(2)
  print(("a batch of %d lines, %d of them empty and %d below an empty one, padded to %d:"):format(batch_size, empty,
    bare, length))
  for _, name in ipairs {"mask", "mask_above"} do
    local keys = name == "mask" and length or batch.ids_above:size(2)
    local dead = #batch[name]:dead_rows {B = batch_size, H = 1, L = length, S = keys}
    print(("  %-46s %d of %d queries see nothing"):format(tostring(batch[name]), dead, batch_size * length))
  end
  compare(batch, "one training step, the loss over every character")
  local of_nan = compare(batch, "the same, the characters below an empty line cut out of the loss", batch.targets_cut)
  local parts = {}
  for i, name in ipairs(names) do
    parts[i] = ("%s %d/%d"):format(name, of_nan[i]:stats().nan, of_nan[i]:numel())
  end
  print("\nNaN in the gradient of each weight, with \"nan\", although nothing that is NaN is in the loss:")
  print("  " .. table.concat(parts, ", "):gsub("(" .. ("."):rep(90) .. "[^,]*,) ", "%1\n  "))
end

-- Training and writing ------------------------------------------------------------------------------------------------

local function train()
  local optimizer = sa.adamw(parameters, {lr = rate, weight_decay = 0.01})
  print(("\ntraining %d steps with sa.sdpa; a model that knows nothing has a loss of ln %d = %.3f"):format(steps,
    vocabulary, math.log(vocabulary)))
  local start, sum, count = os.time(), 0, 0
  for step = 1, steps do
    -- up over the first steps, steady for a while, then down to the end
    optimizer.lr = rate * math.min(step / 20, (steps - step + 1) / steps * 1.25, 1)
    local loss = loss_of(batch_of(deal()), "sa.sdpa")
    optimizer:zero_grad()
    loss:backward()
    optimizer:step()
    sum, count = sum + loss:item(), count + 1
    if step == 1 or step % 50 == 0 or step == steps then
      print(("  step %4d   loss %.3f   %2d s"):format(step, sum / count, os.time() - start))
      io.flush()
      sum, count = 0, 0
    end
  end
end

-- A character drawn from the logits of the last position, sharpened.
local function draw(logits)
  local weights = sa.softmax(logits:select(1, 1):select(1, logits:size(2)) * 2)
  local at = math.random()
  for id = 1, vocabulary do
    at = at - weights:get(id)
    if at < 0 then return char_of[id] end
  end
  return END
end

-- A line below `above`, which may be empty: then the attention to the line above has nothing but dead rows.
local function write_line(above)
  local first
  repeat first = lines[math.random(#lines)]:sub(1, 1) until first ~= "" -- the model continues lines, it begins none
  local line = first
  while #line < longest do
    local char = draw(logits_of(new_batch({line}, {above}), "sa.sdpa"))
    if char == END then break end
    line = line .. char
  end
  return line
end

print(("%s: %d lines, %d different characters"):format(path, #lines, vocabulary))
show_stances()
train()
print("\na few lines of its own:")
sa.no_grad(function()
  local line = ""
  for _ = 1, 5 do
    line = write_line(line)
    print("  " .. line)
  end
end)
