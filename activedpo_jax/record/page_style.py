"""How a comparison's page looks: its style sheet, in a light and a dark theme, and the colours of strategies."""

from collections.abc import Sequence

# Okabe and Ito's palette; in the dark theme lighter, so that names can be read on the ground.
_LIGHT = ("#0072B2", "#D55E00", "#007A5A", "#B0588F", "#8A6D00", "#2F7FB8")
_DARK = ("#5CB8F0", "#FF9A5A", "#4FD1A5", "#EBA3CF", "#F2C94C", "#9AD0F5")
_BASELINE = ("#6B6B6B", "#B5B5B5")

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5c6068;
  --rule: #e3e1dc; --accent: #0072B2; --bad: #b3261e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --card: #1c1f25; --ink: #eceae6; --soft: #a3a8b2;
  --rule: #31353d; --accent: #5CB8F0; --bad: #ff8a80; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 1.1rem; margin: 0; color: var(--soft); font-weight: 500; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 56px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 28px 0 4px; }
p { margin: 6px 0 14px; } .soft { color: var(--soft); } .small { font-size: 0.88rem; }
.headline { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.02em; margin: 8px 0 18px;
  font-weight: 650; }
.verdicts { list-style: none; margin: 0; padding: 0; } .verdicts li { margin: 8px 0; padding: 12px 16px;
  background: var(--card); border: 1px solid var(--rule); border-left: 5px solid var(--soft); border-radius: 8px; }
.verdicts li.better { border-left-color: #1a936f; } .verdicts li.worse { border-left-color: var(--bad); }
.verdicts li.equal { border-left-color: var(--accent); }
figure { margin: 14px 0; padding: 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
figcaption { color: var(--soft); font-size: 0.88rem; margin-top: 6px; }
svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
.error { color: var(--bad); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 12px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
blockquote { margin: 10px 0; padding: 10px 14px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; font-size: 0.92rem; }
blockquote p { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: 0.82rem; }
.chosen { font-weight: 600; }
.grid { stroke: var(--rule); } .zero { stroke: var(--soft); stroke-width: 1.5; } .tick { fill: var(--soft); }
.axis { fill: var(--soft); } .name { font-weight: 600; } .margin { fill: var(--accent); fill-opacity: 0.12; }
.band { fill-opacity: 0.16; stroke: none; } .line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.dot { stroke: var(--card); stroke-width: 1.5; } .lead { stroke-width: 1; } .span { stroke-width: 4;
  stroke-linecap: round; } .cell { fill: var(--accent); } .ink { fill: var(--card); font-weight: 600; }
"""


def style(strategies: Sequence[str], baseline: str) -> str:
    """The style sheet; the i-th strategy has the class `s<i>`, and the baseline is grey."""
    colours, others = {"LIGHT": "", "DARK": ""}, [name for name in strategies if name != baseline]
    for i, name in enumerate(strategies):
        for theme, palette, grey in (("LIGHT", _LIGHT, _BASELINE[0]), ("DARK", _DARK, _BASELINE[1])):
            colour = grey if name == baseline else palette[others.index(name) % len(palette)]
            colours[theme] += f"--s{i}: {colour}; "
    rules = [
        f".dot.s{i}, .band.s{i}, .name.s{i} {{ fill: var(--s{i}); }} .line.s{i}, .lead.s{i}, .span.s{i} "
        f"{{ stroke: var(--s{i}); }} b.s{i} {{ color: var(--s{i}); }}"
        for i in range(len(strategies))
    ]
    return _STYLE.replace("LIGHT", colours["LIGHT"]).replace("DARK", colours["DARK"]) + "\n".join(rules)
