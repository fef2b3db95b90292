-- bad arguments of masks and plans, from C: every error names function, argument, what was got and what was wanted

local sa = require "safeattn"
local core = require "safeattn.core"
local masks = require "spec.masks"

local ffi, lib = core.ffi, core.lib
local compile, construct, lengths, last_error = masks.compile, masks.construct, masks.lengths, masks.last_error

describe("wrong input", function()
  local out, plans = ffi.new "sa_mask *[1]", ffi.new "const sa_plan *[1]"

  local function assert_error(message, status)
    assert.are_not.equal(0, status)
    assert.equal(message, last_error())
    assert.is_true(out[0] == nil and plans[0] == nil)
  end

  before_each(function()
    out[0], plans[0] = nil, nil
  end)

  it("of constructors is named", function()
    local bools, ints, floats = sa.zeros({2, 2}, {dtype = "bool"}), sa.zeros({2, 2}, {dtype = "i32"}), sa.zeros {2, 2}
    local deep = sa.zeros({1, 1, 1, 2, 2}, {dtype = "bool"})
    local scalar = sa.tensor(3, {dtype = "i32"})
    local negative = ffi.new("sa_tensor", bools.handle)
    negative.shape[0] = -1
    for message, status in pairs {
      ["sa_mask_causal: align: got 0, wanted SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)"] =
        function() return lib.sa_mask_causal(out, 0) end,
      ["sa_mask_window: align: got 3, wanted SA_NO_CAUSAL (0), SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)"] =
        function() return lib.sa_mask_window(out, 1, 1, 3) end,
      ["sa_mask_all: out: got NULL, wanted a place for the mask"] = function() return lib.sa_mask_all(nil) end,
      ["sa_mask_padding: key_lengths: that of batch 2 of 3 is -1, wanted at least 0"] =
        function() return lib.sa_mask_padding(out, lengths {1, -1, 2}, nil, 3) end,
      ["sa_mask_padding: query_lengths: that of batch 1 of 1 is -5, wanted at least 0"] =
        function() return lib.sa_mask_padding(out, lengths {1}, lengths {-5}, 1) end,
      ["sa_mask_padding: key_lengths: got NULL, wanted 2 counts"] =
        function() return lib.sa_mask_padding(out, nil, nil, 2) end,
      ["sa_mask_prefix: count: got -1, wanted at least 0"] =
        function() return lib.sa_mask_prefix(out, lengths {}, -1) end,
      ["sa_mask_global: count: got -2, wanted at least 0"] = function() return lib.sa_mask_global(out, -2) end,
      ["sa_mask_random: probability: got 1.5, wanted 0 to 1"] = function() return lib.sa_mask_random(out, 1.5, 1) end,
      ["sa_mask_random: probability: got nan, wanted 0 to 1"] = function() return lib.sa_mask_random(out, 0 / 0, 1) end,
      ["sa_mask_dense: visible: got NULL, wanted a tensor"] = function() return lib.sa_mask_dense(out, nil) end,
      ["sa_mask_dense: visible: holds nothing, wanted a tensor with memory"] =
        function() return lib.sa_mask_dense(out, ffi.new "sa_tensor") end,
      ["sa_mask_dense: visible: has size -1 and stride 2 at dim 0, wanted neither negative"] =
        function() return lib.sa_mask_dense(out, negative) end,
      ["sa_mask_dense: visible: got f32[2,2], wanted bool (a float mask is a bias, or sa_mask_additive)"] =
        function() return lib.sa_mask_dense(out, floats.handle) end,
      ["sa_mask_dense: visible: has 5 dims, wanted at most 4"] =
        function() return lib.sa_mask_dense(out, deep.handle) end,
      ["sa_mask_blocks: keep: got i32[2,2], wanted bool"] =
        function() return lib.sa_mask_blocks(out, ints.handle, 4) end,
      ["sa_mask_blocks: size: got 0, wanted at least 1"] =
        function() return lib.sa_mask_blocks(out, bools.handle, 0) end,
      ["sa_mask_additive: bias: got bool[2,2], wanted f32, f64, f16 or bf16 (for a bool: sa_mask_dense)"] =
        function() return lib.sa_mask_additive(out, bools.handle, 0) end,
      ["sa_mask_additive: at_most: got nan, wanted a number"] =
        function() return lib.sa_mask_additive(out, floats.handle, 0 / 0) end,
      ["sa_mask_documents: key_ids: got f32[2,2], wanted i32 or i64"] =
        function() return lib.sa_mask_documents(out, nil, floats.handle) end,
      ["sa_mask_documents: key_ids: has 0 dims, wanted 1 or 2"] =
        function() return lib.sa_mask_documents(out, nil, scalar.handle) end,
      ["sa_mask_documents: query_ids: has 3 batches, wanted 1 or 2, as key_ids"] =
        function() return lib.sa_mask_documents(out, sa.zeros({3, 2}, {dtype = "i32"}).handle, ints.handle) end,
      ["sa_mask_bits: queries: got -1, wanted at least 0"] = function() return lib.sa_mask_bits(out, 1, 1, -1, 1) end,
      ["sa_mask_not: a: got NULL, wanted a mask"] = function() return lib.sa_mask_not(out, nil) end,
      ["sa_mask_and: b: got NULL, wanted a mask"] = function() return lib.sa_mask_and(out, construct "all", nil) end,
      ["sa_mask_or: b: got one for 3 batches, wanted 1 or 2, as a"] = function()
        return lib.sa_mask_or(out, construct("prefix", lengths {1, 2}, 2), construct("prefix", lengths {1, 2, 3}, 3))
      end,
      ["sa_mask_and: b: got one for 4 heads, wanted 1 or 2, as a"] =
        function() return lib.sa_mask_and(out, construct("bits", 1, 2, 1, 1), construct("bits", 1, 4, 1, 1)) end,
    } do
      assert_error(message, status())
    end
    assert.equal(tonumber(lib.SA_NO_MEMORY), lib.sa_mask_bits(out, 2 ^ 40, 2 ^ 40, 2 ^ 40, 2 ^ 40))
  end)

  it("of rows of bits is named, and a mask in use no longer changes", function()
    local mask, row = construct("bits", 2, 3, 4, 5), ffi.new "uint8_t[5]"
    local function fill(...) return lib.sa_mask_bits_row(...) end
    assert_error("sa_mask_bits_row: mask: got NULL, wanted one made by sa_mask_bits", fill(nil, 0, 0, 0, row))
    assert_error("sa_mask_bits_row: mask: got causal, wanted one made by sa_mask_bits",
      fill(construct("causal", 1), 0, 0, 0, row))
    assert_error("sa_mask_bits_row: batch: got 2, wanted 0 to below 2", fill(mask, 2, 0, 0, row))
    assert_error("sa_mask_bits_row: head: got -1, wanted 0 to below 3", fill(mask, 0, -1, 0, row))
    assert_error("sa_mask_bits_row: query: got 4, wanted 0 to below 4", fill(mask, 0, 0, 4, row))
    assert_error("sa_mask_bits_row: visible: got NULL, wanted 5 flags", fill(mask, 0, 0, 0, nil))
    local message = "sa_mask_bits_row: mask: got one in use, wanted one that is not planned or combined yet"
    compile(mask, {2, 3, 4, 5})
    assert_error(message, fill(mask, 0, 0, 0, row))
    local operand = construct("bits", 2, 3, 4, 5)
    construct("not", operand)
    assert_error(message, fill(operand, 0, 0, 0, row))
  end)

  it("of plans is named", function()
    local function plan(mask, ...) return (lib.sa_mask_plan(plans, mask, ...)) end
    local padding = construct("padding", lengths {3, 5}, lengths {2, 4}, 2)
    assert_error("sa_mask_plan: out: got NULL, wanted a place for the plan",
      lib.sa_mask_plan(nil, nil, 0, -1, -1, 1, 1, 1, 1))
    assert_error("sa_mask_plan: causal: got 3, wanted SA_NO_CAUSAL (0), SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)",
      plan(nil, 3, -1, -1, 1, 1, 1, 1))
    assert_error("sa_mask_plan: keys: got -1, wanted at least 0", plan(nil, 0, -1, -1, 1, 1, 1, -1))
    assert_error("sa_mask_plan: mask: padding has 2 lengths, wanted 1 or as many as batches: 4",
      plan(padding, 0, -1, -1, 4, 1, 8, 8))
    assert_error("sa_mask_plan: mask: padding: batch 2 of 2 has 5 keys, wanted at most 4",
      plan(construct("not", padding), 0, -1, -1, 2, 1, 8, 4))
    assert_error("sa_mask_plan: mask: padding: batch 2 of 2 has 4 queries, wanted at most 3",
      plan(padding, 0, -1, -1, 2, 1, 3, 8))
    local ids = sa.zeros({2, 6}, {dtype = "i32"})
    local documents = construct("documents", nil, ids.handle)
    assert_error("sa_mask_plan: mask: documents has 2 rows of ids, wanted 1 or as many as batches: 3",
      plan(documents, 0, -1, -1, 3, 1, 6, 6))
    assert_error("sa_mask_plan: mask: documents has ids of 6 keys, wanted 7", plan(documents, 0, -1, -1, 2, 1, 6, 7))
    assert_error("sa_mask_plan: mask: documents has ids of 6 queries (the same as of keys), wanted 5",
      plan(documents, 0, -1, -1, 2, 1, 5, 6))
    assert_error("sa_mask_plan: mask: documents has ids of 6 queries, wanted 5",
      plan(construct("documents", ids.handle, ids.handle), 0, -1, -1, 2, 1, 5, 6))
    local flags = sa.zeros({3, 1, 4, 5}, {dtype = "bool"})
    assert_error("sa_mask_plan: mask: dense has shape [3,1,4,5], wanted [2,2,4,5], or 1 for any of its dims",
      plan(construct("dense", flags.handle), 0, -1, -1, 2, 2, 4, 5))
    assert_error("sa_mask_plan: mask: blocks has shape [3,1,4,5], wanted [3,2,3,5], or 1 for any of its dims",
      plan(construct("blocks", flags.handle, 4), 0, -1, -1, 3, 2, 12, 17))
    assert_error("sa_mask_plan: keys: got 274877906817, wanted at most 274877906816",
      plan(nil, 0, -1, -1, 1, 1, 1, 2 ^ 38 - 127))
    assert_error("sa_mask_plan: queries, keys: got 4294967296 and 4294967296, wanted below 2^63 pairs in all",
      plan(nil, 0, -1, -1, 1, 1, 2 ^ 32, 2 ^ 32))
  end)

  it("of what is asked of a plan is named, and harmless where nothing can be said", function()
    local t = ffi.new "sa_tensor"
    assert_error("sa_plan_dense: plan: got NULL, wanted a plan", lib.sa_plan_dense(nil, t))
    assert_error("sa_plan_dead_rows: out: got NULL, wanted a place for the tensor",
      lib.sa_plan_dead_rows(compile(nil, {1, 1, 1, 1}), nil))
    local counts = ffi.new "sa_plan_counts"
    counts.visible = 7
    lib.sa_plan_count(nil, counts)
    assert.equal(0, tonumber(counts.visible))
    assert.is_false(lib.sa_plan_visible(nil, 0, 0, 0, 0))
    local plan = compile(construct("padding", lengths {3, 5}, nil, 2), {2, 1, 4, 8})
    for _, place in ipairs {{2, 0, 0, 0}, {-1, 0, 0, 0}, {0, 0, 4, 0}, {0, 0, 0, 8}, {0, 0, -1, 0}, {0, -1, 0, 0}} do
      assert.is_false(lib.sa_plan_visible(plan, unpack(place)))
    end
    assert.is_true(lib.sa_plan_visible(plan, 1, 9, 3, 4))
    lib.sa_plan_release(nil)
    lib.sa_mask_release(nil)
    lib.sa_mask_retain(nil)
  end)
end)
