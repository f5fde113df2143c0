"""All benchmarks, one after the other in processes of their own, and RESULTS.md of what they have written.

    python -m benchmarks                         # 45 minutes on two quiet cores; from the root of a checkout
    python -m benchmarks --peers PYTHON          # and beside fasterai and torchdistill, in an environment that has both: README.md says how to make it
    python -m benchmarks --parts step,scale      # some of them; the others keep the files they have
    python -m benchmarks --resume                # go on: parts whose file is of the last 12 hours are left out
    python -m benchmarks --quick                 # does all of it run? Ten minutes, into build/benchmarks
    python -m benchmarks --report                # RESULTS.md anew, nothing is measured"""
import argparse,json,os,shutil,subprocess,sys,time
from datetime import datetime,timezone
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))
import report

# script, arguments, arguments of a quick run, None: not part of it
parts = dict(step=('step.py', '--steps 120', '--steps 30 --warmup 3'), at=('losses.py', '--at --rounds 60', '--at --rounds 30'), peers=('peers.py', '--steps 60', '--steps 8'),
    store=('store.py', '--n 60', '--n 6'), dense=('dense.py', '--rounds 5', '--rounds 3 --works classes'), losses=('losses.py', '--rounds 9', '--rounds 5 --names at,rkd'),
    losses_peer=('losses.py', '--peer --rounds 9', '--peer --rounds 5 --names at,rkd'), scale=('scale.py', '', '--most 10000 --rounds 5'),
    processes=('processes.py', '', '--rounds 1 --epochs 1 --items 64'), imports=('imports.py', '--rounds 9', '--rounds 2'), grad_share=('grad_share.py', '', '--steps 16 --warmup 16'))
# these train for hours, and leave out what is there: only by name
long = dict(accuracy='accuracy.py', methods='methods.py', defaults='defaults.py', targets='targets.py', small_data='small_data.py', find='find.py', faults='faults.py')
needs_peers = ('peers','losses_peer')
threads = {k:'1' for k in ('OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS','NUMEXPR_NUM_THREADS')}

def file_of(d, k): return d/{'losses':'losses.csv', 'losses_peer':'losses.csv'}.get(k, f'{k}.json')

def run(k, d, quick, peers):
    "Is the part done?"
    script,*args = (long[k],'','') if k in long else parts[k]
    cmd = [peers if k in needs_peers or (k=='accuracy' and peers) else sys.executable, str(here/script), *args[quick].split(), *([] if k in long else ['--out',str(file_of(d, k))])]
    if k=='imports' and peers: cmd += ['--peers',peers]
    env = {**os.environ, **threads, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'KINETO_LOG_LEVEL':'99', 'PYTHONPATH':os.pathsep.join(filter(None, [str(here.parent),os.environ.get('PYTHONPATH')]))}
    print(f'\n== {k}', flush=True)
    t = time.time()
    rc = subprocess.run(cmd, env=env, cwd=here.parent).returncode
    print(f"== {k}: {'failed' if rc else 'done'} after {time.time()-t:.0f} s", flush=True)
    f = file_of(d, k)
    if not rc and quick and f.suffix=='.json': f.write_text(json.dumps({**json.loads(f.read_text()), 'quick':True}, indent=1)+'\n')
    return not rc

def fresh(f):
    "Was it written in the last 12 hours, by a run that counts?"
    try: r = json.loads(f.read_text())
    except (OSError,ValueError): return False
    return 'date' in r and not r.get('quick') and (datetime.now(timezone.utc)-datetime.fromisoformat(r['date'])).total_seconds()<12*3600

def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--parts', help=f"which, with commas: {', '.join(parts)}; by name only: {', '.join(long)}")
    p.add_argument('--peers', help='interpreter of an environment that has fasterai and torchdistill, too')
    p.add_argument('--resume', action='store_true', help='leave out parts that were measured in the last 12 hours')
    p.add_argument('--quick', action='store_true', help='few rounds, into build/benchmarks')
    p.add_argument('--report', action='store_true', help='measure nothing')
    p.add_argument('--to', type=Path, help='folder of the results')
    a = p.parse_args(argv)
    d = a.to or (here.parent/'build/benchmarks' if a.quick else here)
    d.mkdir(parents=True, exist_ok=True)
    todo = a.parts.split(',') if a.parts else list(parts)
    if (wrong:=[k for k in todo if k not in {**parts, **long}]): p.error(f"no part {', '.join(wrong)}; there are {', '.join([*parts, *long])}")
    if a.peers and not shutil.which(a.peers): p.error(f'no interpreter at {a.peers}')
    if a.report: todo = []
    if (gone:=[k for k in todo if k in needs_peers and not a.peers]): print(f"left out without --peers: {', '.join(gone)}")
    todo = [k for k in todo if k not in gone and not (a.resume and fresh(file_of(d, k)))]
    failed = [k for k in todo if not run(k, d, a.quick, a.peers)]
    report.write(d)
    print(f"{d/'RESULTS.md'} is written{', without '+', '.join(failed) if failed else ''}")
    return bool(failed)

if __name__=='__main__': sys.exit(main())
