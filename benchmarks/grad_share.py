"""What do the columns of `log='grad'` cost? One distillation step without measuring, with it as it is, and with every step measured, timed in turns.

    python benchmarks/grad_share.py                       # a minute on one core
    python benchmarks/grad_share.py --works resnet --device cuda

A step is measured once in 16, so the cost per step is a 16th of what a measured step takes more than one that is not: the last column. `on` is the mean
step as it is, for comparison; it is noisier. The works and the way to time are those of `step.py`."""
from fastai.vision.all import *
from fastcore.script import call_parse
from step import all_works, inside_fits, timed
from fastkd.all import *

kinds = ('off','on','every')

class Off(KnowledgeDistillation):
    def _note_grad(self, *args): pass
class Every(KnowledgeDistillation):
    _every = 1

def times(make, n, warmup, device):
    "Milliseconds `(n,3,2)`: step, kind, wall or CPU"
    set_seed(0)
    dls,student,teacher = make()
    dls.to(device)
    batches = [to_device(b, device) for b in dls.train]
    batches = [b for b in batches if find_bs(b)==dls.train.bs]
    learns = [Learner(dls, deepcopy(student).to(device), CrossEntropyLossFlat(), cbs=cls(deepcopy(teacher), log=log)) for cls,log in ((Off,True),(KnowledgeDistillation,'grad'),(Every,'grad'))]
    sync,rows = torch.cuda.synchronize if device.type=='cuda' else noop,[]
    def _rounds():
        rng = random.Random(0)
        for i in range(warmup+n):
            b = batches[i%len(batches)]
            t = {k:timed(learns[k].one_batch, i, b, sync=sync) for k in rng.sample(range(3), 3)}
            rows.append([t[k] for k in range(3)])
    inside_fits(learns, warmup+n+2, _rounds)
    return np.array(rows[warmup:])

def cost(t):
    "From times `(...,steps,3)`: what measuring adds to a step, as a part of it"
    m = np.median(t, -2)
    return (m[...,2]-m[...,0])/16/m[...,0]

@call_parse
def main(
    steps:int=320, # Rounds that count, a multiple of 16
    warmup:int=80, # Rounds before those
    works:str='digits,size32,resnet', # Which, with commas
    device:str='cpu' # Or 'cuda'
):
    "Time the gradient share against a step without it"
    torch.set_num_threads(1)
    print(f"{'work':8} {'clock':5} {'off':>8} {'every':>8} ms (medians)  {'off':>8} {'on':>8} ms (means)  cost per step (95%)")
    for nm in works.split(','):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            res = times(all_works[nm][0], steps, warmup, torch.device(device))
        for j,clock in enumerate(('wall','cpu')):
            t = res[...,j]
            draws = t[np.random.default_rng(0).integers(len(t), size=(2000, len(t)))]
            lo,hi = np.percentile(cost(draws), [2.5,97.5])
            print(f"{nm:8} {clock:5} {np.median(t[:,0]):8.3f} {np.median(t[:,2]):8.3f}               {t[:,0].mean():8.3f} {t[:,1].mean():8.3f}             {cost(t):7.2%} ({lo:.2%} to {hi:.2%})", flush=True)
