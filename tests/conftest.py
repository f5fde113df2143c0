"What several tests share: one copy of the project to build in, so that the checkout is never touched"
import os,shutil,subprocess,sys
from pathlib import Path
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
    r = subprocess.run(cmd, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ok and r.returncode: pytest.fail(f"`{' '.join([exe.name, *cmd[1:]])}` ended with {r.returncode}\n{r.stdout[-20000:]}", pytrace=False)
    return r

def files(d, sub='.', pat='*'):
    "Relative paths of the files in `d/sub`, caches left out"
    return {p.relative_to(d).as_posix() for p in (d/sub).rglob(pat) if p.is_file() and not {'__pycache__','.ipynb_checkpoints'}&set(p.parts)}

@pytest.fixture(scope='session')
def copy(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('copy')/'fastkd')
