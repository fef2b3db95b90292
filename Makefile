# builds lua/safeattn/core.so, cdef.lua and (with nvcc) cuda.so, and runs what the README names; `make help` lists it

ifeq ($(origin CC),default)
CC = gcc
endif
# -g1: lines and functions, for backtraces and profiles; variables, too, take gcc a quarter longer.
CFLAGS ?= -O3 -g1
BUILD ?= build
CORE ?= lua/safeattn/core.so
CDEF ?= lua/safeattn/cdef.lua
PREFIX ?= /usr/local
DESTDIR ?=
LUAJIT ?= luajit

VERSION = 0.1.0
ABI := $(shell sed -n 's/^ *SA_ABI = \([0-9]*\).*/\1/p' src/safeattn.h)

# What the code needs, kept apart from CFLAGS, which a packager sets. Products and sums are never fused behind our back
# (-ffp-contract=off): the kernels say where they want a fused multiply-add, so that every build gives the same bits.
# Without an account of exception flags, which nobody reads (-fno-trapping-math), a choice of two values is a vector
# instruction; the values are the same.
OWN_CFLAGS = -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math \
	-pthread -Isrc -Wall -Wextra -Wno-unused-parameter -MMD -MP
# LuaJIT unloads a library when its handle is collected; a pool of threads would then run on unmapped code.
OWN_LDFLAGS = -shared -pthread -Wl,-z,nodelete
LDLIBS = -lm -ldl

SOURCES = $(wildcard src/*.c src/kernels/cpu/*.c)
OBJECTS = $(SOURCES:src/%.c=$(BUILD)/%.o)

ifeq ($(shell uname -m),x86_64)
$(BUILD)/kernels/cpu/avx2.o: ISA_CFLAGS = -march=x86-64-v3
$(BUILD)/kernels/cpu/avx512.o: ISA_CFLAGS = -march=x86-64-v4 -mprefer-vector-width=512
$(BUILD)/kernels/cpu/amx.o: ISA_CFLAGS = -march=x86-64-v4 -mprefer-vector-width=512 -mamx-tile -mamx-bf16
endif

# The CUDA part is a library of its own, which the other opens when a CUDA device is first asked for. Without nvcc, or
# with CUDA=0, it is left out. CUDA_ARCHS: what it has machine code for, the oldest first; its PTX is for newer devices.
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA ?= $(if $(NVCC),1,0)
CUDA_ARCHS ?= 80 90a
NVCCFLAGS ?= -O3
CUDA_LIBRARY ?= lua/safeattn/cuda.so

# TMA and wgmma are there for sm_90a alone. What takes longest to compile comes first, so that all cores end together:
# of two, one waited 25 s for the other.
HOPPER_SOURCES = $(wildcard src/kernels/cuda/hopper_*.cu)
PORTABLE_SOURCES = $(wildcard src/kernels/cuda/portable_*.cu)
CUDA_SOURCES = $(if $(filter 90a,$(CUDA_ARCHS)),$(HOPPER_SOURCES)) $(PORTABLE_SOURCES) \
	$(filter-out $(HOPPER_SOURCES) $(PORTABLE_SOURCES),$(wildcard src/kernels/cuda/*.cu)) src/cuda.cu
CUDA_OBJECTS = $(CUDA_SOURCES:src/%=$(BUILD)/%.o)
# The machine code of all is made from the PTX of the oldest: half of the time of a compilation goes to PTX.
PORTABLE_ARCHS = $(CUDA_ARCHS:%a=%)
OLDEST_ARCH = compute_$(firstword $(PORTABLE_ARCHS))
GENCODE = -gencode 'arch=$(OLDEST_ARCH),code=[$(subst $(space),,$(PORTABLE_ARCHS:%=sm_%$(comma)))$(OLDEST_ARCH)]'
comma = ,
space = $() $()
$(HOPPER_SOURCES:src/%=$(BUILD)/%.o): GENCODE = -gencode arch=compute_90a,code=sm_90a
# Their f32 has the CPU's bits.
$(BUILD)/kernels/cuda/elementwise.cu.o $(BUILD)/kernels/cuda/adamw.cu.o: OWN_NVCCFLAGS += -fmad=false
OWN_NVCCFLAGS = -std=c++17 -Isrc -cudart static --threads 2 -MMD -MP \
	-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter,-Wno-missing-field-initializers

##> build the library for LuaJIT (lua/safeattn/core.so) and for C (build/libsafeattn.so), and for CUDA when nvcc is there
.PHONY: all
all: $(CORE) $(CDEF) $(BUILD)/libsafeattn.so $(if $(filter 0,$(CUDA)),,$(CUDA_LIBRARY) $(BUILD)/cuda.so)

# The same objects twice: Lua opens core.so by its path; a C program records libsafeattn.so's name with its ABI number.
LIBRARY = $(BUILD)/libsafeattn.so.$(ABI)
$(LIBRARY): OWN_LDFLAGS += -Wl,-soname,$(@F)
$(CORE) $(LIBRARY): $(OBJECTS)
	$(CC) $(CFLAGS) $(OWN_LDFLAGS) $(LDFLAGS) -o $@.new $^ $(LDLIBS) && mv $@.new $@

$(BUILD)/libsafeattn.so: $(LIBRARY)
	ln -sf $(<F) $@

$(CUDA_LIBRARY): $(CUDA_OBJECTS)
	$(NVCC) -shared -cudart static -Xlinker -z,nodelete,-z,defs,--exclude-libs,ALL -o $@.new $^ && mv $@.new $@

# A C program's libsafeattn.so looks beside itself.
$(BUILD)/cuda.so: $(CUDA_LIBRARY)
	ln -srf $< $@

# What ptxas says of registers, spills and wgmma is kept for spec/cuda_build_spec.lua.
$(BUILD)/%.cu.o: src/%.cu Makefile
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) $(OWN_NVCCFLAGS) $(GENCODE) -Xptxas -v -c -o $@ $< >$@.log 2>&1 || { cat $@.log; exit 1; }
	@grep -E 'warning|[^.]error' -A 3 $@.log || true
	@! grep 'C75[0-9][0-9]' $@.log || { rm -f $@; echo "$<: wgmma waits for the one before it"; exit 1; }

-include $(CUDA_OBJECTS:.o=.d)

$(BUILD)/%.o: src/%.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(OWN_CFLAGS) $(ISA_CFLAGS) -c -o $@ $<

-include $(OBJECTS:.o=.d)

$(CDEF): src/safeattn.h Makefile
	@{ echo '-- the C declarations, made by `make` from src/safeattn.h'; \
	   echo 'require("ffi").cdef [['; \
	   sed -n '/^\/\/ cdef: everything/,/^\/\/ cdef: end/p' $<; \
	   echo ']]'; } > $@.new && mv $@.new $@

# What a target needs is installed before anything is built.
needs-%:
	@CC="$(CC)" .ci/needs $*

# Whoever asks for a demo or a test has not asked for a build: it may take all cores.
BUILD_ALL = $(MAKE) --no-print-directory -j$$(nproc) all
IN_TREE = LUA_PATH="lua/?.lua;lua/?/init.lua;;"

##> a tour, then a small language model, trained on real text with dead rows in it (DEVICE=cuda: on a GPU)
.PHONY: demo
demo: needs-demo
	@$(BUILD_ALL) $(if $(filter cuda%,$(DEVICE)),,CUDA=0)
	@$(IN_TREE) $(LUAJIT) examples/tour.lua
	@$(IN_TREE) $(LUAJIT) examples/train_lines.lua

##> the whole suite (BUSTED_FLAGS="spec/mask_spec.lua" for a part of it)
.PHONY: test
test: needs-test
	@$(BUILD_ALL)
	busted $(BUSTED_FLAGS)

##> the prompt: Lua with `sa` and `m` at hand
.PHONY: repl
repl: needs-demo
	@$(BUILD_ALL)
	@$(IN_TREE) $(LUAJIT) bin/safeattn

##> the page that reports are, in headless Chromium
.PHONY: test-browser
test-browser: needs-browser
	@$(BUILD_ALL)
	busted spec/browser/report_page.lua

##> the suite under the address and undefined-behaviour sanitizers
.PHONY: test-asan
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined
ASAN = build/asan
test-asan: needs-test
	@$(BUILD_ALL)
	@$(BUILD_ALL) BUILD=$(ASAN) CORE=$(ASAN)/core.so LDFLAGS="$(SANITIZE)" \
		CFLAGS="-O2 -g -fno-omit-frame-pointer $(SANITIZE)"
	$(CC) -g $(SANITIZE) -std=c11 -Isrc -o $(ASAN)/minimal examples/c/minimal.c \
		-L$(ASAN) -lsafeattn -lm -Wl,-rpath,'$$ORIGIN'
	ASAN_OPTIONS=detect_leaks=1 $(ASAN)/minimal
	# LuaJIT ends without freeing its own memory, so leaks are left to the C program above and to the suite's counters.
	SAFEATTN_QUICK=3 SAFEATTN_LIB="$(CURDIR)/$(ASAN)/core.so" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" busted $(BUSTED_FLAGS)

# The specs that run on a CUDA device as they do on the CPU; those of the CPU's own threads, files and pictures do not.
GPU_SPECS = $(foreach name,cuda cuda_attention cuda_decoding attention masked property forward softmax pointwise reduce \
	matmul merge layers autograd gradcheck random tensor cast view optim hooks,spec/$(name)_spec.lua)

##> the properties of attention and of the tape on a CUDA device (BUSTED_FLAGS="spec/masked_spec.lua" for a part)
.PHONY: test-gpu
test-gpu: needs-test
	@$(BUILD_ALL)
	$(RUN_GPU_SPECS)
RUN_GPU_SPECS = SAFEATTN_TEST_DEVICE=cuda SAFEATTN_REQUIRE_CUDA=1 SAFEATTN_CUDA_POISON=1 busted \
	$(or $(BUSTED_FLAGS),$(GPU_SPECS))

##> every family of attention kernels on a CUDA device under compute-sanitizer's tools (TOOLS="memcheck synccheck" for some)
.PHONY: test-sanitizers
TOOLS = memcheck racecheck initcheck synccheck
SANITIZED = $(BUILD)/sanitized
PORTABLE = SAFEATTN_CUDA_KERNELS=portable
# Some tools do not follow some of Hopper's instructions, so the kernels made of them are left out there:
# - racecheck does not take a wait on an mbarrier for one: whatever a loading warp leaves in shared memory it calls a
#   race (a step's number is written, the mbarrier arrived at and waited for, the number read). The emulator's orders of
#   threads and copies look for those (make test-emulated).
# - initcheck does not see what bulk copies and TMA write, and calls a read of the sums of dQ, or a copy of a gradient
#   to the host, uninitialised. Poisoned memory shows such a read as NaN.
WITHOUT = --kernel-name-exclude kns=
LEFT_OUT_racecheck = $(WITHOUT)hopper_forward $(WITHOUT)hopper_decoding $(WITHOUT)hopper_backward_tiles \
	$(WITHOUT)hopper_wide $(WITHOUT)hopper_bias
LEFT_OUT_initcheck = --check-api-memory-access no $(WITHOUT)hopper_backward_tiles $(WITHOUT)hopper_backward_convert
COMPUTE_SANITIZER = compute-sanitizer --error-exitcode 1 --print-limit 5 --tool
test-sanitizers: needs-demo
	@$(BUILD_ALL)
	$(CC) -g -std=c11 -Isrc -o $(SANITIZED) spec/cuda/sanitized.c -L$(BUILD) -lsafeattn -lm -Wl,-rpath,'$$ORIGIN'
	SAFEATTN_CUDA_POISON=1 $(SANITIZED)
	$(foreach tool,$(TOOLS),$(PORTABLE) $(COMPUTE_SANITIZER) $(tool) $(SANITIZED) && \
		$(COMPUTE_SANITIZER) $(tool) $(LEFT_OUT_$(tool)) $(SANITIZED) &&) true

# The core with AMX's instructions emulated (spec/emulator/amx.h), for tests on processors that have none.
AMX_EMULATED = $(BUILD)/emulated/amx
AMX_EMULATED_OBJECTS = $(patsubst %,$(AMX_EMULATED)/%.o,cpu kernels/cpu/amx)
$(AMX_EMULATED)/kernels/cpu/amx.o: ISA_CFLAGS = -march=x86-64-v4 -mprefer-vector-width=512
$(AMX_EMULATED)/%.o: src/%.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(OWN_CFLAGS) $(ISA_CFLAGS) -I. -DSAFEATTN_EMULATED_AMX -c -o $@ $<

-include $(AMX_EMULATED_OBJECTS:.o=.d)

$(AMX_EMULATED)/core.so: $(filter-out $(AMX_EMULATED_OBJECTS:$(AMX_EMULATED)/%=$(BUILD)/%),$(OBJECTS)) $(AMX_EMULATED_OBJECTS)
	$(CC) $(CFLAGS) $(OWN_LDFLAGS) $(LDFLAGS) -o $@.new $^ $(LDLIBS) && mv $@.new $@

# The emulated products beside the processor's, where it has them.
$(AMX_EMULATED)/products: spec/emulator/amx.c spec/emulator/amx.h Makefile
	@mkdir -p $(@D)
	$(CC) -O2 -D_GNU_SOURCE -march=x86-64-v4 -mamx-tile -mamx-bf16 -o $@ $<

##> the CUDA part for a machine without a GPU, for tests (build/emulated/cuda.so; spec/emulator/README.md)
.PHONY: emulated
EMULATED = $(BUILD)/emulated
EMULATED_OBJECTS = $(patsubst %,$(EMULATED)/%.o,$(wildcard src/cuda.cu src/kernels/cuda/*.cu spec/emulator/*.cpp))
# nvcc does not hold types and array bounds against a program; g++ is not to either.
EMULATED_CFLAGS = -std=c++17 -O2 -g1 -march=x86-64-v3 -ffp-contract=off -fPIC -fvisibility=hidden -pthread \
	-fno-strict-aliasing -fno-aggressive-loop-optimizations -fstack-clash-protection \
	-Ispec/emulator -Isrc $(patsubst spec/emulator/%,-include %,$(wildcard spec/emulator/kernels/cuda/*.cuh)) -MMD -MP \
	-Wall -Wextra -Wno-unused-parameter -Wno-unused-function -Wno-unknown-pragmas -Wno-missing-field-initializers \
	-Wno-psabi -Wno-array-bounds -Wno-aggressive-loop-optimizations -Wno-parentheses
emulated: $(EMULATED)/cuda.so $(EMULATED)/libcublas.so

$(EMULATED)/libcublas.so: spec/emulator/libraries/cublas.cpp src/cast.h $(EMULATED)/cuda.so
	$(CXX) -std=c++17 -O2 -Isrc -Ispec/emulator -fPIC -shared -o $@ $< -L$(EMULATED) -l:cuda.so -Wl,-rpath,'$$ORIGIN'

$(EMULATED)/cuda.so: $(EMULATED_OBJECTS)
	$(CXX) -shared -pthread -Wl,-z,nodelete -o $@ $^

##> the same on the emulator (BUSTED_FLAGS as above), and the emulator's own spec
.PHONY: test-emulated
test-emulated: needs-test
	@$(MAKE) --no-print-directory -j$$(nproc) all emulated CUDA=0
	busted spec/emulator_spec.lua
	SAFEATTN_QUICK=17 SAFEATTN_EMULATED_THREADS=$$(nproc) SAFEATTN_CUDA_LIB="$(CURDIR)/$(EMULATED)/cuda.so" \
		SAFEATTN_CUBLAS_LIB="$(CURDIR)/$(EMULATED)/libcublas.so" $(RUN_GPU_SPECS)

# Instructions against their definitions; the same files, built by nvcc, do that on a GPU.
$(EMULATED)/instructions $(EMULATED)/instructions_hopper: $(EMULATED)/%: $(EMULATED)/spec/cuda/%.cu.o $(filter $(EMULATED)/spec/%,$(EMULATED_OBJECTS))
	$(CXX) -pthread -o $@ $^

$(EMULATED)/%.o: % Makefile
	@mkdir -p $(@D)
	$(CXX) -x c++ $(EMULATED_CFLAGS) -c -o $@ $<

-include $(EMULATED_OBJECTS:.o=.d)

##> speed on the CPU: tables, saved as build/bench.json too (BENCH=quick for a glance, BENCH=bars for what is to be reached)
.PHONY: bench
bench: needs-demo
	@$(BUILD_ALL) CUDA=0
	@$(IN_TREE) $(LUAJIT) bench/attention.lua $(BENCH)

##> speed on a GPU beside PyTorch's back ends and the portable kernels, saved as build/bench-gpu.json (BENCH="quick masked", PEERS=--flex)
.PHONY: bench-gpu
bench-gpu: needs-demo
	@$(BUILD_ALL)
	@$(IN_TREE) $(LUAJIT) bench/gpu/attention.lua $(BENCH)
	@$(if $(filter-out quick,$(BENCH)),,$(PORTABLE) $(IN_TREE) $(LUAJIT) bench/gpu/attention.lua quick short widths)
	-@python3 bench/gpu/peers.py build/bench-gpu.json $(PEERS)

##> speed on the CPU beside PyTorch's SDPA and ONNX Runtime, where Python has them
.PHONY: bench-peers
bench-peers: needs-demo
	@$(MAKE) --no-print-directory $(CORE) $(CDEF)
	@python3 bench/peers/cpu.py

##> time against length and density, drawn into docs/images
.PHONY: bench-plots
bench-plots: needs-demo
	@$(MAKE) --no-print-directory $(CORE) $(CDEF)
	@$(IN_TREE) $(LUAJIT) bench/plots.lua

##> luacheck and clang-format
.PHONY: lint
lint: needs-lint
	luacheck --quiet --no-color lua bin/safeattn spec examples bench safeattn-scm-1.rockspec
	clang-format --dry-run -Werror $(wildcard src/*.[ch] src/*.cu src/kernels/*/*.[ch] src/kernels/*/*.cu \
		src/kernels/*/*.cuh examples/c/*.c spec/cuda/* spec/emulator/*.[ch] spec/emulator/*.cpp spec/emulator/*/*.cpp \
		spec/emulator/kernels/cuda/*)

##> the API pages, in build/docs
.PHONY: docs
docs: needs-docs
	@mkdir -p build
	ldoc --quiet .

LIBDIR = $(PREFIX)/lib
INCLUDEDIR = $(PREFIX)/include
INST_LIBDIR ?= $(DESTDIR)$(LIBDIR)/lua/5.1
INST_LUADIR ?= $(DESTDIR)$(PREFIX)/share/lua/5.1
INSTALLED_CUDA = $(if $(filter 0,$(CUDA)),,$(CUDA_LIBRARY))
MODULES = $(patsubst lua/%,%,$(sort $(CDEF) $(wildcard lua/safeattn/*.lua lua/safeattn/*/*.lua)))

##> Lua modules, C library, header and pkg-config file (PREFIX=/usr/local, DESTDIR=)
.PHONY: install
install: install-modules install-c
	install -d "$(INST_LIBDIR)/safeattn"
	# One file under two names: a host that links libsafeattn.so and runs Lua has one library, not two.
	ln -srf "$(DESTDIR)$(LIBDIR)/$(notdir $(LIBRARY))" "$(INST_LIBDIR)/safeattn/core.so"
	$(if $(INSTALLED_CUDA),ln -srf "$(DESTDIR)$(LIBDIR)/safeattn/cuda.so" "$(INST_LIBDIR)/safeattn/cuda.so")
	install -D -m 755 bin/safeattn "$(DESTDIR)$(PREFIX)/bin/safeattn"

##> the Lua side alone (INST_LIBDIR, INST_LUADIR), as LuaRocks wants it
.PHONY: install-lua
install-lua: install-modules $(CORE) $(INSTALLED_CUDA)
	install -d "$(INST_LIBDIR)/safeattn"
	install -m 755 $(CORE) "$(INST_LIBDIR)/safeattn/core.so"
	$(if $(INSTALLED_CUDA),install -m 755 $(CUDA_LIBRARY) "$(INST_LIBDIR)/safeattn/cuda.so")

.PHONY: install-modules
install-modules: $(CDEF)
	for module in $(MODULES); do install -D -m 644 "lua/$$module" "$(INST_LUADIR)/$$module" || exit 1; done

# What sed writes goes through install, which asks no umask who may read it.
.PHONY: install-c
install-c: $(LIBRARY) $(INSTALLED_CUDA)
	install -d "$(DESTDIR)$(LIBDIR)/pkgconfig" "$(DESTDIR)$(INCLUDEDIR)"
	install -m 755 $(LIBRARY) "$(DESTDIR)$(LIBDIR)"
	ln -sf $(notdir $(LIBRARY)) "$(DESTDIR)$(LIBDIR)/libsafeattn.so"
	$(if $(INSTALLED_CUDA),install -D -m 755 $(CUDA_LIBRARY) "$(DESTDIR)$(LIBDIR)/safeattn/cuda.so")
	install -m 644 src/safeattn.h "$(DESTDIR)$(INCLUDEDIR)"
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' \
		-e 's|@VERSION@|$(VERSION)|' safeattn.pc.in | \
		install -m 644 /dev/stdin "$(DESTDIR)$(LIBDIR)/pkgconfig/safeattn.pc"

##> takes away what install put there (the same PREFIX and DESTDIR)
.PHONY: uninstall
uninstall:
	rm -rf "$(INST_LUADIR)/safeattn" "$(INST_LIBDIR)/safeattn" "$(DESTDIR)$(LIBDIR)/safeattn"
	rm -f "$(DESTDIR)$(LIBDIR)/$(notdir $(LIBRARY))" "$(DESTDIR)$(LIBDIR)/libsafeattn.so" \
		"$(DESTDIR)$(LIBDIR)/pkgconfig/safeattn.pc" "$(DESTDIR)$(INCLUDEDIR)/safeattn.h" "$(DESTDIR)$(PREFIX)/bin/safeattn"

##> remove what was built
.PHONY: clean
clean:
	rm -rf build lua/safeattn/core.so lua/safeattn/cuda.so lua/safeattn/cdef.lua

##> this list
.PHONY: help
help:
	@awk '/^##> / { text = substr($$0, 5) } /^[a-z-]+:/ && text { \
		sub(/:.*/, "", $$1); printf "  make %-15s %s\n", $$1, text; text = "" }' Makefile
