"Packaging: one version, one name, few requirements, and nothing but the package in the wheel"
import ast,re,sys,tarfile,zipfile
from configparser import ConfigParser
from importlib.metadata import distribution
import pytest,yaml
import fastkd
from packaging.requirements import Requirement
from conftest import copy_project,files,root,run
if sys.version_info>=(3,11): import tomllib
else: import tomli as tomllib

def settings():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

dist,ini,proj = distribution('fastkd'),settings(),tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
def rows(k): return [o for o in ini[k].splitlines() if o.strip()]

def test_one_version_and_name():
    assert ini['version']==fastkd.__version__==dist.version, 'the version stands in settings.ini and fastkd/__init__.py; then run `pip install -e .`'
    assert ini['lib_name']==proj['name']==fastkd.__name__==dist.metadata['Name']
    assert ini['license']==dist.metadata['License-Expression'] and dist.metadata['Requires-Python']==f">={ini['min_python']}"
    log = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf"^## \[?{re.escape(ini['version'])}\]?", log, re.M), 'CHANGELOG.md has no section for this version'

def test_citation():
    o = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert (o['version'],o['license'],[a['name'] for a in o['authors']])==(ini['version'],ini['license'],[ini['author']])
    assert o['repository-code']==proj['urls']['Repository'] and o['title'].startswith(f"{ini['lib_name']}: ")

def test_requirements():
    needs = [o for o in dist.requires if 'extra ==' not in o]
    assert {re.match(r'[\w-]+', o)[0] for o in needs}=={'fastai','torch'}
    assert {Requirement(o) for o in needs}=={Requirement(o) for o in rows('requirements')}, 'run `pip install -e .`'
    brought = 'fastai torch torchvision fastcore fastprogress numpy pandas scipy sklearn matplotlib PIL yaml tqdm'.split()
    for f in files(root, 'fastkd', '*.py')-{'fastkd/_nbtest.py'}:
        for n in ast.parse((root/f).read_text(encoding='utf-8')).body:
            mods = [o.name for o in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            bad = {m.split('.')[0] for m in mods}-set(brought)-set(sys.stdlib_module_names)-{'fastkd','__future__'}
            assert not bad, f'{f} imports {bad}, which fastai and torch do not bring'

def test_entry_points():
    eps = {(o.group,o.name):o for o in dist.entry_points}
    d = eps['nbdev','fastkd'].load()
    assert 'fastkd.core.reduce_loss' in d['syms']['fastkd.core']
    scripts = {n:o for (g,n),o in eps.items() if g=='console_scripts'}
    assert {o.split('=')[0].strip() for o in rows('console_scripts')}==set(scripts), 'run `pip install -e .`'
    for n,o in scripts.items(): assert callable(o.load()), n

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Files of the sdist and of the wheel that is built from it"
    d = copy_project(tmp_path_factory.mktemp('build')/'fastkd')
    if not (d/'README.md').exists(): pytest.fail('README.md is missing: run `python nbs/_site.py readme`', pytrace=False)
    run('python', '-m', 'build', '--no-isolation', cwd=d)
    stem = f"fastkd-{ini['version']}"
    with tarfile.open(d/f'dist/{stem}.tar.gz') as t: sdist = {o.name[len(stem)+1:] for o in t.getmembers() if o.isfile()}
    with zipfile.ZipFile(d/f'dist/{stem}-py3-none-any.whl') as z: wheel = set(z.namelist())
    return sdist,wheel

def only(got, want): return sorted(got-want),sorted(want-got)

def test_wheel(built):
    code = files(root, 'fastkd', '*.py')
    meta = {f"fastkd-{ini['version']}.dist-info/{o}" for o in ('METADATA','WHEEL','RECORD','top_level.txt','entry_points.txt','licenses/LICENSE')}
    assert only(built[1], code|meta)==([],[])

def test_sdist(built):
    code = files(root, 'fastkd', '*.py')
    egg = {f'fastkd.egg-info/{o}.txt' for o in ('SOURCES','dependency_links','entry_points','requires','top_level')}|{'fastkd.egg-info/PKG-INFO'}
    assert only(built[0], code|egg|set('settings.ini setup.py setup.cfg pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff PKG-INFO'.split()))==([],[])
