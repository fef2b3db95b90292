rockspec_format = "3.0"
package = "safeattn"
version = "scm-1"
source = { url = "git+https://github.com/safeattn/safeattn.git" }
description = {
   summary = "Embedded attention for LuaJIT: masked means masked, forward and backward",
   detailed = [[
A C core computes scaled dot-product attention and its gradients; a LuaJIT FFI binding builds masks, runs the kernels
and looks inside the gradients. A query that sees no key gives 0 instead of NaN, and nothing behind a mask has any
influence, not even NaN.]],
   license = "MIT",
   labels = { "luajit", "attention", "machine-learning", "ffi" },
}
-- LuaJIT is a Lua 5.1 to LuaRocks; "luajit >= 2.1" cannot be satisfied where LuaRocks itself runs on PUC Lua. The module
-- checks for LuaJIT when it is loaded.
dependencies = { "lua == 5.1" }
build = {
   type = "make",
   install_target = "install-lua",
   build_variables = { CC = "$(CC)", CFLAGS = "$(CFLAGS)" },
   install_variables = { CC = "$(CC)", CFLAGS = "$(CFLAGS)", INST_LIBDIR = "$(LIBDIR)", INST_LUADIR = "$(LUADIR)" },
   install = { bin = { "bin/safeattn" } },
}
-- A wrapper would start the Lua that LuaRocks runs on; the command asks for luajit and finds its own tree.
deploy = { wrap_bin_scripts = false }
-- type = "busted" would have LuaRocks fetch busted again even where the system provides it.
test = { type = "command", command = "busted" }
