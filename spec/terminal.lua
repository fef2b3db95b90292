-- a program on a pseudo-terminal: what is typed at it, and what it shows

local ffi = require "ffi"
local assert = require "luassert"

ffi.cdef [[
int forkpty(int *master, char *name, const void *modes, const void *size);
int execvp(const char *file, const char *const arguments[]);
void _exit(int status);
struct spec_poll { int fd; short events, revents; };
int poll(struct spec_poll *fds, unsigned long count, int timeout);
intptr_t spec_read(int fd, void *bytes, size_t count) __asm__("read");
intptr_t spec_write(int fd, const void *bytes, size_t count) __asm__("write");
int spec_close(int fd) __asm__("close");
int waitpid(int pid, int *status, int options);
int kill(int pid, int signal);
]]
local C = ffi.C

local Terminal = {}
Terminal.__index = Terminal

local PATIENCE = 60 -- seconds until a program that shows nothing more is given up
local POLLIN, KILL = 1, 9

--- Starts a program, with a terminal of its own.
-- @param arguments a list: program and arguments
function Terminal.start(arguments)
  local list = ffi.new("const char *[?]", #arguments + 1)
  for n, argument in ipairs(arguments) do list[n - 1] = argument end
  local master = ffi.new("int[1]")
  local pid = C.forkpty(master, nil, nil, nil)
  if pid == 0 then
    C.execvp(list[0], list)
    C._exit(127)
  end
  assert(pid > 0, "no pseudo-terminal")
  return setmetatable({pid = pid, fd = master[0], shown = "", seen = 0}, Terminal)
end

-- Waits for more output; false at its end.
local function read_more(terminal)
  local wanted = ffi.new("struct spec_poll[1]")
  wanted[0].fd, wanted[0].events = terminal.fd, POLLIN
  if C.poll(wanted, 1, PATIENCE * 1000) <= 0 then
    error("nothing more came after:\n" .. terminal.shown:sub(terminal.seen + 1), 0)
  end
  local bytes = ffi.new("char[4096]")
  local count = tonumber(C.spec_read(terminal.fd, bytes, 4096))
  if count <= 0 then return false end
  terminal.shown = terminal.shown .. ffi.string(bytes, count):gsub("\r", "")
  return true
end

--- Waits until the terminal shows a text (behind what was waited for before) and returns what came before it.
function Terminal:expect(text)
  while true do
    local first, last = self.shown:find(text, self.seen + 1, true)
    if first then
      local before = self.shown:sub(self.seen + 1, first - 1)
      self.seen = last
      return before
    end
    if not read_more(self) then
      error(("the program ended without %q; it showed:\n%s"):format(text, self.shown:sub(self.seen + 1)), 0)
    end
  end
end

function Terminal:type(text)
  assert(tonumber(C.spec_write(self.fd, text, #text)) == #text)
end

--- Waits for the end of the program and returns its exit status.
function Terminal:wait()
  while read_more(self) do end
  local status = ffi.new("int[1]")
  C.waitpid(self.pid, status, 0)
  C.spec_close(self.fd)
  self.pid = nil
  return bit.rshift(status[0], 8)
end

--- Ends the program if it still runs.
function Terminal:stop()
  if not self.pid then return end
  C.kill(self.pid, KILL)
  C.waitpid(self.pid, nil, 0)
  C.spec_close(self.fd)
  self.pid = nil
end

return Terminal
