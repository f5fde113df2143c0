"What several tests share: one copy of the project to build in, so that the checkout is never touched"
import multiprocessing,os,shutil,subprocess,sys
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1') # small tensors: more threads are slower, and fight for the cores
import pytest

root = Path(__file__).resolve().parent.parent
ignored = ['.git', *(o.strip('/') for o in (root/'.gitignore').read_text().split())]

def copy_project(d, *also_ignored):
    shutil.copytree(root, d, ignore=shutil.ignore_patterns(*ignored, *also_ignored))
    return d

def run(*cmd, cwd, ok=True, **env):
    "Run a command of this environment on the project in `cwd`; what it printed is the message of a failure"
    exe = Path(sys.executable).parent/cmd[0]
    env = {**os.environ, 'PYTHONPATH':str(cwd), 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg', 'PYTHONDONTWRITEBYTECODE':'1', **env}
    cmd = [str(exe) if exe.exists() else cmd[0], *map(str, cmd[1:])]
    r = subprocess.run(cmd, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600)
    if ok and r.returncode: pytest.fail(f"`{' '.join([exe.name, *cmd[1:]])}` ended with {r.returncode}\n{r.stdout[-20000:]}", pytrace=False)
    return r

def start(f, *args):
    "Begin `f(*args)` in a clean process: one forked from here hangs as soon as torch has used its threads"
    ctx = multiprocessing.get_context('forkserver' if os.name=='posix' else 'spawn')
    if os.name=='posix': ctx.set_forkserver_preload(['fastai.vision.all'])
    p = ctx.Process(target=f, args=args, daemon=True)
    p.start()
    return p

def ended(p, within=300):
    "Wait for a process of `start`; one that hangs is killed, and the test fails"
    p.join(within)
    if not p.is_alive(): return p
    p.kill()
    pytest.fail(f'a process hangs after {within} s')

def files(d, sub='.', pat='*'):
    "Relative paths of the files in `d/sub`, caches left out"
    return {p.relative_to(d).as_posix() for p in (d/sub).rglob(pat) if p.is_file() and not {'__pycache__','.ipynb_checkpoints'}&set(p.parts)}

@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "All tests together run in two processes, those of a file in one; named files run in this process, where `-s` and `--pdb` work"
    o = config.option
    if config.args_source!=config.ArgsSource.TESTPATHS or hasattr(config, 'workerinput') or getattr(o, 'numprocesses', 0) is not None or o.usepdb: return
    o.numprocesses,o.dist,o.loadscopereorder,o.maxworkerrestart = 2,'loadfile',False,'0'

def pytest_collection_modifyitems(items):
    "The notebooks take longest, in processes of their own: they begin first, and the other files run beside them"
    items.sort(key=lambda o: o.path.name!='test_notebooks.py')

@pytest.fixture(scope='session')
def copy(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('copy')/'fastkd')
