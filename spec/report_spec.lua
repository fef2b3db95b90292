-- reports: what is in the file, its bounds, and what is said of bad arguments; spec/browser looks at the page itself

local sa = require "safeattn"
local helper = require "spec.helper"
local child = require "spec.child"
local files = require "spec.files"
local m = sa.mask

local folder

local function attention(H, L, options, with_gradient)
  local function random(seed) return sa.randn({1, H, L, 64}, {seed = seed}) end
  return sa.inspect(random(1), random(2), random(3), options, with_gradient and random(4) or nil)
end

describe("look:report", function()
  setup(function() folder = child.command("mktemp -d"):match "%S+" end)
  teardown(function() child.command("rm -rf " .. folder) end)

  it("writes 8 heads of 512 x 512 in less than 5 MiB", function()
    local path = folder .. "/large.html"
    assert.equal(path, attention(8, 512, {mask = m.random(0.5, 1)}, true):report(path))
    assert.is_true(#files.read(path) < 5 * 2 ^ 20)
  end)

  it("is one file that asks for nothing", function()
    local path = folder .. "/alone.html"
    attention(1, 8, {causal = true}, true):report(path)
    local text = files.read(path)
    for _, request in ipairs {"https?://", " src=", "@import", "url%(", "fetch%(", "XMLHttpRequest", "WebSocket"} do
      assert.not_matches(request, text)
    end
    assert.equal('href="data:,"', text:match 'href=%S*"')
  end)

  it("says what is dead and why, and where NaN went", function()
    local path = folder .. "/dead.html"
    local v = sa.randn({6, 4}, {seed = 3})
    v:set(2, 1, 0 / 0)
    local mask = m.documents {1, 1, 1, -1, 2, 2} * m.causal()
    local look = sa.inspect(sa.randn({6, 4}, {seed = 1}), sa.randn({6, 4}, {seed = 2}), v, {mask = mask})
    look:report(path)
    local text = files.read(path)
    local function holds(shown)
      local quoted = tostring(shown):gsub("\n", "\\u000a"):gsub('"', "\\u0022"):gsub("<", "\\u003c")
      assert.matches(quoted, text, 1, true)
    end
    assert.equal(1, #look:dead_rows())
    holds(look:dead_rows())
    holds(look:dead_keys())
    holds(look:nonfinite())
    holds(look)
  end)

  it("keeps titles and names from being read as markup", function()
    local path = folder .. "/title.html"
    attention(1, 2):report(path, {title = "</script><b>&"})
    assert.matches("<h1>&lt;/script&gt;&lt;b&gt;&amp;</h1>", files.read(path), 1, true)
    local tap = sa.tap()
    tap:name "</script><script>alert(1)</script>"
    local x = sa.ones({2, 2})
    sa.sdpa(x, x, x)
    tap:stop()
    assert.equal(path, tap:report(path))
    assert.not_matches("alert(1)</script>", files.read(path), 1, true)
  end)

  it("puts the newest records of a tap on one page", function()
    local path = folder .. "/tap.html"
    local tap = sa.tap()
    local x = sa.ones({2, 2})
    for n = 1, 4 do
      tap:name("call " .. n)
      sa.sdpa(x, x, x)
    end
    tap:stop()
    tap:report(path, {newest = 2})
    local names = {}
    for name in files.read(path):gmatch '"name":"(call %d)"' do names[#names + 1] = name end
    assert.same({"call 4", "call 3"}, names)
    tap:clear()
    assert.equal("safeattn.tap():report: self: got a tap that recorded nothing, wanted one with a record",
      helper.message_of(tap.report, tap, path))
  end)

  it("replaces a file whole, or not at all", function()
    local path = folder .. "/no/such/folder.html"
    local written, problem = attention(1, 2):report(path)
    assert.is_nil(written)
    assert.equal(path .. ": No such file or directory", problem)
    local names = child.command("mkdir " .. folder .. "/one && ls " .. folder .. "/one")
    assert.equal("", names)
    attention(1, 2):report(folder .. "/one/a.html")
    attention(1, 2):report(folder .. "/one/a.html")
    assert.equal("a.html\n", child.command("ls " .. folder .. "/one"))
  end)

  it("says which file the disk has no room for, and leaves nothing of it", function()
    child.command("mkdir " .. folder .. "/full")
    local path = folder .. "/full/too large.html"
    local text = ([[
local sa = require "safeattn"
local q = sa.randn({1, 1, 64, 8}, {seed = 1})
print(sa.inspect(q, q, q):report %q)]]):format(path)
    assert.equal("nil\t" .. path .. ": File too large\n",
      child.must_run(text, {before = "trap '' XFSZ; ulimit -f 8"}))
    assert.equal("", files.names(folder .. "/full"))
  end)

  it("says what is wrong with its arguments", function()
    local look = attention(1, 2)
    assert.equal("safeattn.inspect():report: path: got nil, wanted the name of a file",
      helper.message_of(look.report, look))
    assert.equal("safeattn.inspect():report: title: got 3, wanted a string",
      helper.message_of(look.report, look, folder .. "/x", {title = 3}))
    assert.equal("safeattn.inspect():report: options: got unknown option tilte, wanted title (did you mean title?)",
      helper.message_of(look.report, look, folder .. "/x", {tilte = "x"}))
    local long = sa.zeros {2 ^ 14, 1}
    local large = sa.inspect(long, long, long, {causal = true})
    assert.equal("safeattn.inspect():report: self: got an attention whose mask has 268435456 pairs, wanted at most"
      .. " 134217728: inspect some of its heads or queries (q:narrow)", helper.message_of(large.report, large, "x"))
    assert.equal("safeattn.inspect():report: self: got 1, wanted what sa.inspect gave",
      helper.message_of(look.report, 1, "x"))
  end)
end)
