-- the page of a report, where `$(name)` stands for what is put in

return [[
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$(title)</title>
<style>
$(style)</style>
</head>
<body>
<header>
<h1>$(title)</h1>
<p id="summaryText"></p>
<p id="note" class="soft"></p>
<select id="looks" aria-label="recorded attention"></select>
</header>
<main>
<section class="wide" aria-label="heads"><div id="heads"></div></section>
<section aria-label="picture">
<div id="shows" class="bar" role="group" aria-label="what to show">
<button value="mask">mask</button><button value="weights">weights</button><button value="scores">scores</button>
<button value="dS">dS</button>
</div>
<div id="frame" tabindex="0" role="application"
  aria-label="pairs of queries (down) and keys (across); the arrow keys move" aria-describedby="readout">
<canvas id="picture"></canvas><div id="ticks" class="ticks"></div><div id="marks"></div>
<div id="across"></div><div id="down"></div>
</div>
<output id="readout" aria-live="polite"></output>
<p id="legend" class="legend"></p>
</section>
<section aria-label="one query">
<div class="bar"><label>query <input id="query" type="number" min="1" inputmode="numeric"></label>
<button id="back" aria-label="previous query">&#9650;</button>
<button id="forth" aria-label="next query">&#9660;</button>
</div>
<p id="summary" aria-live="polite"></p>
<canvas id="strip" role="img" aria-label="weights of this query over the keys"></canvas>
<div class="table" tabindex="0" aria-label="keys of this query"><table id="keys"></table></div>
<p id="rest" class="soft"></p>
</section>
<section><h2>Dead rows</h2><pre id="deadRowsText"></pre></section>
<section><h2>Dead keys</h2><pre id="deadKeysText"></pre></section>
<section class="wide"><h2>NaN and Inf</h2><pre id="nonfiniteText"></pre></section>
<section class="wide"><h2>Inputs</h2><div class="table"><table id="stats"></table></div></section>
</main>
<script type="application/json" id="data">$(data)</script>
<script>
$(script)</script>
</body>
</html>
]]
