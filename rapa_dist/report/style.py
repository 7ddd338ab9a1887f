"""The look of the page: one style sheet for light and dark."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of curves on white (Okabe & Ito: safe for the colour-blind). In the page they are --series-1, …"""
INK, FAINT = "#123456", "#123457"
"""What figures are drawn with where the page has its colours of text and of grid lines."""

SHEET = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #5b6675; --line: #dfe3e9; --faint: #e8ebf0;
  --accent: #0a5d94; --note: #fff6df; --note-line: #e5b948;
  --series-1: #0072b2; --series-2: #c84f00; --series-3: #008a64; --series-4: #b35f8e; --series-5: #a87300;
  --series-6: #3d8fbf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --ink: #e4e9f1; --soft: #9aa6b8; --line: #2b3442; --faint: #28303d;
    --accent: #6cb8ec; --note: #2c2613; --note-line: #8b6d1e;
    --series-1: #56b4e9; --series-2: #f28c4c; --series-3: #35c79a; --series-4: #dd95ba; --series-5: #e6b03a;
    --series-6: #8fd0f5;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 4px 0 10px; }
.soft, figcaption, caption, footer { color: var(--soft); }
.kicker { color: var(--accent); font-weight: 600; font-size: 13px; margin: 0 0 6px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 20px; font-size: 14px; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px;
  margin: 18px 0 0; padding: 0; }
.cards > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.cards dt { color: var(--soft); font-size: 13px; }
.cards dd { margin: 0; font-size: 23px; font-weight: 620; font-variant-numeric: tabular-nums; line-height: 1.3; }
.cards dd small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); line-height: 1.4; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin: 0 0 18px;
  scroll-margin-top: 12px; }
.note { background: var(--note); border: 1px solid var(--note-line); border-radius: 10px; padding: 10px 16px;
  margin: 0 0 18px; }
.note ul { margin: 4px 0; padding-left: 20px; }
figure { margin: 14px 0 10px; }
figcaption { font-size: 13.5px; margin-top: 6px; max-width: 92ch; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figure svg .hits use { opacity: 0; }
figure svg .hits use:hover { opacity: 1; }
figure svg .bar:hover { opacity: 0.55; }
.plate { width: 100%; height: auto; display: block; background: #fff; border-radius: 8px; }
.scroll { overflow: auto; max-height: 560px; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 6px; font-size: 13.5px; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--card); }
tbody th { font-weight: 500; }
table.facts { width: 100%; }
table.facts th { width: 15em; color: var(--soft); }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
details { margin: 10px 0 0; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.filters { display: grid; grid-template-columns: max-content minmax(300px, 1fr); gap: 5px 12px; align-items: center;
  margin: 10px 0; font-size: 12.5px; font-variant-numeric: tabular-nums; color: var(--soft); }
.filters img { width: 100%; height: auto; display: block; image-rendering: pixelated; }
footer { font-size: 13px; padding-bottom: 40px; }
@media print { body { background: #fff; } section { break-inside: avoid-page; } nav { display: none; } }
"""
