-- what an installation gets: LuaRocks, make install, pkg-config, and what the make targets ask for

local child = require "spec.child"
local files = require "spec.files"

local root = child.must_command("pwd"):match "[^\n]+"

-- Everything here runs as a user's shell would run it: without the variables that this suite may have been given, and
-- without a network.
-- CUDA=0: its part is minutes of compiling.
local clean = "env -u LD_PRELOAD -u SAFEATTN_LIB -u LUA_PATH -u LUA_CPATH -u MAKEFLAGS -u MAKELEVEL -u MFLAGS"
  .. " CUDA=0"
  .. " http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 "

local write = files.write

local function run(command)
  return child.command(clean .. "sh -c " .. child.quoted(command))
end

local function must_run(command)
  return child.must_command(clean .. "sh -c " .. child.quoted(command))
end

local folder

setup(function() folder = files.folder() end)
teardown(function() files.remove(folder) end)

-- Prints a row of attention behind a mask, a gradient, and where the modules and the library came from.
local script = [[
local sa = require "safeattn"
local q = sa.randn({1, 1, 4, 8}, {seed = 1, requires_grad = true})
local out = sa.sdpa(q, q, q, {mask = sa.mask.documents {1, 1, -1, 2} * sa.mask.causal()})
out:sum():backward()
assert(out:get(1, 1, 3, 5) == 0 and q.grad:get(1, 1, 3, 5) == 0 and out:get(1, 1, 2, 5) ~= 0)
print(sa.info().version)
print(debug.getinfo(sa.sdpa, "S").source)
for line in io.lines "/proc/self/maps" do
  if line:find "core%.so" or line:find "libsafeattn" then print(line:match "(/.*)") break end
end
]]

-- The script, run from another folder with nothing but an installed tree to find safeattn in.
local function run_installed(tree)
  write(folder .. "/script.lua", script)
  return must_run(("cd / && T=%s && LUA_PATH=\"$T/share/lua/5.1/?.lua;$T/share/lua/5.1/?/init.lua\" "
    .. "LUA_CPATH=\"$T/lib/lua/5.1/?.so\" luajit %s/script.lua"):format(tree, folder))
end

local function version() return require("safeattn").info().version end

describe("LuaRocks, without a network,", function()
  local tree, source, luarocks

  lazy_setup(function()
    tree, source = folder .. "/rocks", folder .. "/source"
    -- A copy, because LuaRocks builds in the folder of the rockspec; with our objects, because they take minutes.
    must_run(("mkdir %s && cp -a Makefile README.md LICENSE safeattn-scm-1.rockspec src lua bin build .busted spec %s "
      .. "&& rm -f %s/lua/safeattn/core.so %s/lua/safeattn/cdef.lua"):format(source, source, source, source))
    luarocks = ("cd %s && HOME=%s luarocks --lua-version=5.1 --tree=%s "):format(source, folder, tree)
    must_run(luarocks .. "make")
  end)

  it("makes and installs what the rockspec says", function()
    local output = run_installed(tree)
    assert.matches(version(), output, 1, true)
    assert.matches("@" .. tree .. "/share/lua/5.1/safeattn/", output, 1, true)
    assert.matches("\n" .. tree .. "/lib/lua/5.1/safeattn/core.so", output, 1, true)
  end)

  it("installs the command, which finds the modules of its tree", function()
    assert.equal("@" .. tree .. "/bin/../share/lua/5.1/safeattn/sdpa.lua\n", must_run(("cd / && %s/bin/safeattn -e "
      .. "'print(debug.getinfo(sa.sdpa, \"S\").source)'"):format(tree)))
  end)

  it("knows what was installed", function()
    assert.matches("safeattn%s+scm%-1", must_run(luarocks .. "list --porcelain"))
  end)

  it("runs the tests with the system's busted", function()
    write(source .. "/spec/one_spec.lua", [[
describe("attention", function()
  it("is there", function() assert.is_function(require("safeattn").sdpa) end)
end)]])
    local output = must_run(luarocks .. "test -- -o TAP spec/one_spec.lua")
    assert.matches("ok 1 - attention is there", output, 1, true)
  end)
end)

describe("make install", function()
  local prefix

  lazy_setup(function()
    prefix = folder .. "/prefix"
    must_run("make install PREFIX=" .. prefix)
  end)

  it("puts the modules where LuaJIT looks for them", function()
    local output = run_installed(prefix)
    assert.matches(version(), output, 1, true)
    assert.matches("@" .. prefix .. "/share/lua/5.1/safeattn/", output, 1, true)
    assert.matches("\n" .. prefix .. "/lib/", output, 1, true)
  end)

  it("installs the command, which a link may lead to", function()
    must_run(("ln -s %s/bin/safeattn %s/attend"):format(prefix, folder))
    for _, command in ipairs {prefix .. "/bin/safeattn", folder .. "/attend"} do
      assert.equal(version() .. "\n", must_run(("cd / && %s -e 'print(sa.info().version)'"):format(command)))
    end
  end)

  it("installs one library under its two names", function()
    must_run(("test %s/lib/lua/5.1/safeattn/core.so -ef %s/lib/libsafeattn.so"):format(prefix, prefix))
  end)

  it("lets a C program find all that it needs through pkg-config", function()
    local config = ("PKG_CONFIG_PATH=%s/lib/pkgconfig pkg-config "):format(prefix)
    assert.equal(version() .. "\n", must_run(config .. "--modversion safeattn"))
    must_run(("${CC:-gcc} -std=c11 -o %s/minimal examples/c/minimal.c $(%s --cflags --libs safeattn) -lm"):format(
      folder, config))
    assert.matches("kernel fused", must_run(("LD_LIBRARY_PATH=%s/lib %s/minimal"):format(prefix, folder)), 1, true)
  end)

  it("stages below DESTDIR without baking it in", function()
    must_run(("make install PREFIX=/opt/attention DESTDIR=%s/stage"):format(folder))
    local config = must_run(("cat %s/stage/opt/attention/lib/pkgconfig/safeattn.pc"):format(folder))
    assert.matches("prefix=/opt/attention\n", config, 1, true)
    assert.not_matches("stage", config, 1, true)
    run_installed(folder .. "/stage/opt/attention")
  end)

  it("lets everybody read what is there, in a folder of any name, and takes it away again", function()
    local place = ("PREFIX='/two words' DESTDIR='%s/of two'"):format(folder)
    must_run("umask 077; make install " .. place)
    assert.equal("", must_run(("find '%s/of two/two words' -not -perm -444"):format(folder)))
    run_installed("'" .. folder .. "/of two/two words'")
    assert.equal("-I/two\\ words/include -L/two\\ words/lib -lsafeattn\n", (must_run(
      ("PKG_CONFIG_PATH='%s/of two/two words/lib/pkgconfig' pkg-config --cflags --libs safeattn"):format(folder)):gsub(
        " +\n", "\n")))
    must_run("make uninstall " .. place)
    assert.equal("", must_run(("find '%s/of two' -not -type d"):format(folder)))
  end)
end)

describe("the Makefile", function()
  it("keeps the flags that the code needs when a packager sets CFLAGS", function()
    local output = must_run(("make -n BUILD=%s/other CORE=%s/core.so CFLAGS=-O1"):format(folder, folder))
    for line in output:gmatch("[^\n]* %-c %-o [^\n]*") do
      assert.matches(" -O1 -std=c11 ", line, 1, true)
      assert.matches(" -fvisibility=hidden ", line, 1, true)
      assert.matches(" -ffp-contract=off ", line, 1, true)
    end
    assert.matches(" -c -o ", output, 1, true)
  end)

  it("compiles the CUDA part for the devices that are asked for, or leaves it out", function()
    local place = "build/none"
    local function commands(options)
      return must_run(("make -n BUILD=%s CORE=%s/core.so CUDA_LIBRARY=%s/lua/cuda.so NVCC=nvcc %s")
        :format(place, place, place, options))
    end
    assert.not_matches("nvcc", commands "CUDA=0", 1, true)
    local portable, hopper = 0, 0
    for line in commands("CUDA=1"):gmatch "nvcc[^\n]* %-c [^\n]*" do
      if line:find("/hopper_", 1, true) then
        hopper = hopper + 1
        assert.not_matches("sm_80", line, 1, true)
        assert.matches("arch=compute_90a,code=sm_90a", line, 1, true)
      else
        portable = portable + 1
        assert.matches("arch=compute_80,code=[sm_80,sm_90,compute_80]", line, 1, true)
      end
    end
    assert.is_true(portable > 10 and hopper > 0)
    assert.not_matches("/hopper_", commands "CUDA=1 CUDA_ARCHS=86", 1, true)
  end)

  it("takes no CUDA file whose wgmma the compiler serialised", function()
    write(folder .. "/nvcc", [[
#!/bin/sh
while [ "$1" != -o ]; do shift; done
: > "$2"
echo "ptxas info : (C$CODE) Potential Performance Loss: wgmma.mma_async instructions are serialized"
]])
    local make = ("chmod +x %s/nvcc && make NVCC=%s/nvcc BUILD=%s/serial %s/serial/kernels/cuda/hopper_forward.cu.o")
      :gsub("%%s", folder)
    for _, code in ipairs {7510, 7514} do
      local output, status = run(("export CODE=%d; "):format(code) .. make)
      assert.equal(2, status, output)
      assert.matches("hopper_forward.cu: wgmma waits for the one before it", output, 1, true)
    end
    must_run("export CODE=1; " .. make)
  end)

  it("compiles again what includes a header that changed", function()
    local output = must_run("make -n -W src/plan.h")
    assert.matches("src/plan.c\n", output, 1, true)
    assert.not_matches("src/status.c\n", output, 1, true)
  end)

  it("has nothing to do when all is built", function()
    assert.not_matches(" -c -o ", must_run("make -n"), 1, true)
  end)

  it("lists its targets", function()
    local output = must_run("make help")
    for target in ("demo repl test test-browser test-asan bench lint docs install uninstall clean"):gmatch "%S+" do
      assert.matches("  make " .. target .. " ", output, 1, true)
    end
  end)

  it("makes pages that begin with what a module is for: LDoc takes the first comment that it reads for that", function()
    local heads = must_run("grep -rlE '^--- ' lua/safeattn --include=*.lua | xargs -n 1 head -n 1")
    for head in heads:gmatch "[^\n]+" do assert.matches("^%-%-%- ", head) end
  end)
end)

describe("what a target needs", function()
  -- A machine on which nothing is installed: the shell's own tools, no libraries, and `extra`.
  local function needs(extra, arguments)
    extra.ldconfig = ":"
    local tools = must_run("mktemp -d -p " .. folder):match("%S+")
    must_run(("for tool in sh env id sed grep printf; do ln -s $(command -v $tool) %s/; done"):format(tools))
    for name, text in pairs(extra) do
      write(tools .. "/" .. name, "#!/bin/sh\n" .. text .. "\n")
      must_run(("chmod +x %s/%s"):format(tools, name))
    end
    return run(("PATH=%s %s/.ci/needs %s"):format(tools, child.quoted(root), arguments))
  end

  it("is nothing where everything is there", function()
    assert.equal("", must_run(".ci/needs --dry-run demo test lint"))
  end)

  it("is installed on Debian in one command, by root", function()
    local output, status = needs({["apt-get"] = "echo asked", id = "echo 0"}, "--dry-run demo test")
    assert.equal(0, status, output)
    assert.equal("+ apt-get install -y --no-install-recommends gcc libc6-dev make luajit libopenblas-pthread-dev"
      .. " lua-check clang-format lua-busted libpng16-16 pkg-config libluajit-5.1-dev luarocks lua5.1"
      .. " lua-dkjson lua-readline python3-numpy\n", output)
  end)

  it("is installed through sudo by others", function()
    local others = {["apt-get"] = "echo asked", id = "echo 1000", sudo = ""}
    local output, status = needs(others, "--dry-run build </dev/null")
    assert.equal(0, status, output)
    assert.matches("+ sudo -n apt-get install -y --no-install-recommends gcc libc6-dev make\n", output, 1, true)
  end)

  it("has the package lists fetched when the first try finds nothing", function()
    local apt = ("echo \"$1\" >> %s/asked; [ -e %s/updated ] || { [ $1 = update ] && : > %s/updated; }"):format(
      folder, folder, folder)
    local output, status = needs({["apt-get"] = apt, id = "echo 0"}, "build")
    assert.equal(0, status, output)
    assert.equal("install\nupdate\ninstall\n", must_run(("cat %s/asked"):format(folder)))
  end)

  it("is listed elsewhere, and nothing goes on", function()
    local output, status = needs({}, "demo")
    assert.equal(1, status)
    assert.matches("needs: please install what is missing here:\n", output, 1, true)
    assert.matches("  LuaJIT 2.1 (Debian: luajit)\n", output, 1, true)
    assert.matches("  OpenBLAS, the flavour with pthreads (Debian: libopenblas-pthread-dev)\n", output, 1, true)
  end)

  it("is only known for targets that there are", function()
    local output, status = run(".ci/needs dmeo")
    assert.equal(2, status)
    assert.equal("needs: no target called 'dmeo'; there are build, demo, test, browser, lint and docs\n", output)
  end)
end)
