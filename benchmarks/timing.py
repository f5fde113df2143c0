"What the benchmarks share: nets and batches, steps, turns, clocks, intervals, and what is said about the machine"
import gc,itertools,json,platform,random,time,warnings
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime,timezone
from fastai.vision.all import *
from fastcore.script import call_parse
from torchvision.models import resnet18,resnet34
from fastkd.all import *
from fastkd.test_utils import digits_dls,tiny_cnn

here = Path(__file__).parent

# -- nets and batches
def random_dls(n=64, size=64, ch=3, c=10, bs=16):
    "Random images and labels"
    ds = [(torch.randn(ch, size, size), torch.randint(c, ())) for _ in range(n)]
    return DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds[:bs], bs=bs))

def small(size): return digits_dls(size=size), tiny_cnn((4,8,16)), tiny_cnn((32,64,128)), ['1','2']
def resnets(): return random_dls(), resnet18(num_classes=10), resnet34(num_classes=10), ['layer3','layer4']
# DataLoaders, student, teacher, two layers that both have
nets = dict(digits=partial(small, 8), size32=partial(small, 32), resnet=resnets)

def make(work, device='cpu'):
    "DataLoaders, their whole training batches, student, teacher and layers of a work"
    set_seed(0)
    dls,student,teacher,layers = nets[work]()
    dls.to(device)
    batches = [b for b in (to_device(b, device) for b in dls.train) if find_bs(b)==dls.train.bs]
    return dls,batches,student.to(device),teacher.to(device).eval(),layers

# -- steps
def learner(dls, model, cbs=None): return Learner(dls, deepcopy(model), CrossEntropyLossFlat(), cbs=cbs)

def inside_fits(learns, n, f):
    "Call `f` where each of `learns` is inside the training phase of a `fit` of `n` batches"
    if not learns: return f()
    learn,*rest = learns
    def _batches():
        del learn.all_batches
        learn.n_iter = n
        inside_fits(rest, n, f)
    learn.all_batches = _batches
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)

def plain_batch(b): return [o.as_subclass(Tensor) for o in b]

def bare_step(model, loss):
    "A training step without fastai: `loss(model, x, y)`, AdamW; gradients keep their memory, as fastai's do"
    model,opt = model.train(),torch.optim.AdamW(model.parameters(), 1e-4)
    def _step(i, b):
        loss(model, *plain_batch(b)).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    return _step

def task_loss(model, x, y): return F.cross_entropy(model(x), y)

def hinton(s, t, y, T=4., alpha=.5):
    "Task loss and KL divergence as one writes them"
    kl = F.kl_div(F.log_softmax(s/T, 1), F.log_softmax(t/T, 1), reduction='batchmean', log_target=True)
    return (1-alpha)*F.cross_entropy(s, y)+alpha*T**2*kl

def asking(teacher):
    "The teacher's bare forward pass"
    def _ask(i, b):
        with torch.no_grad(): return teacher(b[0].as_subclass(Tensor))
    return _ask

def saved_bytes(f, skip):
    "Bytes of the storages that `f` keeps for backward, each counted once, those of `skip` not"
    # all are held until the end: a freed storage would lend its address to the next
    held,skip = [],{o.untyped_storage().data_ptr() for o in skip}
    def pack(o):
        held.append(o)
        return o
    with torch.autograd.graph.saved_tensors_hooks(pack, noop): f()
    return sum({s.data_ptr():s.nbytes() for s in (o.untyped_storage() for o in held) if s.data_ptr() not in skip}.values())

# -- turns and clocks
@contextmanager
def fair():
    "One thread, garbage collected between samples only, no words about untrained teachers"
    torch.set_num_threads(1)
    gc.collect(); gc.freeze(); gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='the stored answers were right|the teacher is right on')
            yield
    finally: gc.enable(); gc.unfreeze()

def clocks(f, *args, reps=1, sync=noop):
    "Milliseconds of `f(*args)`: wall, CPU time of this thread"
    sync()
    wall,cpu = time.perf_counter(),time.thread_time()
    for _ in range(reps): f(*args)
    sync()
    return [(time.perf_counter()-wall)*1e3/reps,(time.thread_time()-cpu)*1e3/reps]

def in_turns(forms, n, warmup=3, args=lambda i: (), reps=1, device='cpu'):
    "Times `(n,forms,2)` in ms: each of `forms` is called with the `args` of the round, in random order"
    rng,rows,forms = random.Random(0),[],list(forms.values() if isinstance(forms, dict) else forms)
    sync = torch.cuda.synchronize if torch.device(device).type=='cuda' else noop
    for i in range(warmup+n):
        if i%10==0: gc.collect()
        a = args(i)
        t = {k:clocks(forms[k], *a, reps=reps, sync=sync) for k in rng.sample(range(len(forms)), len(forms))}
        rows.append([t[k] for k in range(len(forms))])
    return np.array(rows[warmup:])

def at_ease(forms, rounds, secs=5., min_ms=10., device='cpu'):
    "`in_turns`, with as many calls in a sample as make it `min_ms` long (the first finds cold caches), and as many rounds as fit into `secs`, at least 5"
    for f in forms: f()
    ms = [max(clocks(f)[0], .01) for f in forms]
    reps = math.ceil(min_ms/min(ms))
    return in_turns(forms, max(5, min(rounds, int(secs*1e3/sum(ms)/reps))), 1, reps=reps, device=device)

def numbered(batches): return lambda i: (i,batches[i%len(batches)])

# -- intervals
def interval(f, t, n_boot=2000):
    "`f` of times `(...,rounds,forms)`, and its 95% bootstrap interval: rounds are drawn, not samples"
    draws = f(t[np.random.default_rng(0).integers(len(t), size=(n_boot,len(t)))])
    return [float(f(t)),*np.percentile(draws, [2.5,97.5]).tolist()]

def over(own, *base):
    "Median of column `own` over the sum of the medians of columns `base`"
    def _f(t):
        m = np.median(t, -2)
        return m[...,own]/sum(m[...,i] for i in base)
    return _f

def beyond(own, *base):
    "Median of column `own` less the sum of the medians of columns `base`"
    def _f(t):
        m = np.median(t, -2)
        return m[...,own]-sum(m[...,i] for i in base)
    return _f

def each_clock(f, t): return {k:interval(f, t[...,i]) for i,k in enumerate(('wall','cpu'))}
def medians(names, t): return {k:dict(zip(('wall','cpu'), np.median(t[:,i], 0).round(4).tolist())) for i,k in enumerate(names)}
def spread(t):
    "Widest interquartile range of the forms, relative to its median"
    q = np.percentile(t, [25,50,75], axis=0)
    return float(((q[2]-q[0])/q[1]).max())

def race(title, names, t, base, target=None, own=None):
    "Print one line per clock; what goes into the file: medians, and the last form (or number `own`) over `base`"
    own = len(names)-1 if own is None else own
    res = dict(forms=medians(names, t), ratio=each_clock(over(own, *base), t), target=target, rounds=len(t), spread=spread(t[...,1]))
    for c,(r,lo,hi) in res['ratio'].items():
        print(f"{title:18} {c:5} {'  '.join(f'{k} {v[c]:9.3f}' for k,v in res['forms'].items())} ms   ratio {r:.3f} ({lo:.3f}-{hi:.3f}){f', target {target}' if target else ''}", flush=True)
    return res

# -- what goes into the file
def _lines(f, pat):
    try: return re.findall(pat, Path(f).read_text())
    except OSError: return []

def machine(device='cpu'):
    "Where and with what this runs"
    import fastai,fastkd,sklearn
    from importlib.metadata import version
    mem = _lines('/proc/meminfo', r'MemTotal:\s+(\d+)')
    return dict(cpu=first(_lines('/proc/cpuinfo', r'model name\s*:\s*(.+)')) or platform.processor() or platform.machine(), cores=os.cpu_count(), memory_gb=round(int(mem[0])/2**20) if mem else None,
        gpu=torch.cuda.get_device_name() if torch.device(device).type=='cuda' else None, threads=1, system=platform.system(), python=platform.python_version(),
        torch=torch.__version__, fastai=fastai.__version__, fastkd=fastkd.__version__, numpy=np.__version__)

def write(out, res, began, device='cpu', **more):
    "Results, the machine, and how busy it was"
    res = dict(res, **more, machine=machine(device), load=dict(before=began['load'], after=os.getloadavg()[0]),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'), seconds=round(time.perf_counter()-began['t']))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(res, indent=1, default=float)+'\n')
def begin(): return dict(t=time.perf_counter(), load=os.getloadavg()[0])
