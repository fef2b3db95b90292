-- attention on every engine, dtype, mask, layout, size and option, beside the definition in f64

local sa = require "safeattn"
local cases = require "spec.attention_cases"
local device = require("spec.helper").device

local dtypes = cases.dtypes

-- Takes the next of a list at every call: lists of coprime lengths meet in all combinations.
local function rotation(list)
  local n = 0
  return function()
    n = n % #list + 1
    return list[n]
  end
end

local wanted = cases.every(cases.fewer)

-- Runs all cases and reports the first few that are wrong.
local function check_all(list, engines)
  local problems = {}
  for _, case in ipairs(list) do
    if wanted() then
      local ok, problem = pcall(cases.check, case, engines)
      if not ok then problems[#problems + 1] = problem end
    end
  end
  if #problems > 0 then
    local first = table.concat(problems, "\n", 1, math.min(#problems, 5))
    error(string.format("%d of %d cases are wrong:\n%s", #problems, #list, first), 0)
  end
end

for _, dtype in ipairs(dtypes) do
  describe("attention in " .. dtype, function()
    for _, mask in ipairs(cases.masks) do
      it("mask " .. mask .. ", in every layout", function()
        local at = #mask + #dtype  -- other sizes for every mask
        local queries, keys = rotation {70, 129, 33, 64, 190}, rotation {65, 128, 200, 17, 130, 63, 100}
        local widths, bias = rotation {16, 40, 64}, rotation {false, "bhls", "ls", false, "b11s"}
        local values, heads = rotation {"normal", "spread", "heavy"}, rotation {{2, 1}, {3, 3}, {4, 2}, {2, 2}}
        for _ = 1, at do for _, turn in ipairs {queries, keys, widths, bias, values, heads} do turn() end end
        local list = {}
        for _, layout in ipairs(cases.layouts) do
          local h = heads()
          table.insert(list, {
            dtype = dtype, mask = mask, layout = layout, queries = queries(), keys = keys(), width = widths(),
            value_width = widths(), bias = bias() or nil, values = values(), heads = h[1], key_heads = h[2],
          })
        end
        check_all(list)
      end)
    end

    it("bias under every broadcast pattern", function()
      local list, kind, like = {}, rotation {"normal", "inf", "lowest", "highest"}, rotation {"f32", dtype}
      for _, pattern in ipairs {
        "bhls", "1hls", "b1ls", "bh1s", "bhl1", "11ls", "1h1s", "1hl1", "b11s", "b1l1", "bh11", "111s", "11l1", "1h11",
        "b111", "1111", "hls", "ls", "1s", "s", "1",
      } do
        local values = kind()
        table.insert(list, {
          dtype = dtype, bias = pattern, bias_values = values, extras_dtype = dtype == "f64" and "f64"
            or values:find "est$" and "f32" or like(), queries = 67, keys = 131, width = 16,
        })
      end
      table.insert(list, {
        dtype = dtype, bias = "hls", bias_values = "offset", extras_dtype = dtype == "f64" and "f64" or "f32",
        values = "ties", scale = 1, queries = 67, keys = 131, width = 16,
      })
      check_all(list)
    end)

    it("sinks, ALiBi, softcap, window, causality, scale and dropout, alone and together", function()
      local list = {}
      local function add(case)
        case.dtype, case.queries, case.keys, case.width = dtype, case.queries or 70, case.keys or 133, 24
        table.insert(list, case)
      end
      for _, causal in ipairs {false, "top-left", "bottom-right"} do
        for _, size in ipairs {{70, 133}, {133, 70}, {65, 65}} do
          local function case(t)
            t.causal, t.queries, t.keys = causal or nil, size[1], size[2]
            add(t)
          end
          case {}
          case {sinks = true, dropout = 0.3}
          case {alibi = true, window = {40, 2}}
          case {softcap = 3, values = "spread"}
          case {window = {0, 0}, weights = true}
        end
      end
      add {scale = 0}
      add {scale = -0.5, bias = "ls"}
      add {dlse = false}
      add {window = {nil, 10}}
      add {window = {10, nil}, causal = "bottom-right"}
      add {softcap = 0.1}
      add {dropout = 0.9, weights = true}
      add {dropout = 0.1, bias = "bhls", bias_values = "inf", mask = "dead"}
      add {sinks = true, mask = "none"}
      -- Of many sizes: not all come back as they were from logarithms of base 2.
      add {sinks = "huge", mask = "dense", heads = 16, extras_dtype = dtype == "f64" and "f64" or "f32"}
      add {sinks = true, alibi = true, bias = "ls", extras_dtype = dtype == "f64" and "f64" or "f32"}
      add {sinks = true, bias = "1hl1", bias_values = "inf", mask = "dense", weights = true}
      add {sinks = true, alibi = true, softcap = 2, window = {60, 60}, causal = "bottom-right", bias = "b1ls",
        bias_values = "inf", mask = "dead", dropout = 0.2, scale = 0.7, weights = true}
      check_all(list)
    end)

    it("contents of every kind", function()
      local list = {}
      for _, values in ipairs(cases.contents) do
        table.insert(list, {dtype = dtype, values = values, queries = 130, keys = 150, width = 32, causal = "top-left"})
        table.insert(list, {dtype = dtype, values = values, queries = 40, keys = 150, width = 48, mask = "dense"})
      end
      check_all(list)
    end)

    it("every width up to 256, values wider or narrower than keys", function()
      local list, mask = {}, rotation {false, "dense", "causal"}
      for _, width in ipairs {1, 8, 33, 64, 80, 128, 256} do
        for _, value_width in ipairs {1, 8, 33, 64, 80, 128, 256} do
          table.insert(list, {
            dtype = dtype, width = width, value_width = value_width, queries = 66, keys = 70, heads = 2, key_heads = 1,
            batch = 1, mask = mask() or nil, layout = width % 2 == 0 and "plain" or "padded",
          })
        end
      end
      check_all(list)
    end)

    it("groups of heads, ranks 2 and 3", function()
      local list = {}
      for _, heads in ipairs {{1, 1}, {6, 6}, {6, 3}, {6, 2}, {6, 1}, {8, 1}} do
        local all, few = heads[1], heads[2]
        table.insert(list, {dtype = dtype, heads = all, key_heads = few, mask = "blocks"})
        table.insert(list, {dtype = dtype, heads = all, key_heads = few, mask = "causal", batch = 1, rank = 3})
      end
      table.insert(list, {dtype = dtype, heads = 1, key_heads = 1, batch = 1, rank = 2, mask = "dead", bias = "ls"})
      check_all(list)
    end)

    it("few queries and many keys", function()
      local list, mask = {}, rotation {"dense_keys", false, "padding", "window_bottom_right", "dead"}
      for _, queries in ipairs {1, 2, 7} do
        for _, keys in ipairs {2047, 2049, 3000} do
          table.insert(list, {dtype = dtype, queries = queries, keys = keys, batch = 2, mask = mask() or nil,
            heads = 2, key_heads = 1, weights = true, values = "spread"})
        end
      end
      check_all(list)
    end)

    it("several tiles both ways", function()
      check_all {
        {dtype = dtype, queries = 400, keys = 515, causal = "bottom-right", heads = 2, key_heads = 1, batch = 1},
        {dtype = dtype, queries = 515, keys = 400, mask = "causal_documents", heads = 2, batch = 1},
        {dtype = dtype, queries = 300, keys = 300, mask = "prefix", heads = 2, batch = 1, bias = "1s"},
      }
    end)
  end)
end

describe("attention", function()
  it("at every length around a tile's", function()
    local list, dtype, mask = {}, rotation(dtypes), rotation {false, "dead", "dense"}
    local causal = rotation {false, "top-left", "bottom-right", false, "bottom-right"}
    for _, queries in ipairs {0, 1, 2, 63, 64, 65, 127, 128, 129, 193, 257} do
      for _, keys in ipairs {0, 1, 2, 63, 64, 65, 127, 128, 129, 193, 257} do
        table.insert(list, {
          dtype = dtype(), queries = queries, keys = keys, width = 8, mask = mask() or nil, causal = causal() or nil,
          heads = 2, key_heads = 1, bias = keys % 3 == 1 and "ls" or nil,
        })
      end
    end
    check_all(list)
  end)

  it("where L S exceeds 2^32 and B H 65535", function()
    check_all({
      {dtype = "f32", queries = 70000, keys = 70000, batch = 1, heads = 1, key_heads = 1, width = 2, window = {1, 0},
        dropout = 0.4, alibi = true, bias = "1s", sinks = true},
      {dtype = "bf16", queries = 2, keys = 3, batch = 33000, heads = 2, key_heads = 1, width = 2, bias = "b1ls"},
    }, {cases.engines[1], cases.engines[#cases.engines]})
  end)

  it("of empty batches, heads and widths", function()
    local list = {}
    for _, dtype in ipairs(dtypes) do
      for _, empty in ipairs {{batch = 0}, {heads = 0}, {value_width = 0}, {width = 0, scale = 1, value_width = 5},
        {width = 0, scale = 1, value_width = 0}} do
        for _, mask in ipairs {false, "causal", "dead"} do
          local case = {dtype = dtype, mask = mask or nil, sinks = true, alibi = true, bias = "ls"}
          for name, value in pairs(empty) do case[name] = value end
          table.insert(list, case)
        end
      end
    end
    check_all(list)
  end)

  it("wider than the fused kernels go is served by the reference, and says so", function()
    for _, width in ipairs {257, 512} do
      for _, dtype in ipairs(dtypes) do
        cases.check({dtype = dtype, width = width, value_width = 8, batch = 1}, {{backend = "auto", device = device}})
        cases.check({dtype = dtype, width = 8, value_width = width, batch = 1}, {{backend = "auto", device = device}})
        local options = {dtype = dtype, device = device}
        local run = sa.forward(sa.zeros({2, width}, options), sa.zeros({2, width}, options), sa.zeros({2, 1}, options))
        assert.equal("reference", run.backend)
      end
    end
  end)

  it("on the fused kernels is what auto gives", function()
    for _, dtype in ipairs(dtypes) do
      local t = sa.randn({2, 256}, {dtype = dtype, seed = 1, device = device})
      local run = sa.forward(t, t, t)
      assert.equal("fused", run.backend)
      assert.truthy(run.kernel:find("^%l+%-" .. dtype), run.kernel)
      assert.is_nil(run.kernel:find("reference", 1, true), run.kernel)
    end
  end)
end)
