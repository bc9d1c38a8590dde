"""The look of the report page, and the script that sorts its tables."""

_LIGHT = ("#2563c9", "#c2560c", "#0f8a6b", "#8445c4", "#c0336f", "#8a6d00", "#0a7f9e", "#5d6470")
_DARK = ("#7aa7ff", "#ff9f5a", "#4fd1a8", "#c79bff", "#ff86b7", "#e3c04a", "#5fd0ee", "#aab2c0")


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f"--s{index}:{value};" for index, value in enumerate(values))


STYLE = (
    ":root{color-scheme:light dark;--paper:#fbfbfa;--card:#ffffff;--ink:#1c1f24;--quiet:#626a76;"
    "--rule:#dfe2e7;--warn:#8f2d0e;--warn-paper:#fff1ea;" + _colours(_LIGHT) + "}"
    "@media(prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e24;--ink:#e8eaee;"
    "--quiet:#9aa3b0;--rule:#30353f;--warn:#ffb492;--warn-paper:#3a2119;"
    + _colours(_DARK)
    + "}}"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(_LIGHT)))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 10px;overflow-wrap:anywhere}
header p,figcaption,section>p,dt{color:var(--quiet)}
section{margin-top:26px}
section:not(.plots),figure{background:var(--card);border:1px solid var(--rule);
 border-radius:10px;padding:16px 18px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:18px}
figure{margin:0;display:flex;flex-direction:column}
figcaption{margin-top:auto;padding-top:6px;font-size:13px}
svg{width:100%;height:auto;font-size:12px}
svg text{fill:var(--ink)} svg .quiet{fill:var(--quiet)}
.grid{stroke:var(--rule);fill:none} .mark{stroke:var(--quiet);stroke-dasharray:4 3;fill:none}
.line{stroke:var(--c);stroke-width:2;fill:none} .curve{stroke-linejoin:round}
.dot,.bar{fill:var(--c)}
.legend{margin:6px 0 0;font-size:13px} .legend span{margin-right:16px;white-space:nowrap}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);
 margin-right:7px}
.wide{overflow-x:auto}
details{margin-top:26px} summary{cursor:pointer;font-weight:600}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);text-align:left;
 white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
td.number,th.number{text-align:right}
th button{all:unset;cursor:pointer;color:var(--quiet);font-size:13px}
th button:hover,th button:focus-visible{color:var(--ink);text-decoration:underline}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.share{display:block;height:4px;margin:2px 0 0 auto;border-radius:2px;background:var(--s0);
 min-width:1px} td:has(.share){min-width:110px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.warning{background:var(--warn-paper);color:var(--warn)!important;border-radius:8px;
 padding:8px 12px;margin:12px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0 0}
dd{margin:0;overflow-wrap:anywhere} ul{padding-left:20px;margin:0}
"""
)

SCRIPT = """
for (const th of document.querySelectorAll("th")) th.querySelector("button").onclick = () => {
  const table = th.closest("table"), at = [...th.parentNode.children].indexOf(th);
  const number = th.className === "number";
  const up = th.ariaSort ? th.ariaSort === "descending" : !number;
  const key = row => row.children[at].dataset.v ?? row.children[at].textContent;
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b))
    ? key(a).localeCompare(key(b), undefined, {numeric: true}) : key(a) - key(b);
  const rows = [...table.tBodies[0].rows].sort((a, b) => up ? order(a, b) : order(b, a));
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
};
"""
