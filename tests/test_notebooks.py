"Every notebook runs, stays small and keeps outputs worth showing"
import json,re
import pytest
from conftest import files,root,run

nbs = sorted(f for f in files(root, 'nbs', '*.ipynb') if not any(p[0] in '._' for p in f.split('/')))
def code_cells(f): return [c for c in json.loads((root/f).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
# the first cell of a notebook that is not executed says so
def skipped(f): return 'skip_exec: true' in ''.join(json.loads((root/f).read_text(encoding='utf-8'))['cells'][0]['source'])
def text(o): return json.dumps({k:v for k,v in o.get('data', o).items() if not k.startswith('image/')}, ensure_ascii=False)

def test_nbdev_test(copy):
    before = files(copy)
    r = run('nbdev-test', '--n-workers', 2, '--do-print', cwd=copy, PYTHONWARNINGS='ignore')
    done = set(re.findall(r'Completed \S*?/(nbs/\S+\.ipynb)', r.stdout))
    todo = {f for f in nbs if not skipped(f)}
    assert done==todo, f'not run: {todo-done}\n{r.stdout[-4000:]}'
    left = {f for f in files(copy)-before if not re.search(r'(^|/)(models|_proc|_docs|\.pytest_cache)/', f)}
    assert not left, f'notebooks left files behind: {sorted(left)}; write to a temporary folder'

@pytest.mark.parametrize('f', nbs)
def test_notebook(f):
    kb,cells = (root/f).stat().st_size/1024,code_cells(f)
    assert kb<=300, f'{f} has {kb:.0f} KB, at most 300: make its figures smaller'
    assert len(cells)<=3 or skipped(f) or any(c['outputs'] for c in cells), f'{f} has no stored outputs: run `nbdev-test {f} --save && nbdev-clean`'
    for c in cells:
        for o in c['outputs']:
            path = re.search(r'(?<![\w.:/])/(home|root|work|Users|tmp|opt|usr|var|private)/\w[^\s"\']*', text(o))
            assert not path, f'{f} stores the path {path[0]} of the machine it ran on, in the output of\n{"".join(c["source"])}'
            asked = re.search(r'expect_fail|traceback', ''.join(c['source']))
            shown = o['output_type']=='error' or 'Traceback (most recent call last)' in text(o)
            assert asked or not shown, f'{f} stores a traceback, in the output of\n{"".join(c["source"])}'
