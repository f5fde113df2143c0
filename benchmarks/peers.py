"""How do others do the same step? fastkd, fasterai 0.4.1 and torchdistill 1.1.5 in one process, timed in turns on the same batches.

    PYTHON benchmarks/peers.py          # PYTHON of an environment that has all three, see README.md

The formula is one, `(1-alpha)*CE + alpha*T²*KL` with T=4 and alpha=.5, and the losses of a batch are compared before the clock starts. `fasterai` is a fastai Learner with its callback, `torchdistill`
its `KDLoss` in a plain loop, `box` its `DistillationBox`. fastkd and fasterai are judged against a fastai step and the teacher's bare forward pass, torchdistill against a bare
step and that pass. `features` adds two terms that compare attention maps, each library with its own formula: that of fasterai and torchdistill is the mean of squares.

Memory is what autograd keeps during a step, parameters of both models left out, beside a plain step and the teacher's answer. A teacher is handed over as it comes, its parameters not frozen,
as each library shows in its own examples."""
from timing import *
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention,SoftTarget
import logging
logging.disable(logging.INFO)
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses import mid_level as td

T,alpha = 4.,.5

def io(s, t): return dict(s=dict(output=s)),dict(t=dict(output=t))

def box(student, teacher, terms):
    "torchdistill's loop: its optimizer, its hooks, its criterion"
    def part(model, **kw): return dict(forward_proc='forward_batch_only', requires_grad=model=='student', forward_hook=dict(output=[o for o in kw['layers'] if o!='.']))
    layers = ['.',*{o for _,_,ls in terms.values() for o in ls}]
    sub = {k:dict(criterion=dict(key=key, kwargs=kw), weight=1.) for k,(key,kw,_) in terms.items()}
    config = dict(num_epochs=1, teacher=part('teacher', layers=layers), student=part('student', layers=layers), optimizer=dict(key='AdamW', kwargs=dict(lr=1e-4)),
        criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=sub)))
    res = DistillationBox(teacher, student, {}, config, torch.device('cpu'), None, False, 1)
    res.student_model.train(); res.teacher_model.eval()
    def _step(i, b):
        x,y = plain_batch(b)
        res.post_forward_process(res.forward_process(x, y, supp_dict={}))
    return res,_step

kd_term = ('KDLoss',dict(student_module_path='.', student_module_io='output', teacher_module_path='.', teacher_module_io='output', temperature=T, alpha=alpha, reduction='batchmean'),())
def at_terms(layers):
    def side(k): return dict(io='output', path=k)
    pairs = {k:dict(student=side(k), teacher=side(k), weight=1.) for k in layers}
    return {'kd':kd_term, 'at':('ATLoss',dict(at_pairs=pairs, mode='code'),layers)}

def forms(work, features):
    "Learners, batches, the forms of a step, the box, and the parameters of all models"
    dls,batches,student,teacher,layers = make(work)
    def pair(): return deepcopy(student),deepcopy(teacher).eval()
    ours = KnowledgeDistillation(pair()[1], T=T, alpha=alpha, terms=[Term('attention', k, k) for k in layers] if features else ())
    def both(**kw): return SoftTarget(T=T, **kw)+(2*Attention(**kw) if features else 0)
    theirs = KnowledgeDistillationCallback(pair()[1], both, *(([f'model.{k}' for k in layers],layers) if features else ()), weight=alpha)
    learns,ask,alone = [learner(dls, student, o) for o in (None,ours,theirs)],asking(pair()[1]),deepcopy(student)
    loss,(m,t) = td.KDLoss('s','output','t','output', temperature=T, alpha=alpha),pair()
    asked = asking(t)
    loop = bare_step(m, lambda m,x,y: loss(*io(m(x), asked(0, (x,))), y))
    whole,boxed = box(*pair(), at_terms(layers) if features else dict(kd=kd_term))
    fs = dict(plain=learns[0].one_batch, teacher=ask, bare=bare_step(alone, task_loss), fastkd=learns[1].one_batch, fasterai=learns[2].one_batch, torchdistill=loop, box=boxed)
    if features: del fs['torchdistill']
    models = [l.model for l in learns]+[theirs.teacher,alone,m,t,whole.student_model,whole.teacher_model]
    return learns,batches,fs,whole,[p for o in models for p in o.parameters()]

bases = dict(fastkd=('plain','teacher'), fasterai=('plain','teacher'), torchdistill=('bare','teacher'), box=('bare','teacher'))

def run(work, n, features):
    learns,batches,fs,whole,params = forms(work, features)
    res = {}
    def _run():
        # before any step: all have the weights of the beginning
        losses = {}
        for k,l in zip(('fastkd','fasterai'), learns[1:]):
            w = deepcopy(l.model.state_dict())
            l.one_batch(0, batches[0])
            losses[k] = l.loss.item()
            l.model.load_state_dict(w)
        w = deepcopy(whole.student_model.state_dict())
        losses['box'] = whole.forward_process(*plain_batch(batches[0]), supp_dict={}).item()
        whole.student_model.load_state_dict(w)
        if not features and max(losses.values())-min(losses.values())>1e-4: raise ValueError(f'not the same loss: {losses}')
        t = in_turns(fs, n, 10, numbered(batches))
        names,saved = list(fs),{k:saved_bytes(partial(fs[k], 0, batches[0]), params) for k in fs if k!='teacher'}
        answer = fs['teacher'](0, batches[0]).nbytes
        res.update(forms=medians(names, t), losses=losses, rounds=len(t), spread=spread(t[...,1]),
            ratio={k:each_clock(over(names.index(k), *map(names.index, b)), t) for k,b in bases.items() if k in fs},
            memory={k:saved[k]/(saved[b[0]]+answer) for k,b in bases.items() if k in fs})
        for k,r in res['ratio'].items(): print(f"{work:8} {'features' if features else 'answers':9} {k:13} {res['forms'][k]['cpu']:9.3f} ms, over {'+'.join(bases[k]):14} {r['cpu'][0]:.3f} ({r['cpu'][1]:.3f}-{r['cpu'][2]:.3f})  memory {res['memory'][k]:.3f}", flush=True)
    inside_fits(learns, n+20, _run)
    return res

@call_parse
def main(
    steps:int=60, # Rounds; of the small nets four times as many
    works:str='digits,resnet', # Which, with commas
    out:str=str(here/'peers.json') # Results
):
    "Time the same distillation step in three libraries"
    from importlib.metadata import version
    began,res = begin(),{}
    with fair():
        for w in works.split(','):
            for features in (False,True): res[f"{w}{', features' if features else ''}"] = run(w, steps*(1 if w=='resnet' else 4), features)
    write(out, dict(works=res, versions={k:version(k) for k in ('fasterai','torchdistill')}), began)
