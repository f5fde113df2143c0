"""What do the losses between layers cost? Each against the same formula written down plainly, timed in turns in one run.

    python benchmarks/losses.py                       # every feature, relation and contrastive loss, ten minutes on one core
    python benchmarks/losses.py --names at,rkd        # some of them
    python benchmarks/losses.py --peer                # against torchdistill, if it is installed
    python benchmarks/losses.py --at                  # a training step with two attention terms, against a loop with the same hooks

A sample is forward and backward to the student's feature, for 32 items of 512×7×7 and of 64×32×32. The forms of `plain_forms.py` give the same value, which is checked.
`--at` runs a training step in three forms: `fastkd` with `KnowledgeDistillation` and two Terms, `fastai` with the same hooks, teacher and formula in a callback of
20 lines, and `bare`, a loop without fastai.

CPU time of the thread (on a GPU, wall time), forms in random order, medians; brackets are 95% bootstrap intervals of the ratio over rounds."""
import csv,ctypes
from timing import *
from plain_forms import plain_forms,PlainCRD,amap

sizes,n_items,n_classes = {'512x7x7':(512,7,7), '64x32x32':(64,32,32)},200_000,100

# ---------------------------------------------------------------- what goes in
def all_names(): return [k for k in list_losses() if k in plain_forms or k=='crd']

def tree(f, o): return [tree(f, p) for p in o] if isinstance(o, (list,tuple)) else f(o)
def leaves(o): return [o] if isinstance(o, Tensor) else [q for p in o for q in leaves(p)]

def case(name, c, h, w, bs, device):
    "Loss, plain form, features of both sides and what else they get"
    torch.manual_seed(0)
    def r(*a): return torch.randn(bs, *a, device=device)
    s,t,y,kw = r(c,h,w),r(c,h,w),torch.randint(n_classes, (bs,), device=device),{}
    l,p = (get_loss(name) if name not in ('mgd','nd','crd') else None),plain_forms.get(name)
    if name=='fsp': s,t = [s,r(c,h,w)],[t,r(c,h,w)]
    if name=='vid': s = [s,torch.rand(1, c, 1, 1, device=device)+.5]
    if name=='pad': s = [s,r(c,h,w)]
    if name in ('srd','nd','skd_direction','aux_sskd','sskd'): s,t = [o.mean((2,3))*8 for o in (s,t)]
    if name=='dist_plus': s,t = [s,r(n_classes)],[t,r(n_classes)]
    if name=='mgd':
        net = mgd_generator(c).to(device).requires_grad_(False)
        l,p = MGDLoss(net),partial(p, net=net)
    if name=='nd':
        ctr = torch.randn(n_classes, c, device=device)
        l,p,kw = NDLoss(ctr),partial(p, centers=ctr),dict(targ=y)
    if name=='sskd': s,t,kw = [r(n_classes),s],[r(n_classes),t],dict(targ=y[:bs//4])
    if name=='crd':
        s,t,lab = r(128),r(128),torch.randint(n_classes, (n_items,))
        kw = dict(index=torch.randperm(n_items)[:bs].to(device))
        kw['targ'] = lab.to(device)[kw['index']]
        l,p = CRDLoss(n_items, labels=lab).to(device),PlainCRD(n_items).to(device)
    if p is None: raise ValueError(f"the loss {name!r} has no plain form: add one to benchmarks/plain_forms.py")
    return l,p,tree(lambda o: o.requires_grad_(), s),t,kw

# ---------------------------------------------------------------- the clock
def keep_heap():
    "Ask glibc not to hand freed memory back: whether it does depends on chance, and fetching it again costs as much as a small loss"
    try:
        for opt,v in ((-1,2**30),(-3,2**29)): ctypes.CDLL(None).mallopt(opt, v)
    except (OSError,AttributeError,TypeError): pass

def both(f, s, *args, **kw):
    "Value and gradients"
    v = f(s, *args, **kw)
    return v.detach(),torch.autograd.grad(v.sum(), leaves(s))

def row(part, name, size, times, names=('ours','plain')):
    "Print one line; what goes into the file"
    r,lo,hi = interval(over(0, 1), times)
    m = np.median(times, 0)
    print(f"{part:6} {name:16} {size:14} {names[0]} {m[0]:9.3f} ms  {names[1]} {m[1]:9.3f} ms  ratio {r:.3f} ({lo:.3f}-{hi:.3f})", flush=True)
    return dict(part=part, loss=name, size=size, form=names[0], against=names[1], ms=m[0].round(4), ms_against=m[1].round(4),
        ratio=round(r, 4), low=round(lo, 4), high=round(hi, 4), rounds=len(times))

def times(forms, rounds, device): return at_ease(forms, rounds, device=device)[...,int(device.type!='cuda')]

def against_plain(names, rounds, device, bs=32):
    res = []
    for name in names:
        for size,shape in sizes.items() if name!='crd' else {'128, k=16384':(1,1,1)}.items():
            l,p,s,t,kw = case(name, *shape, bs, device)
            vals = []
            for f in (l,p):
                torch.manual_seed(1)
                vals.append(both(f, s, t, **kw)[0])
            # negatives are drawn, and not by one rule
            if name!='crd': torch.testing.assert_close(*vals, rtol=2e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')
            res.append(row('plain', name, size, times([partial(both, f, s, t, **kw) for f in (l,p)], rounds, device)))
    return res

# ---------------------------------------------------------------- torchdistill
def io(**kw): return {k:dict(output=v, input=v) for k,v in kw.items()}
def one(s, t): return io(s=s),io(t=t)

def peers(td):
    "By name: keywords that make ours the same, torchdistill's loss, how it wants the features"
    def at(k): return dict(io='output', path=k)
    pair,code = dict(p=dict(student=at('s'), teacher=at('t'), weight=1.)),dict(mode='torchdistill')
    flow = dict(p={f'{w}_{o}':at(o) for w in ('student','teacher') for o in ('first','second')})
    flow['p']['weight'] = 1.
    four = [f'{w}_{o}_module_{p}' for w in ('student','teacher') for o in ('logit','feature') for p in ('path','io')]
    four = {k:('output' if k.endswith('io') else k.split('_')[1]) for k in four}
    def factors(s, t): return io(translator=s, feature_adapter=s),io(paraphraser=t)
    def twice(f): return lambda s,t: (f(s),f(t))
    return dict(
        at=(code, td.ATLoss(pair), one), ab=({}, td.AltActTransferLoss(pair, 1., 'mean'), one), ickd=(code, td.ChSimLoss(pair), one),
        fsp=(code, td.FSPLoss(flow), twice(lambda o: io(first=o[0], second=o[1]))), ft=(code, td.FTLoss(), factors), kta=(code, td.KTALoss(), factors),
        vid=({}, td.VIDLoss(pair), one), pad=({}, td.PADL2Loss('s','t'), lambda s,t: (io(s=s[0].flatten(1), var_estimator=s[1].flatten(1)),io(t=t.flatten(1)))),
        reviewkd=({}, td.HierarchicalContextLoss('s','output','t','output'), lambda s,t: (io(s=(s,None)),io(t=t))),
        norm=(code, td.RegularizationLoss('s'), one),
        dist_plus=(code, td.DISTPlusLoss(**four), twice(lambda o: io(feature=o[0], logit=o[1]))), affinity=(code, td.AffinityLoss('s','t'), one),
        rkd=({}, td.RKDLoss('s','t',1.,2.,'mean'), one), sp=(code, td.SPKDLoss('s','t','batchmean'), one),
        pkt=(code, td.PKTLoss('s','output','t','output'), lambda s,t: one(s.flatten(1), t.flatten(1))),
        skd_direction=({}, td.SKDDirectionLoss('s','output','t','output',.1,'paper'), one))

def against_peer(names, rounds, device, bs=32):
    try: from torchdistill.losses import mid_level as td
    except ImportError: raise SystemExit(
        "torchdistill is not installed, so there is nothing to compare with: `pip install torchdistill==1.1.5`, or leave `--peer` out")
    res,ps,who = [],peers(td),('ours','torchdistill')
    for name in names:
        # its loop over channels takes 20 GB at 64x32x32
        for size,shape in (({'10x33x33':(10,33,33)} if name=='affinity' else sizes) if name in ps else {}).items():
            (kw,l,to_io),(_,_,s,t,_) = ps[name],case(name, *shape, bs, device)
            forms = [get_loss(name, **kw),lambda s,t: l(*to_io(s,t))]
            torch.testing.assert_close(*[both(f, s, t)[0].flatten() for f in forms], rtol=2e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')
            res.append(row('peer', name, size, times([partial(both, f, s, t) for f in forms], rounds, device), who))
    if 'crd' in names:
        res.append(row('peer', 'crd: new bank', '200k items', times([lambda: CRDLoss(n_items),
            lambda: td.CRDLoss('s','e','t',128,n_items,16384,n_items)], rounds, device), who))
        l,_,s,t,kw = case('crd', 1, 1, 1, bs, device)
        o = td.CRDLoss('s','e','t',128,n_classes,l.k,n_classes).to(device)
        o.memory_v1,o.memory_v2,o.num_samples,neg = l.bank_s.clone(),l.bank_t.clone(),n_items,l.negatives(kw['index'], kw['targ'])
        idx = torch.cat([kw['index'][:,None],neg], 1)
        def theirs(s):
            # it keeps the graph of the first batch otherwise
            o.params = torch.tensor([l.k,.07,-1,-1,.5], device=device)
            return o({**io(s=F.normalize(s)), 'e':dict(input=dict(pos_idx=kw['index'], contrast_idx=idx))}, io(t=F.normalize(t)))
        res.append(row('peer', 'crd: a batch', '200k, k=16384', times([lambda: both(l, s, t, **kw, neg=neg), lambda: both(theirs, s)], rounds, device), who))
    return res

# ---------------------------------------------------------------- a step with two attention terms
def hooked(model, layers):
    "Where the outputs of `layers` are kept"
    kept = {}
    def _hook(k): return lambda m,i,o: kept.__setitem__(k, o)
    for k in layers: model.get_submodule(k).register_forward_hook(_hook(k))
    return kept

def at_loss(s, t): return (amap(s)-amap(t)).norm(dim=1).mean()

class PlainAT(Callback):
    "Two attention terms as one would write them into a callback"
    def __init__(self, teacher, layers): self.teacher,self.layers = teacher,layers
    def before_fit(self): self.kept,self.seen = hooked(self.model, self.layers),hooked(self.teacher, self.layers)
    def after_loss(self):
        with torch.no_grad(): self.teacher(self.x.as_subclass(Tensor))
        self.learn.loss_grad = self.learn.loss_grad.as_subclass(Tensor)+sum(at_loss(self.kept[k], self.seen[k]) for k in self.layers)
        self.learn.loss = self.learn.loss_grad.clone()

def at_forms(work, device):
    "The callbacks, batches and the three forms of a step"
    dls,batches,student,teacher,layers = make(work, device)
    def new(): return deepcopy(teacher).requires_grad_(False)
    learns = [learner(dls, student, PlainAT(new(), layers)),learner(dls, student, KnowledgeDistillation(new(), alpha=0, terms=[Term('at', k, k) for k in layers]))]
    frozen = new()
    kept,seen,ask = hooked(student, layers),hooked(frozen, layers),asking(frozen)
    def loss(model, x, y):
        res = F.cross_entropy(model(x), y)
        ask(0, (x,))
        return res+sum(at_loss(kept[k], seen[k]) for k in layers)
    return learns,batches,dict(bare=bare_step(student, loss), fastai=learns[0].one_batch, fastkd=learns[1].one_batch)

def steps_at(works, rounds, device):
    "The three forms in turns: all of `fastkd` over `bare` for the budget, and over a callback for what is ours"
    res = {}
    for name in works:
        learns,batches,forms = at_forms(name, device)
        n,got = rounds*(1 if name=='resnet' else 4),[]
        inside_fits(learns, n+12, lambda: got.append(in_turns(forms, n, 10, numbered(batches), device=device)))
        res[name] = dict(race(name, list(forms), got[0], [0], 1.05), over_fastai=race(f'{name}, over fastai', list(forms), got[0], [1])['ratio'])
    return res

@call_parse
def main(
    names:str='', # Losses, with commas; all if empty
    peer:bool=False, # Against torchdistill instead of the plain forms?
    at:bool=False, # A training step with two attention terms instead, into at.json?
    works:str='digits,size32,resnet', # With `at`: which nets
    rounds:int=15, # Samples of each form; fewer of slow ones. With `at`: steps, of the small nets four times as many
    out:str=None, # Results; None: losses.csv, where rows of the same part, loss and size are replaced, or at.json
    device:str='cpu' # Or 'cuda'
):
    "Time the losses between layers against plain forms of the same formulas"
    keep_heap()
    nms,dev,began = names.split(',') if names else all_names(),torch.device(device),begin()
    with fair():
        if at: return write(ifnone(out, here/'at.json'), dict(works=steps_at(works.split(','), max(rounds, 30), dev)), began, dev)
        rows = (against_peer if peer else against_plain)(nms, rounds, dev)
    out = Path(ifnone(out, here/'losses.csv'))
    rows = [dict(device=torch.cuda.get_device_name() if dev.type=='cuda' else 'cpu', **o) for o in rows]
    key = itemgetter('device','part','loss','size','against')
    old = list(csv.DictReader(out.open())) if out.exists() else []
    rows = {**{key(o):o for o in old}, **{key(o):o for o in rows}}.values()
    with out.open('w', newline='') as f:
        w = csv.DictWriter(f, list(first(rows)))
        w.writeheader()
        w.writerows(rows)
