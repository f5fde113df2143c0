"""How long does `import fastkd.all` take where fastai is imported already?

    python benchmarks/imports.py
    python benchmarks/imports.py --peers PYTHON      # an interpreter of an environment that has fasterai and torchdistill, too

Each sample is a fresh interpreter that imports `fastai.vision.all` and then the library, CPU time of the process; the libraries take turns. The modules are compiled before
the first sample, as they are after an installation. `heavy` is what the library's import spends in each module by itself, of one run of `python -X importtime`."""
import subprocess,sys,tempfile
from timing import *

libraries = {'fastkd':'fastkd.all', 'fasterai':'fasterai.distill.all', 'torchdistill':'torchdistill.losses.mid_level, torchdistill.core.distillation'}

def sample(python, lib, env):
    "CPU seconds of the two imports"
    code = f"import time; a = time.process_time(); import fastai.vision.all; b = time.process_time(); import {lib}; print(b-a, time.process_time()-b)"
    return [float(o) for o in subprocess.run([python, '-W', 'ignore', '-c', code], env=env, cwd=here.parent, capture_output=True, text=True, check=True).stdout.split()[-2:]]

def heavy(python, lib, env, n=8):
    "Milliseconds of the modules that `lib` brings along, without those that they import"
    code = f"import fastai.vision.all,sys; sys.stderr.write('--\\n'); import {lib}"
    log = subprocess.run([python, '-W', 'ignore', '-X', 'importtime', '-c', code], env=env, cwd=here.parent, capture_output=True, text=True, check=True).stderr
    rows = re.findall(r'import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)', log.split('--\n')[-1])
    return {k:int(us)/1e3 for us,k in sorted(rows, key=lambda o: -int(o[0]))[:n]}

@call_parse
def main(
    rounds:int=9, # Interpreters of each library
    peers:str=None, # Interpreter of an environment that has the peers; None: fastkd alone
    out:str=str(here/'imports.json') # Results
):
    "Time the import of fastkd after that of fastai"
    began,python,res = begin(),peers or sys.executable,{}
    with tempfile.TemporaryDirectory() as d:
        env = {**{k:v for k,v in os.environ.items() if k!='PYTHONDONTWRITEBYTECODE'}, 'PYTHONPYCACHEPREFIX':d, 'OMP_NUM_THREADS':'1'}
        libs = libraries if peers else {'fastkd':libraries['fastkd']}
        for lib in libs.values(): sample(python, lib, env)
        rows = {k:[] for k in libs}
        for i in range(rounds):
            for k in random.Random(i).sample(list(libs), len(libs)): rows[k].append(sample(python, libs[k], env))
        for k,t in rows.items():
            t = np.array(t)
            res[k] = dict(fastai_s=float(np.median(t[:,0])), own_s=float(np.median(t[:,1])), ratio=interval(lambda t: 1+over(1, 0)(t), t), rounds=len(t))
            if k=='fastkd': res[k].update(target=1.03, heavy=heavy(python, libs[k], env))
            print(f"{k:14} fastai {res[k]['fastai_s']:.2f} s, then {res[k]['own_s']:.3f} s   ratio {res[k]['ratio'][0]:.4f} ({res[k]['ratio'][1]:.4f}-{res[k]['ratio'][2]:.4f})", flush=True)
    write(out, dict(libraries=res), began)
