"""Do two processes do twice the work? Training and precomputing by one process and by two, one thread each.

    python benchmarks/processes.py                     # five minutes on two cores; needs accelerate

resnet18 learns from resnet34 at 64 pixels, 16 items per process and step, under `learn.distrib_ctx()` (gloo on a CPU); `plain` has no teacher, `live` asks it, `stored` looks its answers up,
and in a process they take turns, an epoch each. `precompute` writes the answers to as many items. One process and two are launched in turns by `torch.distributed.run`.

Items per second on the clock, of all processes together. `gain` is that of two over that of one: 2 is ideal, where the machine has two free cores."""
import subprocess,sys,tempfile
from timing import *

kinds = ('plain','live','stored','precompute')

class EpochTime(Callback):
    "Seconds of each training phase"
    def before_fit(self): self.s = []
    def before_train(self): self.t = time.perf_counter()
    def after_train(self): self.s.append(time.perf_counter()-self.t)

def worker(out, epochs, n, bs=16):
    "In each of the processes: items per second of each kind, of several epochs"
    import torch.distributed as dist
    from fastai.distributed import DistributedDL
    torch.set_num_threads(1)
    # fastai sends the order of the items by way of a GPU
    def _broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast
    set_seed(0)
    xs,ys = torch.randn(n, 3, 64, 64),torch.randint(10, (n,))
    ds = Datasets(list(range(n)), [[xs.__getitem__],[ys.__getitem__]], splits=(list(range(n)),list(range(bs))))
    dls = ds.dataloaders(bs=bs, num_workers=0, dl_type=TfmdDL)
    student,teacher,res,d = resnet18(num_classes=10),resnet34(num_classes=10).eval(),{k:[] for k in kinds},Path(out).parent
    def fit(cbs=None):
        learn,clock = learner(dls, student, cbs),EpochTime()
        with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(1, 1e-4, cbs=clock)
        return n/clock.s[-1]
    def precompute(i):
        t = time.perf_counter()
        store = precompute_targets(teacher, dls, d/f'{Path(out).stem}_{i}', task='softmax', bar=noop)
        dist.barrier()
        return n/(time.perf_counter()-t),store
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore')
        # this is where the processes meet, and all is warm after it
        fit()
        for i in range(epochs):
            rate,store = precompute(i)
            res['precompute'].append(rate)
            for k,cb in dict(plain=None, live=KnowledgeDistillation(teacher), stored=KnowledgeDistillation(store)).items(): res[k].append(fit(cb))
    if rank_distrib()==0: Path(out).write_text(json.dumps(res))
    dist.barrier()
    dist.destroy_process_group()

def launch(n, d, i, epochs, items):
    out = Path(d)/f'{n}_{i}.json'
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), __file__, '--worker', str(out), '--epochs', str(epochs), '--items', str(items)]
    r = subprocess.run(cmd, env={**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}, capture_output=True, text=True)
    if r.returncode: raise RuntimeError(f'{n} processes: {r.stderr[:6000]}')
    return json.loads(out.read_text())

@call_parse
def main(
    rounds:int=3, # Launches of each number of processes
    epochs:int=4, # In each launch
    items:int=256, # In an epoch
    worker:str=None, # Results of one of the processes, for use by this script
    out:str=str(here/'processes.json') # Results
):
    "Time training and precomputing in one process and in two"
    if worker: return globals()['worker'](worker, epochs, items)
    began,got = begin(),{1:[],2:[]}
    with tempfile.TemporaryDirectory() as d:
        for i in range(rounds):
            for n in random.Random(i).sample([1,2], 2): got[n].append(launch(n, d, i, epochs, items))
    res = {}
    for k in kinds:
        t = np.array([[r for g in got[n] for r in g[k]] for n in (1,2)]).T
        res[k] = dict(one=float(np.median(t[:,0])), two=float(np.median(t[:,1])), gain=interval(over(1, 0), t), samples=len(t))
        print(f"{k:12} one {res[k]['one']:8.1f}  two {res[k]['two']:8.1f} items/s   gain {res[k]['gain'][0]:.2f} ({res[k]['gain'][1]:.2f}-{res[k]['gain'][2]:.2f})", flush=True)
    write(out, dict(kinds=res), began)
