"README.md and the HTML docs, made from the notebooks without quarto: nbdev processes a notebook, we write markdown, mkdocs-material makes the site"
import base64,importlib,inspect,os,re,shutil,subprocess,sys,textwrap,warnings,yaml
from functools import partial
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote,urlsplit
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
sections = {'tutorials':'Tutorials', 'explain':'Explain'}
# Groups of API pages in the order of the navigation, each with the number its notebooks begin at
api = {'The callback':'34b', 'Teachers':'30', 'Losses':'10', 'Schemes':'40a', 'Stored targets':'45', 'Did it help?':'59', 'Commands and scripts':'80', 'Layers and inputs':'20', 'Basics':'00'}
first = ['dark_knowledge'] # pages of a section that come before those in the order of file names
# Pictures of the front page: notebook, text in the cell that made the picture, caption
gallery = [
    ('explain/dark_knowledge', 'threes[', 'What a teacher says besides the label'),
    ('explain/dark_knowledge', 'magma_r', 'Which classes it finds alike'),
    ('61_experiment', 'exp.plot()', 'Did it help? Seed by seed'),
    ('60a_compare', 't.plot_pareto()', 'Quality against time and size'),
    ('63_tune', 'kd_find(learn, teacher)', 'T and alpha, before training'),
    ('60_interpret', 'interp.plot_agreement_matrix(', 'Where student and teacher differ'),
    ('60_interpret', 'interp.plot_reliability(', 'Are they as sure as they are right?'),
    ('60b_disagreements', 'interp.plot_top_disagreements(', 'The images on which they differ most'),
    ('60b_disagreements', 'seg_interp.plot_disagreement_masks(', 'The same for masks, pixel by pixel'),
    ('tutorials/03_segmentation', 'ListedColormap', 'Masks of a student, alone and distilled'),
    ('tutorials/02_features', 'def attention', 'Where layers look, with feature terms and without'),
    ('62_find', 'vit_learn', 'Which layers of two nets are alike'),
    ('52a_targets.show', 'both.show_batch', "A batch with the teacher's stored answers"),
    ('tutorials/04_stored_targets', 'def version', 'Stored answers replay the augmentation'),
    ('54_targets.source', 'mix_answers', 'MixUp, and what the teacher answers to it'),
    ('tutorials/08_unlabelled', 'ax.invert_yaxis', 'What unlabelled images add'),
    ('explain/choosing', 'ax.errorbar', 'All methods: what they gain, what a step costs'),
    ('explain/workflows', 'ax.add_patch', 'When the callback acts among others'),
]
css = '''.md-typeset table:not([class]) th {min-width:0}
.md-grid {max-width:66rem} .md-nav__title {box-shadow:none}
.md-typeset table:not([class]) td:not(:nth-child(n+4)) code {white-space:nowrap}
.md-typeset table:not([class]) :is(td,th) {padding:.4em .9em}
.formula {display:block; margin:1.2em 0; overflow-x:auto; overflow-y:hidden}
.formula math {min-width:max-content}
.md-typeset .out pre > code {background:none; border-left:.15rem solid var(--md-default-fg-color--lighter); max-height:30rem}
.md-content img {background:#fff; border-radius:.2rem}
[data-md-color-scheme=slate] .md-content img {filter:brightness(.88)}
.gallery > p {display:grid; grid-template-columns:repeat(auto-fill, minmax(min(10.5rem, 45%), 1fr)); grid-auto-flow:dense; gap:1rem .8rem}
.gallery a {color:inherit; font-size:.7rem; line-height:1.35; text-align:center}
.gallery a:has(.wide) {grid-column:span 2}
.gallery img {display:block; width:100%; height:7.5rem; object-fit:contain; padding:.3rem; margin-bottom:.3rem; border:.05rem solid var(--md-default-fg-color--lightest)}
.gallery a:hover img {border-color:var(--md-accent-fg-color)}
.md-typeset td.short {white-space:nowrap}
@media (max-width:44.9375em) {
    .md-typeset td.long {min-width:18rem} .md-typeset table:not([class]) thead th:not(:empty) {min-width:4.5rem} .md-typeset td:has(> code) {min-width:9rem}
    .gallery img {height:6.5rem}
    .params thead {display:none}
    .params tr {display:grid; grid-template-columns:auto auto 1fr; padding:.3em 0; border-top:.05rem solid var(--md-typeset-table-color)}
    .md-typeset .params table:not([class]) td {min-width:0; border:0; padding:.1em .6em}
    .params td:last-child {grid-column:1/-1}
}'''
# A page that is opened as a file may start no Worker: its search runs in a hidden frame
frame_js = '''if (location.protocol === 'file:') window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const w = this.w = document.body.appendChild(Object.assign(document.createElement('iframe'), {hidden:true})).contentWindow
    window.addEventListener('message', e => { if (e.source === w) this.dispatchEvent(new MessageEvent('message', {data:e.data})) })
    w.document.write(`<body><script>postMessage = o => parent.postMessage(o, '*')</script><script src="${url}"></script></body>`)
    this.ready = new Promise(done => w.onload = done)
    w.document.close()
  }
  postMessage(o) { this.ready.then(() => this.w.dispatchEvent(new this.w.MessageEvent('message', {data:o}))) }
}'''

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
    default = '' if d['default'] is empty else _short(repr(d['default']))
    if len(default)>35: default = default[:30]+'…' # the signature has all of it
    return f"| {'returns' if k=='return' else _code(k)} | {_code(_type(d['anno']))} | {_code(default)} | {' '.join((d['docment'] or '').split())} |"

class SymbolDoc(BasicMarkdownRenderer):
    "What a page says about one symbol"
    def _repr_markdown_(self):
        o,cls = self.sym,inspect.isclass(self.sym)
        inherits = cls and not hasattr(o, '_fields') and not {'__init__','__new__','__signature__'}&set(vars(o))
        hypers = getattr(o, 'hypers', None) if cls and getattr(o, 'func', None) else None
        dms = docments(o if hypers is None else o.func, full=True, args_kwargs=True) # a module made from a function has that function's docments
        if hasattr(o, '_fields'): # a NamedTuple: the comments of its fields
            said = dict(re.findall(r'^ +(\w+):.*?# (.*)$', inspect.getsource(o), re.M))
            dms = {k:dict(anno=p.annotation, default=p.default, docment=said.get(k)) for k,p in inspect.signature(o).parameters.items()} if said else {}
        def shown(k, v): return (not cls and (v['docment'] or _type(v['anno']))) if k=='return' else k!='self' and (hypers is None or k in hypers)
        dms = {} if inherits else {k:v for k,v in dms.items() if shown(k,v)}
        sig = self.sig and self.sig.replace(parameters=[p.replace(annotation=empty) for p in self.sig.parameters.values()], return_annotation=empty)
        if inherits: sig = f"({', '.join(b.__name__ for b in o.__bases__ if b is not object)})"
        sig = f"{'class ' if cls else ''}{self.nm}{_short(str(sig or '(...)'))}"
        res = [_heading('#'*self.title_level, self.nm) if self.title_level else '']
        res += [_fence(textwrap.fill(sig, 84, subsequent_indent='    '), 'python'), self.docs]
        if dms: res.append('\n'.join(['<div class="params" markdown>\n', '| parameter | type | default | meaning |', '|:--|:--|:--|:--|', *(_row(k,v) for k,v in dms.items()), '\n</div>']))
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
        if m[2]: res = f'<span class="formula">{res}</span>' # what scrolls, on a phone
        return re.sub(r'\\([_%&#])', r'\1', res).replace('*','&#42;').replace('_','&#95;') # markdown would read these; `\_` stays as it is in \text
    s = re.sub(r'(```.*?```|(?<!`)`[^`\n]+`(?!`))|(?<!\\)\$\$(.+?)\$\$|(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?!\w)', f, s, flags=re.S)
    return s.replace(r'\$', '$')

def _width(b):
    "The width that the PNG `b` has at its own resolution, as an attribute"
    if b[:4]!=b'\x89PNG' or (i:=b.find(b'pHYs'))<0: return ''
    px,per_m = (int.from_bytes(b[j:j+4], 'big') for j in (16,i+4))
    return f' width={round(px/per_m/.0254*90)}'

def _md_table(m):
    "A pandas table as a markdown table; one with merged cells stays HTML"
    if re.search('(?:col|row)span', m[0]): return m[0]
    def cells(r): return [' '.join(re.sub(r'</?b>', '**', o).replace('|', r'\|').split()) for o in re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', r, re.S)]
    head,body = ([cells(o) for o in re.findall(r'<tr[^>]*>(.*?)</tr>', part, re.S)] for part in m[0].split('</thead>'))
    align = [':--']+['--:' if 'text-align: right' in m[0] else ':--']*(len(head[0])-1)
    return '\n'.join('| '+' | '.join(r)+' |' for r in ([max(o) for o in zip(*head)], align, *body)) # the index's name has a row of its own

def _out(o, img, math, cls):
    "Markdown of one output, richest form first"
    if o['output_type']=='stream': return _fence(re.sub(r'[^\n]*\r(?!\n)|\x1b\[[0-9;]*m', '', _txt(o['text'])), 'text', cls) if _txt(o['text']).strip() else ''
    if o['output_type']=='error': return _fence(f"{o['ename']}: {o['evalue']}", 'text', cls)
    d = o['data']
    for mime,ext in (('image/svg+xml','svg'),('image/png','png'),('image/jpeg','jpg')):
        if mime in d: return img(_txt(d[mime]).encode() if ext=='svg' else base64.b64decode(_txt(d[mime])), ext)
    if 'text/markdown' in d: return math(_txt(d['text/markdown']))
    if 'text/html' in d:
        def cell(m): return f'<td{m[1]}{(n := len(m[2]))<25 and " class=short" or n>40 and " class=long" or ""}>{m[2]}</td>'
        s = re.sub(r'<table[^>]*>', '<table>', re.sub(r'<style.*?</style>|^\s+', '', _txt(d['text/html']), flags=re.S|re.M))
        if not cls: return re.sub(r'\s*<table>.*?</table>\s*', lambda m: f'\n\n{_md_table(m)}\n\n', re.sub(r'</?(?:div|p)\b[^>]*>', '', s.replace('&#x27;', "'")), flags=re.S).strip()
        return re.sub(r'<td(?: id="[^"]*")?(?: class="[^"]*")?([^>]*)>(.*?)</td>', cell, s, flags=re.S)
    return _fence(_txt(d['text/plain']), 'text', cls) if d.get('text/plain') else ''

def _main_first(cells):
    "Of the symbols of one cell, the one that its heading names comes first, then the others in the order of the code"
    def is_doc(c): return c.cell_type=='code' and 'show_doc(' in c.source
    def has_head(c): return _txt(c.outputs[0]['data']['text/markdown'])[0]=='#' if c.outputs else True
    return [c for k,g in groupby(cells, is_doc) for c in (sorted(reversed(list(g)), key=has_head) if k else g)]

def nb2md(f, site=True):
    "`(markdown, title, {name: (bytes of an image, code that made it)})` of the notebook `f`"
    nb,imgs,res,fm,src = read_nb(f),{},[],{},''
    Docs()(nb)
    m = partial(mathml, where=f.relative_to(root)) if site else str
    def img(b, ext):
        imgs[k:=f'img/{f.stem}-{len(imgs)+1}.{ext}'] = b,src
        return f'![output of the code above]({k})'+(f'{{ #{Path(k).stem}{_width(b)} }}' if site else '')
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
    md = md.replace('<!-- gallery -->\n\n', '')
    for f in (nbs/'img').glob('index-*.*'): f.unlink()
    for k,(v,_) in imgs.items(): _write(nbs/k, v)
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

def _gallery(docs):
    "A grid of links around pictures that the notebooks made"
    res = []
    for nb,has,caption in gallery:
        p = nbpath2html(Path(nb+'.ipynb')).with_suffix('.md')
        k = next((k for k,(_,src) in docs.get(p, (0,0,{}))[2].items() if has in src), None)
        if k is None: raise ValueError(f"nbs/_site.py: gallery: {'no cell with' if p in docs else 'there is no notebook'} {nb if p not in docs else f'{has!r} shows a picture in {nb}.ipynb'}")
        b = docs[p][2][k][0]
        w,h = (int.from_bytes(b[i:i+4], 'big') for i in (16,20)) if k.endswith('png') else (1,1)
        res.append(f'[![]({(p.parent/k).as_posix()}){{ {".wide " if w>2.2*h else ""}loading=lazy }} {caption}]({p.as_posix()}#{Path(k).stem})')
    return '## Gallery\n\nAll made by the notebooks; each leads to its page.\n\n<div class="gallery" markdown>\n'+'\n'.join(res)+'\n</div>'

def _nav(files, docs):
    "Pages by section, those of the API by group, in the order of their notebooks' names"
    def nr(s): return (int((m := re.match(r'(\d*)([a-z]?)', s))[1] or 0),m[2])
    nav = {'Home':'index.md', 'Tutorials':[], 'Explain':[], 'API':{k:[] for k in api}}
    for p,f in sorted(files.items(), key=lambda o: (o[1].stem not in first, o[1])):
        if p.name=='index.md': continue
        page = {docs[p][1]: p.as_posix()}
        if len(p.parts)>1: nav.setdefault(sections.get(p.parts[0], p.parts[0].title()), []).append(page)
        else: nav['API'][max((k for k in api if nr(api[k])<=nr(f.stem)), key=lambda k: nr(api[k]))].append(page)
    nav['API'] = [{k:v} for k,v in nav['API'].items() if v]
    return [{k:v} for k,v in nav.items() if v]

class _Page(HTMLParser):
    "The ids of a page, and what it links to and loads"
    def __init__(self, s):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(s)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.ids |= {d[k] for k in ('id','name') if d.get(k)}
        if d.get('rel')!='canonical': self.links += [(tag,v) for k in ('href','src','data','poster') if (v := d.get(k))]

def dead_links(d):
    "What the HTML pages in `d` link to or load and is not there, or comes from the network"
    pages,bad = {p:_Page(p.read_text(encoding='utf-8')) for p in d.rglob('*.html') if p.name!='404.html'},[]
    for p,page in pages.items():
        for tag,l in page.links:
            u = urlsplit(l)
            if u.scheme in ('http','https') or u.netloc:
                if tag!='a': bad.append(f'{p.relative_to(d)}: <{tag}> loads {l} from the network')
            elif not u.scheme:
                to = (p.parent/unquote(u.path)).resolve() if u.path else p
                if not to.is_file(): bad.append(f'{p.relative_to(d)}: <{tag}> leads to {l}, which is not there')
                elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids: bad.append(f'{p.relative_to(d)}: {l}: no such anchor')
    bad += [f'{p.relative_to(d)} loads {m[1]} from the network' for p in d.rglob('*.css') for m in re.finditer(r'(?:url\(|@import )\s*["\']?((?:https?:)?//[^"\')]+)', p.read_text(encoding='utf-8'))]
    return bad

def site():
    "HTML docs in `_docs` from every notebook"
    src,yml = root/'_proc'/'md',root/'_proc'/'mkdocs.yml'
    shutil.rmtree(root/'_proc', ignore_errors=True)
    if (nbs/'img').exists(): shutil.copytree(nbs/'img', src/'img')
    files = _files()
    docs = {p:nb2md(f) for p,f in files.items()}
    home = Path('index.md')
    if home in docs: docs[home] = (docs[home][0].replace('<!-- gallery -->', _gallery(docs)), *docs[home][1:])
    ids = {p:set(re.findall(r'\{ #(\S+) \}$', md, re.M)) for p,(md,_,_) in docs.items()}
    for p,(md,title,imgs) in docs.items():
        _write(src/p, _links(md, p, ids))
        for k,(v,_) in imgs.items(): _write(src/p.parent/k, v)
    if home not in docs: _write(src/'index.md', f'# {cfg.title}\n\n'+'\n'.join(f'- [{t}]({p.as_posix()})' for p,(_,t,_) in docs.items()))
    _write(src/'style.css', css)
    _write(src/'iframe-worker.js', frame_js)
    conf = dict(site_name=cfg.title, site_description=cfg.description, docs_dir=str(src), site_dir=str(root/'_docs'), use_directory_urls=False,
        nav=_nav(files, docs), site_url=url,
        theme=dict(name='material', font=False, features=['navigation.sections','navigation.footer','navigation.top','search.highlight','search.suggest','content.code.copy','toc.follow'],
            palette=[dict(media=f'(prefers-color-scheme{m})', scheme=c, toggle=dict(icon=f'material/{i}', name=f'Colours: {n}; change'))
                for m,c,i,n in (('','default','brightness-auto','as the system'),(': light','default','brightness-7','light'),(': dark','slate','brightness-4','dark'))]),
        plugins=['search','offline'], extra_css=['style.css'], extra=dict(generator=False, polyfills=['iframe-worker.js']),
        validation=dict(nav=dict(omitted_files='warn', not_found='warn'),
            links=dict(not_found='warn', anchors='warn', absolute_links='warn', unrecognized_links='warn')),
        markdown_extensions=['attr_list','md_in_html','tables','footnotes','admonition','pymdownx.superfences','pymdownx.details','pymdownx.highlight',
            {'toc':dict(permalink=True, slugify='{SLUG}')}])
    _write(yml, yaml.safe_dump(conf, sort_keys=False).replace("'{SLUG}'", '!!python/object/apply:pymdownx.slugs.slugify {kwds: {case: lower}}'))
    rc = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-f', yml], env={**os.environ, 'NO_MKDOCS_2_WARNING':'1'}).returncode
    if bad := dead_links(root/'_docs'): print(*(f'DEAD     -  {o}' for o in bad), sep='\n')
    if rc or bad: sys.exit(f'{len(bad)} dead links' if bad else rc)

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
