"""What does KD of large answers cost? Forward and backward pass of `kd_loss`, timed in turns with the plain form on the same logits.

    python benchmarks/dense.py                                   # all works, ten minutes on one core, 8 GB of memory
    python benchmarks/dense.py --works classes,sizes --rounds 9

`plain` is the KL divergence as one writes it, differentiated by autograd; `lean` is `kd_loss` as it comes, which takes its lean form above `LeanKL.above` numbers.
The student's gradient is computed and counted in both. `sizes` runs both forms below and above that limit, to see where it belongs.

Time: median of rounds in which the forms take turns in random order; wall time and CPU time of the thread, one thread, after one round that does not count.
Memory: most bytes at a time beyond the logits, as the profiler of torch counts what its allocator hands out (temporaries inside of operations included), and, with `rss`,
how far the peak of a fresh process that does one step rises above the peak with the logits in place (Linux only)."""
import subprocess,sys
from torch.profiler import profile,ProfilerActivity
from timing import *

T,target = 4.,.5
all_works = dict(dense=(8,150,256,256), dense_cl=(8,150,256,256), classes=(64,50_000), tokens=(4096,32_000))
size_shapes = dict(classifier=lambda n: (n//1000,1000), segmentation=lambda n: (2,21,round((n/42)**.5),round((n/42)**.5)), vocabulary=lambda n: (max(n//32_000,1),32_000))

def plain(s, t):
    lp,lq = F.log_softmax(t/T, 1),F.log_softmax(s/T, 1)
    return T**2*(lp.exp()*(lp-lq)).sum(1).mean()

def lean(s, t): return kd_loss(s, t, T)
forms = dict(plain=plain, lean=lean)

def step(f, s, t): return torch.autograd.grad(f(s, t), s)[0]

def logits(shape, channels_last=False):
    "Student's and teacher's, without any temporary array"
    torch.manual_seed(0)
    def _one():
        x = torch.randn(*shape[:1], *shape[2:], shape[1]).movedim(-1,1) if channels_last else torch.randn(shape)
        return x.mul_(3)
    return _one().requires_grad_(),_one()

def peak(f):
    "Most bytes that torch's allocator has handed out at a time while `f` runs"
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    now = top = 0
    for _,n in sorted((e.start_ns(),e.nbytes()) for e in p.profiler.kineto_results.events() if e.name()=='[memory]'): now += n; top = max(top,now)
    return top

def max_rss():
    # `ru_maxrss` would be that of the parent at first
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])*1024

def rise(shape, channels_last, form):
    "In a process of its own: bytes by which one step raises the peak of resident memory"
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import dense; dense.torch.set_num_threads(1); s,t = dense.logits({shape}, {channels_last}); a = dense.max_rss(); g = dense.step(dense.{form}, s, t); print(dense.max_rss()-a)"
    return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()[-1])

def measure(shape, channels_last=False, rounds=5, rss=False):
    "All there is to say about one shape"
    s,t = logits(shape, channels_last)
    fs = {k:partial(step, f, s, t) for k,f in forms.items()}
    g = {k:f() for k,f in fs.items()}
    diff = ((g['plain']-g['lean']).abs().max()/g['plain'].abs().max()).item()
    del g
    t = in_turns(fs, rounds, 1)
    res = dict(shape=shape, numbers=s.numel(), forms=medians(list(forms), t), ratio=each_clock(over(1,0), t), rounds=rounds, difference=diff,
        memory={k:peak(f) for k,f in fs.items()}, unit=s.nbytes)
    del s,t,fs
    if rss: res['rss'] = {k:rise(shape, channels_last, k) for k in forms}
    return res

def show(name, r):
    (p,l),w,c,m = r['forms'].values(),r['ratio']['wall'],r['ratio']['cpu'],r['memory']
    rss = f"  {r['rss']['plain']/2**20:7.0f} {r['rss']['lean']/2**20:7.0f} {r['rss']['lean']/r['rss']['plain']:5.3f}" if 'rss' in r else ''
    print(f"{name:12} {r['numbers']:>11,} {p['cpu']:9.2f} {l['cpu']:9.2f} {w[0]:6.3f} ({w[1]:.3f}-{w[2]:.3f}) {c[0]:6.3f} ({c[1]:.3f}-{c[2]:.3f})  {m['plain']/2**20:7.0f} {m['lean']/2**20:7.0f} {m['lean']/m['plain']:5.3f}{rss}", flush=True)

@call_parse
def main(
    rounds:int=5, # Rounds that count, of the large works; four times as many of `sizes`
    works:str='dense,dense_cl,classes,tokens,sizes', # Which, with commas
    rss:bool=False, # Peak of resident memory as well, in processes of their own (Linux only)?
    out:str=str(here/'dense.json') # Results
):
    "Time and memory of `kd_loss` on large logits against the plain form"
    if rounds<3: raise ValueError(f"`rounds` must be at least 3, got {rounds}: fewer say nothing about medians")
    began,res = begin(),dict(target=target, above=LeanKL.above, works={}, sizes=[])
    print(f"{'work':12} {'numbers':>11} {'plain ms':>9} {'lean ms':>9} wall ratio (95%)      cpu ratio (95%)        plain MB, lean MB, ratio{'  resident: plain MB, lean MB, ratio' if rss else ''}")
    with fair():
        for nm in works.split(','):
            if nm!='sizes':
                r = res['works'][nm] = measure(all_works[nm], nm.endswith('_cl'), rounds, rss)
                show(nm, r)
                continue
            above,LeanKL.above = LeanKL.above,0
            for k,f in size_shapes.items():
                for n in [2**i for i in range(15,23)]:
                    r = measure(f(n), rounds=4*rounds)
                    res['sizes'].append(dict(kind=k, **r))
                    show(k, r)
            LeanKL.above = above
    print(f'target: time and memory at most {target} of the plain form from 8×150×256² on; lean from {LeanKL.above:,} numbers on')
    write(out, res, began)
