"README.md and the HTML docs, made from the notebooks without quarto: nbdev processes a notebook, we write markdown, mkdocs-material makes the site"
import base64,importlib,inspect,os,re,shutil,subprocess,sys,textwrap,warnings,yaml
from functools import partial
from itertools import groupby
from pathlib import Path
from fastcore.docments import docments,empty
from fastcore.nbio import read_nb
from fastcore.script import call_parse
from latex2mathml.converter import convert
from nbdev.config import get_config,nbpath2html
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults,exec_show_docs,rm_header_dash
from nbdev.showdoc import BasicMarkdownRenderer

root = Path(__file__).resolve().parent.parent
cfg = get_config(root)
nbs,url,index = root/cfg.nbs_path.name,cfg.doc_url.rstrip('/')+'/','index.ipynb'
re_dash = re.compile(r'^(#+) (\S+) -[ \t]*$', re.M)
sections = {'.':'API', 'tutorials':'Tutorials', 'explain':'Explain'}
css = '''.md-typeset table:not([class]) th {min-width:0}
.md-grid {max-width:66rem} .md-nav__title {box-shadow:none}
.md-typeset table:not([class]) td:not(:nth-child(n+4)) code {white-space:nowrap}
.md-typeset table:not([class]) :is(td,th) {padding:.4em .9em}
.md-typeset math[display=block] {margin:1.2em 0; overflow-x:auto; overflow-y:hidden}
.md-typeset .out pre > code {background:none; border-left:.15rem solid var(--md-default-fg-color--lighter); max-height:30rem}'''

def _txt(s): return s if isinstance(s, str) else ''.join(s)
def _fence(s, lang='', cls=''):
    f = '`'*max(3, *(len(o)+1 for o in re.findall('`{3,}', s)), 3)
    return f"{f}{f' {{.{lang} .{cls}}}' if cls else lang}\n{s.rstrip()}\n{f}"

# ---- a symbol: signature, one line, a table of parameters, its source (so that no page needs a code host)

def _short(s):
    "`s` without module prefixes and addresses"
    s = re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])', '', s)
    return re.sub(r"<(?:function|class|built-in function) '?([\w.<>]+?)'?(?: at 0x\w+)?>", lambda m: m[1].split('.')[-1], s)
def _type(a): return '' if a in (empty,type(None)) else a.__name__ if type(a) is type else _short(str(a))
def _code(s): return f'`{s}`' if s else ''
def _heading(hashes, nm): return f"{hashes} {nm.replace('_', chr(92)+'_')} {{ #{nm.lower()} }}"
def _row(k, d):
    default = '' if d['default'] is empty else _code(_short(repr(d['default'])))
    return f"| {'returns' if k=='return' else _code(k)} | {_code(_type(d['anno']))} | {default} | {' '.join((d['docment'] or '').split())} |"

class SymbolDoc(BasicMarkdownRenderer):
    "What a page says about one symbol"
    def _repr_markdown_(self):
        o,cls = self.sym,inspect.isclass(self.sym)
        inherits = cls and '__init__' not in vars(o) and '__signature__' not in vars(o)
        hypers = getattr(o, 'hypers', None) if cls and getattr(o, 'func', None) else None
        dms = docments(o if hypers is None else o.func, full=True, args_kwargs=True) # a module made from a function has that function's docments
        def shown(k, v): return (not cls and (v['docment'] or _type(v['anno']))) if k=='return' else k!='self' and (hypers is None or k in hypers)
        dms = {} if inherits else {k:v for k,v in dms.items() if shown(k,v)}
        sig = self.sig and self.sig.replace(parameters=[p.replace(annotation=empty) for p in self.sig.parameters.values()], return_annotation=empty)
        if inherits: sig = f"({', '.join(b.__name__ for b in o.__bases__ if b is not object)})"
        sig = f"{'class ' if cls else ''}{self.nm}{_short(str(sig or '(...)'))}"
        res = [_heading('#'*self.title_level, self.nm) if self.title_level else '']
        res += [_fence(textwrap.fill(sig, 84, subsequent_indent='    '), 'python'), self.docs]
        if dms: res.append('\n'.join(['| parameter | type | default | meaning |', '|:--|:--|:--|:--|', *(_row(k,v) for k,v in dms.items())]))
        return '\n\n'.join([r for r in res if r]+['??? quote "source"\n\n'+textwrap.indent(_fence(textwrap.dedent(inspect.getsource(o)), 'python'), '    ')])

class RunShowDoc(exec_show_docs):
    "Run `show_doc` cells and nothing else, with the names of the exported module"
    def begin(self):
        super().begin()
        mod = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_), 'all')
        dash = {m[2] for c in self.nb.cells if c.cell_type=='markdown' for m in re_dash.finditer(c.source)}
        def show_doc(o): return SymbolDoc(o, title_level=0 if SymbolDoc(o).nm in dash else 3)
        if any('show_doc(' in c.source for c in self.nb.cells):
            self.k.user_ns.update({k:v for k,v in vars(importlib.import_module(f'{cfg.lib_path.name}.{mod}')).items() if k[:2]!='__'}, show_doc=show_doc)
    def __call__(self, cell):
        if cell.cell_type=='code' and 'show_doc(' in cell.source: super().__call__(cell)

def dash_heading(cell):
    "`## name -` heads what is said about `name`, prose included"
    if cell.cell_type=='markdown' and cell.source: cell.source = re_dash.sub(lambda m: _heading(m[1], m[2]), cell.source)

class Docs(FilterDefaults):
    "nbdev's processors, but no cell of the notebook runs: outputs are the stored ones"
    def base_procs(self): return [RunShowDoc if o is exec_show_docs else o for o in super().base_procs() if o is not rm_header_dash]+[dash_heading]

# ---- a notebook as markdown

def mathml(s, where):
    "`$..$` and `$$..$$` outside code as MathML, which browsers draw without scripts"
    def f(m):
        if m[1]: return m[0]
        res = convert(m[2] or m[3], display='block' if m[2] else 'inline')
        bad = re.search(r'>\s*(\\\w+)', res)
        if bad: raise ValueError(f'{where}: formula ${m[2] or m[3]}$: {bad[1]} is not understood by latex2mathml; write it another way')
        return re.sub(r'\\([_%&#])', r'\1', res).replace('*','&#42;').replace('_','&#95;') # markdown would read these; `\_` stays as it is in \text
    s = re.sub(r'(```.*?```|(?<!`)`[^`\n]+`(?!`))|(?<!\\)\$\$(.+?)\$\$|(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?!\w)', f, s, flags=re.S)
    return s.replace(r'\$', '$')

def _width(b):
    "The width that the PNG `b` has at its own resolution, as an attribute"
    if b[:4]!=b'\x89PNG' or (i:=b.find(b'pHYs'))<0: return ''
    px,per_m = (int.from_bytes(b[j:j+4], 'big') for j in (16,i+4))
    return f'{{ width={round(px/per_m/.0254*90)} }}'

def _out(o, img, math, cls):
    "Markdown of one output, richest form first"
    if o['output_type']=='stream': return _fence(re.sub(r'[^\n]*\r(?!\n)|\x1b\[[0-9;]*m', '', _txt(o['text'])), 'text', cls) if _txt(o['text']).strip() else ''
    if o['output_type']=='error': return _fence(f"{o['ename']}: {o['evalue']}", 'text', cls)
    d = o['data']
    for mime,ext in (('image/svg+xml','svg'),('image/png','png'),('image/jpeg','jpg')):
        if mime in d: return img(_txt(d[mime]).encode() if ext=='svg' else base64.b64decode(_txt(d[mime])), ext)
    if 'text/markdown' in d: return math(_txt(d['text/markdown']))
    if 'text/html' in d: return re.sub(r'<table[^>]*>', '<table>', re.sub(r'<style.*?</style>|^\s+', '', _txt(d['text/html']), flags=re.S|re.M))
    return _fence(_txt(d['text/plain']), 'text', cls) if d.get('text/plain') else ''

def _main_first(cells):
    "Of the symbols of one cell, the one that its heading names comes first, then the others in the order of the code"
    def is_doc(c): return c.cell_type=='code' and 'show_doc(' in c.source
    def has_head(c): return _txt(c.outputs[0]['data']['text/markdown'])[0]=='#' if c.outputs else True
    return [c for k,g in groupby(cells, is_doc) for c in (sorted(reversed(list(g)), key=has_head) if k else g)]

def nb2md(f, site=True):
    "`(markdown, title, {name: bytes of an image})` of the notebook `f`"
    nb,imgs,res,fm = read_nb(f),{},[],{}
    Docs()(nb)
    m = partial(mathml, where=f.relative_to(root)) if site else str
    def img(b, ext):
        imgs[k:=f'img/{f.stem}-{len(imgs)+1}.{ext}'] = b
        return f'![output of the code above]({k})'+(_width(b) if site else '')
    for c in _main_first(nb.cells):
        if c.cell_type=='raw': fm = yaml.safe_load(c.source.strip().strip('-')) or {}
        elif c.cell_type=='markdown': res.append(m(re.sub(r'^#\|.*\n|^<!-- WARNING.*', '', c.source, flags=re.M)))
        else:
            ds = dict(re.findall(r'^#\|\s*(\w+):?\s*(\S*)', c.source, re.M))
            src = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            if 'hide' in ds or ds.get('include')=='false': continue
            if src and ds.get('echo')!='false' and not src.startswith('show_doc('): res.append(_fence(src, 'python'))
            if ds.get('output')!='false': res += [_out(o, img, m, 'out' if site else '') for o in c.get('outputs', [])]
    title = fm.get('title', f.stem)
    head = [f'# {title}']+([m(f"> {fm['description']}")] if 'description' in fm else [])
    return '\n\n'.join(o.strip('\n') for o in head+res if o.strip())+'\n', title, imgs

def _write(p, b):
    p.parent.mkdir(parents=True, exist_ok=True)
    p.write_bytes(b if isinstance(b, bytes) else b.encode())

def _files(): return {nbpath2html(f.relative_to(nbs)).with_suffix('.md'): f for f in sorted(nbglob(nbs, func=Path))}
def _out_of_code(pat, f, s): return re.sub(rf'(```.*?```)|{pat}', lambda m: m[0] if m[1] else f(m), s, flags=re.S)

# ---- README.md

def readme():
    "README.md from the index notebook, its images in nbs/img; links lead to files of the repository"
    md,_,imgs = nb2md(nbs/index, site=False)
    pages = {p.with_suffix('.html').as_posix():f for p,f in _files().items()}
    def auto(m): return f'[{m[2]}]({pages[m[3]].relative_to(root).as_posix()})' if m[3] in pages else m[2]
    md = _out_of_code(r'\]\((?!https?:|#|mailto:)([^)]+)\)', lambda m: f"]({os.path.relpath(nbs/m[2], root)})", md)
    md = _out_of_code(rf'\[(`[^`]+`)\]\({re.escape(url)}([^)#]*)[^)]*\)', auto, md)
    for f in (nbs/'img').glob('index-*.*'): f.unlink()
    for k,v in imgs.items(): _write(nbs/k, v)
    _write(root/'README.md', md)

# ---- the site

def _links(md, page, ids):
    "Links between notebooks and to symbols as links between pages; an automatic link to a symbol that no page shows becomes plain code"
    def rel(p, a): return os.path.relpath(p, page.parent)+(f'#{a}' if a else '')
    def auto(m):
        # the column of the training table, not the function of this name
        if m[2]=='`kd_loss`' and not page.name.startswith('losses'): return m[2]
        p,a = Path(m[3]).with_suffix('.md'),m[4] or ''
        a = next((o for o in (a, a.split('.')[0]) if o in ids.get(p, ())), None)
        return f'[{m[2]}]({rel(p,a)})' if a else m[2]
    md = _out_of_code(rf'\[(`[^`]+`)\]\({re.escape(url)}([^)#]*)(?:#([^)]*))?\)', auto, md)
    def nb(m): return f'](<{rel((nbpath2html(Path(os.path.normpath(page.parent/m[2])))).with_suffix(".md"), (m[3] or "")[1:].lower())}>)'
    return _out_of_code(r'\]\((?!https?:|#)([^)#]+\.ipynb)(#[^)]*)?\)', nb, md)

def site():
    "HTML docs in `_docs` from every notebook"
    src,yml = root/'_proc'/'md',root/'_proc'/'mkdocs.yml'
    shutil.rmtree(root/'_proc', ignore_errors=True)
    if (nbs/'img').exists(): shutil.copytree(nbs/'img', src/'img')
    files,nav = _files(),{'Home':'index.md', 'Tutorials':[], 'Explain':[], 'API':[]}
    docs = {p:nb2md(f) for p,f in files.items()}
    ids = {p:set(re.findall(r'\{ #(\S+) \}$', md, re.M)) for p,(md,_,_) in docs.items()}
    for p,(md,title,imgs) in docs.items():
        _write(src/p, _links(md, p, ids))
        for k,v in imgs.items(): _write(src/p.parent/k, v)
        if p.name!='index.md': nav[sections.get(p.parts[0] if len(p.parts)>1 else '.', p.parts[0].title())].append({title: p.as_posix()})
    if Path('index.md') not in docs: _write(src/'index.md', f'# {cfg.title}\n\n'+'\n'.join(f'- [{t}]({p.as_posix()})' for p,(_,t,_) in docs.items()))
    _write(src/'style.css', css)
    conf = dict(site_name=cfg.title, site_description=cfg.description, docs_dir=str(src), site_dir=str(root/'_docs'), use_directory_urls=False,
        nav=[{k:v} for k,v in nav.items() if v],
        theme=dict(name='material', font=False, features=['navigation.sections','navigation.footer','content.code.copy','toc.follow']),
        plugins=['search'], extra_css=['style.css'], extra=dict(generator=False),
        validation=dict(nav=dict(omitted_files='warn', not_found='warn'),
            links=dict(not_found='warn', anchors='warn', absolute_links='warn', unrecognized_links='warn')),
        markdown_extensions=['attr_list','md_in_html','tables','footnotes','admonition','pymdownx.superfences','pymdownx.details','pymdownx.highlight',
            {'toc':dict(permalink=True, slugify='{SLUG}')}])
    _write(yml, yaml.safe_dump(conf, sort_keys=False).replace("'{SLUG}'", '!!python/object/apply:pymdownx.slugs.slugify {kwds: {case: lower}}'))
    subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-f', yml], check=True, env={**os.environ, 'NO_MKDOCS_2_WARNING':'1'})

@call_parse(pos=['what'])
def main(
    what:str='all' # 'readme', 'site' or 'all'
):
    "Build README.md and/or the HTML docs"
    os.chdir(root)
    sys.path.insert(0, str(root))
    warnings.filterwarnings('ignore', category=FutureWarning)
    if what in ('readme','all') and (nbs/index).exists(): readme()
    if what in ('site','all'): site()
