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
from timing import *

kinds = ('plain','teacher','kd','bare','barekd')
# most it may take over plain+teacher, most ms of our own
targets = dict(digits=(1.10,.5), size32=(1.10,.5), resnet=(1.03,None))
max_saved = 1.02

def run_work(work, n, warmup, device):
    "Times `(n,5,2)` in ms: step, kind, wall or CPU; and the bytes kept for backward by a plain step, by a distillation step, and of the teacher's answer"
    dls,batches,student,teacher,_ = make(work, device)
    learns,ask = [learner(dls, student, cbs) for cbs in (None,KnowledgeDistillation(teacher))],asking(teacher)
    forms = [learns[0].one_batch, ask, learns[1].one_batch, bare_step(deepcopy(student), task_loss),
        bare_step(deepcopy(student), lambda m,x,y: hinton(m(x), ask(0, (x,)), y))]
    res = {}
    def _run():
        res['times'] = in_turns(forms, n, warmup, numbered(batches), device=device)
        for k,l in zip(('plain','kd'), learns): res[k] = saved_bytes(partial(l.one_batch, 0, batches[0]), list(l.model.parameters()))
    inside_fits(learns, warmup+n+2, _run)
    return res.pop('times'),dict(res, answer=ask(0, batches[0]).nbytes)

def summary(t):
    "Quartiles of each kind, the ratio kd/(plain+teacher), the ms beyond that sum, and those of a bare loop, of times `(steps,5)`"
    qs = {k:dict(zip(('q1','median','q3'), np.percentile(t[:,i], [25,50,75]).tolist())) for i,k in enumerate(kinds)}
    res = dict(ms=qs)
    for k,f in dict(ratio=over(2,0,1), own_ms=beyond(2,0,1), floor_ms=beyond(4,3,1)).items(): res[k],*res[f'{k}_ci'] = interval(f, t)
    return res

def show(name, r):
    "Two rows of the table, then the tensors saved for backward"
    for clock in ('wall','cpu'):
        s = r[clock]
        ms = ' '.join(f"{s['ms'][k]['median']:8.2f}" for k in kinds)
        print(f"{name:8} {clock:5} {ms}  {s['ratio']:5.3f} ({s['ratio_ci'][0]:.3f}-{s['ratio_ci'][1]:.3f})  {s['own_ms']:6.2f} ({s['own_ms_ci'][0]:5.2f} to {s['own_ms_ci'][1]:4.2f})  {s['floor_ms']:6.2f} ({s['floor_ms_ci'][0]:5.2f} to {s['floor_ms_ci'][1]:4.2f})  {r['spread']:4.0%}")
    t,v = r['target'],r['saved']
    own = '' if t['own_ms'] is None else f", own ms {t['own_ms']}"
    print(f"{'':8} saved for backward: plain {v['plain']:,} B, kd {v['kd']:,} B, teacher's answer {v['answer']:,} B, ratio {r['saved_ratio']:.3f}; targets: ratio {t['ratio']}{own}, saved {t['saved_ratio']}", flush=True)

@call_parse
def main(
    steps:int=60, # Rounds that count, at least 30; of the small nets four times as many
    warmup:int=10, # Rounds before those
    works:str='digits,size32,resnet', # Which, with commas
    out:str=str(here/'step.json'), # Results
    device:str='cpu' # Or 'cuda'
):
    "Time a distillation step against a plain step plus the teacher's forward pass"
    if steps<30: raise ValueError(f"`steps` must be at least 30, got {steps}: fewer say nothing about medians")
    device,began,res = torch.device(device),begin(),{}
    print(f"{'work':8} {'clock':5} {' '.join(f'{k:>8}' for k in kinds)}  kd/(plain+teacher)   own ms (95%)             of a bare loop (95%)     spread")
    with fair():
        for nm in works.split(','):
            t,saved = run_work(nm, steps*(1 if nm=='resnet' else 4), warmup, device)
            r = res[nm] = dict(wall=summary(t[...,0]), cpu=summary(t[...,1]), saved=saved, saved_ratio=saved['kd']/(saved['plain']+saved['answer']), steps=len(t),
                spread=spread(t[...,1]), target=dict(zip(('ratio','own_ms'), targets[nm]), saved_ratio=max_saved))
            show(nm, r)
    write(out, dict(works=res), began, device)
