"""What does distilling cost? One training step, in five forms, timed in turns on the same batches.

    python benchmarks/step.py                          # all works, a few minutes on one core
    python benchmarks/step.py --works digits --steps 200

`plain` is a fastai step without distillation, `teacher` the teacher's bare forward pass (eval, no grad), `kd` the fastai step with
`KnowledgeDistillation(teacher)` and its defaults, `bare` a step of a loop without fastai, `barekd` the same loop with the teacher and its KL divergence
written into it. The question is how much `kd` takes over `plain+teacher`; `barekd-bare-teacher` of that is what no library could save (the extra loss, and memory
that two nets share).

How it is made fair: both Learners are inside a real `fit` and are handed the same batch, so a sample is exactly one `learn.one_batch`, with the
optimizer and all of fastai's default callbacks but the progress bar. The five forms of a round run in random order.
One thread, no garbage collection inside a sample, warm-up first. Wall time and CPU time of the thread are taken of each sample: on a shared machine the second is the steadier one.
On a GPU each sample ends with a synchronisation, and CPU time only counts what Python does."""
import gc,json,time
from copy import deepcopy
from fastai.vision.all import *
from fastcore.script import call_parse
from torchvision.models import resnet18,resnet34
from fastkd.all import *
from fastkd.test_utils import digits_dls, tiny_cnn

kinds = ('plain','teacher','kd','bare','barekd')

def random_dls(n=64, size=64, ch=3, c=10, bs=16):
    "Random images and labels"
    ds = [(torch.randn(ch, size, size), torch.randint(c, ())) for _ in range(n)]
    return DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds[:bs], bs=bs))

def small(size): return digits_dls(size=size), tiny_cnn((4,8,16)), tiny_cnn((32,64,128))
def resnets(): return random_dls(), resnet18(num_classes=10), resnet34(num_classes=10)

# how to build it, most it may take over plain+teacher, most ms of our own
all_works = dict(digits=(partial(small, 8), 1.10, .5), size32=(partial(small, 32), 1.10, .5), resnet=(resnets, 1.03, None))
max_saved = 1.02

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

def make_steps(make, device):
    "Learners, batches and the five forms of a step, each a function of number and batch"
    set_seed(0)
    dls,student,teacher = make()
    dls.to(device)
    batches = [to_device(b, device) for b in dls.train]
    batches = [b for b in batches if find_bs(b)==dls.train.bs]
    learns = [Learner(dls, deepcopy(student), CrossEntropyLossFlat(), cbs=cbs) for cbs in (None, KnowledgeDistillation(teacher))]
    model,teacher = student.to(device).train(),teacher.to(device).eval()
    opt = torch.optim.AdamW(model.parameters(), 1e-4)
    def step(loss):
        loss.backward()
        opt.step()
        # as fastai does: gradients keep their memory
        opt.zero_grad(set_to_none=False)
    def bare(i, b):
        x,y = [o.as_subclass(Tensor) for o in b]
        step(F.cross_entropy(model(x), y))
    def barekd(i, b, T=4., alpha=.5):
        x,y = [o.as_subclass(Tensor) for o in b]
        z = model(x)
        task = F.cross_entropy(z, y)
        kl = F.kl_div(F.log_softmax(z/T, 1), F.log_softmax(ask(i, b)/T, 1), reduction='batchmean', log_target=True)
        step((1-alpha)*task+alpha*T**2*kl)
    @torch.no_grad()
    def ask(i, b): return teacher(b[0].as_subclass(Tensor))
    return learns,batches,dict(zip(kinds, (learns[0].one_batch, ask, learns[1].one_batch, bare, barekd)))

def timed(f, *args, sync=noop):
    "Milliseconds of `f(*args)`: wall, CPU time of this thread"
    sync()
    wall,cpu = time.perf_counter(),time.thread_time()
    f(*args)
    sync()
    return [(time.perf_counter()-wall)*1e3,(time.thread_time()-cpu)*1e3]

def saved_bytes(f, skip):
    "Bytes of the storages that `f` keeps for backward, each counted once, those of `skip` not"
    # all are held until the end: a freed storage would lend its address to the next
    held,skip = [],{o.untyped_storage().data_ptr() for o in skip}
    def pack(o):
        held.append(o)
        return o
    with torch.autograd.graph.saved_tensors_hooks(pack, noop): f()
    return sum({s.data_ptr():s.nbytes() for s in (o.untyped_storage() for o in held) if s.data_ptr() not in skip}.values())

def memory(learns, steps, batch):
    "Bytes kept for backward by a plain step, by a distillation step, and of the teacher's answer"
    plain,kd = [saved_bytes(partial(steps[k], 0, batch), list(l.model.parameters())) for k,l in zip(('plain','kd'), learns)]
    return dict(plain=plain, kd=kd, answer=steps['teacher'](0, batch).nbytes)

def run_work(make, n_steps, warmup, device):
    "Times `(n_steps,4,2)` in ms: step, kind, wall or CPU; and the bytes of `memory`"
    learns,batches,steps = make_steps(make, device)
    sync,res = torch.cuda.synchronize if device.type=='cuda' else noop,{}
    def _rounds():
        rng,rows = random.Random(0),[]
        for i in range(warmup+n_steps):
            if i%10==0: gc.collect()
            b = batches[i%len(batches)]
            t = {k:timed(steps[k], i, b, sync=sync) for k in rng.sample(kinds, len(kinds))}
            rows.append([t[k] for k in kinds])
        res['times'],res['saved'] = np.array(rows[warmup:]),memory(learns, steps, batches[0])
    gc.collect()
    gc.freeze()
    gc.disable()
    try: inside_fits(learns, warmup+n_steps+2, _rounds)
    finally:
        gc.enable()
        gc.unfreeze()
    return res['times'],res['saved']

def ratio_own(t):
    "From times `(...,steps,5)`: ratio of medians kd/(plain+teacher), the ms beyond that sum, and those of a bare loop"
    m = np.median(t, -2)
    base = m[...,0]+m[...,1]
    return m[...,2]/base, m[...,2]-base, m[...,4]-m[...,3]-m[...,1]

def summary(t, n_boot=2000):
    "Quartiles of each kind, ratio and own ms with 95% bootstrap intervals (rounds are drawn, not samples) of times `(steps,5)`"
    ratio,own,floor = ratio_own(t)
    draws = ratio_own(t[np.random.default_rng(0).integers(len(t), size=(n_boot, len(t)))])
    r_ci,o_ci,f_ci = [np.percentile(o, [2.5,97.5]).tolist() for o in draws]
    qs = {k:dict(zip(('q1','median','q3'), np.percentile(t[:,i], [25,50,75]).tolist())) for i,k in enumerate(kinds)}
    return dict(ms=qs, ratio=float(ratio), ratio_ci=r_ci, own_ms=float(own), own_ms_ci=o_ci, floor_ms=float(floor), floor_ms_ci=f_ci)

def report(name, times, saved):
    "All there is to say about one work: both clocks, memory and the targets"
    _,max_ratio,max_own = all_works[name]
    res = dict(wall=summary(times[...,0]), cpu=summary(times[...,1]), saved=saved, saved_ratio=saved['kd']/(saved['plain']+saved['answer']))
    return dict(res, steps=len(times), target=dict(ratio=max_ratio, own_ms=max_own, saved_ratio=max_saved))

def show(name, r):
    "Two rows of the table, then the tensors saved for backward"
    for clock in ('wall','cpu'):
        s = r[clock]
        ms = ' '.join(f"{s['ms'][k]['median']:8.2f}" for k in kinds)
        iqr = max((q['q3']-q['q1'])/q['median'] for q in s['ms'].values())
        print(f"{name:8} {clock:5} {ms}  {s['ratio']:5.3f} ({s['ratio_ci'][0]:.3f}-{s['ratio_ci'][1]:.3f})  {s['own_ms']:6.2f} ({s['own_ms_ci'][0]:5.2f} to {s['own_ms_ci'][1]:4.2f})  {s['floor_ms']:6.2f} ({s['floor_ms_ci'][0]:5.2f} to {s['floor_ms_ci'][1]:4.2f})  {iqr:4.0%}")
    t,v = r['target'],r['saved']
    own = '' if t['own_ms'] is None else f", own ms {t['own_ms']}"
    print(f"{'':8} saved for backward: plain {v['plain']:,} B, kd {v['kd']:,} B, teacher's answer {v['answer']:,} B, ratio {r['saved_ratio']:.3f}; targets: ratio {t['ratio']}{own}, saved {t['saved_ratio']}", flush=True)

@call_parse
def main(
    steps:int=60, # Rounds that count, at least 30
    warmup:int=10, # Rounds before those
    works:str='digits,size32,resnet', # Which, with commas
    out:str=str(Path(__file__).parent/'step.json'), # Results
    device:str='cpu' # Or 'cuda'
):
    "Time a distillation step against a plain step plus the teacher's forward pass"
    if steps<30: raise ValueError(f"`steps` must be at least 30, got {steps}: fewer say nothing about medians")
    torch.set_num_threads(1)
    device,load = torch.device(device),os.getloadavg()
    res = dict(torch=torch.__version__, device=torch.cuda.get_device_name() if device.type=='cuda' else 'cpu, 1 thread', load_before=load, works={})
    print(f"{'work':8} {'clock':5} {' '.join(f'{k:>8}' for k in kinds)}  kd/(plain+teacher)   own ms (95%)             of a bare loop (95%)     spread")
    for nm in works.split(','):
        with warnings.catch_warnings():
            # untrained teachers are near chance
            warnings.filterwarnings('ignore', message='the teacher is right on')
            r = res['works'][nm] = report(nm, *run_work(all_works[nm][0], steps, warmup, device))
        show(nm, r)
    res['load_after'] = os.getloadavg()
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
