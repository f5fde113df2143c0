"The HTML docs build from the notebooks, and a dead link or anchor fails the build"
import importlib,importlib.util,json,pkgutil,re
from html import unescape
import pytest
import fastkd
from conftest import copy_project,root,run

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
    mods = [o.name for o in pkgutil.walk_packages(fastkd.__path__, 'fastkd.') if not (o.ispkg or '._' in o.name or o.name.endswith('.all'))]
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
