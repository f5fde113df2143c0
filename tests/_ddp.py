"What test_processes.py does in two processes, and again in one to compare"
import os,signal,sys,warnings
from contextlib import ExitStack
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai.distributed import DistributedDL
import torch.distributed as dist
from fastkd.all import *

def without_gpu():
    "fastai sends the order of the items by way of a GPU"
    def _broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

def gen(i): return torch.Generator().manual_seed(i)
def get_x(i): return torch.randn(1,8,8, generator=gen(i))
def get_y(i): return int(get_x(i)[0,:4].sum()>0)+2*int(get_x(i)[0,:,:4].sum()>0)

class Known(TfmdDL):
    "Items in an order that depends on the epoch only; one process gets in a batch what two get in theirs"
    def get_idxs(self):
        if not self.shuffle: return super().get_idxs()
        self.ep = getattr(self, 'ep', -1)+1
        i = torch.randperm(self.n, generator=gen(self.ep)).tolist()
        b,h = self.bs//2,self.n//2
        if num_distrib()==2: return i
        return [o for j in range(0, h, b) for o in i[j:j+b]+i[h+j:h+j+b]]

def data(n=48, n_valid=22, bs=8, store=None):
    "`bs` items in all processes together"
    blocks = [TransformBlock(dl_type=Known),CategoryBlock(vocab=[0,1,2,3])]+([] if store is None else [TeacherBlock(store)])
    db = DataBlock(blocks, get_x=get_x, get_y=get_y, n_inp=1, splitter=lambda o: (list(range(n)),list(range(n, n+n_valid))))
    return db.dataloaders(list(range(n+n_valid)), bs=bs//max(num_distrib(), 1), drop_last=False, num_workers=0)

def student(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,6,3,2,1), nn.ReLU(), nn.Flatten(), nn.Linear(96,4))
def teacher(seed=1):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,12,3,2,1), nn.Dropout(.5), nn.Flatten(), nn.Linear(192,4))
    m[-1].weight.data *= 5
    with torch.no_grad(): m(torch.stack([get_x(i) for i in range(40)]))
    return m

def make(dls=None, model=None, **kw):
    learn = Learner(data() if dls is None else dls, student() if model is None else model, CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy, **kw)
    learn.logger = noop
    return learn
def fit(learn, kd=None, n=2, lr=.1, cbs=(), **kw):
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False, **kw): learn.fit(n, lr, cbs=[*L(kd),*L(cbs)])
    return learn
def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])
def table(learn): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
KD = partial(KnowledgeDistillation, T=2.)
def conv_term():
    torch.manual_seed(2)
    return Term('hint', '2', '3', adapter=nn.Conv2d(6,12,1))

class FixedCRD(CRDLoss):
    "Negatives that depend on the item only, so that they are the same however many processes there are"
    func,hypers = CRDLoss.func,CRDLoss.hypers
    def negatives(self, index, targ=None): return (index[:,None]+torch.arange(1, 1+self.k, device=index.device))%self.n_items
def crd_term(weight=.5):
    def lin(i, ch): torch.manual_seed(i); return nn.Sequential(nn.Flatten(), nn.Linear(ch, 8))
    l = FixedCRD(d=8, k=5, T=.5, by_class=False, teach_grad=True)
    l.log_Z.fill_(3.)
    return Term(l, '2', '3', weight=weight, adapter=Adapter(student=lin(3, 96), teacher=lin(4, 192)), name='crd')

# -- what is done, by one process or by two: weights and what else is to be the same
def kd():
    t = teacher()
    was = {k:v.clone() for k,v in t.state_dict().items()}
    learn = fit(make(), KD(t))
    same = all(torch.equal(v, was[k]) for k,v in t.state_dict().items())
    return weights(learn.model), dict(table=table(learn), same=same, grads=sum(p.grad is not None for p in t.parameters()), training=t.training, wrapped=type(t).__name__, plain=type(learn.model).__name__)
def alone(): return weights(fit(make()).model), {}
def feature():
    cb = KD(teacher(), terms=conv_term())
    learn = fit(make(), cb)
    return weights(learn.model), dict(table=table(learn), adapter=weights(cb.terms.opt.modules))
def only_features():
    cb = KD(teacher(), alpha=0., task_weight=0., terms=conv_term())
    return weights(fit(make(), cb).model), dict(adapter=weights(cb.terms.opt.modules))
def two_terms_one_late():
    torch.manual_seed(5)
    late = Term('hint', '0', '0', weight=lambda p: float(p>.4), adapter=nn.Conv2d(4,8,1), name='late')
    cb = KD(teacher(), terms=[conv_term(), late])
    return weights(fit(make(), cb).model), dict(adapter=weights(cb.terms.opt.modules))
def schedules():
    learn = fit(make(), KnowledgeDistillation(teacher(), T=SchedLin(4,1), alpha=SchedLin(.9,.1)))
    return weights(learn.model), dict(table=table(learn))
def crd(d=None):
    cb = KD(teacher(), terms=crd_term())
    learn = fit(make(), cb)
    l = cb.terms.terms[0].loss
    return weights(learn.model), dict(bank_s=l.bank_s, bank_t=l.bank_t, log_Z=l.log_Z, adapter=weights(cb.terms.opt.modules), table=table(learn))
def stored(d): return weights(fit(make(), KD(TargetStore(d/'store'))).model), {}
def block(d):
    learn = fit(make(data(store=TargetStore(d/'store'))), KD(None))
    return weights(learn.model), dict(table=table(learn))
def stored_crd(d):
    cb = KD(TargetStore(d/'store'), terms=Term(FixedCRD(d=4, k=5, T=.5, by_class=False), adapter=None, name='crd'))
    return weights(fit(make(), cb).model), dict(bank=cb.terms.terms[0].loss.bank_s)
def unused():
    class Unused(nn.Module):
        def __init__(self): super().__init__(); self.m,self.other = student(),nn.Linear(3,3)
        def forward(self, x): return self.m(x)
    from accelerate import DistributedDataParallelKwargs
    return weights(fit(make(model=Unused()), KD(teacher(), terms=conv_term_in('m.')), kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]).model), {}
def conv_term_in(pre):
    t = conv_term()
    t.student = [pre+o for o in t.student]
    return t
def cotrained():
    t = nn.Sequential(nn.Flatten(), nn.Linear(64,4))
    with torch.no_grad(): t[1].weight.copy_(torch.randn(4,64, generator=gen(3))/8); t[1].bias.zero_()
    learn = fit(make(), KD(t, teacher_weight=1.))
    return weights(learn.model), dict(teacher=weights(t))
def ema():
    "Students that begin with weights of their own, until they are those of the first process"
    t = EMATeacher(.8)
    learn = fit(make(model=student(rank_distrib())), KD(t))
    return weights(learn.model), dict(mean=weights(t.model), steps=t.k)
def mutual():
    dls = data()
    learns = [make(dls, student(i)) for i in range(2)]
    with ExitStack() as s:
        for l in learns: s.enter_context(l.no_bar()),s.enter_context(l.no_logging()),s.enter_context(l.distrib_ctx(cpu=True, sync_bn=False))
        mutual_learning(learns, 2, .1, fit='fit')
    return torch.cat([weights(l.model) for l in learns]), dict(table=table(learns[1]))
class Stop(Callback):
    def after_batch(self):
        if self.training and self.iter==2: raise CancelFitException
def with_adapter(*cbs, more=0, bf16=False):
    learn,cb = make(),KD(teacher(), terms=[conv_term(), crd_term()])
    if bf16: learn.to_bf16()
    fit(learn, cb, cbs=cbs)
    if more: fit(learn, cb, n=more)
    return weights(learn.model), dict(adapter=weights(cb.terms.opt.modules), bank=cb.terms.terms[1].loss.bank_s)
def clipped(): return with_adapter(GradientClip(.05))
def in_bf16(): return with_adapter(bf16=True)
def interrupted_and_again(): return with_adapter(Stop(), more=1)
def going_on(d, nm):
    "From what another number of processes saved"
    cb = KD(teacher(), terms=[conv_term(), crd_term()])
    learn = make(path=d)
    learn.load(f'{nm}_student')
    cb.load(d/nm)
    fit(learn, cb, n=1)
    return weights(learn.model), dict(adapter=weights(cb.terms.opt.modules), bank=cb.terms.terms[1].loss.bank_s)
def saving(d, nm):
    cb = KD(teacher(), terms=[conv_term(), crd_term()])
    learn = fit(make(path=d), cb, n=1)
    learn.save(f'{nm}_student')
    cb.save(d/nm)
    return weights(learn.model), {}


runs = [kd,alone,feature,only_features,two_terms_one_late,schedules,crd,unused,cotrained,clipped,in_bf16,interrupted_and_again,ema,mutual]
with_folder = [stored,block,stored_crd]

# -- what must end with an error in all processes: here only one of them is wrong
class Odd(nn.Module):
    "Answers nonsense in the second process: about one item, or from a call on"
    def __init__(self, m, item=None, n=0): super().__init__(); self.m,self.x,self.n = m,item if item is None else get_x(item),n
    def forward(self, x):
        z,self.n = self.m(x),self.n-1
        if not rank_distrib() or self.n>=0: return z
        return z*torch.nan if self.x is None else torch.where((x==self.x).flatten(1).all(1, keepdim=True), torch.nan, z)
class Probs(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x).softmax(1)

def wrong(d, rank):
    def loaded():
        cb = KD(teacher(), terms=[conv_term(), crd_term()])
        return cb if rank else cb.load(d/'one')
    return dict(
        none=lambda: fit(make(), KD(None if rank else teacher())),
        probs=lambda: fit(make(), KD(Probs(teacher()) if rank else teacher())),
        teacher=lambda: fit(make(), KD(teacher(1+rank))),
        T=lambda: fit(make(), KnowledgeDistillation(teacher(), T=4.-rank)),
        alpha=lambda: fit(make(), KD(teacher(), alpha=SchedLin(.9,.1*rank))),
        loss=lambda: fit(make(), KD(teacher(), ['kd','dkd'][rank])),
        terms=lambda: fit(make(), KD(teacher(), terms=[conv_term()][rank:])),
        loaded=lambda: fit(make(), loaded()),
        items=lambda: fit(make(data(48-2*rank)), KD(teacher())),
        store=lambda: fit(make(), KD(TargetStore(d/['store','other'][rank]))),
        cache=lambda: fit(make(), KD(teacher(), cache=d/'cache')),
        nan=lambda: precompute(Odd(teacher(), 31), d/'nan'),
        made=lambda: precompute(teacher(1+rank), d/'made'))

def precompute(t, path, n=48, **kw): return precompute_targets(t, data(n), path, **{**dict(dtype='float32', task='softmax', bar=noop), **kw})
def attempt(f):
    try: return f() and 'nothing'
    except Exception as e: return f'{type(e).__name__}: {e}'

def main(d, last):
    rank,res = rank_distrib(),{}
    without_gpu()
    learn = make()
    # this is where the processes meet
    with learn.distrib_ctx(cpu=True, sync_bn=False): store = precompute(teacher(), d/'store')
    res['rows'] = len(store)
    for f in runs: res[f.__name__] = f()
    for f in with_folder: res[f.__name__] = f(d)
    saving(d, 'two')
    res['going_on'] = going_on(d, 'one')
    precompute(teacher(2), d/'other')
    res['wrong'] = {k:attempt(f) for k,f in wrong(d, rank).items()}
    res['nan_rows'] = len(TargetStore(d/'nan'))
    res['again'] = kd()
    res['at_rest'] = table(fit(make(), KD(teacher()), n=1, lr=0.))
    res['resumed'] = len(precompute(teacher(), d/'partly'))
    res['apart'] = apart(rank)
    torch.save(res, d/f'{rank}.pt')
    if last: dist.barrier(); globals()[last](d)

def apart(rank):
    "Each process trains a student of its own, with its own teacher"
    learn,cb = make(data(bs=8*max(num_distrib(), 1)), student(rank)),KD(teacher(rank), terms=[conv_term(), crd_term()])
    learn.dls.train.get_idxs = lambda: list(range(48))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=cb)
    return weights(learn.model),{}

# -- the end of one process
class Killed(nn.Module):
    def __init__(self, m, n): super().__init__(); self.m,self.n = m,n
    def forward(self, x):
        self.n -= 1
        if rank_distrib() and self.n<0: os.kill(os.getpid(), signal.SIGKILL)
        return self.m(x)
# the checks before training ask about 6 batches
def raises(d): fit(make(), KD(Odd(teacher(), n=8)))
def is_killed(d): fit(make(), KD(Killed(teacher(), 8)))
def is_killed_at_precompute(d):
    learn = make()
    with learn.distrib_ctx(cpu=True, sync_bn=False): precompute(Killed(teacher(), 3), d/'killed')
def only_one_comes(d): fit(make(), () if rank_distrib() else KD(Probs(teacher())))
def goes_alone(d): fit(make(), () if rank_distrib() else KD(teacher()))

def short(d):
    "One fit, and then a process that is killed"
    without_gpu()
    torch.save({'kd':kd()}, d/f'{rank_distrib()}.pt')
    dist.barrier()
    is_killed_at_precompute(d)

# fastai brings names that pytest would take for tests
__all__ = [o for o in globals() if not o.startswith(('_','test'))]
if __name__=='__main__': {'main':partial(main, last='raises'), 'short':short}[sys.argv[1]](Path(sys.argv[2]))
