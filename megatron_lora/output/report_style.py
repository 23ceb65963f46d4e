"""The look of report.html: its style sheet, light and dark, and a script for sorting and filtering, without which all is readable.

Colours c0 to c7 differ also to the usual colour blindnesses, in each of the two schemes.
"""

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3d9fd8", "#6a51a3", "#76751c")
DARK = ("#4fa3e0", "#f0803c", "#2cc295", "#e39bc4", "#f2b632", "#8fd0f5", "#a592e0", "#c0be5a")
NUM_COLOURS = len(LIGHT)
BASE_LIGHT = {"bg": "#f7f7f5", "card": "#fff", "ink": "#1c1e21", "muted": "#63676e", "line": "#e3e3df"}
BASE_DARK = {"bg": "#131518", "card": "#1b1e23", "ink": "#e8e9eb", "muted": "#9aa0a8", "line": "#30343b"}
STATES_LIGHT, STATES_DARK = (
    {"good": "#00734f", "bad": "#b3261e", "warn": "#8a5a00"},
    {"good": "#3ccf9c", "bad": "#ff8a80", "warn": "#f2b632"},
)


def _variables(colours: tuple[str, ...], *others: dict[str, str]) -> str:
    """Return the declarations of a scheme's colours, in braces."""
    named = {f"c{at}": colour for at, colour in enumerate(colours)}
    for each in others:
        named |= each
    return "{" + "".join(f"--{name}:{value};" for name, value in named.items()) + "}"


STYLE = (
    f":root{_variables(LIGHT, BASE_LIGHT, STATES_LIGHT)}:root{{color-scheme:light dark}}"
    f"@media(prefers-color-scheme:dark){{:root{_variables(DARK, BASE_DARK, STATES_DARK)}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px}
h3{font-size:14px;margin:0 0 2px;overflow-wrap:anywhere}
p{margin:4px 0}
.muted{color:var(--muted)} .small{font-size:13px}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center}
header p{flex-basis:100%;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(116px,1fr));gap:10px;margin-top:20px}
.figures div,.card,.box{background:var(--card);border:1px solid var(--line);border-radius:10px}
.figures div{padding:12px 16px}
.figures b{display:block;white-space:nowrap;font-size:22px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.figures span{color:var(--muted);font-size:13px}
.notice{margin-top:12px;padding:10px 16px;border-left:4px solid var(--bad)}
.notice li{overflow-wrap:anywhere} .notice ul{margin:4px 0;padding-left:18px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:14px}
.charts.many{grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:10px}
.card{padding:12px 14px;min-width:0;content-visibility:auto;contain-intrinsic-size:auto 150px}
.card p{margin:0 0 4px}
.many .card{padding:8px 10px} .many h3{font-size:13px}
.box{padding:14px 16px;overflow-x:auto}
svg{display:block;width:100%;height:auto} svg.wide{min-width:900px}
svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg .ink{fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.35} .faint{stroke:var(--muted);stroke-width:1;opacity:.3} .crowd .faint{opacity:.12}
path.faint:hover,.crowd path.faint:hover{opacity:1;stroke-width:2}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 10px;color:var(--muted);font-size:13px}
.key i{display:inline-block;width:18px;height:3px;border-radius:2px;vertical-align:middle;margin-right:6px}
.key i.tile{width:12px;height:12px}
.key svg{display:inline-block;width:12px;height:12px;vertical-align:-1px;margin-right:6px}
.scroll{max-height:75vh;overflow:auto;padding:0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--card);color:var(--muted);font-weight:600;z-index:1}
th[data-sort]{cursor:pointer} th[aria-sort=ascending]:after{content:" \\2191"} th[aria-sort=descending]:after{content:" \\2193"}
.l{text-align:left} tr:last-child td{border-bottom:0} tfoot td{font-weight:600;border-top:2px solid var(--line)}
td.why{text-align:left;white-space:normal;min-width:260px;color:var(--muted);font-size:13px;overflow-wrap:anywhere}
td svg{width:110px;height:22px}
.bar{display:block;height:8px;border-radius:4px;background:var(--c0)}
.track{display:inline-block;width:80px;margin-right:10px}
.state{display:inline-block;padding:1px 9px;border-radius:99px;border:1px solid currentColor;font-size:13px;white-space:nowrap}
.done{color:var(--good)} .failed{color:var(--bad)} .running{color:var(--c0)} .paused{color:var(--warn)}
.queued,.stopped,.cancelled{color:var(--muted)}
details>summary{cursor:pointer;padding:6px 0;color:var(--muted)}
input{font:inherit;width:min(100%,340px);padding:7px 12px;margin:0 0 12px}
input{border:1px solid var(--line);border-radius:8px;background:var(--card);color:var(--ink)}
footer{margin-top:40px;color:var(--muted);font-size:13px;overflow-wrap:anywhere}
[hidden]{display:none!important}
@media(max-width:560px){main{padding:18px 12px 32px} h1{font-size:23px} .figures{grid-template-columns:1fr 1fr} .figures b{font-size:19px}}
@media print{.scroll{max-height:none} .card{break-inside:avoid}}
"""
)

SCRIPT = """
for (const head of document.querySelectorAll("th[data-sort]")) head.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending", table = head.closest("table"), at = head.cellIndex;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return (down ? -1 : 1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(order));
});
for (const place of document.querySelectorAll("[data-filter]")) {
  const input = document.createElement("input");
  input.type = "search"; input.placeholder = "Filter by name or state"; input.setAttribute("aria-label", input.placeholder);
  place.before(input);
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const each of place.querySelectorAll("[data-find]")) each.hidden = !each.dataset.find.toLowerCase().includes(wanted);
  });
}
"""
