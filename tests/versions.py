"""Which Pythons and versions of fastai and torch work: makes an environment for each row, tests in it, and writes the table of CONTRIBUTING.md.

    python tests/versions.py                 # all rows: hours, and 6 GB of disk for the one at work
    python tests/versions.py oldest-3.10     # one row; the others of the table stay
    python tests/versions.py --all           # all tests that need no notebook tools"""
import argparse,os,re,shutil,subprocess,sys,tempfile
from pathlib import Path
from conftest import copy_project,root

# the lower bounds of settings.ini, the torchvision that belongs to that torch, and plum before the lock that no fasttransform of that time
# can pickle: with a later one plain `learn.export()` of fastai 2.8.1 fails, too
oldest = 'fastai==2.8.1 torch==2.4.0 torchvision==0.19.0 safetensors==0.4.0 s3fs==2024.2.0 plum-dispatch<2.10'.split()
rows = {f'newest-{v}':(v,[]) for v in ('3.10','3.11','3.12','3.13')}|{f'oldest-{v}':(v,oldest) for v in ('3.10','3.12')}
shown = 'fastai torch fastcore numpy pandas'.split()
tools = 'pytest safetensors s3fs accelerate tensorboard'.split() # not nbdev, which wants a new fastcore: its tests are the gate's
quick = 'import losses features inspect terms store targets_data compare cli'.split()
nbdev = 'notebooks docs sync meta'.split()

def interpreter(v):
    "Python `v` of this machine"
    if p := next((p for p in (*sorted(Path.home().glob(f'.pyenv/versions/{v}.*/bin/python3')), shutil.which(f'python{v}')) if p), None): return p
    sys.exit(f'versions.py: there is no Python {v} on this machine')

def make(row, d):
    "An environment for `row` in `d/env`, and a copy of the project in `d/fastkd`"
    v,pins = rows[row]
    if not (d/'fastkd').exists(): copy_project(d/'fastkd')
    subprocess.run([interpreter(v), '-m', 'venv', d/'env'], check=True)
    subprocess.run([d/'env'/'bin'/'python', '-m', 'pip', 'install', '-q', '--no-compile', d/'fastkd', *pins, *tools], check=True)

def test(row, d, tests):
    "The row of the table: versions, and what the tests say; their output is in `d/tests.log`"
    py,log = d/'env'/'bin'/'python',d/'tests.log'
    found = dict(o.split('==') for o in subprocess.check_output([py, '-m', 'pip', 'list', '--format=freeze'], text=True).split())
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg', 'PYTHONWARNINGS':'ignore', 'PYTHONPATH':str(d/'fastkd')}
    with open(log, 'w') as f: subprocess.run([py, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *(f'tests/test_{o}.py' for o in tests)], cwd=d/'fastkd', env=env, stdout=f, stderr=subprocess.STDOUT)
    text = log.read_text()
    n = {k.rstrip('s'):int(v) for v,k in re.findall(r'(\d+) (passed|failed|skipped|errors?)\b', text.splitlines()[-1])}
    if set(n)&{'failed','error'}: print(*re.findall(r'^(?:FAILED|ERROR) .*', text, re.M), sep='\n')
    return [row, rows[row][0], *(found[k].split('+')[0] for k in shown), *(n.get(k, 0) for k in ('passed','skipped')), n.get('failed', 0)+n.get('error', 0)]

def write(new):
    "Put rows into the table of CONTRIBUTING.md"
    p = root/'CONTRIBUTING.md'
    head,was,tail = re.fullmatch(r'(.*## Versions tested\n\n[^\n]*\n)((?:\n?\|[^\n]*\n)*)(.*)', p.read_text(encoding='utf-8'), re.S).groups()
    old = {o.split(' | ')[0]:o.split(' | ')[1:] for o in re.findall(r'^\| (\w+-.*) \|$', was, re.M)}
    old |= {o[0]:[str(c) for c in o[1:]] for o in new}
    cols = ['environment','Python',*shown,'passed','skipped','failed']
    table = [cols, ['---']*len(cols), *([k,*old[k]] for k in rows if k in old)]
    p.write_text(head+'\n'+''.join(f"| {' | '.join(o)} |\n" for o in table)+tail, encoding='utf-8')

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('rows', nargs='*', help=f"of {', '.join(rows)}; none: all")
    a.add_argument('--all', action='store_true', help='all tests that need no notebook tools')
    a = a.parse_args()
    if bad := set(a.rows)-set(rows): sys.exit(f'versions.py: no rows {sorted(bad)}; there are {list(rows)}')
    tests = [s for p in sorted((root/'tests').glob('test_*.py')) if (s := p.stem[5:]) not in nbdev] if a.all else quick
    for row in a.rows or rows:
        with tempfile.TemporaryDirectory() as d:
            make(row, Path(d))
            write([test(row, Path(d), tests)])
