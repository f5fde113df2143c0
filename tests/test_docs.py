"The HTML docs build from the notebooks, and a dead link or anchor fails the build"
import json,re
from html import unescape
import pytest
from conftest import copy_project,run

def test_site(copy):
    run('python', 'nbs/_site.py', 'site', cwd=copy)
    pages = {p.name:p.read_text(encoding='utf-8') for p in (copy/'_docs').rglob('*.html')}
    core = pages['core.html']
    assert '<math' in core and 'id="soft_log_probs"' in core and re.search(r'<img[^>]*src="img/00_core-1.png"', core)
    assert (copy/'_docs/img/00_core-1.png').read_bytes()[:4]==b'\x89PNG'
    for nm,h in pages.items():
        if nm=='404.html': continue
        body = re.sub(r'<pre.*?</pre>|<code.*?</code>', '', re.search(r'<article.*?</article>', h, re.S)[0], flags=re.S)
        assert not (bad:=re.search(r'\$\$?\\?\w[^$<\n]*\$|#\| ?\w|show_doc\(|\.ipynb\b|href="[^"]*github\.io', body)), f'{nm} shows {bad[0]!r}'

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
    ('[x](../00_nowhere.ipynb)','nowhere.md'),
    ('[x](../00_core.ipynb#no-such-part)','no-such-part'), ('![x](img/no.png)','img/no.png'), ('$\\nosuchmacro x$','nosuchmacro')])
def test_dead_link_fails(small, md, said):
    rc,out,_ = build(small, md)
    assert rc!=0 and said in out, out
