"""The notebooks as web pages: stage copies that a reader wants to see, then let Jupyter Book render them.

Staging drops what nbdev hides, takes the directives off the exported cells and marks them, numbers the chapters, names the
checking cells, and makes the page of the register from the notebooks. Nothing is executed and nothing is fetched."""
import ast, html, json, re, shutil, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent; ROOT = HERE.parent; NBS = ROOT/'nbs'; OUT = ROOT/'_site'
sys.path.insert(0, str(ROOT))
from vggflow.common.equations import CORRECTIONS, EQUATIONS, STATEMENTS, equation_name, equation_table, equation_totals

ITEMS = {*EQUATIONS, *STATEMENTS, *CORRECTIONS}
source = lambda c: ''.join(c['source'])
markdown = lambda text: dict(cell_type='markdown', metadata={}, source=text)

def directives(text):
    "The nbdev directives at the top of a cell, and the rest"
    found = re.match(r'(?:#\|[^\n]*(?:\n|$))*', text)[0]
    return [l[2:].split() for l in found.splitlines()], text[len(found):].lstrip('\n')

def label(tags):
    "A line above a cell that the register knows: what it checks, with the anchor that the register's table links to"
    known = [t for t in tags if t.removesuffix('-teeth') in ITEMS]
    if not known: return []
    says = ', '.join(equation_name(t.removesuffix('-teeth')) for t in known)
    what = 'teeth' if known[0].endswith('-teeth') else 'check'
    anchors = ''.join(f'<a id="{t}"></a>' for t in known)
    return [markdown(f'<div class="register {what}">{anchors}<a href="equations.html#{known[0]}">{what} of {html.escape(says)}</a></div>')]

def joined(outputs):
    "Lines printed one after the other in one block"
    res = []
    for o in outputs:
        if o['output_type']=='stream' and res and res[-1].get('name')==o['name']: res[-1] = dict(res[-1], text=''.join(res[-1]['text'])+''.join(o['text']))
        else: res.append(o)
    return res

def stage_cell(c, module):
    "The cells that a page shows for one cell of the notebook"
    if c['cell_type']!='code': return [dict(c, metadata={}, source=source(c))]
    words,text = directives(source(c)); names = [w[0] for w in words if w]
    if 'hide' in names or 'default_exp' in names or text.startswith("if __name__ == '__main__' and"): return []
    tags = c['metadata'].get('tags', [])
    marks = ['export'] if module and 'export' in names else []
    if all(isinstance(n, (ast.Import,ast.ImportFrom)) for n in ast.parse(text).body): marks.append('hide-input')
    return [*label(tags), dict(c, source=text, outputs=joined(c['outputs']), metadata=dict(tags=[t for t in tags if t=='parameters']+marks))]

def stage(nb, to):
    "Write the page of one notebook"
    d = json.loads(nb.read_text()); text = '\n'.join(source(c) for c in d['cells'])
    module = re.search(r'#\|\s*default_exp (\S+)', text)
    cells = [s for c in d['cells'] for s in stage_cell(c, module)]
    number = re.match(r'(\d\d)_', nb.name)
    if number: cells[0]['source'] = cells[0]['source'].replace('# ', f'# {int(number[1])}. ', 1)
    if module: cells.insert(1, markdown(f'<p class="module">exports <code>vggflow.{module[1]}</code> · <code>{nb.relative_to(ROOT)}</code></p>'))
    if nb.name=='equations.ipynb': cells = with_register(cells)
    d['cells'] = [dict(c, id=f'c{k}', source=c['source'].replace('../figures/', 'figures/').replace('../data/', 'data/')) for k,c in enumerate(cells)]
    to.parent.mkdir(parents=True, exist_ok=True); to.write_text(json.dumps(d))
    return set(re.findall(r'\]\(((?:figures|data)/[^)\s]+)\)', '\n'.join(c['source'] for c in d['cells'] if c['cell_type']=='markdown')))

def register_row(r):
    "One row of the register's table"
    link = lambda page,anchor,text: f'<a href="{page}.html{anchor}">{html.escape(text)}</a>'
    chapters = [c for c in r['chapter'].split(', ') if c]
    name = equation_name(r['item']); name = link(chapters[0], f"#{r['item']}", name) if chapters else html.escape(name)
    where = '<br>'.join(link(c, '', re.sub('^0', '', c).replace('_', ' ', 1)) for c in chapters)
    kind = {'holds':'holds', 'holds with a condition':'condition', 'printed form corrected':'corrected'}.get(r['verdict'], 'missing')
    note = f"<br><small>{html.escape(r['note'])}</small>" if r['note'] else ''
    kinds,errors,tols = (r[k].replace(', ', '<br>') for k in ('kind','error','tol'))   # one line for each checking cell
    return (f'<tr id="{r["item"]}"><td>{name}</td><td>{where}</td><td>{kinds}</td><td>{errors}</td><td>{tols}</td>'
            f'<td>{r["teeth"]}</td><td><span class="verdict {kind}">{r["verdict"]}</span>{note}</td></tr>')

def with_register(cells):
    "Put the table where the notebook computes it"
    rows = equation_table(NBS); head = ('equation','chapter','kind of check','error','allowed','teeth','verdict')
    group = lambda known: ''.join(register_row(r) for r in rows if r['item'] in known)
    title = lambda text: f'<tr class="part"><th colspan="{len(head)}">{text}</th></tr>'
    table = ('<div class="wide"><table class="table register"><thead><tr>'+''.join(f'<th>{h}</th>' for h in head)+'</tr></thead><tbody>'
             +title('Equations')+group(EQUATIONS)+title('Propositions, remarks and the algorithm')+group(STATEMENTS)
             +title('Corrections outside the numbered equations')+group(CORRECTIONS)+'</tbody></table></div>')
    return [markdown(f'{equation_totals(rows)}.\n\n{table}') if c['cell_type']=='code' else c for c in cells]

def copy_mathjax():
    "The part of MathJax that the pages load"
    import importlib.util
    at = Path(importlib.util.find_spec('sphinx-mathjax-offline').submodule_search_locations[0])/'static'/'mathjax'
    to = OUT/'html'/'_static'/'mathjax'; (to/'input').mkdir(parents=True, exist_ok=True)
    shutil.copy(at/'tex-chtml.js', to)
    for part in ('output/chtml/fonts','input/tex/extensions'): shutil.copytree(at/part, to/part, dirs_exist_ok=True)

def main():
    src = OUT/'src'; shutil.rmtree(src, ignore_errors=True); src.mkdir(parents=True)
    needed = set()
    for nb in sorted(NBS.rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in nb.parts: needed |= stage(nb, src/nb.relative_to(NBS))
    for f in sorted(needed):
        if (ROOT/f).is_file(): (src/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/f, src/f)
    for f in ('_config.yml','_toc.yml'): shutil.copy(HERE/f, src)
    (src/'_static').mkdir(); shutil.copy(HERE/'site.css', src/'_static')
    subprocess.run([Path(sys.executable).parent/'jupyter-book', 'build', '-q', str(src), '--path-output', str(OUT)], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(OUT/'html', ignore_errors=True); shutil.move(OUT/'_build'/'html', OUT/'html'); copy_mathjax()
    print(f'{OUT.relative_to(ROOT)}/html/index.html')

if __name__=='__main__': main()
