-- what luacheck knows of the tree; `make lint` runs it
std = "luajit"
max_line_length = 120
exclude_files = { "lua/safeattn/cdef.lua", "build/", ".luarocks/", "lua_modules/" }
files["spec"] = { std = "+busted" }
files[".busted"] = { std = "luajit" }
files["**/*.rockspec"] = { std = "rockspec" }
