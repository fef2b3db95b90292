# builds lua/safeattn/core.so and lua/safeattn/cdef.lua, and runs what the README names; `make help` lists it

CC ?= gcc
CFLAGS ?= -O3 -g
BUILD ?= build
CORE ?= lua/safeattn/core.so
CDEF ?= lua/safeattn/cdef.lua

# What the code needs, kept apart from CFLAGS, which a packager sets. Products and sums are never fused behind our back
# (-ffp-contract=off): the kernels say where they want a fused multiply-add, so that every build gives the same bits.
OWN_CFLAGS = -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -pthread -Isrc \
	-Wall -Wextra -Wno-unused-parameter
# LuaJIT unloads a library when its handle is collected; a pool of threads would then run on unmapped code.
OWN_LDFLAGS = -shared -pthread -Wl,-z,nodelete
LDLIBS = -lm -ldl

SOURCES = $(wildcard src/*.c src/kernels/cpu/*.c)
OBJECTS = $(SOURCES:src/%.c=$(BUILD)/%.o)
HEADERS = $(wildcard src/*.h src/kernels/cpu/*.h)

ifeq ($(shell uname -m),x86_64)
$(BUILD)/kernels/cpu/avx2.o: ISA_CFLAGS = -march=x86-64-v3
$(BUILD)/kernels/cpu/avx512.o: ISA_CFLAGS = -march=x86-64-v4 -mprefer-vector-width=512
endif

.PHONY: all
all: $(CORE) $(CDEF)

$(CORE): $(OBJECTS)
	$(CC) $(CFLAGS) $(OWN_LDFLAGS) $(LDFLAGS) -o $@.new $^ $(LDLIBS) && mv $@.new $@

$(BUILD)/%.o: src/%.c $(HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(OWN_CFLAGS) $(ISA_CFLAGS) -c -o $@ $<

$(CDEF): src/safeattn.h Makefile
	@{ echo '-- the C declarations, made by `make` from src/safeattn.h'; \
	   echo 'require("ffi").cdef [['; \
	   sed -n '/^\/\/ cdef: everything/,/^\/\/ cdef: end/p' $<; \
	   echo ']]'; } > $@.new && mv $@.new $@

.PHONY: clean
clean:
	rm -rf build lua/safeattn/core.so lua/safeattn/cdef.lua
