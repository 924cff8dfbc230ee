"""The style of the report's page: light and dark by what the reader's device prefers, light on paper."""

_LIGHT = """
--paper:#fff;--ink:#1d2026;--dim:#606773;--rule:#dfe2e7;--c0:#2f6db3;--c1:#c8640c;--c2:#2f8a50;--c3:#8a52b0;--c4:#b8394e;
--c5:#75777d;--c6:#1a8c94;--c7:#a37c00;--c8:#c2528f;--c9:#5d6b2e;
"""
_DARK = """
--paper:#15171b;--ink:#e6e8ec;--dim:#9aa1ad;--rule:#31353d;--c0:#6ea8e8;--c1:#eb9850;--c2:#62bd83;--c3:#bb8be0;--c4:#e8788a;
--c5:#a3a7b0;--c6:#55c0c8;--c7:#d9b545;--c8:#e48bbb;--c9:#a3b36a;
"""
_CATEGORIES = {
    "step": "--c2", "lost": "--c4", "data_wait": "--c1", "save": "--c0", "evaluate": "--c6", "init": "--c7",
    "restore": "--c8", "compile": "--c3", "other": "--c5", "down": "--rule",
}  # fmt: skip

STYLE = (
    f":root{{{_LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.7rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .7rem;border-bottom:1px solid var(--rule)}
header p{margin:.2rem 0 1.2rem;color:var(--dim);overflow-wrap:anywhere}
small,footer,dt{color:var(--dim)}footer{margin-top:3rem;font-size:.85rem;overflow-wrap:anywhere}
.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr));gap:.6rem}
.numbers div{border:1px solid var(--rule);border-radius:.4rem;padding:.5rem .7rem}
.numbers b,.numbers span{display:block}.numbers b{font-weight:600}.numbers span{color:var(--dim);font-size:.85rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.92rem}
dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.2rem 1.5rem;
margin:1rem 0}
figure{margin:0;min-width:0;max-width:46rem;break-inside:avoid}figcaption{font-weight:600;font-size:.95rem}
figcaption small{font-weight:400}
svg{display:block;width:100%;height:auto}svg text{fill:var(--dim);font:12px system-ui,sans-serif}svg.bar{height:2rem}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--dim);fill:none}
.mark{stroke:var(--ink);stroke-dasharray:2 3;opacity:.4;fill:none}
polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}
.dashed{stroke-dasharray:5 4;stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:.2rem 0 0;font-size:.83rem;color:var(--dim)}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:.2em;margin-right:.35em}
.scroll{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-size:.88rem;width:100%}
th{text-align:left;color:var(--dim);font-weight:500}
th,td{padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
td{font-variant-numeric:tabular-nums}ul{padding-left:1.1rem}li.error b{color:var(--c4)}li.warning b{color:var(--c1)}
li.note b{color:var(--dim)}
@media print{main{max-width:none;padding:0}body{font-size:11pt}
.legend i,.area{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.charts{grid-template-columns:1fr 1fr}.scroll{overflow:visible}h2{break-after:avoid}}
"""
    + "".join(
        f"polyline.c{n}{{stroke:var(--c{n})}}circle.c{n}{{fill:var(--c{n})}}i.c{n}{{background:var(--c{n})}}"
        for n in range(10)
    )
    + "".join(
        f".area.{name}{{fill:var({color})}}i.{name}{{background:var({color})}}" for name, color in _CATEGORIES.items()
    )
)
