"A loss names its paper, the table of papers has it, and the loss that CONTRIBUTING.md shows is one"
import json,re,sys,types
import pytest
import fastkd.losses.all
from fastkd.core import _losses,get_loss,list_losses
from conftest import root
import test_losses

page = json.loads((root/'nbs/explain/papers.ipynb').read_text(encoding='utf-8'))
table = '\n'.join(''.join(o['data'].get('text/markdown', '')) for c in page['cells'] for o in c.get('outputs', []) if 'data' in o)
names_paper = re.compile(r"\((?:[^()]|\([^()]*\))*[A-Z][\w'-]*(?: et al\.| (?:and|&) [A-Z][\w'-]*) (?:19|20)\d\d, (?:arXiv:\d{4}\.\d{4,5}|doi:10\.\S+|[A-Z]{4,})(?:[,;][^()]*)?\)$")

@pytest.mark.parametrize('name', list_losses())
def test_paper(name):
    c = type(get_loss(name))
    assert names_paper.search(c.func.__doc__), f'the docstring of `{c.func.__name__}` does not end with its paper: (Hinton et al. 2015, arXiv:1503.02531)'
    rows = [l for l in table.splitlines() if f'| `{name}` |' in l]
    assert len(rows)==1 and f'[`{c.__name__}`]' in rows[0] and f'[`{c.func.__name__}`]' in rows[0], f'run `nbdev-test nbs/explain/papers.ipynb --save`: {name!r} is not in its table as it is now'
    assert re.findall(r'arXiv:\S*\d|doi:\S*\d', c.func.__doc__)[:1]==re.findall(r'\[((?:arXiv|doi):[^]]*)\]', rows[0])[:1]

@pytest.mark.parametrize('name', 'fit_fitnet fit_fsp fit_ab fit_ft fit_kta fit_pad fit_sskd fit_simkd fit_chain born_again fit_snapshots mutual_learning EMATeacher precompute_targets mix_answers correct_targets'.split())
def test_scheme(name): assert f'[`{name}`]' in table

def test_pages_exist():
    links = set(re.findall(r'\]\(\.\./([^)#]+)#', table))
    assert len(links)>15 and not [l for l in links if not (root/'nbs'/l).exists()]

def test_loss_of_contributing():
    "The code of CONTRIBUTING.md runs, is the cell of the notebook, and keeps the contract of all losses"
    md = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', md[md.index('## Add a loss in one cell'):md.index('## Rules')], re.S)
    nb = json.loads((root/'nbs/14_losses.check.ipynb').read_text(encoding='utf-8'))
    assert len(blocks)==2 and blocks[1].strip() in [''.join(c['source']).strip() for c in nb['cells']]
    mod = sys.modules['_contributed'] = types.ModuleType('_contributed')
    mod.__all__ = ['tvd_loss','TVDLoss']
    try:
        for b in blocks: exec(compile(b, 'CONTRIBUTING.md', 'exec'), vars(mod))
        assert 'tvd' in list_losses() and names_paper.search(mod.tvd_loss.__doc__)
        for k,f in vars(test_losses.TestLoss).items():
            if not k.startswith('test_'): continue
            if k=='test_dtypes':
                for dt in ('float64','float16','bfloat16'): test_losses.TestLoss().test_dtypes('tvd', getattr(mod.torch, dt))
            else: getattr(test_losses.TestLoss(), k)('tvd')
    finally:
        _losses.pop('tvd', None)
        del sys.modules['_contributed']
