-- the page of a report in headless Chromium; `make test-browser` runs it

local sa = require "safeattn"
local child = require "spec.child"
local chromium = require "spec.browser.chromium"
local m = sa.mask

local folder

-- An attention with everything: grouped heads, a bias with -inf in it, softcap, sinks, ALiBi, dropout, a dead row.
local function everything(dtype)
  local function random(shape, seed) return sa.randn(shape, {seed = seed, dtype = dtype}) end
  local bias = random({1, 4, 11, 13}, 5)
  bias:set(1, 2, 4, 2, -math.huge)
  local v = random({2, 2, 13, 6}, 3)
  v:set(2, 1, 7, 3, 0 / 0)
  local mask = m.causal "bottom-right" * m.fn(function(_, _, i) return i ~= 6 end, {batch = false, heads = false})
  return sa.inspect(random({2, 4, 11, 9}, 1), random({2, 2, 13, 9}, 2), v, {
    mask = mask, bias = bias, softcap = 3, sinks = random({4}, 6), alibi = sa.rand({4}, {seed = 7, dtype = dtype}),
    dropout = 0.2, seed = 9,
  }, random({2, 4, 11, 6}, 4)), {B = 2, H = 4, L = 11, S = 13}
end

local function plain()
  local function random(seed) return sa.randn({1, 3, 40, 16}, {seed = seed}) end
  local ids = {}
  for n = 1, 40 do ids[n] = n < 30 and 1 or 2 end
  return sa.inspect(random(1), random(2), random(3), {mask = m.documents(ids) * m.causal()}, random(4))
end

-- What the page prints of a number, as a number.
local function rounded(x)
  if x ~= x then return "NaN" end
  if math.abs(x) == math.huge then return x > 0 and "+Inf" or "-Inf" end
  return tonumber(string.format("%.5g", x))
end

local function value_of(text, name)
  local shown = text:match("[%s]" .. name .. " ([^,]+)")
  return shown:match "^[%+]?%a" and shown or tonumber(shown)
end

local function page_of(look, name)
  local path = folder .. "/" .. name .. ".html"
  assert.equal(path, look:report(path))
  return path
end

describe("the page of a report", function()
  setup(function() folder = child.command("mktemp -d"):match "%S+" end)
  teardown(function() child.command("rm -rf " .. folder) end)

  it("loads without a word on the console", function()
    assert.equal("", chromium.console(page_of(plain(), "plain")))
    local _, problems = chromium.run(page_of(everything "f32", "all"), "")
    assert.equal("", problems)
  end)

  -- Every pair of f32, every third of a row of the others: a pointer takes milliseconds to move.
  for dtype, step in pairs {f32 = 1, f64 = 3, f16 = 3, bf16 = 3} do
    it("shows the numbers of the tensors under the pointer, " .. dtype, function()
      local look, sizes = everything(dtype)
      local lines, problems = chromium.run(page_of(look, dtype), "const step = " .. step .. [[;
        const look = current();
        for (let b = 0; b < look.B; b++) for (let h = 0; h < look.H; h++) {
          document.querySelectorAll("#heads button")[b * look.H + h].click();
          for (let i = 1; i <= look.L; i++) for (let j = 1; j <= look.S; j += step) {
            say(b + 1, h + 1, i, j, pointAt(i, j));
          }
        }]])
      assert.equal("", problems)
      assert.equal(sizes.B * sizes.H * sizes.L * math.ceil(sizes.S / step), #lines)
      local scores, weights, dscores = look:scores(), look:weights(), look:dscores()
      local visible, nans = 0, 0
      for _, line in ipairs(lines) do
        local b, h, i, j, text = line:match "(%d+)\t(%d+)\t(%d+)\t(%d+)\t(.*)"
        b, h, i, j = tonumber(b), tonumber(h), tonumber(i), tonumber(j)
        assert.equal(string.format("query %d, key %d", i, j), text:match "^[^:]+")
        local score = scores:get(b, h, i, j)
        if score == -math.huge then
          assert.matches(": masked$", text)
        else
          visible = visible + 1
          assert.equal(rounded(score), value_of(text, "score"), line)
          assert.equal(rounded(weights:get(b, h, i, j)), value_of(text, "weight"), line)
          local dS = rounded(dscores:get(b, h, i, j))
          if dS == "NaN" then nans = nans + 1 end
          assert.equal(dS, value_of(text, "dS"), line)
        end
      end
      assert.is_true(visible > 500 / step and nans > 0)
    end)
  end

  it("explores rows by keys, buttons, numbers and the table", function()
    local look = plain()
    local lines, problems = chromium.run(page_of(look, "rows"), [[
      const rowNow = () => $("query").value + "\t" + $("summary").textContent;
      press("ArrowDown"); press("ArrowDown"); press("ArrowRight"); say(state.i, state.j, rowNow());
      press("ArrowUp"); press("ArrowLeft"); press("ArrowLeft"); say(state.i, state.j, rowNow());
      press("End"); press("PageDown"); say(state.i, state.j, rowNow());
      $("back").click(); say(state.i, state.j, rowNow());
      $("query").value = "12"; act($("query"), "change", Event); say(state.i, state.j, rowNow());
      $("query").value = "999"; act($("query"), "change", Event); say(state.i, state.j, rowNow());
      $("query").value = "12"; act($("query"), "change", Event);
      document.querySelectorAll("#keys th button")[2].click();
      for (const tr of document.querySelectorAll("#keys tbody tr")) {
        say(...[...tr.children].map((td) => td.textContent));
      }
      document.querySelector("#keys tbody tr").click(); say(state.j);]], "h=2")
    assert.equal("", problems)
    local function place(n) return {lines[n]:match "(%d+)\t(%d+)\t(%d+)"} end
    assert.same({"2", "1", "3"}, place(1))
    assert.same({"1", "0", "2"}, place(2))
    assert.same({"17", "39", "18"}, place(3))
    assert.same({"16", "39", "17"}, place(4))
    assert.same({"11", "39", "12"}, place(5))
    assert.same({"39", "39", "40"}, place(6))
    local row = look:row(1, 2, 12)
    assert.matches("sees " .. row.count .. " of 40 keys", lines[5], 1, true)
    assert.equal(rounded(row.lse), tonumber(lines[5]:match "LSE ([^,]+)"))
    assert.equal(row.count, #lines - 7)
    local at, before = {}, math.huge
    for n, j in ipairs(row.keys) do at[j] = n end
    for n = 7, #lines - 1 do
      local cells = {}
      for cell in lines[n]:gmatch "[^\t]+" do cells[#cells + 1] = tonumber(cell) end
      local k = at[cells[1]]
      assert.same({rounded(row.scores[k]), rounded(row.weights[k]), rounded(row.to_out[k]), rounded(row.dP[k]),
        rounded(row.dS[k])}, {unpack(cells, 2)})
      assert.is_true(row.weights[k] <= before)
      before = row.weights[k]
    end
    assert.equal(tonumber(lines[7]:match "^%d+") - 1, tonumber(lines[#lines]))
  end)

  it("says why a row is dead", function()
    local look = everything "f32"
    local lines = chromium.run(page_of(look, "dead"), [[
      $("query").value = "6"; act($("query"), "change", Event); say($("summary").textContent);
      say($("deadRowsText").textContent.split("\n").join(" "));]])
    assert.equal("dead: it sees none of 13 keys; " .. look:row(1, 1, 6).reason, lines[1])
    assert.equal((tostring(look:dead_rows()):gsub("\n", " ")), lines[2])
  end)

  it("paints what is masked, NaN and dead in their own colours", function()
    local colours = require "safeattn.draw.colours"
    local look = everything "f32"
    local lines, problems = chromium.run(page_of(look, "colours"), [==[
      for (const show of ["mask", "weights", "scores", "dS"]) {
        document.querySelector(`#shows [value=${show}]`).click();
        const pixels = $("picture").getContext("2d").getImageData(0, 0, 13, 11).data;
        say(show, ...[[6, 1], [1, 13], [5, 7]].map(([i, j]) => [...pixels.slice(((i - 1) * 13 + j - 1) * 4,
          ((i - 1) * 13 + j - 1) * 4 + 3)].join(",")));
      }
      say($("marks").childElementCount);]==], "b=2&h=1")
    assert.equal("", problems)
    local masked, nan = table.concat(colours.special.masked, ","), table.concat(colours.special.nan, ",")
    for n, show in ipairs {"mask", "weights", "scores", "dS"} do
      local name, dead, hidden, poisoned = lines[n]:match "(%S+)\t(%S+)\t(%S+)\t(%S+)"
      assert.same({show, masked, masked}, {name, dead, hidden})
      assert.equal(show == "dS", poisoned == nan)
    end
    assert.equal("1", lines[5])
  end)

  it("keeps its place in the address", function()
    local lines = chromium.run(page_of(plain(), "place"), [[
      say(state.h, state.i, state.j, state.show, address()); press("ArrowDown"); say(address());]],
      "h=3&i=7&j=4&show=scores")
    assert.equal("2\t6\t3\tscores\t#look=1&b=1&h=3&i=7&j=4&show=scores", lines[1])
    assert.equal("#look=1&b=1&h=3&i=8&j=4&show=scores", lines[2])
  end)

  it("fits a phone: nothing is wider than the screen", function()
    local lines = chromium.run(page_of(everything "f32", "phone"), [[
      say(innerWidth, document.documentElement.scrollWidth);
      say(getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length);]], "", 390)
    local inner, scroll = lines[1]:match "(%d+)\t(%d+)"
    assert.is_true(tonumber(inner) < 520)
    assert.equal(inner, scroll)
    assert.equal("1", lines[2])
  end)

  it("shows attention of nothing", function()
    local look = sa.inspect(sa.zeros({1, 2, 3, 4}), sa.zeros({1, 2, 0, 4}), sa.zeros({1, 2, 0, 4}))
    local lines, problems = chromium.run(page_of(look, "nothing"), [[say($("readout").textContent);]])
    assert.equal("", problems)
    assert.equal("nothing: a size is 0", lines[1])
  end)

  it("holds several recorded attentions", function()
    local tap = sa.tap()
    local x = sa.randn({1, 2, 6, 4}, {seed = 1, requires_grad = true})
    tap:name "first"
    local y = sa.sdpa(x, x, x, {causal = true})
    tap:name "second"
    sa.sdpa(y, y, y):sum():backward()
    tap:stop()
    local path = folder .. "/tap.html"
    assert.equal(path, tap:report(path))
    local lines, problems = chromium.run(path, [[
      say(...[...$("looks").options].map((o) => o.textContent), $("looks").hidden);
      for (const n of [0, 1]) { $("looks").value = n; act($("looks"), "change", Event); say(pointAt(2, 5)); }]])
    assert.equal("", problems)
    assert.equal("second\tfirst\tfalse", lines[1])
    assert.equal(rounded(tap:get("second"):weights():get(1, 1, 2, 5)), value_of(lines[2], "weight"))
    assert.equal("query 2, key 5: masked", lines[3])
  end)
end)
