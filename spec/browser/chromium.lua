-- runs headless Chromium on a page: what it ends up with, what it complains of, what it looks like

local child = require "spec.child"
local files = require "spec.files"

local chromium = {}

local function command(arguments, page)
  -- Root has no use for Chromium's sandbox, and Chromium says so by refusing.
  local root = child.command("id -u"):match "^0" and "--no-sandbox" or ""
  local profile = child.command("mktemp -d"):match "%S+"
  local output, status = child.command(string.format("timeout 120 ${CHROMIUM:-chromium} --headless %s --disable-gpu"
    .. " --disable-dev-shm-usage --no-first-run --user-data-dir=%s --hide-scrollbars --virtual-time-budget=20000"
    .. " --enable-logging=stderr %s %s", root, profile, arguments, child.quoted(page)))
  child.command("rm -rf " .. profile)
  if status ~= 0 then error("chromium ended with status " .. tostring(status) .. ":\n" .. output, 2) end
  return output
end

local before = [[<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...parts) => problems.push(parts.join(" "));
</script>
]]

local after = [[<script>
{
  const lines = [], say = (...parts) => lines.push(parts.join("\t"));
  const act = (target, type, Kind, options) =>
    target.dispatchEvent(new Kind(type, { bubbles: true, cancelable: true, ...options }));
  const pointAt = (i, j) => {
    const box = $("picture").getBoundingClientRect(), look = current();
    act($("frame"), "pointermove", PointerEvent, { clientX: box.left + (j - 0.5) / look.S * box.width,
      clientY: box.top + (i - 0.5) / look.L * box.height });
    return $("readout").textContent;
  };
  const press = (key) => act($("frame"), "keydown", KeyboardEvent, { key });
  try {
%s
  } catch (problem) { problems.push(String(problem)); }
  document.body.replaceChildren();
  document.head.replaceChildren();
  const text = document.createElement("pre");
  text.textContent = "SAID\n" + lines.join("\n") + "\nPROBLEMS\n" + problems.join("\n") + "\nEND";
  document.body.append(text);
}
</script>
]]

--- Opens a page and runs a script in it, which has what the page's own script has, say(...), pointAt(i, j), press(key).
-- @param path of the page; it is not changed
-- @param script text
-- @param hash what follows "#" in its address
-- @param width of the window
-- @return the lines said, the problems (a text, "" when there were none)
function chromium.run(path, script, hash, width)
  local page = files.read(path)
  local copy = path .. ".harness.html"
  local start = page:find('<script type="application/json"', 1, true)
  local finish = page:find("</body>", start, true)
  files.write(copy, page:sub(1, start - 1) .. before .. page:sub(start, finish - 1) .. string.format(after, script)
    .. page:sub(finish))
  local dom = command(string.format("--window-size=%d,900 --dump-dom", width or 1200), "file://" .. copy .. "#"
    .. (hash or ""))
  os.remove(copy)
  local said, problems = dom:match "SAID\n(.-)\n?PROBLEMS\n(.-)\n?END"
  if not said then error("the script did not end:\n" .. dom:sub(1, 2000), 2) end
  local lines = {}
  local entities = {["&gt;"] = ">", ["&lt;"] = "<", ["&amp;"] = "&"}
  for line in said:gmatch "[^\n]+" do lines[#lines + 1] = line:gsub("&%l+;", entities) end
  return lines, problems
end

--- What the console says of a page as it is.
function chromium.console(path)
  local said = {}
  for line in command("--dump-dom", "file://" .. path):gmatch "[^\n]+" do
    if line:find("CONSOLE", 1, true) then said[#said + 1] = line end
  end
  return table.concat(said, "\n")
end

--- Saves what a page looks like.
-- @param flags more of the command line
function chromium.screenshot(path, hash, file, width, height, flags)
  command(string.format("--window-size=%d,%d %s --screenshot=%s", width, height, flags or "", child.quoted(file)),
    "file://" .. path .. "#" .. hash)
end

return chromium
