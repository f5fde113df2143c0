"""What do the columns of `log='grad'` cost? One distillation step without measuring, with it as it is, and with every step measured, timed in turns.

    python benchmarks/grad_share.py                       # a minute on one core
    python benchmarks/grad_share.py --works resnet --device cuda

A step is measured once in 16, so the cost per step is a 16th of what a measured step takes more than one that is not: the last column. `on` is the mean
step as it is, for comparison; it is noisier. The works and the way to time are those of `step.py`."""
from timing import *

class Off(KnowledgeDistillation):
    def _note_grad(self, *args): pass
class Every(KnowledgeDistillation):
    _every = 1

def times(work, n, warmup, device):
    "Milliseconds `(n,3,2)`: step, kind, wall or CPU"
    dls,batches,student,teacher,_ = make(work, device)
    learns = [learner(dls, student, cls(deepcopy(teacher), log=log)) for cls,log in ((Off,True),(KnowledgeDistillation,'grad'),(Every,'grad'))]
    res = []
    inside_fits(learns, warmup+n+2, lambda: res.append(in_turns([l.one_batch for l in learns], n, warmup, numbered(batches), device=device)))
    return res[0]

def cost(t):
    "From times `(...,steps,3)`: what measuring adds to a step, as a part of it"
    m = np.median(t, -2)
    return (m[...,2]-m[...,0])/16/m[...,0]

@call_parse
def main(
    steps:int=320, # Rounds that count, a multiple of 16
    warmup:int=80, # Rounds before those
    works:str='digits,size32,resnet', # Which, with commas
    out:str=str(here/'grad_share.json'), # Results
    device:str='cpu' # Or 'cuda'
):
    "Time the gradient share against a step without it"
    began,res = begin(),{}
    print(f"{'work':8} {'clock':5} {'off':>8} {'every':>8} ms (medians)  {'off':>8} {'on':>8} ms (means)  cost per step (95%)")
    for nm in works.split(','):
        with fair(): ts = times(nm, steps, warmup, torch.device(device))
        c = each_clock(cost, ts)
        res[nm] = dict(forms=medians(('off','on','every'), ts), cost=c, rounds=len(ts))
        for clock,t in zip(c, ts.transpose(2,0,1)):
            print(f"{nm:8} {clock:5} {np.median(t[:,0]):8.3f} {np.median(t[:,2]):8.3f}               {t[:,0].mean():8.3f} {t[:,1].mean():8.3f}             {c[clock][0]:7.2%} ({c[clock][1]:.2%} to {c[clock][2]:.2%})", flush=True)
    write(out, dict(works=res), began, device)
