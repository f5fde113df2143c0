"Every public name is explained and shown, the HTML docs build from the notebooks, and a dead link or anchor fails the build"
import importlib,importlib.util,inspect,json,pkgutil,re
from html import unescape
import pytest
import fastkd
from conftest import copy_project,root,run

mods = [o.name for o in pkgutil.walk_packages(fastkd.__path__, 'fastkd.') if not (o.ispkg or '._' in o.name or o.name.endswith('.all'))]

def public():
    "Everything that is public, once: where it is at home, its name, and itself"
    for m in mods:
        mod = importlib.import_module(m)
        for k in mod.__all__:
            if callable(o:=getattr(mod, k)) and getattr(o, '__module__', m)==m: yield m,k,o

def unexplained(f):
    "Parameters of a function without a comment"
    from fastcore.docments import docments
    d = docments(f, returns=False)
    ps = [p for p in inspect.signature(f).parameters.values() if p.kind not in (p.VAR_POSITIONAL,p.VAR_KEYWORD)]
    return [p.name for p in ps if p.name not in ('self','cls') and p.name[0]!='_' and not d.get(p.name)]

def methods():
    "Public methods of public classes that are no losses"
    for m,k,o in public():
        for n,v in vars(o).items() if inspect.isclass(o) and not m.startswith('fastkd.losses') else ():
            v = getattr(v, '__func__', v)
            if n[0]!='_' and inspect.isfunction(v) and v.__module__.startswith('fastkd.'): yield f'{m}: {k}.{n}',n,v

def test_every_name_is_explained():
    "A docstring for each function and class, a comment for each parameter"
    bad = []
    for m,k,o in public():
        if not (vars(o).get('__doc__') if inspect.isclass(o) else o.__doc__): bad.append(f'{m}: {k} has no docstring')
        # a class without an `__init__` of its own has that of its parent, a named tuple its fields; losses have one comment for what all of them take
        f = vars(o).get('__init__') if inspect.isclass(o) else o
        if not m.startswith('fastkd.losses') and inspect.isfunction(f) and (miss:=unexplained(f)): bad.append(f'{m}: {k} does not explain {miss}')
    assert len(list(public()))>300 and not bad, '\n'.join(bad)

def test_every_method_is_explained():
    "What fastai or torch call, or several of our classes have in common, is explained once"
    from fastai.basics import Callback,TfmdDL,event,nn
    from fastai.interpret import Interpretation
    from torch.autograd import Function
    theirs = {n for o in (Callback,event,TfmdDL,nn.Module,Interpretation,Function) for n in dir(o)}
    ours = {n for _,n,v in methods() if v.__doc__ and not unexplained(v)}
    bad = [f'{nm} does not explain {unexplained(v) or "itself"}' for nm,n,v in methods() if n not in theirs|ours and (not v.__doc__ or unexplained(v))]
    assert len(ours)>50 and not bad, '\n'.join(bad)

def test_every_name_is_shown():
    "In a cell that readers see, and that runs"
    hidden = re.compile(r'#\|\s*(export|exporti|hide|default_exp|eval: false)\b')
    seen = set()
    for f in (root/'nbs').rglob('*.ipynb'):
        for c in json.loads(f.read_text(encoding='utf-8'))['cells']:
            s = ''.join(c['source'])
            if c['cell_type']=='code' and not any(hidden.match(l) for l in s.splitlines()): seen.update(re.findall(r'[A-Za-z_]\w*', s))
    miss = [f'{m}: {k}' for m,k,o in public() if k not in seen and not shown_by_name(o, seen)]
    assert not miss, 'no cell shows '+', '.join(miss)

def shown_by_name(o, seen):
    "A loss is a function and a module, and has a registered name: one of them will do"
    from fastkd.core import KDModule,_losses
    import fastkd.losses.all as losses
    twin = [v for v in vars(losses).values() if inspect.isclass(v) and issubclass(v, KDModule) and (v is o or getattr(v, 'func', None) is o)]
    return any({v.__name__,v.func.__name__ if v.func else None,*(k for k,c in _losses.items() if c is v)}&seen for v in twin)

@pytest.fixture(scope='module')
def site(copy):
    "The whole site, built: its folder and the text of its pages"
    run('python', 'nbs/_site.py', 'site', cwd=copy)
    d = copy/'_docs'
    return d,{p.relative_to(d).as_posix():p.read_text(encoding='utf-8') for p in d.rglob('*.html') if p.name!='404.html'}

@pytest.fixture(scope='module')
def maker():
    "nbs/_site.py as a module"
    spec = importlib.util.spec_from_file_location('_site', root/'nbs/_site.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def test_pages(site):
    d,pages = site
    core = pages['core.html']
    assert '<math' in core and 'id="soft_log_probs"' in core and re.search(r'<img[^>]*src="img/00_core-1.png"', core)
    assert (d/'img/00_core-1.png').read_bytes()[:4]==b'\x89PNG'
    for nm,h in pages.items():
        body = re.sub(r'<pre.*?</pre>|<code.*?</code>', '', re.search(r'<article.*?</article>', h, re.S)[0], flags=re.S)
        assert not (bad:=re.search(r'\$\$?\\?\w[^$<\n]*\$|#\| ?\w|show_doc\(|\.ipynb\b|href="[^"]*github\.io|<!-- gallery|markdown="?1?"?>', body)), f'{nm} shows {bad[0]!r}'
        assert 'data-md-color-scheme="slate"' in h and 'data-md-color-scheme="default"' in h and '"content.code.copy"' in h

def test_next_leads_through_every_page(site):
    d,pages = site
    seen,p = [],'index.html'
    while p:
        assert p not in seen
        seen.append(p)
        nxt = re.search(r'<a href="([^"]+)" class="md-footer__link md-footer__link--next"', pages[p])
        p = nxt and ((d/p).parent/nxt[1]).resolve().relative_to(d.resolve()).as_posix()
    assert set(seen)==set(pages)
    sections = [o.split('/')[0] if '/' in o else 'API' for o in seen[1:]]
    assert list(dict.fromkeys(sections))==['tutorials','explain','API'] and sections==sorted(sections, key=['tutorials','explain','API'].index)

def test_every_public_symbol(site):
    d,pages = site
    found = {o['location'] for o in json.loads((d/'search/search_index.json').read_text(encoding='utf-8'))['docs']}
    assert (d/'search/search_index.js').read_text(encoding='utf-8').startswith('var __index') # for pages opened as files
    miss,n = [],0
    for m in mods:
        mod = importlib.import_module(m)
        for k in mod.__all__:
            o = getattr(mod, k)
            home = o.__module__ if getattr(o, '__module__', None) in mods else m
            page,n = home.removeprefix('fastkd.')+'.html',n+1
            if f'id="{k.lower()}"' not in pages.get(page, ''): miss.append(f'{m}: {k} has no place in {page}')
            elif f'{page}#{k.lower()}' not in found: miss.append(f'{m}: search does not find {k}')
    assert n>300 and not miss, '\n'.join(miss)

def test_gallery(site, maker, monkeypatch):
    d,pages = site
    grid = re.search(r'<div class="gallery">(.*?)</div>', pages['index.html'], re.S)[1]
    pics = re.findall(r'<a href="([^"#]+)#([^"]+)"><img[^>]*src="([^"]+)"[^>]*>\s*([^<]+)</a>', grid)
    assert len(pics)==len(maker.gallery)==len({o[2] for o in pics})
    for (nb,_,caption),(page,anchor,src,said) in zip(maker.gallery, pics):
        assert re.search(rf'<img[^>]*id="{re.escape(anchor)}"', pages[page]) and (d/src).is_file() and unescape(said)==caption
    monkeypatch.setattr(maker, 'gallery', [('tutorials/01_x', 'plot(', 'A plot')])
    with pytest.raises(ValueError, match='there is no notebook tutorials/01_x'): maker._gallery({})
    with pytest.raises(ValueError, match=r"no cell with 'plot\(' shows a picture in tutorials/01_x.ipynb"): maker._gallery({maker.Path('tutorials/x.md'): ('', '', {'img/x.png':(b'', 'code')})})

def test_dead_links(maker, tmp_path):
    "Of the pages as they are, links written as HTML included"
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.html').write_text('<link rel="canonical" href="https://x.org/a.html"><p id="here"><a href="#here">1</a><a href="sub/b.html?x=1#it">2</a><a href="https://x.org">3</a>'
        '<img src="data:image/png;base64,x"><a href="mailto:a@b.c">4</a>')
    (tmp_path/'sub/b.html').write_text('<a name="it"></a><a href="../a.html#here">1</a>')
    assert maker.dead_links(tmp_path)==[]
    (tmp_path/'a.html').write_text('<a href="#here">1</a><a href="sub/c.html">2</a><img src="sub/no.png"><img src="https://x.org/a.png"><script src="//x.org/a.js"></script>'
        '<link rel="stylesheet" href="https://x.org/font.css">')
    (tmp_path/'s.css').write_text('@import "https://x.org/a.css"; a {background:url(//x.org/b.png)} b {background:url(c.png)}')
    bad = maker.dead_links(tmp_path)
    for o in ('a.html: #here: no such','sub/c.html','sub/no.png','x.org/a.png','x.org/a.js','x.org/font.css','x.org/a.css','x.org/b.png','../a.html#here: no such'): assert sum(o in b for b in bad)==1, o
    assert len(bad)==9

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A project of two notebooks: core, and one that the tests write"
    d = copy_project(tmp_path_factory.mktemp('docs')/'fastkd')
    for f in (d/'nbs').rglob('*.ipynb'):
        if f.name!='00_core.ipynb': f.unlink()
    return d

def build(d, md):
    nb = json.loads((d/'nbs/00_core.ipynb').read_text(encoding='utf-8'))
    nb['cells'] = [dict(cell_type='markdown', id=str(i), metadata={}, source=s) for i,s in enumerate(('# Links\n\n> A page', md))]
    (d/'nbs/tutorials').mkdir(exist_ok=True)
    (d/'nbs/tutorials/09_links.ipynb').write_text(json.dumps(nb))
    r = run('python', 'nbs/_site.py', 'site', cwd=d, ok=False)
    return r.returncode,r.stdout,(d/'_docs/tutorials/links.html')

def test_living_links(small):
    rc,out,page = build(small, 'To [core](../00_core.ipynb), its [registry](../00_core.ipynb#the-registry), `reduce_loss` and `KDModule.forward`; '
        '$T^2$, `$x$`, \\$5, $\\text{a\\_b}*c*d$.')
    assert rc==0, out
    html = unescape(page.read_text(encoding='utf-8'))
    for o in ('href="../core.html"','href="../core.html#the-registry"','href="../core.html#reduce_loss"','href="../core.html#kdmodule"',
        '<msup><mi>T</mi><mn>2</mn></msup>','<code>$x$</code>',' $5,','<mtext>a_b</mtext>','<mo>*</mo><mi>d</mi>'): assert o in html, o

@pytest.mark.parametrize('md,said', [
    ('[x](../00_nowhere.ipynb), [y](../00_core.ipynb#no-such-part), ![z](img/no.png)', ['nowhere.md','no-such-part','img/no.png']),
    ('<a href="lost.html">x</a>', ['lost.html, which is not there']), ('<img src="https://x.org/a.png">', ['loads https://x.org/a.png from the network']),
    ('$\\nosuchmacro x$', ['nosuchmacro'])])
def test_dead_link_fails(small, md, said):
    rc,out,_ = build(small, md)
    assert rc!=0 and not [o for o in said if o not in out], out
