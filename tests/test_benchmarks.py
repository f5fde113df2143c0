"The page of results says what the files say, and nothing else"
import json,re,shutil,sys
from importlib.util import module_from_spec,spec_from_file_location
from pathlib import Path
import pytest
from conftest import root,run

here = root/'benchmarks'
spec = spec_from_file_location('benchmarks_report', here/'report.py')
report = module_from_spec(spec)
spec.loader.exec_module(report)

def copied(d):
    for o in here.iterdir():
        if o.suffix in ('.json','.csv','.png'): shutil.copy(o, d)
    return d

def test_report_is_of_the_stored_files(tmp_path):
    "`--report` makes the page again, and the JSON beside it"
    run('python', '-m', 'benchmarks', '--report', '--to', copied(tmp_path), cwd=root)
    for o in ('RESULTS.md','RESULTS.json'): assert (tmp_path/o).read_text()==(here/o).read_text(), f'{o} is not that of the files beside it: `python -m benchmarks --report`'
    pics = set(re.findall(r'\((plots/\w+\.png)\)', (here/'RESULTS.md').read_text()))
    assert pics=={o.relative_to(tmp_path).as_posix() for o in (tmp_path/'plots').glob('*.png')}=={o.relative_to(here).as_posix() for o in (here/'plots').glob('*.png')}

def test_nothing_is_met_that_was_not_run(tmp_path):
    "Without files there are no results; without its file a budget is not run"
    page = report.markdown(tmp_path)
    assert {b['mark'] for b in report.budgets({})}=={'not run'} and not re.search(r'\b(met|missed)\b|\d\.\d{3}', page)
    data = report.read(here)
    for k in report.parts:
        rest = report.budgets({o:v for o,v in data.items() if o!=k})
        for b,was in zip(rest, report.budgets(data)): assert b==was or b['mark']=='not run' and b['value'] is None
    assert all(b['value'] is not None for b in report.budgets(data) if b['mark']!='not run')

@pytest.mark.parametrize('value,most,mark', [([1.,.9,1.02],1.03,'met'), ([1.1,1.05,1.2],1.03,'missed'), ([1.02,1.,1.1],1.03,'met, undecided'), ([1.05,1.,1.1],1.03,'missed, undecided'), ([1.03]*3,1.03,'met'), (None,1.03,'not run')])
def test_marks(value, most, mark): assert report.mark(value, most).split(':')[0]==mark

def test_every_budget_has_its_part():
    "The nine of the design, where three have a second line; each is met, or missed, by what its part writes"
    m = dict(machine=dict(gpu=None))
    r = lambda v: dict(ratio=dict(cpu=[v]*3))
    step = dict(cpu=dict(ratio=1.01, ratio_ci=[1.,1.02], own_ms=.2, own_ms_ci=[.1,.3]), saved_ratio=1.01)
    data = dict(step=dict(m, works=dict(resnet=step, digits=step)), store=dict(m, step=dict(resnet=r(1.04), digits=r(1.1)), precompute=r(1.), gather=r(1.4), replay=r(1.2)),
        at=dict(m, works=dict(resnet=r(1.))), imports=dict(m, libraries=dict(fastkd=dict(ratio=[1.01]*3))))
    assert [b['mark'] for b in report.budgets(data)]=='met met met missed met met met met missed met met'.split()
    # on a GPU the clock is the wall's
    data['at'] = dict(machine=dict(gpu='a GPU'), works=dict(resnet=dict(ratio=dict(cpu=[1.]*3, wall=[2.]*3))))
    assert report.budgets(data)[5]['mark']=='missed'

def test_gains_are_seed_by_seed():
    df = report.pd.DataFrame(dict(data='d', seed=[0,1]*3, setting=['alone']*2+['a']*2+['b']*2, accuracy=[.5,.7,.6,.8,.9,.7]))
    lines = report.gains(df, 'data', 'setting', 'alone', most=1, keep=['a']).splitlines()
    assert lines[2:]==['| d | alone | 0.600 ± 0.141 |  | 2 |', '| d | b | 0.800 ± 0.141 | +0.200 ± 0.283 | 2 |', '| d | a | 0.700 ± 0.141 | +0.100 ± 0.000 | 2 |']

def test_command_and_scripts(tmp_path):
    "Every part is a script that says how to run it, and is short; an unknown part is refused"
    r = run('python', '-m', 'benchmarks', '--parts', 'stepp', '--to', tmp_path, cwd=root, ok=False)
    assert r.returncode==2 and 'no part stepp' in r.stdout and 'step' in r.stdout and not list(tmp_path.iterdir())
    text = (here/'__main__.py').read_text()
    for f in set(re.findall(r"'(\w+\.py)'", text)): assert f'python benchmarks/{f}' in (here/f).read_text() or f'PYTHON benchmarks/{f}' in (here/f).read_text(), f
    kept = [*here.glob('*.json'), *here.glob('*.csv'), *here.rglob('*.png')]
    assert sum(o.stat().st_size for o in kept)<400_000
    for f in ('__main__','report','plots','timing','step','store','dense','losses','plain_forms','grad_share','imports','scale','processes','peers'): assert len((here/f'{f}.py').read_text().splitlines())<=300, f
